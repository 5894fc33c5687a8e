"""Attention of sequences laid end to end, in Triton: for many short sequences, the same bits in every run.

softmax(q k^T scale) v within each sequence, by blocks, as FlashAttention does it (Dao, 2023, arXiv:2307.08691): no matrix of scores is
kept, backward computes them again from the forward's log-sums. A block of queries or keys belongs to one sequence, so a short one costs
little more than its own size. Where several query heads share a key head, one program sums over them; nothing is added from two places
at once.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for CPUs come without
    triton = None

HEAD_SIZES = (32, 64, 128)
LONGEST = 4096  # tokens of a sequence; from there on torch's kernel is as fast
LOG2_E = 1.4426950408889634

# (queries, keys, warps, stages) of a program, for the output and for the gradients; measured on an H200, docs/experiments.md
_BLOCKS = {"forward": (64, 64, 4, 3), "queries": (64, 64, 4, 2), "keys": (32, 64, 4, 2)}


def covers(q: torch.Tensor, longest: int, window: int | None) -> bool:
    """Whether `attention` should take queries [T, heads, D]: on an NVIDIA GPU, in bf16 or fp16, D of HEAD_SIZES, no sliding window."""
    return (
        triton is not None
        and q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[2] in HEAD_SIZES
        and longest <= LONGEST
        and window is None
    )


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int, causal: bool, scale: float
) -> torch.Tensor:
    """[T, heads, D] of q [T, heads, D], k and v [T, kv_heads, D], each with any strides but 1 in D.

    Args:
        ends: int32 [B + 1], where sequences begin and the last ends. longest: tokens of the longest, or more.
    """
    out: torch.Tensor = _forward(q, k, v, ends, longest, causal, scale)[0]
    return out


if triton is not None:

    @triton.jit
    def _forward_kernel(  # type: ignore[no-untyped-def]
        q, k, v, ends, out, sums, q_t, q_h, k_t, k_h, v_t, v_h, tokens, scale,
        group: tl.constexpr, heads: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, causal: tl.constexpr
    ):  # fmt: skip
        block, sequence, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        begin = tl.load(ends + sequence)
        length = tl.load(ends + sequence + 1) - begin
        if block * rows >= length:
            return
        begin = begin.to(tl.int64)
        i = block * rows + tl.arange(0, rows)
        d = tl.arange(0, size)
        own = (i < length)[:, None]
        queries = tl.load(q + (begin + i)[:, None] * q_t + head * q_h + d[None, :], mask=own, other=0.0)
        most = tl.full([rows], float("-inf"), tl.float32)
        total = tl.zeros([rows], tl.float32)
        mixed = tl.zeros([rows, size], tl.float32)
        stop = length
        if causal:
            stop = tl.minimum(length, (block + 1) * rows)
        for at in range(0, stop, columns):
            j = at + tl.arange(0, columns)
            inside = j < length
            keys = tl.load(k + (begin + j)[None, :] * k_t + (head // group) * k_h + d[:, None], mask=inside[None, :], other=0.0)
            values = tl.load(v + (begin + j)[:, None] * v_t + (head // group) * v_h + d[None, :], mask=inside[:, None], other=0.0)
            score = tl.dot(queries, keys) * scale
            seen = inside[None, :]
            if causal:
                seen = seen & (i[:, None] >= j[None, :])
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(most, tl.max(score, 1))
            weight = tl.exp2(score - higher[:, None])
            before = tl.exp2(most - higher)
            total = total * before + tl.sum(weight, 1)
            mixed = mixed * before[:, None] + tl.dot(weight.to(values.dtype), values)
            most = higher
        place = (begin + i)[:, None] * (heads * size) + head * size + d[None, :]
        tl.store(out + place, (mixed / total[:, None]).to(out.dtype.element_ty), mask=own)
        tl.store(sums + head * tokens + begin + i, most + tl.log2(total), mask=i < length)

    @triton.jit
    def _queries_kernel(  # type: ignore[no-untyped-def]
        q, k, v, ends, out, grad, sums, inner, dq, q_t, q_h, k_t, k_h, v_t, v_h, tokens, scale, natural,
        group: tl.constexpr, heads: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, causal: tl.constexpr
    ):  # fmt: skip
        block, sequence, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        begin = tl.load(ends + sequence)
        length = tl.load(ends + sequence + 1) - begin
        if block * rows >= length:
            return
        begin = begin.to(tl.int64)
        i = block * rows + tl.arange(0, rows)
        d = tl.arange(0, size)
        own = (i < length)[:, None]
        place = (begin + i)[:, None] * (heads * size) + head * size + d[None, :]
        queries = tl.load(q + (begin + i)[:, None] * q_t + head * q_h + d[None, :], mask=own, other=0.0)
        g = tl.load(grad + place, mask=own, other=0.0)
        delta = tl.sum(g.to(tl.float32) * tl.load(out + place, mask=own, other=0.0).to(tl.float32), 1)
        tl.store(inner + head * tokens + begin + i, delta, mask=i < length)
        lse = tl.load(sums + head * tokens + begin + i, mask=i < length, other=0.0)
        result = tl.zeros([rows, size], tl.float32)
        stop = length
        if causal:
            stop = tl.minimum(length, (block + 1) * rows)
        for at in range(0, stop, columns):
            j = at + tl.arange(0, columns)
            inside = j < length
            keys = tl.load(k + (begin + j)[:, None] * k_t + (head // group) * k_h + d[None, :], mask=inside[:, None], other=0.0)
            values = tl.load(v + (begin + j)[None, :] * v_t + (head // group) * v_h + d[:, None], mask=inside[None, :], other=0.0)
            seen = inside[None, :]
            if causal:
                seen = seen & (i[:, None] >= j[None, :])
            weight = tl.exp2(tl.where(seen, tl.dot(queries, tl.trans(keys)) * scale, float("-inf")) - lse[:, None])
            change = weight * (tl.dot(g, values) - delta[:, None])
            result += tl.dot(change.to(keys.dtype), keys)
        tl.store(dq + place, (result * natural).to(dq.dtype.element_ty), mask=own)

    @triton.jit
    def _keys_kernel(  # type: ignore[no-untyped-def]
        q, k, v, ends, grad, sums, inner, dk, dv, q_t, q_h, k_t, k_h, v_t, v_h, tokens, scale, natural,
        group: tl.constexpr, heads: tl.constexpr, size: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr, causal: tl.constexpr
    ):  # fmt: skip
        block, sequence, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        begin = tl.load(ends + sequence)
        length = tl.load(ends + sequence + 1) - begin
        if block * columns >= length:
            return
        begin = begin.to(tl.int64)
        j = block * columns + tl.arange(0, columns)
        d = tl.arange(0, size)
        own = (j < length)[:, None]
        keys = tl.load(k + (begin + j)[:, None] * k_t + kv_head * k_h + d[None, :], mask=own, other=0.0)
        values = tl.load(v + (begin + j)[:, None] * v_t + kv_head * v_h + d[None, :], mask=own, other=0.0)
        of_keys = tl.zeros([columns, size], tl.float32)
        of_values = tl.zeros([columns, size], tl.float32)
        start = 0
        if causal:
            start = block * columns // rows * rows
        for head in range(kv_head * group, (kv_head + 1) * group):
            for at in range(start, length, rows):
                i = at + tl.arange(0, rows)
                inside = i < length
                queries = tl.load(q + (begin + i)[:, None] * q_t + head * q_h + d[None, :], mask=inside[:, None], other=0.0)
                g = tl.load(grad + (begin + i)[:, None] * (heads * size) + head * size + d[None, :], mask=inside[:, None], other=0.0)
                lse = tl.load(sums + head * tokens + begin + i, mask=inside, other=0.0)
                delta = tl.load(inner + head * tokens + begin + i, mask=inside, other=0.0)
                seen = inside[None, :] & own
                if causal:
                    seen = seen & (i[None, :] >= j[:, None])
                weight = tl.exp2(tl.where(seen, tl.dot(keys, tl.trans(queries)) * scale, float("-inf")) - lse[None, :])
                of_values += tl.dot(weight.to(g.dtype), g)
                change = weight * (tl.dot(values, tl.trans(g)) - delta[None, :])
                of_keys += tl.dot(change.to(queries.dtype), queries)
        place = (begin + j)[:, None] * (heads // group * size) + kv_head * size + d[None, :]
        tl.store(dk + place, (of_keys * natural).to(dk.dtype.element_ty), mask=own)
        tl.store(dv + place, of_values.to(dv.dtype.element_ty), mask=own)


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for x in tensors for stride in (x.stride(0), x.stride(1))]


def _sizes(q: torch.Tensor, k: torch.Tensor, causal: bool, what: str) -> dict[str, Any]:
    rows, columns, warps, stages = _BLOCKS[what]
    heads, size = q.shape[1], q.shape[2]
    shape = {"group": heads // k.shape[1], "heads": heads, "size": size, "causal": causal}
    return {**shape, "rows": rows, "columns": columns, "num_warps": warps, "num_stages": stages}


@torch.library.custom_op("lorica::attention", mutates_args=())
def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int, causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention`, and the base-2 log-sums of the weights' numerators, fp32 [heads, T]."""
    tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    sums = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    sizes = _sizes(q, k, causal, "forward")
    grid = (triton.cdiv(longest, sizes["rows"]), ends.numel() - 1, heads)
    _forward_kernel[grid](q, k, v, ends, out, sums, *_strides(q, k, v), tokens, scale * LOG2_E, **sizes)
    return out, sums


