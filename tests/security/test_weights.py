"""Hostile adapters and bases: what their files name is neither run nor opened outside their folder; each ends in one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.config import ConfigError, LoraSettings, ModelConfig
from lorica.models import adapters, base
from lorica.models.trained import load_trained

CPU = torch.device("cpu")
Pickler = Callable[[Path], None]


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory, tiny_mistral: Path) -> Path:
    """A sound adapter's folder, as a run leaves it."""
    folder = tmp_path_factory.mktemp("sound") / "adapter"
    settings = ModelConfig(name="m", task="causal_lm", base=str(tiny_mistral))
    found = base.find_base(settings.base, None)
    config, tokenizer = base.load_config(found, settings), base.load_tokenizer(found)
    model = base.load_model(found, settings, config, tokenizer, device=CPU, dtype=torch.float32, labels=None, attn="sdpa")
    adapters.save(adapters.attach(model, LoraSettings(r=2, target_modules=["q_proj"]), "causal_lm", None), folder)
    tokenizer.save_pretrained(folder)
    task = {"task": "causal_lm", "base": str(tiny_mistral), "revision": None, "labels": None, "max_length": 64, "dtype": "float32"}
    (folder / "lorica.json").write_text(json.dumps(task))
    return folder


def edit(folder: Path, name: str, **values: Any) -> None:
    file = folder / name
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, **values}))


ADAPTERS: dict[str, tuple[str, dict[str, Any], str]] = {
    # name -> file, what it says, what the error says ("": loaded, harmlessly)
    "megatron": ("adapter_config.json", {"megatron_config": {"a": 1}, "megatron_core": "evil"}, "has megatron_config"),
    "megatron by its module only": ("adapter_config.json", {"megatron_core": "evil"}, ""),
    "auto mapping": ("adapter_config.json", {"auto_mapping": {"base_model_class": "run", "parent_library": "evil"}}, ""),
    "pickled covariance": ("adapter_config.json", {"corda_config": {"covariance_file": "c.pt"}}, "has corda_config"),
    "pickled cache": ("adapter_config.json", {"lora_ga_config": {"cache_file": "c.pt"}}, "has lora_ga_config"),
    "eva": ("adapter_config.json", {"eva_config": {"rho": 2.0}}, "has eva_config"),
    "loftq": ("adapter_config.json", {"loftq_config": {"loftq_bits": 4}}, "has loftq_config"),
    "layers repeated without end": ("adapter_config.json", {"layer_replication": [[0, 4]] * 10_000}, "has layer_replication"),
    "prompt tuning with a tokenizer": (
        "adapter_config.json",
        {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}},
        "has peft_type=",
    ),
    "kind nobody knows": ("adapter_config.json", {"peft_type": "evil"}, "has peft_type="),
    "no kind": ("adapter_config.json", {"peft_type": None}, "has no peft_type"),
    "rank of a billion": ("adapter_config.json", {"r": 10**9}, "has r="),
    "rank of a text": ("adapter_config.json", {"r": "8; import evil"}, "has r="),
    "pattern that never ends": ("adapter_config.json", {"target_modules": "(a|a|.)*(a|a|.)*(a|a|.)*$"}, "has target_modules="),
    "pattern as a rank": ("adapter_config.json", {"rank_pattern": {"(.*)*(.*)*$": 4}}, "has rank_pattern="),
    "pattern of layers": ("adapter_config.json", {"layers_pattern": "(.*)*(.*)*$", "layers_to_transform": [1]}, "has layers_pattern="),
    "layers without end": ("adapter_config.json", {"layers_to_transform": list(range(1 << 15))}, "has layers_to_transform="),
    "layers that are texts": ("adapter_config.json", {"layers_to_transform": ["(.*)*$"]}, "has layers_to_transform="),
    "modules that are objects": ("adapter_config.json", {"modules_to_save": [{"_target_": "evil.run"}]}, "has modules_to_save="),
    "python's format": ("adapter_config.json", {"base_model_name_or_path": "{0.__class__}"}, ""),
    "dtype that is a function": ("lorica.json", {"dtype": "load"}, "has dtype="),
    "dtype that is a module": ("lorica.json", {"dtype": "hub"}, "has dtype="),
    "task nobody knows": ("lorica.json", {"task": "evil.run"}, "has task="),
    "labels that are objects": ("lorica.json", {"labels": [{}, {}]}, "has labels="),
    "quantization with more keys": ("lorica.json", {"quantization": {"load_in_4bit": True, "llm_int8": 1}}, "has quantization="),
    "quantization by a function": ("lorica.json", {"quantization": {"bnb_4bit_compute_dtype": "load"}}, "has quantization="),
    "length beyond memory": ("lorica.json", {"max_length": 10**15}, "has max_length="),
    "wording that is none": ("lorica.json", {"kind": "instruction", "prompt_template": 3}, "has prompt_template="),
    "base that is not there": ("lorica.json", {"base": "/nowhere/evil"}, "not there any more"),
    "tokenizer's code": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["tokenization_evil.T", "tokenization_evil.T"]}}, ""),
    "tokenizer's class": ("tokenizer_config.json", {"tokenizer_class": "evil.run"}, ""),
    "tokenizer that is no object": ("tokenizer.json", {"model": {"type": "evil"}}, "its tokenizer can't be read"),
}


