"""Rates with intervals: pure functions of counts."""

from collections.abc import Sequence

from scipy.stats import binomtest, hmean


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


def separated(a: dict, b: dict) -> bool:
    """Whether the intervals of two rates do not touch."""
    return a["high"] < b["low"] or b["high"] < a["low"]


def harmonic_mean(rates: Sequence[float]) -> float:
    """n / sum(1 / r) of rates in [0, 1], 0 where one of them is 0: H_o of MACE (Lu et al., CVPR 2024) for
    1 - Acc_e, Acc_s and 1 - Acc_g. Raises ValueError for no rate or one outside [0, 1].
    """
    if not rates or not all(0 <= one <= 1 for one in rates):
        raise ValueError(f"the harmonic mean needs rates between 0 and 1, got {list(rates)}")
    return 0.0 if min(rates) == 0 else float(hmean(rates))
