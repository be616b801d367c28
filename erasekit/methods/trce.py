"""TRCE: reliable erasure of malicious concepts (Chen et al., ICCV 2025, arXiv 2503.07389).

Stage 1 maps the first end token of malicious prompts, in which CLIP gathers the sentence whether or not it names the
concept, to that of the same prompt with a safe phrase; for every key and value projection W at once

    min_W'  1/n sum_i ||W' e^m_i - W e^s_i||^2 + eta sum_j ||W' e^k_j - W e^k_j||^2

which is UCE's problem, so the answer is one map of the text embeddings. Stage 2 trains the UNet's visual layers on the
early half of the way to a malicious picture, to prefer a safe direction to the unsafe one by a margin:

    f(c)  = eps*(z, 0) + beta (eps*(z, c) - eps*(z, 0))             of the model before any edit
    L_erase = max(||eps(z) - f(c^s)||^2 - ||eps(z) - f(c^m)||^2 + delta, 0)
    L = L_erase + lambda ||eps(z^u, 0) - eps_1(z^u, 0)||^2          z^u: on the way to an unconditional picture

The difference of the two norms is linear in eps(z): with D = f(c^s) - f(c^m) = beta (eps*(z, c^s) - eps*(z, c^m)) it is
-2 mean(eps(z) D) + k, and D and k do not depend on what is trained. They are computed once.

Notation (code -> paper): malicious, safe -> e^m, e^s; preserved -> e^k; eta -> eta; beta -> beta; margin -> delta;
weight -> lambda. The paper's text could not be read beyond its beginning: objectives are from its authors' pages,
numbers from their code [code], which has no licence; nothing of it was copied.
"""

import csv
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from erasekit import closed_form, prompt_rows, states
from erasekit.closed_form import ContextMap
from erasekit.concepts import (
    Concept,
    check_some_templates,
    eot_position,
    fill,
    slot_span,
    token_ids,
)
from erasekit.conditioning import joined, predict
from erasekit.edits import Edit
from erasekit.layers import unet_parameters
from erasekit.models import DiffusionModel
from erasekit.retained import retained
from erasekit.sampling import config_of, ddim, walk
from erasekit.settings import EMOJI_TEMPLATES, asked, check, warn_of_itself
from erasekit.states import States, cached
from erasekit.text_entries import spaces
from erasekit.tuning import check_changed, descend, difference, trainee

Token = Literal["sot", "key", "eot", "last", "all"]
Stages = Literal["both", "text", "trajectory"]
PHRASES = Path(__file__).with_name("trce_phrases.csv")
KEPT = torch.float16  # latents and directions of the early ways (ours; single precision in the authors' code)

