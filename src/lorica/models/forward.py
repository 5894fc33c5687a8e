"""What a model makes of a batch, as `lorica.data.collate` makes these: in training, evaluation and prediction, without Lightning."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch


class Forward:
    """A model's loss and scores.

    Args:
        model: transformers' model, with PEFT's adapters or whole.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()  # Lightning's, in a module
        self.model = model

    @property
    def whole(self) -> Any:
        """transformers' model, inside PEFT's wrapper where there is one; its layers carry the adapters."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @abstractmethod
    def loss_sum(self, batch: dict[str, Any]) -> torch.Tensor:
        """The summed loss over a micro-batch's supervised tokens (or labelled texts), a scalar in fp32."""

    def capturable(self, batch: dict[str, Any]) -> bool:
        """Whether a micro-step on a batch of this size can be captured, its layers aside: it must not save the generator's state."""
        return True

    @abstractmethod
    def evaluate(self, batch: dict[str, Any]) -> dict[str, Any]:
        """For a batch of evaluation rows: loss_sum and count (scalars), and scores [B, K] (log-probabilities) where there are labels."""


def at_places(hidden: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[S, H] of hidden states [B, T, H] at places int64 [S] in the flattened [B * T].

    By index_select, whose gradient is added place by place: that of an index is sorted first. Places that are named more than once,
    those of fillers, have gradients of zero, so that the order of the sums changes no bit.
    """
    return hidden.flatten(0, 1).index_select(0, places)


def flat_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """A flat batch in the names that transformers passes on to attention."""
    ends, longest = batch["cu_seqlens"], batch["max_seqlen"]
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
