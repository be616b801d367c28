"""Every committed result as one table, and what can be concluded from rates: who is dominated, who ranks where.

    table = gathered()
    dog = table[(table["concept"] == "dog") & (table["protocol"] == "emoji-objects")]

A row is one method, one protocol, one measure. Rows are comparable when they agree in `protocol` and `hash`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from erasekit.evaluate.metrics import rate
from erasekit.evaluate.protocols import CIFAR
from erasekit.evaluate.runs import shown
from erasekit.paths import RESULTS

# Which way a good erasure goes, for the measures of all kinds of result files
LOW = (
    "Acc_e",
    "Acc_g",
    "associations",
    "explicit",
    "implicit",
    "held_out",
    "adversarial",
    "target",
    "raw",
    "attack",
    "Frechet",
)
HIGH = ("Acc_s", "elsewhere", "tools kept", "others", "objects", "styles", "CLIP score", "H_o", "H")
GOALS = dict.fromkeys(LOW, "low") | dict.fromkeys(HIGH, "high")
BEFORE = "original"  # the unedited model, under the key that figures have for it


def gathered(folder: Path = RESULTS) -> pd.DataFrame:
    """One row for each method, protocol and measure of the result files in a folder.

    Columns: method (a key of `erasekit.methods.METHODS` with its variant behind a hyphen, or "original"), concept,
    protocol, hash, measure, goal ("low" or "high"), k, n, rate, low, high (a mean has no k, a distance no interval),
    text, kept (how many concepts the method was told to keep; absent where the file does not say), bytes (of the
    edit), file. Attacks are protocols of the measures "raw" and "attack". Ablations and benchmarks are not read.
    """
    rows = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        kind, _, rest = path.stem.partition("_")
        if kind in ("ablation", "benchmark", "adversarial"):
            continue
        if "attack" in found:
            read = _attack(found, rest, kind)
        elif "measured" in found:
            read = _run(found, rest, kind)
        elif "after" in found:
            read = _world(found, path.stem)
        else:
            continue  # course of RECE's regeneration
        rows += [{**row, "file": path.name} for row in read]
    table = pd.DataFrame(rows)
    same = table["method"].eq(BEFORE) & table.duplicated(["concept", "protocol", "hash", "measure", "rate"])
    table = table[~same].reset_index(drop=True)  # files about one concept repeat the unedited model
    table["goal"] = table["measure"].map(GOALS)
    return table.astype({"k": "Int64", "n": "Int64", "kept": "Int64", "bytes": "Int64"})


def _attack(found: dict, rest: str, kind: str) -> list[dict]:
    """ATTACK_VARIANT_CONCEPT, or for unlearndiff_* VARIANT_CONCEPT."""
    variant, concept = rest.split("_")[1:3] if kind == "attack" else rest.split("_")[:2]
    method = {"none": BEFORE, "control": "no text"}.get(variant, variant)
    made = found.get("edit_made") or {}
    about = {
        "method": method,
        "concept": concept,
        "protocol": found["attack"],
        "hash": found["protocol"]["hash"][:8],
        "kept": len(made["concepts"]["preserve"]) if made else None,
    }
    return [
        {**about, "measure": name, **_as_rate(found[key])}
        for name, key in (("raw", "raw"), ("attack", "success"))
    ]


def _run(found: dict, rest: str, kind: str) -> list[dict]:
    erased = found["protocol"]["erased"]
    variant = rest.split("_")[0]
    method = BEFORE if kind == "base" or variant == "none" else variant
    about = {
        "method": method,
        "concept": erased[0] if len(erased) == 1 else "weapon" if erased else "",
        "protocol": found["protocol"]["name"],
        "hash": found["protocol"]["hash"][:8],
    }
    return [
        {**about, "measure": name, **_as_rate(one)}
        for name, one in found["measured"].items()
        if name in GOALS
    ]


def _world(found: dict, stem: str) -> list[dict]:
    variant, concept = re.fullmatch(r"(?:whole_)?([a-z-]+)_([a-z]+)(?:_all)?", stem).groups()
    about = {"concept": concept, "kept": len(found["preserve"]), "bytes": found["edit_bytes"]}
    rows = []
    for method, key in ((BEFORE, "before"), (variant, "after")):
        own = {**about, "method": method, "protocol": "judged", "hash": found["protocol"].rpartition("-")[2]}
        rows += [
            {**own, "measure": name, **_as_rate(one)} for name, one in found[key].items() if name in GOALS
        ]
        if "utility" in found:
            name, _, short = found["utility"]["protocol"].rpartition("-")
            own |= {"protocol": name, "hash": short}
            rows += [
                {**own, "measure": one, **_as_rate(value)} for one, value in found["utility"][key].items()
            ]
    if "utility" in found:
        frechet = found["utility"]["emoji-clip"]["Frechet"]
        rows.append({**own, "measure": "Frechet", "rate": frechet, "text": f"{frechet:.4f}"})
    return rows


def _as_rate(one: dict) -> dict:
    rates = {"rate" if name in ("mean", "harmonic_mean") else name: value for name, value in one.items()}
    return rates | {"text": shown(one)}


def ten_objects(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `gathered` under MACE's object protocol, ten classes, one erased at a time.

    UCE and RECE keep the other nine classes (for "dog" that is not the edit that is attacked: "uce-nine", "rece-nine"
    and "rece-startnine", here under the name without "nine"), the other methods what their presets keep.
    """
    rows = table[table["protocol"].eq("emoji-objects") & table["concept"].isin(CIFAR)]
    plain = lambda names: names.str.removesuffix("nine").str.removesuffix("-")
    nine = rows["method"].str.endswith("nine")
    attacked = rows["concept"].eq("dog") & rows["method"].isin(plain(rows["method"][nine]))
    return rows[~attacked].assign(method=plain(rows["method"]))


