"""Shapes from configurations: the published numbers of weights, and those of transformers' own modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorica.composition import compose
from lorica.config import ConfigError, ModelConfig
from lorica.hub import TINY
from lorica.planning.known import KNOWN
from lorica.planning.shapes import find_shape, shape_of, targets


def causal(base: str = "m", **values: Any) -> ModelConfig:
    return ModelConfig(name="m", task="causal_lm", base=base, **values)


def classifier(base: str = "m") -> ModelConfig:
    return ModelConfig(name="m", task="sequence_classification", base=base)


# Of the models' pages on the hub; encoders with a head for four labels.
PUBLISHED = {
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
    "FacebookAI/roberta-base": 124_648_708,
    "google-bert/bert-base-uncased": 109_485_316,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_bases_have_their_published_number_of_weights(name: str) -> None:
    model = classifier(name) if "bert" in name else causal(name)
    assert find_shape(model, 4).weights == PUBLISHED[name]


SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 160, "vocab_size": 211}
KINDS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 2, "head_dim": 24},
    "llama": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "smollm3": {"num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0},
    "granite": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "bert": {"max_position_embeddings": 40},
    "roberta": {"max_position_embeddings": 42, "type_vocab_size": 1},
    "xlm-roberta": {"max_position_embeddings": 42, "type_vocab_size": 1},
    "camembert": {"max_position_embeddings": 42, "type_vocab_size": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_counted_architecture_has_the_weights_that_transformers_builds(kind: str) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

    encoder = kind in ("bert", "roberta", "xlm-roberta", "camembert")
    config = CONFIG_MAPPING[kind](**SMALL, **KINDS[kind])
    config.num_labels = 3
    with torch.device("meta"):
        built = (AutoModelForSequenceClassification if encoder else AutoModelForCausalLM).from_config(config)
    shape = shape_of(config.to_dict(), classifier() if encoder else causal(), 3 if encoder else 0)
    assert shape.exact
    assert shape.weights == sum(p.numel() for p in built.parameters())
    names = {name for name, m in built.named_modules() if isinstance(m, torch.nn.Linear)}
    assert all(any(name.endswith(one.name) for name in names) for one in shape.linears)


@pytest.mark.parametrize("kind", ["opt", "gpt2", "gpt_neox", "stablelm"])
def test_any_other_architecture_is_built_without_weights_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from lorica.planning import built

    monkeypatch.setenv("LORICA_CACHE", str(tmp_path))
    config = CONFIG_MAPPING[kind]().to_dict()
    shape = shape_of(config, causal(), 0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind]())
    assert not shape.exact and shape.weights == sum(p.numel() for p in model.parameters())
    assert {one.role for one in shape.linears} == {"queries", "mixed", "widening", "narrowing"}
    monkeypatch.delattr(built, "build")
    assert shape_of(config, causal(), 0) == shape


def test_the_tiny_mistral_is_the_one_that_is_built(tiny_mistral: Path) -> None:
    built = json.loads((tiny_mistral / "config.json").read_text())
    assert shape_of(KNOWN[TINY], causal(), 0) == shape_of(built, causal(), 0)


def test_what_can_not_be_had_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        find_shape(causal("someone/unheard-of"), 0)
    with pytest.raises(ConfigError, match="does not know its architecture, model_type=unheard_of"):
        shape_of({"model_type": "unheard_of"}, causal(), 0)
    with pytest.raises(ConfigError, match="lacks 'hidden_size'"):
        shape_of({"model_type": "mistral"}, causal(), 0)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="is damaged"):
        find_shape(causal(str(tmp_path)), 0)


@pytest.mark.parametrize("kind", ["mistral", "roberta"])
@pytest.mark.parametrize("name", [*SMALL, "max_position_embeddings", "pad_token_id", "head_dim", "num_key_value_heads"])
@pytest.mark.parametrize("value", [-4096, 10**40, "big", True, 256.5, float("nan"), {"a": 1}, [1]])
def test_a_number_that_can_not_be_one_is_refused(kind: str, name: str, value: Any) -> None:
    if (name == "pad_token_id" and kind == "mistral") or (name in ("head_dim", "num_key_value_heads") and kind == "roberta"):
        return  # that architecture has none
    if name == "max_position_embeddings" and kind == "mistral" and not isinstance(value, int):
        return  # a bound that is no number is none
    config = {"model_type": kind, "max_position_embeddings": 514, **SMALL, name: value}
    with pytest.raises(ConfigError, match=f"its config.json has {name}="):
        shape_of(config, classifier() if kind == "roberta" else causal(), 2)


def test_a_configuration_without_end_is_not_built() -> None:
    with pytest.raises(ConfigError, match="10,000,000 layers"):
        shape_of({"model_type": "gpt2", "n_layer": 10_000_000}, causal(), 0)


@pytest.mark.parametrize(
    ("written", "says"),
    [("[" * 100_000, "can't be read"), ('{"max_position_embeddings": 0}', "leaves 0 positions")],
)
def test_a_damaged_base_is_told_before_anything_is_loaded(written: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(written)
    with pytest.raises(ConfigError, match=says):
        compose("train", ["model=mistral_qlora", f"model.base={tmp_path}"])


def test_adapters_go_where_peft_puts_them() -> None:
    mistral, roberta = (
        shape_of(KNOWN["mistralai/Mistral-7B-v0.1"], causal(), 0),
        shape_of(KNOWN["FacebookAI/roberta-base"], classifier(), 2),
    )
    assert [one.name for one in targets(mistral, None)] == ["q_proj", "v_proj"]
    assert [one.name for one in targets(roberta, None)] == ["query", "value"]
    assert targets(mistral, "all-linear") == mistral.linears
    assert [one.name for one in targets(roberta, ["dense"])] == ["attention.output.dense", "intermediate.dense", "output.dense"]
