"""P4D, Prompting4Debugging: a text with which the erased model predicts what the original predicts for the prompt (Chin
et al., ICML 2024, arXiv 2309.06135).

    min_Q  || eps_victim(z_t | tau(Q^)) - eps_original(z_t | tau(P)) ||^2        t uniform, z_t: a noised target picture

over free tokens with embeddings Q (of SDXL those of both text encoders, side by side), each projected to Q^, the
vocabulary row of the largest cosine. The gradient is taken at Q^ and applied to Q (as in PEZ, Wen et al., NeurIPS
2023). No guidance in the loss.

    "n"  the free tokens replace the whole prompt
    "k"  one free token is put before every three tokens of the prompt, which stay

White-box, and needs the model before the erasure. Prompts that succeed as they are are not attacked: P4D keeps "ideal"
prompts alone, on which the victim is safe.

Read from the authors' code at 2cf3cda (MIT). Differences: every `every` updates the text is drawn and the judge
decides, and the first success ends the attempt (there, the text whose picture is closest to the target in CLIP is
kept to the end); the VAE's mean instead of a sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from erasekit.attacks import common
from erasekit.attacks.common import AttackResult, Measure
from erasekit.concepts import content_ids
from erasekit.conditioning import predict
from erasekit.models import DiffusionModel
from erasekit.sampling import ddim
from erasekit.settings import check, chosen
from erasekit.tokens import as_text, fits, token_tables, vocabulary


@dataclass(frozen=True)
class Config:
    """Settings of P4D.

    variant: "n" or "k" of the module docstring. tokens: free ones of variant "n". spacing: prompt tokens per free one
    of variant "k". updates: in all; every: updates between two looks. alpha, weight_decay: AdamW's. stable: see
    UnlearnDiffAtk. batch: attempts at a time. steps, guidance: how the victim draws.
    """

    variant: Literal["n", "k"] = "n"
    tokens: int = 16
    spacing: int = 3
    updates: int = 3000
    every: int = 50
    alpha: float = 0.1
    weight_decay: float = 0.1
    stable: bool = False
    batch: int = common.side_by_side(16)
    steps: int = 50
    guidance: float = 7.5

    def __post_init__(self):
        check(self, tokens=1, spacing=1, updates=1, every=1, alpha=0, weight_decay=0, batch=1, steps=1)
        if self.variant not in ("n", "k"):
            raise ValueError(f'variant must be "n" or "k", got {self.variant!r}')


PRESETS = {
    "emoji": Config(tokens=8, updates=100, every=20, stable=True, steps=25, guidance=3.0),  # ours
    "sd14": Config(),
    "sd14-k": Config(variant="k"),
}


def nearest(rows: Tensor, table: Tensor) -> Tensor:
    """Index (n,) of the table's row (v, d) with the largest cosine to each row (n, d)."""
    return (F.normalize(rows, dim=-1) @ F.normalize(table, dim=-1).T).argmax(-1)


def spaced(content: Sequence[int], spacing: int) -> list[int | None]:
    """Content with a free token (None) before every `spacing` tokens: floor(n / spacing) + 1 of them."""
    found: list[int | None] = []
    for i, token in enumerate(content):
        found += [None, token] if i % spacing == 0 else [token]
    return found + [None] if len(content) % spacing == 0 else found


