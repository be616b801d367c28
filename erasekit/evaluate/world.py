"""Draw the emoji world's prompts and let the judge say what is on the pictures."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from erasekit.edits import Edit
from erasekit.emoji import data, judge
from erasekit.evaluate import runs
from erasekit.evaluate.metrics import rate, text
from erasekit.evaluate.protocols import Measure, Prompt, Protocol, utility
from erasekit.evaluate.records import ORIGINAL, EditMade, Result, kept, measurements
from erasekit.evaluate.runs import machine
from erasekit.models import DiffusionModel

SAMPLER, STEPS, GUIDANCE = "DDIMScheduler", 25, 3.0  # of everything that is measured


def grid(
    concepts: Sequence[str] | None = None,
    styles: Sequence[str] = data.STYLES,
    template: str = "a {} in {} style",
) -> list[Prompt]:
    """Every concept (all when None) in every style."""
    names = [c.name for c in data.concepts()] if concepts is None else concepts
    return [
        Prompt(template.format(name, style, style=style), name, style) for name in names for style in styles
    ]


def protocol(
    prompts: Sequence[Prompt],
    seeds: Sequence[int] = (0,),
    *,
    sampler: str = SAMPLER,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Protocol:
    """A protocol made up for these prompts: does the judge see their concepts and styles?"""
    measures = (
        Measure("objects", ("",), "emoji-object"),
        Measure("styles", ("",), "emoji-style", asked="style"),
    )
    plain = tuple(replace(prompt, role="") for prompt in prompts)
    return Protocol("judged", plain, measures, tuple(seeds), sampler, steps, guidance)


def judged(
    model: DiffusionModel,
    prompts: Sequence[Prompt],
    seeds: Sequence[int] = (0,),
    *,
    sampler: str | None = None,
    steps: int | None = None,
    guidance: float = GUIDANCE,
    attack: torch.Tensor | None = None,
    folder: Path = runs.RUNS,
    progress: bool = False,
) -> pd.DataFrame:
    """One row per prompt and seed: concept, style, prompt, seed, shown and drawn_style (the judge's first choices),
    probability (of the concept).

    A run (`runs.run`, which see for attack and folder) of `protocol` for these prompts: an interrupted one goes on
    where it stopped, a repeated one draws nothing. Applied edits count. The protocol's name and hash are in the
    table's `attrs["protocol"]`.
    """
    asked = protocol(
        prompts,
        seeds,
        sampler=sampler or type(model.scheduler).__name__,
        steps=steps or model.steps,
        guidance=guidance,
    )
    done = runs.run(model, None, asked, attack=attack, folder=folder, progress=progress)
    first = lambda record: max(record, key=record.get)
    table = pd.DataFrame(
        {
            "concept": shot.prompt.concept,
            "style": shot.prompt.style,
            "prompt": shot.prompt.text,
            "seed": shot.seed,
            "shown": first(shown),
            "drawn_style": first(style),
            "probability": shown[shot.prompt.concept],
        }
        for shot, shown, style in zip(
            runs.shots(asked), done.scores("emoji-object"), done.scores("emoji-style"), strict=True
        )
    )
    table.attrs["protocol"] = asked.short
    return table


def object_rate(table: pd.DataFrame) -> dict:
    """Share of pictures on which the judge sees the concept of the prompt."""
    return rate(int((table.shown == table.concept).sum()), len(table))


def style_rate(table: pd.DataFrame) -> dict:
    """Share of pictures on which the judge sees the style of the prompt."""
    return rate(int((table.drawn_style == table["style"]).sum()), len(table))


def counts(
    tables: dict[str, pd.DataFrame], right: Callable[[pd.DataFrame], dict] = object_rate
) -> pd.DataFrame:
    """One row per table of `judged`: k/n with its interval, and the protocol."""
    return pd.DataFrame(
        [
            {"": name, "the judge sees it": text(right(table)), "protocol": table.attrs["protocol"]}
            for name, table in tables.items()
        ]
    )


def erasure(before: pd.DataFrame, after: pd.DataFrame, erased: Sequence[str]) -> dict:
    """What an edit did to the erased concepts or styles and to the rest, on the same prompts and seeds.

    Two rows of rates, "before" and "after": target (the judge still sees what was erased) and others (it sees the
    right object, or for an erased style the right style, on the remaining prompts).
    """
    if list(before.prompt) != list(after.prompt) or list(before.seed) != list(after.seed):
        raise ValueError("before and after must be the same prompts and seeds in the same order")
    result: dict = {"erased": list(erased)}
    for name, table in (("before", before), ("after", after)):
        result[name] = {
            part: rate(int(right.sum()), len(right)) for part, right in _right(table, erased).items()
        }
        if set(erased) <= set(data.STYLES):
            result[name]["objects"] = object_rate(table)
    result["others_fall"] = round(result["before"]["others"]["rate"] - result["after"]["others"]["rate"], 5)
    return result


def _right(table: pd.DataFrame, erased: Sequence[str]) -> dict[str, pd.Series]:
    """Of the pictures about what was erased ("target") and of the rest ("others"): does the judge see the concept of
    the prompt, or for erased styles the style? With the table's index.
    """
    column, seen = ("style", "drawn_style") if set(erased) <= set(data.STYLES) else ("concept", "shown")
    target, right = table[column].isin(erased), table[seen] == table[column]
    if not target.any():
        raise ValueError(f"none of the prompts is about {', '.join(erased)}")
    return {"target": right[target], "others": right[~target]}


def _verdicts(table: pd.DataFrame, erased: Sequence[str]) -> dict[str, dict]:
    """{measure: `records.kept`} behind the rates of `erasure`."""
    pictures = lambda part: table.loc[part.index, ["prompt", "seed"]].itertuples(index=False)
    return {
        name: kept(((prompt, int(seed)) for prompt, seed in pictures(part)), part)
        for name, part in _right(table, erased).items()
    }


def subject(model: DiffusionModel) -> dict:
    """What a result is about: fingerprints of the unedited model, its autoencoder and the emoji judge."""
    return {
        "fingerprint": model.fingerprint(),
        "vae": model.vae_fingerprint(),
        "judges": {"emoji-object": judge.fingerprint()},
    }


def whole_world(erased: Sequence[str], target_pictures: int = 50) -> list[Prompt]:
    """Prompts with seeds of their own: the whole grid with seed 0, and those about `erased` with more seeds, until
    there are `target_pictures` of them.
    """
    everything = grid()
    aimed = [p for p in everything if p.concept in erased or p.style in erased]
    if not aimed:
        raise ValueError(f"no concept or style of the emoji world is called {', '.join(erased)}")
    more = range(1, -(-target_pictures // len(aimed)))
    return [replace(p, seed=0) for p in everything] + [replace(p, seed=s) for s in more for p in aimed]


def measure(
    model: DiffusionModel,
    edit: Edit,
    preset,
    *,
    command: str = "",
    target_pictures: int = 50,
    progress: bool = False,
) -> Result:
    """`erasure` of an edit of the emoji model over the whole world.

    The prompts are those of `whole_world`; the same pictures then give `protocols.utility`. What the model draws before
    the edit is drawn once and reused. preset: the method's Config, from which the edit's settings are told apart.
    """
    named = model.concepts(edit.metadata["concepts"]["erase"])
    erased = [concept.name for concept in named]
    prompts = whole_world(erased, target_pictures)
    asked, utilities = protocol(prompts), utility(erased)
    made = replace(EditMade.of(edit, preset), erased=tuple(erased))
    draw = lambda: judged(model, prompts, sampler=SAMPLER, steps=STEPS, progress=progress)
    before = draw()
    with edit.applied(model):
        after = draw()
    counted = erasure(before, after, erased)
    others = {
        label: runs.run(model, one, utilities, progress=progress)
        for label, one in ((ORIGINAL, None), (made.label, edit))
    }
    found = measurements(counted["before"], asked) + measurements(counted["after"], asked, made.label)
    verdicts = {}
    for (label, run), table in zip(others.items(), (before, after), strict=True):
        found += measurements(run.measured(), utilities, label)
        verdicts[label] = run.verdicts() | _verdicts(table, erased)
    for feature in utilities.features:
        apart = runs.distances(*(one.features(feature) for one in others.values()))
        distances = {name: {"value": apart[name]} for name in apart if name != "n"}
        found += measurements(distances, utilities, made.label)
    return Result(
        command,
        "run",
        **subject(model),
        erased=tuple(erased),
        machine=machine(),
        edits={made.label: made},
        measurements=tuple(found),
        details={"steps": STEPS, "guidance": GUIDANCE, "verdicts": verdicts},
    )
