"""What evaluation counts: pure functions of arrays, without models and without pictures.

Rates carry their counts and a 95 % Wilson score interval (Wilson 1927), means and differences a bootstrap interval.
Names follow the papers: Acc_e, Acc_s, Acc_g and H_o are MACE's (Lu et al., CVPR 2024, Eq. 8), UA, IRA and CRA are
UnlearnCanvas's (Zhang et al., NeurIPS 2024).
"""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.spatial.distance import cdist
from scipy.stats import binomtest, bootstrap, fisher_exact, hmean

RESAMPLES = 2000
MANY = 100_000  # where p is adjusted for many comparisons: with 2,000 the smallest p of 16 would be 0.016
CLUSTERS = 10  # labels, below which resampling them alone gives intervals that are too narrow
FEW = 1000  # pictures, below which a biased distance is little more than its bias


def rate(k: int, n: int, confidence: float = 0.95) -> dict[str, float | int]:
    """k successes of n as {k, n, rate, low, high}, with the Wilson score interval.

    Raises ValueError unless 0 <= k <= n and n >= 1.
    """
    if n < 1 or not 0 <= k <= n:
        raise ValueError(f"a rate needs 0 <= k <= n and n >= 1, got k={k}, n={n}")
    interval = binomtest(int(k), int(n)).proportion_ci(confidence, method="wilson")
    return {
        "k": int(k),
        "n": int(n),
        "rate": round(k / n, 5),
        "low": round(float(interval.low), 5),
        "high": round(float(interval.high), 5),
    }


def text(found: dict) -> str:
    """A rate as "3/151 = 2.0 % [0.7, 5.7]", a mean as "0.312 [0.305, 0.318], n = 200"."""
    if "k" in found:
        percent = {key: f"{100 * found[key]:.1f}" for key in ("rate", "low", "high")}
        return "{k}/{n} = {rate} % [{low}, {high}]".format(**found | percent)
    return "{mean:.3f} [{low:.3f}, {high:.3f}], n = {n}".format(**found)


def difference(a: dict, b: dict) -> dict[str, float]:
    """a - b of two rates {k, n} as {difference, low, high, p}: Newcombe's hybrid score interval, 95 %, from Wilson's
    bounds of each (Newcombe, Statistics in Medicine 1998, method 10), and Fisher's exact p, two-sided.

    For independent samples. Where two rates are of the same prompts and seeds, as pictures here are, and every
    verdict is kept, `paired_difference` is sharper.
    """
    (p, below_p, above_p), (q, below_q, above_q) = (_rate_and_slack(one) for one in (a, b))
    table = [[one["k"], one["n"] - one["k"]] for one in (a, b)]
    return {
        "difference": round(p - q, 5),
        "low": round(p - q - float(np.hypot(below_p, above_q)), 5),
        "high": round(p - q + float(np.hypot(above_p, below_q)), 5),
        "p": float(fisher_exact(table).pvalue),
    }


def differ(pairs: Mapping[str, tuple[dict, dict]], level: float = 0.05) -> dict[str, bool]:
    """{name: whether a difference is seen} of pairs of rates {k, n}: `difference`'s p, Holm over the pairs.

    For independent samples. That two intervals do not touch is no test: it asks for more than 5 % and knows nothing of
    the other pairs. Where every verdict is kept, `records.differ` knows that pictures of a prompt are alike.
    """
    if not pairs:
        return {}
    adjusted = holm([difference(a, b)["p"] for a, b in pairs.values()])
    return {name: p <= level for name, p in zip(pairs, adjusted, strict=True)}


def _rate_and_slack(one: dict) -> tuple[float, float, float]:
    """A rate, and how far below and above it Wilson's bounds lie."""
    interval = binomtest(one["k"], one["n"]).proportion_ci(0.95, method="wilson")
    value = one["k"] / one["n"]
    return value, value - interval.low, interval.high - value


