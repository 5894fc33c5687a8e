"""torch's variable-length attention needs a GPU: on a CPU its place is taken by plain attention, one sequence at a time."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from lorica.kernels import attention


def _one_at_a_time(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, longest: int, causal: bool, window: int | None, scale: float
) -> torch.Tensor:
    assert window is None
    bounds = ends.tolist()
    assert max(b - a for a, b in itertools.pairwise(bounds)) <= longest
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    parts = [
        F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in (q, k, v)), is_causal=causal, scale=scale).transpose(0, 1)
        for a, b in itertools.pairwise(bounds)
        if a < b
    ]
    return torch.cat(parts)


@pytest.fixture
def varlen_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models may be given `attention.VARLEN`."""
    attention.register()
    monkeypatch.setattr(attention, "_varlen", _one_at_a_time)
