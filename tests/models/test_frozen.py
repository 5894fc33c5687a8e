"""Frozen 4-bit layers without an adapter: in training they give what bitsandbytes' own forward gives, in the arithmetic's type."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorica.kernels import frozen


def four_bit(bias: bool) -> Any:
    """A linear layer 64 -> 96 in 4 bits."""
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(64, 96, bias=bias, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True).to("cpu")
    return layer.requires_grad_(False)


def ran(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(its result, the gradient of its input)."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("bias", [False, True])
def test_it_gives_what_bitsandbytes_gives(bias: bool, compiled: bool) -> None:
    plain, fast = four_bit(bias), torch.nn.Sequential(four_bit(bias))
    assert frozen.install(fast) == 1 and frozen.install(fast) == 0
    fast.train()
    run = torch.compile(fast, dynamic=False) if compiled else fast
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(1))
    for own, theirs in zip(ran(run, x), ran(plain, x), strict=True):
        assert torch.allclose(own, theirs, atol=1e-5)


def test_under_autocast_it_hands_on_the_arithmetics_type() -> None:
    fast = torch.nn.Sequential(four_bit(True))
    frozen.install(fast)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        in_training, otherwise = fast.train()(x), fast.eval()(x)
    assert in_training.dtype == torch.bfloat16
    assert otherwise.dtype == torch.float32  # bitsandbytes' own
    assert torch.allclose(in_training.float(), otherwise, atol=0.05)


def test_only_layers_without_adapters_are_covered() -> None:
    from bitsandbytes.nn import Linear4bit
    from peft import LoraConfig, get_peft_model

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.other, self.head = four_bit(False), four_bit(False), torch.nn.Linear(96, 2)
            self.is_loaded_in_4bit = True

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.up(x) + self.other(x))

    net: Any = get_peft_model(Net(), LoraConfig(r=4, target_modules=["up"]))  # type: ignore[arg-type]
    assert frozen.install(net) == 1
    inner = net.base_model.model
    assert type(inner.up.base_layer) is Linear4bit and type(inner.other) is not Linear4bit and isinstance(inner.other, Linear4bit)
    assert type(inner.head) is torch.nn.Linear
