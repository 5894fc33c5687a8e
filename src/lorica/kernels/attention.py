"""Variable-length attention for sequences laid end to end, by torch's own kernel, through transformers' attention interface.

The model gets `cu_seq_lens_q` and `max_length_q` with its inputs (transformers' names); no mask is built.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch

NAME = "lorica_varlen"


def varlen_available(device: torch.device) -> bool:
    """Whether torch has a variable-length attention kernel for the device: CUDA, compute capability 8.0 (Ampere) or newer."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def _causal_arguments() -> dict[str, Any]:
    """How this torch's varlen_attn is told to be causal: newer ones by a window."""
    from torch.nn.attention.varlen import varlen_attn

    return {"is_causal": True} if "is_causal" in inspect.signature(varlen_attn).parameters else {"window_size": (-1, 0)}


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each sequence of a flat batch.

    Args:
        query: [1, heads, T, D]; key, value: [1, kv_heads, T, D]; bf16 or fp16.
        cu_seq_lens_q: int32 [B + 1], where sequences begin and the last ends. max_length_q: longest sequence in tokens.
    Returns:
        [1, T, heads, D] and no weights.
    """
    from torch.nn.attention.varlen import varlen_attn

    assert cu_seq_lens_q is not None and max_length_q is not None and query.shape[0] == 1
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    causal = getattr(module, "is_causal", True)
    arguments = _causal_arguments() if causal else {}
    if causal and sliding_window is not None and max_length_q > sliding_window:
        arguments = {"window_size": (sliding_window - 1, 0)}
    if scaling is not None and abs(scaling - q.shape[-1] ** -0.5) > 1e-6:
        q = q * (scaling * q.shape[-1] ** 0.5)  # torch 2.11's kernel has no scale argument
    out = varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, **arguments)
    assert isinstance(out, torch.Tensor)
    return out[None], None


def register() -> None:
    """Make `attn_implementation="lorica_varlen"` known to transformers, with no mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
