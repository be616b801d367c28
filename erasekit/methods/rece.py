"""RECE: Reliable and Efficient Concept Erasure (Gong et al., ECCV 2024, arXiv 2407.12383).

UCE first. Then, in every round, look for the embedding c' with which the edited model still draws the concept, and
erase that as well:

    derive   min_c'  sum_i ||W_i^new c' - W_i^old c||^2 + lam ||c'||^2
    erase    min_W'  ||W' c' - W c*||^2 + lambda_1 sum_P ||W' c_j - W c_j||^2 + lambda_2 ||W' - W||^2

over all cross-attention key and value projections W_i at once; W^old are the weights before any edit, W those that
the round starts from. Since every edit so far is one map, W^new = W^old T, only the Gram matrix A = sum_i W_i^old^T
W_i^old is needed, computed once:

    c' = (lam I + T^T A T)^-1 T^T A c

and the whole of RECE is again one d x d matrix. With lam = 0 and an invertible T, c' = T^-1 c: the edited model then
sees exactly the erased concept, which is why another round always finds something to erase.

Notation (code -> paper or code of the authors):

    sources        -> c, embeddings of the concept, one row per token
    targets        -> c*, embeddings of the anchor
    derived        -> c'
    gram           -> A (ours)
    lam            -> lambda, the regularizer of the derivation
    lambda_1       -> lambda_1, weight of the preserved embeddings (preserve_scale of the code)
    lambda_2       -> lambda_2, weight of the ridge (lamb of the code)
    epochs         -> num_epochs, rounds of derive and erase

The full text of the paper could not be read: objective and symbols are from its abstract and the authors' README and
code [code]. Defaults and presets are the settings of the README; the start of "emoji" is ours.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from erasekit import closed_form
from erasekit.closed_form import ContextMap
from erasekit.concepts import Concept
from erasekit.edits import Edit
from erasekit.layers import cross_attention_kv
from erasekit.methods import uce
from erasekit.models import DiffusionModel
from erasekit.settings import EMOJI_CAPTIONS, anchors, asked, check, warn_of_itself
from erasekit.text_entries import text_entries
from erasekit.tuning import telling

Regularizer = Literal["zero", "anchor", "source", "surrogate", "both"]
Pairs = Literal["positions", "start", "held"]


@dataclass(frozen=True)
class Config:
    """Settings of RECE; symbols in the module docstring.

    start: the UCE edit that the rounds begin with, and which rows of a prompt are erased. regularizer: what lam pulls
    c' to. "zero": ||c'||^2, that of the README's settings; and from the code alone, "anchor": ||c' - c*||^2, "source":
    ||c' - c||^2, "surrogate": sum_i ||W_i^new (c' - c)||^2, "both": the last two. pairs: which rows of concept and
    anchor prompt the rounds pair. "positions": row by row, all of them, in "{}", whatever rows the start pairs [code];
    a blank anchor's end token is then the target of the subject, which UCE had sent to the start token. "start": the
    pairs of the start, ours. "held": as "positions", and the pairs of the start are erased again in every round, ours:
    a round moves the word too, away from its anchor where much is preserved, and nothing else holds it there.
    """

    start: uce.Config = uce.Config()
    epochs: int = 3
    lam: float = 0.1
    lambda_1: float = 0.1
    lambda_2: float = 0.1
    erase_scale: float = 1.0
    regularizer: Regularizer = "zero"
    pairs: Pairs = "positions"

    def __post_init__(self):
        check(self, epochs=0, lam=0, lambda_1=0, lambda_2=0, erase_scale=0)
        for name, known in (("regularizer", get_args(Regularizer)), ("pairs", get_args(Pairs))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


PRESETS = {
    # start: ours, for the captions of the emoji world, tokens as in UCE's code of 2025; the rest as the authors have it
    # for nudity
    "emoji": Config(
        start=uce.Config(
            lam=0.1, tokens="last_subject", templates=EMOJI_CAPTIONS, preserve_templates=EMOJI_CAPTIONS
        ),
        epochs=3, lam=0.1,
    ),
    # lambda and epochs of the authors' README; start: defaults of their UCE script
    "sd14-nudity": Config(start=uce.PRESETS["sd14-nudity"], epochs=3, lam=0.1),
    "sd14-unsafe": Config(
        # the code preserves the empty prompt once for each of the eleven words
        start=uce.PRESETS["sd14-nudity"], epochs=2, lam=0.1, lambda_1=1.1,
    ),
    "sd14-artist": Config(start=uce.PRESETS["sd14-artist"], epochs=1, lam=1e-3),
    "sd14-object-hard": Config(start=uce.PRESETS["sd14-object"], epochs=1, lam=1e-3),  # church, garbage truck
    "sd14-object": Config(start=uce.PRESETS["sd14-object"], epochs=1, lam=0.1),
}  # fmt: skip


def derive(
    context_map: ContextMap,
    gram: Tensor,
    sources: Tensor,
    lam: float,
    *,
    regularizer: Regularizer = "zero",
    targets: Tensor | None = None,
) -> Tensor:
    """The embeddings c' (n, d) that make the edited model W T respond as the original W does to `sources` (n, d).

    gram: `closed_form.weight_gram` of the original weights, (d, d). targets: rows c* (n, d) for "anchor". Every row is
    derived by itself, so a whole prompt may be given. Raises ValueError where lam leaves the system singular.
    """
    if regularizer == "anchor" and targets is None:
        raise ValueError('the regularizer "anchor" pulls to the anchor: pass its rows as targets')
    gram, c = gram.double(), sources.double()
    t = context_map.apply_to_weight  # x -> x T
    eye = torch.eye(len(gram)).to(gram)
    left, right = t(t(gram).T.contiguous()), t(c @ gram)  # T^T A T, and the rows (T^T A c)^T
    if regularizer in ("surrogate", "both"):
        left, right = (1 + lam) * left, right + lam * (c @ left)
    if regularizer in ("source", "both"):
        left, right = left + lam * eye, right + lam * c
    elif regularizer == "anchor":
        left, right = left + lam * eye, right + lam * targets.double()
    elif regularizer == "zero":
        left = left + lam * eye
    singular = f"no unique embedding regenerates the concept with lam={lam} and regularizer={regularizer!r}: raise lam"
    return torch.cholesky_solve(right.T, closed_form.cholesky((left + left.T) / 2, singular)).T


def attack_residual(context_map: ContextMap, gram: Tensor, derived: Tensor, sources: Tensor) -> float:
    """||W T c' - W c|| over ||W c||, all projections and rows together: 0 when the edited model sees the concept."""
    sources = sources.double()
    difference = context_map.apply(derived.double()) - sources
    squared = lambda x: (x @ gram * x).sum().clamp_min(0)
    return float((squared(difference) / squared(sources).clamp_min(torch.finfo(torch.float64).tiny)).sqrt())


