"""Runs: draw a protocol's pictures, keep them and every judge's raw scores, and read rates from the scores.

    run = evaluate.run(model, edit, protocols.objects("automobile"))
    run.table()                                      # k/n, interval, protocol hash
    evaluate.compare({"before": before, "UCE": run})  # one protocol only

On disk, below build/runs/:

    <key>/                    key: hash of model, VAE, edits, attack, sampler, steps
        pictures/<shot>.webp  lossless; shot: hash of prompt, seed, guidance
        pictures.<rank>.jsonl one sealed line a picture: its file's SHA-256
        scores/<judge>.<rank>.jsonl  one sealed line a picture: the raw record
        <protocol>.json       manifest: versions, machine, seconds of each phase, peak memory

A picture is found by what it depends on: a run that was killed goes on, another protocol with the same prompt draws
nothing, and reading scores another way touches no picture. Lines carry their own checksum and are appended in whole
pieces.
"""

import fcntl
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from PIL import Image
from tqdm.auto import tqdm

from erasekit.edits import Edit, applied
from erasekit.evaluate import metrics
from erasekit.evaluate.judges import FEATURES, JUDGES, SURE, checked
from erasekit.evaluate.protocols import Measure, Prompt, Protocol
from erasekit.evaluate.records import EditMade, Result, kept, measurements, shown
from erasekit.models import DiffusionModel
from erasekit.paths import BUILD, replacing, write_atomically
from erasekit.sampling import config_of, switched
from erasekit.states import unusual

if TYPE_CHECKING:
    from erasekit.evaluate.deployment import Step

PIECE = 64  # pictures that are drawn, judged and written together: what a kill can cost
RUNS = BUILD / "runs"
OUTCOMES = ("still there", "something else", "nothing")


@dataclass(frozen=True)
class Shot:
    """One picture of a protocol."""

    prompt: Prompt
    seed: int
    guidance: float

    @property
    def key(self) -> str:
        text = json.dumps([self.prompt.text, self.seed, self.guidance])
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def shots(protocol: Protocol) -> list[Shot]:
    """The protocol's pictures: every prompt with every seed, or with its own."""
    pairs = [(p, s) for s in protocol.seeds for p in protocol.prompts if p.seed is None]
    pairs += [(p, p.seed) for p in protocol.prompts if p.seed is not None]
    return [Shot(p, s, protocol.guidance if p.guidance is None else p.guidance) for p, s in pairs]


# Sealed lines


def _sealed(record: dict) -> bytes:
    body = json.dumps(record).encode()
    return hashlib.sha256(body).hexdigest()[:16].encode() + b" " + body + b"\n"


def append_sealed(path: Path, records: Iterable[dict]) -> None:
    """Write records at the end, after cutting off a line that a kill left unfinished; one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until closed
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(b"".join(map(_sealed, records)))
        file.flush()
        os.fsync(file.fileno())


def read_sealed(folder: Path, stem: str) -> dict[str, dict]:
    """{shot: record} of all ranks' files; ValueError naming a damaged line."""
    found = {}
    for path in sorted(folder.glob(f"{stem}.*.jsonl")):
        *lines, _unfinished = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            seal, _, body = line.partition(b" ")
            if hashlib.sha256(body).hexdigest()[:16].encode() != seal:
                raise ValueError(
                    f"{path} is damaged in line {number}: delete that line, and a new run makes it again"
                )
            record = json.loads(body)
            found[record["shot"]] = record
    return found


def _score_stem(judge) -> str:
    name = "".join(c if c.isalnum() or c in "-_" else "-" for c in judge.name)
    return f"{name}-{hashlib.sha256(judge.version.encode()).hexdigest()[:12]}"


# A run


