"""Products with a frozen linear layer's weight W [out, in], however it is kept: plain, in 4 bits, or in 4 bits and multiplied in FP8.

By default a 4-bit weight is made plain for each use. `prepare` lets it stay plain (the same numbers, more memory), or has the
products done in e4m3 with a scale for each row of the activations (dynamic) and for each row or column of the weight (fixed): NF4's
own error is 9 %, e4m3's 2.6 %. Sums are in fp32 and results in the activations' type.

A product comes with a low-rank one that is added to it, x W^T + d U: the small one is written first and the large one adds to it as it
is written, which saves a pass over the result.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import nn

from lorica.kernels import nf4

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448
ALIGNED = 16  # both sides of W must be multiples, for FP8


class Kept(NamedTuple):
    """How a weight is kept, besides its tensors.

    kind: plain (the weight), nf4 (what `nf4.dequantize_nf4` takes), bitsandbytes (nothing: its own object has it) or e4m3 (the weight and
        its transpose, rounded). sizes: of nf4. fp8: two more tensors, the divisors of W's rows [out, 1] and columns [in, 1].
    """

    kind: str
    sizes: nf4.Sizes | None
    fp8: bool


def covers(base: Any) -> bool:
    """Whether a layer's products can be done here: a plain or a 4-bit linear one."""
    return type(base).__name__ in ("Linear", "Linear4bit")


def tensors(base: Any) -> tuple[Kept, tuple[torch.Tensor, ...]]:
    """How a layer's weight is kept, and the tensors that it is kept in."""
    scales = getattr(base, "lorica_scales", ())
    fp8 = len(scales) > 0
    if (rounded := getattr(base, "lorica_e4m3", None)) is not None:
        return Kept("e4m3", None, True), (*rounded, *scales)
    if (plain := getattr(base, "lorica_plain", None)) is not None:
        return Kept("plain", None, False), (plain,)
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return Kept("plain", None, fp8), (base.weight.detach(), *scales)
    if nf4.covers(base.weight, state):
        return Kept("nf4", nf4.sizes(state), fp8), (*nf4.tables(base.weight, state), *scales)
    return Kept("bitsandbytes", None, fp8), scales


def _plain(base: Any, kept: Kept, parts: tuple[torch.Tensor, ...], dtype: torch.dtype, backward: bool = False) -> torch.Tensor:
    """W [out, in]. backward: made once more there, so that a compiler does not keep it from forward."""
    if kept.kind == "nf4":
        assert kept.sizes is not None
        plain: torch.Tensor = nf4.dequantize_nf4(*parts[: nf4.TABLES], *kept.sizes, int(backward))
        return plain.to(dtype)
    if kept.kind == "bitsandbytes":
        return nf4.dequantize(base.weight.data, base.weight.quant_state).to(dtype)
    return parts[0].to(dtype)


def product(
    x: torch.Tensor, base: Any, kept: Kept, parts: tuple[torch.Tensor, ...], down: torch.Tensor | None, up: torch.Tensor | None
) -> torch.Tensor:
    """x W^T + down up [tokens, out] of x [tokens, in], down [tokens, r], up [r, out]."""
    if kept.fp8:
        return _scaled(x, _e4m3(base, kept, parts, False), parts[-2], down, up)
    return _product(x, _plain(base, kept, parts, x.dtype).t(), down, up)


def back_product(
    g: torch.Tensor, base: Any, kept: Kept, parts: tuple[torch.Tensor, ...], down: torch.Tensor | None, up: torch.Tensor | None
) -> torch.Tensor:
    """g W + down up [tokens, in] of g [tokens, out], down [tokens, r], up [r, in]."""
    if kept.fp8:
        return _scaled(g, _e4m3(base, kept, parts, True), parts[-1], down, up)
    return _product(g, _plain(base, kept, parts, g.dtype, backward=True), down, up)


def _product(x: torch.Tensor, w: torch.Tensor, down: torch.Tensor | None, up: torch.Tensor | None) -> torch.Tensor:
    if down is None or up is None:
        return x @ w
    both: torch.Tensor = _product_on(x, w, down, up) if x.is_cuda else torch.addmm(x @ w, down, up)
    return both


@torch.library.custom_op("lorica::product_on", mutates_args=())
def _product_on(x: torch.Tensor, w: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """x w + down up. One operation, for a compiler would copy the small product before the large one is added to it."""
    return torch.mm(down, up).addmm_(x, w)


@_product_on.register_fake
def _(x, w, down, up):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], w.shape[1])


def _scaled(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, down: torch.Tensor | None, up: torch.Tensor | None
) -> torch.Tensor:
    """x (weight * scales)^T + down up, x in e4m3 by rows. weight [n, k] e4m3, scales [n, 1]."""
    own = _scales(x, 1)
    rounded = (x.float() / own).to(E4M3)
    if x.is_cuda:
        bare = down is None or up is None
        both: torch.Tensor = (
            torch._scaled_mm(rounded, weight.t(), scale_a=own, scale_b=scales.t(), out_dtype=x.dtype, use_fast_accum=True)
            if bare
            else _scaled_and(rounded, weight.t(), own, scales.t(), down, up)
        )
        return both
    out = ((rounded.float() @ weight.float().t()) * own * scales.t()).to(x.dtype)
    return out if down is None or up is None else torch.addmm(out, down, up)


