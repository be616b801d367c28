"""The referee of the emoji world: a small network that says which object and which style a picture shows.

It is trained on real, augmented emoji alone, never on a generated picture, and no method or attack sees it.
"""

import hashlib
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from PIL.Image import Image
from safetensors.torch import load
from torch import Tensor, nn

from erasekit.emoji import data
from erasekit.emoji.clip import to_tensor
from erasekit.paths import EMOJI_JUDGE


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first(F.silu(self.norms[0](x)))
        return x + self.second(F.silu(self.norms[1](inner)))


class Judge(nn.Module):
    """Pictures (n, 3, 64, 64) in [-1, 1] to logits of the objects (n, concepts) and of the styles (n, 5)."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 160)):
        super().__init__()
        stages, before = [nn.Conv2d(3, widths[0], 3, stride=2, padding=1)], widths[0]
        for width in widths[1:]:
            stages += [_Residual(before), nn.Conv2d(before, width, 3, stride=2, padding=1)]
            before = width
        self.body = nn.Sequential(*stages, _Residual(before), nn.GroupNorm(8, before), nn.SiLU())
        self.object = nn.Linear(
            before * 16, len(data.concepts())
        )  # on a 4 x 4 grid: where things are matters
        self.style = nn.Linear(2 * before, len(data.STYLES))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(pictures)
        statistics = torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
        return self.object(features.flatten(1)), self.style(statistics)


@cache
def _judge() -> Judge:
    judge = Judge()
    judge.load_state_dict(load(data.verified(EMOJI_JUDGE.name)))
    return judge.float().eval()


@cache
def fingerprint() -> str:
    """SHA-256 of the judge's weights: verdicts of two judges are never mixed."""
    return hashlib.sha256(EMOJI_JUDGE.read_bytes()).hexdigest()


@torch.no_grad()
def probabilities(pictures: Tensor | Sequence[Image], batch_size: int = 128) -> tuple[Tensor, Tensor]:
    """Softmax over objects (n, concepts, in the order of `data.concepts()`) and over styles (n, 5)."""
    x = pictures if isinstance(pictures, Tensor) else to_tensor(pictures)
    if x.shape[1:] != (3, 64, 64):
        raise ValueError(f"the emoji judge looks at pictures (3, 64, 64), got {tuple(x.shape[1:])}")
    logits = [_judge()(part) for part in x.split(batch_size)]
    return tuple(torch.cat(side).softmax(1) for side in zip(*logits, strict=True))
