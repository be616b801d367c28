"""RealEra: erasing a concept with its neighbours (Liu et al., arXiv 2410.09140). RECONSTRUCTION.

The authors published no code, and of the paper only abstract, project page and summaries could be read. Known from
them: a neighbour concept is e + eta with ||eta|| <= D_1 and cos(e, e + eta) in [S_1, S_2]; neighbours are erased with
the concept, and beyond concepts outside that region are held fast, both in a closed form on the cross-attention and in
a LoRA that aligns predicted noise. Everything else here is our reconstruction, and every such choice a field of Config.

    closed form   min_W'  sum_i ||W' (e + eta_i) - W e_g||^2 + lambda_b sum_j ||W' b_j - W b_j||^2
                          + lambda_p sum ||W' e_p - W e_p||^2 + lam ||W' - W||^2,   eta_0 = 0
    LoRA          min  ||eps'(x_t, e) - T||^2 + lambda_n mean_i ||eps'(x_t, e + eta_i) - T||^2
                       + lambda_far mean_j ||eps'(x_t, b_j) - eps(x_t, b_j)||^2

A warning in the algebra: neighbours in all directions alike are, for a linear map, a ridge towards the zero map; what
lies across e fades to (lambda_b m tau^2 + lam) / (n sigma^2 + lambda_b m tau^2 + lam) of itself (`attenuation`).
Neighbours in the few directions in which related words lie (mode "subspace") are not.

Notation (code -> paper): radius -> D_1, in lengths of e; s_low, s_high -> S_1, S_2; anchor -> g, the mapping concept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erasekit import closed_form, prompt_rows
from erasekit.closed_form import ContextMap
from erasekit.concepts import (
    Concept,
    check_some_templates,
    content_ids,
    eot_position,
    fill,
    slot_token,
    token_ids,
)
from erasekit.conditioning import Conditioning, joined, predict
from erasekit.edits import Edit
from erasekit.layers import cross_attention_kv
from erasekit.methods import mace
from erasekit.models import DiffusionModel
from erasekit.retained import retained
from erasekit.settings import EMOJI_TEMPLATES, anchors, asked, check, warn_of_itself
from erasekit.states import Picks, State, States
from erasekit.text_entries import TextEntry, spaces
from erasekit.tokens import as_text, vocabulary
from erasekit.tuning import check_changed, descend, discard, telling

Mode = Literal["toward_gaussian", "shell", "subspace"]
Scope = Literal["token", "sequence"]
Target = Literal["mapping", "esd", "unconditional"]
TRIES = 1000  # a sampler that rejects gives up after so many rounds


@dataclass(frozen=True)
class Config:
    """Settings of RealEra; every field a RECONSTRUCTION, symbols in the module docstring.

    closed_form, lora, neighbour, beyond: the four parts, each on or off. anchor: the mapping concept. templates:
    prompts with one {} for both. mode: how neighbours are drawn; "toward_gaussian" on rays towards random points, as a
    re-implementation in another paper's code does; "shell" at exact cosines in all directions; "subspace" the same in
    the directions of related words. scope: perturb the concept's rows and the first end row, each by itself ("token"),
    or the whole prompt without its start row as one vector ("sequence"). radius, s_low, s_high: the neighbourhood. n,
    m: neighbours and beyond concepts of each prompt in the closed form; lora_n, lora_m: of each row in the LoRA, drawn
    anew at every iteration. lambda_b, lambda_p, lam: closed form, whose sums over erased and beyond rows are means
    here. directions: of the subspace; words: related words that span it. keep_templates: captions preserved. target: T,
    the prediction for the mapping concept, ESD's, or the unconditional one. eta: of ESD's. lambda_n, lambda_far: LoRA.
    rank, lr, iterations, batch: of the LoRA. focal: MACE's time steps instead of all alike. guidance, sampler, noises:
    how x_t is drawn, as in ESD. fuse, lambda_2: ridge and preservation when several LoRAs are fused, as in MACE.
    """

    closed_form: bool = True
    lora: bool = True
    neighbour: bool = True
    beyond: bool = True
    anchor: str = " "
    templates: tuple[str, ...] = ("a photo of the {}", "a picture of the {}", "{}")
    mode: Mode = "toward_gaussian"
    scope: Scope = "token"
    radius: float = 1.63
    s_low: float = 0.5
    s_high: float = 0.9
    n: int = 5
    m: int = 3
    lora_n: int = 5
    lora_m: int = 3
    lambda_b: float = 1.0
    lambda_p: float = 1e-4
    lam: float = 1e-3
    directions: int = 8
    words: int = 50
    keep_templates: tuple[str, ...] = ("a photo of {}",)
    target: Target = "mapping"
    eta: float = 1.0
    lambda_n: float = 1.0
    lambda_far: float = 1.0
    rank: int = 1
    lr: float = 1e-4
    iterations: int = 300
    batch: int = 1
    focal: bool = False
    guidance: float = 3.0
    sampler: int = 50
    noises: int = 8
    fuse: float = 1e-3
    lambda_2: float = 1e-4

    def __post_init__(self):
        counts = "n m lora_n lora_m directions words rank iterations batch noises".split()
        least = dict.fromkeys(counts, 1) | {"sampler": 1}
        zero = "radius lambda_b lambda_p lam lambda_n lambda_far lr fuse lambda_2".split()
        check(self, **least, **dict.fromkeys(zero, 0))
        for name, choices in (("mode", Mode), ("scope", Scope), ("target", Target)):
            if getattr(self, name) not in get_args(choices):
                given = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {given!r}")
        if not -1 < self.s_low < self.s_high < 1:
            raise ValueError(f"the window needs -1 < s_low < s_high < 1, got {self.s_low} and {self.s_high}")
        if self.guidance <= 1:
            raise ValueError(f"x_t is drawn with guidance above 1, got {self.guidance}")
        if not (self.closed_form or self.lora):
            raise ValueError("with neither closed form nor LoRA nothing is erased: switch one on")
        check_some_templates(self.templates, self.keep_templates)


PRESETS = {
    # ours, for the captions of the emoji world
    "emoji": Config(
        templates=EMOJI_TEMPLATES, keep_templates=EMOJI_TEMPLATES, mode="subspace", lambda_b=0.1, lambda_p=1e-3,
        lambda_far=0.1, lr=1e-3, iterations=150, batch=2, sampler=25, noises=2,
    ),
    # ours: no setting of the authors is known; window, radius and counts of the re-implementation
    "sd14-object": Config(lr=1e-5),
    "sd14-celebrity": Config(anchor="a person", s_low=0.75, s_high=0.95),
    "sd14-artist": Config(anchor="art", templates=mace.STYLES),
}  # fmt: skip


# Neighbours and what lies beyond


def _across(e: Tensor, count: int, generator: torch.Generator, basis: Tensor | None) -> Tensor:
    """Unit vectors (count, rows x d) across e (rows, d): in all directions, or each row in those of an orthonormal
    basis (r, d).
    """
    unit = F.normalize(e.flatten(), dim=0)
    if basis is None:
        drawn = torch.randn(count, *e.shape, generator=generator, dtype=torch.float64)
    else:
        drawn = torch.randn(count, len(e), len(basis), generator=generator, dtype=torch.float64) @ basis
    drawn = drawn.flatten(1)
    drawn = drawn - (drawn @ unit)[:, None] * unit
    if (drawn.norm(dim=1) < 1e-9).any():
        raise ValueError("the directions of the subspace lie along the concept itself: give more words")
    return F.normalize(drawn, dim=1)


def at_cosine(e: Tensor, cosine: Tensor, length: Tensor, across: Tensor) -> Tensor:
    """Vectors (n, d) of `length` (in lengths of e) that have exactly this cosine with e (d,), given unit vectors across
    it; their distance is ||e|| sqrt(1 + a^2 - 2 a c).
    """
    direction = cosine[:, None] * F.normalize(e, dim=0) + (1 - cosine**2).sqrt()[:, None] * across
    return length[:, None] * e.norm() * direction


def mine(
    e: Tensor,
    count: int,
    config: Config,
    generator: torch.Generator,
    *,
    basis: Tensor | None = None,
    far: bool = False,
) -> Tensor:
    """Neighbours of e, (count, *e.shape) float64; with `far` beyond concepts, whose cosine lies below s_low.

    e (rows, d) is one vector of all its rows, basis (r, d) is of each row. No further than radius x ||e||. ValueError
    when the settings leave nothing to be found.
    """
    shape, table = e.shape, e.detach().double().cpu().reshape(-1, e.shape[-1])
    e = table.flatten()
    inside, limit = [], config.radius * e.norm()
    uniform = lambda n, low, high: (
        low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)
    )
    for _ in range(TRIES):
        need = count - sum(map(len, inside))
        if need <= 0:
            break
        if config.mode == "toward_gaussian":
            # a Gaussian point of about the length of e; only then do rays of this radius leave the window
            point = torch.randn(4 * need, len(e), generator=generator, dtype=torch.float64)
            towards = F.normalize(point * e.norm() / len(e) ** 0.5 - e, dim=1)
            x = e + uniform(4 * need, 0, 1)[:, None] * limit * towards
        else:
            low, high = (min(0.0, config.s_low - 0.5), config.s_low) if far else (config.s_low, config.s_high)
            within = None if far or config.mode == "shell" else basis
            across = _across(table, need, generator, within)
            x = at_cosine(e, uniform(need, low, high), uniform(need, 0.8, 1.2), across)
        cosine = F.cosine_similarity(x, e[None], dim=1)
        good = (x - e).norm(dim=1) <= limit * (1 + 1e-12)
        good &= cosine < config.s_low if far else (cosine >= config.s_low) & (cosine <= config.s_high)
        inside.append(x[good][:need])
    found = torch.cat(inside)
    if len(found) < count:
        what, do = ("beyond concepts", "raise s_low or") if far else ("neighbours", "widen the window or")
        raise ValueError(f"no {what} with these settings: {do} radius ({config.radius})")
    return found.view(count, *shape)


def related(model: DiffusionModel, concept: Concept, count: int) -> list[tuple[str, float]]:
    """Words of the vocabulary whose last row in "a {}" is most like the concept's, with the cosine, the nearest first;
    neither its name nor parts of it.
    """
    tokenizer = model.tokenizer
    words = [as_text(tokenizer, [token]) for token in vocabulary([tokenizer]).tolist()]
    own = set(concept.name.lower().split())
    words = [word for word in dict.fromkeys(words) if word.isalpha() and len(word) > 2 and word not in own]
    rows = _last_rows(model, [concept.name, *words])
    near = F.cosine_similarity(rows[1:], rows[:1], dim=1)
    return [(words[i], float(near[i])) for i in near.argsort(descending=True)[:count].tolist()]


def _last_rows(model: DiffusionModel, phrases: Sequence[str]) -> Tensor:
    found = []
    for start in range(0, len(phrases), 256):  # of a whole vocabulary only these rows fit into memory
        part = phrases[start : start + 256]
        at = [slot_token(model.tokenizer, "a {}", phrase) for phrase in part]
        rows = model.encode([f"a {phrase}" for phrase in part], length=max(at) + 1)
        found.append(rows[torch.arange(len(part)), at].double().cpu())
    return torch.cat(found)


def subspace(model: DiffusionModel, concept: Concept, config: Config, siblings: Sequence[str] = ()) -> Tensor:
    """Orthonormal directions (r, d) in which synonyms and related words differ from the concept, the strongest first;
    those in which `siblings` differ from it are taken out. (A neighbour also moves along e itself.) They are those of
    the last token of "a {}", and are used for every row.
    """
    kin = [word for word, _ in related(model, concept, config.words) if word not in siblings]
    if not (kin or concept.synonyms):
        raise ValueError(f"no word is related to {concept.name!r} but the preserved ones: raise words")
    rows = _last_rows(model, [concept.name, *concept.synonyms, *kin, *siblings])
    apart = rows[1:] - rows[:1]
    own, others = apart[: len(apart) - len(siblings)], apart[len(apart) - len(siblings) :]
    # Of what the words differ by: what the siblings leave of it may be rounding.
    least = 1e-9 * own.norm()
    if len(siblings):
        away = torch.linalg.qr(others.T)[0]
        own = own - own @ away @ away.T
    _, s, vh = torch.linalg.svd(own, full_matrices=False)
    if s[0] <= least:
        raise ValueError(
            f"the preserved names take all directions of the words related to {concept.name!r}: preserve fewer, raise "
            "words, or choose mode shell"
        )
    return vh[: min(config.directions, int((s > least).sum()))]


def attenuation(n: int, sigma: float, m: int, tau: float, lambda_b: float, lam: float) -> float:
    """What remains of a direction across e when n neighbours e + N(0, sigma^2) are erased and m beyond concepts
    N(0, tau^2) are held fast: the expected factor rho of the closed form.
    """
    held = lambda_b * m * tau**2 + lam
    return held / (n * sigma**2 + held)


# Rows of a prompt


@dataclass(frozen=True, eq=False)
class Aligned:
    """A prompt with the concept and the same with the mapping concept: which rows are the concept's (its tokens and the
    first end token), and the rows of the other prompt that they are mapped to.
    """

    prompt: str
    other: str
    rows: list[int]
    targets: list[int]


def aligned(tokenizer, template: str, phrase: str, anchor: str) -> Aligned:
    """Tokens are matched from the last one backwards; surplus ones go to the first token of the mapping concept."""
    prompt, other = fill(template, phrase)[0], fill(template, anchor)[0]
    ends = [int(eot_position(tokenizer, token_ids(tokenizer, [text]))[0]) for text in (prompt, other)]
    last, target = slot_token(tokenizer, template, phrase), slot_token(tokenizer, template, anchor)
    count, theirs = len(content_ids(tokenizer, phrase)), max(1, len(content_ids(tokenizer, anchor)))
    rows = [last - i for i in reversed(range(count))]
    targets = [target - min(i, theirs - 1) for i in reversed(range(count))]
    return Aligned(prompt, other, [*rows, ends[0]], [*targets, ends[1]])


def perturbed(
    e: Tensor,
    rows: Sequence[int],
    count: int,
    config: Config,
    generator: torch.Generator,
    *,
    basis: Tensor | None = None,
    far: bool = False,
) -> Tensor:
    """Embeddings (count, length, d) of one prompt (length, d) with neighbours (or beyond concepts) in its rows, or as
    a whole; the start row stays.
    """
    result = e.detach().double().cpu().repeat(count, 1, 1)
    if config.scope == "sequence":
        result[:, 1:] = mine(e[1:], count, config, generator, basis=basis, far=far)
        return result
    for row in rows:
        result[:, row] = mine(e[row], count, config, generator, basis=basis, far=far)
    return result


# The two optimizations


@dataclass(frozen=True, eq=False)
class Embedded:
    """Rows e and e_g, float64 (n, d), of a prompt with the concept and of the same with the mapping concept; which of
    them stand beside the concept, paired; which are the concept's, and what those are mapped to.
    """

    e: Tensor
    e_g: Tensor
    beside: tuple[list[int], list[int]]
    rows: list[int]
    targets: list[int]


def embedded(model: DiffusionModel, pair: Aligned) -> Embedded:
    """The rows that keys and values of a UNet read."""
    e, e_g = model.encode([pair.prompt, pair.other]).double().cpu()
    beside = mace.beside(model.tokenizer, pair.prompt, pair.other)
    return Embedded(e, e_g, beside, pair.rows, pair.targets)


def entry_embedded(
    entry: TextEntry, old: prompt_rows.Prompt, new: prompt_rows.Prompt, blank: prompt_rows.Prompt
) -> Embedded:
    """The rows that another text entry reads, the concept's in each of its text encoders; a pooled row is that of an
    end token.
    """
    beside, rows, targets = ([], []), [], []
    for at in prompt_rows.places(entry, old, new, blank):
        beside[0].extend(at.beside[0])
        beside[1].extend(at.beside[1])
        own, theirs = at.phrase
        rows += [*own, *at.end[0]]
        targets += [theirs[-1 - min(i, len(theirs) - 1)] for i in reversed(range(len(own)))] + at.end[1]
    space = entry.space
    return Embedded(old.rows[space].cpu(), new.rows[space].cpu(), beside, rows, targets)


def closed_rows(
    given: Sequence[tuple[Embedded, Tensor | None]],
    preserved: Tensor | None,
    config: Config,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sources and targets of the closed form: the concept's rows, the words beside them (as in MACE) and neighbours,
    drawn in each prompt's basis; and what is held fast, preserved rows and beyond concepts, times the root of its
    weight.
    """
    sources, targets, beyond = [], [], []
    for one, basis in given:
        e, e_g = one.e, one.e_g
        sources += [e[one.beside[0]], e[one.rows]]
        targets += [e_g[one.beside[1]], e_g[one.targets]]
        draw = lambda count, far, e=e, one=one, basis=basis: perturbed(
            e, one.rows, count, config, generator, basis=basis, far=far
        )[:, one.rows]
        if config.neighbour:
            sources.append(draw(config.n, False).flatten(0, 1))
            targets.append(e_g[one.targets].repeat(config.n, 1))
        if config.beyond:
            beyond.append(draw(config.m, True).flatten(0, 1))
    kept = [config.lambda_p**0.5 * preserved.cpu()] if preserved is not None else []
    if beyond:
        beyond = torch.cat(beyond)
        kept.append((config.lambda_b / len(beyond)) ** 0.5 * beyond)
    return torch.cat(sources), torch.cat(targets), torch.cat(kept) if kept else None


