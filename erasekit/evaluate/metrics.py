"""Rates with intervals: pure functions of counts."""

from scipy.stats import binomtest


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