@pytest.mark.parametrize(("name", "values", "says"), ADAPTERS.values(), ids=ADAPTERS)
def test_hostile_adapters(name: str, values: dict[str, Any], says: str, work: Path, adapter: Path, torch_pickled: Pickler) -> None:
    shutil.copytree(adapter, work / "adapter")
    edit(work / "adapter", name, **values)
    (work / "adapter" / "tokenization_evil.py").write_text("import evil\nclass T: pass\n")
    torch_pickled(work / "adapter" / "c.pt")
    if says:
        with pytest.raises(ConfigError, match=says) as refused:
            load_trained(work / "adapter", CPU)
        assert len(str(refused.value).splitlines()) <= 3
    else:
        assert load_trained(work / "adapter", CPU).model is not None


BYTES: dict[str, tuple[str, bytes, str]] = {
    "configuration that is no JSON": ("adapter_config.json", b"!!python/name:evil.run", "is damaged"),
    "configuration that is a list": ("adapter_config.json", b"[1]", "is damaged: it holds a list"),
    "configuration that is deep": ("adapter_config.json", b"[" * 200_000, "is damaged"),
    "task file that is deep": ("lorica.json", b'{"a":' * 200_000, "is damaged"),
    "task file that is a text": ("lorica.json", b'"evil"', "is damaged: it holds a str"),
    "task file that is no text": ("lorica.json", b"\xff\xfe\0", "is damaged"),
    "huge configuration": ("adapter_config.json", b" " * (17 << 20), "has more than"),
    "weights cut off": ("adapter_model.safetensors", b"\x10\0\0\0\0\0\0\0{}", "does not fit the base"),
    "weights whose header is endless": ("adapter_model.safetensors", b"\xff" * 16, "does not fit the base"),
    "weights of no bytes": ("adapter_model.safetensors", b"", "does not fit the base"),
    "tokenizer of no bytes": ("tokenizer.json", b"", "its tokenizer can't be read"),
}


@pytest.mark.parametrize(("name", "content", "says"), BYTES.values(), ids=BYTES)
def test_hostile_bytes_of_an_adapter(name: str, content: bytes, says: str, work: Path, adapter: Path) -> None:
    shutil.copytree(adapter, work / "adapter")
    (work / "adapter" / name).write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load_trained(work / "adapter", CPU)