@_forward.register_fake
def _(q, k, v, ends, longest, causal, scale):  # type: ignore[no-untyped-def]
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("lorica::attention_backward", mutates_args=())
def _backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    grad: torch.Tensor,
    longest: int,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    tokens, heads, _ = q.shape
    grad = grad.contiguous()
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    inner = torch.empty_like(sums)  # of the output and its gradient
    common = (*_strides(q, k, v), tokens, scale * LOG2_E, scale)
    sizes = _sizes(q, k, causal, "queries")
    grid = (triton.cdiv(longest, sizes["rows"]), ends.numel() - 1, heads)
    _queries_kernel[grid](q, k, v, ends, out, grad, sums, inner, dq, *common, **sizes)
    sizes = _sizes(q, k, causal, "keys")
    grid = (triton.cdiv(longest, sizes["columns"]), ends.numel() - 1, k.shape[1])
    _keys_kernel[grid](q, k, v, ends, grad, sums, inner, dk, dv, *common, **sizes)
    return dq, dk, dv


@_backward.register_fake
def _(q, k, v, ends, out, sums, grad, longest, causal, scale):  # type: ignore[no-untyped-def]
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, ends, ctx.longest, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, ends, *output)


def _gradients(ctx: Any, grad: torch.Tensor, of_sums: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, ends, out, sums = ctx.saved_tensors
    return (*_backward(q, k, v, ends, out, sums, grad, ctx.longest, ctx.causal, ctx.scale), None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_keep)
