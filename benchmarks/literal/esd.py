"""ESD's training loop as it was published: one prompt, one x_t drawn anew, one update at a time.

Objective and target are the paper's (Gandikota et al., ICCV 2023, arXiv 2303.07345):

    y(x_t) = eps*(x_t, 0) - eta ( eps*(x_t, c) - eps*(x_t, 0) ),  min_theta  E ||eps_theta(x_t, c) - y(x_t)||^2

From the authors' code of 2023, by facts noted in reading it and in none of its words: batch 1; x_t by DDIM from noise,
with guidance, of the UNet in training, anew for every update; the noise level that lags behind the time step that the
UNet is told (`lag`); both halves of guidance in one call, the two predictions of the target in two; Adam. From that of
2025: another prompt c than the one whose pictures x_t belong to (`concept`), and x_t of the frozen UNet.

What is random comes from outside, so that another implementation can be given the same.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

Draw = tuple[
    Tensor, int, int
]  # noise (1, channels, height, width), node e, and a time step within the node's stretch


def predict(unet: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """eps(x_t, c) for latents (n, channels, height, width) and embeddings (n, length, d)."""
    return unet(x, t, encoder_hidden_states=text).sample


def draws(
    shape: Sequence[int], steps: int, generator: torch.Generator, train_steps: int = 1000
) -> Iterator[Draw]:
    """Draws without an end, on the CPU. shape: of one latent, (channels, height, width)."""
    number = lambda high: int(torch.randint(high, (), generator=generator))
    while True:
        yield torch.randn((1, *shape), generator=generator), number(steps), number(train_steps // steps)


@torch.no_grad()
def partly_drawn(
    unet: nn.Module,
    scheduler,
    text: Tensor,
    empty: Tensor,
    draw: Draw,
    steps: int,
    guidance: float,
    lag: bool,
) -> tuple[Tensor, Tensor]:
    """x_t (n, channels, height, width), by the sampler from noise to node e, and the time step that goes with it.

    lag: the sampler leaves out its first step and ends with node e - 1, whose result lies at e - 2 (for e < 2 it is the
    finished picture); the time step is any of the stretch that begins at e.
    """
    x, e, offset = draw
    scheduler.set_timesteps(steps)
    down = scheduler.timesteps[1:] if lag else scheduler.timesteps  # the last one is node 0
    left = max(e - 1, 0) if lag else e + 1  # nodes that are not visited
    x, both = x.to(unet.device, unet.dtype), torch.cat([empty, text])
    for t in down[: len(down) - left]:
        uncond, told = predict(unet, torch.cat([x, x]), t, both).chunk(2)
        x = scheduler.step(uncond + guidance * (told - uncond), t, x).prev_sample
    stretch = scheduler.config.num_train_timesteps // steps
    t = torch.tensor(stretch * e + offset) if lag else scheduler.timesteps[steps - 1 - e]
    return x, t.to(unet.device)


def train(
    unet: nn.Module,
    frozen: nn.Module,
    scheduler,
    text: Tensor,
    empty: Tensor,
    draws: Iterable[Draw],
    parameters: Sequence[nn.Parameter],
    *,
    lr: float = 1e-5,
    eta: float = 1.0,
    guidance: float = 3.0,
    steps: int = 50,
    lag: bool = True,
    walker: nn.Module | None = None,
    concept: Tensor | None = None,
) -> Iterator[float]:
    """The loss of each update, after it; `unet` is trained in place, one update for each draw.

    scheduler: DDIM. text, empty: embeddings (1, length, d) of the prompt and of no prompt. walker: the UNet that draws
    x_t, the one in training if None. concept: embeddings of c, where `text` is another prompt's.
    """
    concept = text if concept is None else concept
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for draw in draws:
        x, t = partly_drawn(
            unet if walker is None else walker, scheduler, text, empty, draw, steps, guidance, lag
        )
        with torch.no_grad():
            e_0, e_p = predict(frozen, x, t, empty), predict(frozen, x, t, concept)
            e_f = e_p if concept is text else predict(frozen, x, t, text)
            y = e_f - (eta + 1) * (e_p - e_0)  # with f = c it is e_0 - eta (e_p - e_0)
        loss = nn.functional.mse_loss(predict(unet, x, t, text), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
