"""AdvUnlearn's training loop as it was published: K steps of attack before every update, each with an x_t of its own.

Objective (Zhang et al., NeurIPS 2024, arXiv 2405.15234, eq. 5 and 6), with y as in ESD:

    upper   ||eps_theta(x_t, c*) - y(x_t)||^2 + gamma mean_c~ ||eps_theta(x~_t, c~) - eps_o(x~_t, c~)||^2
    lower   c* = argmin  ||eps_theta(x_t, c') - eps_o(x_t, c_e)||^2       c': c_e behind k free token embeddings

From the authors' code at 9d23124, by facts noted in reading it and in none of its words: the order of the draws, one
x_t drawn anew for each step of the attack and for the update; the retained prompts in one batch, at the update's time
step; e_0 computed in the attack and not used; Adam on both levels; weights that are not trained keep `requires_grad`,
as loaded. And with `slips` what it does otherwise than the paper says: gradients of the attack added up, its last step
lost, x_t that lags (ESD), and with `sign` a fast variant that goes through Adam. Words counted for tokens are the
caller's, who makes the ids. Without `slips`, each retained prompt has a time step of its own.
"""

from collections.abc import Iterator, Sequence

import torch
from literal.esd import Draw, partly_drawn, predict
from torch import Tensor, nn


def embedded(encoder: nn.Module, ids: Tensor, rows: Tensor) -> Tensor:
    """What a CLIP text encoder says (1, length, d) of ids (1, length) whose token embeddings are `rows`."""
    backbone = getattr(encoder, "text_model", encoder)
    hook = backbone.embeddings.token_embedding.register_forward_hook(lambda *_: rows)
    try:
        return encoder(ids)[0]
    finally:
        hook.remove()


def attacked(
    encoder, unet, frozen, scheduler, ids: Tensor, delta: Tensor, texts: tuple[Tensor, Tensor], draws: Iterator[Draw],
    *, attack_steps: int, alpha: float, sign: bool, slips: bool, **how,
) -> Tensor:  # fmt: skip
    """Token embeddings (1, length, d) of the prompt behind the attack that begins at delta (1, k, d).

    ids: of the prompt behind k places, (1, length). texts: the frozen embeddings of c_e and of no prompt.
    """
    text, empty = texts
    table = getattr(encoder, "text_model", encoder).embeddings.token_embedding.weight.detach()
    k = delta.shape[1]
    prefixed = lambda: torch.cat([table[ids[:, :1]], delta.to(table), table[ids[:, k + 1 :]]], 1)
    delta = nn.Parameter(delta.clone())
    attacker = torch.optim.Adam([delta], lr=alpha)
    rows = prefixed()
    for _ in range(attack_steps):
        x, t = partly_drawn(frozen, scheduler, text, empty, next(draws), lag=slips, **how)
        with torch.no_grad():
            predict(frozen, x, t, empty)  # e_0, which nothing uses
            e_p = predict(frozen, x, t, text)
        rows = prefixed()
        loss = nn.functional.mse_loss(predict(unet, x, t, embedded(encoder, ids, rows)), e_p)
        if not slips:
            attacker.zero_grad()
        loss.backward()
        if sign:
            delta.grad.sign_()
        attacker.step()
    return (rows if slips else prefixed()).detach()


def train(
    encoder: nn.Module,
    unet: nn.Module,
    frozen: nn.Module,
    scheduler,
    ids: tuple[Tensor, Tensor],
    retained_ids: Tensor,
    texts: tuple[Tensor, Tensor],
    retained_texts: Tensor,
    random: Iterator[tuple[Tensor, list[int], Iterator[Draw], list[Draw]]],
    parameters: Sequence[nn.Parameter],
    *,
    warmup: int = 200,
    attack_steps: int = 30,
    alpha: float = 1e-3,
    sign: bool = False,
    gamma: float = 0.5,
    lr: float = 1e-5,
    eta: float = 1.0,
    guidance: float = 3.0,
    steps: int = 50,
    slips: bool = True,
) -> Iterator[float]:
    """The loss of each update, after it; `parameters`, of the encoder or of the UNet, are trained in place.

    ids: of c_e, and of c_e behind k places, (1, length) each. texts: frozen embeddings of c_e and of no prompt.
    retained_ids, retained_texts: of all retained prompts (m, length) and (m, length, d). random: for each update where
    the attack begins (1, k, d), the retained prompts that are due, the draws of attack and update, and one for each
    retained prompt.
    """
    how, empty = dict(steps=steps, guidance=guidance), texts[1]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for step, (start, due, draws, others) in enumerate(random):
        if step < warmup:
            rows = None
        else:
            rows = attacked(
                encoder, unet, frozen, scheduler, ids[1], start, texts, draws, attack_steps=attack_steps, alpha=alpha,
                sign=sign, slips=slips, **how,
            )  # fmt: skip
        draw = next(draws)
        x, t = partly_drawn(frozen, scheduler, *texts, draw, lag=slips, **how)
        with torch.no_grad():
            e_0, e_p = predict(frozen, x, t, empty), predict(frozen, x, t, texts[0])
        told = encoder(ids[0])[0] if rows is None else embedded(encoder, ids[1], rows)
        loss = nn.functional.mse_loss(predict(unet, x, t, told), e_0 - eta * (e_p - e_0))

        kept = retained_texts[due]
        if slips:  # one batch at the update's time step
            noise = torch.cat([noise for noise, _, _ in others])
            x, t = partly_drawn(
                frozen, scheduler, kept, empty.expand_as(kept), (noise, *draw[1:]), lag=True, **how
            )
        else:
            own = [
                partly_drawn(frozen, scheduler, one[None], empty, other, lag=False, **how)
                for one, other in zip(kept, others, strict=True)
            ]
            x, t = torch.cat([x for x, _ in own]), torch.stack([t for _, t in own])
        with torch.no_grad():
            e_o = predict(frozen, x, t, kept)
        told = encoder(retained_ids[due])[0]
        loss = loss + gamma * nn.functional.mse_loss(predict(unet, x, t, told), e_o)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()
