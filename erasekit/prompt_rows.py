"""The rows that text entries read for a prompt, and which of them belong to a phrase in it.

The pipeline makes them: it is called with the prompt until its denoiser has read the text, so that templates, several
text encoders, padding and masks are as in a picture. Token positions are found by comparing ids: prompts that differ in
one phrase begin alike before it and end alike behind it. Which row is which token is found by its content, the hidden
state of the text encoder.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from erasekit import pipelines
from erasekit.closed_form import ContextMap, Rows, condensed, residuals
from erasekit.concepts import content_ids, fill, slot_token
from erasekit.edits import Edit
from erasekit.layers import cross_attention_kv, uncompiled
from erasekit.models import PARTS, DiffusionModel
from erasekit.text_entries import Enough, TextEntry, call_pipeline, leaves, spaces, text_entries


@dataclass(frozen=True, eq=False)
class Encoded:
    """What one text encoder was given for a prompt, and what it gave.

    ids: (length), with special tokens, template and padding. real: first position and one past the last that are no
    padding. ends: positions of end tokens; of those that are also padding, the first alone. states: hidden states, each
    (length, width).
    """

    ids: tuple[int, ...]
    real: tuple[int, int]
    ends: tuple[int, ...]
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
    tokenizer = _tokenizer(model, part)
    padding, end = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("pad", "eos"))
    masked = mask is not None and mask.shape == ids.shape
    if masked:
        real = [i for i, one in enumerate(mask[0].tolist()) if one]
    else:
        real = [i for i, one in enumerate(row) if one != padding]
    start, stop = (real[0], real[-1] + 1) if real else (0, 0)
    ends = tuple(i for i in range(start, min(stop + (not masked), len(row))) if row[i] == end)
    found = [one for _, one in leaves(output) if one.ndim == 3 and one.shape[:2] == ids.shape]
    return Encoded(tuple(row), (start, stop), ends, tuple(one[0] for one in found))


def reader(model: DiffusionModel) -> Callable[[str], Prompt]:
    """A look-up text -> `Prompt` of all the model's text entries; every distinct text is read once. ValueError for one
    that a text encoder or the pipeline cuts off.
    """
    known, entries = {}, text_entries(model)

    def prompt(text: str) -> Prompt:
        if text not in known:
            one = read(model, entries, text)
            if text and any(map(_full, one.encoded.values())):
                _check_whole(model, one, prompt(""))
            known[text] = one
        return known[text]

    return prompt


def _taken(one: Encoded) -> int:
    """The number of tokens that are no padding, the end token among them where padding repeats it."""
    return max(one.real[1], *(i + 1 for i in one.ends), 0) - one.real[0]


def _full(one: Encoded) -> bool:
    return _taken(one) == len(one.ids)


def _check_whole(model: DiffusionModel, prompt: Prompt, blank: Prompt) -> None:
    """ValueError where a prompt is cut off. blank: "", of which a text encoder is given what is added to every prompt.

    Of an encoder whose prompts are not padded the limit is what the pipeline takes of its rows (Qwen-Image).
    """
    longest = pipelines.known(model.pipeline.__call__).get("max_sequence_length")
    for part, one in prompt.encoded.items():
        if not _full(one):
            continue
        tokenizer, none = _tokenizer(model, part), blank.encoded[part]
        count = len(content_ids(getattr(tokenizer, "tokenizer", tokenizer), prompt.text))  # of a processor
        limit = len(one.ids) - _taken(none)
        if _full(none):
            limit = len(one.ids) if longest is None or longest.default is None else longest.default
        if count > limit:
            raise ValueError(
                f"{part} takes {limit} tokens and cuts off the rest, and there are {count}: shorten "
                f"{prompt.text[:60]!r}"
            )


def _tokenizer(model: DiffusionModel, part: str):
    return getattr(model.pipeline, part.replace("text_encoder", "tokenizer"))


def solved(
    model: DiffusionModel,
    found: Mapping[int, Rows],
    solve: Callable[[Rows], ContextMap],
    callback: Callable[[dict], None] | None,
    step: int,
    **metadata,
) -> Edit:
    """The text_maps Edit of the maps that `solve` gives for the rows {space: rows} of each space.

    callback: once for each space, with step, `entry`, its first layer, rank, and what `closed_form.residuals` says.
    """
    maps = {space: solve(given) for space, given in found.items()}
    edit = Edit.from_text_maps(maps, text_entries(model), model, **metadata)
    for (name, small), (space, given) in zip(edit.maps.items(), found.items(), strict=True):
        if callback is not None:
            state = {"step": step, "entry": name, "rank": small.rank}
            callback({**state, **residuals(maps[space], given)})
    return edit


def keys_and_values(
    model: DiffusionModel, stage: Edit, edited: DiffusionModel
) -> tuple[ContextMap, dict[str, Tensor]]:
    """Of a text_maps edit of SDXL, after which a method trains: the map of what keys and values read, and what it adds
    to the other weights that read text, {"unet.…weight": delta} in half precision. edited: the model with it.
    """
    attention = {f"unet.{name}" for name in cross_attention_kv(model.unet)}
    weights = {name: set(entry["weights"]) for name, entry in stage.metadata["entries"].items()}
    (first,) = (one for name, one in stage.maps.items() if weights[name] & attention)
    others = [name.removeprefix("unet.") for name in sorted(set().union(*weights.values()) - attention)]
    was, now = (one.unet.get_parameter for one in (model, edited))
    return first, {f"unet.{name}": (now(name) - was(name)).detach().half() for name in others}


def preserved(
    model: DiffusionModel, prompt: Callable[[str], Prompt], texts: Sequence[str]
) -> dict[int, Tensor]:
    """{space: all rows of these prompts}, as few as say the same to a closed form (`closed_form.condensed`)."""
    return {
        space: condensed(torch.cat([prompt(text).rows[space] for text in texts])) for space in spaces(model)
    }


Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Places:
    """Rows of two prompts that differ in a phrase, of one text encoder: each field a list for either prompt.

    beside: tokens that both share, paired: their common beginning and end, and the padding that follows. phrase: those
    of the phrase, in order; of a blank one the token before it. start: the first token. end: the first end token behind
    the phrase, or the last token of an encoder that has none. last: the last row.
    """

    beside: Pair
    phrase: Pair
    start: Pair
    end: Pair
    last: Pair


def places(entry: TextEntry, old: Prompt, new: Prompt, blank: Prompt) -> list[Places]:
    """Where the tokens of two prompts stand among the rows that the entry reads, for each text encoder it reads.

    blank: the prompt without the phrase. A pooled row is the projection of an end token: it is `end` and `last`, and
    one of those beside. ValueError where the entry reads no token of either.
    """
    if entry.pooled:
        only, none = ([0], [0]), ([], [])
        return [Places(beside=only, phrase=none, start=none, end=only, last=only)]
    found = []
    for part in old.encoded:
        both = old.encoded[part], new.encoded[part]
        rows = [_located(entry, prompt, part) for prompt in (old, new)]
        if not all(rows):
            continue
        pick = lambda positions, rows=rows: tuple(
            [where[i] for i in chosen if i in where] for chosen, where in zip(positions, rows, strict=True)
        )
        real = [one.ids[slice(*one.real)] for one in both]
        before = _common_start(*real)
        behind = min(_common_end(*real), min(map(len, real)) - before)
        follow = min(len(one.ids) - one.real[1] for one in both)
        shared = [
            [*range(one.real[0], one.real[0] + before), *range(one.real[1] - behind, one.real[1] + follow)]
            for one in both
        ]
        kept = [
            (rows[0][i], rows[1][j]) for i, j in zip(*shared, strict=True) if i in rows[0] and j in rows[1]
        ]
        spans = _spans(part, old, new, blank)
        ends = [
            [next((i for i in one.ends if i >= span[-1]), one.real[1] - 1)]
            for one, span in zip(both, spans, strict=True)
        ]
        found.append(
            Places(
                beside=([i for i, _ in kept], [j for _, j in kept]),
                phrase=pick(spans),
                start=pick([[one.real[0]] for one in both]),
                end=pick(ends),
                last=tuple([max(where.values())] for where in rows),
            )
        )
    if not found:
        raise ValueError(
            f"none of the rows that {entry.layer} reads for {old.text!r} is one of its tokens: the pipeline changes "
            "them on the way, so this method does not know which to move; erase by uce with tokens='all'"
        )
    return found


def _spans(part: str, old: Prompt, new: Prompt, blank: Prompt) -> list[list[int]]:
    """Positions of the phrase in both prompts; where it is blank, of the token before it."""
    given = [one.encoded[part] for one in (old, new, blank)]
    real = [one.ids[slice(*one.real)] for one in given]
    before = min(_common_start(a, b) for i, a in enumerate(real) for b in real[:i] if a != b)
    stops = [end + 1 for end in _ends(part, old, new, blank)]
    starts = [one.real[0] + before for one in given]
    return [
        [*range(start, stop)] or [max(start - 1, 0)]
        for start, stop in zip(starts[:2], stops[:2], strict=True)
    ]


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
    """
    given = [one.encoded[part] for one in prompts]
    real = [one.ids[slice(*one.real)] for one in given]
    behind = min((_common_end(a, b) for i, a in enumerate(real) for b in real[:i] if a != b), default=0)
    return [max(one.real[1] - behind - 1, one.real[0]) for one in given]


