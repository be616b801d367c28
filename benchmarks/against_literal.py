"""The methods against their published loops, written out in benchmarks/literal/, on one machine in one run.

    python benchmarks/against_literal.py --device cpu --out data/results/benchmark_against_literal.json
    python benchmarks/against_literal.py --device cuda --out build/against_literal_cuda.json

A timing, never a result. On the emoji model, with the papers' settings: a batch of one, 50 steps of the sampler, ESD's
and AdvUnlearn's 1,000 iterations (K = 30, five retained prompts), the 300 of TRCE's stage 2, UnlearnDiffAtk's 40
updates and one look at each of 50 time steps. Few iterations are measured, of the loop and of the product one after the
other, and `whole` is their pace times all iterations, with what is prepared once: `seconds` an iteration include it,
spread over all of them.

    loop      as the authors' code does it, x_t drawn anew, nothing shared
    product   as it is used: kept states, many rows in one pass; ESD and AdvUnlearn with states="cached"
    alike     the product with the switches that make it the loop, on the same x_t, prompts and noise: `apart` is the
              largest difference of a loss, as a share of the largest loss

Prepared once by the product: ESD's and AdvUnlearn's states, all of them drawn here. Of TRCE few ways are drawn, and
counted as many times as there are: 100 to pictures by both, 2,000 unconditional ones by the authors (of which 400 are
used) and 400 by the product. UnlearnDiffAtk: few prompts by the loop and all 50 by the product, for one time step, by
a judge that is never content, so that every look is taken.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest.mock import patch

import torch
from literal import alike
from literal.unlearndiff import drawn

import erasekit as ek
from erasekit import states
from erasekit.attacks import common, sees, unlearndiff
from erasekit.evaluate import runs, world
from erasekit.evaluate.records import Result, read, save
from erasekit.evaluate.runs import machine
from erasekit.experiments import stages
from erasekit.methods import advunlearn, esd, trce

GOALS = {"advunlearn": 8, "esd": 3, "trce": 2, "unlearndiff": 5}  # times less than the loop
CONCEPT, SAFE, SEED, PROMPTS = "dog", "cat", 3, 50


def paced(losses: Iterable[float], count: int) -> tuple[float, float, list[float]]:
    """Seconds of what comes before the first loss but an iteration, seconds of an iteration, and the losses."""
    begin, marks, found = time.perf_counter(), [], []
    for loss in islice(losses, count):
        marks.append(time.perf_counter())
        found.append(loss)
    pace = (marks[-1] - marks[0]) / (count - 1) if count > 1 else marks[0] - begin
    return max(0.0, marks[0] - begin - pace), pace, found


def trained(module, model, config, count: int, **more) -> tuple[float, float, list[float]]:
    """The same of `count` iterations of a method's `fit`, from an empty cache."""
    begin, marks, found = time.perf_counter(), [], []

    def after(state: dict) -> None:
        if state["step"] >= 0:
            marks.append(time.perf_counter())
            found.append(state["loss"])

    with tempfile.TemporaryDirectory() as folder:
        module.fit(
            model, CONCEPT, config=replace(config, iterations=count), folder=Path(folder), callback=after,
            generator=torch.Generator().manual_seed(SEED), **more,
        )  # fmt: skip
    pace = (marks[-1] - marks[0]) / (count - 1) if count > 1 else 0.0
    return max(0.0, marks[0] - begin - pace), pace, found


def apart(ours: list[float], theirs: list[float]) -> float:
    """The largest difference, as a share of the largest loss."""
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / (max(theirs) or 1.0)


def row(name: str, iterations: int, loop: dict, product: dict, alike: dict, unit: str = "iteration") -> dict:
    """What is kept of a method. loop, product: once, pace, measured, in seconds."""
    for one in (loop, product):
        one["whole"] = one["once"] + one["pace"] * iterations
        one["seconds"] = one["whole"] / iterations
    ratio = loop["whole"] / product["whole"]
    rounded = lambda one: {k: round(v, 4) if isinstance(v, float) else v for k, v in one.items()}
    return {
        "unit": unit,
        "iterations": iterations,
        "loop": rounded(loop),
        "product": rounded(product),
        "alike": alike,
        "ratio": round(ratio, 2),
        "goal": GOALS[name],
        "reached": ratio >= GOALS[name],
    }


