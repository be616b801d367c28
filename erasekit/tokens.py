"""Prompts with free places: token ids and embeddings that a search or a training fills."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from erasekit.concepts import content_ids, token_ids
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


def embed(text_encoder: nn.Module, ids: Tensor, free: Tensor, rows: Tensor) -> Tensor:
    """Text embeddings (n, length, d) of ids whose free tokens have the embeddings `rows` (number of free, d), in order.

    Gradients reach `rows` and the encoder's layers, never its embedding table.
    """
    ids = ids.to(text_encoder.device)
    with filled(text_encoder, ids, free, rows):
        return text_encoder(ids)[0]


@contextmanager
def filled(text_encoder: nn.Module, ids: Tensor, free: Tensor, rows: Tensor) -> Iterator[None]:
    """Inside the block the text encoder, called with `ids`, finds `rows` at the free tokens, as in `embed`."""
    table = token_table(text_encoder)
    fixed = table[ids.to(table.device)].float()
    with embedded_as(
        text_encoder, ids, fixed.masked_scatter(free.to(table.device).unsqueeze(-1), rows.float())
    ):
        yield


def vocabulary(tokenizer, stable: bool = True, blocked: Sequence[str] = ()) -> Tensor:
    """Ids that a token search may use: no special tokens; with `stable` only those that are their own tokenisation
    once they are text; none whose text holds one of the `blocked` words.
    """
    special = set(tokenizer.all_special_ids)
    found = []
    for token in range(len(tokenizer)):
        if token in special:
            continue
        text = tokenizer.decode([token]).strip()
        if any(word.lower() in text.lower() for word in blocked):
            continue
        if not stable or (text and content_ids(tokenizer, text) == [token]):
            found.append(token)
    if not found:
        raise ValueError("no token is left to search with: block less")
    return torch.tensor(found)


def as_text(tokenizer, ids: Sequence[int]) -> str:
    """What the ids read as."""
    return " ".join(tokenizer.decode(list(ids)).split())


def fits(tokenizer, text: str) -> bool:
    """Whether the text can be given to the model as it is."""
    try:
        token_ids(tokenizer, [text])
    except ValueError:
        return False
    return bool(text.strip())
