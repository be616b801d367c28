"""Measurements as they are kept: one record for every number, one layout for every result file.

    found = records.read("uce_church")     # data/results/uce_church.json
    found.value("target", "uce")           # {k, n, rate, low, high}
    found.table()                          # one row for each measurement

A result file is a `Result` in JSON. Its measurements point to the edits by label; "original" is the unedited model,
"no text" the control that knows no concept, and neither is listed among the edits. Numbers stand in `measurements`
alone; `details` has what else an experiment tells: the course of a training, the texts that an attack found.
"""

import itertools
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from erasekit.edits import Edit
from erasekit.evaluate import metrics
from erasekit.evaluate.protocols import Protocol
from erasekit.paths import RESULTS, write_atomically

Kind = Literal["run", "protocol", "attack", "regeneration", "ablation", "search", "deployment", "benchmark"]
ORIGINAL, NO_TEXT = "original", "no text"


@dataclass(frozen=True)
class EditMade:
    """An edit that was measured. variant: its settings that are not the preset's, "pairs=start"; preserved: None where
    that was not written down. digest: of its file, `Edit.digest`.
    """

    method: str
    variant: str
    config: dict
    erased: tuple[str, ...]
    preserved: tuple[str, ...] | None = None
    bytes: int | None = None
    digest: str | None = None

    @classmethod
    def of(cls, edit: Edit, preset) -> "EditMade":
        """preset: the method's Config that the edit's settings are compared with."""
        made, about = edit.metadata, edit.metadata["concepts"]
        variant = changes(made["config"], preset)
        names = tuple(about["erase"]), tuple(about["preserve"])
        return cls(made["method"], variant, made["config"], *names, edit.nbytes, edit.digest)

    @property
    def label(self) -> str:
        """The method and those of the other settings that are words: "rece-start", "trce-text"."""
        values = [part.partition("=")[2] for part in self.variant.split(", ") if part]
        return "-".join([self.method, *(one for one in values if one.isalpha() and one not in NOT_WORDS)])


NOT_WORDS = ("True", "False", "None")


@dataclass(frozen=True)
class Measurement:
    """One number. value: what `metrics.rate` or `metrics.mean` give, {count, n}, {harmonic_mean}, or {value} for what
    has no interval. attack: by which it was reached; step: how the model was used (`evaluate.deployment`).
    model, seconds, machine: None where they are the file's, or not taken.
    """

    measure: str
    value: dict
    edit: str = ORIGINAL
    protocol: str = ""
    hash: str = ""
    attack: str | None = None
    step: str | None = None
    model: str | None = None
    seconds: float | None = None
    machine: dict | None = None


@dataclass(frozen=True)
class Result:
    """A result file. fingerprint, vae: of the model before any edit (None: a benchmark on random weights). judges:
    {name: version}. erased: what it is about.
    """

    command: str
    kind: Kind
    fingerprint: str | None = None
    vae: str | None = None
    judges: dict[str, str] = field(default_factory=dict)
    erased: tuple[str, ...] = ()
    machine: dict = field(default_factory=dict)
    edits: dict[str, EditMade] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()
    details: dict = field(default_factory=dict)

    def value(self, measure: str, edit: str = ORIGINAL, protocol: str | None = None) -> dict:
        """The value of one measurement; KeyError, naming those that there are, unless exactly one fits."""
        fitting = [m for m in self.measurements if (m.measure, m.edit) == (measure, edit)]
        fitting = [m for m in fitting if protocol in (None, m.protocol)]
        if len(fitting) != 1:
            there = ", ".join(f"{m.measure} of {m.edit}" for m in self.measurements)
            raise KeyError(f"{len(fitting)} measurements of {measure} of {edit}; there are {there}")
        return fitting[0].value

    def values(self, edit: str = ORIGINAL, protocol: str | None = None) -> dict[str, dict]:
        """{measure: value} of one edit."""
        return {
            m.measure: m.value for m in self.measurements if m.edit == edit and protocol in (None, m.protocol)
        }

    @property
    def edit(self) -> EditMade:
        """The only edit. ValueError where there are more or none."""
        if len(self.edits) != 1:
            raise ValueError(f"{len(self.edits)} edits were measured: {', '.join(self.edits)}")
        return next(iter(self.edits.values()))

    @property
    def label(self) -> str:
        """The label of the only edit; of a file without one what was measured, "original" or "no text"."""
        return next(iter(self.edits)) if self.edits and self.edit else self.measurements[0].edit

    def protocol(self, measure: str, edit: str = ORIGINAL) -> str:
        """Name and short hash of the protocol of a measurement."""
        found = next(m for m in self.measurements if (m.measure, m.edit) == (measure, edit))
        return f"{found.protocol}-{found.hash[:8]}"

    def table(self) -> pd.DataFrame:
        """One row for each measurement: edit, method, variant, erased, kept (how many concepts, NA where that was not
        written down), bytes, protocol, hash (eight digits), attack, step, measure, k, n, rate (or mean), low, high,
        text.
        """
        rows = []
        for m in self.measurements:
            made = self.edits.get(m.edit)
            about = {
                "edit": m.edit,
                "method": made.method if made else m.edit,
                "variant": made.variant if made else "",
                "erased": self.erased,
                "kept": len(made.preserved) if made and made.preserved is not None else None,
                "bytes": made.bytes if made else None,
                "protocol": m.protocol,
                "hash": m.hash[:8],
                "attack": m.attack,
                "step": m.step,
                "measure": m.measure,
            }
            number = {NUMBERS.get(name, name): one for name, one in m.value.items()}
            rows.append(about | number | {"text": shown(m.value)})
        return pd.DataFrame(rows)