def mean(values: Sequence[float], generator: np.random.Generator) -> dict[str, float | int]:
    """{n, mean, low, high} with a 95 % percentile bootstrap interval (n = 1 or constant values: no width)."""
    values = _finite(values)
    low, high = _interval((values,), lambda x, axis: x.mean(axis), generator)
    return {"n": len(values), "mean": round(float(values.mean()), 5), "low": low, "high": high}


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    generator: np.random.Generator,
    clusters: Sequence[Sequence] = (),
    resamples: int = RESAMPLES,
) -> dict:
    """Mean of b - a over the same prompts and seeds as {n, difference, low, high, p, separates}.

    a, b: (n,) 0/1 verdicts or scores, row by row of the same prompt and seed. Pairs are resampled, so what the
    pictures of one seed share cancels: narrower than two intervals side by side. clusters: labels (n,) of each pair,
    its prompt and its seed, say; then these are resampled, see `clustered`. Where all differences of verdicts
    are one value, there is nothing to resample: as many of them may be another as Wilson's bound of 0/n allows.
    Differences of scores that are one value give an interval without width.
    p: twice the smaller share of resamples on one side of 0, so at least 2 / (resamples + 1); no smaller than 2 / 2^n,
    the sign test's for n pairs that all go one way, for verdicts no smaller than exact McNemar's; 1 where no labelling
    has two labels. resamples: more (`MANY`) where p is adjusted for many comparisons.
    separates: the 95 % interval leaves out 0, and so many pairs (six) could give a p below 5 %.
    """
    a, b = _finite(a), _finite(b)
    if a.shape != b.shape:
        raise ValueError(f"pairs are needed: {len(a)} values on one side, {len(b)} on the other")
    clusters = clusters or [range(len(a))]
    resampled = clustered(b - a, clusters, generator, resamples)
    low, high = (round(float(end), 5) for end in np.quantile(resampled, [0.025, 0.975]))
    several = any(len({*labels}) > 1 for labels in clusters)
    fewest = 2 * 0.5 ** len(a) if several else 1.0
    p = max(two_sided(resampled), fewest)
    if {*a, *b} <= {0.0, 1.0}:
        p = max(p, mcnemar(a, b)["p"])
        if np.ptp(b - a) == 0:
            value, unseen = float((b - a)[0]), rate(0, len(a))["high"]
            low = max(-1.0, value - unseen * (1 + abs(value)))
            high = min(1.0, value + unseen * (1 + abs(value)))
    return {
        "n": len(a),
        "difference": round(float((b - a).mean()), 5),
        "low": round(low, 5),
        "high": round(high, 5),
        "p": round(float(p), 5),
        "separates": (low > 0 or high < 0) and fewest <= 0.05,
    }


def two_sided(resampled: np.ndarray) -> float:
    """p of resampled differences (n,): twice the smaller share on one side of 0, so at least 2 / (n + 1)."""
    beyond = min((resampled <= 0).sum(), (resampled >= 0).sum())
    return float(min(1.0, 2 * (beyond + 1) / (len(resampled) + 1)))


def clustered(
    values: Sequence[float],
    clusters: Sequence[Sequence],
    generator: np.random.Generator,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """Means of values (n,) in resamples that draw whole clusters: of each labelling (n,) its labels, with replacement;
    a value counts as often as all its labels were drawn together (the pigeonhole bootstrap: Owen, Annals of Applied
    Statistics 2007).

    Pictures of one prompt, and of one seed, have something in common: taken as independent they give intervals that are
    too narrow. With fewer than about ten labels these are too narrow as well, though less so. A labelling that gives
    each value a label of its own (a seed for every picture) says no more than another with ten or more: it is left out,
    since drawn beside that one it would count the spread of single pictures twice.
    """
    values = _finite(values)
    if not clusters or any(len(labels) != len(values) for labels in clusters):
        raise ValueError(f"one label for each of the {len(values)} values is needed in each labelling")
    coded = [np.unique(np.asarray(labels), return_inverse=True) for labels in clusters]
    coded = [one for i, one in enumerate(coded) if not _told_by(one, [*coded[:i], *coded[i + 1 :]])] or coded[
        :1
    ]
    found = np.empty(resamples)
    for start in range(0, resamples, 200):
        weights = np.ones((min(200, resamples - start), len(values)))
        for labels, code in coded:
            drawn = generator.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), len(weights))
            weights *= drawn[:, code]
        # two labellings may miss each other altogether: then there is no mean, and the plain one stands
        total = weights.sum(1)
        means = (weights @ values) / np.where(total > 0, total, 1)
        found[start : start + 200] = np.where(total > 0, means, values.mean())
    return found


