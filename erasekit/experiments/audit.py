"""Cells of the grid, drawn by lot and built again from nothing: do they still say what the committed files say?

    python -m erasekit.experiments.audit 5                                  # the next five of the whole grid
    python -m erasekit.experiments.audit 5 --rule objects --rule weapons    # of these rules
    python -m erasekit.experiments.audit 70 --jobs 2                        # two at a time: each has one core
    python -m erasekit.experiments.audit 50 --older --rule objects --keep   # first what was made by older code

The whole grid takes about 45 hours of a core. Here each cell is built by Snakemake in a clone of the last commit, where
no edit, picture or result is kept, and compared with the committed file. The order is that of the SHA-256 of the cells'
names, so nobody chooses; timings (the rule `benchmark`) are left out. With --older the files that keep no verdict of
each picture go first, as files did before comparisons in pairs. data/results/audit.csv has a row for each:

    draw        "lot", or "older"
    verdict     "same": all that `promote` compares, so everything but when and where it was made; "counts": every
                count, but not the last digits of means, of an edit's weights (digest), or what only newer files
                say; "differs"; "failed"
    details     the first three things that differ, or the end of what Snakemake said
    committed   SHA-256 of the committed file
    built       SHA-256 of the file built again, as `promote` would write it. A row counts while the committed file is
                the one or the other (`standing`)
    minutes, machine

With --keep what was built goes to build/results/, and `promote --write` takes it over: a file made long ago then says
all that files say today (verdicts, for comparisons in pairs), and its row still stands.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Lock

import pandas as pd

from erasekit.evaluate import runs
from erasekit.experiments import promotion
from erasekit.paths import RESULTS, ROOT, write_atomically

LOG = RESULTS / "audit.csv"
COLUMNS = ("cell", "draw", "verdict", "details", "committed", "built", "minutes", "machine")
IDENTITY = ("edit", "attack", "step", "protocol", "measure")  # of a measurement, in a file
PROTOCOLS = ("objects", "context", "weapons")
PAIRED = (  # rules whose files keep the verdict of each picture
    *PROTOCOLS,
    "ablation",
    "regeneration",
    "run",
    "train",
    "run_all",
)
LEFT_OUT = ("erase", "benchmark", "uncovered")  # of config.yaml: edits, timings, files that no rule makes


def lot(rules: Sequence[str] = ()) -> list[str]:
    """All cells of these rules of workflow/config.yaml, or of all, in the order they are drawn in. ValueError for a
    rule that is not there.
    """
    import yaml

    grid = yaml.safe_load((ROOT / "workflow" / "config.yaml").read_text(encoding="utf-8"))
    made = {rule: cells for rule, cells in grid.items() if rule not in LEFT_OUT}
    if unknown := set(rules) - made.keys():
        raise ValueError(f"no rule {', '.join(sorted(unknown))}: there are {', '.join(made)}")
    cells = [cell for rule, own in made.items() if not rules or rule in rules for cell in own]
    return sorted(cells, key=lambda cell: hashlib.sha256(cell.encode()).hexdigest())


def committed(cell: str) -> str:
    """SHA-256 of a cell's committed file; "" where there is none."""
    path = RESULTS / f"{cell}.json"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def older(rules: Sequence[str] = PAIRED) -> list[str]:
    """The cells of these rules whose committed files keep no verdicts, in the order of the lot. ValueError for a rule
    whose files never keep any.
    """
    if others := set(rules) - {*PAIRED}:
        raise ValueError(f"--older is for {', '.join(PAIRED)}: files of {', '.join(others)} keep no verdicts")
    return [
        cell for cell in lot(rules) if committed(cell) and not keeps(promotion.read(RESULTS / f"{cell}.json"))
    ]


def keeps(result: dict) -> bool:
    """Whether a result keeps the verdict of each picture, of each of its edits where it keeps them by edit."""
    kept, edits = result["details"].get("verdicts", {}), result["edits"].keys()
    return bool(kept) and (not kept.keys() & edits or edits <= kept.keys())


def rows_of(log: Path) -> pd.DataFrame:
    """All rows; none without a log."""
    return pd.read_csv(log, keep_default_na=False) if log.exists() else pd.DataFrame(columns=list(COLUMNS))


def standing(log: Path = LOG) -> pd.DataFrame:
    """The rows about files that are committed as they were, or as they were built again."""
    rows = rows_of(log)
    now = rows["cell"].map(committed)
    return rows[(now != "") & ((rows["committed"] == now) | (rows["built"] == now))]