def test_a_hostile_adapter_with_pickled_weights_only_is_refused(work: Path, adapter: Path, torch_pickled: Pickler) -> None:
    shutil.copytree(adapter, work / "adapter")
    (work / "adapter" / "adapter_model.safetensors").unlink()
    torch_pickled(work / "adapter" / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"adapter_model\.bin is refused, it can hold code"):
        load_trained(work / "adapter", CPU)


def test_a_hostile_pickle_called_safetensors_is_not_read_as_one(work: Path, adapter: Path, torch_pickled: Pickler) -> None:
    shutil.copytree(adapter, work / "adapter")
    torch_pickled(work / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match="does not fit the base"):
        load_trained(work / "adapter", CPU)


BASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "code for a new architecture": (
        "config.json",
        {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}},
        "can't read its configuration",
    ),
    "code for a known architecture": (
        "config.json",
        {"auto_map": {"AutoConfig": "configuration_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}},
        "",
    ),
    "code of another repository": ("config.json", {"auto_map": {"AutoModelForCausalLM": "someone/evil--modeling_evil.M"}}, ""),
    "sizes below nothing": ("config.json", {"hidden_size": -1}, "can't"),
    "sizes that are texts": ("config.json", {"num_attention_heads": "evil.run"}, "can't"),
    "quantisation nobody knows": ("config.json", {"quantization_config": {"quant_method": "evil"}}, ""),
    "shard outside": (
        "model.safetensors.index.json",
        {"weight_map": {"a": "../../outside.safetensors"}},
        "no safetensors file of this folder",
    ),
    "shard by its whole path": ("model.safetensors.index.json", {"weight_map": {"a": "/etc/passwd"}}, "no safetensors file of this folder"),
    "pickled shard": ("model.safetensors.index.json", {"weight_map": {"a": "pytorch_model.bin"}}, "no safetensors file of this folder"),
    "shards that are a list": ("model.safetensors.index.json", {"weight_map": ["x"]}, "has no weight_map"),
}


@pytest.mark.parametrize(("name", "values", "says"), BASES.values(), ids=BASES)
def test_hostile_bases(name: str, values: dict[str, Any], says: str, work: Path, tiny_mistral: Path, torch_pickled: Pickler) -> None:
    folder = work / "base"
    shutil.copytree(tiny_mistral, folder)
    for module in ("configuration_evil", "modeling_evil"):
        (folder / f"{module}.py").write_text("import evil\nclass C: pass\nclass M: pass\n")
    torch_pickled(folder / "pytorch_model.bin")
    edit(folder, name, **values)
    if says:
        with pytest.raises(ConfigError, match=says):
            _load_base(folder)
    else:
        _load_base(folder)


def test_a_hostile_base_with_pickled_weights_only_is_refused(work: Path, tiny_mistral: Path, torch_pickled: Pickler) -> None:
    shutil.copytree(tiny_mistral, work / "base")
    (work / "base" / "model.safetensors").unlink()
    torch_pickled(work / "base" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"can't be loaded.*safetensors"):
        _load_base(work / "base")


def _load_base(folder: Path) -> None:
    settings = ModelConfig(name="m", task="causal_lm", base=str(folder), max_length=64)
    found = base.find_base(settings.base, None)
    config, tokenizer = base.load_config(found, settings), base.load_tokenizer(found)
    base.load_model(found, settings, config, tokenizer, device=CPU, dtype=torch.float32, labels=None, attn="sdpa")


def test_a_hostile_adapter_ends_the_command_in_one_line(work: Path, adapter: Path, lorica: Callable[..., tuple[int, str]]) -> None:
    shutil.copytree(adapter, work / "adapter")
    edit(work / "adapter", "adapter_config.json", megatron_config={"a": 1}, megatron_core="evil")
    for verb, more in (("predict", ["text=hello"]), ("merge", ["output=merged"])):
        code, printed = lorica(verb, "run=adapter", *more)
        assert code == 2 and "has megatron_config" in printed and "Traceback" not in printed
    assert not (work / "merged").exists()
