"""Textual inversion: a new word, learned from pictures of the concept, for what the erased model no longer draws by
name (CCE: Pham et al., ICLR 2024, arXiv 2308.01508; after Gal et al., ICLR 2023).

    min_v  E_{x, t, eps} || eps - eps_victim(x_t | prompt with v in place of the phrase) ||^2

over the token embeddings v alone, on pictures x of the concept. White-box, and the attacker must be able to feed an
embedding. A success shows that the UNet still can draw the concept, not that some text makes it.

The settings of CCE's published runs are not known; ours are named so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image

from erasekit.attacks import common
from erasekit.attacks.common import AttackResult, Measure
from erasekit.evaluate import runs
from erasekit.models import DiffusionModel
from erasekit.settings import check, chosen
from erasekit.tokens import opened, token_tables
from erasekit.training import constant, optimize
from erasekit.tuning import frozen


@dataclass(frozen=True)
class Config:
    """Settings of textual inversion.

    tokens: of the new word. updates, alpha: AdamW's steps and learning rate. batch: pictures per update. steps,
    guidance: how the victim draws.
    """

    tokens: int = 1
    updates: int = 1000
    alpha: float = 5e-3
    batch: int = 4
    steps: int = 50
    guidance: float = 7.5

    def __post_init__(self):
        check(self, tokens=1, updates=1, alpha=0, batch=1, steps=1)


PRESETS = {
    "emoji": Config(updates=300, alpha=2e-2, batch=8, steps=25, guidance=3.0),  # ours
    "sd14": Config(),  # ours
}


def run(
    model: DiffusionModel,
    prompts: str | Sequence[str],
    *,
    goal: Measure,
    phrase: str,
    pictures: Sequence[Image],
    captions: Sequence[str],
    seeds: int | Sequence[int] = (0,),
    config: Config | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    folder=None,
    progress: bool = False,
    callback: Callable[[dict], None] | None = None,
) -> AttackResult:
    """Learn one word for all prompts and draw each with it; see `attacks.common` for what all attacks share.

    phrase: what the word stands for; every prompt and caption must hold it once, as whole words. pictures, captions: of
    the concept, one caption each. `learned` is v, (tokens, d), of SDXL the embeddings of both text encoders side by
    side. callback: step and loss at every update.
    """
    config, pictures = chosen(PRESETS, model, config, "sd14"), common.as_pictures(pictures)
    if len(pictures) != len(captions) or not pictures:
        raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions: give as many of each")
    setting = common.prepare(
        "textual inversion", "victim's weights, pictures, embedding input", model, prompts, seeds, goal, config,
        generator, depends=[phrase, *pictures, list(captions)], folder=folder, progress=progress,
    )  # fmt: skip
    shots = setting.shots
    placed = lambda texts: common.slots(
        model, lambda tokenizer: [opened(tokenizer, text, phrase, config.tokens) for text in texts]
    )
    shown, wanted = placed(captions), placed([shot.prompt.text for shot in shots])
    clean = common.latents_of(model, pictures)
    table = token_tables(model.text_encoders.values())
    word = torch.nn.Module()
    # the mean of the vocabulary: no word in particular
    word.rows = torch.nn.Parameter(table.mean(0).repeat(config.tokens, 1))
    own = setting.generators()[0]

    def loss(step: int, generator: torch.Generator) -> dict:
        picked = torch.randint(len(clean), (config.batch,), generator=generator)
        t = torch.randint(1000, (config.batch,), generator=generator).to(model.device)
        noise = torch.randn((config.batch, *clean.shape[1:]), generator=generator).to(
            clean.device, clean.dtype
        )
        text = shown.text(word.rows.repeat(config.batch, 1), picked)
        return {"loss": common.noise_error(model, clean[picked.to(clean.device)], noise, t, text).mean()}

    with frozen(model.unet, *model.text_encoders.values()):
        optimize(
            "word", word, loss, steps=config.updates, peak=config.alpha, generator=own, schedule=constant,
            callback=callback, log=setting.log, decay=0.0, weight_decay=0.0, save_every=40, folder=setting.folder,
            progress=progress,
        )  # fmt: skip
    rows = word.rows.detach()

    @torch.no_grad()
    def look(piece: list[int]) -> list[dict]:
        pictures = setting.draw(
            wanted.text(rows.repeat(len(piece), 1), piece), [shots[i].seed for i in piece]
        )
        seen = common.reached(setting.goal, pictures, [shots[i].prompt.text for i in piece])
        return [{"reached": one, "looks": 1, "trace": [{"look": 1, "reached": one}]} for one in seen]

    records = setting.resumed([shot.key for shot in shots], runs.PIECE, look)
    each = config.updates * config.batch / len(shots)  # one word serves all attempts
    return setting.finished([one | {"unet": round(each), "text": round(each)} for one in records], rows.cpu())
