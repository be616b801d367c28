"""Ring-A-Bell: a text whose embedding lies where the concept is, found by a genetic search (Tsai et al., ICLR 2024,
arXiv 2310.10012).

    concept   c^ = mean_i [ tau(P_i with the concept) - tau(P_i without) ]
    target    T = tau(P) + eta c^
    search    min over K tokens   || T - tau(tokens) ||^2, all positions together

tau: all that the UNet is told, of SDXL the rows of both text encoders and the pooled text (ours).

Black-box: the text encoder alone is needed, no picture and no UNet. The found text is then an ordinary prompt.

Read from the authors' code at e4585ad (MIT). Difference: the best half is protected from mutation; `faithful` mutates
it too, as there, where tensors are shared, and so can lose the best text found.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from erasekit.attacks import common
from erasekit.attacks.common import AttackResult, Measure
from erasekit.conditioning import Conditioning, joined
from erasekit.models import DiffusionModel
from erasekit.settings import check, chosen
from erasekit.tokens import as_text, vocabulary


@dataclass(frozen=True)
class Config:
    """Settings of Ring-A-Bell.

    tokens: K (the authors use 16, 38 and 77). eta: strength of the concept vector, 3 for nudity. population: members;
    the best half survives. generations: rounds. crossover: probability that a survivor has two children with another.
    mutation: probability that a member gets one new token. faithful: see the module. stable: see UnlearnDiffAtk.
    batch: prompts at a time. steps, guidance: how the victim draws.
    """

    tokens: int = 16
    eta: float = 3.0
    population: int = 200
    generations: int = 3000
    crossover: float = 0.5
    mutation: float = 0.25
    faithful: bool = False
    stable: bool = False
    batch: int = common.side_by_side(1)
    steps: int = 50
    guidance: float = 7.5

    def __post_init__(self):
        check(self, tokens=1, eta=0, population=4, generations=1, crossover=0, mutation=0, batch=1, steps=1)
        if max(self.crossover, self.mutation) > 1:
            raise ValueError("crossover and mutation are probabilities: at most 1")


PRESETS = {
    "emoji": Config(
        tokens=8, population=60, generations=100, eta=1.0, stable=True, steps=25, guidance=3.0
    ),  # ours
    "sd14": Config(),
    "sd14-violence": Config(eta=5.5),
}


def concept_vector(model: DiffusionModel, pairs: Sequence[tuple[str, str]]) -> Conditioning:
    """c^, of one prompt: mean difference of what the UNet is told of prompts with the concept and without."""
    if not pairs:
        raise ValueError("a concept vector needs pairs of prompts, with the concept and without")
    with_it, without = zip(*pairs, strict=True)
    told, other = model.conditioning(with_it), model.conditioning(without)
    return told.each(lambda a, b: (a - b).mean(0, keepdim=True), other)


def crossed(members: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """The members (n, k) and, for each with the given probability, two one-point crossovers with a random other."""
    children = []
    n, k = members.shape
    for i in range(n):
        if float(torch.rand((), generator=generator)) < probability:
            j = int(torch.randint(n, (), generator=generator))
            cut = int(torch.randint(1, k, (), generator=generator)) if k > 1 else 0
            children.append(torch.cat([members[i, :cut], members[j, cut:]]))
            children.append(torch.cat([members[j, :cut], members[i, cut:]]))
    return torch.cat([members, torch.stack(children)]) if children else members


def mutated(members: Tensor, probability: float, allowed: Tensor, generator: torch.Generator) -> Tensor:
    """The members (n, k); each gets, with the given probability, one random slot replaced by a random allowed token."""
    n, k = members.shape
    change = torch.rand(n, generator=generator) < probability
    slots = torch.randint(k, (n,), generator=generator)
    new = allowed[torch.randint(len(allowed), (n,), generator=generator)]
    result = members.clone()
    result[change, slots[change]] = new[change]
    return result


def search(
    fitness: Callable[[Tensor], Tensor], allowed: Tensor, config: Config, generator: torch.Generator
) -> tuple[Tensor, list[float], int]:
    """The best tokens (k,), its fitness in every generation, and how many texts were evaluated.

    fitness: members (n, k) to (n,), low is good; members that are known are not evaluated again.
    """
    members = allowed[torch.randint(len(allowed), (config.population, config.tokens), generator=generator)]
    known: dict[tuple, float] = {}

    def rated(members: Tensor) -> Tensor:
        rows = [tuple(row) for row in members.tolist()]
        if new := [row for row in dict.fromkeys(rows) if row not in known]:
            known.update(zip(new, fitness(torch.tensor(new)).tolist(), strict=True))
        return torch.tensor([known[row] for row in rows])

    course = []
    for _ in range(config.generations):
        values = rated(members)
        best = members[values.argsort(stable=True)[: config.population // 2]]
        course.append(float(values.min()))
        everyone = crossed(best, config.crossover, generator)
        protected = 0 if config.faithful else len(best)
        members = torch.cat(
            [everyone[:protected], mutated(everyone[protected:], config.mutation, allowed, generator)]
        )
        if not config.faithful:
            fresh = mutated(best, 1.0, allowed, generator)  # the protected ones' mutants come beside them
            members = torch.cat(
                [members, fresh[torch.rand(len(fresh), generator=generator) < config.mutation]]
            )
    values = rated(members)
    return members[values.argmin()], [*course, float(values.min())], len(known)


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
    """One search per distinct prompt, drawn with all its seeds; see `attacks.common` for what all attacks share.

    pairs: prompts with the concept and without, for the concept vector.
    """
    config = chosen(PRESETS, model, config, "sd14")
    setting = common.prepare(
        "Ring-A-Bell", "text encoder", model, prompts, seeds, goal, config, generator,
        depends=[list(map(list, pairs))], folder=folder, progress=progress,
    )  # fmt: skip
    shots = setting.shots
    common.slots(model, lambda _: [[None] * config.tokens])  # room for them
    allowed = vocabulary(model.tokenizers, config.stable)
    shift = concept_vector(model, pairs)
    distinct = list(dict.fromkeys(shot.prompt.text for shot in shots))
    first = {text: next(i for i, s in enumerate(shots) if s.prompt.text == text) for text in distinct}

    @torch.no_grad()
    def found(piece: list[int]) -> list[dict]:
        records = []
        for number in piece:
            told = model.conditioning(distinct[number])
            target = told.each(lambda own, by: (own + config.eta * by).float(), shift)

            def fitness(members: Tensor, target=target) -> Tensor:
                texts = common.slots(model, lambda _: members.tolist())
                found = joined([texts.text(at=part) for part in torch.arange(len(members)).split(256)])
                apart = found.each(lambda one, far: (one.float() - far).square().flatten(1).sum(1), target)
                return sum(apart.parts).cpu()

            own = setting.generators()[first[distinct[number]]]
            tokens, course, evaluated = search(fitness, allowed, config, own)
            every = max(1, len(course) // 20)
            records.append(
                {
                    "found": as_text(model.tokenizer, tokens.tolist()),
                    "text": evaluated,
                    "trace": [
                        {"generation": g, "loss": round(course[g], 4)} for g in range(0, len(course), every)
                    ],
                }
            )
        return records

    records = dict(zip(distinct, setting.resumed(distinct, config.batch, found), strict=True))
    return setting.drawn([records[shot.prompt.text] for shot in shots])
