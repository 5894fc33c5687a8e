"""A compiled layer makes its 4-bit weights plain in forward and again in backward, unless they are kept plain."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorica.kernels import frozen, layers, lora_linear, nf4


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the kernel's operation run on the CPU, by plain operations; its calls are counted."""
    calls: list[int] = []

    def plain(codes: Any, scales: Any, table: Any, table2: Any, scales2: Any, offset: Any, *sizes: Any) -> torch.Tensor:
        blocksize, blocksize2, rows, columns, dtype, use = (*sizes, 0)[:6]
        calls.append(use)
        of_block = table2[scales.long()] * scales2.repeat_interleave(blocksize2)[: scales.numel()] + offset
        pairs = torch.stack([table[codes.flatten().long() >> 4], table[codes.flatten().long() & 15]], 1).flatten()
        return (pairs * of_block.repeat_interleave(blocksize)[: pairs.numel()]).view(rows, columns).to(dtype)

    nf4.dequantize_nf4.register_kernel("cpu")(plain)
    monkeypatch.setattr(nf4, "covers", lambda weight, state: weight.dtype == torch.uint8 and bool(state.nested))
    return calls


@pytest.mark.slow
def test_weights_are_made_plain_twice_or_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, inject_adapter_in_model

    calls = _counted(monkeypatch)
    torch.manual_seed(0)
    net: Any = nn.Sequential(Linear4bit(64, 96, bias=False, quant_type="nf4"), nn.SiLU(), Linear4bit(96, 64, bias=False, quant_type="nf4"))
    net = inject_adapter_in_model(LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False), net.to("cpu")).train()
    assert lora_linear.install(net) == 2
    x = torch.randn(32, 64, requires_grad=True)
    net(x).square().sum().backward()
    expected = [x.grad, *(p.grad for p in net.parameters() if p.requires_grad)]
    kept, recomputed = (torch.compile(f, dynamic=False, fullgraph=True) for f in (layers._forward, layers._forward_recomputed))
    for forward, resident, uses in ((kept, False, [0, 0, 1, 1]), (kept, True, []), (recomputed, False, [0, 0, 0, 1, 1])):
        frozen.release(net)
        frozen.prepare_layers(net, torch.float32, fp8=False, resident=resident)
        net.zero_grad()
        x.grad = None
        calls.clear()
        with torch._functorch.config.patch(activation_memory_budget=0.0 if forward is recomputed else 1.0):
            forward(net, x).square().sum().backward()
        assert sorted(calls) == uses, "the last product is not computed again"
        for ours, theirs in zip([x.grad, *(p.grad for p in net.parameters() if p.requires_grad)], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
