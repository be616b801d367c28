"""Where text enters a denoiser, found by running it: no architecture is listed here.

The first linear layers that read text and nothing else are its text entries. A closed form acts there: in the space
that an entry reads, W' = W T for every weight W that reads the same rows. An entry reads the text embedding itself,
the embedding behind a norm, or one pooled row for the whole prompt, perhaps with other columns beside it (as the sizes
in SDXL's add_embedding).

`trace` compares three calls of the denoiser: one to start from, one with another text, one with another picture and
time. A last one, with the other text and with what the entries gave for the first, must draw what the first drew: else
text has another way in, which no edit of these layers would close, and the denoiser is refused.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from erasekit import pipelines
from erasekit.models import DiffusionModel

Reads = Literal["embedding", "normed", "pooled"]
Call = tuple[tuple, dict]  # arguments of a denoiser
Path = tuple  # where a tensor is in them

PROMPTS = ("a cat", "two boats")  # any two texts


@dataclass(frozen=True)
class TextEntry:
    """One linear layer that reads text and nothing else.

    layer: its name in the denoiser. reads: "embedding", the text embedding itself; "normed", the embedding behind the
    module `norm`; "pooled", one row for the whole prompt. columns: first and one past the last column of its input that
    hold text. width: of the whole input. space: a number; layers with the same one read the same rows, and one map
    serves them all.
    """

    layer: str
    reads: Reads
    columns: tuple[int, int]
    width: int
    bias: bool
    space: int
    norm: str | None = None

    @property
    def weight(self) -> str:
        """Name of its weight, (d_out, width), in the denoiser."""
        return f"{self.layer}.weight"

    @property
    def pooled(self) -> bool:
        return self.reads == "pooled"


def text_entries(model: DiffusionModel) -> tuple[TextEntry, ...]:
    """The text entries of a model's denoiser, in the order in which it comes by them.

    The pipeline is called three times with a small picture, for two texts, two seeds and two steps, to see what it
    feeds the denoiser; `trace` does the rest. Found once for a model. ValueError, in one sentence, for a denoiser whose
    text passes through attention or anything else before a linear layer reads it.
    """
    if model._text_entries is None:
        base = fed(model, PROMPTS[0])
        other_prompt, other_picture = fed(model, PROMPTS[1]), fed(model, PROMPTS[0], seed=1, call=1)
        text = [
            path
            for path, one in leaves(base)
            if one.is_floating_point()
            and one.unique().numel() > 2  # a mask has two values
            and differs(one, at(other_prompt, path))
        ]
        if not text:
            raise ValueError(
                f"{type(model.pipeline).__name__} feeds the same to its denoiser, whatever the prompt: there is no "
                "text to edit"
            )
        swapped = replaced(base, {path: at(base, path).roll(1, -1) for path in text})
        moved = replaced(other_picture, {path: at(base, path) for path in text})
        model._text_entries = trace(model.denoiser, base, swapped, moved)
    return model._text_entries


def spaces(model: DiffusionModel) -> dict[int, TextEntry]:
    """{space: the first entry that reads it}."""
    return {entry.space: entry for entry in reversed(text_entries(model))}


@torch.no_grad()
def trace(denoiser: nn.Module, base: Call, other_text: Call, other_picture: Call) -> tuple[TextEntry, ...]:
    """The text entries of a denoiser, from three calls (positional and named arguments) of batch size 1.

    other_text: `base` with other tensors, of the same shapes, where text stands. other_picture: `base` with another
    picture and another time. ValueError as in `text_entries`.
    """
    name = type(denoiser).__name__
    text = {path: one for path, one in leaves(base) if differs(one, at(other_text, path))}
    read, plain = _digests(denoiser, base)
    by_text, changed = _digests(denoiser, other_text)
    by_picture, _ = _digests(denoiser, other_picture)
    effect = _distance(changed, plain)
    if not effect > 0:
        raise ValueError(f"what {name} predicts does not depend on its text: there is nothing to edit")
    candidates = [layer for layer in read if by_text.get(layer) != read[layer] == by_picture.get(layer)]

    kept = _kept(denoiser, base, candidates, text)
    first, left = _cut(denoiser, other_text, kept)
    if not first or _distance(left, plain) > 1e-3 * effect:
        raise ValueError(
            f"the text of {name} has other ways in than linear layers that read it alone (it passes through attention, "
            "or stands in one sequence with the picture): no closed form reaches it"
        )
    entries, spaces = [], {}
    for layer in first:
        space = spaces.setdefault(read[layer], len(spaces))
        entries.append(_entry(denoiser, layer, kept, first[layer], text, space))
    return tuple(entries)


def _entry(
    denoiser: nn.Module,
    layer: str,
    kept: "_Kept",
    other: Tensor,
    text: Mapping[Path, Tensor],
    space: int,
) -> TextEntry:
    """What a first layer reads. ValueError where it is not the text embedding, or that behind a norm."""
    linear, x = denoiser.get_submodule(layer), kept.inputs[layer][0]
    whole = TextEntry(layer, "embedding", (0, x.shape[-1]), x.shape[-1], linear.bias is not None, space)
    for one in text.values():
        width = one.shape[-1]
        start = 0 if width >= x.shape[-1] else _first_changed(x, other)
        if _among(x[..., start : start + width], one):
            rows = one.numel() // width
            return replace(
                whole, reads="pooled" if rows == 1 else "embedding", columns=(start, start + width)
            )
    for norm, (_, normed) in kept.norms.items():
        if normed.shape[-1] == x.shape[-1] and _among(x, normed):
            return replace(whole, reads="normed", norm=norm)
    raise ValueError(
        f"{layer} of {type(denoiser).__name__} reads text that other layers, such as attention, have mixed before: no "
        "closed form of the text embeddings reaches it"
    )


@dataclass(frozen=True)
class _Kept:
    """Of one call: inputs and outputs of linear layers, call by call, and {norm of the text: (input, output)}."""

    inputs: dict[str, list[Tensor]]
    outputs: dict[str, list[Tensor]]
    norms: dict[str, tuple[Tensor, Tensor]]


def _kept(denoiser: nn.Module, call: Call, candidates: Iterable[str], text: Mapping[Path, Tensor]) -> _Kept:
    kept = _Kept({}, {}, {})

    def keep(name, module, args, output):
        kept.inputs.setdefault(name, []).append(args[0])
        kept.outputs.setdefault(name, []).append(output)

    def keep_norm(name, module, args, output):
        if args and isinstance(args[0], Tensor) and any(_among(args[0], one) for one in text.values()):
            kept.norms[name] = args[0], output

    norms = [name for name, one in denoiser.named_modules() if "norm" in type(one).__name__.lower()]
    with _hooks(denoiser, candidates, keep), _hooks(denoiser, norms, keep_norm):
        _run(denoiser, call)
    return kept


def _cut(denoiser: nn.Module, call: Call, kept: _Kept) -> tuple[dict[str, Tensor], Tensor]:
    """Which of the layers still see another text while all of them give what they gave before, {layer: what it saw
    first}, and what the denoiser predicts then.
    """
    seen, times = {}, dict.fromkeys(kept.inputs, 0)

    def hold(name, module, args, output):
        turn = times[name]
        times[name] += 1
        if differs(kept.inputs[name][turn], args[0]):
            seen.setdefault(name, args[0])
        return kept.outputs[name][turn]

    with _hooks(denoiser, kept.inputs, hold):
        return seen, _run(denoiser, call)


def _digests(denoiser: nn.Module, call: Call) -> tuple[dict[str, str], Tensor]:
    """{linear layer: digest of all that it read}, in the order of the first reading, and the prediction."""
    seen = {}

    def digest(name, module, args, output):
        x = args[0].detach().contiguous().cpu()
        one = seen.setdefault(name, hashlib.sha256())
        one.update(f"{tuple(x.shape)}".encode())
        one.update(x.view(torch.uint8).numpy())

    layers = [name for name, one in denoiser.named_modules() if isinstance(one, nn.Linear)]
    with _hooks(denoiser, layers, digest):
        prediction = _run(denoiser, call)
    return {name: one.hexdigest() for name, one in seen.items()}, prediction


def _run(denoiser: nn.Module, call: Call) -> Tensor:
    """The prediction, all of its tensors in one."""
    args, kwargs = call
    return torch.cat([one.detach().double().flatten() for _, one in leaves(denoiser(*args, **kwargs))])


@contextmanager
def _hooks(module: nn.Module, names: Iterable[str], hook: Callable) -> Iterator[None]:
    """hook(name, module, args, output) after each call of the named modules; what it returns replaces the output."""
    with ExitStack() as stack:
        for name in names:
            bound = lambda one, args, output, name=name: hook(name, one, args, output)
            stack.callback(module.get_submodule(name).register_forward_hook(bound).remove)
        yield


class Enough(Exception):
    """Ends a call of a pipeline of which enough was seen."""


@torch.no_grad()
def fed(model: DiffusionModel, prompt: str, *, seed: int = 0, call: int = 0) -> Call:
    """Arguments that the pipeline gives its denoiser, for a small picture without guidance.

    call: which one of its calls, from 0; those before are run.
    """
    calls = []

    def note(module, args, kwargs):
        calls.append((args, kwargs))
        if len(calls) > call:
            raise Enough

    handle = model.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    try:
        call_pipeline(model, prompt, seed, steps=call + 1)
    finally:
        handle.remove()
    return calls[call]


def call_pipeline(model: DiffusionModel, prompt: str, seed: int = 0, steps: int = 1) -> None:
    """The pipeline's own call, for a small picture without guidance, until a hook raises `Enough`."""
    side = max(32, 8 * model.pipeline.vae_scale_factor)
    start = {}
    if "strength" in pipelines.known(model.pipeline.__call__):  # it draws over a picture, as SDXL's refiner
        start = {"image": Image.new("RGB", (side, side), "gray"), "strength": 1.0}
    try:
        with pipelines.silently():
            pipelines.run(
                model.pipeline,
                prompt=prompt,
                height=side,
                width=side,
                num_inference_steps=steps,
                guidance_scale=0.0,  # Z-Image guides at 1 already
                true_cfg_scale=0.0,
                generator=torch.Generator().manual_seed(seed),
                output_type="latent",
                **start,
            )
    except Enough:
        pass


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in nested tuples, lists and dictionaries, with its path."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from leaves(one, (*path, key))
    elif isinstance(value, (tuple, list)):
        for index, one in enumerate(value):
            yield from leaves(one, (*path, index))


