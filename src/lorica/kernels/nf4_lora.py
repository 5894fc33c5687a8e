"""The forward of a 4-bit linear layer with a LoRA adapter, and its backward, with no pass over the output that is not needed.

    y  = x W^T + s (x A^T) B^T + b          W frozen in 4 bits, dequantised for each use and never saved
    dx = g W + s (g B) A                    dA = s (g B)^T x       dB = s g^T (x A^T)

PEFT's own forward clones the base's output, casts the input to the adapter's type and back, and adds unfused. The modules, their
names and their parameters stay PEFT's: only `forward` is replaced, and what this path does not cover (DoRA, several active or
merged adapters) goes through PEFT's. Plain reference: PEFT's `Linear4bit.forward`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn


def _dequantized(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """W [out, in] of a bitsandbytes 4-bit parameter."""
    from bitsandbytes.functional import dequantize_4bit

    plain: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return plain.to(dtype)


class _NF4LoRA(torch.autograd.Function):
    """x [tokens, in], A [r, in], B [out, r] -> y [tokens, out]; A and B in their own type (fp32), x in the compute type."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: Any, scaling: float) -> torch.Tensor:
        a16, b16 = a.to(x.dtype), b.to(x.dtype)
        xa = x @ a16.t()
        y = (x @ _dequantized(weight, x.dtype).t()).addmm_(xa, b16.t(), alpha=scaling)
        ctx.save_for_backward(x, xa, a, b)
        ctx.weight, ctx.scaling = weight, scaling
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, xa, a, b = ctx.saved_tensors
        g = grads[0]
        gb = (g @ b.to(g.dtype)).mul_(ctx.scaling)
        da = (gb.t() @ x).to(a.dtype) if ctx.needs_input_grad[1] else None
        db = (g.t() @ xa).mul_(ctx.scaling).to(b.dtype) if ctx.needs_input_grad[2] else None
        dx = (g @ _dequantized(ctx.weight, g.dtype)).addmm_(gb, a.to(g.dtype)) if ctx.needs_input_grad[0] else None
        return dx, da, db, None, None


class _NF4Base(torch.autograd.Function):
    """y = x W^T alone, for adapters whose input goes through dropout."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any) -> torch.Tensor:
        ctx.weight = weight
        return x @ _dequantized(weight, x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (grads[0] @ _dequantized(ctx.weight, grads[0].dtype) if ctx.needs_input_grad[0] else None), None


def _forward(layer: Any, plain: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The layer's forward: ours where it applies, else PEFT's (`plain`)."""
    active = layer.active_adapters
    name = active[0] if len(active) == 1 else None
    covered = (
        name is not None
        and name in layer.lora_A
        and name not in layer.lora_variant
        and not (args or kwargs or layer.disable_adapters or layer.merged)
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
    )
    if not covered:
        out: torch.Tensor = plain(x, *args, **kwargs)
        return out
    assert name is not None
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    a, b, scaling, base = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], layer.base_layer
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    with torch.autocast(kind, enabled=False):
        dropout = layer.lora_dropout[name]
        if isinstance(dropout, nn.Dropout) and dropout.p > 0 and layer.training:
            xa = dropout(flat) @ a.to(dtype).t()
            y = torch.addmm(_NF4Base.apply(flat, base.weight), xa, b.to(dtype).t(), alpha=scaling)
        else:
            y = _NF4LoRA.apply(flat, a, b, base.weight, scaling)
        if base.bias is not None:
            y = y + base.bias.to(dtype)
    return y.view(*x.shape[:-1], y.shape[-1])


def install(model: nn.Module) -> int:
    """Give every 4-bit LoRA layer of a PEFT model this forward; return how many there are."""
    from peft.tuners.lora.bnb import Linear4bit

    count = 0
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.forward = functools.partial(_forward, module, module.forward)
            count += 1
    return count
