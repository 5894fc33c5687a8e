"""`model.train_layers=last_N`: the last layers learn as they would among others, and nothing is kept or computed backward below them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.config import ConfigError, LoraSettings, ModelConfig
from lorica.kernels.layers import Layers, repeated_layers
from lorica.models import adapters
from lorica.models.freezing import Last, freeze

Lorica = Callable[..., tuple[int, str]]
KINDS = {
    "mistral": {"num_key_value_heads": 2, "sliding_window": None, "tie_word_embeddings": False},
    "tied": {"num_key_value_heads": 2, "sliding_window": None, "tie_word_embeddings": True},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "opt": {"dropout": 0.0, "ffn_dim": 48, "word_embed_proj_dim": 32},
}
AFTER = {  # what comes after the layers and learns with them
    "mistral": {"model.norm.weight", "lm_head.weight"},
    "tied": {"model.norm.weight"},
    "bert": {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"},
    "roberta": {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")},
    "gpt2": {"transformer.ln_f.weight", "transformer.ln_f.bias"},
    "opt": set(),  # its final norm is declared before the layers
}
IDS = torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(3))


def _settings(layers: str | None) -> ModelConfig:
    return ModelConfig(name="m", task="causal_lm", base="a base", train_layers=layers)


def _model(kind: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = CONFIG_MAPPING["mistral" if kind == "tied" else kind](**sizes, **KINDS[kind])
    torch.manual_seed(0)
    return (AutoModelForSequenceClassification if "bert" in kind else AutoModelForCausalLM).from_config(config).train()


def _loss(model: Any) -> torch.Tensor:
    logits = model(input_ids=IDS).logits
    return logits.float().logsumexp(-1).sum() - logits[..., 1].sum()


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    _loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _adapted(kind: str, layers: str | None, **settings: Any) -> Any:
    model = _model(kind)
    last = Last(model, _settings(layers)) if layers is not None else None
    torch.manual_seed(1)
    model = adapters.attach(model, LoraSettings(r=4, **settings), "sequence_classification" if "bert" in kind else "causal_lm", None, last)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


@contextmanager
def _counting(layers: list[Any]) -> Iterator[list[int]]:
    """Tensors that each layer keeps for backward."""
    kept, at = [0] * len(layers), [-1]

    def enter(number: int, *_: Any) -> None:
        at[0] = number

    def note(x: torch.Tensor) -> torch.Tensor:
        if at[0] >= 0:
            kept[at[0]] += 1
        return x

    hooks = []
    for i, layer in enumerate(layers):
        hooks += [layer.register_forward_pre_hook(functools.partial(enter, i)), layer.register_forward_hook(functools.partial(enter, -1))]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield kept
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_layers_and_what_comes_after_them_have_the_gradients_of_a_whole_model(kind: str) -> None:
    model = _model(kind)
    expected = _gradients(model)
    layers = repeated_layers(model)
    freeze(model, _settings("last_2"))
    with _counting(layers) as kept:
        ours = _gradients(model)
    in_last = {name for name, p in model.named_parameters() if any(p is q for layer in layers[2:] for q in layer.parameters())}
    assert ours.keys() == in_last | AFTER[kind]
    assert all(torch.equal(gradient, expected[name]) for name, gradient in ours.items())
    assert kept[:2] == [0, 0] and all(kept[2:])


@pytest.mark.parametrize("kind", ["mistral", "bert", "gpt2"])
def test_only_the_last_layers_have_adapters_and_nothing_flows_below(kind: str) -> None:
    targets = {"mistral": ["q_proj", "down_proj"], "bert": ["query", "output.dense"], "gpt2": None}[kind]
    model = _adapted(kind, "last_1", target_modules=targets)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" in name}
    assert trained and all(".3." in name for name in trained)
    with _counting(repeated_layers(model)) as kept:
        ours = _gradients(model)
    assert trained <= ours.keys() and kept[:3] == [0, 0, 0] and kept[3]


def test_all_linear_is_that_of_the_last_layers() -> None:
    for kind in ("mistral", "bert", "gpt2"):
        whole = _adapted(kind, None, target_modules="all-linear")
        model = _adapted(kind, "last_2", target_modules="all-linear")
        names = {name for name, p in model.named_parameters() if "lora_" in name}
        layers = [name for name, m in model.named_modules() if m in repeated_layers(model)][2:]
        assert names == {name for name, p in whole.named_parameters() if "lora_" in name and name.startswith(tuple(layers))}


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"], "all-linear"])
def test_the_adapter_is_found_again_by_plain_peft_and_by_lorica(targets: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    model = _adapted("mistral", "last_2", target_modules=targets).eval()
    adapters.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["layers_to_transform"] == [2, 3]
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        torch.testing.assert_close(PeftModel.from_pretrained(_model("mistral"), str(tmp_path)).eval()(input_ids=IDS).logits, expected)
        again = adapters.load(_model("mistral"), tmp_path).eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, expected)
        torch.testing.assert_close(again.merge_and_unload()(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_trained_head_is_saved_and_other_modules_below_or_in_layers_are_refused() -> None:
    model = _adapted("mistral", "last_2", target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad)
    for module, named in (("embed_tokens", r"model\.embed_tokens"), ("up_proj", r"model\.layers\.0\.mlp\.up_proj")):
        with pytest.raises(ConfigError, match=rf"modules_to_save={module}: {named} does not come after the layers"):
            _adapted("mistral", "last_2", target_modules=["q_proj"], modules_to_save=[module])


def test_layers_below_are_never_computed_again() -> None:
    model = _adapted("mistral", "last_2", target_modules=["q_proj", "down_proj"]).train()
    expected = _gradients(model)
    forwards = [0] * 4

    def counted(i: int, plain: Any, *args: Any, **kwargs: Any) -> Any:
        forwards[i] += 1
        return plain(*args, **kwargs)

    for i, layer in enumerate(repeated_layers(model)):
        layer.forward = functools.partial(counted, i, layer.forward)
    layers = Layers(model)
    assert len(layers) == 2
    for (layers.recomputed, layers.offload), times in {(0, False): [1, 1, 1, 1], (1, False): [1, 1, 2, 1], (2, True): [1, 1, 2, 2]}.items():
        forwards[:] = [0] * 4
        ours = _gradients(model)
        assert forwards == times
        assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


def test_where_no_layer_is_trained_all_are_counted() -> None:
    assert len(Layers(_adapted("mistral", None, target_modules=["lm_head"]))) == 4


@pytest.mark.slow
def test_compiled_layers_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    model = _adapted("mistral", "last_2", target_modules=["q_proj", "down_proj"]).train()
    expected = _gradients(model)
    layers = Layers(model)
    layers.compile()
    counters.clear()
    for layers.recomputed in (0, 1, 2):
        for name, gradient in _gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    assert not counters["graph_break"]
    torch._dynamo.reset()


def test_more_layers_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"model.train_layers=last_5: a base has 4 layers"):
        freeze(_model("bert"), _settings("last_5"))
    freeze(model := _model("bert"), _settings("last_4"))
    assert all(p.requires_grad for layer in repeated_layers(model) for p in layer.parameters())
    with pytest.raises(ConfigError, match="layers are not known"):
        Last(torch.nn.Sequential(torch.nn.Linear(4, 4)), _settings("last_1"))


@pytest.mark.slow
@pytest.mark.parametrize("how", [["model.lora.r=4"], ["model.lora=null", "model.quantization=null"]], ids=["4-bit LoRA", "whole"])
def test_a_run_with_its_last_layers_is_found_again(how: list[str], tiny_mistral: Path, tmp_path: Path, lorica: Lorica) -> None:
    run = tmp_path / "run"
    arguments = [
        "model=tiny_mistral_qlora",
        f"model.base={tiny_mistral}",
        "data=sentiment",
        "debug=fast",
        "model.train_layers=last_2",
        *how,
    ]
    code, printed = lorica("train", *arguments, f"run_dir={run}")
    assert code == 0, printed
    assert "of the last 2 layers and what comes after them" in next(run.glob("*/README.md")).read_text()
    row = json.loads((run / "predictions.jsonl").read_text().splitlines()[0])
    code, printed = lorica("predict", f"run={run}", f"text={row['text']}")
    assert code == 0 and printed.split()[0] == row["prediction"]
    if "model.lora=null" in how:
        from safetensors.torch import load_file

        base, model = (load_file(folder / "model.safetensors") for folder in (tiny_mistral, run / "model"))
        changed = {name for name in base if not torch.equal(base[name], model[name])}
        assert changed and all(".layers.2." in name or ".layers.3." in name or name == "model.norm.weight" for name in changed)
    else:
        assert lorica("merge", f"run={run}", "onto=dequantised")[0] == 0
