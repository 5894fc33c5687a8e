"""Weights that lie end to end are trained, saved and resumed bit for bit as single ones are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lorica.config import OptimizerConfig
from lorica.models import adapters
from lorica.models.optimizers import BLOCK, SMALL, build_optimizer, effective_name, end_to_end, state_bytes

NAMES = ["adamw", "adamw_8bit", "sgd"]
SIZES = [(64, 65), (64, 64), (3, 4111), (7,), (5000,), (63, 65), (4,), (16, 300)]  # some too small for 8 bits, some end within a block


class Weights(nn.Module):
    """Parameters of all sizes, of which one is frozen."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.all = nn.ParameterList([nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES])
        self.frozen = nn.Parameter(torch.ones(64, 64), requires_grad=False)

    def steps(self, optimizer: torch.optim.Optimizer, first: int, count: int) -> None:
        """Optimiser steps of two micro-steps each, with gradients through autograd."""
        for step in range(first, first + count):
            optimizer.zero_grad(set_to_none=False)
            generator = torch.Generator().manual_seed(step)
            for _ in range(2):
                factors = [torch.randn(p.shape, generator=generator) * (i + 1) for i, p in enumerate(self.all)]
                torch.stack([(p * f).sum() + (p * p).sum() for p, f in zip(self.all, factors, strict=True)]).sum().backward()
            optimizer.step()

    def values(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.all]


def build(module: nn.Module, name: str, joined: bool) -> torch.optim.Optimizer:
    config = OptimizerConfig(name=name, lr=0.02, weight_decay=0.1, betas=[0.9, 0.95])
    return build_optimizer(module, config, name, fused=True, joined=joined)


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_weights_end_to_end_become_the_weights_of_single_parameters(name: str) -> None:
    results = []
    for joined in (False, True):
        weights = Weights()
        before = weights.values()
        weights.steps(build(weights, name, joined), 0, 6)
        assert not any(torch.equal(a, b) for a, b in zip(before, weights.values(), strict=True))
        results.append(weights.values())
    assert same(*results)


