"""Does the regeneration radius (`erasekit.evaluate.radius`) tell how often an attack succeeds, without attacking?

    python benchmarks/regeneration_radius.py --out data/results/benchmark_regeneration_radius.json

1. tau, by pictures: the unedited model draws embeddings whose answer is a given distance from a concept's, on the way
   to another concept and in random directions; at which distance does the judge stop seeing the concept?
2. Radii of edits of "dog" and of the seven weapons (their mean), from the concept's own prompt and from the nearest of
   all other concepts' prompts.
3. Their order beside that of UnlearnDiffAtk's successes on the same edits, as committed: Kendall's tau-b, and its p.

The edits have the settings of the attacked ones: `build/edits/METHOD_CONCEPT.safetensors`, which `workflow/Snakefile`
makes; a row whose edit is not there any more stays as it was solved. `attack` has the digest of the edit that was
attacked (null in older files); RECE's on weapons is another, solved by two threads. Edits of more than keys and values
(ESD, AdvUnlearn, TRCE with both stages) and filters have no radius.
"""

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from scipy.stats import kendalltau

import erasekit as ek
from erasekit.emoji import data
from erasekit.evaluate import world
from erasekit.evaluate.judges import JUDGES
from erasekit.evaluate.radius import Response, radius, response
from erasekit.evaluate.records import Result, read, save
from erasekit.evaluate.runs import machine
from erasekit.models import DiffusionModel

TAUS = (0.2, 0.4, 0.6, 0.8)
PICTURES = 100  # for each distance and kind of direction
DOG = ("uce", "rece", "rece-start", "dp", "speed", "oce", "mace", "realera")
WEAPON = ("uce", "rece", "rece-start", "dp", "speed", "oce", "mace", "trce-text")


def prompt(model: DiffusionModel, name: str) -> torch.Tensor:
    return model.encode(f"a {name}")[0].double()


def calibrated(model: DiffusionModel, of: Response) -> dict[str, list[dict]]:
    """How often the concept is seen at each distance of TAUS, by kind of direction."""
    generator = torch.Generator().manual_seed(0)
    names = [one.name for one in data.concepts()]
    neutral, judge = model.encode("")[0].double(), JUDGES["emoji-object"]()
    found = {"to another concept": [], "at random": []}
    for kind, counts in found.items():
        for tau in TAUS:
            rows, concepts = [], []
            for _ in range(PICTURES):
                own, other = (names[i] for i in torch.randperm(len(names), generator=generator)[:2])
                c = prompt(model, own)
                way = prompt(model, other) - c
                if kind == "at random":
                    way = torch.randn(way.shape, generator=generator, dtype=way.dtype)
                rows.append(c + tau / of.distance(c + way, c, neutral) * way)
                concepts.append(own)
            pictures = model.draw(torch.stack(rows).float(), list(range(PICTURES)))
            scores = judge.scores(pictures, concepts)
            hits = sum(max(one, key=one.get) == name for one, name in zip(scores, concepts, strict=True))
            counts.append({"tau": tau, "seen": hits, "of": PICTURES})
            print(kind, counts[-1], flush=True)
    return found


def finite(number: float) -> float | None:
    """None where no embedding is near enough, or all are as near and there is no order: JSON has no such number."""
    return float(number) if math.isfinite(number) else None


def radii_of(
    model: DiffusionModel, edit: ek.Edit, erased: list[str], every: dict, neutral: torch.Tensor
) -> dict:
    """Mean radius of the erased concepts at each of TAUS, from their own prompt and from the nearest other one."""
    of, began = response(model, edit), time.perf_counter()
    row = {"digest": edit.digest}
    starts = [rows for name, rows in every.items() if name not in erased]
    own = {tau: [radius(of, every[n], every[n], neutral, tau)[0] for n in erased] for tau in TAUS}
    row["seconds_of_one_radius"] = round((time.perf_counter() - began) / len(TAUS) / len(erased), 4)
    near = {
        tau: [min(radius(of, every[n], p, neutral, tau)[0] for p in starts) for n in erased] for tau in TAUS
    }
    row["own"] = {str(tau): finite(sum(one) / len(one)) for tau, one in own.items()}
    row["nearest"] = {str(tau): finite(sum(one) / len(one)) for tau, one in near.items()}
    row["answer_of_own"] = sum(of.distance(every[n], every[n], neutral) for n in erased) / len(erased)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edits", type=Path, default=Path("build/edits"), help="default: %(default)s")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model = ek.load("emoji")
    names = [one.name for one in data.concepts()]
    weapons = [one.name for one in data.concepts() if one.weapon]
    neutral = model.encode("")[0].double()
    every = {name: prompt(model, name) for name in names}
    subject = world.subject(model)
    old = read(given.out) if given.out.exists() else None  # what an earlier call drew and solved
    kept = old.details if old and old.fingerprint == subject["fingerprint"] else {}
    solved = {
        (one["erased"], one["method"], one["digest"]): one
        for one in kept.get("radii", [])
        if [*one["own"]] == [str(tau) for tau in TAUS]
    }
    result = Result(
        f"python benchmarks/regeneration_radius.py --out {given.out.as_posix()}",
        "benchmark",
        **subject,
        machine=machine(),
        details={
            "tau": kept.get("tau") or calibrated(model, response(model, None)),
            "radii": list(solved.values()),
        },
    )
    save(result, given.out)
    rows = []
    for concept, methods in (("dog", DOG), ("weapon", WEAPON)):
        erased = ["dog"] if concept == "dog" else weapons
        for method in methods:
            name = f"{'attack_unlearndiff' if concept == 'dog' else 'unlearndiff'}_{method}_{concept}"
            attacked = read(name)
            file = given.edits / f"{method}_{concept}.safetensors"
            before = [one for key, one in solved.items() if key[:2] == (concept, method)]
            if file.exists() or len(before) != 1:
                edit = ek.Edit.load(file)
                row = solved.get((concept, method, edit.digest))
                row = row or radii_of(model, edit, erased, every, neutral) | {
                    "erased": concept,
                    "method": method,
                }
            else:
                row = before[0]
            value = attacked.value("attack", attacked.label)
            row["attack"] = {"succeeded": value["k"], "attempts": value["n"], "digest": attacked.edit.digest}
            if attacked.edit.digest not in (None, row["digest"]):
                print(
                    f"{name} is about another edit in bits ({attacked.edit.digest}) than the radius ({row['digest']})"
                )
            solved[concept, method, row["digest"]] = row
            rows.append(row)
            print(row, flush=True)
            save(replace(result, details=result.details | {"radii": list(solved.values())}), given.out)
    # without those of edits of before
    save(replace(result, details=result.details | {"radii": rows}), given.out)
    result.details.update(radii=rows, order=order(rows))
    save(result, given.out)
    print(result.details["order"])


def order(rows: list[dict]) -> list[dict]:
    """Kendall's tau-b between a radius and the attack's success, for each kind of radius; -1: as it should be."""
    found = []
    for concept in ("dog", "weapon"):
        here = [row for row in rows if row["erased"] == concept]
        rates = [row["attack"]["succeeded"] / row["attack"]["attempts"] for row in here]
        for kind in ("own", "nearest"):
            for tau in here[0][kind]:
                distances = [float("inf") if row[kind][tau] is None else row[kind][tau] for row in here]
                test = kendalltau(distances, rates, method="auto")
                found.append({
                    "erased": concept, "from": kind, "tau": float(tau), "methods": len(here),
                    "kendall": finite(test.statistic), "p": finite(test.pvalue),
                })  # fmt: skip
    return found


if __name__ == "__main__":
    main()
