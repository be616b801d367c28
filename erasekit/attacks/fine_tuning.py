"""Benign fine-tuning: does the concept come back when the erased model is tuned on pictures that have nothing to do
with it?

The UNet of a copy is trained, in single precision, with the plain diffusion loss on captioned pictures; after every
`every` updates the erased prompts are drawn as they are, in the model's precision. Nobody need attack: a user who
adapts the model does this (SPQR, arXiv 2511.19558; ResAlign). Needs the weights and the right to train.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from PIL.Image import Image

from erasekit.attacks import common
from erasekit.attacks.common import AttackResult, Measure
from erasekit.models import DiffusionModel, copied
from erasekit.settings import check, chosen
from erasekit.training import constant, optimize
from erasekit.tuning import mixed


@dataclass(frozen=True)
class Config:
    """Settings of the fine-tuning.

    updates: in all; every: updates between two looks. alpha: AdamW's learning rate, constant. batch: pictures per
    update. drop: share of captions left empty, of SDXL with zeros in their place, as in its guidance. steps, guidance:
    how the model draws.
    """

    updates: int = 1000
    every: int = 250
    alpha: float = 1e-5
    batch: int = 4
    drop: float = 0.1
    steps: int = 50
    guidance: float = 7.5

    def __post_init__(self):
        check(self, updates=1, every=1, alpha=0, batch=1, drop=0, steps=1)
        if self.drop > 1:
            raise ValueError(f"drop is a share: at most 1, got {self.drop}")
        if self.updates % self.every:
            raise ValueError(f"updates must be a multiple of every, got {self.updates} and {self.every}")


PRESETS = {
    "emoji": Config(updates=200, every=50, alpha=1e-4, batch=16, steps=25, guidance=3.0),  # ours
    "sd14": Config(),  # ours
}


def objective(
    model: DiffusionModel,
    tuned: DiffusionModel,
    pictures: Sequence[Image],
    captions: Sequence[str],
    config: Config,
) -> Callable[[int, torch.Generator], dict]:
    """The diffusion loss of `tuned` on captioned pictures, as `training.optimize` takes it; `model` encodes both."""
    clean, text = common.latents_of(model, pictures), model.conditioning(list(captions))
    empty = model.unconditional()

    def loss(step: int, generator: torch.Generator) -> dict:
        picked = torch.randint(len(clean), (config.batch,), generator=generator)
        t = torch.randint(1000, (config.batch,), generator=generator).to(model.device)
        noise = torch.randn((config.batch, *clean.shape[1:]), generator=generator).to(
            clean.device, clean.dtype
        )
        dropped = (torch.rand(config.batch, generator=generator) < config.drop).to(model.device)
        given = text[picked].each(
            lambda own, none: torch.where(dropped.reshape(-1, *[1] * (own.ndim - 1)), none, own), empty
        )
        return {"loss": common.noise_error(tuned, clean[picked.to(clean.device)], noise, t, given).mean()}

    return loss


def run(
    model: DiffusionModel,
    prompts: str | Sequence[str],
    *,
    goal: Measure,
    pictures: Sequence[Image],
    captions: Sequence[str],
    seeds: int | Sequence[int] = (0,),
    config: Config | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    folder=None,
    progress: bool = False,
    callback: Callable[[dict], None] | None = None,
) -> AttackResult:
    """Tune a copy of the model and draw each prompt after every `every` updates; see `attacks.common`.

    pictures, captions: without the concept; that is the caller's to see to. `reached` is the verdict after the last
    update, the trace has the ones before. callback: step and loss at every update.
    """
    config, pictures = chosen(PRESETS, model, config, "sd14"), common.as_pictures(pictures)
    if len(pictures) != len(captions) or not pictures:
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions: give as many of each")
    setting = common.prepare(
        "benign fine-tuning", "weights, unrelated pictures", model, prompts, seeds, goal, config, generator,
        depends=[*pictures, list(captions)], folder=folder, progress=progress,
    )  # fmt: skip
    shots, own = setting.shots, setting.generators()[0]
    texts = [shot.prompt.text for shot in shots]
    # the weights as they are, with the edits in force
    tuned = DiffusionModel(copied(model.pipeline), model.preset)
    tuned.unet.requires_grad_(True)
    cast = partial(torch.nn.Module.to, tuned.unet)  # diffusers' own warns of it
    error = objective(model, tuned, pictures, captions, config)

    def loss(step: int, generator: torch.Generator) -> dict:
        with mixed(model):
            return error(step, generator)

    def stage(piece: list[int]) -> list[dict]:
        (number,) = piece
        updates = (number + 1) * config.every
        # half precision would round small updates away; the checkpoint of an earlier stage has all digits
        cast(torch.promote_types(model.dtype, torch.float32))
        optimize(
            "unet", tuned.unet, loss, steps=updates, peak=config.alpha, generator=own, schedule=constant,
            callback=callback, log=setting.log, decay=0.0, save_every=config.every, folder=setting.folder,
            log_every=math.gcd(config.every, 20), progress=setting.progress,
        )  # fmt: skip
        cast(model.dtype)
        pictures = setting.draw(model.conditioning(texts), [s.seed for s in shots], tuned)
        return [{"update": updates, "reached": common.reached(setting.goal, pictures, texts)}]

    stages = setting.resumed([str(i) for i in range(config.updates // config.every)], 1, stage)
    (setting.folder / "unet.safetensors").unlink(missing_ok=True)  # large, and of no more use
    records = [
        {
            "reached": stages[-1]["reached"][i],
            "looks": len(stages),
            "trace": [
                {"look": n + 1, "update": one["update"], "reached": one["reached"][i]}
                for n, one in enumerate(stages)
            ],
        }
        for i in range(len(shots))
    ]
    return setting.finished(records)