@dataclass(frozen=True, eq=False)
class Run:
    """Finished pictures and raw scores of one model, edit and protocol."""

    folder: Path
    protocol: Protocol
    manifest: dict

    def pictures(self) -> Iterator[tuple[Shot, Image.Image]]:
        """Shots and their pictures; ValueError for a file that is not what was written."""
        index = read_sealed(self.folder, "pictures")
        for shot in shots(self.protocol):
            yield shot, _picture(self.folder, shot, index)

    def features(self, name: str) -> np.ndarray:
        """The named features of every picture, (n, width), in the protocol's order."""
        return FEATURES[name]([picture for _, picture in self.pictures()])

    def hashes(self) -> list[str]:
        """SHA-256 of every picture's pixels, in the protocol's order."""
        index = read_sealed(self.folder, "pictures")
        return [index[shot.key]["pixels"] for shot in shots(self.protocol)]

    def scores(self, judge: str) -> list[dict | list]:
        """The raw record of every picture, in the protocol's order."""
        found = read_sealed(self.folder / "scores", _score_stem(JUDGES[judge]()))
        if missing := sum(shot.key not in found for shot in shots(self.protocol)):
            raise ValueError(
                f"{missing} pictures have no score of {judge}: run the protocol again, it goes on"
            )
        return [found[shot.key]["record"] for shot in shots(self.protocol)]

    def values(self, measure: Measure) -> np.ndarray:
        """(n,) verdicts 0/1, counts or scores of the pictures that the measure is about."""
        pairs = zip(shots(self.protocol), self.scores(measure.judge), strict=True)
        return np.array([reading(measure, s.prompt, r) for s, r in pairs if s.prompt.role in measure.roles])

    def clusters(self, measure: Measure) -> tuple[list[str], list[int]]:
        """Prompt and seed of each of `values`."""
        about = [shot for shot in shots(self.protocol) if shot.prompt.role in measure.roles]
        return [shot.prompt.text for shot in about], [shot.seed for shot in about]

    def measured(self) -> dict[str, dict]:
        """{measure: rate, mean or count}, and the protocol's harmonic mean under its name."""
        found, kept = {}, []
        for measure in self.protocol.measures:
            values = self.values(measure)
            if measure.rule == "mean":
                found[measure.name] = metrics.mean(values, np.random.default_rng(0))
            elif measure.rule == "count":
                found[measure.name] = {"count": int(values.sum()), "n": len(values)}
            else:
                found[measure.name] = metrics.rate(int(values.sum()), len(values))
            if measure.goal:
                value = found[measure.name].get("rate", found[measure.name].get("mean"))
                kept.append(value if measure.goal == "high" else 1 - value)
        if self.protocol.summary:
            found[self.protocol.summary] = {"harmonic_mean": round(metrics.harmonic_mean(kept), 5)}
        return found

    def curve(self, measure: Measure, thresholds: Sequence[float] | None = None) -> pd.DataFrame:
        """A rate against its threshold, from the raw scores: {threshold, k, n, rate, low, high}, one row each.

        thresholds: 0, 0.05 ... 1 when None. ValueError for a measure whose rule has no threshold.
        """
        if measure.rule not in ("any", "first_listed"):
            raise ValueError(f'{measure.name}: the rule "{measure.rule}" gives no rate with a threshold')
        rows = []
        for threshold in np.linspace(0, 1, 21) if thresholds is None else thresholds:
            values = self.values(replace(measure, threshold=float(threshold)))
            rows.append({"threshold": float(threshold)} | metrics.rate(int(values.sum()), len(values)))
        return pd.DataFrame(rows)

    def read_as(self, protocol: Protocol) -> "Run":
        """The same pictures under another protocol's measures. Nothing is drawn or judged."""
        if {shot.key for shot in shots(protocol)} - {shot.key for shot in shots(self.protocol)}:
            raise ValueError(f"{protocol.name} asks for pictures that this run does not have")
        if (protocol.sampler, protocol.steps) != (self.protocol.sampler, self.protocol.steps):
            raise ValueError(f"{protocol.name} samples otherwise than this run")
        judges = {one.judge: JUDGES[one.judge]().version for one in protocol.measures}
        return Run(self.folder, protocol, {**self.manifest, "judges": judges})

    def table(self) -> pd.DataFrame:
        """One row per measure: what it counts, the number with its interval, the protocol's hash."""
        return pd.DataFrame(
            {
                "measure": list(found := self.measured()),
                "value": [shown(value) for value in found.values()],
                "erased": ", ".join(self.protocol.erased) or "-",
                "protocol": self.protocol.short,
            }
        )

    def result(self, command: str = "", made: EditMade | None = None) -> Result:
        """The measurements with all that they depend on, to be committed; in `details` the `verdicts`, by which two
        files are compared in pairs (`records.paired`), and the `outcomes`. made: the edit, if there is one.
        """
        edits = {made.label: made} if made else {}
        told = self.manifest
        return Result(
            command, "protocol", told["model"], told["vae"], told["judges"], self.protocol.erased, told["machine"],
            edits, tuple(measurements(self.measured(), self.protocol, *edits)),
            {"versions": told["versions"], "verdicts": self.verdicts(), "outcomes": self.outcomes()},
        )  # fmt: skip

    def verdicts(self) -> dict[str, dict[str, dict]]:
        """{measure: `records.kept`} of all rates."""
        return {
            measure.name: kept(zip(*self.clusters(measure), strict=True), self.values(measure))
            for measure in self.protocol.measures
            if measure.rule not in ("mean", "count")
        }

    def outcomes(self) -> dict[str, dict[str, int]]:
        """{measure: {"still there", "something else", "nothing": pictures}} of what is erased, by a classifier's first
        choice: where that is another label, is the judge sure of it (`judges.SURE`), or of nothing?
        """
        found = {}
        for measure in self.protocol.measures:
            # or a high share of others, as UnlearnCanvas's UA
            if measure.rule != "first" or measure.goal != ("high" if measure.negate else "low"):
                continue
            about = zip(shots(self.protocol), self.scores(measure.judge), strict=True)
            asked = [(shot.prompt, record) for shot, record in about if shot.prompt.role in measure.roles]
            sure = np.array([max(record.values()) >= SURE for _, record in asked])
            still = np.array([reading(measure, *one) for one in asked]) == (0 if measure.negate else 1)
            counts = still, ~still & sure, ~still & ~sure
            found[measure.name] = dict(zip(OUTCOMES, (int(one.sum()) for one in counts), strict=True))
        return found


