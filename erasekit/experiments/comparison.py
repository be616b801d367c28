"""Every committed result as one table, and what can be concluded from rates: who is dominated, who ranks where.

    table = gathered()
    dog = table[(table["concept"] == "dog") & (table["protocol"] == "emoji-objects")]

A row is one method, one protocol, one measure. Rows are comparable when they agree in `protocol` and `hash`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from erasekit.emoji import data
from erasekit.evaluate import records
from erasekit.evaluate.metrics import posterior, rate
from erasekit.evaluate.protocols import CIFAR
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
    "target, object",
    "sentence, object",
)
CONTEXT = tuple(
    f"{role}, {what}" for role in ("target", "sentence", "other") for what in ("style", "background")
)
HIGH = (
    *CONTEXT,
    "other, object",
    "Acc_s",
    "elsewhere",
    "tools kept",
    "others",
    "objects",
    "styles",
    "CLIP score",
    "H_o",
    "H",
)
GOALS = dict.fromkeys(LOW, "low") | dict.fromkeys(HIGH, "high")
KINDS = ("run", "protocol", "attack")  # of results about whole edits; "regeneration" is about RECE's rounds


def gathered(folder: Path = RESULTS) -> pd.DataFrame:
    """One row for each method, protocol and measure of the result files in a folder.

    Columns: those of `records.Result.table`, and method (a key of `erasekit.methods.METHODS` with the words of its
    variant behind a hyphen, "original" or "no text"), concept, goal ("low" or "high"), file. Attacks are protocols of
    the measures "raw" and "attack". Ablations, benchmarks and measures without a goal are left out.
    """
    table = records.tables(records.all_of(*KINDS, folder=folder))
    table["goal"] = table["measure"].map(GOALS)
    table = table[table["goal"].notna()]
    armed = {c.name for c in data.concepts() if c.weapon}
    told = lambda erased: "weapon" if set(erased) == armed else ", ".join(erased)
    table = table.assign(
        method=table["edit"],
        concept=table["erased"].map(told),
        protocol=table["attack"].where(table["attack"].notna(), table["protocol"]),
    )
    same = ["concept", "protocol", "hash", "measure", "rate"]
    repeated = table["method"].eq(records.ORIGINAL) & table.duplicated(
        same
    )  # once for each edit that it is beside
    table = table[~repeated].reset_index(drop=True)
    return table.astype({"k": "Int64", "n": "Int64", "kept": "Int64", "bytes": "Int64"})


def ten_objects(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `gathered` under MACE's object protocol, ten classes, one erased at a time.

    UCE and RECE keep the other nine classes (for "dog" that is not the edit that is attacked, which keeps three), the
    other methods what their presets keep.
    """
    rows = table[table["protocol"].eq("emoji-objects") & table["concept"].isin(CIFAR)]
    most = rows.groupby(["method", "concept"])["kept"].transform("max")
    return rows[rows["kept"].isna() | rows["kept"].eq(most)]


def ten_files(table: pd.DataFrame, method: str, folder: Path = RESULTS) -> list[records.Result]:
    """The ten result files behind the rows of `ten_objects` of one method, by class: two methods' are compared in pairs
    (`records.paired`). ValueError unless there is one of each class. table: of `gathered`, from the same folder.
    """
    rows = ten_objects(table).query("method == @method").drop_duplicates("file").sort_values("concept")
    if list(rows["concept"]) != sorted(CIFAR):
        raise ValueError(
            f"no file of each of the ten classes of {method!r}: {', '.join(rows['file']) or 'none'}"
        )
    return [records.read(name.removesuffix(".json"), folder) for name in rows["file"]]


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

    rates: method -> {k, n}. goal: "low" or "high", what is better. Each true rate is drawn `draws` times from its
    `metrics.posterior`, all methods independently. Returns for each method, best first, rank (mean over the draws), low
    and high (95 % of the draws), best (share of the draws in which it is first).
    """
    names = list(rates)
    k, n = (np.array([rates[name][key] for name in names]) for key in "kn")
    drawn = posterior(k, n, generator, (draws, len(names)))
    order = (drawn if goal == "low" else -drawn).argsort(1).argsort(1) + 1
    low, high = np.quantile(order, (0.025, 0.975), axis=0, method="nearest")
    found = {"rank": order.mean(0), "low": low, "high": high, "best": (order == 1).mean(0)}
    return pd.DataFrame(found, index=names).sort_values("rank")
