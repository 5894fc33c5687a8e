"""What every data module does with its rows: encode them, plan the batches, and hand out the plan's micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from lorica.config import DataConfig
from lorica.data.batching import BatchPlan, batch_tokens, cut_evenly, evaluation_batches
from lorica.data.collate import collate_candidates, collate_causal, collate_classifier, fill
from lorica.data.encoding import CausalEncoder, ClassifierEncoder, Encoded, Truncation
from lorica.data.examples import SPLITS
from lorica.data.rows import Rows
from lorica.data.shapes import Shape, shapes
from lorica.data.token_cache import TokenCache
from lorica.signals import in_worker

SHOWN_ROWS = 8


@dataclass
class Batching:
    """How rows become batches: the plan's settings, and what the model's attention can take."""

    pad_id: int
    padded: bool = True
    eval_tokens: int = 8192
    world_size: int = 1
    rank: int = 0
    plan: dict[str, Any] = field(default_factory=dict)


class LoricaDataModule(Rows, LightningDataModule):
    """The rows of one data set (a subclass says of which, see `Rows`) as a model's batches.

    Used in three calls: `load()` reads and splits; `encode(encoder)` tokenises; `connect(batching)` plans the batches.
    """

    def __init__(self, config: DataConfig, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.truncation = Truncation()
        self.parts = 1  # that a micro-batch is known to need, for the GPU's memory
        self.resume_at = 0  # the micro-step that training starts from
        self.shapes: list[Shape] = []  # sizes that training batches are filled up to, smallest first; none: they stay as they are
        self.teacher_scores: torch.Tensor | None = None  # a teacher's log-probabilities, fp32 [training rows, labels]

    # -------------------------------------------------------------------------------------------------------- encoding

    def encode(self, encoder: ClassifierEncoder | CausalEncoder, progress: Callable[[int, int], None] | None = None) -> None:
        """Tokenise every split for one model, or read what an earlier run kept of the same; `tokens` says which it was.

        A causal model is trained on answers and, for a labelled set, evaluated on `Candidates`.

        Args:
            progress: told (examples done, examples in all) every so often.
        """
        splits = self.splits
        self.encoder = encoder
        self.tokens = TokenCache(encoder, self.config.token_cache)
        done, total = 0, sum(len(splits[split]) for split in SPLITS)

        def count(more: int) -> None:
            nonlocal done
            done += more
            if progress is not None:
                progress(done, total)

        self.train_rows: list[Encoded] = self.tokens.rows(splits.train, self.truncation, count)
        scored = isinstance(encoder, CausalEncoder) and self.labels is not None
        spare = Truncation()
        self.eval_rows: dict[str, list[Any]] = {
            split: self.tokens.candidates(splits[split], count) if scored else self.tokens.rows(splits[split], spare, count)
            for split in SPLITS[1:]
        }
        self.scored = scored

    def leave_out_unsupervised(self) -> None:
        """Train without the rows that have nothing to learn; some must remain."""
        kept = [i for i, row in enumerate(self.train_rows) if row.supervised]
        if len(kept) < len(self.train_rows):
            self.train_rows = [self.train_rows[i] for i in kept]
            self.splits.train = [self.splits.train[i] for i in kept]

    def connect(self, batching: Batching) -> None:
        """Plan the training batches."""
        self.batching = batching
        self.plan = BatchPlan(
            [len(r.ids) for r in self.train_rows],
            [r.supervised for r in self.train_rows],
            seed=self.seed,
            padded=batching.padded,
            world_size=batching.world_size,
            **batching.plan,
        )

    def in_parts(self, parts: int) -> None:
        """Plan the same steps with their micro-batches in so many parts."""
        self.connect(replace(self.batching, plan={**self.batching.plan, "parts": parts}))

    def training_batch(self, k: int, rank: int) -> dict[str, Any]:
        """What micro-step k of a rank trains on."""
        m = self.plan.micro_batch(k, rank)
        return self._collate_train(m.rows, m.window_supervised, m.epoch)

    def batch_of(self, rows: Sequence[int]) -> dict[str, Any]:
        """Training rows as one batch, whatever the plan makes of them."""
        batch = self._collate([self.train_rows[row] for row in rows])
        if self.teacher_scores is not None:
            batch["teacher"] = self.teacher_scores[list(rows)]
        return batch

    def fill_batches(self) -> None:
        """Let training batches, which must be flat, have few sizes."""
        self.shapes = shapes(*self.plan.sizes(), longest=max(len(r.ids) for r in self.train_rows))

    def largest_batches(self) -> list[dict[str, Any]]:
        """Training batches to try a model with: one for each of `shapes`, else only the largest; the largest last."""
        ranks = self.batching.world_size
        if self.shapes:
            chosen = {self._shape(n): i for i, n in enumerate(self.plan.sizes()[0])}
            micro = [self.plan.micro_batch(*divmod(chosen[s], ranks)) for s in self.shapes]
        else:
            every = (self.plan.micro_batch(k, rank) for k in range(len(self.plan)) for rank in range(ranks))
            micro = [max(every, key=lambda m: self._tokens(m.rows))]
        return [self._collate_train(self._largest_part(m.rows), m.window_supervised, m.epoch) for m in micro]

    def _largest_part(self, rows: Sequence[int]) -> Sequence[int]:
        """Of a micro-batch that is run in `parts_of`."""
        return rows if self.parts == 1 else max(cut_evenly(self.plan.lengths, rows, self.parts), key=self._tokens)

    def _tokens(self, rows: Sequence[int]) -> int:
        """Of a training batch of these rows; without any it is one of row 0."""
        return batch_tokens(self.plan.lengths, rows or (0,), self.batching.padded)

    def _shape(self, tokens: int) -> Shape:
        """The smallest that holds so many tokens."""
        return next(s for s in self.shapes if s.tokens >= tokens)

    def largest_evaluation_batch(self) -> dict[str, Any] | None:
        """The evaluation batch of the most tokens, or None without rows to evaluate."""
        largest = []
        for split in SPLITS[1:]:
            lengths, batches = self._eval_batches(split)
            if batches:
                tokens = [batch_tokens(lengths, b, self.batching.padded) for b in batches]
                largest.append(self._eval_batch(split, batches[int(np.argmax(tokens))]))
        return max(largest, key=lambda b: b["input_ids"].numel(), default=None)

    # --------------------------------------------------------------------------------------------------------- loading

    def train_dataloader(self) -> DataLoader[Any]:
        """Micro-steps `resume_at` to the end of the plan, of this rank."""
        dataset = _Planned(self.plan, self.batching.rank, self._collate_train)
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=_From(self),
            num_workers=self.config.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=in_worker,
        )

    def rows_of_step(self, step: int) -> str:
        """Where the rows of optimiser step `step`, counted from 1, come from; the first few of all ranks."""
        rows = [self.splits.train[i].origin for i in self.plan.window_rows(step - 1)]
        return ", ".join(rows[:SHOWN_ROWS]) + (f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else "")

    def _collate_train(self, rows: Sequence[int], window_supervised: int, epoch: int) -> dict[str, Any]:
        b = self.batching
        chosen = [self.train_rows[r] for r in rows]
        ghost = not chosen  # this rank has no rows in this micro-step: it runs row 0 with weight 0, so that ranks stay in step
        batch = self.batch_of(rows or [0])
        if self.shapes:
            batch = fill(batch, self._shape(batch["input_ids"].shape[1]), b.pad_id)
        batch["weight"] = 0.0 if ghost else b.world_size * self.plan.accumulate / window_supervised
        batch["count"] = {
            "examples": len(chosen),
            "tokens": sum(len(r.ids) for r in chosen),
            "supervised": sum(r.supervised for r in chosen),
            "epoch": epoch,
        }
        batch["rows"] = list(rows)
        return batch

    def parts_of(self, batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
        """A training batch as several of like tokens, with the same weight; not filled up."""
        rows: list[int] = batch["rows"]
        found = []
        for chosen in cut_evenly(self.plan.lengths, rows, max(1, min(parts, len(rows)))):
            part = self.batch_of(chosen or [0])
            supervised = sum(self.train_rows[r].supervised for r in chosen)
            found.append({**part, "weight": batch["weight"], "count": {**batch["count"], "supervised": supervised}, "rows": chosen})
        return found

    def _collate(self, rows: Sequence[Encoded]) -> dict[str, Any]:
        b = self.batching
        return (
            collate_causal(rows, b.pad_id, b.padded)
            if isinstance(self.encoder, CausalEncoder)
            else collate_classifier(rows, b.pad_id, b.padded)
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation rows, longest first."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """Test rows, longest first; `index` names the rows of a batch."""
        return self._eval_loader("test")

    def _eval_loader(self, split: str) -> DataLoader[Any]:
        return DataLoader(_Batches(self._eval_batches(split)[1], partial(self._eval_batch, split)), batch_size=None, num_workers=0)

    def _eval_batches(self, split: str) -> tuple[list[int], list[list[int]]]:
        """(tokens of each row of a split, this rank's batches of rows)."""
        b = self.batching
        lengths = [sum(map(len, r.sequences)) if self.scored else len(r.ids) for r in self.eval_rows[split]]
        return lengths, evaluation_batches(lengths, b.eval_tokens, b.rank, b.world_size)

    def _eval_batch(self, split: str, indices: list[int]) -> dict[str, Any]:
        b = self.batching
        chosen = [self.eval_rows[split][i] for i in indices]
        batch = collate_candidates(chosen, b.pad_id, b.padded) if self.scored else self._collate(chosen)
        batch["index"] = indices
        return batch


class _Planned(Dataset[dict[str, Any]]):
    """Micro-step k as a batch."""

    def __init__(self, plan: BatchPlan, rank: int, collate: Callable[[Sequence[int], int, int], dict[str, Any]]) -> None:
        self.plan, self.rank, self.collate = plan, rank, collate

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, k: int) -> dict[str, Any]:
        micro = self.plan.micro_batch(k, self.rank)
        return self.collate(micro.rows, micro.window_supervised, micro.epoch)


class _From(Sampler[int]):
    """k = resume_at, resume_at + 1, ... The length is that of the whole plan, which is what Lightning counts by."""

    def __init__(self, module: LoricaDataModule) -> None:
        self.module = module

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.module.resume_at, len(self.module.plan)))

    def __len__(self) -> int:
        return len(self.module.plan)


class _Batches(Dataset[dict[str, Any]]):
    """Evaluation batches by number."""

    def __init__(self, batches: list[list[int]], make: Callable[[list[int]], dict[str, Any]]) -> None:
        self.batches, self.make = batches, make

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.make(self.batches[i])
