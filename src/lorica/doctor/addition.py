"""The smallest Triton kernel there is: what it takes to compile and run one is all here."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _add(x, y, out, size: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.arange(0, size)
    tl.store(out + place, tl.load(x + place) + tl.load(y + place))


def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y of two tensors [n] on a GPU, n a power of two."""
    out = torch.empty_like(x)
    _add[(1,)](x, y, out, x.numel())
    return out
