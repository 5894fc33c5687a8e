"""The fused LoRA forward equals PEFT's own, gradients included; what it does not cover goes through PEFT's."""

import functools
from typing import Any

import pytest
import torch

from lorica.config import LoraSettings
from lorica.kernels import dropout, lora_linear
from lorica.models import adapters


class _Net(torch.nn.Module):
    """Two linear layers, plain or in 4 bits as transformers would leave them."""

    def __init__(self, bias: bool, four_bit: bool = True) -> None:
        super().__init__()
        from bitsandbytes.nn import Linear4bit

        torch.manual_seed(0)
        linear: Any = torch.nn.Linear
        if four_bit:
            linear = functools.partial(Linear4bit, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True)
        self.up, self.down = linear(64, 128, bias=bias), linear(128, 64, bias=bias)
        self.to("cpu")
        self.is_loaded_in_4bit = four_bit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


def _pair(bias: bool = False, four_bit: bool = True, **settings: Any) -> tuple[Any, Any]:
    """The same adapted net twice: PEFT's forwards, and ours."""
    from peft import LoraConfig, get_peft_model

    nets = []
    for _ in range(2):
        torch.manual_seed(1)
        base = _Net(bias, four_bit)
        net = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["up", "down"], **settings))
        torch.manual_seed(2)
        for name, p in net.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.2)
        nets.append(net)
    assert lora_linear.install(nets[1]) == 2
    return nets[0], nets[1]


def _run(net: Any, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = net(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    assert x.grad is not None
    return y.detach(), {"x": x.grad, **{n: p.grad for n, p in net.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_bias": True}])
def test_outputs_and_gradients_equal_pefts(bias: bool, four_bit: bool, settings: dict[str, Any]) -> None:
    plain, fast = _pair(bias, four_bit, **settings)
    x = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(4))
    (y0, g0), (y1, g1) = _run(plain, x), _run(fast, x)
    assert torch.allclose(y0, y1, atol=1e-5)
    assert g0.keys() == g1.keys() and len(g0) >= 5
    for name in g0:
        assert (g0[name] - g1[name]).norm() <= 1e-5 * g0[name].norm(), name


def test_dropout_acts_on_the_adapter_only() -> None:
    _, fast = _pair(lora_dropout=0.5)
    x = torch.randn(5, 64)
    fast.train()
    torch.manual_seed(0)
    a = fast(x)
    torch.manual_seed(1)
    b = fast(x)
    assert not torch.allclose(a, b)
    with fast.disable_adapter():
        base = fast(x)
    fast.eval()
    many = torch.stack([fast.train()(x) for _ in range(600)]).mean(0)
    assert (many - fast.eval()(x)).norm() < 0.2 * (fast(x) - base).norm() + 0.1 * base.norm()


@pytest.mark.parametrize("four_bit", [False, True])
def test_dropout_that_follows_from_a_seed_is_the_one_that_peft_would_apply(four_bit: bool) -> None:
    nets = _pair(four_bit=four_bit, lora_dropout=0.5)
    results = []
    for net in nets:
        net.train()
        seeds = dropout.seed_adapters(net, torch.device("cpu"))
        assert seeds is not None
        seeds.random_(generator=torch.Generator().manual_seed(3))
        results.append(_run(net, torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(4))))
    (y0, g0), (y1, g1) = results
    assert torch.allclose(y0, y1, atol=1e-5)
    for name in g0:
        assert (g0[name] - g1[name]).norm() <= 1e-5 * g0[name].norm(), name


def test_disabled_adapters_give_the_base() -> None:
    plain, fast = _pair()
    x = torch.randn(5, 64)
    with plain.disable_adapter(), fast.disable_adapter():
        assert torch.allclose(plain(x), fast(x), atol=1e-6)


def test_under_autocast_the_output_has_the_autocast_type() -> None:
    plain, fast = _pair()
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        a, b = plain(x), fast(x)
    assert b.dtype == torch.bfloat16
    assert (a.float() - b.float()).norm() < 2e-2 * a.float().norm()


def test_attach_installs_it() -> None:
    adapted = adapters.attach(_with_config(_Net(False)), LoraSettings(r=4, target_modules=["up", "down"]), "causal_lm", None)
    layer = next(m for n, m in adapted.named_modules() if n.endswith("up") and hasattr(m, "lora_A"))
    assert isinstance(layer, lora_linear._Forward)


def _with_config(net: Any) -> Any:
    from transformers import PretrainedConfig

    net.config = PretrainedConfig()
    net.prepare_inputs_for_generation = lambda *a, **k: {}
    return net
