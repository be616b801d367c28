"""Training a copy of one part of a model, with checkpoints from which an interrupted training goes on."""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor, nn

from erasekit import states
from erasekit.layers import channels_last, sharing
from erasekit.models import DiffusionModel
from erasekit.sampling import config_of
from erasekit.training import constant, optimize

SAVE_EVERY = 50  # iterations
LARGE = 100_000_000  # parameters, from which on activations are computed twice and not kept


def trainee(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy of which only the parameters `names` are trained, in single precision or better; all others are those of
    `module`, in its precision and its memory, whose values must stay while the copy is used.
    """
    wanted = set(names)
    rest = sharing(one for name, one in module.named_parameters() if name not in wanted)
    copied = copy.deepcopy(module, rest).train(False)
    for name, parameter in copied.named_parameters():
        parameter.requires_grad_(name in wanted)
        if name in wanted:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return copied


@contextmanager
def checkpointed(*modules: nn.Module) -> Iterator[None]:
    """Gradient checkpointing of denoisers of more than `LARGE` parameters inside the block: a third more time for a
    fraction of the memory that activations take, with the same gradients.
    """
    size = lambda module: sum(one.numel() for one in module.parameters())
    able = [
        one
        for one in modules
        if getattr(one, "_supports_gradient_checkpointing", False) and size(one) > LARGE
    ]
    changed = [one for one in able if not one.is_gradient_checkpointing]
    try:
        for module in changed:
            module.enable_gradient_checkpointing()
        yield
    finally:
        for module in changed:
            module.disable_gradient_checkpointing()


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
    again: bool = True,
) -> Path:
    """Minimize the loss over the trainable parameters of `module` by Adam, as the papers do.

    Checkpoints lie in a folder of their own, which is returned, for the same model, settings, prompts, generator and
    whatever `also` depends on (texts, tensors, models), so that an interrupted run goes on; with `clean` they are
    deleted at the end. again: activations of large denoisers may be computed a second time, which a loss that listens
    inside the forward pass does not allow.
    """
    what = [method, model.fingerprint(), model.edits_in_force(), asdict(config), list(prompts)]
    what += [generator.get_state().tolist(), [digest(one) for one in also]]
    what += [str(model.dtype), model.device.type, str(config_of(model.scheduler)), *states.unusual(model)]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:24]
    place = (folder or states.FOLDER) / f"{method}-{key}"

    def careful(step: int, generator: torch.Generator) -> dict:
        with mixed(model):
            return loss(step, generator)

    inside = (
        (model.denoiser, *module.values()) if isinstance(module, nn.ModuleDict) else (model.denoiser, module)
    )
    recomputed = checkpointed(*inside if again else ())
    with frozen(model.denoiser, *model.text_encoders.values()), channels_last(*inside), recomputed:
        optimize(
            method, module, careful, steps=config.iterations, peak=config.lr, generator=generator, schedule=constant,
            betas=(0.9, 0.999), weight_decay=weight_decay, clear=clear, clip=clip, decay=0.0,
            callback=callback, folder=place, save_every=SAVE_EVERY, progress=progress,
        )  # fmt: skip
    if clean:
        discard([place])
    return place


def telling(callback: Callable[[dict], None] | None, **more) -> Callable[[dict], None] | None:
    """`callback` with `more` in every state that it is given; None stays None."""
    return callback and (lambda state: callback({**state, **more}))


def discard(places: Sequence[Path]) -> None:
    """Delete folders of checkpoints."""
    for place in places:
        for file in place.glob("*"):
            file.unlink()
        place.rmdir()


def difference(module: nn.Module, original: nn.Module, part: str) -> dict[str, Tensor]:
    """{part.name: trained - original} of the trained parameters, in half precision."""
    before = dict(original.named_parameters())
    return {
        f"{part}.{name}": (p.detach() - before[name].detach().float()).half()
        for name, p in module.named_parameters()
        if p.requires_grad
    }


def check_changed(change: Mapping[str, Tensor], config) -> None:
    """ValueError where training left every weight as it was."""
    if not any(one.any() for one in change.values()):
        raise ValueError(
            f"training changed no weight by as much as half precision can tell (lr={config.lr}, iterations="
            f"{config.iterations}): raise the learning rate, or train other parameters"
        )


def digest(thing) -> str:
    """SHA-256 of a tensor, picture, model, text, or a sequence of them."""
    if isinstance(thing, Tensor):
        content = (
            str(tuple(thing.shape)).encode() + thing.detach().double().cpu().contiguous().numpy().tobytes()
        )
    elif isinstance(thing, Image):
        content = str(thing.size).encode() + thing.convert("RGB").tobytes()
    elif isinstance(thing, DiffusionModel):
        content = json.dumps([thing.fingerprint(), thing.edits_in_force()]).encode()
    elif isinstance(thing, Sequence) and not isinstance(thing, str):
        content = "".join(map(digest, thing)).encode()
    else:
        content = repr(thing).encode()
    return hashlib.sha256(content).hexdigest()


@contextmanager
def frozen(*modules: torch.nn.Module) -> Iterator[None]:
    """No parameter of the modules wants a gradient inside the block; what passes through them still gets one."""
    wanted = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, before in wanted:
            parameter.requires_grad_(before)
