"""UNet passes and seconds of one AdvUnlearn iteration at the paper's settings: x_t drawn anew, and kept.

    python benchmarks/advunlearn.py --out data/results/benchmark_advunlearn.json

A benchmark, not a test. On the emoji model with K = 30, 50 sampler steps, one prompt and five retained ones per
iteration, guidance 3. A pass is one latent through the UNet; a backward pass counts as two. What the kept states cost
to draw (once, one noise for each prompt) is given by itself, and shared out among the paper's 1,000 iterations.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import erasekit as ek
from erasekit.evaluate.records import Result, save
from erasekit.evaluate.runs import machine
from erasekit.methods import advunlearn


class Passes:
    """Counts what goes through a UNet inside the block."""

    def __init__(self, unet):
        self.unet, self.count = unet, 0

    def __enter__(self):
        forward = self.unet.forward

        def counted(sample, *args, **kwargs):
            self.count += len(sample) * (3 if torch.is_grad_enabled() else 1)
            return forward(sample, *args, **kwargs)

        self.unet.forward = counted
        return self

    def __exit__(self, *_):
        del self.unet.forward


def measured(model, config, iterations: int) -> dict:
    """Passes and seconds of the start (states and all), and of one iteration, the mean of those after the first."""
    marks = []
    with tempfile.TemporaryDirectory() as folder, Passes(model.unet) as passes:
        begin = time.perf_counter()
        advunlearn.fit(
            model, "dog", config=replace(config, iterations=iterations), folder=Path(folder),
            generator=torch.Generator().manual_seed(0),
            callback=lambda _: marks.append((passes.count, time.perf_counter() - begin)),
        )  # fmt: skip
    counts, seconds = zip(*marks, strict=True)
    between = len(marks) - 1
    per = (counts[-1] - counts[0]) / between, (seconds[-1] - seconds[0]) / between
    return {
        "start": {"passes": round(counts[0] - per[0]), "seconds": round(seconds[0] - per[1], 1)},
        "iteration": {"passes": round(per[0], 1), "seconds": round(per[1], 2)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=4, help="of x_t drawn anew (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model = ek.load("emoji")
    paper = replace(advunlearn.Config(), warmup=0)  # K = 30, one prompt, five retained, 50 steps
    kept = replace(paper, states="cached", noises=1)
    found = {
        "drawn anew": measured(model, paper, given.iterations),
        "kept": measured(model, kept, 5 * given.iterations),
    }
    shared = found["kept"]["start"]["passes"] / paper.iterations
    one, other = (found[name]["iteration"]["passes"] for name in found)
    command = f"python benchmarks/advunlearn.py --iterations {given.iterations} --out {given.out.as_posix()}"
    details = {
        "config": asdict(paper),
        **found,
        "fewer_passes": round(one / (other + shared), 1),
        "fewer_seconds": round(
            found["drawn anew"]["iteration"]["seconds"]
            / (found["kept"]["iteration"]["seconds"] + found["kept"]["start"]["seconds"] / paper.iterations),
            1,
        ),
    }
    save(Result(command, "benchmark", machine=machine(), details=details), given.out)
    print(json.dumps(details, indent=1))


if __name__ == "__main__":
    main()
