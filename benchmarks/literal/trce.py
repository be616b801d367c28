"""Stage 2 of TRCE as its authors' code runs it: every prediction by itself, also those of models that never change.

Loss (Chen et al., ICCV 2025, arXiv 2503.07389; the text was not to be had, its form is from the authors' pages):

    L = max(||eps(z) - f(c^s)||^2 - ||eps(z) - f(c^m)||^2 + delta, 0) + lambda ||eps(z^u, 0) - eps_1(z^u, 0)||^2

From the authors' code at 0da9b71, by facts noted in reading it and in none of its words (it has no licence): squared
norms are means over a latent; f(c) = e(c) + g (e(c) - e(0)); the hinge of the conditional and of the unconditional
prediction, half each; four preserved latents, one after the other, with 0.01 added to their sum; whole ways kept; every
step's latent kept with the time step that it was made at, one before its own (`slips`, and of the preserved latents
`calm_slips`); gradients that are never cleared (`slips`); AdamW with weight decay 0.01.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from literal.esd import predict
from torch import Tensor, nn

Way = list[
    tuple[Tensor, Tensor, Tensor]
]  # of each step the latent before it, the one after it, and the time step
# a way and its step; for each preserved latent a way, its step, and a time step within the step's stretch
Pick = tuple[int, int, list[tuple[int, int, int]]]


@torch.no_grad()
def way(
    unet: nn.Module, scheduler, text: Tensor, empty: Tensor, noise: Tensor, steps: int, guidance: float
) -> Way:
    """All steps of DDIM from noise (1, channels, height, width), both halves of guidance also where they are equal."""
    scheduler.set_timesteps(steps)
    x, both, found = noise.to(unet.device, unet.dtype), torch.cat([empty, text]), []
    for t in scheduler.timesteps:
        uncond, told = predict(unet, torch.cat([x, x]), t, both).chunk(2)
        after = scheduler.step(uncond + guidance * (told - uncond), t, x).prev_sample
        found.append((x, after, t.to(unet.device)))
        x = after
    return found


def train(
    unet: nn.Module,
    original: nn.Module,
    held: nn.Module,
    texts: Sequence[tuple[Tensor, Tensor]],
    empty: Tensor,
    ways: Sequence[Way],
    calm: Sequence[Way],
    picks: Iterable[Pick],
    parameters: Sequence[nn.Parameter],
    *,
    g: float = 15.0,
    margin: float = 0.01,
    weight: float = 100.0,
    lr: float = 1e-6,
    slips: bool = True,
    calm_slips: bool = True,
    branches: str = "both",
    train_steps: int = 1000,
) -> Iterator[float]:
    """The loss of each update, after it; `unet`, the model after stage 1, is trained in place.

    original: before stage 1, of the directions; held: what the unconditional prediction is held to, a copy of the model
    after stage 1. texts: embeddings (1, length, d) of c^m and c^s for each way. ways, calm: to malicious pictures and
    to unconditional ones. branches: "text" for the hinge of the conditional prediction alone. train_steps: time steps
    of the noise schedule.
    """
    mse = nn.functional.mse_loss
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    for which, step, others in picks:
        before, after, t = ways[which][step]
        z, (malicious, safe) = after if slips else before, texts[which]
        with torch.no_grad():
            e_m, e_s, e_0 = (predict(original, z, t, text) for text in (malicious, safe, empty))
            f_u, f_s = e_m + g * (e_m - e_0), e_s + g * (e_s - e_0)
        hinge = lambda x, f_s=f_s, f_u=f_u: (mse(x, f_s) - mse(x, f_u) + margin).relu()
        told = [malicious, empty] if branches == "both" else [malicious]
        erase = sum(hinge(predict(unet, z, t, text)) for text in told) / len(told)
        keep = 0.01
        for row, at, offset in others:
            before, after, t = calm[row][at]
            stretch = train_steps // len(calm[row])
            u, t = (after, t - t % stretch + offset) if calm_slips else (before, t)
            with torch.no_grad():
                wanted = predict(held, u, t, empty)
            keep = keep + mse(predict(unet, u, t, empty), wanted)
        loss = erase + weight * keep / len(others)
        if not slips:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
