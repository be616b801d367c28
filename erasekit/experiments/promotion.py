"""From build/results/ to data/results/: say what a result changes, and take over what is sound.

    python -m erasekit promote                     # what would change, of everything in build/results/
    python -m erasekit promote --write             # and take it over: all of it, or nothing where one file is refused

Two files are the same if they agree in all but when and where they were made: machine, versions, seconds.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from erasekit.evaluate import records
from erasekit.evaluate.metrics import rate
from erasekit.paths import BUILD, RESULTS, write_atomically

FOLDER = BUILD / "results"
CIRCUMSTANCES = re.compile(r"machine|versions|.*seconds.*")


@dataclass(frozen=True)
class Candidate:
    """One result file. state: "new", "same", "differs" or "refused". details: the fields that differ, or what is
    wrong with the file. text: what would be written.
    """

    path: Path
    state: str
    details: tuple[str, ...] = ()
    text: str = ""


def differences(old, new, place: str = "") -> Iterator[str]:
    """The fields in which two results differ, circumstances aside, as "after.target.k: 3 -> 5"."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            field = f"{place}.{key}" if place else key
            if CIRCUMSTANCES.fullmatch(key):
                continue
            if key not in new or key not in old:
                yield f"{field}: {'gone' if key in old else 'added'}"
            else:
                yield from differences(old[key], new[key], field)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{place}[{i}]")
    elif isinstance(old, list) and isinstance(new, list):
        yield f"{place}: {len(old)} -> {len(new)} entries"
    elif old != new:
        yield f"{place}: {_short(old)} -> {_short(new)}"


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def read(path: Path) -> dict:
    """A result as it would be committed. ValueError for a file that is not whole, or not a result of this name."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"), parse_constant=_not_finite)
    except ValueError as error:
        raise ValueError(f"not whole JSON ({error}): make it again") from None
    if not isinstance(result, dict) or not isinstance(result.get("command"), str):
        raise ValueError("no result: it does not name the command that made it")
    command = re.sub(r"(?<=\s)\S*\bbuild/(results|ablations)/", "data/results/", result["command"])
    command = re.sub(r"(?<=\s)\S*\bbuild/edits/", "build/edits/", command)  # wherever build/ was
    if not command.endswith(f" --out data/results/{path.name}"):
        raise ValueError(
            f"made as something else ({_short(command)}): make it with --out build/results/{path.name}"
        )
    return result | {"command": command}


def written(result: dict) -> str:
    """The text of a result's committed file."""
    return json.dumps(result, indent=1) + "\n"


def _not_finite(name: str):
    raise ValueError(f"{name} in it")


def problems(result: dict, subject: dict[str, str]) -> Iterator[str]:
    """What keeps a result from being committed: other weights than those of `subject` (fingerprint, vae, judges; see
    `world.subject`), or rates that do not follow from their counts.
    """
    of = lambda one: one | {f"judge {name}": version for name, version in one.get("judges", {}).items()}
    named = of(result)
    for part, wanted in of(subject).items():
        if part != "judges" and named.get(part) not in (None, wanted):
            yield f"{part} is {_short(named[part])}, of the committed weights {_short(wanted)}: measure it again"
    yield from _wrong_rates(result)


def _wrong_rates(value, place: str = "") -> Iterator[str]:
    if isinstance(value, list):
        for i, one in enumerate(value):
            yield from _wrong_rates(one, f"{place}[{i}]")
    elif isinstance(value, dict):
        if {"k", "n", "rate"} <= value.keys():
            right = rate(value["k"], value["n"]) if 0 <= value["k"] <= value["n"] > 0 else {}
            if not all(math.isclose(value[key], right.get(key, math.nan), abs_tol=1e-4) for key in value):
                yield f"{place} does not follow from its counts: damaged, make it again"
        for key, one in value.items():
            yield from _wrong_rates(one, f"{place}.{key}" if place else key)


def candidate(path: Path, subject: dict[str, str], committed: Path = RESULTS) -> Candidate:
    """One file of build/results/ beside the committed one of the same name. Raises FileNotFoundError."""
    try:
        result = read(path)
    except ValueError as error:
        return Candidate(path, "refused", (str(error),))
    try:
        records.parsed(result, path)
    except (ValueError, TypeError, KeyError) as error:
        return Candidate(path, "refused", (str(error),))
    if wrong := tuple(problems(result, subject)):
        return Candidate(path, "refused", wrong)
    text = written(result)
    there = committed / path.name
    if not there.exists():
        return Candidate(path, "new", (), text)
    changed = tuple(differences(json.loads(there.read_text(encoding="utf-8")), result))
    return Candidate(path, "differs" if changed else "same", changed, text)


def write(candidates: Sequence[Candidate], committed: Path = RESULTS) -> list[Path]:
    """Take over what is new or differs; returns what was written. ValueError, and nothing written, where a file is
    refused.
    """
    if refused := [one.path.name for one in candidates if one.state == "refused"]:
        raise ValueError(f"nothing was written: {', '.join(refused)} cannot be taken over")
    written = []
    for one in candidates:
        if one.state in ("new", "differs"):
            write_atomically(committed / one.path.name, one.text)
            written.append(committed / one.path.name)
    return written
