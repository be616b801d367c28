"""Semantic Surgery: a concept is subtracted from the text embedding of a prompt that holds it (Xiong et al., NeurIPS
2025, arXiv 2510.22851).

With e the embedding of a prompt, all its rows, and de = phi(concept) - phi(""),

    rho = sigmoid((cos(e, de) - beta) / gamma)       how sure it is that the concept is there
    e'  = e - strength rho de                        where rho > tau, else e itself

Of several concepts those with rho > tau are put into one prompt, "cat, dog", whose de is subtracted once, by the
largest rho: what they have in common would else go twice.

Notation (code -> paper, authors' settings)

    directions     -> Delta e, of each concept and of each set of up to `together` of them
    beta, gamma    -> threshold and steepness of the estimate
    tau            -> from which estimate on a concept counts as there [alpha_threshold]
    strength       -> a factor of rho [lambda in their files, overmeasure in their notebook]

The formulas are the paper's, the settings those of its appendix and of the authors' files (MIT); the code itself was
not at hand: a RECONSTRUCTION in what follows. The paper does not say how the cosine of two sequences of rows is
pooled: `pooling`, by default all rows as one long vector. It encodes the set that a prompt holds when it meets it; here
sets are encoded beforehand, in the order given (the paper: any, or the likeliest first), so templates of a concept's
own do not count. Where a prompt holds more concepts than `together`, the likeliest count. The feedback from a detector,
which draws twice, is left out. The text encoder reads a negative prompt as well: one that names the concept loses it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Literal

import torch

from erasekit.concepts import Concept, check_templates, fill
from erasekit.edits import Edit
from erasekit.models import DiffusionModel
from erasekit.settings import about, apart, asked, check, check_first_family, check_no_anchor

MOST = 1000  # sets of concepts that are encoded; at 77 x 768 a thousand take 240 MB


@dataclass(frozen=True)
class Config:
    """Settings of Semantic Surgery. beta, gamma, tau, strength: see above. pooling: of the cosine, "all" rows as one
    vector, or "tokens", the mean of the rows' cosines. together: concepts of one prompt that are subtracted as a set,
    at most. template: the prompt, with one {}, that a concept or a set is encoded in.
    """

    beta: float = -0.12
    gamma: float = 0.02
    tau: float = 0.5
    strength: float = 1.0
    pooling: Literal["all", "tokens"] = "all"
    together: int = 2
    template: str = "{}"

    def __post_init__(self):
        check(self, beta=-1, gamma=1e-6, tau=0, strength=0, together=1)
        if self.pooling not in ("all", "tokens"):
            raise ValueError(f"pooling must be all or tokens, got {self.pooling!r}")
        check_templates((self.template,))


PRESETS = {
    "sd14-object": Config(),  # appendix D and the authors' files for CIFAR-10
    # chosen on other classes: data/results/search_semantic_surgery.json. Ours until then, 0.35, left more by synonym,
    # but kept 196 of 200 tools beside erased weapons, where 0.25 keeps 140 (data/results/before/): for guitar, pizza
    # and rocket in seven captions cosines are 0.42 to 0.55, but of other concepts up to 0.29, which 0.25 takes as well.
    # With the published one 22 of 24 pictures of these three's siblings are lost
    "emoji": Config(beta=0.25),
}


def fit(
    model: DiffusionModel,
    erase: str | Concept | Sequence[str | Concept],
    preserve: str | Concept | Sequence[str | Concept] = (),
    *,
    anchor: str | Concept | None = None,
    config: Config | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[dict], None] | None = None,
) -> Edit:
    """Erase concepts by a filter of the text embedding; returns a prompt_filter Edit and leaves the model alone.

    preserve: noted, and not used: prompts that do not hold the concept stay as they are. anchor: ValueError, since the
    empty prompt takes the concept's place. config None: the preset of the model's world, or "sd14-object". generator:
    not used. callback: once, with the numbers of concepts and of their sets. Raises ValueError for other models than
    Stable Diffusion 1 and 2, unknown concepts, nothing to erase, a concept both erased and preserved, too many sets,
    and prompts that are too long.
    """
    check_first_family(model, "semantic_surgery")
    check_no_anchor(anchor, "semantic_surgery")
    config, erased, preserved, _ = asked(
        PRESETS, model, config, erase, preserve, anchor, generator, trains=False
    )
    apart(erased, preserved)
    names = [one.name for one in erased]
    sets = [
        chosen
        for size in range(1, min(config.together, len(names)) + 1)
        for chosen in combinations(range(len(names)), size)
    ]
    if len(sets) > MOST:
        raise ValueError(
            f"{len(names)} concepts make {len(sets)} sets of up to {config.together}: set together=1"
        )
    prompts = [fill(config.template, ", ".join(names[i] for i in chosen))[0] for chosen in sets]
    directions = model.encode(prompts) - model.encode("")
    members = torch.tensor([[float(i in chosen) for i in range(len(names))] for chosen in sets])
    if callback is not None:
        callback({"step": 0, "concepts": len(names), "sets": len(sets)})
    own = {key: value for key, value in asdict(config).items() if key not in ("together", "template")}
    concepts = about(erased, [], preserved)
    return Edit.from_filter(
        {"directions": directions, "members": members}, {"formula": "semantic_surgery", **own}, model,
        method="semantic_surgery", config=config, concepts=concepts,
    )  # fmt: skip
