"""Safe Latent Diffusion (SLD): guidance leads away from the concept where a picture is about to show it (Schramowski
et al., CVPR 2023, arXiv 2211.05105).

With e_c, e_S and e_0 what the UNet predicts for the prompt, the concept and the empty prompt, a step is guided by

    e~ = e_0 + s_g (e_c - e_0 - gamma)
    gamma = mu (e_S - e_0) + s_m nu,    nu <- beta_m nu + (1 - beta_m) gamma,    nu = 0 at first
    mu = min(1, |s_S (e_c - e_S)|) where e_c - e_S < lambda, else 0; each element of the latents by itself

and the first delta steps are left as they are, while nu builds up. Since gamma stands beside e_c, the filter puts
e_c - gamma in the place of e_c: that is right for every s_g, and for a UNet that is asked for a text alone.

Notation (code -> paper)

    concept        -> the text embedding of S, one prompt, "cat, dog", for all concepts
    delta          -> delta, the warm-up, in steps
    s_s            -> s_S, how steeply an element counts [sld_guidance_scale]
    lam            -> lambda, below which difference it does [sld_threshold]
    s_m, beta_m    -> scale and decay of the momentum [sld_momentum_scale, sld_mom_beta]

Formulas and presets were read in the paper's pipeline in diffusers 0.42 (Apache-2.0), which takes at most 1 where the
paper writes max(1, |phi|): `clamp`. Its preset "weak" has s_S = 20, the paper's table, as others quote it, 200. In both
the comparison has a sign: where e_c lies far below e_S mu is 1 as well, so unrelated prompts move too.

What is ours. S is the concept's name; there it is a list of what is unsafe. The rows of a call that stay are those with
the embedding of the empty prompt; a negative prompt is a text like any other and is filtered, and gamma always leads
away from the empty prompt (there, from the negative one). A drawing begins where the time step does not fall, so one
that begins in the middle, as a refiner's, warms up anew. A call with gradients or with several time steps at once, as
attacks make it, stands by itself: no momentum, and no warm-up, so that an attack sees the filter at every step. S is
read when the edit is fitted; what the UNet predicts for it follows other edits. Of two such filters the inner one sees
what the outer left.

Simplest: with mu = 1 everywhere (clamp "max", s_s 0, lam 100) and neither warm-up nor momentum, strength 1 - 1 / s_g
gives e_S + s_g (e_c - e_S), the negative prompt S; strength 1 gives e_0 + s_g (e_c - e_S).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from erasekit.concepts import Concept, check_templates, fill
from erasekit.edits import Edit
from erasekit.models import DiffusionModel
from erasekit.settings import about, apart, asked, check, check_first_family, check_no_anchor


@dataclass(frozen=True)
class Config:
    """Settings of SLD. delta, s_s, lam, s_m, beta_m: see above; lam in units of what the UNet predicts, of either sign.
    clamp: "min", mu is at most 1, as in the code; "max", it is at least 1, as the paper prints it. template: the
    prompt, with one {}, that the concepts are encoded in.
    """

    delta: int = 10
    s_s: float = 1000.0
    lam: float = 0.01
    s_m: float = 0.3
    beta_m: float = 0.4
    clamp: Literal["min", "max"] = "min"
    template: str = "{}"

    def __post_init__(self):
        check(self, delta=0, s_s=0, lam=-100, s_m=0, beta_m=0)
        if not self.beta_m < 1:
            raise ValueError(f"beta_m must be below 1, or the momentum never moves, got {self.beta_m!r}")
        if self.clamp not in ("min", "max"):
            raise ValueError(f"clamp must be min or max, got {self.clamp!r}")
        check_templates((self.template,))


PRESETS = {
    "sd14-object": Config(),  # medium, the one that others compare with
    "sd14-weak": Config(delta=15, s_s=20.0, lam=0.0, s_m=0.0, beta_m=0.0),
    "sd14-medium": Config(),
    "sd14-strong": Config(delta=7, s_s=2000.0, lam=0.025, s_m=0.5, beta_m=0.7),
    "sd14-max": Config(delta=0, s_s=5000.0, lam=1.0, s_m=0.5, beta_m=0.7),
    # ours: of guitar, pizza and rocket, four prompts each, 1 of 12 is seen then and 21 of 24 other pictures stay right;
    # with "medium" 12 and 24, without its warm-up 12 and 22; with "max" 1 and 20
    "emoji": Config(delta=0, lam=0.3, s_m=0.5, beta_m=0.7),
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
    """Erase concepts by a filter of what the UNet predicts; returns a guidance_filter Edit and leaves the model alone.

    preserve: noted, and not used. anchor: ValueError, since nothing takes the concept's place. config None: the preset
    of the model's world, or "sd14-object". generator: not used. callback: once, with the number of concepts. Raises
    ValueError for other models than Stable Diffusion 1 and 2, unknown concepts, nothing to erase, a concept both erased
    and preserved, and a prompt of all concepts that is too long.
    """
    check_first_family(model, "sld")
    check_no_anchor(anchor, "sld")
    config, erased, preserved, _ = asked(
        PRESETS, model, config, erase, preserve, anchor, generator, trains=False
    )
    apart(erased, preserved)
    prompt, _ = fill(config.template, ", ".join(one.name for one in erased))
    rows = model.encode(prompt)
    if callback is not None:
        callback({"step": 0, "concepts": len(erased)})
    own = {name: value for name, value in asdict(config).items() if name != "template"}
    concepts = about(erased, [], preserved)
    return Edit.from_filter(
        {"concept": rows}, {"formula": "sld", **own}, model, method="sld", config=config, concepts=concepts
    )
