"""What a UNet is told of a prompt, and its call: the one place that knows what SDXL reads beside the embeddings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Of n prompts: rows (n, length, d), which cross-attention reads, and of SDXL pooled (n, p), which is added to the
    time embedding, with the pixels of one latent that its size is told in; None and 1 where there is no such thing.
    """

    rows: Tensor
    pooled: Tensor | None = None
    scale: int = 1

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at) -> "Conditioning":
        """Of these prompts: a slice, a mask or indices, on any device."""
        at = at.to(self.rows.device) if isinstance(at, Tensor) else at
        return self.each(lambda one: one[at])

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """rows, and pooled where there is such a thing."""
        return (self.rows,) if self.pooled is None else (self.rows, self.pooled)

    def each(self, change: Callable[..., Tensor], *others: "Conditioning") -> "Conditioning":
        """The same with `change` of both tensors, which is given those of the others as well."""
        rows, pooled = [*map(change, self.parts, *(one.parts for one in others)), None][:2]
        return Conditioning(rows, pooled, self.scale)

    def times(self, count: int) -> "Conditioning":
        """One prompt, count times."""
        return self.each(lambda one: one.expand(count, *one.shape[1:]))

    def with_rows(self, rows: Tensor) -> "Conditioning":
        """These rows (m n, length, d), m in turn for each prompt, and what else is told of it."""
        count = len(rows) // len(self)
        pooled = None if self.pooled is None else self.pooled.repeat_interleave(count, 0)
        return Conditioning(rows, pooled, self.scale)


def joined(parts: Sequence[Conditioning]) -> Conditioning:
    """The prompts of all parts, one after the other."""
    pooled = None if parts[0].pooled is None else torch.cat([one.pooled for one in parts])
    return Conditioning(torch.cat([one.rows for one in parts]), pooled, parts[0].scale)


def told(encoders: Sequence[nn.Module], ids: Sequence[Tensor], scale: int) -> Conditioning:
    """What CLIP text encoders say of token ids (n, length), one for each; with gradient where there is one.

    Of Stable Diffusion 1 and 2 the last hidden state. The last encoder of SDXL has a projection: then the hidden states
    before the last layer, side by side, and its projected end token.
    """
    if not hasattr(encoders[-1], "text_projection"):
        return Conditioning(encoders[0](ids[0])[0])
    out = [encoder(one, output_hidden_states=True) for encoder, one in zip(encoders, ids, strict=True)]
    return Conditioning(torch.cat([one.hidden_states[-2] for one in out], -1), out[-1].text_embeds, scale)


def predict(unet: nn.Module, sample: Tensor, timestep: Tensor | int, text: Conditioning) -> Tensor:
    """What the UNet predicts (n, channels, height, width) for latents of that shape at timestep (n,), or one for all.

    SDXL is told that the picture has the size of the latents and was not cropped, as its pipeline tells it.
    """
    beside = {}
    if text.pooled is not None:
        height, width = (side * text.scale for side in sample.shape[-2:])
        sizes = torch.tensor([[height, width, 0, 0, height, width]]).to(text.pooled)
        beside["added_cond_kwargs"] = {
            "text_embeds": text.pooled,
            "time_ids": sizes.expand(len(sample), -1),
        }
    return unet(sample, timestep, encoder_hidden_states=text.rows, return_dict=False, **beside)[0]
