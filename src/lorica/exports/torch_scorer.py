"""Models that torch runs: transformers' own forward, one sequence at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


class TorchScorer:
    """A transformers model on the CPU.

    Args:
        task: as in lorica.json.
    """

    def __init__(self, model: Any, task: str) -> None:
        self.model, self.causal = model.eval(), task == "causal_lm"

    @torch.inference_mode()
    def logits(self, ids: list[int], first: int) -> np.ndarray:
        """As `Scorer`."""
        read = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        if not self.causal:
            return np.asarray(self.model(**read).logits.float().numpy())
        found: torch.Tensor = self.model(**read, use_cache=False, logits_to_keep=len(ids) - first).logits[0]
        return found[first - len(ids) :].float().numpy()

    def tokens(self, text: str, special: bool) -> list[int] | None:
        """None: transformers' tokenizer is the one of training."""
        return None