def positions(model: DiffusionModel, given: closed_form.Rows) -> closed_form.Rows:
    """Every row of a concept's prompt beside the row of the anchor's prompt at its position [code]."""
    sides = zip(*given.prompts, strict=True)
    sources, targets = (model.encode(side).double().flatten(0, 1) for side in sides)
    return replace(given, sources=sources, targets=targets)


def rounds(
    t: ContextMap,
    gram: Tensor,
    paired: closed_form.Rows,
    preserved: Tensor | None,
    config: Config,
    held: closed_form.Rows | None = None,
) -> Iterator[tuple[Tensor, ContextMap]]:
    """The embeddings (n, d) that each of `config.epochs` rounds derives from the map so far, and the map after it.
    held: pairs that every round erases as well.
    """
    for _ in range(config.epochs):
        derived = derive(
            t, gram, paired.sources, config.lam, regularizer=config.regularizer, targets=paired.targets
        )
        step = closed_form.solve(
            derived if held is None else torch.cat([derived, held.sources]),
            paired.targets if held is None else torch.cat([paired.targets, held.targets]),
            preserved,
            erase_scale=config.erase_scale,
            preserve_scale=config.lambda_1,
            lam=config.lambda_2,
        )
        t = t.compose(step)
        yield derived, t


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
    """Erase concepts by UCE and `epochs` rounds of derive and erase; returns a context_map Edit, or a text_maps Edit as
    `uce.fit` does.

    Several concepts are derived from the same weights and erased jointly. anchor, generator and errors as in
    `uce.fit`; config None takes the preset of the model ("emoji" or "sd14-object"). callback: once after UCE (step 0)
    and once per round, with step, context_map (T so far), what `closed_form.residuals` says, and in rounds derived
    (n, d), sources, norm_ratio ||c'|| / ||c||, and attack_residual of the derived embedding before the round erased
    it and after; with several spaces for each of them, with `entry`, its first layer.
    """
    config, erased, preserved, _ = asked(
        PRESETS, model, config, erase, preserve, anchor, generator, trains=False
    )
    warn_of_itself(zip(erased, anchors(erased, anchor, config.start.anchor), strict=True))
    about = model, erased, preserved, anchor
    if uce.one_map(model, config.start):
        given = uce.rows(*about, config.start)
        paired = given if config.pairs == "start" else positions(model, given)
        gram = closed_form.weight_gram(layer.weight for layer in cross_attention_kv(model.unet).values())
        t = _erased(gram, given, paired, config, callback)
        return Edit.from_context_map(t, model, method="rece", config=config, concepts=given.concepts)
    given = paired = uce.entry_rows(*about, config.start)
    if config.pairs != "start":
        paired = uce.entry_rows(*about, replace(config.start, tokens="all", templates=("{}",)))
    entries, maps = text_entries(model), {}
    for space, own in given.items():
        layers = [entry for entry in entries if entry.space == space]
        weights = (model.denoiser.get_parameter(entry.weight)[:, slice(*entry.columns)] for entry in layers)
        report = telling(callback, entry=f"{model.denoiser_part}.{layers[0].layer}")
        maps[space] = _erased(closed_form.weight_gram(weights), own, paired[space], config, report)
    concepts = next(iter(given.values())).concepts
    return Edit.from_text_maps(maps, entries, model, method="rece", config=config, concepts=concepts)


def _erased(
    gram: Tensor,
    given: closed_form.Rows,
    paired: closed_form.Rows,
    config: Config,
    callback: Callable[[dict], None] | None,
) -> ContextMap:
    """The map after UCE and all rounds. gram: of the weights that read these rows."""
    start = config.start
    kept = None if given.preserved is None else closed_form.condensed(given.preserved)
    scales = dict(erase_scale=start.erase_scale, preserve_scale=start.preserve_scale, lam=start.lam)
    t = closed_form.solve(given.sources, given.targets, kept, **scales)
    if callback is not None:
        callback({"step": 0, "context_map": t, **closed_form.residuals(t, given)})
    gram = gram.to(given.sources.device)
    held = given if config.pairs == "held" else None
    for epoch, (derived, after) in enumerate(rounds(t, gram, paired, kept, config, held)):
        if callback is not None:
            callback(
                {
                    "step": epoch + 1,
                    "context_map": after,
                    "derived": derived,
                    "sources": paired.sources,
                    "norm_ratio": float(derived.norm() / paired.sources.norm()),
                    "attack_residual_before": attack_residual(t, gram, derived, paired.sources),
                    "attack_residual": attack_residual(after, gram, derived, paired.sources),
                    **closed_form.residuals(after, given),
                }
            )
        t = after
    return t
