"""A trained model answers examples: labels with their probabilities, or texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from lorica import calibration
from lorica.answers import Answer
from lorica.data.encoding import CausalEncoder, ClassifierEncoder, Truncation, build_encoder
from lorica.data.examples import Example
from lorica.models.causal_lm import CausalLM
from lorica.models.sequence_classifier import SequenceClassifier
from lorica.models.trained import Trained
from lorica.scoring import BATCH, Scorer, uncounted


class Predictor:
    """Answers examples with one trained model.

    Attributes:
        cut: what was cut of the texts that it answered.
    """

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
        cls = SequenceClassifier if isinstance(self.encoder, ClassifierEncoder) else CausalLM
        self.forward = cls(trained.model.eval())
        self.pad_id = int(trained.tokenizer.pad_token_id)
        self.threshold = _threshold(trained, target_risk)
        self.scorer = Scorer(trained, self.forward, self.encoder)
        self.cut = Truncation()

    def warm_up(self, examples: Sequence[Example], batch_size: int | None, total: int) -> None:
        """Before so many examples are answered, of which these are the first."""
        if self.labels and examples:
            self.scorer.warm_up(examples, batch_size, total)

    def answer(self, examples: Sequence[Example], batch_size: int | None = None, done: Callable[[int], None] = uncounted) -> list[Answer]:
        """Answers in the order of the examples; as `begin`."""
        return self.begin(examples, batch_size, done)()

    @torch.inference_mode()
    def begin(
        self, examples: Sequence[Example], batch_size: int | None = None, done: Callable[[int], None] = uncounted
    ) -> Callable[[], list[Answer]]:
        """What gives the answers, in the order of the examples.

        Labels are scored on a GPU while something else is done: it is waited for when the answers are asked for, once.

        Args:
            batch_size: None: BATCH, or by tokens where labels are scored on a GPU. done: called with the size of each batch on its way.
        """
        if not self.labels:
            assert isinstance(self.encoder, CausalEncoder)
            written = self._written([self.encoder.prompt_ids(e, self.cut) for e in examples], batch_size or BATCH, done)
            return lambda: written
        return self._scored(examples, batch_size, done) if examples else list

    @torch.inference_mode()
    def log_probabilities(self, examples: Sequence[Example], done: Callable[[int], None] = uncounted) -> np.ndarray:
        """Of each label, fp32 [N, labels], in the order of the examples; as the model gives them, not calibrated."""
        assert self.labels is not None
        scores, place = self.scorer.score(examples, None, done)
        return np.asarray(scores.float().cpu().numpy()[place])

    def _scored(self, examples: Sequence[Example], batch_size: int | None, done: Callable[[int], None]) -> Callable[[], list[Answer]]:
        """Labels with their probabilities. The scores stay on the device until all are there."""
        assert self.labels is not None
        scores, place = self.scorer.score(examples, batch_size, done, self.cut)
        found, arrived = _on_its_way((scores.float() / self.trained.temperature).softmax(1))
        names = self.labels

        def answers() -> list[Answer]:
            arrived()
            rows = found[torch.from_numpy(place)]
            probability, best = rows.max(1)
            said = [names[k] if sure else None for k, sure in zip(best.tolist(), (probability >= self.threshold).tolist(), strict=True)]
            return [Answer(name, dict(zip(names, row, strict=True))) for name, row in zip(said, rows.tolist(), strict=True)]

        return answers

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
        assert isinstance(self.forward, CausalLM)
        with self.trained.arithmetic():
            generated = self.forward.generate(prompts, self.pad_id, self.max_new_tokens)
        return [Answer(self.trained.tokenizer.decode(ids, skip_special_tokens=True).strip()) for ids in generated]


def _threshold(trained: Trained, target_risk: float | None) -> float:
    """The probability from which on a label is said."""
    if target_risk is None:
        return 0.0
    return calibration.threshold(trained.calibration, target_risk)


def _on_its_way(values: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None]]:
    """(host memory, what waits until the values are in it): what is queued on the GPU afterwards is not waited for."""
    if values.device.type != "cuda":
        return values.cpu(), lambda: None
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event.synchronize
