"""Layers that are computed again in backward, with their inputs elsewhere meanwhile or compiled, have the gradients of plain ones."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from lorica.kernels import dropout, lora_linear
from lorica.kernels.layers import Layers
from lorica.kernels.loss import draws

SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
LENGTH = 12


def _mistral(**changes: Any) -> Any:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**{**SMALL, **changes}, num_key_value_heads=2, sliding_window=None))


def _with_lora(model: Any, p: float) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=p, init_lora_weights=False))
    lora_linear.install(model)
    return model


def _opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4, dropout=0.2))


MODELS = {
    "no dropout": lambda: _with_lora(_mistral(), 0.0),
    "dropout of adapters": lambda: _with_lora(_mistral(), 0.3),
    "dropout of attention": lambda: _mistral(attention_dropout=0.3),
    "dropout without a module": _opt,
}


def _ids(seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 64, (3, LENGTH), generator=torch.Generator().manual_seed(seed))


def _gradients(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """After two micro-steps, so that random numbers of the second follow those of the first."""
    model.zero_grad()
    torch.manual_seed(11)
    for _ in range(2):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", MODELS)
def test_layers_computed_again_have_the_same_gradients(kind: str) -> None:
    model = MODELS[kind]().train()
    dropout.install(model)
    expected = _gradients(model, _ids())
    layers = Layers(model)
    assert len(layers) == 4
    for layers.recomputed, layers.offload in [(0, False), (1, False), (3, True), (4, False), (4, True)]:
        ours = _gradients(model, _ids())
        assert len(ours) == len(expected) > 8
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True)), (layers.recomputed, layers.offload)


def test_layers_whose_dropout_is_seeded_draw_nothing_and_have_the_same_gradients() -> None:
    """Of each micro-step anew."""
    model = MODELS["dropout of adapters"]().train()
    layers = Layers(model)
    layers.seed_dropout(model, torch.device("cpu"))
    assert not layers.random
    expected = _gradients(model, _ids())
    for layers.recomputed, layers.offload in [(2, False), (4, True)]:
        assert all(map(torch.equal, _gradients(model, _ids()), expected))
    logits = [model(input_ids=_ids()).logits for _ in range(2)]
    assert not torch.equal(*logits)
    assert model.peft_config["default"].lora_dropout == 0.3


@pytest.mark.parametrize("kind", MODELS)
def test_whether_layers_draw_random_numbers_is_known(kind: str) -> None:
    assert Layers(MODELS[kind]()).random == draws(MODELS[kind]()) == (kind != "no dropout")


def test_only_the_first_layers_are_computed_again() -> None:
    layers = Layers(model := _mistral().train())
    forwards = [0] * 4
    for i, plain in enumerate(layers._plain):

        def counted(*args: Any, i: int = i, plain: Any = plain, **kwargs: Any) -> Any:
            forwards[i] += 1
            return plain(*args, **kwargs)

        layers._plain[i] = counted
    layers.recomputed = 3
    model(input_ids=_ids(), labels=_ids(), use_cache=False).loss.backward()
    assert forwards == [2, 2, 2, 1]


def test_evaluation_runs_the_plain_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _mistral(attention_dropout=0.3)
    layers = Layers(model)
    layers.recomputed = 4

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a layer in evaluation is compiled or computed again")

    monkeypatch.setattr(torch, "compile", lambda forward, **options: never)
    layers.compile()
    monkeypatch.setattr("lorica.kernels.layers.checkpoint", never)
    with torch.no_grad():
        model.train()(input_ids=_ids())
        once = model.eval()(input_ids=_ids()).logits
    assert torch.equal(model(input_ids=_ids()).logits, once)
    with pytest.raises(AssertionError, match="in evaluation"):
        model.train()(input_ids=_ids())


def test_an_unknown_architecture_has_no_layers() -> None:
    layers = Layers(net := torch.nn.Sequential(torch.nn.Linear(4, 4)))
    assert len(layers) == 0 and not layers.random
    assert net(torch.ones(4)).shape == (4,)


@pytest.mark.slow
def test_compiled_layers_share_two_graphs_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first layer's input has no gradient; all others are one graph. Batches of a size that was met compile nothing."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    model = _with_lora(_mistral(num_hidden_layers=3), 0.0).train()
    expected = _gradients(model, _ids())
    layers = Layers(model)
    layers.compile()
    counters.clear()
    met = []
    for ids in (_ids(), _ids(4), _ids()[:, :7], _ids(5)[:, :7], _ids()):
        ours = _gradients(model, ids)
        met.append(counters["stats"]["unique_graphs"])
    assert met == [2, 2, 4, 4, 4] and not counters["graph_break"]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    for layers.recomputed, layers.offload in [(2, False), (3, True)]:
        for a, b in zip(_gradients(model, _ids()), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert counters["stats"]["unique_graphs"] == 6, "layers that are computed again are two graphs more"
    layers.compile(False)
    assert all(torch.equal(a, b) for a, b in zip(_gradients(model, _ids()), expected, strict=True))
    torch._dynamo.reset()
