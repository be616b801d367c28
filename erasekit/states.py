"""Points on the ways from noise to pictures, x_t, and what the frozen model predicts there.

`States` is what ESD, RealEra, TRCE and AdvUnlearn have in common, and nearly all of what they cost: one x_t takes up to
2 x `sampler` passes, one update of a loss about four. Drawn from the frozen model x_t can be kept, and what the
frozen model predicts there comes for free, since guidance needed it.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from erasekit.conditioning import joined, predict
from erasekit.layers import channels_last, text_projected_once
from erasekit.models import DiffusionModel
from erasekit.paths import BUILD, replacing
from erasekit.sampling import config_of, ddim, walk
from erasekit.settings import check

Source = Literal["trained", "frozen", "cached"]
FOLDER = BUILD / "training"


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
    if config.faithful and config.sampler == 1:
        raise ValueError("the lag of faithful=True starts one step late: sampler must be at least 2")


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
        self.model.check_drawn()
        self.scheduler = ddim(self.model.scheduler)
        self.scheduler.set_timesteps(self.sampler)
        self.text = self.model.conditioning(list(self.prompts))
        self.empty = self.model.unconditional()
        if self.states != "cached":
            return
        ways = [(p, n) for p in range(len(self.prompts)) for n in range(self.noises)]

        def whole(part: slice) -> dict[str, Tensor]:
            steps = list(self._walk(*map(torch.tensor, zip(*ways[part], strict=True))))[::-1]
            column = lambda name: torch.stack([step[name] for step in steps], 1)
            found = {name: column(name) for name in ("sample", "text")}
            found["uncond"] = found["text"].clone() if self.unguided else column("uncond")
            at = torch.tensor([step["timestep"] for step in steps])
            return found | {"timestep": at.expand(len(ways[part]), -1)}

        what = [
            config_of(self.scheduler),
            self.prompts,
            self.seed,
            self.guidance,
            self.sampler,
            self.noises,
        ]
        self.table = cached(self.model, (self.folder or FOLDER) / "states", what, len(ways), whole)

    @property
    def unguided(self) -> bool:
        """Whether both halves of guidance would be the same: the empty prompt alone."""
        return self.model.own_loop and not any(self.prompts)

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
        context = joined([self.empty.times(len(sample)), self.text[picks.prompt]])
        both = predict(self.model.unet, torch.cat([sample, sample]), torch.cat([t, t]), context)
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
        return walk(
            self.model.unet if self.walker is None else self.walker,
            self.scheduler,
            self.text[prompt],
            self.empty.times(len(prompt)),
            [torch.Generator().manual_seed(seed) for seed in seeds],
            steps=self.sampler,
            guidance=1.0 if self.unguided else self.guidance,
            size=self.model.latent_size,
            skip=skip,
        )


def cached(
    model: DiffusionModel, place: Path, what: Sequence, count: int, make: Callable[[slice], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Tensors of which make(slice) computes some rows, for all `count` rows, on the CPU.

    They are made in pieces and written below `place`, in a folder named by the model and `what` they depend on: the
    next call reads them, a kill costs one piece a thread, a damaged piece is made again, as is one of latents of
    another size than the model's own, (rows, nodes, channels, height, width).
    """
    # Nobody looks at these pictures, so that a small model need not compute them in the batches of `generate`.
    size = max(model.batch_size, 8)
    what = [model.fingerprint(), model.edits_in_force(), model.dtype, model.device.type, size, *what]
    what += unusual(model)
    folder = place / hashlib.sha256(json.dumps(what, default=str).encode()).hexdigest()[:24]

    @torch.no_grad()
    def piece(first: int) -> dict[str, Tensor]:
        file = folder / f"{first:06}.safetensors"
        found = _read(file)
        if found is None or any(x.ndim == 5 and x.shape[3:] != model.latent_size for x in found.values()):
            made = make(slice(first, min(first + size, count)))
            found = {name: tensor.cpu().contiguous() for name, tensor in made.items()}
            with replacing(file) as temporary:
                save_file(found, temporary, {"digest": _digest(found)})
        return found

    with text_projected_once(model.unet), channels_last(model.unet):
        parts = model._map(piece, range(0, count, size))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def unusual(model: DiffusionModel) -> list[str]:
    """For keys, what the ways depend on and no fingerprint has: latents of another size than the UNet was made with,
    an SDXL that takes no zeros for the empty prompt, and the vectors of textual inversions. Without them an empty list.
    """
    found, size = [], getattr(model.denoiser.config, "sample_size", None)
    if size != vars(model.denoiser).get("sample_size", size):  # the attribute stays as it was made
        found.append(f"size {size}")
    if not model.pipeline.config.get("force_zeros_for_empty_prompt", True):
        found.append("empty prompt encoded")
    for part, encoder in model.text_encoders.items():
        for name, table in encoder.state_dict().items():
            if name.endswith("token_embedding.weight") and (added := model._added(part)):
                found.append(f"{part} {_digest({name: table[-added:].cpu()})}")
    return found


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