def closed(sources: Tensor, targets: Tensor, held: Tensor | None, config: Config) -> ContextMap:
    """The map of the closed form, of what `closed_rows` gives."""
    return closed_form.solve(
        sources, targets, held, erase_scale=1 / len(sources), preserve_scale=1.0, lam=config.lam
    )


def entry_rows(
    model: DiffusionModel,
    prompts: Sequence[tuple[str, str, str]],
    captions: Sequence[str],
    concepts: dict,
    config: Config,
    generator: torch.Generator,
) -> dict[int, closed_form.Rows]:
    """{space: rows} of the closed form in a model with other text entries than keys and values, from prompts with the
    concept, with its mapping concept and with neither; `preserved` are all that is held fast, weighted.
    """
    if config.mode == "subspace" and config.neighbour:
        raise ValueError(
            "mode 'subspace' reads every word of CLIP's vocabulary, and this model has other text encoders: choose "
            "toward_gaussian or shell"
        )
    prompt, found = prompt_rows.reader(model), {}
    kept = prompt_rows.preserved(model, prompt, captions)
    for space, entry in spaces(model).items():
        given = [(entry_embedded(entry, *map(prompt, texts)), None) for texts in prompts]
        found[space] = closed_form.Rows(*closed_rows(given, kept[space], config, generator), concepts)
    return found


