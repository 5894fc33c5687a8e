"""The batch plan: which rows are in which micro-batch of which step on which rank, as a pure function of (seed, epoch, step, rank).

Training is one sequence of micro-steps k = 0, 1, ... over all epochs; a window of `accumulate` micro-steps is one optimiser step.
Every rank has the same number of micro-steps. No window is partial: the rows left at the end of an epoch are spread over a whole
window, if need be with empty micro-batches, so that the loss of a window is always (sum over its supervised tokens) / (their
number over all micro-batches and ranks), exactly the loss of one large batch.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

PLAN_VERSION = 3  # another one for the same settings is another plan
GROUPING_POOL = 16  # windows whose rows are sorted together when rows are grouped by length
LEAST_PIECE, OF_LONGEST = 1024, 1.25  # tokens of a packed micro-batch's pieces, at least; times the longest row
UNFILLED = 0.015  # share of the tokens that may be lost by packing pieces, not whole micro-batches
TRIED = 16  # micro-batches that are packed to see what is lost


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one micro-step on one rank. `rows` may be empty.

    `window_supervised`: supervised tokens (or labelled texts) of the whole window on all ranks; the loss is divided by it.
    """

    rows: tuple[int, ...]
    window_supervised: int
    epoch: int


@dataclass(frozen=True)
class _Epoch:
    windows: tuple[tuple[tuple[int, ...], ...], ...]  # window -> accumulate x world micro-batches, rank fastest
    supervised: tuple[int, ...]  # per window


