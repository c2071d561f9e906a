"""Differences between two losses over their seeds: intervals by Welch's and by the paired t-test, ratios, and power."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import ncf, t, ttest_ind, ttest_rel

Array = NDArray[np.float64]
Interval = dict[str, Any]


def statistics(values: list[float]) -> dict[str, Any]:
    return {
        "mean": float(np.mean(values)),
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        "values": values,
    }


def has_spread(values: Array) -> bool:
    """Whether there is more between them than the rounding of sums, from which no interval can be had."""
    return len(values) > 1 and bool(np.ptp(values) > 1e-9 * np.abs(values).max())


def t_test(test: Callable[..., Any], a: Array, b: Array, **options: bool) -> Interval:
    """Mean of the difference with 95 % interval and two-sided p of scipy's test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where one of the two has no spread, or a square overflows
        result = test(a, b, **options)
        interval = result.confidence_interval(0.95)
    limits = [float(interval.low), float(interval.high)]
    return {"mean": float(a.mean() - b.mean()), "interval": limits, "p": float(result.pvalue)}


def welch(a: Array, b: Array) -> Interval:
    """Mean of a minus that of b, Welch's 95 % interval and two-sided p; both None without a second seed or spread."""
    if min(len(a), len(b)) < 2 or not (has_spread(a) or has_spread(b)):
        return {"mean": float(a.mean() - b.mean()), "interval": None, "p": None}
    return t_test(ttest_ind, a, b, equal_var=False)


def paired(a: dict[int, float], b: dict[int, float]) -> Interval:
    """Mean difference of the seeds that both have, interval and p by the t-test of pairs; `seeds` is their number."""
    seeds = sorted(a.keys() & b.keys())
    x, y = (np.array([values[seed] for seed in seeds]) for values in (a, b))
    mean = float(np.mean(x - y)) if seeds else None
    scale = np.abs([*x, *y]).max() if seeds else 0.0
    if mean is None or len(seeds) < 2 or np.ptp(x - y) <= 1e-9 * scale:
        return {"mean": mean, "interval": None, "p": None, "seeds": len(seeds)}
    return t_test(ttest_rel, x, y) | {"seeds": len(seeds)}


def ratio(a: Array, b: Array) -> Interval | None:
    """Percent by which a is larger than b: `welch` of the logarithms. None where one is 0 or a limit is huge."""
    if min(a.min(), b.min()) <= 0:
        return None
    by_log = welch(np.log(a), np.log(b))
    logs = [by_log["mean"], *(by_log["interval"] or ())]
    if max(logs) > 100:
        return None
    percent = [float(100 * np.expm1(x)) for x in logs]
    return {"mean": percent[0], "interval": percent[1:] or None, "p": by_log["p"]}


def common_sd(a: Array, b: Array) -> float:
    """Root of the mean of two samples' variances."""
    return float(np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2))


def power(effect: float, sd: float, n: int) -> float:
    """Power of the two-sided t-test at 5 %, two samples of n values, whose means differ by `effect`, which is not 0."""
    degrees, shift = 2 * n - 2, abs(effect) / (sd * np.sqrt(2 / n))
    # The square of a noncentral t is a noncentral F, which scipy computes where it gives NaN for the tail of that t.
    return float(ncf.sf(t.isf(0.025, degrees) ** 2, 1, degrees, shift**2))