def _told_by(labelling: tuple, others: Sequence[tuple]) -> bool:
    """Whether each value has its own label, and another labelling has ten labels or more."""
    labels, code = labelling
    return len(labels) == len(code) and any(len(other) >= CLUSTERS for other, _ in others)


def posterior(k, n, generator: np.random.Generator, size) -> np.ndarray:
    """True rates that k of n leave possible, drawn from Beta(k + 1/2, n - k + 1/2), Jeffreys' posterior."""
    return generator.beta(np.add(k, 0.5), np.subtract(n, k) + 0.5, size)


def mcnemar(a: Sequence[float], b: Sequence[float]) -> dict:
    """Exact McNemar test of paired 0/1 verdicts (n,), as {lost, gained, p}.

    lost are 1 in a alone, gained in b alone; if nothing but luck tells a from b, each of them is as likely one as the
    other. p is 1 where no pair differs.
    """
    a, b = _finite(a), _finite(b)
    if a.shape != b.shape or not {*a, *b} <= {0.0, 1.0}:
        raise ValueError(f"pairs of verdicts 0 and 1 are needed, got shapes {a.shape} and {b.shape}")
    lost, gained = int((a > b).sum()), int((b > a).sum())
    p = float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    return {"lost": lost, "gained": gained, "p": p}


def holm(p: Sequence[float]) -> list[float]:
    """P values of m comparisons, adjusted so that those at or below 0.05 hold together at 5 % (Holm 1979): the smallest
    times m, the next times m - 1, and so on, never falling, at most 1.
    """
    p = _finite(p)
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    found = np.empty(len(p))
    found[order] = adjusted
    return found.tolist()


def _interval(samples, statistic, generator) -> tuple[float, float]:
    if len(samples[0]) < 2 or np.ptp(samples[0]) == 0:
        value = float(statistic(samples[0], axis=0))
        return round(value, 5), round(value, 5)
    found = bootstrap(
        samples, statistic, n_resamples=RESAMPLES, method="percentile", rng=generator, batch=200
    ).confidence_interval
    return round(float(found.low), 5), round(float(found.high), 5)


def _finite(values: Sequence[float]) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 1 or len(array) == 0 or not np.isfinite(array).all():
        raise ValueError(f"finite numbers (n,) with n >= 1 are needed, got shape {array.shape}")
    return array


def harmonic_mean(rates: Sequence[float]) -> float:
    """n / sum(1 / r) of rates in [0, 1], 0 where one of them is 0: H_o of MACE for 1 - Acc_e, Acc_s and 1 - Acc_g.

    Raises ValueError for no rate or one outside [0, 1].
    """
    if not rates or not all(0 <= one <= 1 for one in rates):
        raise ValueError(f"the harmonic mean needs rates between 0 and 1, got {list(rates)}")
    return 0.0 if min(rates) == 0 else float(hmean(rates))