class BatchPlan:
    """The plan of a training run.

    Args:
        lengths: tokens of each row. supervised: supervised tokens of each row (1 for a labelled text).
        batch_size, tokens_per_batch: the micro-batch, by rows or by tokens; exactly one is given.
        padded: whether micro-batches are padded to their longest row, so that tokens are counted with padding.
        group_by_length: rows share a micro-batch by their lengths: like ones where it is padded, ones that fill it up where rows lie end
            to end. The order stays random.
        parts: every micro-batch of the settings above is cut into so many, of like tokens, one after the other: a step has the same rows
            and the same loss, in `accumulate` times as many micro-steps. Packed ones are made of `pieces`, and of no more parts than these
            none outgrows its share.
        max_epochs, max_steps: -1 for no limit; one of them must be set.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        supervised: Sequence[int],
        *,
        seed: int,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        accumulate: int = 1,
        world_size: int = 1,
        padded: bool = True,
        group_by_length: bool = True,
        parts: int = 1,
        max_epochs: int = 1,
        max_steps: int = -1,
    ) -> None:
        assert (batch_size is None) != (tokens_per_batch is None) and (max_epochs > 0 or max_steps > 0) and len(lengths) > 0
        self.lengths, self.supervised = np.asarray(lengths, np.int64), np.asarray(supervised, np.int64)
        self.seed, self.batch_size, self.tokens_per_batch = seed, batch_size, tokens_per_batch
        self.world_size, self.padded, self.group_by_length, self.parts = world_size, padded, group_by_length, parts
        self._whole, self.accumulate = accumulate, accumulate * parts  # micro-batches of a step as they are asked for, and as they are run
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)
        self.sizes = lru_cache(maxsize=1)(self._count)
        self.epoch_ends: list[int] = []  # optimiser steps after which each epoch is complete
        while (max_epochs < 0 or len(self.epoch_ends) < max_epochs) and (
            max_steps < 0 or not self.epoch_ends or self.epoch_ends[-1] < max_steps
        ):
            done = self.epoch_ends[-1] if self.epoch_ends else 0
            self.epoch_ends.append(done + len(self._epoch(len(self.epoch_ends)).windows))
        self.steps = self.epoch_ends[-1] if max_steps < 0 else min(max_steps, self.epoch_ends[-1])

    def fingerprint(self) -> str:
        """Equal for plans that agree on every micro-step that both have: of the same rows, seed, sizes and ranks."""
        settings = (self.seed, self.batch_size, self.tokens_per_batch, self._whole, self.world_size, self.padded, self.group_by_length)
        cut = f" in {self.parts}" if self.parts > 1 else ""
        return hashlib.sha256(f"{PLAN_VERSION} {settings}{cut}".encode() + self.lengths.tobytes() + self.supervised.tobytes()).hexdigest()

    def __len__(self) -> int:
        """Micro-steps of the whole run, on each rank."""
        return self.steps * self.accumulate

    def micro_batch(self, k: int, rank: int = 0) -> MicroBatch:
        """Micro-step k of a rank."""
        assert 0 <= k < len(self) and 0 <= rank < self.world_size
        step, within = divmod(k, self.accumulate)
        epoch = int(np.searchsorted(self.epoch_ends, step, side="right"))
        window = step - (self.epoch_ends[epoch - 1] if epoch else 0)
        plan = self._epoch(epoch)
        return MicroBatch(plan.windows[window][within * self.world_size + rank], plan.supervised[window], epoch)

    def window_rows(self, step: int) -> list[int]:
        """The rows of an optimiser step, of all its micro-batches on all ranks."""
        span = range(step * self.accumulate, (step + 1) * self.accumulate)
        return [row for k in span for rank in range(self.world_size) for row in self.micro_batch(k, rank).rows]

    def epoch_at(self, step: int) -> float:
        """How many epochs are complete after `step` optimiser steps, with the fraction of the one under way."""
        epoch = int(np.searchsorted(self.epoch_ends, step, side="right"))
        start = self.epoch_ends[epoch - 1] if epoch else 0
        end = self.epoch_ends[epoch] if epoch < len(self.epoch_ends) else start + 1
        return epoch + (step - start) / (end - start)

    def validation_steps(self, interval: float | int) -> list[int]:
        """Optimiser steps after which to validate: every `interval` micro-batches before they are cut into parts (int, rounded up to
        steps) or share of an epoch (float), and always after the last."""
        if isinstance(interval, int):
            every = -(-interval // self._whole)
            points = set(range(every, self.steps + 1, every))
        else:
            points, start = set(), 0
            for end in self.epoch_ends:
                parts = math.ceil(1 / interval - 1e-9)
                points |= {start + max(1, round((end - start) * min(1.0, i * interval))) for i in range(1, parts + 1)}
                start = end
        return sorted({p for p in points if p <= self.steps} | {self.steps})

    # -------------------------------------------------------------------------------------------------------- one epoch

    def _build_epoch(self, epoch: int) -> _Epoch:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
        per_window = self._whole * self.world_size
        if self.group_by_length and not self.padded and self.tokens_per_batch is not None:
            batches = self._pack(rng.permutation(len(self.lengths)), per_window)
        else:
            batches = self._cut(self._row_order(rng, per_window))
        if self.group_by_length:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        windows = [batches[i : i + per_window] for i in range(0, len(batches), per_window)]
        if len(windows[-1]) < per_window:
            windows[-1] = self._spread(windows[-1], per_window)
        balanced = tuple(tuple(tuple(b) for b in self._in_parts(self._balance(window))) for window in windows)
        return _Epoch(balanced, tuple(int(sum(self.supervised[list(b)].sum() for b in w if b)) for w in balanced))

    def _row_order(self, rng: np.random.Generator, per_window: int) -> list[int]:
        order = rng.permutation(len(self.lengths))
        if not self.group_by_length:
            return [int(i) for i in order]
        chunks = self._chunks(order, per_window)
        return [int(i) for chunk in chunks for i in chunk[np.argsort(-self.lengths[chunk], kind="stable")]]

    def _chunks(self, order: np.ndarray, per_window: int) -> list[np.ndarray]:
        """Rows in order, GROUPING_POOL windows' worth at a time."""
        size = self.batch_size or max(1, self.tokens_per_batch // max(1, int(self.lengths.mean())))  # type: ignore[operator]
        pool = size * per_window * GROUPING_POOL
        return [order[i : i + pool] for i in range(0, len(order), pool)]

    @cached_property
    def _pieces(self) -> int:
        """Of each packed micro-batch, in every epoch."""
        assert self.tokens_per_batch is not None
        return pieces(self.lengths, self.tokens_per_batch)

    def _pack(self, order: np.ndarray, per_window: int) -> list[list[int]]:
        """Rows into pieces, the longest first, each to the fullest that still has room for it; and pieces, one after the other, into
        micro-batches.

        A chunk's emptiest pieces are broken up into the next chunk, so that only the epoch's last micro-batch is left unfilled.
        """
        assert self.tokens_per_batch is not None
        each = self._pieces
        batches: list[list[int]] = []
        left: list[int] = []
        for chunk in self._chunks(order, per_window):
            rows = np.concatenate([np.asarray(left, order.dtype), chunk])
            packed = pack(self.lengths, rows[np.argsort(-self.lengths[rows], kind="stable")], self.tokens_per_batch // each)
            packed.sort(key=lambda piece: -int(self.lengths[piece].sum()))
            made = (len(packed) - 1) // each
            left = [row for piece in packed[made * each :] for row in piece]
            batches += [[row for piece in packed[i : made * each : made] for row in piece] for i in range(made)]
        return [*batches, left]

    def _count(self) -> tuple[list[int], list[int], list[int]]:
        """(tokens, rows, supervised tokens) of every micro-batch of every rank over the whole run; an empty one is taken for row 0."""
        micro = [self.micro_batch(k, rank).rows or (0,) for k in range(len(self)) for rank in range(self.world_size)]
        flat = np.concatenate([np.asarray(rows) for rows in micro])
        begins = np.cumsum([0, *(len(rows) for rows in micro[:-1])])
        tokens, supervised = np.add.reduceat(self.lengths[flat], begins), np.add.reduceat(self.supervised[flat], begins)
        return tokens.tolist(), [len(rows) for rows in micro], supervised.tolist()

    def _cut(self, order: list[int]) -> list[list[int]]:
        """Rows in order into micro-batches within the size."""
        return cut_batches(self.lengths, order, self.batch_size, self.tokens_per_batch, self.padded)

    def _spread(self, batches: list[list[int]], parts: int) -> list[list[int]]:
        """An epoch's last micro-batches as a whole window: the heaviest is halved until there are enough, so that none outgrows
        its size; where single rows are left, the rest stay empty."""
        piles = [list(b) for b in batches]
        while len(piles) < parts:
            heaviest = max(piles, key=lambda b: (len(b) > 1, int(self.lengths[b].sum()) if b else 0))
            if len(heaviest) < 2:
                return piles + [[] for _ in range(parts - len(piles))]
            piles.remove(heaviest)
            by_length = sorted(heaviest, key=lambda r: -int(self.lengths[r]))
            piles += [by_length[::2], by_length[1::2]]
        return piles

    def _in_parts(self, window: list[list[int]]) -> list[list[int]]:
        """A window's micro-batches, each cut into `parts`: the first parts of all ranks, then the second ones."""
        if self.parts == 1:
            return window
        cut = [self._cut_up(batch) for batch in window]
        ranks = self.world_size
        return [cut[at + rank][part] for at in range(0, len(cut), ranks) for part in range(self.parts) for rank in range(ranks)]

    def _cut_up(self, rows: list[int]) -> list[list[int]]:
        """A micro-batch in `parts`: in order, as it was packed, where a row would otherwise make one too large."""
        evenly = cut_evenly(self.lengths, rows, self.parts)
        if self.tokens_per_batch is None or self.padded:
            return evenly
        share = self.tokens_per_batch // self.parts
        within = max(int(self.lengths[part].sum()) for part in evenly) <= share
        return evenly if within else cut_in_order(self.lengths, rows, self.parts, share) or evenly

    def _balance(self, window: list[list[int]]) -> list[list[int]]:
        """Deal a window's micro-batches so that the ranks of each micro-step have like amounts of work."""
        if self.world_size == 1:
            return window
        return sorted(window, key=lambda b: -int(self.lengths[b].sum()) if b else 0)


def pack(lengths: np.ndarray, order: Sequence[int] | np.ndarray, tokens: int) -> list[list[int]]:
    """Rows in order into batches of at most `tokens` tokens: each to the batch with the least room that is enough, else to a new one."""
    batches: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, batch), sorted
    for row in order:
        n = int(lengths[row])
        at = bisect_left(rooms, (n, -1))
        if at < len(rooms):
            room, batch = rooms.pop(at)
        else:
            room, batch = tokens, len(batches)
            batches.append([])
        batches[batch].append(int(row))
        insort(rooms, (room - n, batch))
    return batches


def pieces(lengths: np.ndarray, tokens: int) -> int:
    """How many pieces a packed micro-batch of so many tokens is made of: the largest power of two that fills it nearly as well as one does.

    Cut into as many parts, or into half as many, no part has more than its even share of the tokens, whatever rows are in it.
    """
    rows = min(len(lengths), int(TRIED * tokens / max(1.0, float(lengths.mean()))))
    tried = -np.sort(-lengths[:: len(lengths) // rows]) if rows else lengths
    smallest = max(LEAST_PIECE, int(OF_LONGEST * tried.max(initial=1)))
    if tokens < 2 * smallest or int(tried.sum()) < 2 * tokens:
        return 1
    enough = _filled(tried, tokens) - UNFILLED
    found = 1 << (tokens // smallest).bit_length() - 1
    while found > 1 and _filled(tried, tokens // found) < enough:
        found //= 2
    return found


def _filled(lengths: np.ndarray, tokens: int) -> float:
    """The share of the tokens of batches of packed rows, but for the emptiest one."""
    sizes = sorted(int(lengths[batch].sum()) for batch in pack(lengths, range(len(lengths)), tokens))
    return sum(sizes[1:]) / max(1, len(sizes[1:]) * tokens)


def cut_in_order(lengths: np.ndarray, rows: Sequence[int], parts: int, tokens: int) -> list[list[int]] | None:
    """Rows in order as so many lists of at most `tokens` tokens, the last ones empty where rows are few; None where they don't go in."""
    found = cut_batches(lengths, rows, None, tokens, padded=False)
    if len(found) > parts or any(int(lengths[batch].sum()) > tokens for batch in found):
        return None
    return found + [[] for _ in range(parts - len(found))]


def cut_evenly(lengths: np.ndarray, rows: Sequence[int], parts: int) -> list[list[int]]:
    """Rows as so many lists of like tokens: the longest first, each to the list that has the fewest. Some are empty where rows are few."""
    found: list[list[int]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for row in sorted(rows, key=lambda r: -int(lengths[r])):
        at = sizes.index(min(sizes))
        found[at].append(row)
        sizes[at] += int(lengths[row])
    return found


def batch_tokens(lengths: Sequence[int] | np.ndarray, rows: Sequence[int], padded: bool) -> int:
    """Tokens of a batch, with its padding where it is `padded` to its longest row."""
    of_rows = [int(lengths[i]) for i in rows]
    return len(of_rows) * max(of_rows) if padded else sum(of_rows)


def cut_batches(lengths: np.ndarray, order: Sequence[int], batch_size: int | None, tokens: int | None, padded: bool) -> list[list[int]]:
    """Rows in order into batches of `batch_size` rows or at most `tokens` tokens (counted with padding where `padded`).

    A row longer than the budget gets a batch of its own.
    """
    if batch_size is not None:
        return [list(order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    assert tokens is not None
    batches: list[list[int]] = []
    total = longest = 0
    for row in order:
        n = int(lengths[row])
        cost = max(longest, n) * (len(batches[-1]) + 1) if padded and batches else total + n
        if not batches or cost > tokens:
            batches.append([])
            total = longest = 0
        batches[-1].append(row)
        total, longest = total + n, max(longest, n)
    return batches


def evaluation_batches(lengths: Sequence[int], tokens: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Every row once, longest first, in padded batches of at most `tokens` tokens; each rank takes every world_size-th batch.

    Where there are at least as many rows as ranks, no rank is left without a batch.
    """
    sizes = np.asarray(lengths, np.int64)
    order = [int(i) for i in np.argsort(-sizes, kind="stable")]
    batches = cut_batches(sizes, order, None, tokens, padded=True) if order else []
    while len(batches) < world_size and (most := max(batches, key=len, default=[])) and len(most) > 1:
        at = batches.index(most)
        batches[at : at + 1] = [most[: len(most) // 2], most[len(most) // 2 :]]
    return batches[rank::world_size]
