"""Causal language models: the head is computed at supervised positions only; labels are compared by their likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from lorica.data.collate import pad
from lorica.models.module import LoricaModule

# Configuration values by which some architectures change their logits after the head (Cohere, Granite, Gemma).
_HEAD_SCALES = ("logit_scale", "logits_scaling", "final_logit_softcapping")


class CausalLMModule(LoricaModule):
    """Batches as `lorica.data.collate` makes them, flat or padded."""

    def token_losses(self, batch: dict[str, Any]) -> torch.Tensor:
        """Cross-entropy at each of the batch's `predict_at` places, fp32 [S]."""
        return F.cross_entropy(self.logits_at(batch).float(), batch["targets"], reduction="none")

    def logits_at(self, batch: dict[str, Any]) -> torch.Tensor:
        """Logits [S, vocabulary] at `predict_at`, places in the flattened [B * T]."""
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "use_cache": False}
        if "cu_seqlens" in batch:
            inputs |= {"position_ids": batch["position_ids"], "cu_seq_lens_q": batch["cu_seqlens"], "cu_seq_lens_k": batch["cu_seqlens"]}
            inputs |= {"max_length_q": batch["max_seqlen"], "max_length_k": batch["max_seqlen"]}
        else:
            inputs["attention_mask"] = batch["attention_mask"]
        whole = self._causal_model()
        config = whole.config.get_text_config()
        if any(getattr(config, name, None) not in (None, 1, 1.0) for name in _HEAD_SCALES):
            logits: torch.Tensor = self.model(**inputs).logits
            return logits.flatten(0, 1)[batch["predict_at"]]
        hidden = whole.get_decoder()(**inputs).last_hidden_state
        chosen: torch.Tensor = whole.get_output_embeddings()(hidden.flatten(0, 1)[batch["predict_at"]])
        return chosen

    def _causal_model(self) -> Any:
        """transformers' model inside PEFT's wrapper; its layers carry the adapters."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    def loss_sum(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.token_losses(batch).sum()

    def evaluate(self, batch: dict[str, Any]) -> dict[str, Any]:
        losses = self.token_losses(batch)
        if "slot" not in batch:
            return {"loss_sum": losses.sum(), "count": torch.tensor(losses.numel())}
        labels = batch["labels"]
        scores = label_scores(losses, batch["slot"], len(labels), batch["classes"])
        known = labels >= 0
        true = scores[known].gather(1, labels[known, None])
        return {"loss_sum": -true.sum(), "count": batch["true_label_tokens"].sum(), "scores": scores.log_softmax(-1)}

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], pad_id: int, max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations of token prompts, left-padded into one batch; ids up to and without eos."""
        whole = self._causal_model()
        ids, mask = pad(prompts, pad_id, left=True)
        attention, eos = whole.config._attn_implementation, whole.config.eos_token_id
        was_training = self.model.training
        checkpointing = bool(getattr(whole, "is_gradient_checkpointing", False))
        stops = set(eos if isinstance(eos, list) else [eos])
        try:
            self.model.eval()
            whole.set_attn_implementation("sdpa" if attention.startswith("lorica") else attention)
            if checkpointing:
                whole.gradient_checkpointing_disable()
            out = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad_id,
                use_cache=True,
            )
        finally:
            whole.set_attn_implementation(attention)
            if checkpointing:
                whole.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            self.model.train(was_training)
        answers = out[:, ids.shape[1] :].tolist()
        return [answer[: next((i for i, t in enumerate(answer) if t in stops or t == pad_id), len(answer))] for answer in answers]


def label_scores(losses: torch.Tensor, slot: torch.Tensor, examples: int, labels: int) -> torch.Tensor:
    """Sum token losses into log p(label): fp32 [examples, labels]. slot [P]: example * labels + label of each loss."""
    return -torch.zeros(examples * labels, device=losses.device, dtype=losses.dtype).index_add(0, slot, losses).view(examples, labels)
