"""The forward of a frozen linear layer with a LoRA adapter, and its backward, with no pass over the output that is not needed.

    y  = x W^T + s (d x) A^T B^T + b        W frozen; in 4 bits it is dequantised for each use and never saved. d: dropout
    dx = g W + s d (g B) A                  dA = s (g B)^T (d x)       dB = s g^T (d x A^T)

PEFT's own forward clones the base's output, casts the input to the adapter's type and back, and adds unfused. The modules, their
names and their parameters stay PEFT's: only `forward` is replaced (by a subclass), and what this path does not cover (DoRA, adapters
with biases, several active or merged adapters) goes through PEFT's, which is also the plain reference.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from lorica.kernels import dropout, frozen
from lorica.kernels.frozen import Kept


class _LoRALinear(torch.autograd.Function):
    """x [tokens, in] in the compute type, A [r, in] and B [out, r] in their own (fp32) -> y [tokens, out] in the compute type.

    The frozen weight's tensors are arguments, so that a compiler sees them. seed, start: of a dropout whose mask follows from them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        seed: torch.Tensor | None,
        start: int,
        base: Any,
        scaling: float,
        p: float,
        kept: Kept,
        *parts: torch.Tensor,
    ) -> torch.Tensor:
        dropped, mask = x, None
        if seed is not None:
            dropped = dropout.seeded(x, seed, p, start, 0)
        elif p > 0 and dropout.covers(x):
            mask = dropout.mask(x, p)  # scaled
            dropped = _apply(x, mask, p)
        elif p > 0:
            dropped, mask = torch.ops.aten.native_dropout(x, p, True)  # true or false
        down = dropped @ a.to(x.dtype).t()
        y = frozen.product(x, base, kept, parts, down * scaling, b.to(x.dtype).t())
        if base.bias is not None:
            y = y + base.bias
        ctx.save_for_backward(dropped if seed is None else x, down, a, b, seed, mask, *parts)
        ctx.base, ctx.scaling, ctx.p, ctx.kept, ctx.start = base, scaling, p, kept, start
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dropped, down, a, b, seed, mask, *parts = ctx.saved_tensors
        g = grads[0]
        if seed is not None:
            dropped = dropout.seeded(dropped, seed, ctx.p, ctx.start, 1)
        gb = (g @ b.to(g.dtype)) * ctx.scaling
        da = (gb.t() @ dropped).to(a.dtype) if ctx.needs_input_grad[1] else None
        db = (g.t() @ down).to(b.dtype) * ctx.scaling if ctx.needs_input_grad[2] else None
        dx = None
        if ctx.needs_input_grad[0]:
            through = a.to(g.dtype)
            if seed is None and mask is None:
                dx = frozen.back_product(g, ctx.base, ctx.kept, tuple(parts), gb, through)
            else:
                through = gb @ through
                masked = _apply(through, mask, ctx.p) if seed is None else dropout.seeded(through, seed, ctx.p, ctx.start, 0)
                dx = frozen.back_product(g, ctx.base, ctx.kept, tuple(parts), None, None) + masked
        return dx, da, db, *(None for _ in range(6 + len(parts)))


def _apply(x: torch.Tensor, mask: torch.Tensor, p: float) -> torch.Tensor:
    """Dropout by a mask that is scaled, or that is true or false."""
    if mask.dtype != torch.bool:
        return x * mask
    out: torch.Tensor = torch.ops.aten.native_dropout_backward(x, mask, 1.0 / (1.0 - p))
    return out


class _Forward:
    """The forward of a PEFT layer: ours where it applies, else PEFT's own, which comes next in the class's order."""

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        active = self.active_adapters
        name = active[0] if len(active) == 1 else None
        base = self.base_layer
        covered = (
            name is not None
            and name in self.lora_A
            and name not in self.lora_variant
            and not (args or kwargs or self.disable_adapters or self.merged)
            and self.lora_A[name].bias is None
            and self.lora_B[name].bias is None
            and (base.bias is None or not base.bias.requires_grad)
            and not base.weight.requires_grad
        )
        if not covered:
            out: torch.Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
            return out
        drop = self.lora_dropout[name]
        p = drop.p if isinstance(drop, nn.Dropout | dropout.Seeded) and self.training else 0.0
        seed, start = (drop.seed, drop.start) if isinstance(drop, dropout.Seeded) and p > 0 else (None, 0)
        kept, parts = frozen.tensors(base)
        y: torch.Tensor = _LoRALinear.apply(
            frozen.flat(x), self.lora_A[name].weight, self.lora_B[name].weight, seed, start, base, self.scaling[name], p, kept, *parts
        )
        return y.view(*x.shape[:-1], -1)


@functools.cache
def _classes() -> dict[type, type]:
    """PEFT's class -> the same with our forward."""
    from peft.tuners.lora.layer import Linear

    kinds: list[type] = [Linear]
    try:
        from peft.tuners.lora.bnb import Linear4bit

        kinds.append(Linear4bit)
    except ImportError:  # no bitsandbytes: no 4-bit layers either
        pass
    return {kind: type(kind.__name__, (_Forward, kind), {}) for kind in kinds}


def install(model: nn.Module) -> int:
    """Give every LoRA layer over a plain or a 4-bit linear layer this forward; return how many there are.

    It is given by class, not by instance: a compiled layer is then the same code for every layer of a model.
    """
    count = 0
    for module in model.modules():
        if type(module) in _classes() and frozen.covers(module.base_layer):
            module.__class__ = _classes()[type(module)]
            count += 1
    return count
