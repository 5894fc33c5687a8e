"""A trained model answers examples: labels with their probabilities, or texts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lorica.answers import Answer
from lorica.config import ConfigError, OptimizerConfig
from lorica.data.batching import cut_batches
from lorica.data.collate import collate_candidates, collate_classifier
from lorica.data.encoding import ClassifierEncoder, Encoded, Truncation, build_encoder
from lorica.data.examples import Example
from lorica.models.causal_lm import CausalLMModule
from lorica.models.sequence_classifier import SequenceClassifierModule
from lorica.models.trained import Trained

BATCH = 32  # texts at once
ELEMENTS = 1 << 26  # of the hidden states of texts at once on a GPU, where labels are scored: 16,384 tokens of Mistral-7B
LETTERS = 4  # to a token, about


def uncounted(n: int) -> None:
    """Nobody asked how far it is."""


class Predictor:
    """Answers examples with one trained model."""

    def __init__(self, trained: Trained, max_new_tokens: int | None = None, target_risk: float | None = None) -> None:
        """As the keys of `predict`.

        Args:
            max_new_tokens: of a written answer; None: as many as in training. target_risk: the share of wrong answers that may be.
        Raises:
            ConfigError: the model's validation can't show that it keeps the risk.
        """
        self.trained, self.task = trained, trained.task
        self.max_new_tokens = max_new_tokens or int(self.task.get("max_new_tokens") or 256)
        self.labels: list[str] | None = self.task.get("labels")
        self.encoder = build_encoder(self.task, trained.tokenizer)
        cls = SequenceClassifierModule if isinstance(self.encoder, ClassifierEncoder) else CausalLMModule
        self.module = cls(trained.model, OptimizerConfig(), 1).eval()
        self.pad_id = int(trained.tokenizer.pad_token_id)
        self.threshold = _threshold(trained, target_risk)
        self._tokens = ELEMENTS // trained.model.config.get_text_config().hidden_size

    def encode(self, examples: Sequence[Example]) -> list[Any]:
        """What the model reads of each example; on any thread, one at a time."""
        if isinstance(self.encoder, ClassifierEncoder):
            return self.encoder.encode(examples, Truncation())
        return self.encoder.candidates(examples) if self.labels else [self.encoder.prompt_ids(e) for e in examples]

    def warm_up(self, examples: Sequence[Example], batch_size: int | None) -> None:
        """Score about a batch of the examples on a GPU, for what a first forward loads and allocates."""
        if self.labels and self.trained.model.device.type == "cuda":
            letters = itertools.accumulate(len(e.text or e.prompt) for e in examples)
            self.answer([e for e, n in zip(examples, letters, strict=True) if n < self._tokens * LETTERS], batch_size)

    def answer(self, examples: Sequence[Example], batch_size: int | None = None, done: Callable[[int], None] = uncounted) -> list[Answer]:
        """Answers in the order of the examples; as `begin`."""
        return self.begin(self.encode(examples), batch_size, done)()

    @torch.inference_mode()
    def begin(
        self, items: Sequence[Any], batch_size: int | None = None, done: Callable[[int], None] = uncounted
    ) -> Callable[[], list[Answer]]:
        """What gives the answers, in the order of what was encoded; batches are made by length.

        Labels are scored on a GPU while something else is done: it is waited for when the answers are asked for, once.

        Args:
            batch_size: None: BATCH, or by ELEMENTS where labels are scored on a GPU. done: called with the size of each batch on its way.
        """
        if not self.labels:
            written = self._written(items, batch_size or BATCH, done)
            return lambda: written
        return self._scored(items, batch_size, done) if items else list

    def _lengths(self, items: Sequence[Any]) -> list[int]:
        """Tokens of each."""
        return [len(e.ids) if isinstance(e, Encoded) else sum(map(len, e.sequences)) for e in items]

    @torch.inference_mode()
    def log_probabilities(self, items: Sequence[Any], done: Callable[[int], None] = uncounted) -> np.ndarray:
        """Of each label, fp32 [N, labels], in the order of what was encoded; as the model gives them, not calibrated."""
        assert self.labels is not None
        scores, place = self._label_scores(items, None, done)
        return np.asarray(scores.float().cpu().numpy()[place])

    def _scored(self, items: Sequence[Any], batch_size: int | None, done: Callable[[int], None]) -> Callable[[], list[Answer]]:
        """Labels with their probabilities. The scores stay on the device until all are there."""
        assert self.labels is not None
        scores, place = self._label_scores(items, batch_size, done)
        found, arrived = _on_its_way((scores.float() / self.trained.temperature).softmax(1))
        names = self.labels

        def answers() -> list[Answer]:
            arrived()
            rows = found[torch.from_numpy(place)]
            probability, best = rows.max(1)
            said = [names[k] if sure else None for k, sure in zip(best.tolist(), (probability >= self.threshold).tolist(), strict=True)]
            return [Answer(name, dict(zip(names, row, strict=True))) for name, row in zip(said, rows.tolist(), strict=True)]

        return answers

    def _label_scores(self, items: Sequence[Any], batch_size: int | None, done: Callable[[int], None]) -> tuple[torch.Tensor, np.ndarray]:
        """(log-probabilities [N, labels] on the device, in the order of the batches; where each item's are, [N])."""
        device, padded = self.trained.model.device, self.trained.padded
        by_tokens = batch_size is None and device.type == "cuda"
        sizes = np.asarray(self._lengths(items))
        order = [int(i) for i in np.argsort(-sizes, kind="stable")]
        collate = collate_classifier if isinstance(self.encoder, ClassifierEncoder) else collate_candidates
        batches = cut_batches(sizes, order, None if by_tokens else batch_size or BATCH, self._tokens, padded)
        scores, waiting = [], batches[::-1]
        while waiting:
            group = waiting.pop()
            try:
                scores.append(self._scores(collate([items[i] for i in group], self.pad_id, padded)))
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
        device = self.trained.model.device
        if device.type == "cuda":
            batch = {k: v.pin_memory().to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with self.trained.arithmetic():
            scores: torch.Tensor = self.module.evaluate(batch)["scores"]
        return scores

    def _written(self, prompts: Sequence[list[int]], batch_size: int, done: Callable[[int], None]) -> list[Answer]:
        """Texts, the longest prompts first."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        answers: dict[int, Answer] = {}
        for at in range(0, len(order), batch_size):
            group = order[at : at + batch_size]
            answers |= dict(zip(group, self._write([prompts[i] for i in group]), strict=True))
            done(len(group))
        return [answers[i] for i in range(len(prompts))]

    def _write(self, prompts: list[list[int]]) -> list[Answer]:
        assert isinstance(self.module, CausalLMModule)
        with self.trained.arithmetic():
            generated = self.module.generate(prompts, self.pad_id, self.max_new_tokens)
        return [Answer(self.trained.tokenizer.decode(ids, skip_special_tokens=True).strip()) for ids in generated]


def _threshold(trained: Trained, target_risk: float | None) -> float:
    """The probability from which on a label is said."""
    if target_risk is None:
        return 0.0
    if trained.calibration is None:
        raise ConfigError(
            "target_risk",
            target_risk,
            "needs a classifier whose validation rows were kept as calibration.json; this model has none",
            "a run on labelled data with data.validation_fraction above 0",
        )
    return trained.calibration.threshold(target_risk)


def _on_its_way(values: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
    """(host memory, what waits until the values are in it): what is queued on the GPU afterwards is not waited for."""
    if values.device.type != "cuda":
        return values.cpu(), lambda: None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event.synchronize
