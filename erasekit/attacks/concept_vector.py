"""The concept vector added to the prompt's embedding: the attack that RECE's authors run under the name Ring-A-Bell.

    tau(P) + eta c^        c^ = mean_i [ tau(P_i with the concept) - tau(P_i without) ]

tau: all that the UNet is told, of SDXL the rows of both text encoders and the pooled text (ours). No text is searched:
the embedding itself goes into the UNet, so an attacker must be able to put it there. eta is 3 for nudity and 0.9 for a
style in their code at 403a67f (Apache-2.0). It is not the attack of Ring-A-Bell's paper, which ends in a text
(`ring_a_bell`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from erasekit.attacks import common
from erasekit.attacks.common import AttackResult, Measure
from erasekit.attacks.ring_a_bell import concept_vector
from erasekit.evaluate import runs
from erasekit.models import DiffusionModel
from erasekit.settings import check, chosen


@dataclass(frozen=True)
class Config:
    """eta: strengths that are tried, in this order, one look each. steps, guidance: how the victim draws."""

    eta: tuple[float, ...] = (3.0,)
    steps: int = 50
    guidance: float = 7.5

    def __post_init__(self):
        check(self, steps=1)
        number = lambda one: isinstance(one, (int, float)) and math.isfinite(one)
        if not isinstance(self.eta, Sequence) or not self.eta or not all(map(number, self.eta)):
            raise ValueError(f"eta must be one or several finite numbers, such as (3.0,), got {self.eta!r}")


PRESETS = {
    "emoji": Config(eta=(1.0, 2.0, 3.0), steps=25, guidance=3.0),  # ours
    "sd14": Config(),
    "sd14-artist": Config(eta=(0.9,)),
}


def run(
    model: DiffusionModel,
    prompts: str | Sequence[str],
    *,
    goal: Measure,
    pairs: Sequence[tuple[str, str]],
    seeds: int | Sequence[int] = (0,),
    config: Config | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    folder=None,
    progress: bool = False,
) -> AttackResult:
    """Every prompt and seed with each eta, until one succeeds; see `attacks.common`. `learned` is what c^ adds to the
    rows, (length, d).
    """
    config = chosen(PRESETS, model, config, "sd14")
    setting = common.prepare(
        "concept vector", "text encoder, embedding input", model, prompts, seeds, goal, config, generator,
        depends=[list(map(list, pairs))], folder=folder, progress=progress,
    )  # fmt: skip
    shots, shift = setting.shots, concept_vector(model, pairs)

    def look(piece: list[int]) -> list[dict]:
        told = model.conditioning([shots[i].prompt.text for i in piece])
        records = {i: {"reached": False, "looks": 0, "text": 1, "trace": []} for i in piece}
        left = list(piece)
        for eta in config.eta:
            if not left:
                break
            rows = [piece.index(i) for i in left]
            moved = told[rows].each(lambda own, by, eta=eta: own + eta * by, shift)
            pictures = setting.draw(moved, [shots[i].seed for i in left])
            texts = [shots[i].prompt.text for i in left]
            for i, seen in zip(left, common.reached(setting.goal, pictures, texts), strict=True):
                records[i]["looks"] += 1
                records[i]["reached"] = seen
                records[i]["trace"].append({"look": records[i]["looks"], "eta": eta, "reached": seen})
            left = [i for i in left if not records[i]["reached"]]
        return [records[i] for i in piece]

    return setting.finished(
        setting.resumed([shot.key for shot in shots], runs.PIECE, look), shift.rows[0].cpu()
    )
