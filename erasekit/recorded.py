"""Points on the ways from noise to pictures of every family that its own pipeline draws, recorded from its call.

No sampler of ours, and no architecture is listed here. The pipeline is called with a prompt until a step, and what its
denoiser is given then is the state: picture and time, sizes, positions, guidance where that is a number that the
denoiser reads. What of it is text is found by comparing the calls for several prompts, and the text of any other prompt
can stand in its place. `states` does the same for Stable Diffusion 1 and 2, by a loop of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from erasekit import pipelines
from erasekit.models import DiffusionModel
from erasekit.states import Source
from erasekit.text_entries import Call, Enough, Path, at, differs, leaves, replaced

State = Mapping[Path, Tensor]  # what a denoiser is given, but for the text


@dataclass(eq=False)
class Recorded:
    """Points on the ways from noise to pictures of `prompts`: `pick` some, get them `at`, and `predict` there.

    model: the frozen one. others: more prompts whose text is wanted, the empty one always is. walker: the denoiser that
    draws, the model's own if None. seed: of the noise. pixels: height and width, the pipeline's own if None. The other
    fields as in `Config` of ESD; "cached" ways are kept in memory. ValueError for a pipeline that cannot be recorded.
    """

    model: DiffusionModel
    prompts: Sequence[str]
    others: Sequence[str]
    seed: int
    guidance: float
    sampler: int
    states: Source
    noises: int | None
    pixels: int | None = None
    walker: nn.Module | None = None
    calls: dict[str, Call] = field(default_factory=dict, init=False, repr=False)  # the first one, unguided
    text: frozenset[Path] = field(default=frozenset(), init=False, repr=False)  # where text stands in a call
    ways: dict[tuple[int, int], list[State]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        check_recordable(self.model, self.guidance, self.pixels)
        for prompt in dict.fromkeys([*self.prompts, *self.others, ""]):
            (self.calls[prompt],) = self._run(prompt, 0, 0, guided=False)
        first, *rest = self.calls.values()
        pairs = [pair for other in rest for pair in ((first, other), (other, first))]
        self.text = frozenset(path for a, b in pairs for path, one in leaves(a) if differs(one, at(b, path)))
        if not self.text:
            raise ValueError(
                f"{type(self.model.pipeline).__name__} feeds the same to its denoiser, whatever the prompt: there is "
                "no text to train on"
            )

    def pick(self, prompt: Tensor, generator: torch.Generator) -> list[tuple[int, int, int]]:
        """Prompt, noise seed and node of the sampler (0 the cleanest) for each prompt (n,), uniformly."""
        draw = lambda high: torch.randint(high, prompt.shape, generator=generator).tolist()
        return list(zip(prompt.tolist(), draw(self.noises or 2**31), draw(self.sampler), strict=True))

    def at(self, prompt: int, noise: int, node: int) -> State:
        """What the denoiser is given there. No gradient."""
        run = lambda last: self._run(self.prompts[prompt], self.seed + 7919 * prompt + noise, last)
        last = self.sampler - 1 - node  # nodes count from the clean end, steps from the noisy one
        if self.states != "cached":
            return self._state(run(last)[-1])
        if (prompt, noise) not in self.ways:
            self.ways[prompt, noise] = [self._state(call) for call in run(self.sampler - 1)]
        return self.ways[prompt, noise][last]

    def fed(self, state: State, prompt: str) -> Call:
        """Arguments of the denoiser at a state, with the text of this prompt."""
        return replaced(self.calls[prompt], state)

    def predict(self, denoiser: nn.Module, state: State, prompt: str) -> Tensor:
        """Noise or velocity, all its numbers in one row, (n,)."""
        args, kwargs = self.fed(state, prompt)
        return torch.cat([one.flatten() for _, one in leaves(denoiser(*args, **kwargs))])

    def _state(self, call: Call) -> State:
        """Of a guided call, whose batch may have the empty prompt before the prompt, the rows of the prompt."""
        found = {}
        for path, one in leaves(next(iter(self.calls.values()))):
            if path in self.text:
                continue
            given = at(call, path)
            if isinstance(given, Tensor) and given.ndim == one.ndim > 0:
                given = given[-len(one) :]
            if not isinstance(given, Tensor) or given.shape != one.shape:
                raise ValueError(
                    f"{type(self.model.pipeline).__name__} feeds its denoiser other arguments with guidance than "
                    "without: set guidance=0, or erase by a closed form (uce, rece)"
                )
            found[path] = given.clone()
        return found

    @torch.no_grad()
    def _run(self, prompt: str, seed: int, last: int, *, guided: bool = True) -> list[Call]:
        """The first call of the denoiser in each step, up to the step `last`."""
        pipeline, calls, done = self.model.pipeline, [], []

        def note(module, args, kwargs):
            if len(calls) == len(done):
                calls.append((args, kwargs))
            if len(calls) > last:
                raise Enough

        def step_end(pipeline, step, timestep, tensors):
            done.append(step)
            return {}

        scales = {"guidance_scale": 0.0, "true_cfg_scale": 0.0}  # Z-Image guides at 1 already
        if guided:
            distilled = bool(pipeline.config.get("is_distilled"))
            scales = pipelines.guided(
                pipeline, self.model.denoiser, None if distilled else self.guidance, None
            )
        size = {} if self.pixels is None else {"height": self.pixels, "width": self.pixels}
        denoiser = self.model.denoiser if self.walker is None else self.walker
        # the frozen model computes in its own precision
        exact = (
            torch.autocast(self.model.device.type, enabled=False) if self.walker is None else nullcontext()
        )
        handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
        try:
            with pipelines.silently(), exact, _drawing_with(self.model, self.walker):
                pipelines.run(
                    pipeline,
                    prompt=[prompt],
                    num_inference_steps=self.sampler,
                    generator=[torch.Generator().manual_seed(seed)],
                    output_type="latent",
                    callback_on_step_end=step_end,
                    **size,
                    **scales,
                )
        except Enough:
            return calls
        finally:
            handle.remove()
        raise ValueError(
            f"{type(pipeline).__name__} ended before step {last + 1} of {self.sampler}: it draws with another module "
            f"than its {type(denoiser).__name__}, or its scheduler takes fewer steps than asked for: give another"
        )


@contextmanager
def _drawing_with(model: DiffusionModel, walker: nn.Module | None) -> Iterator[None]:
    """Inside the block the pipeline draws with another denoiser."""
    if walker is None:
        yield
        return
    own = getattr(model.pipeline, model.denoiser_part)
    setattr(model.pipeline, model.denoiser_part, walker)
    try:
        yield
    finally:
        setattr(model.pipeline, model.denoiser_part, own)


def check_recordable(model: DiffusionModel, guidance: float, pixels: int | None) -> None:
    """ValueError, with what works instead, for a pipeline whose states cannot be recorded as they are asked for."""
    pipeline, name = model.pipeline, type(model.pipeline).__name__
    names, scheduler = pipelines.known(pipeline.__call__), type(model.scheduler).__name__
    if "strength" in names:
        raise ValueError(
            f"{name} draws over a picture, from which no way starts at noise: train the base model, which draws from "
            "noise (of SDXL StableDiffusionXLPipeline), or erase by a closed form (uce, rece)"
        )
    if "callback_on_step_end" not in names:
        raise ValueError(f"{name} does not report its steps: erase by a closed form (uce, rece) instead")
    if getattr(model.scheduler, "order", 1) != 1:
        raise ValueError(
            f"{scheduler} looks at a picture more than once a step: give the pipeline a scheduler of first order, such "
            "as the one it came with"
        )
    if pipeline.config.get("is_distilled") and guidance > 1:
        raise ValueError(f"this {name} is distilled and ignores guidance: set guidance=0")
    if pixels is not None and pixels % (unit := 2 * pipeline.vae_scale_factor):
        raise ValueError(f"pixels must be a multiple of {unit} here, got {pixels}")
