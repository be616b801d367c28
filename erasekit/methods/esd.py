"""ESD: Erased Stable Diffusion (Gandikota et al., ICCV 2023, arXiv 2303.07345).

The UNet is trained to predict for the concept what the frozen model predicts when it is guided away from it:

    y(x_t) = eps*(x_t, 0) - eta ( eps*(x_t, c) - eps*(x_t, 0) )
    min_theta  E ||eps_theta(x_t, c) - y(x_t)||^2

with x_t a partly denoised picture of the concept. The authors' code of 2025 also erases c from the pictures of another
prompt f, whose x_t these then are [code]:

    y(x_t) = eps*(x_t, f) - (eta + 1) ( eps*(x_t, c) - eps*(x_t, 0) ),  min_theta  E ||eps_theta(x_t, f) - y(x_t)||^2

which with f = c is the loss above.

Notation (code -> paper or code of the authors):

    eta         -> eta, negative guidance (negative_guidance - 1 in the code of 2025)
    anchor      -> f, erase_from in the code of 2025
    guidance    -> guidance while x_t is drawn (start_guidance in the code)
    parameters  -> train_method: "x" is ESD-x, "u" is ESD-u
    sampler     -> ddim_steps, steps of the sampler that draws x_t

`States` draws x_t. It is what ESD and AdvUnlearn have in common, and nearly all of what they cost: one x_t takes up to
2 x `sampler` passes, one update of the loss about four. Drawn from the frozen model x_t can be kept, and what the
frozen model predicts there comes for free, since guidance needed it.
"""

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from erasekit.attacks.common import check, digest, frozen
from erasekit.concepts import Concept, check_templates, fill
from erasekit.edits import Edit
from erasekit.evaluate import runs
from erasekit.layers import text_projected_once, unet_parameters
from erasekit.models import DiffusionModel
from erasekit.paths import BUILD, replacing
from erasekit.sampling import ddim, walk
from erasekit.training import constant, optimize

Source = Literal["trained", "frozen", "cached"]
FOLDER = BUILD / "training"
SAVE_EVERY = 50  # iterations


def check_sources(config) -> None:
    """ValueError for settings of `States` that do not go together."""
    if not config.templates:
        raise ValueError("there must be at least one template")
    if config.states not in get_args(Source):
        raise ValueError(f"states must be one of {', '.join(get_args(Source))}, got {config.states!r}")
    if config.noises is not None:
        check(config, noises=1)
    if config.states == "cached" and config.noises is None:
        raise ValueError('states="cached" keeps `noises` trajectories of each prompt: say how many')
    if config.states == "cached" and config.guidance <= 1:
        raise ValueError('states="cached" keeps the predictions of guidance, which needs guidance above 1')
    if config.states == "cached" and config.faithful:
        raise ValueError('the lag of faithful=True is not in the cache: use states="frozen"')


@dataclass(frozen=True)
class Config:
    """Settings of ESD; symbols in the module docstring.

    parameters: which of the UNet's are trained: "x" (cross-attention), "u" (all but cross-attention, time embedding and
    output), "x-strict" (its keys and values), "self" (self-attention), "full". iterations, lr, batch: of Adam.
    templates: prompts with one {} for the concept; each row of a batch draws one. states: where x_t comes from.
    "trained": anew at every update, by the model in training [code, 2023]; "frozen": anew, by the frozen model [code,
    2025]; "cached": by the frozen model, each trajectory computed once and all its points used again (ours). noises:
    noise seeds for each prompt, all that "cached" keeps; None for a new one at every update. faithful: the noise level
    of the code of 2023, where x_t is two sampler steps cleaner than the time step that the UNet is told.
    """

    eta: float = 1.0
    guidance: float = 3.0
    parameters: str = "x"
    iterations: int = 1000
    lr: float = 1e-5
    batch: int = 1
    sampler: int = 50
    templates: tuple[str, ...] = ("{}",)
    states: Source = "trained"
    noises: int | None = None
    faithful: bool = False

    def __post_init__(self):
        check(self, guidance=0, iterations=1, lr=0, batch=1, sampler=1)
        check_sources(self)
        check_templates(self.templates)


EMOJI_TEMPLATES = (
    "{}",
    "a {}",
    "a {} in noto style",
    "a {} in twemoji style",
    "a {} in flat style",
    "a {} in ink style",
    "a {} in glossy style",
)

PRESETS = {
    # ours, for the captions of the emoji world
    "emoji": Config(
        iterations=300, lr=1e-4, batch=8, sampler=25, templates=EMOJI_TEMPLATES, states="cached", noises=4
    ),
    # settings of the authors' first code, 2023
    "sd14-artist": Config(parameters="x"),
    "sd14-object": Config(parameters="u"),
    "sd14-nudity": Config(parameters="u"),
    # of the rewrite of 2025, whose target starts from the concept: its eta = 2 is eta = 1 here
    "sd14-2025": Config(parameters="x", lr=5e-5, iterations=200, states="frozen"),
}


