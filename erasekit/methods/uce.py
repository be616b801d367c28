"""UCE: Unified Concept Editing (Gandikota et al., WACV 2024, arXiv 2308.14761).

Every cross-attention key and value projection is replaced by the closed-form minimizer of

    sum_E ||W' c_i - W c*_i||^2 + sum_P ||W' c_j - W c_j||^2     (+ ridge, see lam)

Notation (code -> paper or code of the authors):

    sources         -> c_i, embeddings of the concept to erase, one row per token
    targets         -> c*_i, embeddings of the anchor ("guide"), v*_i = W c*_i  ("replace")
    preserved       -> c_j, embeddings to keep
    erase_scale     -> erase_scale (1 in the paper's objective)
    preserve_scale  -> preserve_scale (1 in the paper's objective and the code of 2025; the default of the code of 2023
                       is 1 / n for n kept prompts, the empty one among them, and at least 0.1)
    lam             -> lamb, the ridge ||W' - W||^2; in the code, not in the paper's objective [code]

Other defaults are those of the authors' first code (2023) for Stable Diffusion 1.4 [code]. Not here: debiasing, and
the `tensor` technique, which is not a linear map of the embeddings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from erasekit import closed_form, prompt_rows
from erasekit.closed_form import ContextMap
from erasekit.concepts import Concept, check_templates, fill
from erasekit.edits import Edit
from erasekit.models import DiffusionModel
from erasekit.prompt_rows import Tokens
from erasekit.settings import about, anchors, apart, asked, check, warn_of_itself
from erasekit.text_entries import spaces

Entries = Literal["both", "sequence", "pooled"]


@dataclass(frozen=True)
class Config:
    """Settings of UCE; symbols in the module docstring.

    tokens: which rows of a prompt are erased. "last_subject": the last token of the concept [code, 2025
    rewrite]; "last_to_end": from there through the padding, cut at the end so that both prompts give as many
    rows [code, 2023]; "all": every position. A blank anchor counts as the token before its slot, which is the
    start token in "{}". templates: prompts with one {} that concept and anchor are both put into; their rows
    are stacked. synonyms: erase the synonyms of a Concept too. preserve_tokens, preserve_templates: the same
    for what is kept. preserve_null: also keep the empty prompt, on which guidance leans. entries: where the text is
    closed in a model that also reads one pooled row of the prompt (SDXL, SD 3, FLUX.1): the rows of its tokens, the
    pooled one, or both; what is left open leaks.
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
    entries: Entries = "both"

    def __post_init__(self):
        check(self, erase_scale=0, preserve_scale=0, lam=0)
        for name, known in (("tokens", Tokens), ("preserve_tokens", Tokens), ("entries", Entries)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(
                    f"{name} must be one of {', '.join(get_args(known))}, got {getattr(self, name)!r}"
                )
        for name in ("templates", "preserve_templates"):
            check_templates(getattr(self, name))
            if not getattr(self, name):
                raise ValueError(f"{name} must have at least one prompt")


PRESETS = {
    # the authors', 2023. Ours until then (captions, the last token, a smaller ridge: where RECE starts) leave far
    # more, and take less along where little is preserved: notebook 10. All tokens lose more: search_ten_uce.json
    "emoji": Config(),
    # erase_scale / preserve_scale / lamb and anchor: file names and defaults of the authors' code, 2023; its
    # preserve_scale is 1 where the empty prompt alone is kept
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
    slots, keep, concepts = _asked(erased, preserved, anchor, config)
    pairs = slots(config.templates)
    sources, targets, kept = prompt_rows.slot_rows(model, pairs, keep, config.tokens, config.preserve_tokens)
    if config.preserve_null:
        kept.append(model.encode("")[0].double())
    prompts = tuple((fill(t, phrase)[0], fill(t, other)[0]) for t, phrase, other in slots(("{}",)))
    return closed_form.Rows(sources, targets, torch.cat(kept) if kept else None, concepts, prompts)


def _asked(
    erased: Sequence[Concept], preserved: Sequence[Concept], anchor: str | Concept | None, config: Config
) -> tuple[Callable, list, dict]:
    """From templates (template, phrase, anchor) of all that is erased; (template, phrase) of what is kept; names."""
    apart(erased, preserved, config.synonyms)
    instead = anchors(erased, anchor, config.anchor)

    slots = lambda templates: [
        (template, phrase, other)
        for concept, other in zip(erased, instead, strict=True)
        for template in concept.templates or templates
        for phrase in (concept.name, *(concept.synonyms if config.synonyms else ()))
    ]
    keep = [(t, one.name) for one in preserved for t in one.templates or config.preserve_templates]
    concepts = about(erased, instead, preserved)
    return slots, keep, concepts


def one_map(model: DiffusionModel, config: Config) -> bool:
    """Whether one map of the text embeddings, that all keys and values of a UNet read, is all there is to solve for."""
    if model.own_loop and config.entries == "pooled":
        raise ValueError(f"{type(model.pipeline).__name__} reads no pooled text: leave `entries` as it is")
    return model.own_loop or (model.denoiser_part == "unet" and config.entries == "sequence")


def entry_rows(
    model: DiffusionModel,
    erased: Sequence[Concept],
    preserved: Sequence[Concept],
    anchor: str | Concept | None,
    config: Config,
) -> dict[int, closed_form.Rows]:
    """What `fit` solves for in each space that text entries read, {space: rows}, as the pipeline feeds them.

    Every distinct prompt is encoded once. Errors as in `fit`.
    """
    slots, keep, concepts = _asked(erased, preserved, anchor, config)
    pairs, first = slots(config.templates), spaces(model)
    wanted = {"both": (True, False), "pooled": (True,), "sequence": (False,)}[config.entries]
    chosen = [entry for _, entry in sorted(first.items()) if entry.pooled in wanted]
    if not chosen:
        raise ValueError(
            f"{type(model.denoiser).__name__} has no text entry of the kind {config.entries!r}: it reads "
            f"{', '.join(sorted({entry.reads for entry in first.values()}))}"
        )
    read, found = prompt_rows.reader(model), {}
    prompt = lambda template, phrase: read(fill(template, phrase)[0])
    for entry in chosen:
        both = [
            prompt_rows.paired(entry, prompt(t, phrase), prompt(t, instead), prompt(t, ""), config.tokens)
            for t, phrase, instead in pairs
        ]
        kept = [
            prompt_rows.own(entry, prompt(*slot), prompt(slot[0], ""), config.preserve_tokens)
            for slot in keep
        ]
        kept += [prompt("{}", "").rows[entry.space]] if config.preserve_null else []
        sources, targets = (torch.cat(side) for side in zip(*both, strict=True))
        found[entry.space] = closed_form.Rows(sources, targets, torch.cat(kept) if kept else None, concepts)
    return found


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

    A model with other text entries than keys and values (SDXL with its pooled row, every transformer) is solved for in
    each space that they read, in the rows that the pipeline feeds them: a text_maps Edit. Weights W become W T, biases
    stay, so that with hardly any ridge the concept gives what its anchor gave.

    anchor: what is drawn instead; else the concept's own, else the config's. config: None takes the preset of
    the model ("emoji" or "sd14-object"). generator: not used, UCE draws nothing. callback: called once, or once for
    each space with `entry`, its first layer, with rank and the relative residuals of erased and preserved embeddings.
    Raises ValueError for unknown concepts, nothing to erase, a concept both erased and preserved, over-long prompts and
    settings that make the system singular.
    """
    config, erased, preserved, _ = asked(
        PRESETS, model, config, erase, preserve, anchor, generator, trains=False
    )
    warn_of_itself(zip(erased, anchors(erased, anchor, config.anchor), strict=True))
    if not one_map(model, config):
        found = entry_rows(model, erased, preserved, anchor, config)
        named = dict(method="uce", config=config, concepts=next(iter(found.values())).concepts)
        return prompt_rows.solved(model, found, lambda rows: solve(rows, config), callback, 0, **named)
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