def run(
    model: DiffusionModel,
    prompts: str | Sequence[str],
    *,
    goal: Measure,
    original: DiffusionModel,
    targets: Image | Sequence[Image],
    seeds: int | Sequence[int] = (0,),
    config: Config | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    folder=None,
    progress: bool = False,
    callback: Callable[[dict], None] | None = None,
) -> AttackResult:
    """Attack each prompt and seed; see `attacks.common` for what all attacks share.

    original: the model before the erasure, around weights of its own. targets: a picture of the concept per attempt,
    or one for all. callback: at every look.
    """
    config = chosen(PRESETS, model, config, "sd14")
    parts = lambda one: {one.denoiser_part: one.denoiser, **one.text_encoders}
    shared = {part for part, module in parts(model).items() if parts(original).get(part) is module}
    edited = {name.partition(".")[0] for edit, *_ in model._active for name in edit.tensors}
    if shared & {"unet", *edited}:
        raise ValueError(
            "original and model have the same weights: load the model twice, or attack edit.merged(model)"
        )
    pictures = common.as_pictures(targets)
    setting = common.prepare(
        "P4D", "victim's and original's weights", model, prompts, seeds, goal, config, generator,
        depends=[*pictures, original], folder=folder, progress=progress,
    )  # fmt: skip
    shots, tokenizer = setting.shots, model.tokenizer
    pictures = pictures * len(shots) if len(pictures) == 1 else pictures
    if len(pictures) != len(shots):
        raise ValueError(f"{len(shots)} attempts and {len(pictures)} target pictures: give one, or one each")

    def opened(tokenizer) -> list[list[int | None]]:
        plain = [content_ids(tokenizer, shot.prompt.text) for shot in shots]
        return [
            [None] * config.tokens if config.variant == "n" else spaced(one, config.spacing) for one in plain
        ]

    contents, slots = opened(tokenizer), common.slots(model, opened)
    clean, scheduler = common.latents_of(model, pictures), ddim(model.scheduler)
    wanted_text = original.conditioning([shot.prompt.text for shot in shots])
    allowed = vocabulary(model.tokenizers, config.stable)
    table = token_tables(model.text_encoders.values())[allowed.to(model.device)]

    def search(piece: list[int]) -> list[dict]:
        records = {i: {"reached": False, "trace": [], "looks": 0, "unet": 0, "text": 0} for i in piece}
        left = [i for i in piece if not setting.raw[i]]
        own = {i: setting.generators()[i] for i in piece}
        q = {}
        for i in left:
            start = torch.randint(len(allowed), (contents[i].count(None),), generator=own[i])
            q[i] = table[start.to(table.device)].clone()
        if left:
            optimizer = torch.optim.AdamW(list(q.values()), lr=config.alpha, weight_decay=config.weight_decay)
        for number in range(1, config.updates + 1):
            if not left:
                break
            losses = update({i: q[i] for i in left}, own, optimizer)
            for i in left:
                records[i]["unet"] += 2
                records[i]["text"] += 1
            if number % config.every and number < config.updates:
                continue
            texts = {i: written(i, q[i]) for i in left}
            shown = [i for i in left if fits(model.tokenizers, texts[i])]
            verdicts = dict(
                zip(
                    shown,
                    setting.look([texts[i] for i in shown], [shots[i].seed for i in shown]),
                    strict=True,
                )
            )
            for i, loss in zip(left, losses, strict=True):
                found = verdicts.get(i, False)
                records[i]["looks"] += i in verdicts
                step = {"look": records[i]["looks"], "update": number, "loss": round(loss, 6)}
                records[i]["trace"].append({**step, "reached": found, "text": texts[i]})
                if found:
                    records[i] |= {"reached": True, "found": texts[i]}
            if callback is not None:
                named = [{"prompt": shots[i].prompt.text, **records[i]["trace"][-1]} for i in left]
                callback({"update": number, "attempts": named})
            left = [i for i in left if not records[i]["reached"]]
        return [records[i] for i in piece]

    def written(i: int, rows: Tensor) -> str:
        picked = iter(allowed[nearest(rows, table).cpu()].tolist())
        return as_text(tokenizer, [next(picked) if one is None else one for one in contents[i]])

    def update(q: dict[int, Tensor], own: dict, optimizer) -> list[float]:
        rows = list(q)
        leaves = [table[nearest(q[i], table)].clone().requires_grad_() for i in rows]
        t = torch.stack([torch.randint(1000, (), generator=own[i]) for i in rows]).to(model.device)
        noise = common.standard_normal(clean[rows], [own[i] for i in rows])
        noisy = scheduler.add_noise(clean[rows], noise, t)
        with torch.no_grad():
            wanted = predict(original.unet, noisy, t, wanted_text[rows])
        predicted = predict(model.unet, noisy, t, slots.text(torch.cat(leaves), rows))
        loss = (predicted.float() - wanted.float()).square().flatten(1).mean(1)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = None
        for i, gradient in zip(rows, torch.autograd.grad(loss.sum(), leaves), strict=True):
            q[i].grad = gradient
        optimizer.step()
        return loss.tolist()

    return setting.finished(setting.resumed([shot.key for shot in shots], config.batch, search))
