"""Causal language models: the head is computed at supervised positions only; labels are compared by their likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lorica.kernels.loss import draws, head_cross_entropy, tile_rows
from lorica.models.forward import Forward, at_places, flat_inputs
from lorica.models.generation import greedy, stop_tokens

# Configuration values by which some architectures change their logits after the head: Cohere, Granite, Gemma, RecurrentGemma,
# Falcon-H1, xLSTM.
_HEAD_SCALES = (
    "logit_scale",
    "logits_scaling",
    "final_logit_softcapping",
    "logits_soft_cap",
    "lm_head_multiplier",
    "output_logit_soft_cap",
)


class CausalLM(Forward):
    """Batches as `lorica.data.collate` makes them, flat or padded."""

    def token_losses(self, batch: dict[str, Any]) -> torch.Tensor:
        """Cross-entropy at each of the batch's `predict_at` places, fp32 [S]."""
        if self._scales_logits():
            return F.cross_entropy(self.logits_at(batch).float(), batch["targets"], reduction="none")
        whole = self.whole
        vocabulary = whole.config.get_text_config().vocab_size
        return head_cross_entropy(whole.get_output_embeddings(), vocabulary, self._hidden_at(batch), batch["targets"])

    def logits_at(self, batch: dict[str, Any]) -> torch.Tensor:
        """Logits [S, vocabulary] at `predict_at`, places in the flattened [B * T]."""
        if self._scales_logits():
            logits: torch.Tensor = self.model(**_inputs(batch)).logits
            return logits.flatten(0, 1)[batch["predict_at"]]
        chosen: torch.Tensor = self.whole.get_output_embeddings()(self._hidden_at(batch))
        return chosen

    def _hidden_at(self, batch: dict[str, Any]) -> torch.Tensor:
        """What the head reads at `predict_at`: [S, H]."""
        hidden: torch.Tensor = self.whole.get_decoder()(**_inputs(batch)).last_hidden_state
        return at_places(hidden, batch["predict_at"])

    def _scales_logits(self) -> bool:
        """Whether the architecture does more after its head than we would."""
        config = self.whole.config.get_text_config()
        return any(getattr(config, name, None) not in (None, 1, 1.0) for name in _HEAD_SCALES)

    def loss_sum(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.token_losses(batch).sum()

    def capturable(self, batch: dict[str, Any]) -> bool:
        """No, where a head with dropout is computed again tile by tile."""
        rows = tile_rows(self.whole.config.get_text_config().vocab_size)
        return len(batch["targets"]) <= rows or not draws(self.whole.get_output_embeddings())

    def evaluate(self, batch: dict[str, Any]) -> dict[str, Any]:
        losses = self.token_losses(batch)
        if "slot" not in batch:
            return {"loss_sum": losses.sum(), "count": torch.tensor(losses.numel())}
        labels = batch["labels"]
        scores = label_scores(losses, batch["slot"], len(labels), batch["classes"])
        known = labels >= 0
        true = scores.gather(1, labels.clamp(min=0)[:, None])[:, 0] * known
        return {"loss_sum": -true.sum(), "count": batch["true_label_tokens"].sum(), "scores": scores.log_softmax(-1)}

    def generate(self, prompts: Sequence[Sequence[int]], pad_id: int, max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations of token prompts; ids up to and without eos."""
        whole = self.whole
        attention, was_training = whole.config._attn_implementation, self.model.training
        try:
            self.model.eval()
            whole.set_attn_implementation("sdpa" if attention.startswith("lorica") else attention)
            return greedy(whole, prompts, pad_id, stop_tokens(whole), max_new_tokens)
        finally:
            whole.set_attn_implementation(attention)
            self.model.train(was_training)


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """A batch, flat or padded, in transformers' names."""
    if "cu_seqlens" in batch:
        return {**flat_inputs(batch), "use_cache": False}
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}


def label_scores(losses: torch.Tensor, slot: torch.Tensor, examples: int, labels: int) -> torch.Tensor:
    """Sum token losses into log p(label): fp32 [examples, labels]. slot [P]: example * labels + label of each loss."""
    return -torch.zeros(examples * labels, device=losses.device, dtype=losses.dtype).index_add(0, slot, losses).view(examples, labels)
