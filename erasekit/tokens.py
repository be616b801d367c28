"""Prompts with free places: token ids and embeddings that a search or a training fills."""

import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from erasekit.concepts import content_ids, token_ids
from erasekit.conditioning import Conditioning, told
from erasekit.layers import embedded_as, token_table


def layout(tokenizer, contents: Sequence[Sequence[int | None]]) -> tuple[Tensor, Tensor]:
    """Token ids (n, length) of contents between start and end token, and the mask (n, length) of the free ones (None).

    ValueError when a content is too long: nothing is cut off.
    """
    limit, ids = tokenizer.model_max_length, []
    for content in contents:
        if len(content) + 2 > limit:
            raise ValueError(
                f"{len(content)} tokens with the adversarial ones, the limit is {limit - 2} (plus start and end): "
                "use a shorter prompt or fewer tokens"
            )
        row = [tokenizer.bos_token_id, *content, tokenizer.eos_token_id]
        ids.append(row + [tokenizer.pad_token_id] * (limit - len(row)))
    free = torch.tensor([[one is None for one in row] for row in ids])
    return torch.tensor([[0 if one is None else one for one in row] for row in ids]), free


def opened(tokenizer, text: str, phrase: str, count: int) -> list[int | None]:
    """Token ids of the text with `count` free ones (None) in place of the phrase: whole words, in any case. ValueError
    where it is not there, or several times.
    """
    parts = re.split(rf"(?<!\w){re.escape(phrase.strip())}(?!\w)", text, flags=re.IGNORECASE)
    if len(parts) == 1:
        raise ValueError(f"{text!r} does not hold the phrase {phrase!r}")
    if len(parts) > 2:
        raise ValueError(f"{text!r} holds the phrase {phrase!r} {len(parts) - 1} times: write it once")
    before, after = parts
    return [*content_ids(tokenizer, before), *[None] * count, *content_ids(tokenizer, after)]


def token_tables(encoders: Iterable[nn.Module]) -> Tensor:
    """The embedding (vocabulary, d) of every token that all text encoders know, theirs side by side, float32, without a
    gradient. The encoders of SDXL have the same tokens.
    """
    tables = [token_table(one) for one in encoders]
    return torch.cat([one[: min(map(len, tables))] for one in tables], -1).float()


def embed(
    encoders: Sequence[nn.Module], laid: Sequence[tuple[Tensor, Tensor]], rows: Tensor, scale: int
) -> Conditioning:
    """What the text encoders say of token ids whose free tokens have the embeddings `rows` (number of free, d), in
    order, with d as in `token_tables`.

    laid: ids and mask for each encoder, see `layout`. scale: as in `Conditioning`. Gradients reach `rows` and the
    encoders' layers, never their embedding tables.
    """
    tables = [token_table(one) for one in encoders]
    owned = rows.float().split([one.shape[1] for one in tables], -1)
    ids = [one.to(table.device) for (one, _), table in zip(laid, tables, strict=True)]
    with ExitStack() as stack:
        for encoder, table, one, (_, free), own in zip(encoders, tables, ids, laid, owned, strict=True):
            filled = table[one].float().masked_scatter(free.to(table.device).unsqueeze(-1), own)
            stack.enter_context(embedded_as(encoder, one, filled))
        return told(encoders, ids, scale)


def vocabulary(tokenizers: Sequence, stable: bool = True, blocked: Sequence[str] = ()) -> Tensor:
    """Ids that a token search may use: no special tokens; with `stable` only those that are their own tokenisation
    once they are text; none whose text holds one of the `blocked` words. Each must hold for every tokenizer: the second
    one of SDXL pads with "!", which it reads as another token than the first. ValueError where none is left, and for
    `blocked` that is a text.
    """
    if isinstance(blocked, str):
        raise ValueError(f"blocked is a sequence of words, got the text {blocked!r}: give [{blocked!r}]")
    special = {token for one in tokenizers for token in one.all_special_ids}
    found = []
    for token in range(min(map(len, tokenizers))):
        if token in special:
            continue
        text = tokenizers[0].decode([token]).strip()
        if any(word.lower() in text.lower() for word in blocked):
            continue
        if not stable or (text and all(content_ids(one, text) == [token] for one in tokenizers)):
            found.append(token)
    if not found:
        raise ValueError("no token is left to search with: block less")
    return torch.tensor(found)


def as_text(tokenizer, ids: Sequence[int]) -> str:
    """What the ids read as."""
    return " ".join(tokenizer.decode(list(ids)).split())


def fits(tokenizers: Sequence, text: str) -> bool:
    """Whether the text can be given to the model as it is."""
    try:
        for one in tokenizers:
            token_ids(one, [text])
    except ValueError:
        return False
    return bool(text.strip())
