"""The rows that text entries read for a prompt, and which of them belong to a phrase in it.

The pipeline makes them: it is called with the prompt until its denoiser has read the text, so that templates, several
text encoders, padding and masks are as in a picture. Token positions are found by comparing ids: prompts that differ in
one phrase end alike behind it. Which row is which token is found by its content, the hidden state of the text encoder.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from erasekit.layers import uncompiled
from erasekit.models import PARTS, DiffusionModel
from erasekit.text_entries import Enough, TextEntry, call_pipeline, leaves


@dataclass(frozen=True, eq=False)
class Encoded:
    """What one text encoder was given for a prompt, and what it gave.

    ids: (length), with special tokens, template and padding. real: first position and one past the last that are no
    padding. states: hidden states, each (length, width).
    """

    ids: tuple[int, ...]
    real: tuple[int, int]
    states: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Prompt:
    """rows: {space: what its entries read, float64 (n, d)}; before: the same before the norm, if there is one."""

    text: str
    rows: dict[int, Tensor]
    before: dict[int, Tensor]
    encoded: dict[str, Encoded]


@torch.no_grad()
def read(model: DiffusionModel, entries: Sequence[TextEntry], text: str) -> Prompt:
    """What the entries read for a prompt, (1 row where they are pooled)."""
    first = {}
    for entry in entries:
        first.setdefault(entry.space, entry)
    rows, before, encoded = {}, {}, {}

    def row(entry, x):
        start, stop = entry.columns
        return x[..., start:stop].reshape(-1, stop - start)

    def reads(entry):
        def hook(module, args):
            if entry.space not in rows:
                rows[entry.space] = row(entry, args[0])
                before.setdefault(entry.space, rows[entry.space])
            if len(rows) == len(first):
                raise Enough

        return hook

    def normed(entry):
        def hook(module, args):
            before.setdefault(entry.space, row(entry, args[0]))

        return hook

    def encodes(part):
        def hook(module, args, kwargs, output):
            ids = kwargs.get("input_ids", args[0] if args else None)
            if part not in encoded and ids is not None:
                encoded[part] = _encoded(model, part, ids, kwargs.get("attention_mask"), output)

        return hook

    with ExitStack() as stack:
        for part in PARTS:
            if (
                part.startswith("text_encoder")
                and (module := getattr(model.pipeline, part, None)) is not None
            ):
                hook = uncompiled(module).register_forward_hook(encodes(part), with_kwargs=True)
                stack.callback(hook.remove)
        for entry in first.values():
            layer = model.denoiser.get_submodule(entry.layer)
            stack.callback(layer.register_forward_pre_hook(reads(entry)).remove)
            if entry.norm is not None:
                norm = model.denoiser.get_submodule(entry.norm)
                stack.callback(norm.register_forward_pre_hook(normed(entry)).remove)
        call_pipeline(model, text)
    return Prompt(text, {space: one.double() for space, one in rows.items()}, before, encoded)


def _encoded(model: DiffusionModel, part: str, ids: Tensor, mask: Tensor | None, output) -> Encoded:
    row = ids[0].tolist()
    if mask is not None and mask.shape == ids.shape:
        real = [i for i, one in enumerate(mask[0].tolist()) if one]
    else:
        tokenizer = getattr(model.pipeline, part.replace("text_encoder", "tokenizer"))
        padding = getattr(tokenizer, "pad_token_id", None)
        real = [i for i, one in enumerate(row) if one != padding]
    found = [one for _, one in leaves(output) if one.ndim == 3 and one.shape[:2] == ids.shape]
    return Encoded(tuple(row), (real[0], real[-1] + 1) if real else (0, 0), tuple(one[0] for one in found))


def paired(entry: TextEntry, old: Prompt, new: Prompt, blank: Prompt, tokens: str) -> tuple[Tensor, Tensor]:
    """Rows (n, d) that the entry reads for two prompts that differ in one phrase, and which belong together.

    tokens: "last_subject", the last token of the phrase; "last_to_end", from there to the end of what its text encoder
    gives; "all". Text encoders one after the other (SD 3) give their rows one after the other; a pooled entry has one
    row. blank: the prompt without the phrase. ValueError where no row of the entry is the token's.
    """
    a, b = old.rows[entry.space], new.rows[entry.space]
    if entry.pooled or tokens == "all":
        count = min(len(a), len(b))
        return a[:count], b[:count]
    sides = []
    for part in old.encoded:
        ends = _ends(part, old, new, blank)
        spans = [_span(entry, old, part, ends[0]), _span(entry, new, part, ends[1])]
        if None in spans:
            continue  # the entry does not read this text encoder, or reads it beside another one
        count = 1 if tokens == "last_subject" else min(stop - start for start, stop in spans)
        sides.append([x[start : start + count] for x, (start, _) in zip((a, b), spans, strict=True)])
    if not sides:
        raise ValueError(
            f"none of the rows that {entry.layer} reads for {old.text!r} is the token of its phrase: the pipeline "
            'changes them on the way; use tokens="all"'
        )
    return torch.cat([one for one, _ in sides]), torch.cat([one for _, one in sides])


def own(entry: TextEntry, prompt: Prompt, blank: Prompt, tokens: str) -> Tensor:
    """The rows of one prompt, by the same rules."""
    return paired(entry, prompt, prompt, blank, tokens)[0]


def _ends(part: str, *prompts: Prompt) -> list[int]:
    """Position of the last token of the phrase in each of the prompts, that differ in it alone.

    Behind the phrase they end alike; of the blank one it is the token before, or the first where there is none.
    ValueError for a prompt that fills its text encoder, which cuts off what is over.
    """
    given = [one.encoded[part] for one in prompts]
    for prompt, one in zip(prompts, given, strict=True):
        padded = len({len(other.ids) for other in given}) == 1 and len({other.real for other in given}) > 1
        # at most one token is free: a padding token that is also the end token (CLIP) hides that one
        if padded and one.real[1] - one.real[0] >= len(one.ids) - 1:
            raise ValueError(
                f"{prompt.text[:60]!r} fills all {len(one.ids)} tokens of {part}, which cuts off the rest: shorten it"
            )
    real = [one.ids[slice(*one.real)] for one in given]
    behind = min((_common_end(a, b) for i, a in enumerate(real) for b in real[:i] if a != b), default=0)
    return [max(one.real[1] - behind - 1, one.real[0]) for one in given]


def _common_end(a: Sequence[int], b: Sequence[int]) -> int:
    same = 0
    while same < min(len(a), len(b)) and a[-1 - same] == b[-1 - same]:
        same += 1
    return same


def _span(entry: TextEntry, prompt: Prompt, part: str, token: int) -> tuple[int, int] | None:
    """From the row of a token to the last row of its text encoder, None where the token has none."""
    rows, one = prompt.before[entry.space], prompt.encoded[part]
    for states in one.states:
        width = states.shape[-1]
        if width <= rows.shape[-1]:
            same = (rows[:, :width] == states[token].to(rows)).all(-1).nonzero()
            if len(same):
                row = int(same[0])
                return row, min(len(rows), row + len(one.ids) - token)
    return None