NUMBERS = {"mean": "rate", "harmonic_mean": "rate", "value": "rate"}


def shown(value: dict) -> str:
    """A value as text: "3/151 = 2.0 % [0.7, 5.7]"."""
    if "harmonic_mean" in value:
        return f"{value['harmonic_mean']:.3f}"
    if "value" in value:
        return f"{value['value']:.4f}"
    return f"{value['count']} in {value['n']} pictures" if "count" in value else metrics.text(value)


def paired(
    a: Result | Sequence[Result],
    b: Result | Sequence[Result],
    measure: str | Sequence[str],
    attacks_differ: bool = False,
    resamples: int = metrics.RESAMPLES,
    beside: str | None = None,
) -> dict:
    """`metrics.paired_difference` of a rate in two result files of one protocol, b - a, prompts and seeds resampled.

    a, b: sequences of files are taken one to one, and their pictures together. measure: of attacks "raw", "attack" or
    "alone"; of several the pictures are taken together. attacks_differ: two attacks are compared on the same prompts
    and seeds; of one attack the budgets must agree still. resamples: as there. beside: the measure of b, where it is
    another one. ValueError for two protocols, other pictures, or a file that does not keep every picture's verdict.
    """
    before, after, where = [], [], []
    files = zip(*([one] if isinstance(one, Result) else one for one in (a, b)), strict=True)
    for two, name in itertools.product(files, [measure] if isinstance(measure, str) else measure):
        names = (name, beside or name)
        first, second = (verdicts(one, own) for one, own in zip(two, names, strict=True))
        if attacks_differ and two[0].details.get("attack") != two[1].details.get("attack"):
            names = ("raw", "raw")
        hashes = {
            m.hash for one, own in zip(two, names, strict=True) for m in one.measurements if m.measure == own
        }
        if len(hashes) != 1:
            raise ValueError(
                f"{names[0]} was measured under {len(hashes)} protocols: pairs need the same one"
            )
        if first.keys() != second.keys():
            raise ValueError(f"{name}: {len(first.keys() ^ second.keys())} pictures are in one file alone")
        where += first
        before += first.values()
        after += [second[key] for key in first]
    clusters = list(zip(*where, strict=True))
    return metrics.paired_difference(before, after, np.random.default_rng(0), clusters, resamples)


def differ(pairs: Mapping, level: float = 0.05) -> dict:
    """{name: whether a difference is seen} of pairs (a, b, measure), each as `paired` takes them: its p, adjusted over
    the pairs (Holm's). `metrics.differ` is for counts of independent samples.
    """
    if not pairs:
        return {}
    adjusted = metrics.holm([paired(*pair, resamples=metrics.MANY)["p"] for pair in pairs.values()])
    return {name: p <= level for name, p in zip(pairs, adjusted, strict=True)}


class NoControl(ValueError):
    """An attack has no control: a success does not show that anything is left."""