def pooled(rows: pd.DataFrame) -> pd.DataFrame:
    """The counts of each method and measure added up: method, measure, goal, cells (how many were added) and `rate`'s
    k, n, rate, low, high. Means and distances have no counts and are left out.
    """
    counted = rows[rows["k"].notna()]
    return pd.DataFrame([
        {"method": method, "measure": measure, "goal": part["goal"].iloc[0], "cells": len(part)}
        | rate(part["k"].sum(), part["n"].sum())
        for (method, measure), part in counted.groupby(["method", "measure"], sort=False)
    ])  # fmt: skip


def pareto(utility: Sequence[float], robustness: Sequence[float]) -> np.ndarray:
    """(n,) bool: the points that no other point dominates, both being better the higher they are.

    One point dominates another if it is at least as good in both and better in one.
    """
    points = np.stack([np.asarray(utility, float), np.asarray(robustness, float)], axis=1)
    as_good = (points[:, None] >= points[None]).all(-1)
    better = (points[:, None] > points[None]).any(-1)
    return ~(as_good & better).any(0)


def ranks(
    rates: Mapping[str, Mapping], goal: str, generator: np.random.Generator, draws: int = 10_000
) -> pd.DataFrame:
    """Where each method ranks by a rate, 1 the best, and how sure that is.

    rates: method -> {k, n}. goal: "low" or "high", what is better. Each true rate is drawn from Beta(k + 1/2, n - k +
    1/2), its posterior under Jeffreys' prior, `draws` times, all methods independently. Returns for each method, best
    first, rank (mean over the draws), low and high (95 % of the draws), best (share of the draws in which it is
    first).
    """
    names = list(rates)
    k, n = (np.array([rates[name][key] for name in names]) for key in "kn")
    drawn = generator.beta(k + 0.5, n - k + 0.5, size=(draws, len(names)))
    order = (drawn if goal == "low" else -drawn).argsort(1).argsort(1) + 1
    low, high = np.quantile(order, (0.025, 0.975), axis=0, method="nearest")
    found = {"rank": order.mean(0), "low": low, "high": high, "best": (order == 1).mean(0)}
    return pd.DataFrame(found, index=names).sort_values("rank")
