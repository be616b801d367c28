"""What `runs` keeps on disk, and making room.

    kept.table()                          # a row for each model with its edits, sampler and steps
    kept.free(older=30, delete=False)     # what has not been touched for so many days

A run is a folder by the name of a key (`runs.model_key`) with pictures or scores in it; other folders are let be.
Pictures are shared by protocols, so a folder is kept or given up whole.
"""

import json
import re
import shutil
import time
from pathlib import Path

import pandas as pd

from erasekit.evaluate.runs import RUNS

DAY = 24 * 3600
KEY = "[0-9a-f]{24}"
COLUMNS = ["run", "protocols", "edits", "sampler", "pictures", "megabytes", "days"]


def table(folder: Path = RUNS) -> pd.DataFrame:
    """The runs of a folder, the one untouched for longest first: run (its folder's name), protocols (that were drawn to
    the end), edits (how what was in force begins, or "none"), sampler, pictures, megabytes, days (since anything was
    written).
    """
    return _untouched(folder, 0).round({"days": 1})


def _untouched(folder: Path, older: float) -> pd.DataFrame:
    """The rows of `table` of at least so many days, which are not rounded."""
    rows = []
    for place in sorted(one for one in folder.glob("*") if re.fullmatch(KEY, one.name)):
        if not any((place / part).is_dir() for part in ("pictures", "scores")):
            continue
        files = [one for one in place.rglob("*") if one.is_file()]
        told = [json.loads(one.read_text()) for one in sorted(place.glob("*.json"))]
        last = max((one.stat().st_mtime for one in files), default=place.stat().st_mtime)
        protocols = [one["protocol"] for one in told]
        rows.append(
            {
                "run": place.name,
                "protocols": ", ".join(dict.fromkeys(one["name"] for one in protocols)) or "none to the end",
                "edits": ", ".join(dict.fromkeys(text[:40] for one in told for text in one["edit"]))
                or "none",
                "sampler": ", ".join(dict.fromkeys(f"{one['sampler']}, {one['steps']}" for one in protocols)),
                "pictures": sum(one.suffix == ".webp" for one in files),
                "megabytes": round(sum(one.stat().st_size for one in files) / 1e6, 1),
                "days": max(0, time.time() - last) / DAY,
            }
        )
    found = pd.DataFrame([row for row in rows if row["days"] >= older], columns=COLUMNS)
    return found.sort_values("days", ascending=False, ignore_index=True)


def free(older: float, folder: Path = RUNS, *, delete: bool = False) -> pd.DataFrame:
    """The rows of `table` that were not touched for `older` days or longer (0: all); with `delete` pictures and scores
    are removed, and a protocol that asks for them draws them again. ValueError for a negative number of days.
    """
    if older < 0:
        raise ValueError(f"days must be 0 or more, got {older}")
    found = _untouched(folder, older)
    if delete:
        for name in found["run"]:
            (folder / name).rename(folder / f".{name}.deleted")  # at once: a half-deleted run is no run
        for away in folder.glob(".*.deleted"):  # those of a call that was killed too
            if re.fullmatch(rf"\.{KEY}\.deleted", away.name):
                shutil.rmtree(away)
    return found.round({"days": 1})