def control_of(attacked: Result, folder: Path = RESULTS) -> Result:
    """The control of an attack on an edit: the same search from the same prompts on the same UNet behind text encoders
    that know no concept. `NoControl` where the folder has none of this model and protocol, ValueError for a result of
    another kind. A damaged file of the folder is passed over with a warning.
    """
    return _control_among(_controls(folder), attacked, folder)


def _controls(folder: Path) -> list[Result]:
    """The controls of a folder, by name; files of another layout are passed over."""
    found, layout = [], {one.name for one in fields(Result)}
    for path in sorted(folder.glob("*.json")):
        if f'"{NO_TEXT}"'.encode() not in path.read_bytes():
            continue
        try:
            told = _told(path)
        except ValueError as error:
            warnings.warn(f"passed over as a control: {error}", stacklevel=3)
            continue
        if isinstance(told, dict) and set(told) == layout:
            found.append(parsed(told, path))
    return found


def _control_among(controls: Sequence[Result], attacked: Result, folder: Path) -> Result:
    if attacked.kind != "attack" or not attacked.edits or attacked.fingerprint is None:
        about = f"of kind {attacked.kind!r}, edits {list(attacked.edits)}, model {attacked.fingerprint}"
        raise ValueError(
            f"a control stands beside an attack on an edit of a known model; this is a result {about}"
        )
    asked = {m.hash for m in attacked.measurements if m.measure == "attack"}
    for one in controls:
        hashes = {m.hash for m in one.measurements if (m.measure, m.edit) == ("attack", NO_TEXT)}
        if one.fingerprint == attacked.fingerprint and hashes == asked:
            return one
    raise NoControl(
        f"{folder} has no control of this attack: run it with --control in place of --edit ({attacked.command})"
    )


def beside_control(
    attacked: Mapping[str, Result], measure: str = "attack", folder: Path = RESULTS
) -> pd.DataFrame:
    """Every attack beside its control, in pairs: a row for each key with k, n, control (its k), difference (of the
    rates, the attack's less the control's), low, high, p, holm (p adjusted over these rows) and verdict ("fewer",
    "more", or "" where no difference is seen at 5 %).

    measure: as for `paired`. Errors as in `control_of`; ValueError for no attack.
    """
    if not attacked:
        raise ValueError("there is no attack to put beside its control")
    rows, controls = {}, _controls(folder)
    for name, one in attacked.items():
        control, counts = _control_among(controls, one, folder), one.value(measure, one.label)
        found = paired(control, one, measure, resamples=metrics.MANY)
        row = {"k": counts["k"], "n": counts["n"], "control": control.value(measure, NO_TEXT)["k"]}
        rows[name] = row | {key: found[key] for key in ("difference", "low", "high", "p")}
    table = pd.DataFrame.from_dict(rows, orient="index")
    table["holm"] = metrics.holm(table["p"])
    direction = np.where(table["difference"] < 0, "fewer", "more")
    table["verdict"] = np.where(table["holm"] <= 0.05, direction, "")
    return table


ATTACKED = {  # the rates of an attack: what counts of an attempt (`attacks.common.Attempt`, as a dict)
    "raw": lambda one: one["raw"],
    "attack": lambda one: one["raw"] or one["reached"],
    "alone": lambda one: one["reached"],
}


def about(one: Result, name: str) -> Result:
    """What a file says of one edit or step, the verdicts of another left out. A file that keeps them by measure alone
    is given back as it is.
    """
    kept = one.details.get("verdicts", {})
    names = {m.edit for m in one.measurements} | {m.step for m in one.measurements}
    if kept and not kept.keys() & names:
        return one
    own = tuple(m for m in one.measurements if name in (m.edit, m.step))
    return replace(one, measurements=own, details=one.details | {"verdicts": kept.get(name, {})})


def verdicts(one: Result, measure: str) -> dict[tuple[str, int], int]:
    """{(prompt, seed): 0 or 1} behind a rate. ValueError where they were not kept, or for one of several such rates."""
    if (several := sum(m.measure == measure for m in one.measurements)) > 1:
        raise ValueError(
            f"{several} measurements of {measure} in one file: its verdicts cannot be told apart"
        )
    if measure in ATTACKED and isinstance(one.details.get("attempts"), list):
        return {(t["prompt"], t["seed"]): int(ATTACKED[measure](t)) for t in one.details["attempts"]}
    if measure not in one.details.get("verdicts", {}):
        raise ValueError(
            f"no verdicts of {measure} were kept: run it again, {one.command or 'as it was made'}"
        )
    return by_picture(one.details["verdicts"][measure])


