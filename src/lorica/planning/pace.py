"""How long a run takes and what it draws: the FLOPs that it must do, over those a second that runs reach.

Measured on one H200 through train.py (benchmarks/results/qlora_*_h200.json, encoder_*_h200.json): the share of the machine's own matrix
products that training reaches, by the tokens of a micro-batch. Other cards are taken to reach the same share of theirs where a
micro-batch keeps them as long: an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import log

from lorica.planning.cards import Card
from lorica.planning.jobs import Batches
from lorica.planning.memory import Job

MEASURED_ON = "H200 141 GB"
REACHED = 0.786  # of the maker's figure, by a large product of two bf16 matrices
# (FLOPs of a micro-batch, share of the limit), causal models with every activation kept: 512, 2,048, 5,120 and 16,384 tokens of a 7B
DECODERS = ((1.4e13, 0.457), (5.8e13, 0.616), (1.44e14, 0.674), (4.6e14, 0.66))
ENCODERS = ((1.5e12, 0.2), (7e12, 0.35), (2.5e13, 0.45))
NOT_COMPILED = 0.6  # of a compiled run's rate
DEQUANTISED = 0.9  # of the rate with 4-bit weights kept plain
WORKING = 0.85  # of its limit that a card draws in training


@dataclass(frozen=True)
class Pace:
    """tokens: a second. epoch, whole: seconds of an epoch, and of the run; None where the rows are not known. joules: of the run."""

    tokens: float
    epoch: float | None
    whole: float | None
    joules: float | None
    measured: bool


def pace(job: Job, sizes: Batches, card: Card, epochs: float | None, rows: int | None) -> Pace:
    """How fast a job runs on a card."""
    tokens = rate(job, sizes, card)
    if rows is None or epochs is None:
        return Pace(tokens, None, None, None, card.name.startswith(MEASURED_ON[:4]))
    epoch = rows * sizes.mean / tokens
    whole = epoch * epochs
    return Pace(tokens, epoch, whole, whole * card.watts * WORKING, card.name.startswith(MEASURED_ON[:4]))


def rate(job: Job, sizes: Batches, card: Card) -> float:
    """Tokens a second, padding not counted."""
    each = flops(job)
    able = card.teraflops * 1e12 * REACHED
    of_batch = each * job.tokens * (989 / card.teraflops)  # that would keep an H200 as long
    share = _between(DECODERS if job.shape.decoder else ENCODERS, of_batch)
    share *= (1.0 if job.way.compiled else NOT_COMPILED) * (DEQUANTISED if job.four_bit and not job.resident else 1.0)
    padding = min(1.0, sizes.mean * sizes.rows / max(1, job.tokens))
    return able * share / each * padding


def flops(job: Job) -> float:
    """Floating point operations of a token: two products for each weight forward, two more for what flows back, two for the gradients of
    weights that are trained themselves, and two for each that is computed again."""
    shape, trained = job.shape, 6 if job.way.full else 4
    again = 2.0 * job.recomputed / max(1, shape.layers)
    head = (4 if shape.decoder else 0) * shape.vocabulary * shape.hidden * job.targets / max(1, job.tokens)
    return (trained + again) * shape.in_linears + head


def _between(points: tuple[tuple[float, float], ...], at: float) -> float:
    """By straight lines over the logarithm; the ends' beyond them, less in proportion below."""
    if at <= points[0][0]:
        return points[0][1] * max(0.2, at / points[0][0])
    for (low, a), (high, b) in pairwise(points):
        if at <= high:
            return a + (b - a) * log(at / low) / log(high / low)
    return points[-1][1]
