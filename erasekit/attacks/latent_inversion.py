"""Text-free latent inversion: run a picture of the concept backwards through the erased model with the empty prompt,
and forwards again (after TINA, arXiv 2603.17828).

DDIM without guidance takes a latent from level t to level p < t by

    y = sqrt(a_p / a_t) (x - sqrt(1 - a_t) e) + sqrt(1 - a_p) e        e = eps(x, t | empty prompt), a: alphas_cumprod

Inversion solves that for x, level by level, by fixed-point iterations from e = eps(y, t); one iteration is plain DDIM
inversion. The noise that is found is drawn with the empty prompt, of SDXL with the zeros that its guidance takes for
it.

White-box, needs a picture of the concept, and no text at all. Read the control beside it: a model for which no
word means anything carries a picture through just as well, so a success says that the *picture* passes, not that the
erased word is remembered. TINA's text and code could not be read; this is a RECONSTRUCTION from its README and the DDIM
equations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

from erasekit.attacks import common
from erasekit.attacks.common import AttackResult, Measure
from erasekit.conditioning import Conditioning, predict
from erasekit.models import DiffusionModel
from erasekit.sampling import ddim
from erasekit.settings import check, chosen


@dataclass(frozen=True)
class Config:
    """iterations: of the fixed point at every level. batch: attempts at a time. steps: levels, backwards and forwards.
    guidance: of the raw prompts; the inversion uses none.
    """

    iterations: int = 3
    batch: int = common.side_by_side(16)
    steps: int = 50
    guidance: float = 7.5

    def __post_init__(self):
        check(self, iterations=1, batch=1, steps=1)


PRESETS = {"emoji": Config(steps=25, guidance=3.0), "sd14": Config()}  # ours


def levels(model: DiffusionModel, steps: int) -> list[tuple[int, float, float]]:
    """(t, a_t, a_p) of each DDIM step, in the order of drawing: high noise first."""
    scheduler = ddim(model.scheduler)
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError("latent inversion is written for models that predict the noise (epsilon)")
    scheduler.set_timesteps(steps)
    stride = scheduler.config.num_train_timesteps // steps
    alphas, found = scheduler.alphas_cumprod, []
    for t in scheduler.timesteps.tolist():
        before = t - stride
        a_p = alphas[before] if before >= 0 else scheduler.final_alpha_cumprod
        found.append((t, float(alphas[t]), float(a_p)))
    return found


@torch.no_grad()
def invert(model: DiffusionModel, clean: Tensor, text: Conditioning, steps: int, iterations: int) -> Tensor:
    """The noise (n, ...) from which `forwards` draws `clean` (n, ...), given n texts."""
    y = clean.float()
    for t, a_t, a_p in reversed(levels(model, steps)):
        x = y
        for _ in range(iterations):
            e = _predicted(model, x, t, text)
            x = (a_t / a_p) ** 0.5 * (y - (1 - a_p) ** 0.5 * e) + (1 - a_t) ** 0.5 * e
        y = x
    return y


@torch.no_grad()
def forwards(model: DiffusionModel, noise: Tensor, text: Conditioning, steps: int) -> Tensor:
    """Clean latents drawn from `noise` by DDIM without guidance."""
    x = noise.float()
    for t, a_t, a_p in levels(model, steps):
        e = _predicted(model, x, t, text)
        x = (a_p / a_t) ** 0.5 * (x - (1 - a_t) ** 0.5 * e) + (1 - a_p) ** 0.5 * e
    return x


def _predicted(model: DiffusionModel, x: Tensor, t: int, text: Conditioning) -> Tensor:
    times = torch.full((len(x),), t, device=model.device)
    return predict(model.unet, x.to(model.dtype), times, text).float()


def run(
    model: DiffusionModel,
    prompts: str | Sequence[str],
    *,
    goal: Measure,
    targets: Sequence[Image],
    seeds: int | Sequence[int] = (0,),
    config: Config | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    folder=None,
    progress: bool = False,
) -> AttackResult:
    """Carry each target picture through the model; see `attacks.common` for what all attacks share.

    targets: a picture of the concept per attempt. The prompts are only drawn as they are, for comparison. trace: the
    error of the picture that comes back, root mean square over the latent.
    """
    config, targets = chosen(PRESETS, model, config, "sd14"), common.as_pictures(targets)
    setting = common.prepare(
        "latent inversion", "victim's weights, a picture of the concept, latent input", model, prompts, seeds, goal,
        config, generator, depends=targets, folder=folder, progress=progress,
    )  # fmt: skip
    shots = setting.shots
    if len(targets) != len(shots):
        raise ValueError(f"{len(shots)} attempts and {len(targets)} target pictures: give one each")
    clean, empty = common.latents_of(model, targets), model.unconditional()

    def carry(piece: list[int]) -> list[dict]:
        text = empty.times(len(piece))
        noise = invert(model, clean[piece], text, config.steps, config.iterations)
        back = forwards(model, noise, text, config.steps)
        seen = common.reached(setting.goal, model.decode(back), [shots[i].prompt.text for i in piece])
        error = (back - clean[piece].float()).square().flatten(1).mean(1).sqrt().tolist()
        passes = config.steps * (config.iterations + 1)
        return [
            {
                "reached": one,
                "looks": 1,
                "unet": passes,
                "trace": [{"look": 1, "reached": one, "error": round(e, 5)}],
            }
            for one, e in zip(seen, error, strict=True)
        ]

    return setting.finished(setting.resumed([shot.key for shot in shots], config.batch, carry))
