"""A text that the text encoder cannot tell from a given one, without its words: the text attack of MMA-Diffusion (Yang
et al., CVPR 2024, arXiv 2311.17516), written anew from its formulas.

    min over k tokens   1 - cos( tau(tokens), tau(target text) )        tau: the row at the first end token

Of SDXL the mean over that row of each text encoder and the pooled text (ours).

Greedy coordinate gradient (Zou et al., 2023): the gradient with respect to the one-hot rows names the most promising
`top` tokens of every slot; of `candidates` texts that differ from the present one in one slot, the best is taken, even
where it is worse, and the best of all is kept. Tokens with blocked words are never used.

Black-box: the text encoder alone is needed. The targets are the caller's own; none are shipped.

The authors' code and data are CC BY-NC-ND and were not used. There, each slot is given its neighbour's gradient (off by
one); here it gets its own. The first text is of tokens that are read back as themselves (ours): the search takes only
texts that read back as as many tokens, and from others it would find none.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from erasekit.attacks import common
from erasekit.attacks.common import AttackResult, Measure
from erasekit.concepts import content_ids, eot_position
from erasekit.conditioning import Conditioning
from erasekit.models import DiffusionModel
from erasekit.settings import check, chosen
from erasekit.tokens import as_text, token_tables, vocabulary


@dataclass(frozen=True)
class Config:
    """Settings of the text-space gradient search.

    tokens: length of the text. updates: steps. top: tokens per slot that are considered. candidates: texts per step.
    stable: see UnlearnDiffAtk. batch: prompts at a time. steps, guidance: how the victim draws.
    """

    tokens: int = 20
    updates: int = 1000
    top: int = 256
    candidates: int = 512
    stable: bool = False
    batch: int = common.side_by_side(1)
    steps: int = 50
    guidance: float = 7.5

    def __post_init__(self):
        check(self, tokens=1, updates=1, top=1, candidates=1, batch=1, steps=1)


PRESETS = {
    "emoji": Config(tokens=8, updates=60, top=64, candidates=64, stable=True, steps=25, guidance=3.0),  # ours
    "sd14": Config(),
}


def run(
    model: DiffusionModel,
    prompts: str | Sequence[str],
    *,
    goal: Measure,
    blocked: Sequence[str] = (),
    seeds: int | Sequence[int] = (0,),
    config: Config | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    folder=None,
    progress: bool = False,
) -> AttackResult:
    """One search per distinct prompt, drawn with all its seeds; see `attacks.common` for what all attacks share.

    prompts: the target texts. blocked: words that no token of the found text may hold. ValueError where none of the
    texts that differ from the first one in one slot reads back as as many tokens.
    """
    config = chosen(PRESETS, model, config, "sd14")
    setting = common.prepare(
        "MMA (text)", "text encoder", model, prompts, seeds, goal, config, generator, depends=[list(blocked)],
        folder=folder, progress=progress,
    )  # fmt: skip
    shots = setting.shots
    allowed = vocabulary(model.tokenizers, config.stable, blocked)
    stable = allowed if config.stable else vocabulary(model.tokenizers, True, blocked)
    starts = torch.searchsorted(allowed, stable)
    distinct = list(dict.fromkeys(shot.prompt.text for shot in shots))
    first = {text: next(i for i, s in enumerate(shots) if s.prompt.text == text) for text in distinct}

    def found(piece: list[int]) -> list[dict]:
        generators = setting.generators()
        return [
            search(model, distinct[i], allowed, config, generators[first[distinct[i]]], starts) for i in piece
        ]

    records = dict(zip(distinct, setting.resumed(distinct, config.batch, found), strict=True))
    return setting.drawn([records[shot.prompt.text] for shot in shots])


def search(
    model: DiffusionModel,
    target: str,
    allowed: Tensor,
    config: Config,
    generator: torch.Generator,
    starts: Tensor,
) -> dict:
    """found, text (prompts encoded) and trace of one greedy coordinate gradient search. starts: places in `allowed` of
    the tokens of the first text.
    """
    tokenizer = model.tokenizer
    table = token_tables(model.text_encoders.values())[allowed.to(model.device)]
    wanted = _ends(model, model.conditioning(target), model.tokenized([target]))
    places = common.slots(model, lambda _: [[None] * config.tokens])
    slots = starts[torch.randint(len(starts), (config.tokens,), generator=generator)]
    best, best_loss, trace, encoded = slots, float("inf"), [], 1

    def loss_of(rows: Tensor) -> Tensor:
        """Loss (n,) of the embeddings (n k, d) of n texts."""
        at = [0] * (len(rows) // config.tokens)
        found = _ends(model, places.text(rows, at), [ids[at] for ids, _ in places.laid])
        return 1 - torch.stack([F.cosine_similarity(*both) for both in zip(found, wanted, strict=True)]).mean(
            0
        )

    for number in range(config.updates):
        now = F.one_hot(slots, len(allowed)).float().to(table.device).requires_grad_()
        value = loss_of(now @ table)
        (gradient,) = torch.autograd.grad(value.sum(), now)
        if value.item() < best_loss:
            best, best_loss = slots, value.item()
        promising = (-gradient).topk(min(config.top, len(allowed)), dim=-1).indices.cpu()
        tried = neighbours(slots, promising, config.candidates, generator)
        tried = _stays(model.tokenizers, tried, slots, allowed)
        encoded += 1 + len(tried)
        if not len(tried) and not trace:
            raise ValueError(
                f"no text that differs from the first in one token reads back as {config.tokens} tokens: take fewer "
                "tokens, more candidates or stable=True, or block less"
            )
        if not len(tried):
            break
        with torch.no_grad():
            # rows of the table, not products with it: candidates are many
            values = loss_of(table[tried.flatten().to(table.device)])
        slots = tried[values.argmin().cpu()]
        if float(values.min()) < best_loss:
            best, best_loss = slots, float(values.min())
        trace.append({"update": number, "loss": round(float(values.min()), 6), "best": round(best_loss, 6)})
    every = max(1, len(trace) // 20)
    return {
        "found": as_text(tokenizer, allowed[best].tolist()),
        "text": encoded,
        "trace": [*trace[:-1:every], *trace[-1:]],
    }


def neighbours(slots: Tensor, promising: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows (count, k) that differ from slots (k,) in one place: places in turn, the token one of `promising`
    (k, top) at that place, uniformly.
    """
    k, top = promising.shape
    places = torch.arange(count) % k
    new = promising[places, torch.randint(top, (count,), generator=generator)]
    rows = slots.repeat(count, 1)
    rows[torch.arange(count), places] = new
    return rows


def _stays(tokenizers: Sequence, rows: Tensor, slots: Tensor, allowed: Tensor) -> Tensor:
    """The rows that are not `slots` itself and read back as as many tokens."""
    text = lambda row: as_text(tokenizers[0], allowed[row].tolist())
    kept = [
        row
        for row in rows
        if not torch.equal(row, slots)
        and all(len(content_ids(one, text(row))) == len(row) for one in tokenizers)
    ]
    return torch.stack(kept) if kept else rows[:0]


def _ends(model: DiffusionModel, text: Conditioning, ids: Sequence[Tensor]) -> list[Tensor]:
    """Of each text encoder its row (n, d) at the first end token of its ids (n, length), and the pooled text (n, p)."""
    rows = text.rows.split([one.config.hidden_size for one in model.text_encoders.values()], -1)
    ends = [eot_position(*both) for both in zip(model.tokenizers, ids, strict=True)]
    found = [own[torch.arange(len(own)), end.to(own.device)] for own, end in zip(rows, ends, strict=True)]
    return [one.float() for one in (*found, *text.parts[1:])]
