"""The labels' log-probabilities of many texts: batches of like lengths, or, of small encoders on a GPU, batches of one size that are
captured and filled as the texts are encoded."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from lorica.checks import positions_of
from lorica.data.batching import cut_batches
from lorica.data.collate import collate_candidates, collate_classifier, fill
from lorica.data.encoding import CausalEncoder, ClassifierEncoder, Encoded, Truncation
from lorica.data.examples import Example
from lorica.data.shapes import Shape
from lorica.models.captured import CapturedScores, waits_for_the_device
from lorica.models.forward import Forward
from lorica.models.sequence_classifier import SequenceClassifier, pooling
from lorica.models.trained import Trained

BATCH = 32  # texts at once
ELEMENTS = 1 << 26  # of the hidden states of texts at once on a GPU: 16,384 tokens of Mistral-7B
LETTERS = 4  # to a token, about
CAPTURED_TOKENS = 16384  # of a captured batch
CAPTURED_ROWS = 4096  # texts in all, from which on a capture is worth it: it takes as long as some thousand of them
CAPTURED_LENGTH = 512  # tokens that a text in one may have at most
SPARE = 1.25  # times as many rows as texts of the first lengths would be: shorter ones may come


def uncounted(n: int) -> None:
    """Nobody asked how far it is."""


class Scorer:
    """Scores texts with one trained model.

    Args:
        forward: of the trained model. encoder: makes of a text what the model reads.

    Attributes:
        can_capture: a forward may be captured: a small encoder's, on a GPU, whose batches need no padding.
    """

    def __init__(self, trained: Trained, forward: Forward, encoder: ClassifierEncoder | CausalEncoder) -> None:
        self.trained, self.forward, self.encoder = trained, forward, encoder
        self._pad_id = int(trained.tokenizer.pad_token_id)
        self._tokens = ELEMENTS // trained.model.config.get_text_config().hidden_size
        self._captured: CapturedScores | None = None
        self._shape = Shape(0, 0, 0, 0)
        self.can_capture = (
            isinstance(encoder, ClassifierEncoder)
            and trained.model.device.type == "cuda"
            and not trained.padded
            and self._tokens >= CAPTURED_TOKENS
            and encoder.max_length <= min(CAPTURED_LENGTH, positions_of(trained.model.config.to_dict()) or CAPTURED_LENGTH)
            and pooling(trained.model.config) != "last"
        )

    def warm_up(self, examples: Sequence[Example], batch_size: int | None, total: int) -> None:
        """On a GPU, score about a batch of these, for what a first forward loads and allocates.

        Args:
            total: how many will be scored in all; by that alone it is decided whether a forward is captured for them.
        """
        if self.trained.model.device.type != "cuda":
            return
        letters = itertools.accumulate(len(e.text or e.prompt) for e in examples)
        few = [e for e, n in zip(examples, letters, strict=True) if n < self._tokens * LETTERS] or examples[:1]
        if self.can_capture and batch_size is None and total >= CAPTURED_ROWS:
            self.capture(few)
        self.score(few, batch_size)

    @torch.inference_mode()
    def score(
        self,
        examples: Sequence[Example],
        batch_size: int | None = None,
        done: Callable[[int], None] = uncounted,
        cut: Truncation | None = None,
    ) -> tuple[torch.Tensor, np.ndarray]:
        """(log-probabilities [N, labels] on the device, in the order of the batches; where each example's are, [N]).

        Args:
            batch_size: None: BATCH, or by tokens on a GPU. done: called with the size of each batch on its way. cut: counts texts that are
                too long.
        """
        encoder, cut = self.encoder, cut if cut is not None else Truncation()
        if not isinstance(encoder, ClassifierEncoder):
            return self._by_length(encoder.candidates(examples, truncation=cut), batch_size, done)
        if self._captured is not None and batch_size is None:
            return self._streamed(self._captured, encoder.pieces(examples, cut), done)
        return self._by_length(encoder.encode(examples, cut), batch_size, done)

    # ---------------------------------------------------------------------------------------------------------- by length

    def _by_length(self, items: Sequence[Any], batch_size: int | None, done: Callable[[int], None]) -> tuple[torch.Tensor, np.ndarray]:
        device, padded = self.trained.model.device, self.trained.padded
        by_tokens = batch_size is None and device.type == "cuda"
        sizes = np.asarray([len(e.ids) if isinstance(e, Encoded) else sum(map(len, e.sequences)) for e in items])
        order = [int(i) for i in np.argsort(-sizes, kind="stable")]
        collate = collate_classifier if isinstance(self.encoder, ClassifierEncoder) else collate_candidates
        batches = cut_batches(sizes, order, None if by_tokens else batch_size or BATCH, self._tokens, padded)
        scores, waiting = [], batches[::-1]
        while waiting:
            group = waiting.pop()
            try:
                scores.append(self._scores(_to(device, collate([items[i] for i in group], self._pad_id, padded))))
            except torch.cuda.OutOfMemoryError:
                if len(group) == 1:
                    raise
                waiting += [group[len(group) // 2 :], group[: len(group) // 2]]
                continue
            done(len(group))
        place = np.empty(len(items), np.int64)
        place[order] = np.arange(len(items))
        return torch.cat(scores), place

    def _scores(self, batch: dict[str, Any]) -> torch.Tensor:
        """Of a batch on the device."""
        with self.trained.arithmetic():
            if isinstance(self.forward, SequenceClassifier):
                return self.forward.logits(batch).log_softmax(-1)
            scores: torch.Tensor = self.forward.evaluate(batch)["scores"]
        return scores

    # ----------------------------------------------------------------------------------------------------------- captured

    def _streamed(
        self, captured: CapturedScores, pieces: Iterable[list[Encoded]], done: Callable[[int], None]
    ) -> tuple[torch.Tensor, np.ndarray]:
        """In the order of the examples: nothing is padded, and the GPU has a batch to do while the next texts are tokenised.

        Encoding stays on this thread, but for the tokenizer's own work: two threads of Python would wait for its lock by turns.
        """
        scores: list[torch.Tensor] = []
        for rows in self._full(itertools.chain.from_iterable(pieces)):
            batch = collate_classifier(rows, self._pad_id, padded=False)
            scores.append(captured(fill(batch, self._shape, self._pad_id))[: len(rows)])
            done(len(rows))
        whole = torch.cat(scores)
        return whole, np.arange(len(whole))

    def _full(self, items: Iterable[Encoded]) -> Iterator[list[Encoded]]:
        """Batches that are as full as the captured one can be."""
        rows: list[Encoded] = []
        tokens = 0
        for item in items:
            if tokens + len(item.ids) > self._shape.tokens or len(rows) == self._shape.targets:
                yield rows
                rows, tokens = [], 0
            rows.append(item)
            tokens += len(item.ids)
        yield rows

    @torch.inference_mode()
    def capture(self, examples: Sequence[Example]) -> None:
        """Capture the forward for batches of texts as long as these, where that can be."""
        assert isinstance(self.encoder, ClassifierEncoder)
        items, longest = self.encoder.encode(examples, Truncation()), self.encoder.max_length
        rows = int(SPARE * CAPTURED_TOKENS * len(items) / sum(len(e.ids) for e in items))
        self._shape = Shape(CAPTURED_TOKENS, rows + CAPTURED_TOKENS // longest + 1, rows, longest)
        batch = collate_classifier(next(self._full(items)), self._pad_id, padded=False)
        batch = _to(self.trained.model.device, fill(batch, self._shape, self._pad_id))
        # What a capture that fails has taken stays; a batch by length needs as much as this one, and is halved where it does not fit.
        with suppress(torch.cuda.OutOfMemoryError):
            self._scores(batch)  # what is loaded once may wait for the device
            if not waits_for_the_device(lambda: self._scores(batch)):
                self._captured = CapturedScores(self._scores, batch)


def _to(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    if device.type != "cuda":
        return batch
    return {k: v.pin_memory().to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