def at(value: Any, path: Path) -> Any:
    """What stands at a path, None where there is nothing."""
    for step in path:
        try:
            value = value[step]
        except (KeyError, IndexError, TypeError):
            return None
    return value


def replaced(value: Any, new: Mapping[Path, Tensor], path: Path = ()) -> Any:
    """The same nest with other tensors at some paths."""
    if path in new:
        return new[path]
    if isinstance(value, Mapping):
        return {key: replaced(one, new, (*path, key)) for key, one in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(replaced(one, new, (*path, index)) for index, one in enumerate(value))
    return value


def differs(one: Tensor, other: Any) -> bool:
    return not isinstance(other, Tensor) or one.shape != other.shape or not torch.equal(one, other)


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm())


def _first_changed(x: Tensor, other: Tensor) -> int:
    """The first column in which two inputs of a layer differ."""
    changed = (x != other).reshape(-1, x.shape[-1]).any(0)
    return int(changed.to(torch.int64).argmax())


def _rows(x: Tensor) -> list[bytes]:
    flat = (x.detach().reshape(-1, x.shape[-1]) + 0.0).contiguous().cpu()  # -0.0, of a mask, is 0.0
    return [one.tobytes() for one in flat.view(torch.uint8).numpy()]


def _among(x: Tensor, source: Tensor) -> bool:
    """Whether x has rows, and each of them is a row of `source` or nothing but zeros."""
    if not x.is_floating_point() or x.shape[-1:] != source.shape[-1:] or not x.any():
        return False
    known = {*_rows(source.to(x)), *_rows(torch.zeros_like(x.reshape(-1, x.shape[-1])[:1]))}
    return set(_rows(x)) <= known