def of_esd(model, count: int) -> dict:
    """ESD-x of the code of 2023."""
    paper = esd.Config(faithful=True)
    once, pace, losses = paced(alike.esd_losses(model, paper, CONCEPT, SEED), count)
    loop = {"once": once, "pace": pace, "measured": count, "loss": sum(losses) / count}
    _, _, same = trained(esd, model, paper, count)
    kept = esd.Config(states="cached", noises=4)
    once, pace, used = trained(esd, model, kept, more := 10 * count)
    product = {"once": once, "pace": pace, "measured": more, "loss": sum(used) / more}
    switches = 'states="trained", faithful=True'
    return row("esd", paper.iterations, loop, product, {"switches": switches, "apart": apart(same, losses)})


def of_advunlearn(model, count: int) -> dict:
    """AdvUnlearn of the text encoder, attacked from the first iteration on, as in the paper."""
    paper = advunlearn.Config(warmup=0, faithful=True)
    once, pace, losses = paced(alike.advunlearn_losses(model, paper, CONCEPT, (), SEED), count)
    loop = {"once": once, "pace": pace, "measured": count, "loss": sum(losses) / count}
    _, _, same = trained(advunlearn, model, paper, count)
    kept = replace(paper, faithful=False, states="cached", noises=1)
    once, pace, used = trained(advunlearn, model, kept, more := 5 * count)
    product = {"once": once, "pace": pace, "measured": more, "loss": sum(used) / more}
    switches = 'states="frozen", faithful=True'
    return row(
        "advunlearn", paper.iterations, loop, product, {"switches": switches, "apart": apart(same, losses)}
    )


def of_trce(model, count: int, ways: int) -> dict:
    """TRCE's stage 2 after stage 1; both are given stage 1."""
    paper = trce.Config(faithful=True, early=26, margin=0.5)  # a hinge that is active from the start
    few = replace(paper, noises=ways, calm=ways)
    pieces, cached, steer, given = [], states.cached, trce.steer, []

    def timed(of, place, what, rows, make):
        begin = time.perf_counter()
        found = cached(of, place, what, rows, make)
        pieces.append((rows, time.perf_counter() - begin))
        return found

    def watched(*args):
        given.append(args)
        return steer(*args)

    more = 10 * count
    with patch.object(states, "cached", timed), patch.object(trce, "cached", timed):
        _, pace, used = trained(trce, model, replace(few, faithful=False, early=25), more, anchor=SAFE)
    counts = (
        100,
        paper.calm,
        paper.calm,
    )  # malicious ways, unconditional ones, and what stage 1 predicts there
    once = sum(seconds / rows * whole for (rows, seconds), whole in zip(pieces, counts, strict=True))
    product = {"once": once, "pace": pace, "measured": more, "ways": ways, "loss": sum(used) / more}

    with patch.object(trce, "KEPT", torch.float32), patch.object(trce, "steer", watched):
        _, _, same = trained(trce, model, few, count, anchor=SAFE)
    _, start, pairs, *_ = given[0]
    begin = time.perf_counter()
    losses = alike.trce_losses(model, start, pairs, few, SEED)
    drawing = (time.perf_counter() - begin) / (
        ways * len(pairs) + ways
    )  # ways are drawn before the first update
    _, pace, found = paced(losses, count)
    loop = {
        "once": drawing * (100 + 2000),
        "pace": pace,
        "measured": count,
        "ways": ways,
        "loss": sum(found) / count,
    }
    switches = "faithful=True, early=26, KEPT=float32; and no lag of the preserved latents in the loop"
    return row("trce", paper.iterations, loop, product, {"switches": switches, "apart": apart(same, found)})


