"""How few steps are enough? Samplers and numbers of steps on the emoji model: what the judge sees, and the time.

    python benchmarks/samplers.py --out data/results/benchmark_samplers.json

Every fourth concept in every style once, the same noise for all. The times are of 16 pictures, the median of three
rounds in which the samplers take turns; run it with nothing else on the machine.
"""

import argparse
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median

import erasekit as ek
from erasekit.emoji import data
from erasekit.evaluate import runs, world
from erasekit.evaluate.records import ORIGINAL, Result, measurements, save
from erasekit.models import DiffusionModel

SAMPLERS = [("DDIMScheduler", 25), ("DDIMScheduler", 10)]
SAMPLERS += [("DPMSolverMultistepScheduler", steps) for steps in (6, 8, 10, 12, 15)]
SAMPLERS += [("UniPCMultistepScheduler", steps) for steps in (8, 10)]


def named(sampler: str, steps: int) -> str:
    """As the steps of `evaluate.deployment` are called: "DDIM, 25 steps"."""
    return f"{sampler.removesuffix('Scheduler')}, {steps} steps"


def seconds(model: DiffusionModel, rounds: int = 3) -> dict[str, float]:
    """{name: seconds for 16 pictures}, after a first round that is not counted."""
    prompts, taken = [prompt.text for prompt in world.grid()[:16]], defaultdict(list)
    for _ in range(rounds + 1):
        for sampler, steps in SAMPLERS:
            with runs.sampled_by(model, sampler):
                start = time.perf_counter()
                model.generate(prompts, seeds=range(16), steps=steps)
                taken[named(sampler, steps)].append(time.perf_counter() - start)
    return {name: round(median(times[1:]), 3) for name, times in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model, found = ek.load("emoji"), []
    prompts = world.grid([concept.name for concept in data.concepts()][::4])
    taken = seconds(model)
    for sampler, steps in SAMPLERS:
        asked, step = replace(world.protocol(prompts, steps=steps), sampler=sampler), named(sampler, steps)
        drawn = runs.run(model, None, asked, progress=True)
        found += measurements(drawn.measured(), asked, ORIGINAL, step=step, seconds=taken[step])
    result = Result(
        f"python benchmarks/samplers.py --out {given.out.as_posix()}",
        "benchmark",
        **world.subject(model),
        machine=runs.machine(),
        measurements=tuple(found),
    )
    save(result, given.out)
    print(result.table().to_string())


if __name__ == "__main__":
    main()