# x_t


@dataclass(frozen=True, eq=False)
class State:
    """Noisy latents and what the frozen model predicts there: sample, text and uncond (n, channels, height, width),
    timestep (n,).
    """

    sample: Tensor
    timestep: Tensor
    text: Tensor
    uncond: Tensor

    def target(self, eta: float) -> Tensor:
        """y(x_t), which leads away from the prompt."""
        return self.uncond - eta * (self.text - self.uncond)

    def __add__(self, other: "State") -> "State":
        """The rows of both."""
        return State(*(torch.cat([getattr(self, name), getattr(other, name)]) for name in STATE))


STATE = tuple(one.name for one in fields(State))


@dataclass(frozen=True)
class Picks:
    """Which states: for each row a prompt, a noise seed, a node of the sampler (0 the cleanest) and, for the faithful
    lag, a time step within the node's stretch of them.
    """

    prompt: Tensor
    noise: Tensor
    node: Tensor
    offset: Tensor


@dataclass(eq=False)
class States:
    """Points on the ways from noise to pictures of `prompts`; `pick` some, and get them by `at`.

    model: the frozen one. walker: the UNet that draws, the model's own if None. seed: of the noise. Prompts may be
    empty. folder: where "cached" states lie, to be read again by the next training. The other fields as in `Config`.
    """

    model: DiffusionModel
    prompts: Sequence[str]
    seed: int
    guidance: float
    sampler: int
    states: Source
    noises: int | None
    faithful: bool = False
    walker: nn.Module | None = None
    folder: Path | None = None
    table: dict[str, Tensor] = field(
        default_factory=dict, init=False, repr=False
    )  # (prompts x noises, nodes ascending, ...)

    def __post_init__(self):
        one_text_encoder(self.model)
        self.scheduler = ddim(self.model.scheduler)
        self.scheduler.set_timesteps(self.sampler)
        self.text = self.model.encode(list(self.prompts))
        self.empty = self.model.encode("")[0]
        if self.states != "cached":
            return
        ways = [(p, n) for p in range(len(self.prompts)) for n in range(self.noises)]

        def whole(part: slice) -> dict[str, Tensor]:
            steps = list(self._walk(*map(torch.tensor, zip(*ways[part], strict=True))))[::-1]
            found = {
                name: torch.stack([step[name] for step in steps], 1) for name in ("sample", "text", "uncond")
            }
            at = torch.tensor([step["timestep"] for step in steps])
            return found | {"timestep": at.expand(len(ways[part]), -1)}

        what = [
            dict(self.scheduler.config),
            self.prompts,
            self.seed,
            self.guidance,
            self.sampler,
            self.noises,
        ]
        self.table = kept(self.model, (self.folder or FOLDER) / "states", what, len(ways), whole)

    def timesteps(self) -> Tensor:
        """Time step of each node, (sampler,)."""
        return self.scheduler.timesteps.flip(0)

    def pick(self, prompt: Tensor, generator: torch.Generator) -> Picks:
        """Noise, node and offset for each prompt (n,), uniformly."""
        draw = lambda high: torch.randint(high, prompt.shape, generator=generator)
        stretch = self.scheduler.config.num_train_timesteps // self.sampler
        return Picks(prompt, draw(self.noises or 2**31), draw(self.sampler), draw(stretch))

    @torch.no_grad()
    def at(self, picks: Picks) -> State:
        """The states picked, on the model's device. No gradient."""
        if self.walker is None:  # the frozen model computes in its own precision
            with torch.autocast(self.model.device.type, enabled=False):
                return self._at(picks)
        return self._at(picks)

    def _at(self, picks: Picks) -> State:
        device = self.model.device
        if self.states == "cached":
            rows = picks.prompt * self.noises + picks.noise
            return State(*(self.table[name][rows, picks.node].to(device) for name in STATE))
        sample, t = self._drawn(picks)
        context = torch.cat([self.empty.expand(len(sample), -1, -1), self.text[picks.prompt.to(device)]])
        both = self.model.unet(
            torch.cat([sample, sample]), torch.cat([t, t]), encoder_hidden_states=context, return_dict=False
        )[0]
        uncond, text = both.chunk(2)
        return State(sample, t, text, uncond)

    def _drawn(self, picks: Picks) -> tuple[Tensor, Tensor]:
        """x_t and t of each row, sampled as far as the furthest row needs it."""
        skip = int(self.faithful)
        # Nodes count from the clean end, steps from the noisy one. The lag of the code starts one step late and reads
        # two nodes further down, which for the two cleanest is the finished picture.
        done = (self.sampler - 1 - picks.node + skip).clamp(max=self.sampler - skip)
        found = {}
        for step in self._walk(picks.prompt, picks.noise, skip):
            for row in range(len(done)):
                if step["step"] == 0 == done[row]:
                    found[row] = step["sample"][row]
                if step["step"] + 1 == done[row]:
                    found[row] = step["latents"][row]
            if len(found) == len(done):
                break
        if self.faithful:
            t = picks.node * (self.scheduler.config.num_train_timesteps // self.sampler) + picks.offset
        else:
            t = self.timesteps()[picks.node]
        return torch.stack([found[row] for row in range(len(done))]), t.to(self.model.device)

    def _walk(self, prompt: Tensor, noise: Tensor, skip: int = 0):
        seeds = [self.seed + 7919 * int(p) + int(n) for p, n in zip(prompt, noise, strict=True)]
        text = self.text[prompt.to(self.text.device)]
        return walk(
            self.model.unet if self.walker is None else self.walker,
            self.scheduler,
            text,
            self.empty.expand_as(text),
            [torch.Generator().manual_seed(seed) for seed in seeds],
            steps=self.sampler,
            guidance=self.guidance,
            size=self.model.latent_size,
            skip=skip,
        )


def kept(
    model: DiffusionModel, place: Path, what: Sequence, count: int, make: Callable[[slice], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Tensors of which make(slice) computes some rows, for all `count` rows, on the CPU.

    They are made in pieces and written below `place`, in a folder named by the model and `what` they depend on: the
    next call reads them, a kill costs one piece a thread, a damaged piece is made again.
    """
    what = [model.fingerprint(), runs.edits_in_force(model), model.dtype, model.device.type, *what]
    folder = place / hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:24]
    size = model.batch_size

    @torch.no_grad()
    def piece(first: int) -> dict[str, Tensor]:
        file = folder / f"{first:06}.safetensors"
        if (found := _read(file)) is None:
            made = make(slice(first, min(first + size, count)))
            found = {name: tensor.cpu().contiguous() for name, tensor in made.items()}
            with replacing(file) as temporary:
                save_file(found, temporary, {"digest": _digest(found)})
        return found

    with text_projected_once(model.unet):
        parts = model._map(piece, range(0, count, size))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _read(file: Path) -> dict[str, Tensor] | None:
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as opened:
            found = {name: opened.get_tensor(name) for name in opened.keys()}
            return found if opened.metadata()["digest"] == _digest(found) else None
    except Exception:  # noqa: BLE001 - whatever is wrong with a cached file, it is made again
        return None


def one_text_encoder(model: DiffusionModel) -> None:
    """ValueError for a model with two text encoders."""
    if getattr(model.pipeline, "text_encoder_2", None) is not None:
        raise ValueError("this method knows one text encoder; SDXL has two: erase by a closed form instead")


# Training a copy of one part


def erase_prompts(concepts: Sequence[Concept], templates: Sequence[str]) -> list[str]:
    """Every concept in its own templates, or in these."""
    return [fill(t, concept.name)[0] for concept in concepts for t in concept.templates or templates]


def trainee(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy in single precision of which only the parameters `names` are trained."""
    copied = copy.deepcopy(module).float().train(False)
    wanted = set(names)
    for name, parameter in copied.named_parameters():
        parameter.requires_grad_(name in wanted)
    return copied


def mixed(model: DiffusionModel):
    """bfloat16 arithmetic for a half-precision model, else nothing."""
    half = model.dtype in (torch.float16, torch.bfloat16)
    # The cache would keep the first cast of weights that change.
    cast = lambda: torch.autocast(model.device.type, torch.bfloat16, cache_enabled=False)
    return cast() if half else nullcontext()


def descend(
    method: str,
    model: DiffusionModel,
    module: nn.Module,
    loss: Callable[[int, torch.Generator], dict],
    config,
    prompts: Sequence[str],
    generator: torch.Generator,
    callback: Callable[[dict], None] | None,
    folder: Path | None,
    progress: bool,
    *,
    weight_decay: float = 0.0,
    clear: bool = True,
    clip: float = float("inf"),
    also: Sequence = (),
    clean: bool = True,
) -> Path:
    """Minimize the loss over the trainable parameters of `module` by Adam, as the papers do.

    Checkpoints lie in a folder of their own, which is returned, for the same model, settings, prompts, generator and
    whatever `also` depends on (texts, tensors, models), so that an interrupted run goes on; with `clean` they are
    deleted at the end.
    """
    what = [method, model.fingerprint(), runs.edits_in_force(model), asdict(config), list(prompts)]
    what += [generator.get_state().tolist(), [digest(one) for one in also]]
    what += [str(model.dtype), model.device.type, str(dict(model.scheduler.config))]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
    place = (folder or FOLDER) / f"{method}-{key}"

    def careful(step: int, generator: torch.Generator) -> dict:
        with mixed(model):
            return loss(step, generator)

    with frozen(model.unet, model.text_encoder):
        optimize(
            method, module, careful, steps=config.iterations, peak=config.lr, generator=generator, schedule=constant,
            betas=(0.9, 0.999), weight_decay=weight_decay, clear=clear, clip=clip, decay=0.0,
            callback=callback, folder=place, save_every=SAVE_EVERY, progress=progress,
        )  # fmt: skip
    if clean:
        discard([place])
    return place


def discard(places: Sequence[Path]) -> None:
    """Delete folders of checkpoints."""
    for place in places:
        for file in place.glob("*"):
            file.unlink()
        place.rmdir()


def delta(module: nn.Module, original: nn.Module, part: str) -> dict[str, Tensor]:
    """{part.name: trained - original} of the trained parameters, in half precision."""
    before = dict(original.named_parameters())
    return {
        f"{part}.{name}": (p.detach() - before[name].detach().float()).half()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def named(model: DiffusionModel, erase, preserve, anchor) -> tuple[Concept, ...]:
    """The concepts to erase. ValueError for nothing to erase, for unknown names among all three, and for a model that
    cannot be trained as it was loaded.
    """
    if model.dtype is torch.float16 and model.device.type == "cpu":
        raise ValueError(
            "training in float16 needs a GPU: load the model with dtype='float32', or 'bfloat16' to save memory"
        )
    erased = model.concepts(erase)
    model.concepts(preserve)
    if isinstance(anchor, str) and anchor.strip():
        model.concepts(anchor)
    if not erased:
        raise ValueError("there is nothing to erase: name at least one concept")
    return erased


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
    """Erase concepts by training a copy of the UNet; returns a weight_delta Edit and leaves the model alone.

    preserve: not used, ESD has no term for it; a warning says so. anchor: what the concept is erased from, "a painting"
    for a painter; the concept itself if None. config: None takes the preset of the model ("emoji" or "sd14-object").
    generator: seed 0 if None. callback: step and loss at every update. folder:
    of the checkpoints, from which an interrupted call with the same arguments goes on. Raises ValueError for unknown
    concepts and nothing to erase, FloatingPointError for a loss that is not finite (the last good state stays).
    """
    model.check_fit()
    config = config or PRESETS["emoji" if model.preset == "emoji" else "sd14-object"]
    erased = named(model, erase, preserve, anchor)
    if preserve:
        warnings.warn("ESD has no term that preserves: `preserve` changes nothing", stacklevel=2)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    prompts = about = erase_prompts(erased, config.templates)
    if anchor is not None:
        instead = anchor.name if isinstance(anchor, Concept) else anchor
        prompts = [fill(t, instead)[0] for one in erased for t in one.templates or config.templates]
    unet = trainee(model.unet, unet_parameters(model.unet, config.parameters))
    states = States(
        model, prompts, int(torch.randint(2**31, (), generator=generator)), config.guidance, config.sampler,
        config.states, config.noises, config.faithful, unet if config.states == "trained" else None, folder,
    )  # fmt: skip

    concept = model.encode(about)

    @torch.no_grad()
    def target(state: State, prompt: Tensor) -> Tensor:
        if anchor is None:
            return state.target(config.eta)
        with torch.autocast(model.device.type, enabled=False):
            said = model.unet(
                state.sample, state.timestep, encoder_hidden_states=concept[prompt], return_dict=False
            )[0]
        return state.text - (config.eta + 1) * (said - state.uncond)

    def loss(step: int, generator: torch.Generator) -> dict:
        prompt = torch.randint(len(prompts), (config.batch,), generator=generator)
        state, prompt = states.at(states.pick(prompt, generator)), prompt.to(model.device)
        text = states.text[prompt]
        predicted = unet(state.sample, state.timestep, encoder_hidden_states=text, return_dict=False)[0]
        return {"loss": (predicted.float() - target(state, prompt).float()).square().mean()}

    also = [] if anchor is None else about
    descend("esd", model, unet, loss, config, prompts, generator, callback, folder, progress, also=also)
    concepts = {
        "erase": [one.name for one in erased], "anchor": [] if anchor is None else [instead], "preserve": [],
    }  # fmt: skip
    change = delta(unet, model.unet, "unet")
    return Edit.from_weight_delta(change, model, method="esd", config=config, concepts=concepts)