def reading(measure: Measure, prompt: Prompt, record: dict | list) -> float:
    """What a measure makes of one raw record: 0 or 1, a count, or a score."""
    labels = measure.labels or (getattr(prompt, measure.asked),)
    if labels == (None,):
        raise ValueError(
            f"{measure.name}: the prompt {prompt.text!r} does not say what it shows; give labels"
        )
    if isinstance(record, list):
        reached = [one for one in record if one["label"] in labels and one["score"] >= measure.threshold]
        if measure.rule == "count":
            return float(len(reached))
        if measure.rule == "first_listed":
            listed = [one for one in record if one["label"] in labels][:1]
            reached = [one for one in listed if one["score"] >= measure.threshold]
        elif measure.rule != "any":
            raise ValueError(f'{measure.name}: the rule "{measure.rule}" does not fit a detector')
        yes = bool(reached)
    else:
        if unknown := set(labels) - set(record):
            known = ", ".join([*record][:10]) + (", ..." if len(record) > 10 else "")
            raise ValueError(
                f"{measure.name}: {measure.judge} knows no label {', '.join(sorted(unknown))}; it knows {known}"
            )
        if measure.rule == "mean":
            return float(sum(record[label] for label in labels))
        if measure.rule == "first":
            yes = max(record, key=record.get) in labels
        elif measure.rule == "any":
            yes = any(record[label] >= measure.threshold for label in labels)
        else:
            raise ValueError(f'{measure.name}: the rule "{measure.rule}" needs a detector')
    return float(yes != measure.negate)


# Making a run


def run(
    model: DiffusionModel,
    edit: Edit | None,
    protocol: Protocol,
    *,
    attack: torch.Tensor | None = None,
    step: "Step | None" = None,
    folder: Path = RUNS,
    progress: bool = True,
) -> Run:
    """Draw and judge what is missing of a protocol, and return the run. Kill it anywhere and call it again.

    edit: applied for the run (None: the model as it is, with the edits already in force). attack: (d, d) matrix G;
    rows x of the prompts' embeddings are replaced by x G^T (the pooled text of SDXL stays). step: a way of use, see
    `deployment.steps`. Under `accelerate launch` or torchrun the pieces are shared out among the processes; the
    pictures are the same for any number. Raises RuntimeError where a judge fails: no picture counts as safe that was
    not judged; ValueError for an attack and a step at once.
    """
    if attack is not None and step is not None:
        raise ValueError("give an attack or a step, not both")
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    state = PartialState(cpu=not torch.cuda.is_available()) if several else None
    rank, processes = (state.process_index, state.num_processes) if state else (0, 1)
    whole = edit if step is None else None  # a step applies the edit in its own way
    with applied(whole, model), sampled_by(model, protocol.sampler):
        in_force = model.edits_in_force() + ([step.key(edit)] if step else [])
        key = model_key(model, in_force, protocol, attack)
        place = folder / key
        seconds = {"draw": 0.0, "judge": 0.0}
        index = read_sealed(place, "pictures")
        wanted = list({shot.key: shot for shot in shots(protocol)}.values())
        judges = [JUDGES[name]() for name in protocol.judges]
        judged = {judge.name: read_sealed(place / "scores", _score_stem(judge)) for judge in judges}
        pieces = [wanted[i : i + PIECE] for i in range(0, len(wanted), PIECE)][rank::processes]
        drawn = 0
        with tqdm(
            total=sum(map(len, pieces)), unit="picture", desc=protocol.short, disable=not progress
        ) as bar:
            for piece in pieces:
                missing = [shot for shot in piece if shot.key not in index or not _file(place, shot).exists()]
                with _timed(seconds, "draw"):
                    new = _draw(model, missing, protocol, attack, place, rank, step, edit)
                drawn += len(new)
                index |= {record["shot"]: record for record in new}
                with _timed(seconds, "judge"):
                    for judge in judges:
                        todo = [shot for shot in piece if shot.key not in judged[judge.name]]
                        _judge(judge, todo, index, place, rank, protocol.measures)
                bar.update(len(piece))
    if state:
        state.wait_for_everyone()
    manifest = {
        "protocol": {"hash": protocol.hash, **asdict(protocol)},
        "model": model.fingerprint(),
        "vae": model.vae_fingerprint(),
        "edit": in_force,
        "judges": {judge.name: judge.version for judge in judges},
        "versions": {
            name: installed(name) for name in ("torch", "diffusers", "transformers", "numpy", "pillow")
        },
        "machine": machine(),
        "last": {
            "drawn": drawn,
            "processes": processes,
            "seconds": {phase: round(spent, 2) for phase, spent in seconds.items()},
            "peak_memory_mb": peak_memory_mb(),
        },
    }
    if rank == 0:
        write_atomically(place / f"{protocol.short}.json", json.dumps(manifest, indent=1) + "\n")
    return Run(place, protocol, manifest)