def _common_end(a: Sequence[int], b: Sequence[int]) -> int:
    same = 0
    while same < min(len(a), len(b)) and a[-1 - same] == b[-1 - same]:
        same += 1
    return same


def _common_start(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _span(entry: TextEntry, prompt: Prompt, part: str, token: int) -> tuple[int, int] | None:
    """From the row of a token to the last row of its text encoder, None where the token has none."""
    row = _located(entry, prompt, part).get(token)
    if row is None:
        return None
    return row, min(len(prompt.before[entry.space]), row + len(prompt.encoded[part].ids) - token)


def _located(entry: TextEntry, prompt: Prompt, part: str) -> dict[int, int]:
    """{position of a token: its row}: rows that begin with a hidden state of the text encoder, in order."""
    rows, found = prompt.before[entry.space], {}
    for states in prompt.encoded[part].states:
        width = states.shape[-1]
        if found or width > rows.shape[-1]:
            continue
        free: dict[bytes, list[int]] = {}
        for i, content in enumerate(_contents(rows[:, :width])):
            free.setdefault(content, []).append(i)
        for position, content in enumerate(_contents(states.to(rows))):
            if free.get(content):
                found[position] = free[content].pop(0)
    return found


def _contents(rows: Tensor) -> list[bytes]:
    return [row.tobytes() for row in rows.contiguous().view(torch.uint8).cpu().numpy()]


Tokens = Literal["last_subject", "last_to_end", "all"]


def slot_rows(
    model: DiffusionModel,
    pairs: Sequence[tuple[str, str, str]],
    keep: Sequence[tuple[str, str]],
    tokens: Tokens = "last_subject",
    preserve_tokens: Tokens = "last_subject",
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Of Stable Diffusion 1 and 2, sources and targets (n, d) of (template, phrase, anchor), and for each (template,
    phrase) the rows that are kept, float64; the tokens as in `paired`. Every distinct prompt is encoded once.
    """
    embed = _embedder(model, [(t, phrase) for t, *both in pairs for phrase in both] + [*keep])
    paired = [_paired_slots(model.tokenizer, embed, *pair, tokens) for pair in pairs]
    sources, targets = (torch.cat(side) for side in zip(*paired, strict=True))
    return sources, targets, [_slot(model.tokenizer, embed, *slot, preserve_tokens) for slot in keep]


def _embedder(model: DiffusionModel, slots: Sequence[tuple[str, str]]) -> Callable[[str, str], Tensor]:
    """A look-up (template, phrase) -> (length, d) float64; every distinct prompt is encoded once."""
    prompts = list(dict.fromkeys(fill(*slot)[0] for slot in slots))
    table = dict(zip(prompts, model.encode(prompts).double(), strict=True))
    return lambda template, phrase: table[fill(template, phrase)[0]]


def _paired_slots(
    tokenizer, embed, template: str, phrase: str, anchor: str, tokens: Tokens
) -> tuple[Tensor, Tensor]:
    """Source and target rows, (n, d) each, of one template with the concept and with its anchor."""
    old, new = (
        _slot(tokenizer, embed, template, phrase, tokens),
        _slot(tokenizer, embed, template, anchor, tokens),
    )
    count = min(len(old), len(new))  # the rows start at the aligned token; what differs is how many follow
    return old[:count], new[:count]


def _slot(tokenizer, embed, template: str, phrase: str, tokens: Tokens) -> Tensor:
    block = embed(template, phrase)
    if tokens == "all":
        return block
    start = slot_token(tokenizer, template, phrase)
    return block[start : start + 1] if tokens == "last_subject" else block[start:]