def compared(old: dict, new: dict) -> tuple[str, str]:
    """verdict and details of a committed result and the same built again, both as `promotion.read` gives them."""
    if not (found := list(promotion.differences(old, new))):
        return "same", ""
    counts = lambda result: {
        " ".join(one[key] for key in IDENTITY if one.get(key)): {key: one["value"][key] for key in "kn"}
        for one in result["measurements"]
        if "k" in one["value"]
    }
    apart = list(promotion.differences(counts(old), counts(new)))
    return "differs" if apart or not counts(old) else "counts", "; ".join((apart or found)[:3])


def rebuilt(cell: str, clone: Path) -> Path:
    """The result's file, built in a clone of the last commit, on one core. subprocess.CalledProcessError where
    Snakemake fails.
    """
    subprocess.run(["git", "clone", "--quiet", "--shared", ROOT, clone], check=True, capture_output=True)
    words = [sys.executable, "-m", "snakemake", "--snakefile", "workflow/Snakefile", "--cores", "1"]
    subprocess.run(
        [*words, "--quiet", "all", "--", f"build/results/{cell}.json"],
        cwd=clone,
        env=os.environ | {"PYTHONPATH": str(clone)},
        check=True,
        capture_output=True,
        text=True,
    )
    return clone / "build" / "results" / f"{cell}.json"


def audited(cell: str, draw: str, keep: Path | None = None) -> dict:
    """A row of the log. draw: "lot" or "older". keep: a folder for what was built."""
    start, machine, built = time.perf_counter(), runs.machine(), ""
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = rebuilt(cell, Path(folder) / "clone")
        except subprocess.CalledProcessError as error:
            verdict, details = "failed", " ".join((error.stderr or "").split())[-200:]
        else:
            new = promotion.read(path)
            verdict, details = compared(promotion.read(RESULTS / path.name), new)
            machine, built = new["machine"], hashlib.sha256(promotion.written(new).encode()).hexdigest()
            if keep:
                write_atomically(keep / path.name, path.read_text(encoding="utf-8"))
    told = ("processor", "vector_instructions", "threads", "torch", "accelerator")
    about = ", ".join(str(machine[key]) for key in told if key in machine)
    minutes = round((time.perf_counter() - start) / 60, 1)
    row = (cell, draw, verdict, details, committed(cell), built, minutes, about)
    return dict(zip(COLUMNS, row, strict=True))


def note(row: dict, log: Path) -> None:
    """Put a row at the end of the log; an older one of the same cell goes."""
    older = [one for one in rows_of(log).to_dict("records") if one["cell"] != row["cell"]]
    text = pd.DataFrame([*older, row], columns=list(COLUMNS)).to_csv(index=False, lineterminator="\n")
    write_atomically(log, text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", type=int, help="how many more cells")
    parser.add_argument(
        "--rule", action="append", default=[], help="of workflow/config.yaml; repeat for more"
    )
    parser.add_argument("--older", action="store_true", help="first the files without verdicts")
    parser.add_argument("--jobs", type=int, default=1, help="cells built at the same time")
    parser.add_argument("--keep", action="store_true", help="what is built, in build/results/")
    parser.add_argument("--log", type=Path, default=LOG)
    given = parser.parse_args(arguments)
    if find_spec("snakemake") is None:
        parser.error('Snakemake is not installed: pip install -e ".[workflow]"')
    if not (ROOT / ".git").exists():
        parser.error(f"{ROOT} is no git checkout: clone the repository, a cell is built from its last commit")
    try:
        first = older(given.rule or PAIRED) if given.older else []
        cells = list(dict.fromkeys([*first, *lot(given.rule)]))
    except ValueError as error:
        parser.error(str(error))
    done = set(standing(given.log)["cell"])
    drawn = [cell for cell in cells if cell not in done][: given.count]
    one_at_a_time, stopped = Lock(), Event()

    def work(cell: str) -> None:
        row = audited(cell, "older" if cell in first else "lot", promotion.FOLDER if given.keep else None)
        if stopped.is_set() and row["verdict"] == "failed":
            return  # what stopped this command has stopped its Snakemake too
        with one_at_a_time:
            note(row, given.log)
            print(f"{row['verdict']:8} {cell}, {row['minutes']} minutes  {row['details']}", flush=True)

    with ThreadPoolExecutor(given.jobs) as pool:
        try:
            for future in [pool.submit(work, cell) for cell in drawn]:
                future.result()
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
