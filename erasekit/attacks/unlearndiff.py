"""UnlearnDiffAtk: a prefix that makes the erased model explain a picture of the concept (Zhang et al., ECCV 2024, arXiv
2310.11868).

The victim is read as a diffusion classifier: the prompt under which it predicts the noise in a picture of the concept
best is the prompt under which it draws the concept best. Over prefixes of k tokens before the prompt,

    min  E_eps || eps - eps_theta(x_t | prefix + prompt) ||^2        x_t: the picture, noised to time step t

in one block of updates for each time step, ascending. Every update:

    sample    one token per slot from u, a distribution over the vocabulary; its one-hot row is used forwards
    gradient  straight through to u, each element clipped to [-1, 1]
    step      Adam with weight decay (added to the gradient), learning rate alpha
    project   u back onto the simplex {u >= 0, sum u = 1}

After each block the likeliest tokens become a text in front of the prompt, the victim draws it, and the judge looks:
the first success ends the attempt. Prompts that succeed as they are are not attacked.

White-box: needs the victim and one picture of the concept per prompt, but not the model before the erasure.

Read from the authors' code at 5a3e5d3 (MIT). Differences: every attempt has its own stream of noise (there, drawing a
picture resets it, so that all blocks see the same noise); the projection is exact (there, bisection to 1e-5).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from erasekit.attacks import common
from erasekit.attacks.common import AttackResult, Measure
from erasekit.concepts import content_ids
from erasekit.models import DiffusionModel
from erasekit.settings import check, chosen
from erasekit.tokens import as_text, fits, token_tables, vocabulary


@dataclass(frozen=True)
class Config:
    """Settings of UnlearnDiffAtk.

    k: tokens in front of the prompt. timesteps: one block each. updates: per block. alpha: learning rate.
    weight_decay: Adam's, coupled. stable: search only tokens that are read back as themselves (the authors search all,
    special ones included). batch: attempts at a time. steps, guidance: how the victim draws.
    """

    k: int = 5
    timesteps: tuple[int, ...] = tuple(range(10, 1000, 20))
    updates: int = 40
    alpha: float = 0.01
    weight_decay: float = 0.1
    stable: bool = False
    batch: int = common.side_by_side(16)
    steps: int = 50
    guidance: float = 7.5

    def __post_init__(self):
        check(self, k=1, updates=1, alpha=0, weight_decay=0, batch=1, steps=1)
        if not self.timesteps or not all(0 <= t < 1000 for t in self.timesteps):
            raise ValueError(f"timesteps must be some of 0 to 999, got {self.timesteps!r}")


PRESETS = {
    # ours: fewer blocks and updates, no decay (with so few updates it keeps u flat)
    "emoji": Config(
        k=4, timesteps=tuple(range(150, 950, 75)), updates=20, alpha=0.05, weight_decay=0.0, stable=True, steps=25,
        guidance=3.0,
    ),
    # the authors' configuration files
    "sd14": Config(),
    "sd14-object": Config(k=3),  # and Van Gogh
}  # fmt: skip


def project_to_simplex(u: Tensor) -> Tensor:
    """The nearest point, row by row, with u >= 0 and sum u = 1; u (..., v). By sorting (Duchi et al., ICML 2008)."""
    ordered = u.sort(-1, descending=True).values
    above = ordered.cumsum(-1) - 1
    count = torch.arange(1, u.shape[-1] + 1, device=u.device, dtype=u.dtype)
    support = (ordered * count > above).sum(-1, keepdim=True).clamp_min(1)
    return (u - above.gather(-1, support - 1) / support).clamp_min(0)


def straight_through(u: Tensor, sampled: Tensor) -> Tensor:
    """One-hot rows of `sampled` (...) over u (..., v); backwards the upstream gradient, clipped to [-1, 1]."""
    passed = u * 1
    if passed.requires_grad:
        passed.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return F.one_hot(sampled, u.shape[-1]).to(u.dtype) + passed - passed.detach()


def run(
    model: DiffusionModel,
    prompts: str | Sequence[str],
    *,
    goal: Measure,
    targets: Image | Sequence[Image],
    seeds: int | Sequence[int] = (0,),
    config: Config | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    folder=None,
    progress: bool = False,
    callback: Callable[[dict], None] | None = None,
) -> AttackResult:
    """Attack each prompt and seed; see `attacks.common` for what all attacks share.

    targets: a picture of the concept per attempt, or one for all: what the model before the erasure draws, or any
    other. callback: after every block, with block, timestep, loss per attempt and the texts. Raises ValueError for a
    prompt that leaves no room for k tokens.
    """
    config = chosen(PRESETS, model, config, "sd14")
    pictures = common.as_pictures(targets)
    setting = common.prepare(
        "UnlearnDiffAtk", "victim's weights, a picture of the concept", model, prompts, seeds, goal, config, generator,
        depends=pictures, folder=folder, progress=progress,
    )  # fmt: skip
    shots = setting.shots
    pictures = pictures * len(shots) if len(pictures) == 1 else pictures
    if len(pictures) != len(shots):
        raise ValueError(f"{len(shots)} attempts and {len(pictures)} target pictures: give one, or one each")
    prefixed = lambda tokenizer: [[None] * config.k + content_ids(tokenizer, s.prompt.text) for s in shots]
    slots = common.slots(model, prefixed)
    clean = common.latents_of(model, pictures)
    allowed = vocabulary(model.tokenizers, config.stable)
    table = token_tables(model.text_encoders.values())[allowed.to(model.device)]

    def search(piece: list[int]) -> list[dict]:
        records = {i: {"reached": False, "trace": [], "looks": 0, "unet": 0, "text": 0} for i in piece}
        left = [i for i in piece if not setting.raw[i]]
        own = dict(zip(piece, (setting.generators()[i] for i in piece), strict=True))
        u = {i: torch.full((config.k, len(allowed)), 1 / len(allowed)).to(table.device) for i in left}
        if left:
            optimizer = torch.optim.Adam(list(u.values()), lr=config.alpha, weight_decay=config.weight_decay)
        for block, t in enumerate(config.timesteps):
            if not left:
                break
            for _ in range(config.updates):
                losses = update({i: u[i] for i in left}, own, t, optimizer)
            tokens = {i: allowed[u[i].argmax(-1).cpu()].tolist() for i in left}
            texts = {i: f"{as_text(model.tokenizer, tokens[i])} {shots[i].prompt.text}" for i in left}
            shown = [i for i in left if fits(model.tokenizers, texts[i])]
            seen = setting.look([texts[i] for i in shown], [shots[i].seed for i in shown])
            verdicts = dict(zip(shown, seen, strict=True))
            for i, loss in zip(left, losses, strict=True):
                record = records[i]
                record["unet"] += config.updates
                record["text"] += config.updates
                record["looks"] += i in verdicts
                found = verdicts.get(i, False)
                record["trace"].append(
                    {
                        "look": record["looks"],
                        "timestep": t,
                        "loss": round(loss, 6),
                        "reached": found,
                        "text": texts[i],
                    }
                )
                if found:
                    record |= {"reached": True, "found": texts[i]}
            if callback is not None:
                named = [{"prompt": shots[i].prompt.text, **records[i]["trace"][-1]} for i in left]
                callback({"block": block, "timestep": t, "attempts": named})
            left = [i for i in left if not records[i]["reached"]]
        return [records[i] for i in piece]

    def update(u: dict[int, Tensor], own: dict, t: int, optimizer) -> list[float]:
        rows = list(u)
        leaves = [u[i].detach().requires_grad_() for i in rows]
        hard = []
        for i in rows:
            picked = torch.multinomial(u[i].cpu(), 1, generator=own[i])[:, 0]
            hard.append(picked.to(table.device))
        delta = torch.cat([straight_through(x, h) @ table for x, h in zip(leaves, hard, strict=True)])
        noise = common.standard_normal(clean[rows], [own[i] for i in rows])
        times = torch.full((len(rows),), t, device=model.device)
        loss = common.noise_error(model, clean[rows], noise, times, slots.text(delta, rows))
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = None
        for i, gradient in zip(rows, torch.autograd.grad(loss.sum(), leaves), strict=True):
            u[i].grad = gradient
        optimizer.step()
        for i in rows:
            u[i].copy_(project_to_simplex(u[i]))
        return loss.tolist()

    items = [shot.key for shot in shots]
    return setting.finished(setting.resumed(items, config.batch, search))
