"""The attention kernels' arithmetic, run by Triton's interpreter on the CPU, is plain attention's (tests/gpu has it on the device)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import itertools, torch
from torch.nn.functional import scaled_dot_product_attention
from lorica.kernels import varlen

torch.manual_seed(0)
lengths = [5, 70, 0, 64, 1, 130]
ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
total, g = sum(lengths), torch.randn(sum(lengths), 4, 32)
for kv_heads, causal in itertools.product((4, 2), (False, True)):
    q = torch.randn(4, total, 32).transpose(0, 1).requires_grad_()  # heads first in memory, as a model has them
    k, v = (torch.randn(total, kv_heads, 32, requires_grad=True) for _ in range(2))
    ours = varlen.attention(q, k, v, ends, max(lengths) + 30, causal, 0.2)
    many = [x.repeat_interleave(4 // x.shape[1], 1) for x in (q, k, v)]
    plain = torch.cat([
        scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in many), is_causal=causal, scale=0.2).transpose(0, 1)
        for a, b in itertools.pairwise(ends.tolist()) if a < b
    ])
    for x, y in zip((ours, *torch.autograd.grad(ours, (q, k, v), g)), (plain, *torch.autograd.grad(plain, (q, k, v), g))):
        assert (x - y).norm() < 1e-5 * y.norm(), (kv_heads, causal)
print("equal")
"""


def test_the_kernels_are_exact() -> None:
    pytest.importorskip("triton", reason="torch's CPU builds come without Triton")
    path = os.pathsep.join([str(Path(__file__).parents[2] / "src"), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
