"""Many objects erased at once: what is left of them, what of the rest, and at what price.

    python benchmarks/scaling.py mace --out data/results/benchmark_scaling_mace.json
    python benchmarks/scaling.py mace --without-lora --out data/results/benchmark_scaling_mace_without_lora.json
    python benchmarks/scaling.py speed --hundred --out data/results/benchmark_hundred_speed.json

The sets grow: the first 1, 5, 10, 25 and 50 of every other concept of the emoji world. What is kept is the same for all
of them, the concepts that are in none, so that rows differ in the number of erased ones alone. Kept by a method are the
captions of those. With --hundred 100 of the 104 concepts are erased and four kept: a row of its own file, since its
Acc_s and H are about these four. Acc_e and Acc_s are first choices of the judge among all concepts, H is the harmonic
mean of 1 - Acc_e and Acc_s; seconds are those of `fit`, from an empty cache. Rows are kept as they are finished.
"""

import argparse
import tempfile
import time
from dataclasses import asdict, replace
from inspect import signature
from pathlib import Path
from typing import get_args

import erasekit as ek
from erasekit.emoji import data
from erasekit.evaluate import runs, world
from erasekit.evaluate.protocols import Measure, Prompt, Protocol
from erasekit.evaluate.records import EditMade, Measurement, Result, measurements, plain, read, save, shown
from erasekit.methods import METHODS
from erasekit.methods.rece import Pairs

SIZES = (1, 5, 10, 25, 50)
HALF = [c.name for c in data.concepts()][::2][:50]
REST = [c.name for c in data.concepts() if c.name not in HALF]
FOUR = REST[::14]
ERASED = HALF + [name for name in REST if name not in FOUR]


def kept(count: int) -> list[str]:
    """What is kept beside the first `count` of ERASED."""
    return REST if count <= len(HALF) else FOUR


def protocol(erased: list[str], others: list[str], pictures: int = 100) -> Protocol:
    """About `pictures` of the erased concepts and as many of the others, at least two of each, the styles in turn."""
    repeats = -(-pictures // len(erased))

    def asked(names: list[str], times: int, role: str) -> list[Prompt]:
        found = []
        for i, name in enumerate(names):
            for k in range(times):
                style = data.STYLES[(i + k) % len(data.STYLES)]
                found.append(
                    Prompt(f"a {name} in {style} style", name, style, role, seed=k // len(data.STYLES))
                )
        return found

    measures = (
        Measure("Acc_e", ("target",), "emoji-object", goal="low"),
        Measure("Acc_s", ("other",), "emoji-object", goal="high"),
    )
    prompts = (*asked(erased, repeats, "target"), *asked(others, max(2, pictures // len(others)), "other"))
    return Protocol("emoji-many", prompts, measures, summary="H", erased=tuple(erased))


def row(model: ek.DiffusionModel, module, config, count: int) -> tuple[ek.Edit, list[Measurement], dict]:
    """Erase the first `count` concepts by a method and measure; the edit is called by their number. Last the verdicts
    (`runs.Run.verdicts`).
    """
    with tempfile.TemporaryDirectory() as folder:  # what a method caches would make the next row cheaper
        more = {"folder": Path(folder)} if "folder" in signature(module.fit).parameters else {}
        start = time.perf_counter()
        edit = module.fit(model, ERASED[:count], kept(count), config=config, **more)
        seconds = time.perf_counter() - start
    done = runs.run(model, edit, protocol(ERASED[:count], kept(count)), progress=True)
    about = {"seconds": round(seconds, 2), "machine": runs.machine()}
    return edit, measurements(done.measured(), done.protocol, str(count), **about), done.verdicts()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--most", type=int, default=SIZES[-1], choices=SIZES, help="the largest set to erase")
    parser.add_argument("--hundred", action="store_true", help="100 concepts alone, four kept")
    parser.add_argument("--without-lora", action="store_true", help="MACE, RealEra: their closed form alone")
    parser.add_argument("--pairs", choices=get_args(Pairs), help="RECE: the preset's if absent")
    given = parser.parse_args()
    module = METHODS[given.method]
    config = module.PRESETS["emoji"]
    if given.hundred and given.most != SIZES[-1]:
        parser.error("--hundred has one size: leave --most out")
    sizes = (len(ERASED),) if given.hundred else [size for size in SIZES if size <= given.most]
    options = [] if given.most == SIZES[-1] else ["--most", str(given.most)]
    options += ["--hundred"] * given.hundred
    if given.without_lora:
        if not hasattr(config, "lora"):
            parser.error(f"{given.method} has no LoRA to leave out")
        config = replace(config, lora=False)
        options += ["--without-lora"]
    if given.pairs:
        if not hasattr(config, "pairs"):
            parser.error(f"{given.method} has no pairs to choose")
        config = replace(config, pairs=given.pairs)
        options += ["--pairs", given.pairs]
    model = ek.load("emoji")
    words = [given.method, *options, "--out", given.out.as_posix()]
    whole = Result(
        f"python benchmarks/scaling.py {' '.join(words)}",
        "benchmark",
        **world.subject(model),
        erased=tuple(ERASED if given.hundred else HALF),
        details={"kept": kept(max(sizes)), "config": plain(asdict(config)), "kinds": {}, "verdicts": {}},
    )
    if given.out.exists():
        old = read(given.out)
        alike = lambda one: (one.fingerprint, one.details["config"], one.erased, one.details["kept"])
        if alike(old) == alike(whole):
            whole = replace(old, command=whole.command)
    for count in sizes:
        if str(count) not in whole.edits:
            edit, found, verdicts = row(model, module, config, count)
            said = {
                key: whole.details.get(key, {}) | {str(count): one}
                for key, one in (("kinds", edit.kind), ("verdicts", verdicts))
            }
            whole = replace(
                whole,
                edits=whole.edits | {str(count): EditMade.of(edit, module.PRESETS["emoji"])},
                measurements=(*whole.measurements, *found),
                details=whole.details | said,
            )
            save(whole, given.out)
            print(count, {m.measure: shown(m.value) for m in found}, found[0].seconds, "s")


if __name__ == "__main__":
    main()
