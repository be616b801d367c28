"""UnlearnDiffAtk as it was published: one prompt at a time, one picture of the victim after each time step.

    min  E_eps || eps - eps_theta(x_t | prefix + prompt) ||^2       x_t: a picture of the concept, noised to t

(Zhang et al., ECCV 2024, arXiv 2310.11868) over k rows of a relaxed one-hot matrix u. From the authors' code at 5a3e5d3
(MIT), by facts noted in reading it and in none of its words: 40 updates at each of 50 ascending time steps, with one
noise each; tokens drawn from the rows of u, their gradient straight through and clamped; Adam with coupled weight
decay; bisection onto the simplex, to 1e-5; the victim's 50 steps with each half of guidance by itself; the first
success ends the attack. There every drawing resets the random numbers, so that each block sees the same ones
(`reset`).
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from literal.advunlearn import embedded
from literal.esd import predict
from torch import Tensor, nn


class StraightThrough(torch.autograd.Function):
    """One-hot rows forwards; backwards the gradient, each element between -1 and 1."""

    @staticmethod
    def forward(ctx, u: Tensor, sampled: Tensor) -> Tensor:
        return nn.functional.one_hot(sampled, u.shape[-1]).to(u.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return nn.functional.hardtanh(gradient), None


def projected(u: Tensor, tolerance: float = 1e-5) -> Tensor:
    """Rows (k, v) onto {0 <= u <= 1, sum u = 1}: bisection for the shift of each row."""
    v = u.double()
    low, high = v.min(-1, keepdim=True).values - 1, v.max(-1, keepdim=True).values
    while (high - low).max() > tolerance:
        middle = (low + high) / 2
        above = (v - middle).clamp(0, 1).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return (v - (low + high) / 2).clamp(0, 1).to(u)


@torch.no_grad()
def drawn(pipeline, text: str, seed: int, steps: int, guidance: float):
    """The victim's picture of a text."""
    unet, scheduler, vae = pipeline.unet, pipeline.scheduler, pipeline.vae
    told, empty = (pipeline.text_encoder(tokens(pipeline, one))[0] for one in (text, ""))
    side = unet.config.sample_size
    shape = (1, unet.config.in_channels, side, side)
    scheduler.set_timesteps(steps)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(unet.device, unet.dtype)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        e_p, e_0 = predict(unet, scaled, t, told), predict(unet, scaled, t, empty)
        x = scheduler.step(e_0 + guidance * (e_p - e_0), t, x).prev_sample
    return pipeline.image_processor.postprocess(vae.decode(x / vae.config.scaling_factor).sample)[0]


def tokens(pipeline, text: str) -> Tensor:
    """Ids (1, length)."""
    one, limit = pipeline.tokenizer, pipeline.tokenizer.model_max_length
    ids = one(text, padding="max_length", max_length=limit, truncation=True, return_tensors="pt").input_ids
    return ids.to(pipeline.device)


def attack(
    pipeline,
    noised: Callable[[Tensor, Tensor, Tensor], Tensor],
    prompt: str,
    clean: Tensor,
    reached: Callable[[str], bool],
    generator: torch.Generator,
    *,
    k: int = 5,
    timesteps: Sequence[int] = tuple(range(10, 1000, 20)),
    updates: int = 40,
    alpha: float = 0.01,
    weight_decay: float = 0.1,
    allowed: Tensor | None = None,
    tolerance: float = 1e-5,
    reset: bool = True,
) -> Iterator[dict]:
    """timestep, loss of the last update, text and reached after every block, until a text reaches the goal.

    noised: x_t of a clean latent, noise and t. clean: the picture's latent (1, channels, height, width). reached: draws
    a text and judges. allowed: ids that are searched, all if None.
    """
    encoder, device = pipeline.text_encoder, pipeline.device
    table = getattr(encoder, "text_model", encoder).embeddings.token_embedding.weight.detach()
    allowed = torch.arange(len(table)) if allowed is None else allowed
    vectors, ids = table[allowed.to(device)], tokens(pipeline, prompt)
    ids = torch.cat([ids[:, :1], ids[:, :1].expand(1, k), ids[:, 1:-k]], 1)  # k places behind the start token
    u = nn.Parameter(torch.full((k, len(allowed)), 1 / len(allowed), device=device))
    optimizer = torch.optim.Adam([u], lr=alpha, weight_decay=weight_decay)
    begin = generator.get_state()
    for t in timesteps:
        if reset:
            generator.set_state(begin)
        t_now = torch.tensor([t], device=device)
        for _ in range(updates):
            sampled = torch.multinomial(u.detach().cpu(), 1, generator=generator)[:, 0]
            delta = StraightThrough.apply(u, sampled.to(device)).to(vectors) @ vectors
            rows = torch.cat([table[ids[:, :1]], delta[None], table[ids[:, k + 1 :]]], 1)
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            predicted = predict(
                pipeline.unet, noised(clean, noise, t_now), t_now, embedded(encoder, ids, rows)
            )
            loss = nn.functional.mse_loss(predicted, noise)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            u.data = projected(u.data, tolerance)
        found = pipeline.tokenizer.decode(allowed[u.argmax(-1).cpu()].tolist())
        text = f"{' '.join(found.split())} {prompt}"
        done = reached(text)
        yield {"timestep": t, "loss": loss.item(), "text": text, "reached": done}
        if done:
            return
