"""Where the time of training goes: CPU seconds of the parts of each trained method with its preset for the emoji world.

    python benchmarks/training.py --out data/results/benchmark_training.json
    python benchmarks/training.py --before EARLIER --out ...    # beside what the script wrote at an earlier commit

A benchmark, not a test. One thread, and the CPU time of this process. Each method erases "dog", from an empty cache, in
a few iterations and with few of the ways on which the kept states lie; `whole` is what all of both take at the pace of
the fastest, since whatever else the machine does only makes them slower. Parts, none of which is counted twice:

    text        text embeddings outside iterations
    states      x_t, and the pictures of MACE, drawn by the frozen model
    frozen      what the frozen model predicts in an iteration, beside what is kept with x_t
    attack      AdvUnlearn's attacker, forward and backward
    forward     the rest of the loss: the model in training
    backward    its gradient
    update      the rest of an iteration: the optimizer, checkpoints
    rest        closed forms, copies, hashes
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from unittest.mock import patch

import torch
from diffusers import UNet2DConditionModel

import erasekit as ek
from erasekit import states, tuning
from erasekit.evaluate.records import Result, save
from erasekit.evaluate.runs import machine
from erasekit.methods import METHODS, advunlearn, mace, trce
from erasekit.models import DiffusionModel

TRAINED = ("esd", "advunlearn", "trce", "realera", "mace")
ONCE = ("text", "states", "rest")
ITERATION = ("frozen", "attack", "forward", "backward", "update")
WAYS = 16  # of which kept states are drawn


class Clock:
    """CPU seconds by part, each second in the innermost part alone."""

    def __init__(self):
        self.spent, self.open, self.mark = defaultdict(float), ["rest"], time.process_time()

    def turn(self) -> None:
        now = time.process_time()
        self.spent[self.open[-1]] += now - self.mark
        self.mark = now

    @contextmanager
    def part(self, name: str):
        self.turn()
        self.open.append(name)
        try:
            yield
        finally:
            self.turn()
            self.open.pop()

    def timed(self, name: str, owner, attribute: str, when=lambda clock: True):
        """A patch that counts the calls of owner.attribute as a part, when it should."""
        original = getattr(owner, attribute)

        @wraps(original)
        def call(*args, **kwargs):
            if not when(self):
                return original(*args, **kwargs)
            with self.part(name):
                return original(*args, **kwargs)

        return patch.object(owner, attribute, call)


def measured(model: DiffusionModel, name: str, iterations: int) -> dict:
    """Seconds of the parts of a whole training by a method."""
    module, clock, seen = METHODS[name], Clock(), []
    preset = module.PRESETS["emoji"]
    config = replace(preset, iterations=iterations, **({"warmup": 0} if name == "advunlearn" else {}))
    # TRCE's frozen model is a merged copy, so that it is told by the missing gradient
    frozen = lambda clock: clock.open[-1] == "forward" and not torch.is_grad_enabled()
    descend, draw, pieces = tuning.optimize, states.cached, []

    def cached(model, place, what, count, make):
        few = min(count, WAYS)
        each = []

        def piece(part):
            begin = time.process_time()
            made = make(part)
            each.append((part.stop - part.start, time.process_time() - begin))
            return made

        with clock.part("states"):
            found = draw(model, place, what, few, piece)
        fastest = min(seconds / rows for rows, seconds in each)
        pieces.append(fastest * count - sum(seconds for _, seconds in each))
        return {name: tensor[torch.arange(count) % few] for name, tensor in found.items()}

    def optimize(label, part, loss, *, callback=None, **settings):
        def forward(*given):
            with clock.part("forward"):
                return loss(*given)

        def after(state):
            clock.turn()
            seen.append(dict(clock.spent))

        with clock.part("update"):
            return descend(label, part, forward, callback=after, **settings)

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for one in (
            clock.timed("text", DiffusionModel, "encode"),
            patch.object(states, "cached", cached),
            patch.object(trce, "cached", cached),
            clock.timed("states", mace, "shown"),
            clock.timed("frozen", UNet2DConditionModel, "forward", frozen),
            clock.timed("attack", advunlearn, "adversary"),
            clock.timed("backward", torch.Tensor, "backward"),
            patch.object(tuning, "optimize", optimize),
        ):
            stack.enter_context(one)
        module.fit(model, "dog", config=config, folder=folder, generator=torch.Generator().manual_seed(0))
        clock.turn()

    steps = [
        {part: b[part] - a.get(part, 0.0) for part in b if part in ITERATION}
        for a, b in zip(seen, seen[1:], strict=False)
    ]
    one = {part: min(step.get(part, 0.0) for step in steps) for part in ITERATION}
    once = {part: clock.spent.get(part, 0.0) for part in ONCE}
    once["states"] += sum(pieces)
    count = preset.iterations
    plain = getattr(preset, "warmup", 0)  # AdvUnlearn's first iterations have no attack
    whole = sum(once.values()) + sum(one.values()) * count - one["attack"] * plain
    clean = lambda parts: {part: round(seconds, 3) for part, seconds in parts.items() if seconds}
    return {
        "iterations": count,
        "once": clean(once),
        "iteration": clean(one),
        "whole": round(whole, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--iterations", type=int, default=8, help="of each method (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument(
        "--before", type=Path, help="what this script wrote at an earlier commit, to be kept beside"
    )
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = ek.load("emoji")
    chosen = "" if given.methods == list(TRAINED) else f" --methods {' '.join(given.methods)}"
    chosen += "" if given.before is None else f" --before {given.before.as_posix()}"
    words = f"--iterations {given.iterations}{chosen} --out {given.out.as_posix()}"
    result = Result(
        f"python benchmarks/training.py {words}", "benchmark", machine=machine(), details={"methods": {}}
    )
    for name in given.methods:
        result.details["methods"][name] = measured(model, name, given.iterations)
        print(name, json.dumps(result.details["methods"][name]), flush=True)
        save(result, given.out)
    if given.before is not None:
        earlier = json.loads(given.before.read_text())
        result.details["before"] = earlier.get("methods") or earlier["details"]["methods"]
        save(result, given.out)


if __name__ == "__main__":
    main()