def test_large_weights_of_a_type_become_one_parameter_and_small_ones_stay_alone() -> None:
    weights = Weights()
    weights.all.append(nn.Parameter(torch.ones(80, 80, dtype=torch.bfloat16)))
    given, before = list(weights.all), weights.values()
    long = end_to_end(given)
    small = [p for p in given if p.numel() < SMALL]
    assert [p.dtype for p in long] == [torch.bfloat16, torch.float32, *(p.dtype for p in small)]
    assert len(small) == 3 and all(a is b for a, b in zip(long[2:], small, strict=True))
    assert same(weights.values(), before) and [p.shape for p in given] == [p.shape for p in before]
    for p in given:
        if p.numel() >= SMALL:
            whole = next(w for w in long if w.dtype == p.dtype)
            assert whole.grad is not None and p.grad is not None
            for part, of in ((p.data, whole.data), (p.grad, whole.grad)):
                assert part.untyped_storage().data_ptr() == of.untyped_storage().data_ptr() and part.storage_offset() % BLOCK == 0
    rounded = [-(-p.numel() // BLOCK) * BLOCK for p in given if p.numel() >= SMALL and p.dtype == torch.float32]
    assert long[1].numel() == sum(rounded)


def test_what_autograd_adds_is_the_long_parameters_gradient_and_is_cleared_with_it() -> None:
    weights = Weights()
    optimizer = build(weights, "adamw", joined=True)
    places = [None if p.grad is None else p.grad.data_ptr() for p in weights.all]
    for _ in range(3):
        torch.stack([(p * 3).sum() for p in weights.all]).sum().backward()
    assert all(p.grad is not None and (p.grad == 9).all() for p in weights.all)
    assert all(at in (None, p.grad.data_ptr()) for at, p in zip(places, weights.all, strict=True))
    long = [p for group in optimizer.param_groups for p in group["params"] if p.numel() not in {q.numel() for q in weights.all}]
    assert sum(float(p.grad.sum()) for p in long) == 9 * sum(p.numel() for p in weights.all if p.numel() >= SMALL)
    optimizer.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in weights.all)


def test_biases_are_not_decayed_where_weights_are() -> None:
    for joined in (False, True):
        weights = Weights()
        before = weights.values()
        optimizer = build(weights, "adamw", joined)
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p, old in zip(weights.all, before, strict=True):
            torch.testing.assert_close(p.detach(), old * (1 - 0.02 * 0.1) if p.ndim > 1 else old)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_goes_on_from_its_state_ends_with_the_same_weights(name: str, tmp_path: Path) -> None:
    straight = Weights()
    straight.steps(build(straight, name, joined=True), 0, 6)

    begun = Weights()
    optimizer = build(begun, name, joined=True)
    begun.steps(optimizer, 0, 3)
    torch.save({"weights": begun.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = Weights(seed=5)
    optimizer = build(resumed, name, joined=True)
    resumed.load_state_dict(state["weights"])
    optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    resumed.steps(optimizer, 3, 3)
    assert same(resumed.values(), straight.values())


@pytest.fixture
def small_model(tiny_mistral: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_mistral)


def test_an_adapter_end_to_end_is_saved_with_its_own_bytes_alone(small_model: Any, tmp_path: Path) -> None:
    from lorica.config import LoraSettings

    torch.manual_seed(0)
    model = adapters.attach(small_model, LoraSettings(r=32, target_modules=["q_proj", "v_proj"]), "causal_lm", None)
    build(model, "adamw", joined=True)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len({p.untyped_storage().data_ptr() for p in trained.values()}) == 1
    adapters.save(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    saved = load_file(file)
    assert {name.replace(".default", "") for name in trained} == set(saved)
    assert all(torch.equal(saved[name.replace(".default", "")], p) for name, p in trained.items())
    assert file.stat().st_size < 4 * sum(p.numel() for p in trained.values()) + 8192


def test_a_whole_model_end_to_end_is_saved_as_it_is(small_model: Any, tmp_path: Path) -> None:
    before = {name: p.detach().clone() for name, p in small_model.named_parameters()}
    build(small_model, "adamw", joined=True)
    assert small_model.get_output_embeddings().weight is small_model.get_input_embeddings().weight
    small_model.save_pretrained(tmp_path)
    again = type(small_model).from_pretrained(tmp_path)
    assert {name for name, _ in again.named_parameters()} == set(before)
    assert all(torch.equal(p, before[name]) for name, p in again.named_parameters())
    total = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    assert total < 4 * sum(p.numel() for p in before.values()) + 16384


@pytest.mark.parametrize(
    ("asked", "device", "roomy", "runs"),
    [
        ("paged_adamw_8bit", "cuda", False, "paged_adamw_8bit"),
        ("paged_adamw_8bit", "cuda", True, "adamw_8bit"),
        ("adamw_8bit", "cuda", True, "adamw_8bit"),
        ("adamw", "cuda", True, "adamw"),
        ("sgd", "cpu", True, "sgd"),
        ("paged_adamw_8bit", "cpu", True, "adamw"),
        ("adamw_8bit", "mps", False, "adamw"),
    ],
)
def test_another_optimiser_than_asked_for_is_said_with_the_reason(asked: str, device: str, roomy: bool, runs: str) -> None:
    name, why = effective_name(asked, torch.device(device), roomy)
    assert name == runs and (why == "") == (name == asked)
    if why:
        assert f"optimizer.name={asked}" in why and runs in why


@pytest.mark.parametrize("name", NAMES)
def test_the_states_bytes_are_foretold(name: str) -> None:
    weights = Weights()
    optimizer = build(weights, name, joined=False)
    weights.steps(optimizer, 0, 1)
    moments = [v for s in optimizer.state.values() for k, v in s.items() if k in ("exp_avg", "exp_avg_sq", "state1", "state2")]
    kept = sum(v.numel() * v.element_size() for v in moments)
    small = sum(p.numel() for p in weights.all if p.numel() < SMALL) if name == "adamw_8bit" else 0
    assert kept - 6 * small == state_bytes(weights, name)
