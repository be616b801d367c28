"""AdvUnlearn: adversarial training of the text encoder (Zhang et al., NeurIPS 2024, arXiv 2405.15234).

Two problems in turn, the lower one anew at every update (eqs. 5, 6):

    lower  delta = argmin  E ||eps_theta(x_t, delta + c_e) - eps_o(x_t, c_e)||^2                 the attacker
    upper  theta = argmin  ||eps_theta(x_t, delta + c_e) - y(x_t)||^2                            ESD's loss
                           + gamma E ||eps_theta(x~_t, c~) - eps_o(x~_t, c~)||^2                 what is retained

The attacker wants the concept back; it owns k token embeddings beside those of the prompt and takes K steps. The
defender sends the attacked prompt where ESD sends the plain one, y(x_t) = eps_o(x_t, 0) - eta (eps_o(x_t, c_e) -
eps_o(x_t, 0)). Each has its own loss: this is no min-max of one. delta is a constant for the defender.

Notation (code -> paper):

    attack_steps   -> K
    alpha          -> alpha, step of the attack
    k              -> tokens of the attack
    lr, iterations -> beta, I, of the defender
    gamma          -> gamma
    retain         -> C_retain

Defaults are the paper's and, where it is silent, those of the authors' commands [code]. With the text encoder in
training x_t, eps_o and y do not depend on it: states="cached" computes them once.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from erasekit.concepts import Concept, check_templates, content_ids
from erasekit.conditioning import Conditioning, joined, predict, told
from erasekit.edits import Edit
from erasekit.layers import text_parameters, unet_parameters
from erasekit.models import DiffusionModel
from erasekit.retained import retained
from erasekit.settings import EMOJI_TEMPLATES, asked, check, erase_prompts
from erasekit.states import Source, State, States, check_sources
from erasekit.tokens import embed, layout, token_tables
from erasekit.tuning import check_changed, descend, difference, trainee

Placement = Literal["prefix", "suffix", "replace", "add"]
Rule = Literal["adam", "gd", "sign"]
Start = Literal["random", "latest"]


@dataclass(frozen=True)
class Config:
    """Settings of AdvUnlearn; symbols in the module docstring.

    part: what is trained, "text" (of SDXL both text encoders) or one of ESD's sets of UNet parameters ("x", "u", ...).
    layers: the first so many of a text encoder; None for all and the final norm. iterations, lr, batch: of Adam; each
    row has a prompt, states and an attacker of its own. warmup: first iterations, on the plain prompt [code].
    placement: where the k tokens stand, before the prompt ("prefix"), behind it ("suffix"), in its place ("replace"),
    or as sums with its tokens ("add", whatever k). attack_steps: K; 0 trains on the plain prompt. rule: "adam" [code],
    "gd" (gradient descent, as the paper says), "sign" (fast AT, eq. 7). start: "random", embeddings of random tokens,
    or "latest", where the prompt's last attack ended. templates: as in ESD. retain_batch: rows of the retain term.
    retain_templates: prompts of the retained concepts, taken in turn. retain_similarity: drop retained names whose
    sentence row is at least this similar (cosine) to an erased one's, 1 drops none. retain_null: retain the empty
    prompt too, on which guidance leans (ours). eta, guidance, sampler, states, noises: as in ESD. faithful: the slips
    of the authors' code: words counted for tokens, gradients of the attack added up, its last step lost, layers chosen
    by the beginning of their names, ESD's lag; and retained rows have the time step of the (first) erased row, where
    otherwise each draws its own.
    """

    part: str = "text"
    layers: int | None = None
    eta: float = 1.0
    gamma: float = 0.5
    iterations: int = 1000
    lr: float = 1e-5
    batch: int = 1
    warmup: int = 200
    placement: Placement = "prefix"
    k: int = 1
    attack_steps: int = 30
    alpha: float = 1e-3
    rule: Rule = "adam"
    start: Start = "random"
    templates: tuple[str, ...] = ("{}",)
    retain_batch: int = 5
    retain_templates: tuple[str, ...] = ("a photo of {}",)
    retain_similarity: float = 1.0
    retain_null: bool = False
    guidance: float = 3.0
    sampler: int = 50
    states: Source = "frozen"
    noises: int | None = None
    faithful: bool = False

    def __post_init__(self):
        least = {"iterations": 1, "batch": 1, "k": 1, "retain_batch": 1, "sampler": 1}
        check(self, gamma=0, lr=0, warmup=0, attack_steps=0, alpha=0, guidance=0, **least)
        for name, choices in (("placement", Placement), ("rule", Rule), ("start", Start)):
            if getattr(self, name) not in get_args(choices):
                given = getattr(self, name)
                raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, got {given!r}")
        if self.part == "text" and self.states == "trained":
            raise ValueError('x_t does not depend on the text encoder: use states="frozen" or "cached"')
        if self.part != "text" and self.layers is not None:
            raise ValueError(f"layers are the text encoder's, and part is {self.part!r}")
        if self.faithful and self.rule == "gd":
            raise ValueError(
                'the code has no plain gradient descent: faithful=True goes with "adam" or "sign"'
            )
        check_templates(self.templates)
        check_templates(self.retain_templates)
        check_sources(self)


PRESETS = {
    # ours, for the captions of the emoji world
    "emoji": Config(
        iterations=150, lr=1e-4, batch=4, warmup=30, attack_steps=5, alpha=1e-2, retain_batch=8,
        templates=EMOJI_TEMPLATES, retain_templates=EMOJI_TEMPLATES, retain_null=True, sampler=25,
        states="cached", noises=2,
    ),
    # the paper, and the commands of its code
    "sd14-nudity": Config(gamma=0.3),
    "sd14-artist": Config(),
    "sd14-object": Config(),
    # eq. 7; the code's own fast variant keeps the untouched random token when K = 1
    "sd14-nudity-fast": Config(gamma=0.3, attack_steps=1, rule="sign"),
}  # fmt: skip

# What is retained


def turn(step: int, count: int, batch: int, seed: int) -> Tensor:
    """The rows (batch,) that are due at a step: without repeats until fewer than `batch` are left, in an order that
    seed and pass decide.
    """
    batches = max(1, count // batch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + step // batches))
    start = (step % batches) * batch
    return order.repeat(-(-batch // count))[start : start + batch]


# The attacker


@dataclass(frozen=True, eq=False)
class Slots:
    """Prompts with places for the attack: token ids (n, length) of each text encoder, which of them are free, the
    embeddings (n, slots, d) to which delta is added there, and which slots of each prompt exist (n, slots). d is the
    width of a token's embedding; of SDXL's two encoders, which have the same tokens, both widths, side by side.
    """

    ids: tuple[Tensor, ...]
    free: Tensor
    base: Tensor
    exists: Tensor
    scale: int

    def text(self, encoders: Sequence[nn.Module], delta: Tensor) -> Conditioning:
        """The text under the attack delta (n, slots, d)."""
        rows = (self.base + delta)[self.exists]
        return embed(encoders, [(one, self.free) for one in self.ids], rows, self.scale)

    def rows(self, at: Tensor) -> "Slots":
        """Of these prompts alone."""
        ids = tuple(one[at] for one in self.ids)
        return Slots(ids, self.free[at], self.base[at], self.exists[at], self.scale)


def slots(model: DiffusionModel, prompts: Sequence[str], config: Config) -> Slots:
    """Places of the attack in each prompt. ValueError when a prompt is too long for it."""
    table = token_tables(model.text_encoders.values())
    contents = [content_ids(model.tokenizer, prompt) for prompt in prompts]
    if config.faithful:
        contents = [ids[: len(prompt.split())] for ids, prompt in zip(contents, prompts, strict=True)]
    open_ = [None] * config.k
    end = model.tokenizer.eos_token_id
    placed = {
        "prefix": lambda ids: [*open_, *ids],
        "suffix": lambda ids: [*ids, *open_],
        "replace": lambda ids: [*open_, *[end] * len(ids)],
        "add": lambda ids: [None] * len(ids),
    }[config.placement]
    laid = [layout(one, [placed(ids) for ids in contents]) for one in model.tokenizers]
    free = laid[0][1]
    counts = free.sum(1)
    exists = torch.arange(int(counts.max()))[None] < counts[:, None]
    base = torch.zeros(*exists.shape, table.shape[1])
    if config.placement == "add":
        base[exists] = table[torch.tensor([i for one in contents for i in one]).to(table.device)].cpu()
    device = table.device
    ids = tuple(one.to(device) for one, _ in laid)
    return Slots(ids, free.to(device), base.to(device), exists.to(device), model.pipeline.vae_scale_factor)


def attack_loss(
    encoders: Sequence[nn.Module], unet: nn.Module, where: Slots, delta: Tensor, state: State
) -> Tensor:
    """||eps_theta(x_t, delta + c_e) - eps_o(x_t, c_e)||^2, the mean over a latent, of each row (n,)."""
    predicted = predict(unet, state.sample, state.timestep, where.text(encoders, delta))
    return (predicted.float() - state.text.float()).square().flatten(1).mean(1)


def adversary(
    encoders: Sequence[nn.Module],
    unet: nn.Module,
    where: Slots,
    start: Tensor,
    states: Sequence[State],
    config: Config,
    callback: Callable[[dict], None] | None = None,
) -> Tensor:
    """The attack (n, slots, d) after one step from `start` on each of the states, float32. No weight gets a gradient.

    callback: step and loss, the mean over the rows before the step.
    """
    delta = start.detach().float().clone().requires_grad_(True)
    used = delta.detach().clone()
    adaptive = config.rule == "adam" or config.faithful
    optimizer = torch.optim.Adam([delta], lr=config.alpha) if adaptive else None
    for step, state in enumerate(states):
        used = delta.detach().clone()
        losses = attack_loss(encoders, unet, where, delta, state)
        (gradient,) = torch.autograd.grad(losses.sum(), delta)
        if config.faithful:
            if delta.grad is not None:
                gradient = gradient + delta.grad  # the code never clears it, and signs the sum in place
            gradient = gradient.sign() if config.rule == "sign" else gradient
        delta.grad = gradient
        with torch.no_grad():
            if optimizer is not None:
                optimizer.step()
            else:
                delta -= config.alpha * (gradient.sign() if config.rule == "sign" else gradient)
        if callback is not None:
            callback({"step": step, "loss": float(losses.detach().mean())})
    return used if config.faithful else delta.detach()


# Adversarial training


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
    """Erase concepts by adversarial training; returns a text_encoder Edit (weight_delta for part="x" and the like).

    preserve: the retain set; when empty, all other concepts of the emoji world, or COCO's categories. anchor: not used,
    nor is a concept's own, as y leads to nothing; a warning says so. callback: at every iteration step, loss, erase
    (ESD's loss on the attacked prompt), retain, and attack, the attacker's loss on the same state. The rest as in
    `esd.fit`.
    """
    config, erased, preserved, generator = asked(PRESETS, model, config, erase, preserve, anchor, generator)
    if anchor is not None or any(one.anchor is not None for one in erased):
        warnings.warn(
            "AdvUnlearn leads away from the concept, to nothing: `anchor` changes nothing", stacklevel=2
        )
    prompts = erase_prompts(erased, config.templates)
    names, kept = [], []
    if config.gamma:
        names, kept = retained(
            model, erased, preserved, config.retain_templates,
            similarity=config.retain_similarity, null=config.retain_null,
        )  # fmt: skip

    originals, unet = model.text_encoders, model.unet
    encoders = list(originals.values())
    if config.part == "text":
        encoders = [trainee(one, trained_names(one, config)) for one in encoders]
        trained = dict(zip(originals, encoders, strict=True))
    else:
        unet = trainee(unet, unet_parameters(unet, config.part))
        trained = {"unet": unet}
    module = nn.ModuleDict(trained)
    seed, order = (int(torch.randint(2**31, (), generator=generator)) for _ in range(2))
    how = (config.guidance, config.sampler, config.states, config.noises, config.faithful)
    walker = unet if config.states == "trained" else None
    states = States(model, prompts, seed, *how, walker, folder)
    retain = States(model, kept, seed + 1, *how, None, folder) if kept else None
    where, plain = slots(model, prompts, config), model.tokenized(prompts)
    kept_ids = model.tokenized(kept) if kept else None
    table = token_tables(originals.values())
    # in the checkpoint, so that start="latest" goes on after an interruption
    module.register_buffer("latest", torch.zeros_like(where.base))
    module.register_buffer("begun", torch.zeros(len(prompts), dtype=torch.bool, device=model.device))

    special = set() if config.faithful else set(model.tokenizer.all_special_ids)
    allowed = torch.tensor([i for i in range(len(table)) if i not in special])

    def started(prompt: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.randint(len(allowed), (len(prompt), where.base.shape[1]), generator=generator)
        fresh, at = table[allowed[drawn].to(table.device)], prompt.to(model.device)
        if config.start == "random":
            return fresh
        return torch.where(module.begun[at][:, None, None], module.latest[at], fresh)

    def said(ids: Sequence[Tensor], rows: Tensor) -> Conditioning:
        return told(encoders, [one[rows.to(model.device)] for one in ids], where.scale)

    def attacked(prompt: Tensor, generator: torch.Generator) -> Conditioning:
        """The prompts under attack."""
        at = prompt.to(model.device)
        own, begin = where.rows(at), started(prompt, generator)
        points = [states.at(states.pick(prompt, generator)) for _ in range(config.attack_steps)]
        delta = adversary(encoders, unet, own, begin, points, config)
        for row, p in enumerate(prompt.tolist()):  # the last one, where a prompt is there twice
            module.latest[p], module.begun[p] = delta[row], True
        return own.text(encoders, delta)

    def loss(step: int, generator: torch.Generator) -> dict:
        prompt = torch.randint(len(prompts), (config.batch,), generator=generator)
        if config.attack_steps and step >= config.warmup:
            text = attacked(prompt, generator)
        else:
            text = said(plain, prompt)
        picks = states.pick(prompt, generator)
        state = states.at(picks)
        wanted = state.target(config.eta)
        if retain is not None:
            due = turn(step, len(kept), config.retain_batch, order)
            others = retain.pick(due, generator)
            if config.faithful:
                own = {name: getattr(picks, name)[:1].expand(len(due)) for name in ("node", "offset")}
                others = replace(others, **own)
            other = retain.at(others)
            state, wanted = state + other, torch.cat([wanted, other.text])
            text = joined([text, said(kept_ids, due)])
        predicted = predict(unet, state.sample, state.timestep, text)
        error = lambda a, b: (a.float() - b.float()).square().mean()
        n = config.batch
        terms = {"erase": error(predicted[:n], wanted[:n]), "retain": error(predicted[n:], wanted[n:])}
        if retain is None:
            terms["retain"] = torch.zeros(())
        terms["attack"] = error(predicted[:n].detach(), state.text[:n])
        return {"loss": terms["erase"] + config.gamma * terms["retain"], **terms}

    descend(
        "advunlearn",
        model,
        module,
        loss,
        config,
        [*prompts, "", *kept],
        generator,
        callback,
        folder,
        progress,
    )
    concepts = {"erase": [one.name for one in erased], "anchor": [], "preserve": names}
    change = {}
    for name, part in trained.items():
        change |= difference(part, originals.get(name, model.unet), name)
    # SDXL reads its first text encoder before the last layer, which therefore stays
    change = {name: one for name, one in change.items() if one.any()}
    check_changed(change, config)
    return Edit.from_weight_delta(change, model, method="advunlearn", config=config, concepts=concepts)


def trained_names(encoder: nn.Module, config: Config) -> list[str]:
    """Parameters of the text encoder that are trained."""
    exact = text_parameters(encoder, config.layers)
    if not (config.faithful and config.layers):
        return exact
    # layers.1 is also the beginning of layers.10 and layers.11
    chosen = tuple(f"encoder.layers.{i}" for i in range(config.layers))
    return [name for name in text_parameters(encoder) if name.removeprefix("text_model.").startswith(chosen)]
