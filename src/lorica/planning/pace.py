"""How long a run takes and what it draws: the FLOPs that it must do, over those a second that runs reach, and the bytes of 4-bit weights
that are made plain.

Measured on one H200 through train.py (benchmarks/results/qlora_*_h200.json, encoder_h200.json): the share of the machine's own matrix
products that training reaches, by the FLOPs of a micro-batch. Other cards are taken to reach the same share of theirs where a micro-batch
keeps them as long: an estimate.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from math import log

from lorica.planning.cards import Card
from lorica.planning.jobs import Batches
from lorica.planning.memory import Job, limit, with_evaluation

MEASURED_ON = "H200 141 GB"
REACHED = 0.786  # of the maker's figure, by a large product of two bf16 matrices
# (FLOPs of a micro-batch, share of the limit). A 7B with adapters, 4-bit weights kept plain: 512, 2,048, 5,120 and 16,384 tokens.
DECODERS = ((1.4e13, 0.457), (5.8e13, 0.616), (1.44e14, 0.674), (4.6e14, 0.66))
# RoBERTa-base: adapters at 8,192 and 32,768 tokens, every weight at 32,768.
ENCODERS = ((2.8e12, 0.322), (1.1e13, 0.371), (1.67e13, 0.424))
AGAIN = 0.7  # of what its FLOPs would take: a second forward has no gradients of adapters (benchmarks/results/fit_h200.json)
OFFLOADED = 0.93  # of the rate with every layer computed again, where inputs wait in host memory: 0.90 to 0.94 (likewise)
NOT_COMPILED = 0.45  # of a compiled run's rate (docs/experiments.md: 4,096 tokens, every layer computed again)
PASSED = 0.8  # of the bandwidth, when weights are made plain
DEQUANTISED = 2.53  # bytes read and written for each
FP8 = 1.47  # times the rate of products in bf16, 16,384 tokens of a 7B
# Seconds that the host takes to launch a compiled layer, forward and backward (docs/experiments.md); a second forward takes a third of
# that, captured steps take none. RoBERTa takes 65 ms, on two GPUs. A 7B in 4 bits takes 131 ms on one host, 207 to 300 on others: a slow
# one is counted, for captured steps are hardly slower than a fast host's.
LAUNCHED, LAUNCHED_4BIT = 0.0055, 0.009
WORKING = 0.95  # of its limit that a card draws in training: 0.87 to 0.99


@dataclass(frozen=True)
class Pace:
    """tokens: a second, of all cards. epoch, whole: seconds of an epoch, and of the run; None where that is unknown. joules: of the run."""

    tokens: float
    epoch: float | None
    whole: float | None
    joules: float | None
    measured: bool


def pace(job: Job, sizes: Batches, card: Card, count: int, epoch: float | None, whole: float | None) -> Pace:
    """How fast a job runs on so many cards of a kind.

    Args:
        epoch, whole: tokens of an epoch, and of the run, without padding; None where that is not known.
    """
    tokens = count * rate(job, sizes, card)
    seconds = None if whole is None else whole / tokens
    joules = None if seconds is None else seconds * count * card.watts * WORKING
    return Pace(tokens, None if epoch is None else epoch / tokens, seconds, joules, card.name.startswith(MEASURED_ON[:4]))


def rate(job: Job, sizes: Batches, card: Card) -> float:
    """Tokens a second, padding not counted."""
    once = flops(replace(job, recomputed=0)) * job.tokens
    of_batch = once + AGAIN * (flops(job) * job.tokens - once)
    teraflops = card.products(job.way.b)
    share = _between(DECODERS if job.shape.decoder else ENCODERS, once * 989 / teraflops)  # what keeps an H200 as long
    way = (1.0 if job.way.compiled else NOT_COMPILED) * (FP8 if job.fp8 else 1.0) * (OFFLOADED if job.offload else 1.0)
    seconds = of_batch / (teraflops * 1e12 * REACHED * share * way)
    if job.four_bit and (job.frozen or not job.resident):
        again = 0 if job.resident else 2 * job.learning + job.recomputed
        passes = (job.frozen + again) / max(1, job.shape.layers)
        seconds += passes * job.shape.in_linears * DEQUANTISED / (card.bandwidth * 1e9 * PASSED)
    launches = (LAUNCHED_4BIT if job.four_bit else LAUNCHED) * (job.shape.layers + job.recomputed / 3)
    if job.way.compiled and not captured(job, card):
        seconds = max(seconds, launches)
    return min(float(job.tokens), sizes.mean * sizes.rows) / seconds


def captured(job: Job, card: Card) -> bool:
    """Whether micro-steps run as CUDA graphs: they may, and there is room for them with evaluation beside them (`models.fitting`)."""
    return job.way.compiled and job.capturable and not (job.random and job.recomputed) and with_evaluation(job, card) <= limit(card)


def flops(job: Job) -> float:
    """Floating point operations of a token: two products for each weight forward, two more for what flows back, two for the gradients of
    weights that are trained themselves, and two for each that is computed again. Nothing flows back through frozen layers."""
    shape = job.shape
    trained = 2 + (4 if job.way.full else 2) * job.learning / max(1, shape.layers)
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
