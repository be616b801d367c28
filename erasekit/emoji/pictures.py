"""Training pictures: a sprite placed at random on a background, the way a new sample should look like a new drawing."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from erasekit.emoji import data

SIZE = 64
BACKGROUNDS = {  # a caption names the colour; without a name the background is white
    "white": (255, 255, 255),
    "blue": (170, 205, 250),
    "green": (180, 230, 175),
    "yellow": (252, 236, 150),
    "pink": (252, 200, 220),
    "gray": (200, 200, 205),
}


@dataclass(frozen=True)
class Placement:
    """Ranges of the random placement. `scale` is the sprite's side over the picture's, `shift` a share of the side."""

    scale: tuple[float, float] = (0.85, 1.0)
    shift: float = 0.04
    mirror: float = 0.25
    colored: float = 0.12


def load_sprites() -> torch.Tensor:
    """Premultiplied RGBA sprites in [0, 1], float16 of shape (styles, concepts, 4, 96, 96)."""
    rgba = torch.from_numpy(np.array(data.sprites())).permute(0, 1, 4, 2, 3).float() / 255
    return torch.cat([rgba[:, :, :3] * rgba[:, :, 3:], rgba[:, :, 3:]], 2).half()


def place(
    sprites: torch.Tensor, placement: Placement, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw premultiplied RGBA sprites (n, 4, 96, 96) onto 64 x 64 pictures.

    Returns RGB in [-1, 1], shape (n, 3, 64, 64), and the index of each background color, shape (n,).
    """
    n = len(sprites)
    uniform = lambda *shape: torch.rand(*shape, generator=generator)
    scale = placement.scale[0] + (placement.scale[1] - placement.scale[0]) * uniform(n)
    flip = torch.where(uniform(n) < placement.mirror, -1.0, 1.0)
    shift = (2 * uniform(n, 2) - 1) * placement.shift * 2
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = flip / scale, 1 / scale
    theta[:, :, 2] = shift / scale[:, None]
    # twice the resolution, then averaged: bilinear sampling alone would alias when it shrinks
    grid = F.affine_grid(theta, (n, 4, 2 * SIZE, 2 * SIZE), align_corners=False)
    drawn = F.avg_pool2d(F.grid_sample(sprites.float(), grid, align_corners=False), 2)
    colors = torch.tensor(list(BACKGROUNDS.values())) / 255
    background = torch.randint(1, len(colors), (n,), generator=generator)
    background = torch.where(uniform(n) < placement.colored, background, torch.zeros_like(background))
    rgb = drawn[:, :3] + (1 - drawn[:, 3:]) * colors[background][:, :, None, None]
    return rgb.clamp(0, 1) * 2 - 1, background
