"""The forward of a frozen linear layer with a LoRA adapter, and its backward, with no pass over the output that is not needed.

    y  = x W^T + s (d x) A^T B^T + b        W frozen; in 4 bits it is dequantised for each use and never saved. d: dropout
    dx = g W + s d (g B) A                  dA = s (g B)^T (d x)       dB = s g^T (d x A^T)

PEFT's own forward clones the base's output, casts the input to the adapter's type and back, and adds unfused. The modules, their
names and their parameters stay PEFT's: only `forward` is replaced, and what this path does not cover (DoRA, adapters with biases,
several active or merged adapters) goes through PEFT's, which is also the plain reference.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from lorica.kernels import dropout, nf4


def _weight(base: Any, dtype: torch.dtype) -> torch.Tensor:
    """W [out, in] of a frozen layer: as it is, or what its 4-bit codes stand for."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        plain: torch.Tensor = base.weight.detach()
    else:
        plain = nf4.dequantize(base.weight.data, state)
    return plain.to(dtype)


class _LoRALinear(torch.autograd.Function):
    """x [tokens, in] in the compute type, A [r, in] and B [out, r] in their own (fp32) -> y [tokens, out] in the compute type."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, base: Any, scaling: float, p: float) -> torch.Tensor:
        dropped, kept = x, None
        if p > 0 and dropout.covers(x):
            kept = dropout.mask(x, p)  # scaled
            dropped = x * kept
        elif p > 0:
            dropped, kept = torch.ops.aten.native_dropout(x, p, True)  # true or false
        down = dropped @ a.to(x.dtype).t()
        y = torch.addmm(x @ _weight(base, x.dtype).t(), down, b.to(x.dtype).t(), alpha=scaling)
        if base.bias is not None:
            y += base.bias
        ctx.save_for_backward(dropped, down, a, b, kept)
        ctx.base, ctx.scaling, ctx.p = base, scaling, p
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dropped, down, a, b, kept = ctx.saved_tensors
        g = grads[0]
        gb = (g @ b.to(g.dtype)).mul_(ctx.scaling)
        da = (gb.t() @ dropped).to(a.dtype) if ctx.needs_input_grad[1] else None
        db = (g.t() @ down).mul_(ctx.scaling).to(b.dtype) if ctx.needs_input_grad[2] else None
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g @ _weight(ctx.base, g.dtype)
            if kept is None:
                dx = torch.addmm(dx, gb, a.to(g.dtype))
            else:
                through = gb @ a.to(g.dtype)
                scaled = kept.dtype != torch.bool
                dx += through * kept if scaled else torch.ops.aten.native_dropout_backward(through, kept, 1.0 / (1.0 - ctx.p))
        return dx, da, db, None, None, None


def _forward(layer: Any, plain: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The layer's forward: ours where it applies, else PEFT's (`plain`)."""
    active = layer.active_adapters
    name = active[0] if len(active) == 1 else None
    base = layer.base_layer
    covered = (
        name is not None
        and name in layer.lora_A
        and name not in layer.lora_variant
        and not (args or kwargs or layer.disable_adapters or layer.merged)
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
        and (base.bias is None or not base.bias.requires_grad)
        and not base.weight.requires_grad
    )
    if not covered:
        out: torch.Tensor = plain(x, *args, **kwargs)
        return out
    assert name is not None
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    drop = layer.lora_dropout[name]
    p = drop.p if isinstance(drop, nn.Dropout) and layer.training else 0.0
    flat = x.reshape(-1, x.shape[-1]).to(dtype)
    y: torch.Tensor = _LoRALinear.apply(flat, layer.lora_A[name].weight, layer.lora_B[name].weight, base, layer.scaling[name], p)
    return y.view(*x.shape[:-1], -1)


def install(model: nn.Module) -> int:
    """Give every LoRA layer over a plain or a 4-bit linear layer this forward; return how many there are."""
    from peft.tuners.lora.layer import Linear

    kinds: tuple[type, ...] = (Linear,)
    try:
        from peft.tuners.lora.bnb import Linear4bit

        kinds = (Linear, Linear4bit)
    except ImportError:  # no bitsandbytes: no 4-bit layers either
        pass
    count = 0
    for module in model.modules():
        if isinstance(module, kinds) and type(module.base_layer).__name__ in ("Linear", "Linear4bit"):
            module.forward = functools.partial(_forward, module, module.forward)
            count += 1
    return count
