"""Evaluation figures by torchmetrics, fed batch by batch; nothing keeps all logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)


class EvaluationMetrics(torch.nn.Module):
    """The figures of one pass over a split.

    Args:
        labels: class names, or None for text that is only scored by loss.
    """

    def __init__(self, labels: Sequence[str] | None) -> None:
        super().__init__()
        self.labels = list(labels) if labels is not None else None
        self.loss = MeanMetric()
        k = len(labels or ())
        self.classes = (
            MetricCollection(
                {
                    "accuracy": MulticlassAccuracy(k, average="micro"),
                    "f1_macro": MulticlassF1Score(k, average="macro"),
                    "f1": MulticlassF1Score(k, average="none"),
                    "precision": MulticlassPrecision(k, average="none"),
                    "recall": MulticlassRecall(k, average="none"),
                    "confusion": MulticlassConfusionMatrix(k),
                },
                compute_groups=[["accuracy"], ["f1_macro", "f1", "precision", "recall"], ["confusion"]],
            )
            if k
            else None
        )

    def update(self, out: dict[str, Any], labels: torch.Tensor | None) -> None:
        """Add a batch. out: what a module's `evaluate` returned. labels: int64 [B]."""
        count = out["count"].to(self.loss.device)
        if int(count) > 0:
            self.loss.update(out["loss_sum"] / count, count)
        if self.classes is not None and labels is not None:
            self.classes.update(out["scores"].argmax(-1), labels)

    def compute(self) -> tuple[dict[str, float], list[list[int]] | None]:
        """(flat figures, confusion matrix as rows of true classes). Loss is the mean a supervised token (or labelled text)."""
        loss = float(self.loss.compute())
        figures = {"loss": loss}
        if self.classes is None:
            figures["perplexity"] = float(torch.exp(torch.tensor(loss, dtype=torch.float64)))
            return figures, None
        assert self.labels is not None
        values = self.classes.compute()
        figures |= {"accuracy": float(values["accuracy"]), "f1_macro": float(values["f1_macro"])}
        for kind in ("f1", "precision", "recall"):
            figures |= {f"{kind}/{name}": float(v) for name, v in zip(self.labels, values[kind], strict=True)}
        return figures, [[int(n) for n in row] for row in values["confusion"]]

    def reset(self) -> None:
        """Start over for another pass."""
        self.loss.reset()
        if self.classes is not None:
            self.classes.reset()


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean ROUGE-L F-measure (Lin 2004): the longest common word sequence."""
    from torchmetrics.functional.text import rouge_score

    scores = rouge_score(list(answers), list(references), rouge_keys="rougeL")
    return float(scores["rougeL_fmeasure"])
