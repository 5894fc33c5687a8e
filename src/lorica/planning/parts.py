"""In how many parts a run's micro-batches are fastest on a card (`trainer.fit`): the same rows and the same loss a step, whatever it is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lorica.config import TrainConfig
from lorica.planning import memory
from lorica.planning.cards import GIB, Card
from lorica.planning.jobs import Batches, job_of
from lorica.planning.lengths import Lengths
from lorica.planning.pace import captured, rate
from lorica.planning.shapes import Shape

MOST_PARTS = 64
BETTER = 1.03  # times as fast must another way be than the one with fewer parts
HOST_EMBEDDINGS = 0.99  # of the rate without
# Of its rate is a way worth that leaves less memory than a run keeps where it has a choice: it may not fit when it is tried, for the
# allocator's pieces, and then runs in twice as many parts, however slow these are.
TIGHT = 0.85


@dataclass(frozen=True)
class Size:
    """parts: that each micro-batch is cut into. host_embeddings: whether the input embeddings are kept in host memory."""

    parts: int = 1
    host_embeddings: bool = False


@dataclass(frozen=True)
class Sized:
    """A size, how the run's layers run with it, and its micro-batches."""

    size: Size
    fit: memory.Fit
    sizes: Batches


def asked(config: TrainConfig) -> Size:
    """The run as it is set up."""
    return Size(1, config.trainer.offload_embeddings)


def sized(config: TrainConfig, shape: Shape, card: Card, lengths: Lengths | None, size: Size) -> Sized:
    """A run in parts, on a card."""
    return _sized(config, card, *job_of(config, shape, card, lengths), size)


def _sized(config: TrainConfig, card: Card, job: memory.Job, sizes: Batches, size: Size) -> Sized:
    """`sized`, of a job in one part."""
    job, sizes = _cut(replace(job, host_embeddings=size.host_embeddings), sizes, size.parts)
    return Sized(size, settled(config, job, sizes, card), sizes)


def settled(config: TrainConfig, job: memory.Job, sizes: Batches, card: Card) -> memory.Fit:
    """How the run's layers will run: as few as can be computed again, or as few as leave room for evaluation, where micro-steps can be
    captured then and are so much faster."""
    asked, resident = config.trainer.gradient_checkpointing, config.trainer.resident_weights
    plain = memory.settle(job, card, asked, resident)
    if not (job.way.compiled and job.capturable) or captured(plain.job, card):
        return plain
    roomy = memory.settle(replace(job, room_for_evaluation=True, evaluated=min(job.evaluated, job.tokens)), card, asked, resident)
    faster = captured(roomy.job, card) and rate(roomy.job, sizes, card) > rate(plain.job, sizes, card) * BETTER
    return roomy if faster else plain


def fastest(config: TrainConfig, shape: Shape, card: Card, lengths: Lengths | None) -> Sized | None:
    """The fastest way that fits, a tight one counted as slower; None where none does."""
    best, most = None, 0.0
    job, sizes = job_of(config, shape, card, lengths)
    for size in _ways(config, shape, sizes.rows):
        found = _sized(config, card, job, sizes, size)
        if not found.fit.fits:
            continue
        worth = (HOST_EMBEDDINGS if size.host_embeddings else 1.0) * (TIGHT if found.fit.peak > memory.limit(card) else 1.0)
        speed = rate(found.fit.job, found.sizes, card) * worth
        if best is None or speed > most * BETTER:
            best, most = found, speed
    return best


def smallest(config: TrainConfig, shape: Shape, card: Card, lengths: Lengths | None) -> Sized:
    """The way that takes the least memory."""
    job, sizes = job_of(config, shape, card, lengths)
    return min((_sized(config, card, job, sizes, size) for size in _ways(config, shape, sizes.rows)), key=lambda one: one.fit.peak)


def told(size: Size, config: TrainConfig, shape: Shape, card: Card, lengths: Lengths | None) -> str:
    """What to tell the user of a size that was not asked for: why, and what it is."""
    cut = f"micro-batches run in {size.parts} parts (the same rows and the same loss a step)" if size.parts > 1 else ""
    moved = "the input embeddings wait in host memory" if size.host_embeddings and not config.trainer.offload_embeddings else ""
    faster = sized(config, shape, card, lengths, asked(config)).fit.fits
    why = "as it is faster here" if faster else f"to fit {card.usable / GIB:.1f} GiB"
    return f"{why}, {' and '.join(filter(None, (cut, moved)))}"


def movable(config: TrainConfig, shape: Shape) -> bool:
    """Whether the input embeddings can wait in host memory: frozen, and not the output head's weights as well."""
    lora = config.model.lora
    return shape.decoder and shape.head > 0 and lora is not None and not lora.modules_to_save


def _ways(config: TrainConfig, shape: Shape, rows: int) -> Iterator[Size]:
    """Parts of so many rows, down to a row each, without and with the embeddings on the card."""
    before = asked(config)
    yield before
    if not config.trainer.fit:
        return
    can_move = movable(config, shape) and not before.host_embeddings
    parts = 1
    while parts <= min(MOST_PARTS, rows):
        if parts > 1:
            yield Size(parts, before.host_embeddings)
        if can_move:
            yield Size(parts, True)
        parts *= 2


def _cut(job: memory.Job, sizes: Batches, parts: int) -> tuple[memory.Job, Batches]:
    """The largest part: its even share, and, where it is no whole number of pieces, half a row that is one too many."""
    if parts == 1:
        return job, sizes
    rows = -(-job.rows // parts)
    over = sizes.longest // 2 if sizes.pieces % parts else 0
    tokens = min(job.tokens, max(sizes.longest, job.tokens // parts + over))
    targets = min(tokens, -(-job.targets * tokens // job.tokens))
    return (
        replace(job, tokens=tokens, rows=rows, targets=targets),
        replace(sizes, tokens=tokens, rows=rows, targets=targets),
    )