def aligned_loss(
    unet: nn.Module,
    frozen: nn.Module,
    state: State,
    own: Conditioning,
    other: Conditioning,
    near: Tensor | None,
    far: Tensor | None,
    config: Config,
) -> dict[str, Tensor]:
    """The loss of the LoRA at n states, and its terms: erase, near and far.

    unet: the one trained. frozen: the teacher. own, other: the n prompts with the concept and with the mapping concept.
    near, far: neighbours and beyond concepts of each, the own prompt's rows with theirs (n, k, length, d), or None.
    """
    context = own.rows[:, None] if near is None else torch.cat([own.rows[:, None], near], 1)
    with torch.no_grad():  # one pass: the mapping concepts, then the beyond concepts of each
        at = torch.arange(len(own), device=state.sample.device)
        told = other
        if far is not None:
            at = torch.cat([at, at.repeat_interleave(far.shape[1])])
            told = joined([other, own.with_rows(far.flatten(0, 1))])
        found = predict(frozen, state.sample[at], state.timestep[at], told)
        mapping = found[: len(own)]
        teacher = None if far is None else found[len(own) :].unflatten(0, far.shape[:2])
    wanted = {
        "mapping": lambda: mapping,
        "esd": lambda: state.target(config.eta),
        "unconditional": lambda: state.uncond,
    }[config.target]()
    every = context if far is None else torch.cat([context, far], 1)
    at = torch.arange(len(own), device=state.sample.device).repeat_interleave(every.shape[1])
    told = own.with_rows(every.flatten(0, 1))
    student = predict(unet, state.sample[at], state.timestep[at], told).unflatten(0, every.shape[:2]).float()
    error = lambda a, b: (a - b.float()).square().mean()
    terms = {"erase": error(student[:, 0], wanted)}
    total = terms["erase"]
    if near is not None:
        terms["near"] = error(student[:, 1 : context.shape[1]], wanted[:, None])
        total = total + config.lambda_n * terms["near"]
    if far is not None:
        terms["far"] = error(student[:, context.shape[1] :], teacher)
        total = total + config.lambda_far * terms["far"]
    return {"loss": total, **terms}


