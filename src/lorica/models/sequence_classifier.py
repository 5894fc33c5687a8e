"""Sequence classifiers: encoders with a head, and causal models that classify at their last token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from lorica.kernels import attention
from lorica.models.forward import Forward, at_places, flat_inputs
from lorica.models.soft_labels import SoftLabels

_FIRST_TOKEN = ("roberta", "xlm-roberta", "camembert")  # their heads read the first token's features; positions begin after padding_idx


def pooling(config: Any) -> str | None:
    """What a classifier's head reads: `first` or `pooled` (the first token, through a pooler), `last`; None where it isn't known, and
    batches must be padded."""
    from transformers import AutoModelForSequenceClassification
    from transformers.modeling_layers import GenericForSequenceClassification

    if config.model_type in _FIRST_TOKEN:
        return "first"
    if config.model_type == "bert":
        return "pooled"
    cls = AutoModelForSequenceClassification._model_mapping.get(type(config), None)
    return "last" if isinstance(cls, type) and issubclass(cls, GenericForSequenceClassification) else None


def takes_flat(config: Any, task: str) -> bool:
    """Whether a model for a task can read sequences laid end to end."""
    return attention.varlen_covers(config) and (task == "causal_lm" or pooling(config) is not None)


class SequenceClassifier(Forward):
    """Cross-entropy over classes; batches are `collate_classifier`'s, flat or padded, with labels [B].

    With `soft`, training batches also have `teacher`, its log-probabilities fp32 [B, classes], which are learnt beside the labels.
    """

    soft: SoftLabels | None = None

    def logits(self, batch: dict[str, Any]) -> torch.Tensor:
        """[B, classes] in fp32."""
        if "cu_seqlens" in batch:
            return self._flat_logits(batch).float()
        out: torch.Tensor = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return out.float()

    def _flat_logits(self, batch: dict[str, Any]) -> torch.Tensor:
        """The classifier's own modules, on sequences laid end to end."""
        whole, inputs = self.whole, flat_inputs(batch)
        kind, body, ends = pooling(whole.config), whole.base_model, batch["cu_seqlens"].long()
        rows = len(batch["labels"])  # fillers come after them
        if kind == "last":
            hidden = body(**inputs, use_cache=False).last_hidden_state
            last: torch.Tensor = whole.score(at_places(hidden, ends[1 : rows + 1] - 1))
            return last
        if kind == "first":
            inputs["position_ids"] = batch["position_ids"] + body.embeddings.padding_idx + 1
        inputs["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        at = ends[:rows].clamp(max=batch["input_ids"].numel() - 1)  # an empty sequence has no first token
        first = at_places(body(**inputs).last_hidden_state, at)[:, None]  # [B, 1, H]
        logits: torch.Tensor = whole.classifier(first if kind == "first" else whole.dropout(body.pooler(first)))
        return logits

    def loss_sum(self, batch: dict[str, Any]) -> torch.Tensor:
        if self.soft is not None:
            return self.soft.loss_sum(self.logits(batch), batch["labels"], batch["teacher"])
        return F.cross_entropy(self.logits(batch), batch["labels"], reduction="sum")

    def evaluate(self, batch: dict[str, Any]) -> dict[str, Any]:
        scores = self.logits(batch).log_softmax(-1)
        loss = F.nll_loss(scores, batch["labels"], ignore_index=-1, reduction="sum")
        return {"loss_sum": loss, "count": (batch["labels"] >= 0).sum(), "scores": scores}
