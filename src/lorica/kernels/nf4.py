"""NF4 weights to plain ones in one launch: codes, block scales and the scales' own quantisation together, at memory bandwidth.

bitsandbytes' own operation takes three launches with double quantisation. Its layout (bitsandbytes.functional.quantize_4bit): two
codes a byte, the first in the high bits; a scale for each `blocksize` weights; with double quantisation scales are a byte each, looked
up in a table of 256, times a scale for each 256 of them, plus an offset. Where there is no Triton, or another layout, bitsandbytes'
operation is used; it is also the reference in the tests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # builds of torch for CPUs come without
    triton = None

BYTES = 1024  # of codes, to a program
TILE = 64  # weights of a tile's side


def covers(weight: torch.Tensor, state: Any) -> bool:
    """Whether `dequantize` can take a weight: 4-bit codes on a CUDA device with doubly quantised scales."""
    return triton is not None and weight.is_cuda and weight.dtype == torch.uint8 and bool(state.nested)


if triton is not None:

    @triton.jit
    def _weights(  # type: ignore[no-untyped-def]
        codes, scales, table, table2, scales2, offset, at, inside, half: tl.constexpr, blocksize2: tl.constexpr
    ):
        """The weights of the code bytes `at`, two for each, side by side in the last dimension."""
        packed = tl.load(codes + at, mask=inside, other=0).to(tl.int32)
        block = at // half
        scale = tl.load(table2 + tl.load(scales + block, mask=inside, other=0).to(tl.int32))
        scale = scale * tl.load(scales2 + block // blocksize2, mask=inside, other=0.0) + tl.load(offset)
        return tl.interleave(tl.load(table + (packed >> 4)) * scale, tl.load(table + (packed & 15)) * scale)

    @triton.jit
    def _kernel(  # type: ignore[no-untyped-def]
        codes, scales, table, table2, scales2, offset, out, n_bytes, half: tl.constexpr, blocksize2: tl.constexpr, size: tl.constexpr
    ):
        at = tl.program_id(0) * size + tl.arange(0, size)
        both = _weights(codes, scales, table, table2, scales2, offset, at, at < n_bytes, half, blocksize2)
        place = tl.program_id(0) * size * 2 + tl.arange(0, 2 * size)
        tl.store(out + place, both.to(out.dtype.element_ty), mask=place < 2 * n_bytes)

    @triton.jit
    def _e4m3_kernel(  # type: ignore[no-untyped-def]
        codes, scales, table, table2, scales2, offset, divisors, out, rows, columns,
        half: tl.constexpr, blocksize2: tl.constexpr, transposed: tl.constexpr, side: tl.constexpr
    ):  # fmt: skip
        row = tl.program_id(0) * side + tl.arange(0, side)[:, None]
        byte = tl.program_id(1) * (side // 2) + tl.arange(0, side // 2)[None, :]
        inside = (row < rows) & (byte < columns // 2)
        both = _weights(codes, scales, table, table2, scales2, offset, row * (columns // 2) + byte, inside, half, blocksize2)
        column = tl.program_id(1) * side + tl.arange(0, side)[None, :]
        fits = (row < rows) & (column < columns)
        if transposed:
            divisor = tl.load(divisors + column, mask=column < columns, other=1.0)
            tl.store(out + column * rows + row, (both / divisor).to(out.dtype.element_ty), mask=fits)
        else:
            divisor = tl.load(divisors + row, mask=row < rows, other=1.0)
            tl.store(out + row * columns + column, (both / divisor).to(out.dtype.element_ty), mask=fits)


@torch.library.custom_op("lorica::dequantize_nf4", mutates_args=())
def dequantize_nf4(
    codes: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    table2: torch.Tensor,
    scales2: torch.Tensor,
    offset: torch.Tensor,
    blocksize: int,
    blocksize2: int,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    use: int = 0,
) -> torch.Tensor:
    """[rows, columns] in `dtype`.

    Args:
        codes: uint8, rows * columns / 2 of them. scales: uint8, one for each `blocksize` weights. table: fp32 [16]. table2: fp32 [256].
        scales2: fp32, one for each `blocksize2` scales. offset: fp32 scalar.
        use: of no effect here; a compiler makes one of two equal calls, and keeps the weight from one use to the other.
    """
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    count = rows * columns // 2
    _kernel[(triton.cdiv(count, BYTES),)](
        codes,
        scales,
        table,
        table2,
        scales2,
        offset,
        out,
        count,
        half=blocksize // 2,
        blocksize2=blocksize2,
        size=BYTES,
        enable_fp_fusion=False,  # bitsandbytes rounds the scale before it adds the offset
    )
    return out


@dequantize_nf4.register_fake
def _(codes, scales, table, table2, scales2, offset, blocksize, blocksize2, rows, columns, dtype, use=0):  # type: ignore[no-untyped-def]
    return torch.empty(rows, columns, dtype=dtype, device=codes.device)


@torch.library.custom_op("lorica::dequantize_nf4_e4m3", mutates_args=())
def dequantize_nf4_e4m3(
    codes: torch.Tensor,
    scales: torch.Tensor,
    table: torch.Tensor,
    table2: torch.Tensor,
    scales2: torch.Tensor,
    offset: torch.Tensor,
    divisors: torch.Tensor,
    blocksize: int,
    blocksize2: int,
    rows: int,
    columns: int,
    transposed: bool,
) -> torch.Tensor:
    """As `dequantize_nf4`, divided by `divisors` (fp32, one a row of the result) and rounded to e4m3; [columns, rows] if transposed."""
    shape = (columns, rows) if transposed else (rows, columns)
    out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=codes.device)
    grid = (triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))
    tables = (codes, scales, table, table2, scales2, offset, divisors, out)
    _e4m3_kernel[grid](*tables, rows, columns, half=blocksize // 2, blocksize2=blocksize2, transposed=transposed, side=TILE)
    return out


@dequantize_nf4_e4m3.register_fake
def _(codes, scales, table, table2, scales2, offset, divisors, blocksize, blocksize2, rows, columns, transposed):  # type: ignore[no-untyped-def]
    return torch.empty((columns, rows) if transposed else (rows, columns), dtype=torch.float8_e4m3fn, device=codes.device)


class Sizes(NamedTuple):
    """Of a 4-bit weight: weights to a scale, scales to a scale of theirs, [rows, columns], and the type that it was quantised from."""

    blocksize: int
    blocksize2: int
    rows: int
    columns: int
    dtype: torch.dtype


TABLES = 6  # tensors of `tables`


def tables(weight: torch.Tensor, state: Any) -> tuple[torch.Tensor, ...]:
    """The tensors that a bitsandbytes 4-bit parameter is kept in, as `dequantize_nf4` takes them."""
    return weight.detach(), state.absmax, state.code, state.state2.code, state.state2.absmax, state.offset


def sizes(state: Any) -> Sizes:
    """The sizes of a bitsandbytes 4-bit parameter, as `dequantize_nf4` takes them."""
    rows, columns = state.shape
    return Sizes(state.blocksize, state.state2.blocksize, rows, columns, state.dtype)


def dequantize(weight: torch.Tensor, state: Any) -> torch.Tensor:
    """The plain weight [out, in] of a bitsandbytes 4-bit parameter, in the type it was quantised from."""
    if not covers(weight, state):
        from bitsandbytes.functional import dequantize_4bit

        theirs: torch.Tensor = dequantize_4bit(weight, state)
        return theirs
    ours: torch.Tensor = dequantize_nf4(*tables(weight, state), *sizes(state))
    return ours
