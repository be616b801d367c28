"""UCE: Unified Concept Editing (Gandikota et al., WACV 2024, arXiv 2308.14761).

Every cross-attention key and value projection is replaced by the closed-form minimizer of

    sum_E ||W' c_i - W c*_i||^2 + sum_P ||W' c_j - W c_j||^2     (+ ridge, see lam)

Notation (code -> paper or code of the authors):

    sources         -> c_i, embeddings of the concept to erase, one row per token
    targets         -> c*_i, embeddings of the anchor ("guide"), v*_i = W c*_i  ("replace")
    preserved       -> c_j, embeddings to keep
    erase_scale     -> erase_scale (1 in the paper's objective)
    preserve_scale  -> preserve_scale (1 in the paper's objective)
    lam             -> lamb, the ridge ||W' - W||^2; in the code, not in the paper's objective [code]

Defaults are those of the authors' first code (2023) for Stable Diffusion 1.4 [code]. Not here: debiasing, and
the `tensor` technique, which is not a linear map of the embeddings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from erasekit import closed_form
from erasekit.closed_form import ContextMap
from erasekit.concepts import Concept, check_templates, fill, slot_token
from erasekit.edits import Edit
from erasekit.models import DiffusionModel
from erasekit.settings import anchors, asked

Tokens = Literal["last_subject", "last_to_end", "all"]


@dataclass(frozen=True)
class Config:
    """Settings of UCE; symbols in the module docstring.

    tokens: which rows of a prompt are erased. "last_subject": the last token of the concept [code, 2025
    rewrite]; "last_to_end": from there through the padding, cut at the end so that both prompts give as many
    rows [code, 2023]; "all": every position. A blank anchor counts as the token before its slot, which is the
    start token in "{}". templates: prompts with one {} that concept and anchor are both put into; their rows
    are stacked. synonyms: erase the synonyms of a Concept too. preserve_tokens, preserve_templates: the same
    for what is kept. preserve_null: also keep the empty prompt, on which guidance leans.
    """

    erase_scale: float = 1.0
    preserve_scale: float = 1.0
    lam: float = 0.5
    anchor: str = " "
    tokens: Tokens = "last_to_end"
    templates: tuple[str, ...] = ("{}",)
    synonyms: bool = False
    preserve_tokens: Tokens = "all"
    preserve_templates: tuple[str, ...] = ("{}",)
    preserve_null: bool = True

    def __post_init__(self):
        for name in ("erase_scale", "preserve_scale", "lam"):
            value = getattr(self, name)
            if not (0 <= value < float("inf")):
                raise ValueError(f"{name} must be zero or positive, got {value}")
        for name in ("tokens", "preserve_tokens"):
            if getattr(self, name) not in get_args(Tokens):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(Tokens))}, got {getattr(self, name)!r}"
                )
        for name in ("templates", "preserve_templates"):
            check_templates(getattr(self, name))
            if not getattr(self, name):
                raise ValueError(f"{name} must have at least one prompt")


EMOJI_TEMPLATES = ("{}", "a {}", "a {} in flat style", "An {} image in flat style.")

PRESETS = {
    # ours, for the captions of the emoji world
    "emoji": Config(
        lam=0.1, tokens="last_subject", templates=EMOJI_TEMPLATES, preserve_templates=EMOJI_TEMPLATES
    ),
    # erase_scale / preserve_scale / lamb and anchor: file names and defaults of the authors' code, 2023
    "sd14-object": Config(anchor=" ", preserve_scale=1.0, lam=0.5),
    "sd14-nudity": Config(anchor=" ", preserve_scale=1.0, lam=0.5),
    "sd14-artist": Config(anchor="art", preserve_scale=0.1, lam=0.5),
}


def rows(
    model: DiffusionModel,
    erased: Sequence[Concept],
    preserved: Sequence[Concept],
    anchor: str | Concept | None,
    config: Config,
) -> closed_form.Rows:
    """Encode what `fit` solves for; every distinct prompt is encoded once. Errors as in `fit`."""
    if both := {one.name.lower() for one in erased} & {one.name.lower() for one in preserved}:
        raise ValueError(
            f"{', '.join(sorted(both))} cannot be both erased and preserved: take it out of one list"
        )
    instead = anchors(erased, anchor, config.anchor)

    slots = lambda templates: [
        (template, phrase, other)
        for concept, other in zip(erased, instead, strict=True)
        for template in concept.templates or templates
        for phrase in (concept.name, *(concept.synonyms if config.synonyms else ()))
    ]
    pairs = slots(config.templates)
    keep = [(t, one.name) for one in preserved for t in one.templates or config.preserve_templates]
    embed = _embedder(model, [(t, p) for t, *both in pairs for p in both] + keep)

    paired = [_paired_rows(model.tokenizer, embed, *pair, config.tokens) for pair in pairs]
    sources, targets = (torch.cat(side) for side in zip(*paired, strict=True))
    kept = [_rows(model.tokenizer, embed, *slot, config.preserve_tokens) for slot in keep]
    if config.preserve_null:
        kept.append(model.encode("")[0].double())
    concepts = {
        "erase": [concept.name for concept in erased],
        "anchor": instead,
        "preserve": [concept.name for concept in preserved],
    }
    prompts = tuple((fill(t, phrase)[0], fill(t, other)[0]) for t, phrase, other in slots(("{}",)))
    return closed_form.Rows(sources, targets, torch.cat(kept) if kept else None, concepts, prompts)


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
    """Erase concepts by one joint solve; returns a context_map Edit and leaves the model alone.

    anchor: what is drawn instead; else the concept's own, else the config's. config: None takes the preset of
    the model ("emoji" or "sd14-object"). generator: not used, UCE draws nothing. callback: called once, with
    rank and the relative residuals of erased and preserved embeddings. Raises ValueError for unknown
    concepts, nothing to erase, a concept both erased and preserved, over-long prompts and settings that make
    the system singular.
    """
    config, erased, preserved, _ = asked(
        PRESETS, model, config, erase, preserve, anchor, generator, trains=False
    )
    given = rows(model, erased, preserved, anchor, config)
    context_map = solve(given, config)
    edit = Edit.from_context_map(context_map, model, method="uce", config=config, concepts=given.concepts)
    if callback is not None:
        callback({"step": 0, "rank": edit.context_map.rank, **closed_form.residuals(context_map, given)})
    return edit


def solve(given: closed_form.Rows, config: Config) -> ContextMap:
    """UCE's map of these rows, in float64."""
    return closed_form.solve(
        given.sources,
        given.targets,
        given.preserved,
        erase_scale=config.erase_scale,
        preserve_scale=config.preserve_scale,
        lam=config.lam,
    )


def _embedder(model: DiffusionModel, slots: Sequence[tuple[str, str]]) -> Callable[[str, str], Tensor]:
    """A look-up (template, phrase) -> (length, d) float64; every distinct prompt is encoded once."""
    prompts = list(dict.fromkeys(fill(*slot)[0] for slot in slots))
    table = dict(zip(prompts, model.encode(prompts).double(), strict=True))
    return lambda template, phrase: table[fill(template, phrase)[0]]


def _paired_rows(
    tokenizer, embed, template: str, phrase: str, anchor: str, tokens: Tokens
) -> tuple[Tensor, Tensor]:
    """Source and target rows, (n, d) each, of one template with the concept and with its anchor."""
    old, new = (
        _rows(tokenizer, embed, template, phrase, tokens),
        _rows(tokenizer, embed, template, anchor, tokens),
    )
    count = min(len(old), len(new))  # the rows start at the aligned token; what differs is how many follow
    return old[:count], new[:count]


def _rows(tokenizer, embed, template: str, phrase: str, tokens: Tokens) -> Tensor:
    block = embed(template, phrase)
    if tokens == "all":
        return block
    start = slot_token(tokenizer, template, phrase)
    return block[start : start + 1] if tokens == "last_subject" else block[start:]