def compare(runs: Mapping[str, Run], progress: bool = False) -> pd.DataFrame:
    """Runs side by side, one row per measure. Beside every run after the first: the difference to the first over the
    same prompts and seeds, with a 95 % interval (`metrics.paired_difference`, resampling prompts and seeds), and a star
    where its p value, adjusted for all differences of the table (`metrics.holm`), is at most 0.05; below, distances of
    features.

    Raises ValueError for runs of two protocols: their numbers do not belong into one table.
    """
    if not runs:
        raise ValueError("there is no run to compare")
    hashes = {name: run.protocol.hash for name, run in runs.items()}
    if len(set(hashes.values())) > 1:
        listed = ", ".join(f"{name}: {run.protocol.short}" for name, run in runs.items())
        raise ValueError(
            f"numbers of different protocols are not comparable ({listed}): run all under one protocol"
        )
    (first_name, first), *others = runs.items()
    columns = {"measure": [], "protocol": [], first_name: []} | {
        column: [] for name, _ in others for column in (name, f"{name} - {first_name}")
    }
    measured = {name: run.measured() for name, run in runs.items()}
    comparisons = len(first.protocol.measures) * len(others)
    enough = max(metrics.RESAMPLES, 400 * comparisons)  # the smallest p, adjusted, is 0.005
    differences = {
        (measure.name, name): metrics.paired_difference(
            first.values(measure),
            other.values(measure),
            np.random.default_rng(0),
            first.clusters(measure),
            enough,
        )
        for measure in first.protocol.measures
        for name, other in others
    }
    holm = metrics.holm([found["p"] for found in differences.values()]) if differences else []
    adjusted = dict(zip(differences, holm, strict=True))
    for row in measured[first_name]:
        columns["measure"].append(row)
        columns["protocol"].append(first.protocol.short)
        for name in runs:
            columns[name].append(shown(measured[name][row]))
        for name, _ in others:
            found = differences.get((row, name))
            cell = "" if found is None else "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**found)
            columns[f"{name} - {first_name}"].append(cell + " *" * (adjusted.get((row, name), 1) <= 0.05))
    for feature in first.protocol.features if others else ():
        rows = {
            name: run.features(feature)
            for name, run in tqdm(runs.items(), desc=feature, disable=not progress)
        }
        found = {name: distances(rows[first_name], rows[name]) for name, _ in others}
        for label in DISTANCES:
            columns["measure"].append(f"{label}, {feature}")
            columns["protocol"].append(first.protocol.short)
            columns[first_name].append("reference")
            for name, _ in others:
                columns[name].append(f"{found[name][label]:.4f}, n = {found[name]['n']}")
                columns[f"{name} - {first_name}"].append("")
    return pd.DataFrame(columns)


DISTANCES = {"Frechet": metrics.frechet_distance, "KID": metrics.kid, "CMMD": metrics.cmmd}


