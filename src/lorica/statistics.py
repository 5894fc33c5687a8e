"""What a number of rows can show: intervals of a metric, the difference of two models on the same rows, bounds of a rate.

Everything is a function of the rows and of a seed, and needs nothing but numpy.
"""

from __future__ import annotations

import functools
import math

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Mean F1 of the classes [...] of confusion matrices [..., K, K] with a row for each true class.

    A class that is neither there nor predicted is left out, as torchmetrics does.
    """
    hit = np.diagonal(confusion, axis1=-2, axis2=-1)
    both = confusion.sum(-1) + confusion.sum(-2)
    f1 = np.divide(2.0 * hit, both, out=np.zeros(both.shape), where=both > 0)
    known = (both > 0).sum(-1)
    return np.asarray(np.divide(f1.sum(-1), known, out=np.zeros(known.shape), where=known > 0))


def intervals(true: np.ndarray, predicted: np.ndarray, classes: int, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of `accuracy` and `f1_macro`, of rows drawn anew RESAMPLES times (bootstrap; Efron 1979).

    Args:
        true, predicted: class of each row [N].
    """
    rng = np.random.default_rng(seed)
    cells = np.bincount(true * classes + predicted, minlength=classes * classes)
    drawn = rng.multinomial(len(true), cells / len(true), size=RESAMPLES).reshape(-1, classes, classes)  # rows of a cell are alike
    accuracy = np.trace(drawn, axis1=1, axis2=2) / len(true)
    cut = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    found = {"accuracy": np.quantile(accuracy, cut), "f1_macro": np.quantile(macro_f1(drawn), cut)}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


@functools.lru_cache(maxsize=8)
def _log_ways(n: int) -> np.ndarray:
    """log of n over k, for k = 0 .. n."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    return np.asarray(log_factorial[n] - log_factorial - log_factorial[::-1])


def _at_most(events: int, n: int, p: float) -> float:
    """P(X <= events) of n draws, 0 < p < 1."""
    k = np.arange(events + 1)
    return float(np.exp(_log_ways(n)[: events + 1] + k * math.log(p) + (n - k) * math.log1p(-p)).sum())


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value that two models are right equally often, by the rows that only one of them has right (McNemar 1947)."""
    n = only_first + only_second
    if n == 0:
        return 1.0
    return min(1.0, 2 * _at_most(min(only_first, only_second), n, 0.5))


def smallest_difference(differing: int, rows: int, below: float = 1 - LEVEL) -> float:
    """The difference of two accuracies from which on `mcnemar` says p < `below`; `differing` of `rows` rows are right in one alone."""
    for lead in range(differing % 2, differing + 1, 2):
        if mcnemar((differing + lead) // 2, (differing - lead) // 2) < below:
            return lead / rows
    return math.inf


def rate_at_most(events: int, n: int, level: float = LEVEL) -> float:
    """An upper bound of a rate after `events` of `n`: higher rates give so few with a chance below 1 - level (Clopper, Pearson 1934)."""
    if events >= n:
        return 1.0
    low, high = events / n, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        chance = _at_most(events, n, middle) if 0 < middle < 1 else 0.0
        low, high = (middle, high) if chance > 1 - level else (low, middle)
    return high
