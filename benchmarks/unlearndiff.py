"""UnlearnDiffAtk in one batch against one prompt at a time, on the emoji model: the same attempts, the same results?

    python benchmarks/unlearndiff.py --out data/results/benchmark_unlearndiff.json

A benchmark, not a test. The goal is one that is never reached, so that both ways do all the work: every block, every
look. Agreement: attempts whose texts are the same in every block (in float32 a batch of another size rounds otherwise,
and one different sampled token leads elsewhere; in float64 all agree, which the tests show).
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import erasekit as ek
from erasekit.attacks import sees, unlearndiff
from erasekit.attacks.common import Measure
from erasekit.evaluate import runs, world
from erasekit.evaluate.records import Result, save
from erasekit.evaluate.runs import machine
from erasekit.experiments import stages


def timed(victim, staged, goal: Measure, targets, config, which: list[list[int]]) -> tuple[float, list]:
    """Seconds and attempts of the attack, in the given groups of attempts."""
    attempts, spent = [], 0.0
    for group in which:
        own = [torch.Generator().manual_seed(100 + i) for i in group]
        pick = lambda values, group=group: [values[i] for i in group]
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            result = unlearndiff.run(
                victim, pick(staged.prompts), seeds=pick(staged.seeds), goal=goal, targets=pick(targets),
                config=config, generator=own, folder=Path(folder) / "attacks",
            )  # fmt: skip
            spent += time.perf_counter() - begin
        attempts += result.attempts
    return spent, attempts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--attempts", type=int, default=16)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model = ek.load("emoji")
    victim = ek.uce.fit(model, "dog", ["cat", "horse", "fox"]).merged(model)
    staged = stages.stage("dog", given.attempts)
    with runs.sampled_by(model, world.SAMPLER):
        targets = model.generate(staged.prompts, staged.seeds, world.STEPS)
    never = replace(sees("dog"), rule="any", threshold=2.0)
    config = replace(unlearndiff.PRESETS["emoji"], timesteps=(300, 700), updates=10, batch=given.attempts)
    everyone = list(range(given.attempts))
    timed(victim, staged, never, targets, config, [everyone[:2]])  # warm up
    one_by_one, singles = timed(victim, staged, never, targets, config, [[i] for i in everyone])
    together, batch = timed(victim, staged, never, targets, config, [everyone])
    texts = lambda attempt: [step["text"] for step in attempt.trace]
    command = f"python benchmarks/unlearndiff.py --attempts {given.attempts} --out {given.out.as_posix()}"
    details = {
        "attempts": given.attempts,
        "updates": len(config.timesteps) * config.updates,
        "looks": len(config.timesteps),
        "one_by_one_seconds": round(one_by_one, 2),
        "together_seconds": round(together, 2),
        "ratio": round(one_by_one / together, 2),
        "same_texts": sum(texts(a) == texts(b) for a, b in zip(singles, batch, strict=True)),
    }
    save(Result(command, "benchmark", machine=machine(), details=details), given.out)
    print(json.dumps(details, indent=1))


if __name__ == "__main__":
    main()
