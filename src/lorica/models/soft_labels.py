"""Distillation: a classifier learns a teacher's label probabilities beside the true labels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorica.data.encoding import IGNORE


@dataclass(frozen=True)
class SoftLabels:
    """The loss of a row with a teacher (Hinton, Vinyals and Dean 2015, arXiv:1503.02531):

        (1 - weight) * cross-entropy with the true label + weight * temperature^2 * KL(teacher || student)

    with both probabilities at `temperature`. The square keeps the soft part's gradient at the size that it has at temperature 1.
    """

    temperature: float
    weight: float

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Summed over a batch's rows, a scalar in fp32; rows whose label is IGNORE fill a batch up and count for nothing.

        Args:
            logits: the student's, fp32 [B, K]. labels: int64 [B]. teacher: its log-probabilities at temperature 1, fp32 [B, K].
        """
        hard = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE)
        ours, theirs = (scores.div(self.temperature).log_softmax(-1) for scores in (logits, teacher))
        apart = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        soft = torch.where(labels == IGNORE, 0.0, apart).sum()
        return (1.0 - self.weight) * hard + self.weight * self.temperature**2 * soft
