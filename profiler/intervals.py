"""Ratios of paired samples with 95% intervals: the median of per-round log-ratios, and where it may lie.

An interval of a median is a pair of order statistics: that the median of n values lies between the k-th smallest and
the k-th largest has the probability 1 − 2·P(Binomial(n, ½) < k), whatever the noise's distribution, and also where it
changes from round to round. Few values leave few such pairs, so the interval lies between the two that enclose the
wanted probability (Hettmansperger and Sheather 1986, "Confidence intervals based on interpolated order statistics").
Percentiles of resampled medians, the plain bootstrap, hold the truth in 91–94% of runs of 6 to 20 rounds, at a nominal
95%."""

import math
from functools import lru_cache

import numpy as np

CONFIDENCE = 0.95
# Stopping once intervals are narrow favours runs whose intervals came out too narrow: nominal 95% held the truth in
# 91–94% of simulated runs, nominal 96% in 92–97%.
CONFIDENCE_AT_TARGET = 0.96
RESAMPLES = 2000
# The widest interval, from the least to the greatest of n values, holds the true median with probability 1 − 2·2⁻ⁿ:
# 0.94 at n = 5, 0.97 at n = 6. Fewer rounds than six cannot carry a 95% interval.
MIN_ROUNDS = 6


def log_ratios(samples: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """ln(sample / baseline) round by round; both (rounds,), positive, any one unit."""
    return np.log(np.asarray(samples, dtype=float) / np.asarray(baseline, dtype=float))


def median_interval(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Where the median lies that values (n,) were drawn around; n of too few values: their range."""
    ordered = np.sort(np.asarray(values, dtype=float))
    k, weight = _order(len(ordered), confidence)
    low = (1 - weight) * ordered[k] + weight * ordered[min(k + 1, len(ordered) - 1)]
    high = (1 - weight) * ordered[-1 - k] + weight * ordered[max(-2 - k, -len(ordered))]
    return float(low), float(high)


@lru_cache(maxsize=512)
def _order(count: int, confidence: float) -> tuple[int, float]:
    """The interval's lower end as an order statistic, counted from 0, and how far it goes towards the next."""

    def covers(k: int) -> float:
        return 1 - 2 * sum(math.comb(count, j) for j in range(k)) / 2**count

    if covers(1) < confidence:
        return 0, 0.0
    k = max(k for k in range(1, count // 2 + 1) if covers(k) >= confidence)
    if k + 1 > count // 2:
        return k - 1, 0.0
    share = (covers(k) - confidence) / (covers(k) - covers(k + 1))
    return k - 1, (count - k) * share / (k + (count - 2 * k) * share)


def ratio_with_interval(samples, baseline, confidence: float = CONFIDENCE) -> tuple[float, tuple[float, float]]:
    """Median of samples / baseline over paired rounds, and its interval."""
    logs = log_ratios(samples, baseline)
    low, high = median_interval(logs, confidence)
    return math.exp(np.median(logs)), (math.exp(low), math.exp(high))


def quotient_with_interval(
    one: tuple[float, tuple[float, float]], other: tuple[float, tuple[float, float]]
) -> tuple[float, tuple[float, float]]:
    """one / other, of two independent ratios with their intervals.

    On the logarithms, each end of the difference lies where the two ends' squared distances add up (Zou and Donner
    2008, "Construction of confidence limits about effect measures", the method of variance estimates recovery)."""
    (a, (a_low, a_high)), (b, (b_low, b_high)) = one, other
    down = math.hypot(math.log(a / a_low), math.log(b_high / b))
    up = math.hypot(math.log(a_high / a), math.log(b / b_low))
    return a / b, (a / b * math.exp(-down), a / b * math.exp(up))


def half_width(ratio: float, ci: tuple[float, float]) -> float:
    """Half of an interval's width, relative to the ratio."""
    return (ci[1] - ci[0]) / (2 * ratio)


def resampled_medians(log_ratio_columns: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Medians of `resamples` draws of the rounds, with replacement: (rounds, arms) → (resamples, arms).

    All arms of a draw take the same rounds, because they share that round's baseline; a crossover computed from a row
    therefore keeps the arms' correlation."""
    columns = np.asarray(log_ratio_columns, dtype=float)
    rounds = columns.shape[0]
    draws = np.random.default_rng(seed).integers(0, rounds, size=(resamples, rounds))
    return np.median(columns[draws], axis=1)


def interval(draws: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The percentile interval of draws (resamples,). Draws may be ±inf, so no value between two draws is made up."""
    tail = 50 * (1 - confidence)
    low = np.percentile(draws, tail, method="lower")
    high = np.percentile(draws, 100 - tail, method="higher")
    return float(low), float(high)
