"""Intervals, tests and bounds against brute force, simulation and published figures."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.functional.classification import multiclass_f1_score

from lorica import statistics


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60))
def test_macro_f1_is_torchmetrics(rows: list[tuple[int, int]]) -> None:
    true, predicted = np.array(rows).T
    confusion = np.bincount(true * 4 + predicted, minlength=16).reshape(4, 4)
    theirs = multiclass_f1_score(torch.tensor(predicted), torch.tensor(true), 4, average="macro")
    assert statistics.macro_f1(confusion) == pytest.approx(float(theirs), abs=1e-6)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial_test(a: int, b: int) -> None:
    n = a + b
    tail = sum(math.comb(n, k) for k in range(min(a, b) + 1)) / 2**n
    assert statistics.mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_of_many_rows() -> None:
    assert statistics.mcnemar(0, 0) == 1.0 and statistics.mcnemar(3000, 3000) == 1.0
    assert statistics.mcnemar(3100, 2900) == pytest.approx(
        0.0102, abs=3e-4
    )  # the normal approximation with continuity: z = 199 / sqrt(6000)


def test_the_smallest_difference_is_where_the_test_turns() -> None:
    smallest = statistics.smallest_difference(100, 1000)
    lead = round(smallest * 1000)
    assert statistics.mcnemar(50 + lead // 2, 50 - lead // 2) < 0.05 <= statistics.mcnemar(50 + lead // 2 - 1, 50 - lead // 2 + 1)
    assert statistics.smallest_difference(3, 1000) == math.inf  # three rows can't show anything


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    rng, held = np.random.default_rng(0), 0
    for trial in range(200):
        true = rng.integers(0, 3, 300)
        predicted = np.where(rng.random(300) < 0.8, true, (true + 1) % 3)
        low, high = statistics.intervals(true, predicted, 3, seed=trial)["accuracy"]
        held += low <= 0.8 <= high
    assert 180 <= held <= 199


@pytest.mark.parametrize(("events", "n", "bound"), [(0, 59, 0.0495), (1, 92, 0.0505), (5, 100, 0.1023), (10, 10, 1.0)])
def test_bounds_of_a_rate_are_clopper_and_pearsons(events: int, n: int, bound: float) -> None:
    assert statistics.rate_at_most(events, n) == pytest.approx(bound, abs=2e-4)
