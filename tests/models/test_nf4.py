"""The NF4 kernel's arithmetic, run by Triton's interpreter on the CPU, is bitsandbytes' (tests/gpu has it on the device)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from lorica.kernels.nf4 import dequantize_nf4_e4m3, dequantize_nf4

for kind in ("nf4", "fp4"):
    for shape in ((128, 256), (33, 192), (7, 640)):
        weight = torch.randn(*shape, dtype=torch.bfloat16) * 0.02
        codes, s = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type=kind)
        inner = s.state2
        layout = (codes, s.absmax, s.code, inner.code, inner.absmax, s.offset, s.blocksize, inner.blocksize, *s.shape)
        ours = dequantize_nf4(*layout, torch.float32).to(torch.bfloat16)  # the interpreter cuts bf16 where the device rounds
        plain = dequantize_4bit(codes, s)
        assert torch.equal(ours, plain), (kind, shape)
        exact = dequantize_nf4(*layout, torch.float32)
        for transposed in (False, True):
            wanted = exact.t() if transposed else exact
            divisors = wanted.abs().amax(1, keepdim=True) / 448
            e4m3 = dequantize_nf4_e4m3(*layout[:6], divisors, *layout[6:], transposed).float() * divisors
            assert (e4m3 - wanted).norm() < 0.1 * wanted.norm(), (kind, shape, transposed)  # 0.03 on the device, which rounds
print("equal")
"""


def test_the_kernel_is_exact() -> None:
    pytest.importorskip("triton", reason="torch's CPU builds come without Triton")
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2] / "src"), *sys.path]),
    }
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
