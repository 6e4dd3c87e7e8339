"""Ratios of paired samples with 95% intervals: the median of per-round log-ratios, resampled over rounds."""

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2000
# With n rounds the widest interval that resampling a median can give holds the true median with probability 1 − 2·2⁻ⁿ:
# 0.94 at n = 5, 0.97 at n = 6. Fewer rounds than six cannot carry a 95% interval.
MIN_ROUNDS = 6


def log_ratios(samples: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """ln(sample / baseline) round by round; both (rounds,), positive, any one unit."""
    return np.log(np.asarray(samples, dtype=float) / np.asarray(baseline, dtype=float))


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


def ratio_with_interval(samples, baseline, *, seed: int = 0) -> tuple[float, tuple[float, float]]:
    """Median of samples / baseline over paired rounds, and its 95% interval."""
    logs = log_ratios(samples, baseline)
    low, high = interval(resampled_medians(logs[:, None], seed=seed)[:, 0])
    return float(np.exp(np.median(logs))), (float(np.exp(low)), float(np.exp(high)))
