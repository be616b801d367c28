"""One resumable optimization loop: AdamW, EMA, checkpoints without pickle, CSV log."""

import csv
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from erasekit.paths import BUILD, replacing

CHECKPOINTS = BUILD / "emoji"
SAVE_EVERY = 200  # steps


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, constant, cosine decay to 2 % of the peak over the last 40 % of the run."""
    if step < warmup:
        return peak * (step + 1) / warmup
    tail = max(0.0, (step - 0.6 * steps) / (0.4 * steps))
    return peak * (0.02 + 0.98 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(1.0, tail))).item()))


def constant(step: int, steps: int, peak: float) -> float:
    """The same learning rate throughout."""
    return peak


def save_checkpoint(
    path: Path, module, average, optimizer, step: int, generator, seconds: float, gradients: bool = False
) -> None:
    """Write module, EMA, AdamW moments and generator state to one safetensors file, atomically; gradients too where
    they are added up. Parameters that are not trained are left out.
    """
    fixed = {k for k, v in module.named_parameters() if not v.requires_grad}
    tensors = {f"module.{k}": v for k, v in module.state_dict().items() if k not in fixed}
    tensors |= {f"average.{k}": v for k, v in average.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    if gradients:
        tensors |= {f"gradient.{k}": v.grad for k, v in module.named_parameters() if v.grad is not None}
    tensors["generator"] = generator.get_state()
    with replacing(path) as temporary:
        save_file(
            {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()},
            temporary,
            metadata={"step": str(step), "seconds": json.dumps(seconds)},
        )


def load_checkpoint(path: Path, module, average, optimizer, generator) -> tuple[int, float]:
    """Inverse of `save_checkpoint`; returns (step, seconds spent so far)."""
    with safe_open(path, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}
        metadata = file.metadata()
    state = {k[7:]: v for k, v in tensors.items() if k.startswith("module.")}
    missing, unexpected = module.load_state_dict(state, strict=False)
    trained = {k for k, v in module.named_parameters() if v.requires_grad}
    if unexpected or trained & set(missing):
        raise ValueError(f"{path} is a checkpoint of other weights: delete it to begin anew")
    for k in average:
        average[k].copy_(tensors[f"average.{k}"])
    state: dict = {}
    for k, v in tensors.items():
        if k.startswith("optimizer."):
            _, i, name = k.split(".", 2)
            state.setdefault(int(i), {})[name] = v
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for k, v in module.named_parameters():
        gradient = tensors.get(f"gradient.{k}")
        v.grad = None if gradient is None else gradient.to(v.device, v.dtype)
    generator.set_state(tensors["generator"])
    return int(metadata["step"]), json.loads(metadata["seconds"])


def optimize(
    name: str,
    module: torch.nn.Module,
    loss: Callable[[int, torch.Generator], dict[str, torch.Tensor]],
    *,
    steps: int,
    peak: float,
    generator: torch.Generator,
    log: Path | None = None,
    schedule: Callable[[int, int, float], float] = learning_rate,
    callback: Callable[[dict], None] | None = None,
    decay: float = 0.999,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    clip: float = 1.0,
    clear: bool = True,
    begin: int = 0,
    save_every: int = SAVE_EVERY,
    log_every: int = 20,
    folder: Path = CHECKPOINTS,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Minimize loss(step, generator)["loss"] over the steps begin to `steps` and return the averaged weights.

    Starts from `folder/name.safetensors` when it exists; with the same arguments, an interrupted run ends in the
    weights of an uninterrupted one. A begin above 0 goes on from weights that an earlier run left, with a schedule
    of its own. Every `log_every` steps append the mean of each scalar to `log` (for the same log after an interruption,
    save_every must be a multiple of it); callback gets step and scalars at every one.
    decay: of the average, 0 for the last weights themselves. clip: largest norm of the gradient, inf for no limit.
    clear: False adds up the gradients of all steps. A loss that is not finite raises FloatingPointError and leaves the
    last checkpoint in place.
    """
    path = folder / (f"{name}-from-{begin}.safetensors" if begin else f"{name}.safetensors")
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=betas, weight_decay=weight_decay)
    named = {k: v for k, v in module.named_parameters() if v.requires_grad}
    average = {k: v.detach().clone().float() for k, v in named.items()} if decay else {}
    start, spent = begin, 0.0
    if path.exists():
        start, spent = load_checkpoint(path, module, average, optimizer, generator)
    if log:
        _cut(log, start)
    clock, window = time.perf_counter() - spent, []
    bar = tqdm(
        range(start, steps), initial=start, total=steps, desc=name, mininterval=10, disable=not progress
    )
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = schedule(step - begin, steps - begin, peak)
        terms = loss(step, generator)
        if not torch.isfinite(terms["loss"]):
            raise FloatingPointError(
                f"{name}: loss is {terms['loss'].item()} at step {step}; "
                f"the last checkpoint, if there was one, is {path}; lower the learning rate and run again"
            )
        if clear:
            optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        if clip < float("inf"):
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        if average:
            rate = min(decay, (step - begin + 1) / (step - begin + 10))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in named.values()], 1 - rate)
        window.append({k: v.item() for k, v in terms.items()})
        if callback is not None:
            callback({"step": step, **window[-1]})
        if (step + 1) % log_every == 0:
            means = {k: sum(w[k] for w in window) / len(window) for k in window[0]}
            bar.set_postfix({k: f"{v:.4f}" for k, v in means.items()})
            if log:
                row = {"step": step + 1, "seconds": round(time.perf_counter() - clock, 1)}
                _append(log, row | {k: round(v, 6) for k, v in means.items()})
            window = []
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_checkpoint(
                path, module, average, optimizer, step + 1, generator, time.perf_counter() - clock, not clear
            )
    return average or {k: v.detach().clone().float() for k, v in named.items()}


def _cut(path: Path, step: int) -> None:
    """Drop the rows of a log past `step`: an interrupted run writes them again."""
    if path.exists():
        header, *rows = path.read_text().splitlines()
        kept = [row for row in rows if int(row.partition(",")[0]) <= step]
        path.write_text("\n".join([header, *kept]) + "\n") if kept else path.unlink()


def _append(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def begin_of(name: str, log: Path, folder: Path = CHECKPOINTS) -> int:
    """The step at which a run that goes on began: that of an interrupted one, told by its checkpoint, else the last
    step of the log.
    """
    last = int(log.read_text().splitlines()[-1].partition(",")[0])
    for path in folder.glob(f"{name}-from-*.safetensors"):
        with safe_open(path, "pt") as file:
            behind = last - int(file.metadata()["step"])
        if 0 <= behind < SAVE_EVERY:
            return int(path.stem.rpartition("-")[2])
    return last