def distances(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Frechet distance, KID and CMMD of the features of two runs' pictures, and how many pictures (n)."""
    return {name: round(float(of(a, b)), 5) for name, of in DISTANCES.items()} | {"n": len(b)}


def machine() -> dict[str, str | int]:
    """What a timing depends on, and the last bits of a number: another count of threads adds in another order."""
    import platform

    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }


def peak_memory_mb() -> int:
    """Highest resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)


def model_key(
    model: DiffusionModel, applied: list[str], protocol: Protocol, attack: torch.Tensor | None
) -> str:
    attacked = None
    if attack is not None:
        attacked = hashlib.sha256(attack.double().contiguous().cpu().numpy().tobytes()).hexdigest()
    # where the model stands matters too: a GPU rounds otherwise
    settings = [
        model.fingerprint(),
        model.vae_fingerprint(),
        applied,
        attacked,
        protocol.sampler,
        protocol.steps,
    ]
    settings += [config_of(model.scheduler), str(model.dtype), model.device.type]
    if not model.own_loop:  # of SDXL, what guidance leads away from
        settings.append(model.pipeline.config.get("force_zeros_for_empty_prompt"))
    settings += unusual(model)
    return hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode()).hexdigest()[:24]


@contextmanager
def sampled_by(model: DiffusionModel, name: str) -> Iterator[None]:
    """Inside the block the model draws by this scheduler of diffusers. ValueError where there is none of that name."""
    scheduler = model.pipeline.scheduler
    if type(scheduler).__name__ == name:
        yield
        return
    cls = getattr(diffusers, name, None)
    if cls is None or not hasattr(cls, "from_config"):
        raise ValueError(f"diffusers has no sampler {name!r}")
    model.pipeline.scheduler = switched(scheduler, cls)
    try:
        yield
    finally:
        model.pipeline.scheduler = scheduler


@contextmanager
def _timed(seconds: dict, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] += time.perf_counter() - start


def _draw(model, missing: Sequence[Shot], protocol, attack, place: Path, rank: int, step, edit) -> list[dict]:
    records = []
    for guidance in dict.fromkeys(shot.guidance for shot in missing):
        part = [shot for shot in missing if shot.guidance == guidance]
        texts, seeds = [shot.prompt.text for shot in part], [shot.seed for shot in part]
        sampling = {"steps": protocol.steps, "guidance": guidance}
        if step is not None:
            pictures = step.draw(model, edit, texts, seeds, **sampling)
        else:
            told = model.conditioning(texts)
            if attack is not None:
                rows = told.rows.double() @ attack.double().to(told.rows.device).T
                told = told.with_rows(rows.to(told.rows.dtype))
            pictures = model.draw(told, seeds, **sampling)
        for shot, picture in zip(part, pictures, strict=True):
            file = _file(place, shot)
            with replacing(file) as temporary:
                picture.save(temporary, "WEBP", lossless=True, quality=60, exact=True)
            hashes = {"file": file.read_bytes(), "pixels": np.asarray(picture).tobytes()}
            records.append({"shot": shot.key} | {k: hashlib.sha256(v).hexdigest() for k, v in hashes.items()})
    if records:
        append_sealed(place / f"pictures.{rank}.jsonl", records)
    return records


def _judge(
    judge, todo: Sequence[Shot], index: dict, place: Path, rank: int, measures: Sequence[Measure]
) -> None:
    """Judge, keep the records, and see that they can be read: a wrong label is told before the rest is drawn."""
    if not todo:
        return
    pictures = [_picture(place, shot, index) for shot in todo]
    records = checked(judge, pictures, [shot.prompt.text for shot in todo])
    lines = [{"shot": shot.key, "record": record} for shot, record in zip(todo, records, strict=True)]
    append_sealed(place / "scores" / f"{_score_stem(judge)}.{rank}.jsonl", lines)
    for measure in measures:
        if measure.judge == judge.name:
            for shot, record in zip(todo, records, strict=True):
                if shot.prompt.role in measure.roles:
                    reading(measure, shot.prompt, record)


def _file(place: Path, shot: Shot) -> Path:
    return place / "pictures" / f"{shot.key}.webp"


def _picture(place: Path, shot: Shot, index: dict[str, dict]) -> Image.Image:
    file = _file(place, shot)
    if shot.key not in index:
        raise ValueError(
            f"the picture of {shot.prompt.text!r} was not drawn: run the protocol again, it goes on"
        )
    if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != index[shot.key]["file"]:
        raise ValueError(
            f"{file} ({shot.prompt.text!r}, seed {shot.seed}) is damaged or gone: "
            "delete it, and a new run draws it again"
        )
    with Image.open(file) as opened:
        return opened.convert("RGB")
