"""Does the emoji world rank methods as published tables of Stable Diffusion do? `data/papers/agreement.csv`.

    table = tau()           # a row for each published protocol: Kendall's tau-b with a 95 % interval

Only *orders* are compared, never values. The list says which published method stands for which of ours, and which
measure here for which there; another choice gives another tau. Its rows are not independent: one measurement of ours
stands beside several published columns. With three methods tau has four values and no interval says much.
"""

from itertools import combinations, permutations

import numpy as np
import pandas as pd

from erasekit.evaluate import claims, metrics
from erasekit.evaluate.published import FOLDER, rates
from erasekit.paths import RESULTS

DRAWS = 10_000
OF_H_O = ("Acc_e", "Acc_s", "Acc_g")


def listed() -> pd.DataFrame:
    """`data/papers/agreement.csv`, a row for each method of each protocol: group, protocol (a name of ours), paper,
    metric, source (several with "; " between) and method (they find the published number), goal ("low" or "high",
    which of those is better), n (how many pictures the protocol says), ours, cells (`claims.parts`) and our_goal, about
    (what the cells count), note.
    """
    return pd.read_csv(FOLDER / "agreement.csv", keep_default_na=False)


def published(row) -> dict:
    """The published number of a row of `listed`: value, unit, rate and trust. ValueError unless exactly one fits."""
    told = rates(row.paper)
    found = told[
        (told["metric"] == row.metric) & (told["method"] == row.method) & (told["model"] == "SD 1.4")
    ]
    found = found[found["source"].isin(row.source.split("; "))]
    if len(found) != 1:
        raise ValueError(f"{len(found)} numbers of {row.method} for {row.metric!r} in {row.paper}.csv")
    return found.iloc[0].to_dict()


def kendall(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of x and y (..., methods): (..., ). nan where all of one side are tied."""
    pairs = list(combinations(range(np.shape(x)[-1]), 2))
    signs = [
        np.stack([np.sign(z[..., i] - z[..., j]) for i, j in pairs], -1) for z in map(np.asarray, (x, y))
    ]
    untied = [np.abs(sign).sum(-1) for sign in signs]
    with np.errstate(invalid="ignore"):
        return (signs[0] * signs[1]).sum(-1) / np.sqrt(untied[0] * untied[1])


def chance(x: np.ndarray, y: np.ndarray) -> float:
    """Share of all orders of y (methods,) that agree with x as well as y does, or better: what tau is worth with so few
    methods. nan where tau is.
    """
    observed = kendall(x, y)
    orders = np.array(list(permutations(y)))
    return (
        float((kendall(np.broadcast_to(x, orders.shape), orders) >= observed - 1e-9).mean())
        if np.isfinite(observed)
        else np.nan
    )


def drawn(values: list[dict], generator: np.random.Generator, draws: int = DRAWS) -> tuple[float, np.ndarray]:
    """A number and `draws` of what it could be: of counts, added up, `metrics.posterior`; of a mean the normal
    distribution that has its interval.
    """
    if len(values) == 1 and "mean" in values[0]:
        (one,) = values
        return one["mean"], generator.normal(one["mean"], (one["high"] - one["low"]) / (2 * 1.96), draws)
    k, n = (sum(one[key] for one in values) for key in "kn")
    return k / n, metrics.posterior(k, n, generator, draws)


def ours(cells: str, generator: np.random.Generator, folder=RESULTS) -> tuple[float, np.ndarray, str]:
    """What is measured here, its draws and its text. "H_o" is computed from Acc_e, Acc_s and Acc_g,
    each added up over the files first."""
    if cells.endswith("| H_o"):
        three = [
            drawn(claims.values(cells.replace("| H_o", f"| {name}"), folder), generator) for name in OF_H_O
        ]
        good = [(value, draws) if name == "Acc_s" else (1 - value, 1 - draws)
                for name, (value, draws) in zip(OF_H_O, three, strict=True)]  # fmt: skip
        value = metrics.harmonic_mean([value for value, _ in good])
        return value, 3 / sum(1 / draws for _, draws in good), f"{value:.3f}"
    values = claims.values(cells, folder)
    value, draws = drawn(values, generator)
    if "mean" in values[0]:
        return value, draws, f"{value:.3f}"
    return value, draws, "{}/{}".format(*(sum(one[key] for one in values) for key in "kn"))


def compare(
    theirs: dict, here: dict, goals: tuple[str, str], n: int | None, generator: np.random.Generator
) -> dict:
    """tau, low, high of two orders of the same methods, and the pairs that are turned around.

    theirs: method -> (number, text). here: method -> (number, draws, text). goals: which is better there and here,
    "low" or "high". n: pictures of each published rate (a share), None where it is taken as it is given. The interval
    is of counting alone: whether tau is more than luck says `chance`. turned: texts; sure: how many of them have our
    order in 97.5 % of the draws.
    """
    names, pairs = list(theirs), list(combinations(theirs, 2))
    sign = [1 if goal == "low" else -1 for goal in goals]
    x, y, draws = (
        sign[side] * np.stack([told[name][part] for name in names], -1)
        for side, told, part in ((0, theirs, 0), (1, here, 0), (1, here, 1))
    )
    drawn_x = np.broadcast_to(x, draws.shape)
    if n is not None:
        k = np.round(np.abs(x) * n)
        drawn_x = sign[0] * metrics.posterior(k, n, generator, draws.shape)
    spread = kendall(drawn_x, draws)
    low, high = np.quantile(spread[np.isfinite(spread)], [0.025, 0.975], method="nearest")
    turned, sure = [], 0
    place = {name: i for i, name in enumerate(names)}
    for a, b in [*pairs, *((b, a) for a, b in pairs)]:
        if x[place[a]] < x[place[b]] and y[place[a]] > y[place[b]]:
            certain = bool((draws[:, place[a]] > draws[:, place[b]]).mean() >= 0.975)
            sure += certain
            told = f"there ({theirs[a][1]}, {theirs[b][1]}), behind it here ({here[a][2]}, {here[b][2]})"
            turned.append(f"{a} before {b} {told}" + ("" if certain else ", not sure"))
    return {
        "tau": float(kendall(x, y)), "low": float(low), "high": float(high), "methods": len(names),
        "pairs": len(pairs), "turned": turned, "sure": sure, "chance": chance(x, y),
    }  # fmt: skip


def tau(pairs: pd.DataFrame | None = None, seed: int = 0, folder=RESULTS) -> pd.DataFrame:
    """Each protocol: group, protocol, about, source, note, tau, low, high (95 % of the draws), methods and pairs (how
    many), turned, sure, chance (see `compare`), trust.

    pairs: in place of `listed`.
    """
    found = []
    for _, rows in (listed() if pairs is None else pairs).groupby("protocol", sort=False):
        generator = np.random.default_rng(seed)
        told = {row.method: published(row) for row in rows.itertuples()}
        first = rows.iloc[0]
        n = int(first["n"]) if str(first["n"]).strip() else None
        theirs = {
            name: (one["value"] if n is None else one["rate"], f"{one['value']:g}")
            for name, one in told.items()
        }
        here = {row.method: ours(row.cells, generator, folder) for row in rows.itertuples()}
        about = {key: first[key] for key in ("group", "protocol", "about", "source", "note")}
        trust = "; ".join(dict.fromkeys(one["trust"] for one in told.values()))
        result = compare(theirs, here, (first["goal"], first["our_goal"]), n, generator)
        found.append(about | result | {"trust": trust})
    return pd.DataFrame(found)
