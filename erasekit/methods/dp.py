"""DP: double projection, an edit that moves nothing in the span of what is preserved.

The first projection chooses the target: c* is what of the concept's embedding c lies in the span of its guides S. The
second leaves alone whatever the preserved embeddings span: with Pi = I - (projection onto that span),

    T = I + (c* - c) (Pi c)^T / (c^T Pi c),    W' = W T

for every cross-attention key and value projection W. Then T c = c* and T k = k for every k in the span, both exactly,
with no weight to balance them. The released code treats the tokens of a concept one after another on the weights
edited so far, and a later token moves what an earlier one has set. Solved for all rows C at once (ours) the two
equations hold together:

    T = I + (C* - C) (C^T Pi C + ridge I)^-1 C^T Pi

Notation (code -> paper or code of the authors):

    sources        -> c, every token of the concept in the prompt, one row each
    guides         -> S, every token of the anchor
    preserved      -> C_pres, tokens of the preserved prompts
    outside        -> x = Pi c
    cut            -> the absolute bound of singular values that count as part of the span [code: 1e-6]

Formula and choices are from the authors' code as notes describe it [code]; the paper's text was not at hand: a
RECONSTRUCTION. The joint form, the ridge and the shares that `callback` reports are ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from erasekit.closed_form import ContextMap, Rows, complement, confined, residuals
from erasekit.concepts import (
    Concept,
    check_some_templates,
    eot_position,
    fill,
    slot_span,
    token_ids,
)
from erasekit.edits import Edit
from erasekit.models import DiffusionModel
from erasekit.settings import about, anchors, apart, asked, check, check_first_family, warn_of_itself


@dataclass(frozen=True)
class Config:
    """Settings of DP. anchor: what is drawn instead, where neither `fit` nor the concept says; a blank one is the token
    before its slot. joint: all rows at once (ours), else one after another as the code does. ridge: added to C^T Pi C
    of the joint form, relative to its largest eigenvalue. cut: singular values of the preserved rows up to it are no
    part of their span. templates, preserve_templates: prompts with one {}. preserve_tokens: "real", the tokens of a
    preserved prompt from the start to the first end token; "all", with its padding, which pictures read as well, but
    whose rows soon span the whole space, so that nothing can move. preserve_null: also keep the empty prompt.
    """

    anchor: str = " "
    joint: bool = True
    ridge: float = 0.0
    cut: float = 1e-6
    templates: tuple[str, ...] = ("{}",)
    preserve_templates: tuple[str, ...] = ("{}",)
    preserve_tokens: Literal["real", "all"] = "real"
    preserve_null: bool = True

    def __post_init__(self):
        check(self, ridge=0, cut=0)
        if self.preserve_tokens not in ("real", "all"):
            raise ValueError(f"preserve_tokens must be real or all, got {self.preserve_tokens!r}")
        check_some_templates(self.templates, self.preserve_templates)


PRESETS = {
    "sd14-object": Config(preserve_null=False),  # as the code has it
    # the same; the captions of this world in preserve_templates keep more still, but those of 54 names span all 384
    # directions, and nothing can move (data/results/ablation_dp_dog.json has both)
    "emoji": Config(preserve_null=False),
}


def rows(
    model: DiffusionModel,
    erased: Sequence[Concept],
    preserved: Sequence[Concept],
    anchor: str | Concept | None,
    config: Config,
) -> Rows:
    """Every token of each concept, beside its projection onto the guides, and the tokens of what is preserved.

    Raises ValueError for a concept that is also preserved.
    """
    apart(erased, preserved)
    instead = anchors(erased, anchor, config.anchor)
    sources, targets = [], []
    for concept, other in zip(erased, instead, strict=True):
        for template in concept.templates or config.templates:
            phrases = concept.name, other
            embedded = model.encode([fill(template, phrase)[0] for phrase in phrases]).double()
            old, new = (
                rows[slot_span(model.tokenizer, template, phrase)]
                for rows, phrase in zip(embedded, phrases, strict=True)
            )
            sources.append(old)
            targets.append(projected(old, new))
    kept = [fill(t, one.name)[0] for one in preserved for t in one.templates or config.preserve_templates]
    kept += [""] * config.preserve_null
    concepts = about(erased, instead, preserved)
    return Rows(torch.cat(sources), torch.cat(targets), _tokens(model, kept, config), concepts)


def _tokens(model: DiffusionModel, prompts: Sequence[str], config: Config) -> Tensor | None:
    if not prompts:
        return None
    embedded = model.encode(prompts).double()
    if config.preserve_tokens == "all":
        return embedded.flatten(0, 1)
    ends = eot_position(model.tokenizer, token_ids(model.tokenizer, prompts)).tolist()
    return torch.cat([row[: end + 1] for row, end in zip(embedded, ends, strict=True)])


def projected(sources: Tensor, guides: Tensor) -> Tensor:
    """c* = S (S^T S)^+ S^T c of rows c (n, d), guides S as rows (g, d); of a single guide that guide itself [code]."""
    if len(guides) == 1:
        return guides.expand_as(sources)
    return sources @ torch.linalg.pinv(guides) @ guides


def solve(given: Rows, config: Config) -> tuple[ContextMap, dict[str, float]]:
    """The map T; free: the least share ||Pi c||^2 / ||c||^2 of a source that the preserved span leaves free; condition:
    of C^T Pi C. ValueError where a source lies in the span, or the rows cannot be told apart outside it.
    """
    c, c_star = given.sources, given.targets
    pi = complement(given.preserved, c.shape[1], config.cut).to(c)
    outside = c @ pi
    free = outside.square().sum(1) / c.square().sum(1)
    if free.min() < 1e-10:
        raise ValueError(
            "a token to erase lies in the span of what is preserved, so nothing of it can be moved: preserve less, or "
            "raise cut"
        )
    gram = outside @ outside.T
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    told = {"free": float(free.min()), "condition": float(values[-1] / values[0].clamp_min(1e-300))}
    if not config.joint:
        t = ContextMap.identity(c.shape[1], c.device)
        for old, new, x in zip(c, c_star, outside, strict=True):
            t = t.compose(ContextMap((new - old)[:, None], (x / x.square().sum())[:, None]))
        return t, told
    ridge = config.ridge * float(values[-1])
    complaint = (
        "outside the preserved span the tokens to erase are not independent: set ridge, or joint=False"
    )
    if not torch.linalg.cond(gram + ridge * torch.eye(len(c)).to(c)) < 1e12:
        raise ValueError(complaint)
    return confined(c, c_star, pi, ridge, complaint), told


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
    """Erase concepts by a double projection; returns a context_map Edit and leaves the model alone.

    anchor: what is drawn instead, a guide of which every token counts. config None: the preset of the model's world, or
    "sd14-object". generator: not used. callback: once, with `closed_form.residuals`, free and condition (see `solve`).
    Raises ValueError for unknown concepts, nothing to erase, a concept both erased and preserved or in the span of what
    is preserved, and prompts that are too long.
    """
    check_first_family(model, "dp")
    config, erased, preserved, _ = asked(
        PRESETS, model, config, erase, preserve, anchor, generator, trains=False
    )
    warn_of_itself(zip(erased, anchors(erased, anchor, config.anchor), strict=True))
    given = rows(model, erased, preserved, anchor, config)
    context_map, told = solve(given, config)
    if callback is not None:
        callback({"step": 0, "rank": context_map.rank, **told, **residuals(context_map, given)})
    return Edit.from_context_map(context_map, model, method="dp", config=config, concepts=given.concepts)