@torch.library.custom_op("lorica::scaled_and", mutates_args=())
def _scaled_and(
    x: torch.Tensor, w: torch.Tensor, of_x: torch.Tensor, of_w: torch.Tensor, down: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    """(x of_x) (w of_w) + down up, x and w in e4m3; in the type of `down`. One operation, as `product_on`."""
    out = torch._scaled_mm(x, w, scale_a=of_x, scale_b=of_w, out_dtype=down.dtype, use_fast_accum=True)
    return out.addmm_(down, up)


@_scaled_and.register_fake
def _(x, w, of_x, of_w, down, up):  # type: ignore[no-untyped-def]
    return down.new_empty(x.shape[0], w.shape[1])


def _e4m3(base: Any, kept: Kept, parts: tuple[torch.Tensor, ...], transposed: bool) -> torch.Tensor:
    """W [out, in], or its transpose [in, out], each row divided by its divisor."""
    if kept.kind == "e4m3":
        return parts[1] if transposed else parts[0]
    divisors = parts[-1] if transposed else parts[-2]
    if kept.kind == "nf4":
        assert kept.sizes is not None
        rounded: torch.Tensor = nf4.dequantize_nf4_e4m3(*parts[: nf4.TABLES], divisors, *kept.sizes[:-1], transposed)
        return rounded
    w = _plain(base, kept, parts, torch.float32)
    return _rounded(w.t() if transposed else w, divisors)


def _scales(x: torch.Tensor, dim: int) -> torch.Tensor:
    """By what to divide so that the largest along `dim` becomes e4m3's largest; fp32."""
    return x.abs().amax(dim, keepdim=True).float().clamp(min=1e-12) / LARGEST


def _rounded(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (x.float() / scales).to(E4M3).contiguous()


def prepare(base: Any, dtype: torch.dtype, fp8: bool, resident: bool) -> None:
    """Set how a layer's products are done from now on. dtype: of the activations."""
    w = _plain(base, *tensors(base), dtype)
    if fp8 and all(n % ALIGNED == 0 for n in w.shape):
        scales = _scales(w, 1), _scales(w, 0).t().contiguous()
        base.lorica_scales = scales
        if resident:
            base.lorica_e4m3 = _rounded(w, scales[0]), _rounded(w.t(), scales[1])
    elif resident and getattr(base.weight, "quant_state", None) is not None:
        base.lorica_plain = w


class _Frozen(torch.autograd.Function):
    """x [tokens, in] in the compute type -> x W^T + b [tokens, out] of a frozen 4-bit layer, of which nothing is kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, base: Any, kept: Kept, *parts: torch.Tensor) -> torch.Tensor:
        y = product(x, base, kept, parts, None, None)
        if base.bias is not None:
            y = y + base.bias.to(y.dtype)
        ctx.save_for_backward(*parts)
        ctx.base, ctx.kept, ctx.count = base, kept, len(parts)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx = back_product(grads[0], ctx.base, ctx.kept, ctx.saved_tensors, None, None) if ctx.needs_input_grad[0] else None
        return dx, *(None for _ in range(2 + ctx.count))


class _Forward:
    """In training, the products above; bitsandbytes' own forward hands its result on in the input's type, which autocast made fp32."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad):
            plain: torch.Tensor = super().forward(x)  # type: ignore[misc]
            return plain
        kept, parts = tensors(self)
        y: torch.Tensor = _Frozen.apply(flat(x), self, kept, *parts)
        return y.view(*x.shape[:-1], -1)


def flat(x: torch.Tensor) -> torch.Tensor:
    """`x` as [tokens, size], in the compute type."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return x.reshape(-1, x.shape[-1]).to(dtype)


@functools.cache
def _class(kind: type) -> type:
    return type(kind.__name__, (_Forward, kind), {})


def install(model: nn.Module) -> int:
    """Give every 4-bit linear layer that is no adapter's base this forward, by class; return how many there are."""
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError:  # no 4-bit layers either
        return 0
    own = _class(Linear4bit)
    under = {id(base) for base in _bases(model)}
    found = [m for m in model.modules() if type(m) is Linear4bit and id(m) not in under]
    for module in found:
        module.__class__ = own
    return len(found)


def release(model: nn.Module) -> None:
    """Let go of what `prepare` let stay plain, or rounded."""
    for base in _bases(model):
        for name in ("lorica_plain", "lorica_e4m3"):
            base.__dict__.pop(name, None)


def plain_bytes(model: nn.Module) -> int:
    """Bytes that all 4-bit weights under LoRA would take in the type that they were quantised from."""
    states = [state for base in _bases(model) if (state := getattr(base.weight, "quant_state", None)) is not None]
    return sum(state.shape.numel() * state.dtype.itemsize for state in states)


def _bases(model: nn.Module) -> list[Any]:
    """The frozen linear layers under LoRA."""
    from peft.tuners.lora.layer import LoraLayer

    return [m.base_layer for m in model.modules() if isinstance(m, LoraLayer) and covers(m.base_layer)]


def prepare_layers(model: nn.Module, dtype: torch.dtype, fp8: bool, resident: bool) -> None:
    """`prepare` for the base of every LoRA layer over a linear one."""
    if not (fp8 or resident):
        return
    find: Any = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    for base in _bases(model):
        prepare(base, dtype, fp8 and base is not getattr(head, "base_layer", None), resident)
