"""What a device could do at most: its measured rate of matrix products, and the arithmetic that a token needs.

FLOPs a token of a model with N weights in the linear layers of its blocks:

    frozen base with adapters            4 N    forward 2 N, gradients of the activations 2 N
    the same with checkpointing          6 N    the forward again
    every weight trained                 6 N    gradients of the weights 2 N
    a causal model's head, H x V       + 4 H V s   s: the share of tokens that are learnt, the only ones it is needed for

Adapters, attention, norms and the optimiser are left out: the limit is one that can't be reached. It is that of bf16 products, in
cases that multiply in 8 bits too, which may pass it.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch

SIZE = 8192


def gemm_rate() -> float | None:
    """FLOP/s of a bf16 product of two random 8192 x 8192 matrices, the median of 30; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    a, b = (torch.randn(SIZE, SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    seconds = []
    for i in range(50):  # the first twenty warm the device up
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(a, b, out=out)
        end.record()
        end.synchronize()
        if i >= 20:
            seconds.append(start.elapsed_time(end) / 1e3)
    del a, b, out
    torch.cuda.empty_cache()
    rate: float = 2 * SIZE**3 / statistics.median(seconds)
    return rate


def linear_weights(model: Path) -> tuple[int, int]:
    """(weights of the blocks' linear layers, weights of the head) by config.json of a Mistral or a RoBERTa."""
    c = json.loads((model / "config.json").read_text())
    hidden, inner, layers = c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"]
    if c["model_type"] == "roberta":
        return layers * (4 * hidden * hidden + 2 * hidden * inner), 0
    heads = c["num_attention_heads"]
    size = c.get("head_dim") or hidden // heads
    attention = 2 * hidden * heads * size + 2 * hidden * c["num_key_value_heads"] * size
    return layers * (attention + 3 * hidden * inner), hidden * c["vocab_size"]


def flops_per_token(model: Path, *, checkpointing: bool = False, every_weight: bool = False, learnt: float = 0.0) -> float:
    """By the table above. learnt: the share of tokens that the head is needed for."""
    linear, head = linear_weights(model)
    return (4 + 2 * checkpointing + 2 * every_weight) * linear + 4 * head * learnt