# ours; the paper's come from another project
TEMPLATES = (
    "{}", "a photo of {}", "a picture of {}", "an image depicting {}", "a close view of {}", "a drawing of {}",
    "a painting of {}", "{} in the foreground", "a scene with {}", "a detailed photo of {}", "somebody with {}",
    "{} seen from afar", "a dark picture of {}", "a bright picture of {}", "an old photo of {}",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Settings of TRCE; symbols in the module docstring.

    stages: "text" (stage 1), "trajectory" (stage 2 on the unedited model), "both". tokens: rows of a malicious prompt
    that are mapped: "eot" to the safe prompt's first end token; "sot", "last" (the last position), "all" to the same
    of the safe prompt; "key" (the phrase) to its last position [code]. eta: weight of the mean over preserved captions
    beside the mean over malicious prompts. lam: ridge; the paper has none. templates: for phrases and safe phrases
    alike, in stage 1; steer_templates: in stage 2. anchor: the safe phrase of a concept that has none of its own.
    keep_templates: for preserved captions, taken in turn. beta: guidance of f. margin: delta. weight: lambda. sampler:
    steps of the sampler that draws the ways; early: the first so many are used. guidance, noises: of these ways, and
    ways per prompt. calm: unconditional ways. iterations, lr, batch: of AdamW; keep_batch: rows of the preservation.
    branches: "both" puts the hinge on the conditional and on the unconditional prediction [code], "text" on the first
    alone. reference: "stage1" [code] or "original" (the paper's eps) is what the unconditional prediction is held to.
    faithful: the slips of the code: the end token found by counting words, latents one step ahead of their time steps,
    gradients of all steps added up. (That of its preservation, whose time steps lag too, is not.)
    """

    stages: Stages = "both"
    tokens: tuple[Token, ...] = ("eot",)
    eta: float = 1e-4
    lam: float = 0.0
    templates: tuple[str, ...] = TEMPLATES
    steer_templates: tuple[str, ...] = ("a photo of {}",)
    anchor: str = " "
    keep_templates: tuple[str, ...] = ("a photo of {}",)
    beta: float = 16.0
    margin: float = 0.01
    weight: float = 100.0
    sampler: int = 50
    early: int = 25
    guidance: float = 3.0
    noises: int = 5
    calm: int = 400
    iterations: int = 300
    lr: float = 1e-6
    batch: int = 1
    keep_batch: int = 4
    branches: Literal["both", "text"] = "both"
    reference: Literal["stage1", "original"] = "stage1"
    faithful: bool = False

    def __post_init__(self):
        least = {
            "sampler": 1,
            "early": 1,
            "noises": 1,
            "calm": 1,
            "iterations": 1,
            "batch": 1,
            "keep_batch": 1,
        }
        check(self, eta=0, lam=0, beta=0, margin=0, weight=0, lr=0, **least)
        kinds = {
            "stages": Stages,
            "branches": Literal["both", "text"],
            "reference": Literal["stage1", "original"],
        }
        for name, choices in kinds.items():
            if getattr(self, name) not in get_args(choices):
                given = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {given!r}")
        if not self.tokens or set(self.tokens) - set(get_args(Token)):
            raise ValueError(f"tokens must be some of {', '.join(get_args(Token))}, got {self.tokens!r}")
        if self.early > self.sampler:
            raise ValueError(f"early must be at most sampler ({self.sampler}), got {self.early}")
        if self.guidance <= 1:
            raise ValueError(f"the ways are drawn with guidance above 1, got {self.guidance}")
        check_some_templates(self.templates, self.steer_templates, self.keep_templates)


PRESETS = {
    # ours, for the captions of the emoji world
    "emoji": Config(
        eta=0.1, lam=1e-3, templates=EMOJI_TEMPLATES, steer_templates=EMOJI_TEMPLATES,
        keep_templates=EMOJI_TEMPLATES, beta=4.0, weight=10.0,
        sampler=24, early=12, noises=1, calm=32, iterations=200, lr=3e-4, batch=4, keep_batch=8,
    ),
    # the authors' code: s^2 with s = 0.01 and 0.02, on the mean of (probably) 30,000 captions; 26 early steps there
    "sd14-nudity": Config(),
    "sd14-unsafe": Config(eta=4e-4, iterations=900, calm=1200, steer_templates=("an image depicting {}",)),
    "sd14-object": Config(),
}  # fmt: skip


# Stage 1


@cache
def _phrases() -> dict[str, tuple[tuple[str, str], ...]]:
    found: dict[str, list] = {}
    with PHRASES.open(newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["concept"], []).append((row["phrase"], row["safe"]))
    return {concept: tuple(pairs) for concept, pairs in found.items()}


def phrases(concept: Concept, anchor: str | None, config: Config) -> list[tuple[str, str]]:
    """(malicious, safe) phrases of a concept: those of `trce_phrases.csv` beside this file, else its name and synonyms.

    Safe is `anchor`, else the concept's own, else the file's, else the config's.
    """
    listed = _phrases().get(concept.name.lower(), ())
    words = dict(listed) or dict.fromkeys((concept.name, *concept.synonyms), config.anchor)
    instead = anchor if anchor is not None else concept.anchor
    return [(phrase, safe if instead is None else instead) for phrase, safe in words.items()]


def pairs(erased: Sequence[Concept], anchor: str | None, config: Config) -> list[tuple[str, str, str, str]]:
    """(malicious prompt, its phrase, safe prompt, their template), without repeats."""
    found = {}
    for concept in erased:
        for template in concept.templates or config.templates:
            for phrase, safe in phrases(concept, anchor, config):
                found[fill(template, phrase)[0]] = (phrase, fill(template, safe)[0], template)
    return [(malicious, *rest) for malicious, rest in found.items()]


def first_end(tokenizer, prompt: str, faithful: bool = False) -> int:
    """Position of the first end token; with `faithful` where the code looks for it, behind as many tokens as there are
    words: too early wherever a word has several pieces.
    """
    if faithful:
        return min(len(prompt.split()) + 1, tokenizer.model_max_length - 1)
    return int(eot_position(tokenizer, token_ids(tokenizer, [prompt]))[0])


def rows(
    model: DiffusionModel, given: Sequence[tuple[str, str, str, str]], config: Config
) -> tuple[Tensor, Tensor]:
    """Source and target rows (n, d), float64, of the pairs; one row per pair and token, of "key" as many as the phrase
    has tokens, of "all" the whole prompt.
    """
    prompts = list(dict.fromkeys(prompt for malicious, _, safe, _ in given for prompt in (malicious, safe)))
    table = dict(zip(prompts, model.encode(prompts).double(), strict=True))
    tokenizer, sources, targets = model.tokenizer, [], []
    for malicious, phrase, safe, template in given:
        old, new = table[malicious], table[safe]
        at = lambda prompt: first_end(tokenizer, prompt, config.faithful)
        for token in config.tokens:
            if token == "all":
                taken = [(old, new)]
            elif token == "key":
                key = old[slot_span(tokenizer, template, phrase)]
                taken = [(key, new[-1:].expand(len(key), -1))]
            else:
                i, j = {"sot": (0, 0), "eot": (at(malicious), at(safe)), "last": (-1, -1)}[token]
                taken = [(old[i][None], new[j][None])]
            for source, target in taken:
                sources.append(source)
                targets.append(target)
    return torch.cat(sources), torch.cat(targets)


def entry_rows(
    model: DiffusionModel,
    given: Sequence[tuple[str, str, str, str]],
    captions: Sequence[str],
    concepts: dict,
    config: Config,
) -> dict[int, closed_form.Rows]:
    """{space: rows} of stage 1 in a model with other text entries than keys and values. Of several text encoders each
    has its end token; one that has none (a language model) gathers the sentence in its last token. A pooled row is
    "eot" and "last".
    """
    if config.faithful:
        raise ValueError(
            "faithful counts words as the code does for CLIP, which is not all this model reads: drop it"
        )
    prompt, found = prompt_rows.reader(model), {}
    kept = prompt_rows.preserved(model, prompt, captions)
    for space, entry in spaces(model).items():
        sources, targets = [], []
        for malicious, _, safe, template in given:
            old, new, blank = map(prompt, (malicious, safe, fill(template, "")[0]))
            for token in config.tokens:
                if token == "all":
                    taken = [prompt_rows.paired(entry, old, new, blank, "all")]
                else:
                    taken = [
                        (old.rows[space][i], new.rows[space][j].expand(len(i), -1))
                        for i, j in (
                            _entry_token(at, token) for at in prompt_rows.places(entry, old, new, blank)
                        )
                        if i and j
                    ]
                sources += [source for source, _ in taken]
                targets += [target for _, target in taken]
        if sources:
            found[space] = closed_form.Rows(torch.cat(sources), torch.cat(targets), kept[space], concepts)
    if not found:
        raise ValueError(f"no text entry of this model reads tokens of the kind {config.tokens}: take 'eot'")
    return found


def _entry_token(at: prompt_rows.Places, token: Token) -> tuple[list[int], list[int]]:
    if token == "key":
        return at.phrase[0], at.last[1]
    return {"sot": at.start, "eot": at.end, "last": at.last}[token]


def solve(
    sources: Tensor,
    targets: Tensor,
    preserved: Tensor | None,
    config: Config,
    prompts: int,
    captions: int = 1,
) -> ContextMap:
    """The map of stage 1, float64: of rows that come from so many malicious prompts and preserved captions."""
    return closed_form.solve(
        sources,
        targets,
        preserved,
        erase_scale=1 / prompts,
        preserve_scale=config.eta / captions,
        lam=config.lam,
    )


# Stage 2


@dataclass(frozen=True, eq=False)
class Trajectories:
    """Points on the early part of the ways to malicious pictures: latents (m, channels, height, width) and directions
    D of the same shape (both of dtype `KEPT`), offsets k (m,), time steps (m,), and the row of the prompt (m,).
    """

    latents: Tensor
    directions: Tensor
    offsets: Tensor
    timesteps: Tensor
    prompts: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(getattr(self, name).nbytes for name in TRAJECTORY)


TRAJECTORY = ("latents", "directions", "offsets", "timesteps", "prompts")


def hinge(predicted: Tensor, directions: Tensor, offsets: Tensor, margin: float) -> Tensor:
    """max(mean (x - f_s)^2 - mean (x - f_u)^2 + margin, 0) of each row (n,), as -2 mean(x D) + k: two large numbers
    are never subtracted.
    """
    inner = (predicted.float() * directions.float()).flatten(1).mean(1)
    return (offsets - 2 * inner + margin).relu()


def directions(text: Tensor, safe: Tensor, uncond: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """D and k of predictions (n, ...) for the malicious, the safe and the empty prompt."""
    f_s, f_u = (uncond + beta * (one - uncond) for one in (safe.float(), text.float()))
    d = f_s - f_u
    return d, (d * (f_s + f_u)).flatten(1).mean(1)


def trajectories(
    model: DiffusionModel,
    malicious: Sequence[str],
    safe: Sequence[str],
    seed: int,
    config: Config,
    folder: Path | None = None,
) -> Trajectories:
    """`noises` ways for each malicious prompt, drawn by the model as it is. Kept in pieces of which a kill costs one at
    most; a piece that is damaged is drawn again.
    """
    text, instead, empty = *map(model.conditioning, (malicious, safe)), model.unconditional()
    ways = [(p, n) for n in range(config.noises) for p in range(len(malicious))]

    def early(piece: slice) -> dict[str, Tensor]:
        part = ways[piece]
        prompt = torch.tensor([p for p, _ in part])
        at = prompt.to(model.device)
        points: list[list[Tensor]] = []
        own = [torch.Generator().manual_seed(seed + 7919 * p + n) for p, n in part]
        way = walk(
            model.unet, ddim(model.scheduler), text[at], empty.times(len(part)), own, steps=config.sampler,
            guidance=config.guidance, size=model.latent_size,
        )  # fmt: skip
        for step in islice(way, config.early):
            x, t = step["sample"], step["timestep"]
            told, uncond = step["text"], step["uncond"]
            if config.faithful:  # the code keeps what the step made, with the time step it was made at
                x = step["latents"]
                told, uncond = (predict(model.unet, x, t, one) for one in (text[at], empty.times(len(part))))
            d, k = directions(told, predict(model.unet, x, t, instead[at]), uncond, config.beta)
            points.append([x.to(KEPT), d.to(KEPT), k, torch.full((len(part),), t), prompt])
        return {
            name: torch.stack(column, 1)
            for name, column in zip(TRAJECTORY, zip(*points, strict=True), strict=True)
        }

    what = [config_of(model.scheduler), list(malicious), list(safe), seed, config.guidance, config.sampler]
    what += [config.early, config.noises, config.beta, config.faithful, str(KEPT)]
    found = cached(model, (folder or states.FOLDER) / "trajectories", what, len(ways), early)
    return Trajectories(*(found[name].flatten(0, 1) for name in TRAJECTORY))


def calmed(start: DiffusionModel, calm: States, also: Sequence, folder: Path | None = None) -> Tensor:
    """What the model after stage 1 predicts on the unconditional ways, (calm, sampler, channels, height, width): once,
    not at every iteration. also: what the ways depend on.
    """

    def predicted(part: slice) -> dict[str, Tensor]:
        found = []
        for node in range(calm.sampler):
            x, t = (calm.table[name][part, node].to(start.device) for name in ("sample", "timestep"))
            found.append(predict(start.unet, x, t, calm.empty.times(len(x))))
        return {"uncond": torch.stack(found, 1)}

    what = [config_of(calm.model.scheduler), calm.sampler, calm.noises, *also]
    what += [] if calm.unguided else [calm.guidance]
    return cached(start, (folder or states.FOLDER) / "calm", what, calm.noises, predicted)["uncond"]


# Both


def fit(
    model: DiffusionModel,
    erase: str | Concept | Sequence[str | Concept],
    preserve: str | Concept | Sequence[str | Concept] = (),
    *,
    anchor: str | Concept | None = None,
    config: Config | None = None,
    generator: torch.Generator | None = None,
    callback: Callable[[dict], None] | None = None,
    folder: Path | None = None,
    progress: bool = False,
) -> Edit:
    """Erase concepts in both stages, or in one; returns a context_map Edit for stages="text", else a weight_delta that
    holds the map as its first stage (`Edit.first_stage`), of SDXL with the pooled entry's change beside it.
    stages="text" also for transformers, as a text_maps Edit; an entry that reads none of `tokens` (a pooled one no
    "key") stays as it is.

    anchor: the safe phrase. preserve: what captions are kept in stage 1, without which it is not used, as a warning
    says; when empty, all other concepts of the emoji world, or COCO's categories. callback: after stage 1 (step -1)
    rank and the relative residuals of the erased rows and of the preserved ones; in stage 2 at every iteration step,
    loss, erase, keep, and active, the share of rows with a gradient. generator, folder and errors as in `esd.fit`.
    """
    config, erased, preserved, generator = asked(
        PRESETS,
        model,
        config,
        erase,
        preserve,
        anchor,
        generator,
        trains=lambda config: config.stages != "text",
    )
    if config.stages != "text":
        model.check_drawn()
    if preserved and config.stages == "trajectory":
        warnings.warn("TRCE preserves captions in stage 1 alone: `preserve` changes nothing", stacklevel=2)
    instead = anchor.name if isinstance(anchor, Concept) else anchor
    given = pairs(erased, instead, config)
    warn_of_itself(pair for one in erased for pair in phrases(one, instead, config))
    about = [
        replace(one, synonyms=tuple(phrase for phrase, _ in phrases(one, instead, config))) for one in erased
    ]
    concepts = {
        "erase": [one.name for one in erased],
        "anchor": list(dict.fromkeys(safe for one in erased for _, safe in phrases(one, instead, config))),
        "preserve": [],
    }
    named = dict(method="trce", config=config, concepts=concepts)

    first = stage = None
    if config.stages != "trajectory":
        names, captions = retained(model, about, preserved, config.keep_templates, null=True)
        concepts["preserve"] = names
        if not model.own_loop:
            found = entry_rows(model, given, captions, concepts, config)
            solution = lambda rows: solve(
                rows.sources, rows.targets, rows.preserved, config, len(given), len(captions)
            )
            stage = prompt_rows.solved(model, found, solution, callback, -1, **named)
        else:
            kept = closed_form.condensed(model.encode(captions).double().flatten(0, 1))
            sources, targets = rows(model, given, config)
            first = solve(sources, targets, kept, config, len(given), len(captions))
            if callback is not None:
                whole = closed_form.Rows(sources, targets, kept, concepts)
                callback(
                    {"step": -1, "rank": first.compressed(1e-7).rank, **closed_form.residuals(first, whole)}
                )
            stage = Edit.from_context_map(first, model, **named)
        if config.stages == "text":
            return stage

    steered = pairs(erased, instead, replace(config, templates=config.steer_templates))
    start = model.copy(shared=True) if stage is None else stage.merged(model, shared=True)
    change = steer(model, start, steered, config, generator, callback, folder, progress)
    if stage is not None and not model.own_loop:
        first, beside = prompt_rows.keys_and_values(model, stage, start)
        change |= beside
    return Edit.from_weight_delta(change, model, first, **named)


def steer(
    model: DiffusionModel,
    start: DiffusionModel,
    given: Sequence[tuple[str, str, str, str]],
    config: Config,
    generator: torch.Generator,
    callback: Callable[[dict], None] | None,
    folder: Path | None,
    progress: bool,
) -> dict[str, Tensor]:
    """Stage 2: what is added to self-attention and to the queries of cross-attention, in half precision. start: the
    model after stage 1, or a copy.
    """
    malicious, safe = [one[0] for one in given], [one[2] for one in given]
    seed = int(torch.randint(2**31, (), generator=generator))
    points = trajectories(model, malicious, safe, seed, config, folder)
    calm = States(
        model, [""], seed + 1, config.guidance, config.sampler, "cached", config.calm, folder=folder
    )
    unet = trainee(start.unet, unet_parameters(start.unet, "visual"))
    text, empty, device = model.conditioning(malicious), model.unconditional(), model.device
    wanted = calm.table["uncond"]
    if config.reference == "stage1" and config.stages == "both":
        wanted = calmed(start, calm, [model.fingerprint(), seed], folder)

    def loss(step: int, generator: torch.Generator) -> dict:
        picked = torch.randint(len(points.timesteps), (config.batch,), generator=generator)
        at = lambda name: getattr(points, name)[picked].to(device)
        z, d, k, t = at("latents").to(model.dtype), at("directions"), at("offsets"), at("timesteps")
        own = text[points.prompts[picked]]
        picks = calm.pick(torch.zeros(config.keep_batch, dtype=torch.long), generator)
        still, held = calm.at(picks), wanted[picks.noise, picks.node].to(device)
        x, times, context = [z], [t], [own]
        if config.branches == "both":
            x, times, context = [*x, z], [*times, t], [*context, empty.times(len(z))]
        x, times = [*x, still.sample], [*times, still.timestep]
        context.append(empty.times(config.keep_batch))
        out = predict(unet, torch.cat(x), torch.cat(times), joined(context))
        steered, calmly = out[: -config.keep_batch], out[-config.keep_batch :]
        repeat = len(steered) // len(z)
        losses = hinge(steered, d.repeat(repeat, 1, 1, 1), k.repeat(repeat), config.margin)
        erase, keep = losses.mean(), (calmly.float() - held.float()).square().mean()
        active = (losses.detach() > 0).float().mean()
        return {"loss": erase + config.weight * keep, "erase": erase, "keep": keep, "active": active}

    descend(
        "trce", model, unet, loss, config, [*malicious, *safe], generator, callback, folder, progress,
        weight_decay=0.01, clear=not config.faithful, also=[start],
    )  # fmt: skip
    change = difference(unet, start.unet, "unet")
    check_changed(change, config)
    return change