def align(
    model: DiffusionModel,
    start: DiffusionModel,
    pairs: Sequence[Aligned],
    basis: Tensor | None,
    config: Config,
    generator: torch.Generator,
    callback: Callable[[dict], None] | None,
    folder: Path | None,
    progress: bool,
) -> tuple[dict[str, Tensor], Path]:
    """One concept's LoRA on `start`: {key or value weight: B A}, and the folder of its checkpoint, left for the caller
    to discard. The teacher is the model before any edit.
    """
    prompts = [pair.prompt for pair in pairs]
    seed = int(torch.randint(2**31, (), generator=generator))
    states = States(
        model, prompts, seed, config.guidance, config.sampler, "cached", config.noises, folder=folder
    )
    unet = mace.adapter(start, config.rank, generator)
    text, mapped = model.conditioning(prompts), model.conditioning([pair.other for pair in pairs])
    node_weights = torch.ones(config.sampler)
    if config.focal:
        node_weights = mace.focal(states.scheduler.config.num_train_timesteps)[states.timesteps()]
    device, dtype = model.device, model.dtype

    def loss(step: int, generator: torch.Generator) -> dict:
        prompt = torch.randint(len(pairs), (config.batch,), generator=generator)
        picks = states.pick(prompt, generator)
        if config.focal:
            nodes = torch.multinomial(node_weights, config.batch, replacement=True, generator=generator)
            picks = Picks(picks.prompt, picks.noise, nodes, picks.offset)
        state, own, other = states.at(picks), text[prompt], mapped[prompt]
        draw = lambda count, far: torch.stack(
            [
                perturbed(one, pairs[p].rows, count, config, generator, basis=basis, far=far)
                for one, p in zip(own.rows, prompt.tolist(), strict=True)
            ]
        ).to(device, dtype)
        near = draw(config.lora_n, False) if config.neighbour else None
        far = draw(config.lora_m, True) if config.beyond else None
        return aligned_loss(unet, model.unet, state, own, other, near, far, config)

    also = [start, [pair.other for pair in pairs], torch.zeros(0) if basis is None else basis]
    place = descend(
        "realera", model, unet, loss, config, prompts, generator, callback, folder, progress, weight_decay=0.01,
        clip=1.0, also=also, clean=False,
    )  # fmt: skip
    return mace.products(unet), place


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
    """Erase concepts with their neighbours; returns a context_map for lora=False, else a weight_delta of keys and
    values, and of SDXL's pooled entry, which the closed form alone changes. With lora=False also for transformers, as
    a text_maps Edit.

    anchor: the mapping concept, else the concept's own, else the config's. preserve: captions that are kept, and, in
    mode "subspace", siblings whose directions are taken out of it; when empty, all other concepts of the emoji world,
    or COCO's categories. callback: after the closed form (step -1) rank; in the LoRA step, loss, erase, near,
    far and concept. generator, folder and errors as in `esd.fit`.
    """
    config, erased, preserved, generator = asked(
        PRESETS, model, config, erase, preserve, anchor, generator, trains=lambda config: config.lora
    )
    if config.lora:
        model.check_drawn()
    instead = anchors(erased, anchor, config.anchor)
    warn_of_itself(zip(erased, instead, strict=True))
    names, captions = retained(model, erased, preserved, config.keep_templates, null=True)
    concepts = {"erase": [one.name for one in erased], "anchor": instead, "preserve": names}
    named = dict(method="realera", config=config, concepts=concepts)
    solve = lambda rows: closed(rows.sources, rows.targets, rows.preserved, config)
    stage = None
    if not model.own_loop and config.closed_form:
        prompts = [
            tuple(fill(template, phrase)[0] for phrase in (concept.name, other, ""))
            for concept, other in zip(erased, instead, strict=True)
            for template in concept.templates or config.templates
        ]
        found = entry_rows(model, prompts, captions, concepts, config, generator)
        stage = prompt_rows.solved(model, found, solve, callback, -1, **named)
    if not config.lora and stage is not None:
        return stage

    kept = closed_form.condensed(model.encode(captions).double().flatten(0, 1))
    wanted = config.mode == "subspace" and config.neighbour
    own_basis = [subspace(model, concept, config, names) if wanted else None for concept in erased]
    own_pairs = [
        [aligned(model.tokenizer, t, concept.name, other) for t in concept.templates or config.templates]
        for concept, other in zip(erased, instead, strict=True)
    ]

    first = ContextMap.identity(kept.shape[1], kept.device)
    if model.own_loop and config.closed_form:
        flat = [
            (embedded(model, pair), basis)
            for pairs, basis in zip(own_pairs, own_basis, strict=True)
            for pair in pairs
        ]
        first = closed(*closed_rows(flat, kept, config, generator), config)
        if callback is not None:
            callback({"step": -1, "rank": first.compressed(1e-7).rank})
        stage = Edit.from_context_map(first, model, **named)
    if not config.lora:
        return stage

    start, beside = model.copy(shared=True) if stage is None else stage.merged(model, shared=True), {}
    if stage is not None and not model.own_loop:
        first, beside = prompt_rows.keys_and_values(model, stage, start)
    changes, keys, places = [], [], []
    for concept, pairs, basis in zip(erased, own_pairs, own_basis, strict=True):
        tell = telling(callback, concept=concept.name)
        change, place = align(model, start, pairs, basis, config, generator, tell, folder, progress)
        check_changed({name: one.half() for name, one in change.items()}, config)
        changes.append(change)
        places.append(place)
        keys.append(model.encode([pair.prompt for pair in pairs]).flatten(0, 1))
    weights = {name: layer.weight for name, layer in cross_attention_kv(model.unet).items()}
    if len(changes) > 1:
        fusion = mace.Config(lam=config.fuse, lambda_2=config.lambda_2)
        moved = mace.fuse(weights, first, changes, keys, kept, fusion)
    else:
        moved = {
            name: first.apply_to_weight(w.detach().double())
            - w.detach().double()
            + changes[0][name].to(w.device).double()
            for name, w in weights.items()
        }
    discard(places)
    whole = beside | {f"unet.{name}": change for name, change in moved.items()}
    return Edit.from_weight_delta({name: one.half() for name, one in whole.items()}, model, **named)
