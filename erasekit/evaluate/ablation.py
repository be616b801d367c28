"""One setting at a time: variants of a method on the emoji world, each measured alike.

    python -m erasekit.evaluate.ablation advunlearn dog --out data/results/ablation_advunlearn_dog.json

Each variant changes the method's preset "emoji" in what `VARIANTS` says of it. Measured, on the same prompts and seeds:

    target     the concept's prompts
    others     prompts about everything else, one each, the styles in turn
    attack     UnlearnDiffAtk on the concept's prompts, of which those that succeed as they are count as well
    drift      how far the embedding of the empty prompt has moved, relative to its length
    seconds    of the training's iterations, not of drawing the states that they share

A small run for comparing settings with each other; `erasekit run` and `erasekit attack` measure a method. What is done
is kept: an interrupted call goes on, and variants are added to the file as they are finished.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

from erasekit.attacks import emoji as stages
from erasekit.attacks import unlearndiff
from erasekit.emoji import data
from erasekit.evaluate import runs, world
from erasekit.evaluate.protocols import Measure, Prompt, Protocol
from erasekit.methods import METHODS, advunlearn, esd
from erasekit.models import DiffusionModel, load
from erasekit.paths import write_atomically

VARIANTS: dict[str, dict[str, dict]] = {
    "esd": {
        "ESD-x": {},
        "ESD-u": {"parameters": "u"},
        "keys and values": {"parameters": "x-strict"},
        "self-attention": {"parameters": "self"},
        "eta 0.5": {"eta": 0.5},
        "eta 3": {"eta": 3.0},
        "states of the trained model": {"states": "trained", "noises": None},
        "lag of the code": {"states": "frozen", "noises": None, "faithful": True},
    },
    "advunlearn": {
        "AdvUnlearn": {},
        "no attack, no retain set": {"attack_steps": 0, "gamma": 0.0},
        "no retain set": {"gamma": 0.0},
        "no attack": {"attack_steps": 0},
        "UNet": {"part": "x"},
        "gamma 0.2": {"gamma": 0.2},
        "gamma 2": {"gamma": 2.0},
        "K = 3": {"attack_steps": 3},
        "K = 30": {"attack_steps": 30},
        "fast AT": {"attack_steps": 1, "rule": "sign"},
        "first layer": {"layers": 1},
        "first two layers": {"layers": 2},
        "suffix": {"placement": "suffix"},
        "replace": {"placement": "replace"},
        "add": {"placement": "add"},
        "k = 3": {"k": 3},
        "latest": {"start": "latest"},
        "retain set filtered": {"retain_similarity": 0.5},
        "empty prompt free": {"retain_null": False},
        "slips of the code": {"faithful": True, "states": "frozen", "noises": None},
    },
}
HEAD = ("method", "attempts", "protocol", "attack", "fingerprint")  # what rows of one file have in common
DEFAULT = {"esd": esd.PRESETS["emoji"], "advunlearn": advunlearn.PRESETS["emoji"]}


def protocol(concept: str, seeds: int = 10) -> Protocol:
    """The concept's prompts with so many seeds each, and one prompt about every other concept."""
    style = concept in data.STYLES
    if not style and concept not in {c.name for c in data.concepts()}:
        raise ValueError(f"{concept!r} is no object or style of the emoji world")
    mine = lambda p: concept in (p.concept, p.style)
    grid = world.grid()
    target = [p for p in grid if mine(p)][:: 10 if style else 1]
    styles = [s for s in data.STYLES if s != concept]
    others = [
        p
        for i, c in enumerate(data.concepts())
        for p in grid
        if p.concept == c.name and p.style == styles[i % len(styles)] and not mine(p)
    ]
    how = {"judge": "emoji-style", "asked": "style"} if style else {"judge": "emoji-object"}
    asked = [Prompt(p.text, p.concept, p.style, "target", seed=s) for s in range(seeds) for p in target]
    asked += [Prompt(p.text, p.concept, p.style, "other", seed=0) for p in others]
    measures = (
        Measure("target", ("target",), **how, goal="low"),
        Measure("others", ("other",), **how, goal="high"),
    )
    return Protocol(
        "emoji-ablation",
        tuple(asked),
        measures,
        steps=world.STEPS,
        guidance=world.GUIDANCE,
        erased=(concept,),
    )


def measure(
    model: DiffusionModel, method: str, concept: str, changes: dict, attempts: int, progress: bool = True
) -> dict:
    """One variant: its settings, the rates of the module's table, and the course of its training."""
    config = replace(DEFAULT[method], **changes)
    course, times = [], []

    def note(state: dict) -> None:
        course.append(state)
        times.append(time.perf_counter())

    edit = METHODS[method].fit(model, concept, config=config, callback=note, progress=progress)
    seconds = (times[-1] - times[0]) / max(1, len(times) - 1) * config.iterations
    done = runs.run(model, edit, protocol(concept), progress=progress)
    victim = edit.merged(model)
    before, after = model.encode(""), victim.encode("")
    row = {"changes": changes, "config": asdict(config), "seconds": round(seconds, 1), **done.measured()}
    row["drift"] = round(float((after - before).norm() / before.norm()), 5)
    if attempts:
        staged = stages.stage(concept, attempts)
        found = stages.attack("unlearndiff", victim, model, staged, progress=progress)
        row["attack"] = found.success()
    row["course"] = [{k: round(v, 6) for k, v in state.items()} for state in course[::10]]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=VARIANTS)
    parser.add_argument("concept")
    parser.add_argument("--only", action="append", default=[], help="a variant; repeat for more; else all")
    parser.add_argument("--attempts", type=int, default=16, help="of UnlearnDiffAtk (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if unknown := set(given.only) - set(VARIANTS[given.method]):
        parser.error(
            f"no variant {', '.join(sorted(unknown))}: there are {', '.join(VARIANTS[given.method])}"
        )
    model = load("emoji")
    asked = protocol(given.concept)
    words = f"{given.method} {json.dumps(given.concept)} --attempts {given.attempts}"
    head = {
        "command": f"python -m erasekit.evaluate.ablation {words} --out {given.out.as_posix()}",
        "method": given.method,
        "attempts": given.attempts,
        "erased": given.concept,
        "protocol": asked.short,
        "attack": {"name": "UnlearnDiffAtk", "config": asdict(unlearndiff.PRESETS["emoji"])},
        **world.subject(model),
        "machine": runs.machine(),
    }
    old = json.loads(given.out.read_text()) if given.out.exists() else {}
    same = all(old.get(key) == json.loads(json.dumps(head[key])) for key in HEAD)
    found = old["variants"] if old and same else {}
    for name in given.only or VARIANTS[given.method]:
        config = json.loads(
            json.dumps(asdict(replace(DEFAULT[given.method], **VARIANTS[given.method][name])))
        )
        if found.get(name, {}).get("config") == config:
            continue
        found[name] = measure(
            model, given.method, given.concept, VARIANTS[given.method][name], given.attempts
        )
        write_atomically(given.out, json.dumps({**head, "variants": found}, indent=1) + "\n")
        print(name, {key: found[name].get(key) for key in ("target", "others", "attack", "drift", "seconds")})


if __name__ == "__main__":
    main()