def of_unlearndiff(model, count: int, updates: int, prompts: int) -> dict:
    """UnlearnDiffAtk; an iteration is one prompt at one time step, with its look."""
    victim = ek.uce.fit(model, CONCEPT, ["cat", "horse", "fox"]).merged(model)
    staged = stages.stage(CONCEPT, prompts)
    with runs.sampled_by(model, world.SAMPLER):
        targets = model.generate(staged.prompts, staged.seeds, world.STEPS)
    never = replace(sees(CONCEPT), rule="any", threshold=2.0)
    paper = unlearndiff.Config(updates=updates)
    short = replace(paper, timesteps=paper.timesteps[25:26])
    raw, run = [], runs.run

    def timed(*args, **kwargs):
        begin = time.perf_counter()
        found = run(*args, **kwargs)
        raw.append(time.perf_counter() - begin)
        return found

    with tempfile.TemporaryDirectory() as folder, patch.object(runs, "run", timed):
        begin = time.perf_counter()
        result = unlearndiff.run(
            victim, staged.prompts, seeds=staged.seeds, goal=never, targets=targets, config=short,
            generator=[torch.Generator().manual_seed(100 + i) for i in range(prompts)],
            folder=Path(folder) / "attacks",
        )  # fmt: skip
        spent = time.perf_counter() - begin - raw[0]
    scale = PROMPTS / prompts
    product = {"once": raw[0] * scale, "pace": spent / prompts, "measured": prompts}

    def look(text: str, seed: int) -> bool:
        with runs.sampled_by(victim, world.SAMPLER):
            picture = drawn(victim.pipeline, text, seed, short.steps, short.guidance)
        return common.reached(never, [picture], [text])[0]

    blocks, looks, clean = [], [], common.latents_of(victim, targets[:count])
    begin = time.perf_counter()
    for i in range(count):
        prompt, seed = staged.prompts[i], staged.seeds[i]
        first = time.perf_counter()
        look(prompt, seed)
        looks.append(time.perf_counter() - first)
        reached = lambda text, seed=seed: look(text, seed)
        blocks += alike.unlearndiff_blocks(victim, short, prompt, clean[i : i + 1], reached, 100 + i)
    spent = time.perf_counter() - begin - sum(looks)
    loop = {"once": sum(looks) / count * PROMPTS, "pace": spent / count, "measured": count}
    ours = [attempt.trace[0] for attempt in result.attempts[:count]]
    same = {
        "switches": "stable=False; and noise of its own for every block, no special tokens in the loop",
        "apart": apart([one["loss"] for one in ours], [one["loss"] for one in blocks]),
        "same_texts": sum(a["text"] == b["text"] for a, b in zip(ours, blocks, strict=True)),
    }
    whole = PROMPTS * len(paper.timesteps)
    return {"prompts": PROMPTS, **row("unlearndiff", whole, loop, product, same, "prompt and time step")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument(
        "--iterations", type=int, default=3, help="of AdvUnlearn's loop (default: %(default)s)"
    )
    parser.add_argument("--updates", type=int, default=40, help="of UnlearnDiffAtk at a time step")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="of UnlearnDiffAtk by the product")
    parser.add_argument("--ways", type=int, default=8, help="of each prompt of TRCE (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model = ek.load("emoji", device=given.device)
    asked = {
        "methods": " ".join(given.methods), "iterations": given.iterations, "updates": given.updates,
        "ways": given.ways, "prompts": given.prompts,
    }  # fmt: skip
    usual = {"methods": " ".join(GOALS), "iterations": 3, "updates": 40, "ways": 8, "prompts": PROMPTS}
    words = "".join(f" --{name} {value}" for name, value in asked.items() if value != usual[name])
    command = (
        f"python benchmarks/against_literal.py{words} --device {given.device} --out {given.out.as_posix()}"
    )
    made = read(given.out) if given.out.exists() else None
    rows = made.details["methods"] if made and made.command == command else {}
    result = Result(
        command, "benchmark", machine=machine(), details={"device": given.device, "methods": rows}
    )
    makers = {
        "esd": lambda: of_esd(model, 8 * given.iterations),
        "advunlearn": lambda: of_advunlearn(model, given.iterations),
        "trce": lambda: of_trce(model, 4 * given.iterations, given.ways),
        "unlearndiff": lambda: of_unlearndiff(model, given.iterations, given.updates, given.prompts),
    }
    for name in given.methods:
        if name in rows:  # of an interrupted run
            continue
        begin = time.perf_counter()
        result.details["methods"][name] = makers[name]()
        save(result, given.out)
        shown = json.dumps(result.details["methods"][name], indent=1)
        print(name, shown, f"({time.perf_counter() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