def kept(pictures: Iterable[tuple[str, int]], seen: Iterable) -> dict[str, dict]:
    """One measure's verdicts as files keep them: {prompt: {"seeds": [0, 1, 2], "seen": "011"}}. pictures: (prompt,
    seed) of each. `by_picture` reads them.
    """
    found: dict[str, dict] = {}
    for (prompt, seed), verdict in zip(pictures, seen, strict=True):
        of = found.setdefault(prompt, {"seeds": [], "seen": ""})
        of["seeds"].append(seed)
        of["seen"] += str(int(verdict))
    return found


def by_picture(kept: dict[str, dict]) -> dict[tuple[str, int], int]:
    """{(prompt, seed): 0 or 1} of one measure: what `kept` gives."""
    return {
        (prompt, seed): int(verdict)
        for prompt, of in kept.items()
        for seed, verdict in zip(of["seeds"], of["seen"], strict=True)
    }


def measurements(
    measured: dict[str, dict], protocol: Protocol, edit: str = ORIGINAL, **more
) -> list[Measurement]:
    """What `runs.Run.measured` gives, as records."""
    return [
        Measurement(name, value, edit, protocol.name, protocol.hash, **more)
        for name, value in measured.items()
    ]


def changes(config: dict, preset) -> str:
    """The settings that differ from a Config, as "pairs=start, start.lam=0.5"."""
    return ", ".join(f"{name}={value}" for name, value in _changes(config, plain(asdict(preset))))


def _changes(config: dict, preset: dict, place: str = ""):
    for name, value in config.items():
        if isinstance(value, dict) and isinstance(preset.get(name), dict):
            yield from _changes(value, preset[name], f"{place}{name}.")
        elif value != preset.get(name):
            yield f"{place}{name}", value


def plain(value):
    """As JSON gives it back: lists for tuples."""
    return json.loads(json.dumps(value, default=lambda one: asdict(one) if is_dataclass(one) else str(one)))


def save(result: Result, path: Path) -> None:
    """Write a result file."""
    whole = plain(result)
    for one in whole["measurements"]:
        for name in ("attack", "step", "model", "seconds", "machine"):
            if one[name] is None:
                del one[name]
    write_atomically(path, json.dumps(whole, indent=1) + "\n")


def read(name: str | Path, folder: Path = RESULTS) -> Result:
    """A result file by its path, or by its name in a folder. ValueError for a damaged one or another layout."""
    path = name if isinstance(name, Path) else folder / f"{name}.json"
    return parsed(_told(path), path)


def _told(path: Path):
    """What a JSON file has; ValueError, naming it, for a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no whole JSON ({error}): make it anew") from error


def parsed(found: dict, path: Path) -> Result:
    """A `Result` of what its file has. path: for the message."""
    if not isinstance(found, dict) or set(found) != {one.name for one in fields(Result)}:
        raise ValueError(f"{path} is no result file: make it anew with the command that it names")
    edits = {
        label: EditMade(**one | {key: one[key] and tuple(one[key]) for key in ("erased", "preserved")})
        for label, one in found["edits"].items()
    }
    rows = tuple(Measurement(**one) for one in found["measurements"])
    return Result(**found | {"erased": tuple(found["erased"]), "edits": edits, "measurements": rows})


def all_of(*kinds: Kind, folder: Path = RESULTS) -> dict[str, Result]:
    """{name: result} of a folder's files of these kinds (all if none is named)."""
    found = {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
    return {name: one for name, one in found.items() if not kinds or one.kind in kinds}


def tables(results: dict[str, Result] | Sequence[Result]) -> pd.DataFrame:
    """The tables of several results under each other, with their kind and the name of the file."""
    named = results.items() if isinstance(results, dict) else (("", one) for one in results)
    return pd.concat(
        [
            one.table().assign(kind=one.kind, file=name and f"{name}.json")
            for name, one in named
            if one.measurements
        ],
        ignore_index=True,
    )
