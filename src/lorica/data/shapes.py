"""The few fixed sizes that flat micro-batches are filled up to, so that compiled layers and captured steps meet no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST = 3  # sizes; each is compiled, which takes some ten seconds
FINEST = 512  # different sizes to choose from
STEP = 64  # tokens: sizes are multiples
WORTH = 0.03  # another size must save this share of all tokens


@dataclass(frozen=True, order=True)
class Shape:
    """A micro-batch's size once it is filled up.

    tokens: of all sequences. sequences: those of fillers and empty ones included. targets: places to predict, or labelled texts.
    longest: tokens of the longest sequence of any micro-batch.
    """

    tokens: int
    sequences: int
    targets: int
    longest: int


def shapes(tokens: Sequence[int], sequences: Sequence[int], targets: Sequence[int], longest: int) -> list[Shape]:
    """The fewest sizes, smallest first, that waste little more than the best `MOST` would.

    Args:
        tokens, sequences, targets: of every micro-batch that will be met. longest: tokens of the longest row.
    """
    total, rows, places = np.asarray(tokens), np.asarray(sequences), np.asarray(targets)
    step = STEP * -(-int(total.max()) // (STEP * FINEST))
    sizes = _sizes(-(-total // step) * step)
    chosen = np.searchsorted(sizes, total)
    made = []
    for i, size in enumerate(sizes):
        own = chosen == i
        fillers = -(-(size - total[own]) // longest)
        made.append(Shape(int(size), int((rows[own] + fillers).max()), int(places[own].max()), longest))
    return made


def _sizes(rounded: np.ndarray) -> list[int]:
    """At most MOST of the values, so that the sum over all values of the next one up is smallest (dynamic programming)."""
    values, counts = np.unique(rounded, return_counts=True)
    before = np.concatenate([[0], counts.cumsum()])
    best = values * before[1:]  # cost of the values up to i when i is chosen and nothing below is
    cuts: list[np.ndarray] = [np.full(len(values), -1)]
    costs = [int(best[-1])]
    for _ in range(1, min(MOST, len(values))):
        cost = best[:, None] + (before[None, 1:] - before[1:, None]) * values[None, :]  # [below, chosen]
        cost[np.tril_indices(len(values))] = 1 << 60  # below must be smaller
        cuts.append(cost.argmin(0))
        best = cost.min(0)
        costs.append(int(best[-1]))
    enough = next(k for k, cost in enumerate(costs) if cost <= min(costs) + WORTH * int((values * counts).sum()))
    chosen, at = [], len(values) - 1
    for k in range(enough, -1, -1):
        chosen.append(int(values[at]))
        at = int(cuts[k][at])
    return chosen[::-1]
