"""Attention through transformers' interface: variable-length for sequences laid end to end; dense with fast dropout on CPUs.

For the first, by our kernel or torch's own, the model gets `cu_seq_lens_q` and `max_length_q` with its inputs (transformers' names), and no
mask is built. The second is what torch's scaled_dot_product_attention does on a CPU when there is dropout, with masks drawn faster.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from lorica.kernels import dropout as fast_dropout
from lorica.kernels import varlen

VARLEN = "lorica_varlen"
DENSE = "lorica_dense"
# Packages that torch's kernel can be of: torch's names, and the major compute capabilities that they are for.
INSTALLED = {"flash_attention_3": ("FA3", (9,)), "flash_attention_4": ("FA4", (9, 10))}

_only_torchs = False  # no kernel of our own


def varlen_available(device: torch.device) -> bool:
    """Whether torch has a variable-length attention kernel for the device: CUDA, compute capability 8.0 (Ampere) or newer."""
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return True


def use_installed(name: str, device: torch.device) -> None:
    """Let variable-length attention be one of INSTALLED, in this process: torch puts it in its own kernel's place for all that it runs.

    It is tried at once: torch looks for the package's functions only, not at what they take and give, which has changed between versions.

    Raises:
        ImportError: it is not installed. RuntimeError: this torch can't use it.
    """
    global _only_torchs
    from torch.nn import attention as torchs

    try:
        torchs.activate_flash_attention_impl(INSTALLED[name][0])
        _only_torchs = True
        x = torch.ones(64, 2, 128, dtype=torch.bfloat16, device=device, requires_grad=True)
        ends = torch.tensor([0, 64], dtype=torch.int32, device=device)
        _varlen(x, x, x, ends, 64, True, None, x.shape[-1] ** -0.5).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except (ImportError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as e:  # whatever a package raises that is called as it should not be
        _only_torchs = False
        raise RuntimeError(f"{type(e).__name__}: {e}") from e


def _varlen_parameters() -> frozenset[str]:
    """The arguments of this torch's varlen_attn: newer ones are told by a window to be causal, and asked for grouped key heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


_PARAMETERS = _varlen_parameters()
_CAUSAL: dict[str, Any] = {"is_causal": True} if "is_causal" in _PARAMETERS else {"window_size": (-1, 0)}
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _PARAMETERS else {}  # older ones take fewer key heads as they are


def varlen_covers(config: Any) -> bool:
    """Whether an architecture's attention is plain: no soft caps (Gemma 2), no sinks (gpt-oss)."""
    text = config.get_text_config()
    return getattr(text, "attn_logit_softcapping", None) is None and text.model_type != "gpt_oss"


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
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("this architecture's attention has soft caps or sinks: model.attn_implementation=eager")
    assert cu_seq_lens_q is not None and max_length_q is not None and query.shape[0] == 1
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T, heads, D]; x[0]'s gradient would be a copy
    q, k = q.to(v.dtype), k.to(v.dtype)  # rotary embeddings leave fp32 where the weights are fp32
    causal = getattr(module, "is_causal", True)
    window = sliding_window if causal and sliding_window is not None and max_length_q > sliding_window else None
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    return _varlen(q, k, v, cu_seq_lens_q, max_length_q, causal, window, scale)[None], None


def _varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int, causal: bool, window: int | None, scale: float
) -> torch.Tensor:
    """[T, heads, D] each, sequences between `ends`: by our own kernel or by torch's."""
    if not _only_torchs and varlen.covers(q, longest, window):
        return varlen.attention(q, k, v, ends, longest, causal, scale)
    from torch.nn.attention.varlen import varlen_attn

    arguments = dict(_CAUSAL) if causal else {}
    if window is not None:
        arguments = {"window_size": (window - 1, 0)}
    if q.shape[1] != k.shape[1]:
        arguments |= _GROUPED
    if abs(scale - q.shape[-1] ** -0.5) > 1e-6:
        q = q * (scale * q.shape[-1] ** 0.5)  # torch 2.11's kernel has no scale argument
    out = varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), ends, ends, longest, longest, **arguments)
    assert isinstance(out, torch.Tensor)
    return out


def dense_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa attention; where weights are dropped, the same written out.

    Args:
        query: [B, heads, T, D]; key, value: [B, kv_heads, T, D]. attention_mask: [B or 1, 1, T, T], true where attended, or None.
    Returns:
        [B, T, heads, D] and no weights.
    """
    if dropout == 0 or not fast_dropout.covers(query) or kwargs.get("position_bias") is not None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        arguments = {"dropout": dropout, "scaling": scaling, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **arguments)  # type: ignore[no-any-return]
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attention_mask is None and getattr(module, "is_causal", True) and query.shape[2] > 1:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = (query * (scaling if scaling is not None else query.shape[-1] ** -0.5)) @ key.transpose(2, 3)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            attention_mask = torch.zeros_like(attention_mask, dtype=scores.dtype).masked_fill_(
                ~attention_mask, torch.finfo(scores.dtype).min
            )
        scores += attention_mask
    weights = scores.softmax(-1)
    weights = weights * fast_dropout.mask(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), None


def register() -> None:
    """Make both names known to transformers: one with sdpa's masks, one with none.

    A name that transformers' masks don't know gets none at once. Were one registered, transformers would first look through the positions
    for packed sequences, and wait for the device to tell whether there are some.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionInterface.register(DENSE, dense_attention)
    AttentionMaskInterface.register(DENSE, sdpa_mask)


def make_dense(model: Any) -> str:
    """Let transformers' model use `dense_attention` where its architecture can; return the attention it has then."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation(DENSE)
    return str(model.config._attn_implementation)
