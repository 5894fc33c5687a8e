"""The memory of runs: against figures that were measured, and as the product decides."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lorica import answering, train
from lorica.composition import compose
from lorica.kernels import loss
from lorica.models import fitting
from lorica.planning import jobs, memory
from lorica.planning.cards import CARDS, GIB, Card
from lorica.planning.lengths import Lengths
from lorica.planning.shapes import find_shape

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
H200 = CARDS["h200_141gb"]


def job(*overrides: str, lengths: Lengths | None = None, card: Card = H200) -> memory.Job:
    config = compose("train", ["model=mistral_qlora", "data=sentiment", "trainer.compile=true", *overrides])
    return jobs.job_of(config, find_shape(config.model, 3), card, lengths)[0]


def test_the_numbers_are_the_products_own() -> None:
    assert memory.TILE_ELEMENTS == loss.TILE_ELEMENTS and memory.EVALUATION_ELEMENTS == loss.EVALUATION_ELEMENTS
    assert (memory.SPARE, memory.SPARE_BYTES, memory.PLENTY) == (fitting.SPARE, fitting.SPARE_BYTES, fitting.PLENTY)
    assert memory.PREDICTED_ELEMENTS == answering.ELEMENTS
    assert jobs.EVALUATED == train.EVAL_TOKENS_FACTOR and jobs.WORTH_COMPILING == fitting.WORTH_COMPILING


@pytest.mark.parametrize("case", ["512", "2k", "16k"])
def test_measured_peaks_of_the_7b_are_met_within_three_percent(case: str) -> None:
    rows = json.loads((RESULTS / "qlora_rates_h200.json").read_text())["runs"]
    measured = next(r["peak_gib"] for r in rows if r["case"] == case)
    tokens = {"512": 512, "2k": 2048, "16k": 16384}[case]
    planned = replace(job(f"trainer.tokens_per_batch={tokens}", "model.max_length=512"), resident=True, targets=round(0.55 * tokens))
    assert memory.total(memory.train(planned, H200)) / GIB == pytest.approx(measured, rel=0.03)


def test_each_thing_that_saves_memory_does() -> None:
    base = job()
    peak = memory.total(memory.train(base, H200))
    for smaller in (
        replace(base, recomputed=16),
        replace(base, recomputed=32),
        replace(base, tokens=2048, targets=1024),
        replace(base, host_embeddings=True),
        replace(base, trained=base.trained // 2),
    ):
        assert memory.total(memory.train(smaller, H200)) < peak
    assert memory.total(memory.train(replace(base, recomputed=32, offload=True), H200)) < memory.total(
        memory.train(replace(base, recomputed=32), H200)
    )
    assert memory.total(memory.train(replace(base, resident=True), H200)) > peak
    assert memory.total(memory.train(replace(base, four_bit=False, double=False), H200)) > peak


def test_a_smaller_card_has_more_layers_computed_again() -> None:
    def settled(gib: float) -> memory.Fit:
        return memory.settle(job(), replace(H200, memory=int(gib * GIB)), None, None)

    found = [settled(gib) for gib in (139, 24, 12, 7.5)]
    assert found[0].job.resident and found[0].job.recomputed == 0
    counts = [fit.job.recomputed for fit in found]
    assert counts == sorted(counts) and counts[-1] == 32
    assert all(fit.fits for fit in found)
    assert not settled(4.5).fits


def test_what_was_asked_for_is_not_changed() -> None:
    small = replace(H200, memory=8 * GIB)
    assert memory.settle(job(), small, False, None).job.recomputed == 0
    assert memory.settle(job(), small, 5, None).job.recomputed == 5
    assert memory.settle(job(), H200, True, None).job.recomputed == 32
    assert memory.settle(job(), H200, "offload", None).job.offload
