"""The loss in tiles is the loss, its gradients are the gradients, and no tile is larger than it may be."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lorica.kernels import dropout, loss


def _heads() -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import LoraLayer

    torch.manual_seed(0)
    net = nn.Sequential()
    net.add_module("head", nn.Linear(16, 40, bias=False))
    adapted = get_peft_model(net, LoraConfig(r=4, target_modules=["head"], lora_dropout=0.0, init_lora_weights=False))
    dropping = copy.deepcopy(adapted).train()
    for module in dropping.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = nn.Dropout(0.4)
    seeds = dropout.seed_adapters(dropping, torch.device("cpu"))
    assert seeds is not None
    seeds.random_()
    kinds = {"plain": nn.Linear(16, 40), "adapted": adapted.base_model.model.head, "adapted, with dropout": dropping.base_model.model.head}
    assert not any(map(loss.draws, kinds.values()))
    return kinds


@pytest.mark.parametrize("kind", ["plain", "adapted", "adapted, with dropout"])
def test_tiles_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = _heads()[kind].double()
    hidden, targets = torch.randn(37, 16, dtype=torch.float64), torch.randint(0, 40, (37,))
    results = []
    for tile in (1 << 25, 40 * 5):
        monkeypatch.setattr(loss, "TILE_ELEMENTS", tile)
        head.zero_grad()
        x = hidden.clone().requires_grad_()
        losses = loss.head_cross_entropy(head, 40, x, targets)
        (losses * torch.arange(37)).sum().backward()
        assert x.grad is not None
        results.append([losses.detach(), x.grad, *(p.grad for p in head.parameters() if p.grad is not None)])
        with torch.no_grad():
            torch.testing.assert_close(loss.head_cross_entropy(head, 40, hidden, targets), losses.detach())
    for whole, tiled in zip(*results, strict=True):
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-5)


def test_no_tile_is_larger_than_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(loss, "TILE_ELEMENTS", 1000)

    def head(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.shape[0] * 100)
        return x @ torch.ones(8, 100)

    hidden, targets = torch.randn(95, 8, requires_grad=True), torch.randint(0, 100, (95,))
    loss.head_cross_entropy(head, 100, hidden, targets).sum().backward()
    assert max(sizes) <= 1000 and len(sizes) == 20  # each tile forward twice
    assert F.cross_entropy(head(hidden), targets).isfinite()
