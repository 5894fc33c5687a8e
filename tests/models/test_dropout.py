"""Masks drawn by our own generator drop at the asked rate, follow torch's seed, and leave attention what it was otherwise."""

import time

import pytest
import torch
from torch import nn

from lorica.kernels import attention, dropout


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_rate_and_the_mean_are_right(p: float) -> None:
    torch.manual_seed(0)
    n = 400_000
    drawn = dropout.mask(torch.empty(n), p)
    dropped = (drawn == 0).float().mean().item()
    assert abs(dropped - p) < 5 * (p * (1 - p) / n) ** 0.5 + 1e-5
    assert drawn.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-3)
    neighbours = (drawn[1:] == 0) & (drawn[:-1] == 0)
    assert neighbours.float().mean().item() == pytest.approx(p * p, abs=0.003)


def test_torchs_seed_decides() -> None:
    def draw() -> list[torch.Tensor]:
        torch.manual_seed(7)
        return [dropout.mask(torch.empty(3, 5, 7), 0.3) for _ in range(2)]

    first, again = draw(), draw()
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])


def test_all_or_nothing() -> None:
    assert dropout.mask(torch.empty(10), 1.0).sum() == 0
    net = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.0))
    assert dropout.install(net) == 2
    x = torch.randn(8, 8)
    assert torch.equal(net.eval()(x), x)
    assert (net.train()(x) == 0).any()


def test_a_checkpointed_layer_draws_the_same_again() -> None:
    from torch.utils.checkpoint import checkpoint

    net = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 1))
    dropout.install(net)
    gradients = []
    for again in (False, True):
        net.zero_grad()
        torch.manual_seed(3)
        x = torch.ones(32, 16)
        y = checkpoint(net, x, use_reentrant=False) if again else net(x)
        y.sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_dense_attention_is_torchs_but_for_the_masks(causal: bool, masked: bool, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Module()
    module.is_causal = causal  # type: ignore[assignment]
    module.num_key_value_groups = 4 // kv_heads  # type: ignore[assignment]
    torch.manual_seed(0)
    q = torch.randn(2, 4, 6, 8, requires_grad=True)
    k, v = torch.randn(2, kv_heads, 6, 8), torch.randn(2, kv_heads, 6, 8)
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    mask[1, :, :, 4:] = False
    if causal:
        mask &= torch.ones(6, 6, dtype=torch.bool).tril()
    given = mask if masked else None
    expected, _ = attention.dense_attention(module, q, k, v, given)
    monkeypatch.setattr(dropout, "mask", lambda x, p: torch.ones_like(x))
    ours, _ = attention.dense_attention(module, q, k, v, given, dropout=0.1)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    seen = [torch.autograd.grad(x.square().sum(), q)[0] for x in (ours, expected)]
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-5)


def _seed(number: int = 0) -> torch.Tensor:
    return torch.empty(2, dtype=torch.int32).random_(generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_masks_that_follow_from_a_seed_are_as_good_as_drawn_ones(p: float) -> None:
    n, error = 400_000, 5 * (p * p * (1 - p * p) / 400_000) ** 0.5
    dropped, others = (~dropout.kept(torch.empty(400, n // 400), _seed(i), p) for i in (0, 1))
    assert abs(dropped.float().mean().item() - p) < 5 * (p * (1 - p) / n) ** 0.5
    for both in (dropped[:, 1:] & dropped[:, :-1], dropped[1:] & dropped[:-1], dropped & others):
        assert abs(both.float().mean().item() - p * p) < error


def test_a_tile_has_the_mask_of_its_place() -> None:
    x = torch.ones(6, 10)
    whole = dropout.kept(x, _seed(), 0.5)
    assert torch.equal(dropout.kept(x[4:], _seed(), 0.5, start=40), whole[4:])
    net = nn.Sequential(dropout.Seeded(0.5, _seed()))
    dropout.begin_at(net, 40)
    assert torch.equal(net(torch.ones(2, 10)) > 0, whole[4:])
    assert torch.equal(net.eval()(x), x)


def test_the_gradient_goes_through_the_same_mask() -> None:
    x = torch.randn(37, 24, requires_grad=True)
    out = dropout.seeded(x, _seed(), 0.3)
    keep = dropout.kept(x, _seed(), 0.3)
    torch.testing.assert_close(out, torch.where(keep, x / 0.7, 0))
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], keep / 0.7)


@pytest.mark.slow
def test_a_layer_with_masks_that_follow_from_a_seed_is_compiled_as_soon_as_one_without() -> None:
    """A hash that a compiler writes out, of all seven adapters of a layer, took it minutes."""
    from peft import LoraConfig, get_peft_model
    from transformers import MistralConfig, MistralForCausalLM

    from lorica.kernels import lora_linear
    from lorica.kernels.layers import Layers

    def seconds(p: float) -> float:
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
        net = get_peft_model(
            MistralForCausalLM(MistralConfig(vocab_size=50, **shape)),
            LoraConfig(r=4, lora_dropout=p, target_modules="all-linear", init_lora_weights=False),
        )
        lora_linear.install(net)
        layers = Layers(net)
        layers.seed_dropout(net, torch.device("cpu"))
        ids = torch.arange(40).view(1, -1)
        seen = []
        for compiled in (False, True):
            torch.manual_seed(1)
            layers.compile(compiled)
            layers.recomputed = 1
            begun = time.perf_counter()
            loss = net(input_ids=ids, labels=ids).loss
            loss.backward()
            seen.append((loss.detach(), *(w.grad.clone() for w in net.parameters() if w.grad is not None)))
            net.zero_grad()
        torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)
        torch.compiler.reset()
        return time.perf_counter() - begun

    first = seconds(0.0)
    assert seconds(0.1) < 2 * first + 10
