"""One setting at a time: variants of a method on the emoji world, each measured alike.

    python -m erasekit.experiments.ablation advunlearn dog --out data/results/ablation_advunlearn_dog.json

Each variant changes the method's preset "emoji" in what `VARIANTS` says of it. Measured, on the same prompts and seeds:

    target     the concept's prompts, of "weapon" all weapons'
    synonyms   the same by an object's other words, those that training held out included
    implicit, held_out   of "weapon": sentences that name none, and phrases that training held out; the sentences of an
                         object as well, for the methods that mean to reach them (MACE, RealEra)
    others     prompts about everything else, one each, the styles in turn
    attack     UnlearnDiffAtk on the concept's prompts, of which those that succeed as they are count as well
    drift      how far the embedding of the empty prompt has moved, relative to its length
    seconds    of the training's iterations, not of drawing the states that they share; of a closed form, of `fit`

and once for each file, of "original", what the model draws before any edit. details["verdicts"] has the verdict of
each picture, by variant and measure: `records.about` reads those of one variant.

A small run for comparing settings with each other; `erasekit run` and `erasekit attack` measure a method. What is done
is kept: an interrupted call goes on, and variants are added to the file as they are finished.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass, replace
from itertools import product
from pathlib import Path

from erasekit.attacks import unlearndiff
from erasekit.emoji import data
from erasekit.evaluate import runs, world
from erasekit.evaluate.protocols import Measure, Prompt, Protocol, associations, synonyms, weapons
from erasekit.evaluate.records import (
    ORIGINAL,
    EditMade,
    Measurement,
    Result,
    kept,
    measurements,
    plain,
    read,
    save,
    shown,
)
from erasekit.experiments import stages
from erasekit.methods import METHODS
from erasekit.models import DiffusionModel, load
from erasekit.settings import EMOJI_CAPTIONS

SWITCHES = ("closed_form", "lora", "neighbour", "beyond")  # RealEra's
SWITCHED = [dict(zip(SWITCHES, on, strict=True)) for on in product((True, False), repeat=len(SWITCHES))]
EQUAL = {"lambda_b": 1.0, "lambda_far": 1.0}  # RealEra's beyond concepts weigh as much as neighbours
NO_REFINEMENT = {"lambda_1": 1e6}  # so much weight on what is kept that MACE's first stage changes nothing
of_code = lambda method, preset, *fields: {
    field: getattr(METHODS[method].PRESETS[preset], field) for field in fields
}
ONE_AT_A_TIME = {
    "batch": 1,
    "sampler": 50,
    "templates": ("{}",),
    "noises": None,
}  # ESD as its authors train it
CODE_ADVUNLEARN = ("iterations", "lr", "batch", "warmup", "attack_steps", "alpha", "sampler")
CODE_TRCE = ("iterations", "lr", "batch", "beta", "weight", "sampler", "early")
OWN_UCE = {  # where RECE starts
    name: getattr(METHODS["rece"].PRESETS["emoji"].start, name)
    for name in ("tokens", "lam", "templates", "preserve_templates")
}
CODE_RECE, CODE_RECE_NUDITY = (
    of_code("rece", "sd14-object", "start", "epochs"),
    of_code("rece", "sd14-nudity", "start"),
)
HELD = {"pairs": "held"}
VARIANTS: dict[str, dict[str, dict]] = {
    "uce": {
        "UCE": {},
        "the word's last token": {"tokens": "last_subject"},
        "captions": {"templates": EMOJI_CAPTIONS, "preserve_templates": EMOJI_CAPTIONS},
        "ridge 0.1": {"lam": 0.1},
        "all three, RECE's start": OWN_UCE,
        "preserve_scale 0.1": {
            "preserve_scale": 0.1
        },  # what the code of 2023 takes for nine kept concepts or more
    },
    "rece": {
        "RECE": {},
        "one round": {"epochs": 1},
        "pairs of the start": {"pairs": "start"},
        "one round, pairs of the start": {"epochs": 1, "pairs": "start"},
        "lam 1e-3": {"lam": 1e-3},  # without it, the rounds are singular
        "lam 1": {"lam": 1.0},
        "settings of the code": CODE_RECE,
        "settings of the code, nudity": CODE_RECE_NUDITY,
        "the word held": HELD,
        "settings of the code, the word held": CODE_RECE | HELD,
        "settings of the code, nudity, the word held": CODE_RECE_NUDITY | HELD,
    },
    "esd": {
        "ESD-x": {},
        "ESD-u": {"parameters": "u"},
        "keys and values": {"parameters": "x-strict"},
        "self-attention": {"parameters": "self"},
        "eta 0.5": {"eta": 0.5},
        "eta 3": {"eta": 3.0},
        "states of the trained model": {"states": "trained", "noises": None},
        "lag of the code": {"states": "frozen", "noises": None, "faithful": True},
        "settings of 2023": ONE_AT_A_TIME | {"iterations": 1000, "lr": 1e-5, "states": "trained"},
        "settings of 2025": ONE_AT_A_TIME | {"iterations": 200, "lr": 5e-5, "states": "frozen"},
    },
    "advunlearn": {
        "AdvUnlearn": {},
        "no attack, no retain set": {"attack_steps": 0, "gamma": 0.0},
        "no retain set": {"gamma": 0.0},
        "no attack": {"attack_steps": 0},
        "UNet": {"part": "x"},
        "UNet, trained longer": {"part": "x", "iterations": 300, "batch": 8},
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
        "states drawn anew": {"states": "frozen", "noises": None},
        "slips of the code": {"faithful": True, "states": "frozen", "noises": None},
        "settings of the code": of_code("advunlearn", "sd14-object", *CODE_ADVUNLEARN, "states", "noises"),
        # x_t from four trajectories of each prompt, kept, for hours of drawing them at each step of each attack
        "settings of the code, states cached": of_code("advunlearn", "sd14-object", *CODE_ADVUNLEARN)
        | {"states": "cached", "noises": 4},
    },
    "trce": {
        "TRCE": {},
        "stage 1": {"stages": "text"},
        "stage 2": {"stages": "trajectory"},
        "stage 1, SoT": {"stages": "text", "tokens": ("sot",)},
        "stage 1, KEY": {"stages": "text", "tokens": ("key",)},
        "stage 1, last": {"stages": "text", "tokens": ("last",)},
        "stage 1, all": {"stages": "text", "tokens": ("all",)},
        "stage 1, KEY and EoT": {"stages": "text", "tokens": ("key", "eot")},
        "stage 1, eta 0.01": {"stages": "text", "eta": 0.01},
        "stage 1, eta 1": {"stages": "text", "eta": 1.0},
        "stage 1, eta 10": {"stages": "text", "eta": 10.0},
        "stage 1, lam 1e-4": {"stages": "text", "lam": 1e-4},
        "stage 1, lam 1e-2": {"stages": "text", "lam": 1e-2},
        "stage 2, lr 1e-4": {"stages": "trajectory", "lr": 1e-4},
        "stage 2, weight 100": {"stages": "trajectory", "weight": 100.0},
        "stage 2, early 6": {"stages": "trajectory", "early": 6},
        "stage 2, early 24": {"stages": "trajectory", "early": 24},
        "lr 1e-4": {"lr": 1e-4},
        "lr 1e-4, weight 1": {"lr": 1e-4, "weight": 1.0},
        "lr 1e-3": {"lr": 1e-3},
        "beta 2": {"beta": 2.0},
        "beta 8": {"beta": 8.0},
        "margin 0.1": {"margin": 0.1},
        "margin 0.5": {"margin": 0.5},
        "weight 1": {"weight": 1.0},
        "weight 100": {"weight": 100.0},
        "early 6": {"early": 6},
        "early 24": {"early": 24},
        "condition alone": {"branches": "text"},
        "held to the original": {"reference": "original"},
        "iterations 400": {"iterations": 400},
        "settings of the code": of_code("trce", "sd14-nudity", *CODE_TRCE, "noises"),
        # one way for each of 490 prompts, not five: of its 12,250 points 300 are used
        "settings of the code, fewer ways": of_code("trce", "sd14-nudity", *CODE_TRCE),
    },
    "mace": {
        "MACE": {},
        "settings of the code": {"squared": False}
        | of_code(
            "mace", "sd14-object", "lambda_1", "lambda_2", "lr", "iterations", "batch", "sampler", "guidance"
        ),
        "refinement alone": {"lora": False},
        "refinement alone, lambda_1 0.1": {"lora": False, "lambda_1": 0.1},
        "refinement alone, lambda_1 10": {"lora": False, "lambda_1": 10.0},
        "LoRA alone": NO_REFINEMENT,
        "LoRA alone, lr 3e-3": NO_REFINEMENT | {"lr": 3e-3},
        "LoRA alone, iterations 300": NO_REFINEMENT | {"iterations": 300},
        "LoRA alone, rank 4": NO_REFINEMENT | {"rank": 4},
        "LoRA alone, smaller masks": NO_REFINEMENT | {"mask": 0.8},
        "LoRA alone, norm of the code": NO_REFINEMENT | {"squared": False},
        "LoRA alone, without end tokens": NO_REFINEMENT | {"ends": False},
        "LoRA alone, all time steps": NO_REFINEMENT | {"focal": False},
        "LoRA alone, lambda_2 0.1": NO_REFINEMENT | {"lambda_2": 0.1},
    },
    "realera": {
        "RealEra": {},
        **{
            ", ".join(name for name, on in switched.items() if on): EQUAL | switched
            for switched in SWITCHED
            if switched["closed_form"] or switched["lora"]
        },
        "toward_gaussian": EQUAL | {"mode": "toward_gaussian"},
        "shell": EQUAL | {"mode": "shell"},
        "whole prompt": EQUAL | {"scope": "sequence"},
        "cosine 0.3 to 0.7": EQUAL | {"s_low": 0.3, "s_high": 0.7},
        "cosine 0.7 to 0.95": EQUAL | {"s_low": 0.7, "s_high": 0.95},
        "20 neighbours": EQUAL | {"n": 20, "m": 12},
        "beyond 0.01": {"lambda_b": 0.01, "lambda_far": 0.01},
        "to ESD's target": EQUAL | {"target": "esd"},
        "to the unconditional": EQUAL | {"target": "unconditional"},
        "lr 3e-4": EQUAL | {"lr": 3e-4},
        "lr 3e-3": EQUAL | {"lr": 3e-3},
        "rank 4": EQUAL | {"rank": 4},
    },
    "dp": {
        "DP": {},
        "captions kept": {"preserve_templates": EMOJI_CAPTIONS},
        "captions and the empty prompt kept": {"preserve_templates": EMOJI_CAPTIONS, "preserve_null": True},
    },
    "speed": {
        "SPEED": {},
        "without IPF": {"ipf": False},
        "settings of the code": of_code("speed", "sd14-object", "templates", "preserve_templates"),
    },
    "oce": {
        "OCE": {},
        "settings of the code": of_code(
            "oce", "sd14-object", "guides", "templates", "preserve_templates", "general_templates"
        ),
    },
}
DEFAULT = {method: METHODS[method].PRESETS["emoji"] for method in VARIANTS}


def protocol(concept: str, seeds: int = 10, sentences: bool = False) -> Protocol:
    """Five times so many pictures of the concept, or more, of each kind, and one of every other concept. sentences: of
    an object also those that do not name it, those that training held out included.
    """
    grid = world.grid()
    about = set(weapons().erased) if concept == "weapon" else {concept}
    style = concept in data.STYLES
    if not style and not about <= {c.name for c in data.concepts()}:
        raise ValueError(f"{concept!r} is no object or style of the emoji world, nor 'weapon'")
    mine = lambda p: bool(about & {p.concept, p.style})
    styles = [s for s in data.STYLES if s != concept]
    how = {"judge": "emoji-style", "asked": "style"} if style else {"judge": "emoji-object"}
    labels = tuple(sorted(about)) if concept == "weapon" else None
    role = lambda p, name, seed: Prompt(p.text, p.concept, p.style, name, seed=seed)

    tried = {"target": [p for p in grid if mine(p)][:: 10 if style else 1]}
    if concept == "weapon":
        once = weapons(pictures=1).prompts
        tried |= {name: [p for p in once if p.role == name] for name in ("implicit", "held_out")}
    elif not style:
        tried["synonyms"] = synonyms(concept)
        if sentences and (unnamed := associations(concept)):
            tried["implicit"] = unnamed
    others = [
        p
        for i, c in enumerate(data.concepts())
        for p in grid
        if p.concept == c.name and p.style == styles[i % len(styles)] and not mine(p)
    ]
    asked = [
        role(p, name, seed)
        for name, part in tried.items()
        for seed in range(-(-5 * seeds // len(part)))
        for p in part
    ]
    measures = [Measure(name, (name,), **how, labels=labels, goal="low") for name in tried]
    measures.append(Measure("others", ("other",), **how, goal="high"))
    asked += [role(p, "other", 0) for p in others]
    return Protocol(
        "emoji-ablation",
        tuple(asked),
        tuple(measures),
        steps=world.STEPS,
        guidance=world.GUIDANCE,
        erased=(concept,),
    )


def attacker(attempts: int) -> unlearndiff.Config:
    """UnlearnDiffAtk on all attempts at once."""
    return replace(unlearndiff.PRESETS["emoji"], batch=max(1, attempts))


def measure(
    model: DiffusionModel,
    method: str,
    asked: Protocol,
    changes: dict,
    attempts: int,
    preserve: Sequence[str] = (),
    progress: bool = True,
) -> tuple[EditMade, list[Measurement], dict[str, dict], dict]:
    """One variant: the edit, its measurements of the module's table, still without the variant as their edit, the
    verdicts behind their rates (`runs.Run.verdicts`, those of the attack among them), and the course of its training.
    """
    (concept,) = asked.erased
    config = replace(DEFAULT[method], **changes)
    states, times = [], []

    def note(state: dict) -> None:
        states.append(state)
        times.append(time.perf_counter())

    trained = {"progress": progress} if hasattr(config, "iterations") else {}
    start = time.perf_counter()
    edit = METHODS[method].fit(model, concept, preserve, config=config, callback=note, **trained)
    seconds = time.perf_counter() - start
    if trained:
        seconds = (times[-1] - times[0]) / max(1, len(times) - 1) * config.iterations
    done = runs.run(model, edit, asked, progress=progress)
    victim = edit.merged(model)
    before, after = model.encode(""), victim.encode("")
    about = {"machine": runs.machine()}
    found, verdicts = (
        measurements(done.measured(), asked, seconds=round(seconds, 1), **about),
        done.verdicts(),
    )
    drift = {"value": round(float((after - before).norm() / before.norm()), 5)}
    found += measurements({"drift": drift}, asked, **about)
    if attempts:
        staged = stages.stage(concept, attempts)
        attacked = stages.attack(
            "unlearndiff", victim, model, staged, config=attacker(attempts), progress=progress
        )
        success = {"attack": attacked.success()}
        pictures = ((one.prompt, one.seed) for one in attacked.attempts)
        verdicts["attack"] = kept(pictures, (one.raw or one.reached for one in attacked.attempts))
        found += measurements(success, attacked.asked, attack=attacked.attack, **about)
    course = [
        {
            k: v if isinstance(v, str) else round(v, 6)
            for k, v in state.items()
            if isinstance(v, str | int | float)
        }
        for state in states[::10]
    ]
    told = {name: asdict(value) if is_dataclass(value) else value for name, value in changes.items()}
    return EditMade.of(edit, DEFAULT[method]), found, verdicts, {"changes": told, "course": course}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=VARIANTS)
    parser.add_argument("concept")
    parser.add_argument("--preserve", action="append", default=[], help="what to keep; repeat for more")
    parser.add_argument("--only", action="append", default=[], help="a variant; repeat for more; else all")
    parser.add_argument("--attempts", type=int, default=16, help="of UnlearnDiffAtk (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if unknown := set(given.only) - set(VARIANTS[given.method]):
        parser.error(
            f"no variant {', '.join(sorted(unknown))}: there are {', '.join(VARIANTS[given.method])}"
        )
    model = load("emoji")
    asked = protocol(given.concept, sentences=given.method in ("mace", "realera"))
    kept = "".join(f" --preserve {json.dumps(name)}" for name in given.preserve)
    words = f"{given.method} {json.dumps(given.concept)}{kept} --attempts {given.attempts}"
    before = runs.run(model, None, asked, progress=True)
    settings = {
        "method": given.method,
        "attempts": given.attempts,
        "preserve": given.preserve,
        "attack": {"name": "UnlearnDiffAtk", "config": asdict(attacker(given.attempts))},
    }
    whole = Result(
        f"python -m erasekit.experiments.ablation {words} --out {given.out.as_posix()}",
        "ablation",
        **world.subject(model),
        erased=(given.concept,),
        measurements=tuple(measurements(before.measured(), asked)),
        details=plain(settings | {"variants": {}, "verdicts": {ORIGINAL: before.verdicts()}}),
    )
    if given.out.exists():
        whole = going_on(whole, read(given.out))
    names = given.only or list(VARIANTS[given.method])
    for name in names:
        changes = VARIANTS[given.method][name]
        config = plain(asdict(replace(DEFAULT[given.method], **changes)))
        done = whole.details["verdicts"].keys() & whole.edits.keys()
        if name in done and whole.edits[name].config == config:
            continue
        edit, found, verdicts, course = measure(
            model, given.method, asked, changes, given.attempts, given.preserve
        )
        rows = [m for m in whole.measurements if m.edit != name] + [replace(m, edit=name) for m in found]
        said = {"variants": course, "verdicts": verdicts}
        details = whole.details | {key: whole.details[key] | {name: one} for key, one in said.items()}
        whole = replace(whole, edits=whole.edits | {name: edit}, measurements=tuple(rows), details=details)
        save(in_order(whole, names), given.out)
        print(name, {m.measure: shown(m.value) for m in found})


def in_order(whole: Result, names: Sequence[str]) -> Result:
    """The variants in the order of `names`, and after them those that are not among these."""
    order = [ORIGINAL, *(name for name in names if name in whole.edits)]
    order += [name for name in whole.edits if name not in order]
    sorted_ = lambda of: {name: of[name] for name in order if name in of}
    details = whole.details | {key: sorted_(whole.details[key]) for key in ("variants", "verdicts")}
    rows = tuple(sorted(whole.measurements, key=lambda m: order.index(m.edit)))
    return replace(whole, edits=sorted_(whole.edits), measurements=rows, details=details)


def going_on(new: Result, old: Result) -> Result:
    """The old file under the new command if its variants were measured as new ones will be, else the new one. A file
    of before verdicts were kept has none of its variants': they are measured again.
    """
    same = (new.fingerprint, new.erased) == (old.fingerprint, old.erased)
    settings = {key: value for key, value in new.details.items() if key not in ("variants", "verdicts")}
    same &= all(old.details.get(key) == value for key, value in settings.items())
    hashes = {m.hash[:8] for m in (*new.measurements, *old.measurements) if m.attack is None}
    if not same or len(hashes) != 1:
        return new
    verdicts = old.details.get("verdicts", {}) | new.details["verdicts"]
    return replace(old, command=new.command, details=old.details | {"verdicts": verdicts})


if __name__ == "__main__":
    main()
