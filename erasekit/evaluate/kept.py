"""What `runs` keeps on disk, and making room.

    kept.table()                          # a row for each model with its edits, sampler and steps
    kept.free(older=30, delete=False)     # what has not been touched for so many days

Pictures are shared by protocols, so a folder is kept or given up whole.
"""

import json
import shutil
import time
from pathlib import Path

import pandas as pd

from erasekit.evaluate.runs import RUNS

DAY = 24 * 3600
COLUMNS = ["run", "protocols", "edits", "sampler", "pictures", "megabytes", "days"]


def table(folder: Path = RUNS) -> pd.DataFrame:
    """The runs of a folder, the one untouched for longest first: run (its folder's name), protocols (that were drawn to
    the end), edits (how what was in force begins, or "none"), sampler, pictures, megabytes, days (since anything was
    written).
    """
    rows = []
    for place in sorted(one for one in folder.glob("*") if one.is_dir()):
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
                "days": round((time.time() - last) / DAY, 1),
            }
        )
    found = pd.DataFrame(rows, columns=COLUMNS)
    return found.sort_values("days", ascending=False, ignore_index=True)


def free(older: float, folder: Path = RUNS, *, delete: bool = False) -> pd.DataFrame:
    """The rows of `table` that were not touched for more than `older` days; with `delete` pictures and scores are
    removed, and a protocol that asks for them draws them again. ValueError for a negative number of days.
    """
    if older < 0:
        raise ValueError(f"days must be 0 or more, got {older}")
    found = table(folder)
    found = found[found["days"] > older].reset_index(drop=True)
    for name in found["run"] if delete else ():
        away = (folder / name).rename(folder / f".{name}.deleted")  # at once: a half-deleted run is no run
        shutil.rmtree(away)
    return found
