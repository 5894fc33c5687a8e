"""Sequence classifiers: encoders with a head, and causal models that classify at their last token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lorica.models.module import LoricaModule


class SequenceClassifierModule(LoricaModule):
    """Cross-entropy over classes; a batch has input_ids, attention_mask [B, T] and labels [B]."""

    def logits(self, batch: dict[str, Any]) -> torch.Tensor:
        """[B, classes] in fp32."""
        out: torch.Tensor = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return out.float()

    def loss_sum(self, batch: dict[str, Any]) -> torch.Tensor:
        return F.cross_entropy(self.logits(batch), batch["labels"], reduction="sum")

    def evaluate(self, batch: dict[str, Any]) -> dict[str, Any]:
        scores = self.logits(batch).log_softmax(-1)
        known = batch["labels"] >= 0
        loss = F.nll_loss(scores[known], batch["labels"][known], reduction="sum")
        return {"loss_sum": loss, "count": known.sum(), "scores": scores}