def canvas(target: Sequence[str], answer: Sequence[str], erased: str, crossed: Sequence[bool]) -> dict:
    """UA, IRA and CRA of UnlearnCanvas from one answer per picture.

    target, answer: (n,) what the prompt asked for and what the classifier said, in the domain of `erased` (styles,
    say). crossed: (n,) whether the picture's *other* domain (the object) was recognised. UA: pictures asked to show
    `erased` and not recognised as it; IRA: all others recognised as what was asked; CRA: the other domain, over the
    same others. The counts are over all pictures at once: taken batch by batch, a list whose first batch is all
    targets leaves IRA without a denominator.
    """
    target, answer, crossed = np.asarray(target), np.asarray(answer), np.asarray(crossed, dtype=bool)
    if not len(target) == len(answer) == len(crossed):
        raise ValueError(f"{len(target)} targets, {len(answer)} answers and {len(crossed)} cross answers")
    aimed = target == erased
    if not aimed.any() or aimed.all():
        raise ValueError(f"UA and IRA need pictures asked to show {erased!r} and pictures of something else")
    right = target == answer
    return {
        "UA": rate(int((~right)[aimed].sum()), int(aimed.sum())),
        "IRA": rate(int(right[~aimed].sum()), int((~aimed).sum())),
        "CRA": rate(int(crossed[~aimed].sum()), int((~aimed).sum())),
    }


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (n, d) and (m, d): FID where the features are
    Inception's (Heusel et al. 2017), elsewhere named after its features. It falls with n: compare at equal n only.
    With fewer than 1,000 pictures it warns how far two halves of `a` are apart.
    """
    a, b = _features(a, b)
    if 4 <= len(a) and min(len(a), len(b)) < FEW:
        _warn("Frechet distance", a, b, f"two halves of the first are {_frechet(a[::2], a[1::2]):.4g} apart")
    return _frechet(a, b)


def _frechet(a: np.ndarray, b: np.ndarray) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # tr (C_a C_b)^(1/2) = tr (R C_b R)^(1/2) with R = C_a^(1/2): symmetric, so real also where singular
    values, vectors = np.linalg.eigh(cov_a)
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.linalg.eigvalsh(root @ cov_b @ root).clip(0)
    mean_part = np.square(a.mean(0) - b.mean(0)).sum()
    return float(max(0.0, mean_part + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sqrt(cross).sum()))


def kid(a: np.ndarray, b: np.ndarray) -> float:
    """Kernel distance: unbiased squared MMD with k(x, y) = (x.y / d + 1)^3 (Binkowski et al. 2018). Its expectation
    does not depend on n; it may fall below 0."""
    a, b = _features(a, b)
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3
    inner = lambda k: (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))
    return float(inner(kernel(a, a)) + inner(kernel(b, b)) - 2 * kernel(a, b).mean())


def cmmd(a: np.ndarray, b: np.ndarray, sigma: float = 10.0) -> float:
    """1000 times the squared MMD with a Gaussian kernel of width sigma (Jayasumana et al., CVPR 2024; there on CLIP
    features scaled to unit length). Biased, hence never below 0, and 0 for equal sets. Two sets of n and m pictures
    from one source are 1000 (1/n + 1/m) (1 - E k) apart in the mean: with fewer than 1,000 it warns of that number."""
    a, b = _features(a, b)
    kernel = lambda x, y: np.exp(-cdist(x, y, "sqeuclidean") / (2 * sigma**2)).mean()
    within, n, m = kernel(a, a), len(a), len(b)
    if min(n, m) < FEW:
        alike = (n * within - 1) / (n - 1)  # E k of two different pictures
        _warn("CMMD", a, b, f"sets from one source are {1000 * (1 / n + 1 / m) * (1 - alike):.4g} apart")
    return float(1000 * max(0.0, within + kernel(b, b) - 2 * kernel(a, b)))


def _warn(distance: str, a: np.ndarray, b: np.ndarray, floor: str) -> None:
    warnings.warn(
        f"{distance} of {len(a)} and {len(b)} pictures is biased: {floor}. Compare at equal numbers only, or use KID",
        stacklevel=3,
    )


def _features(*sets: np.ndarray) -> list[np.ndarray]:
    found = [np.asarray(x, dtype=float) for x in sets]
    for x in found:
        if x.ndim != 2 or len(x) < 2 or not np.isfinite(x).all():
            raise ValueError(
                f"finite features (n, d) of at least two pictures are needed, got shape {x.shape}"
            )
    if len({x.shape[1] for x in found}) > 1:
        widths = " and ".join(str(x.shape[1]) for x in found)
        raise ValueError(f"the features are {widths} wide: take both from the same extractor")
    return found
