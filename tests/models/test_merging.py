"""A merge that goes through the base's files tensor by tensor gives what the adapter gives, and holds one tensor at a time."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.config import LoraSettings, ModelConfig, QuantizationSettings
from lorica.models import adapters, base, merging
from lorica.models.trained import load_trained, open_trained

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 5, 9, 200, 31, 77, 1023, 8]])


def _quiet(done: int, total: int) -> None:
    pass


def _adapter(folder: Path, home: Path, settings: LoraSettings, task: str = "causal_lm", four_bit: bool = False, noise: float = 0.1) -> Path:
    """An adapter of random weights on the base in `home`, with lorica.json."""
    model = ModelConfig(name="m", task=task, base=str(home), lora=settings)
    found = base.find_base(str(home), None)
    config, tokenizer = base.load_config(found, model), base.load_tokenizer(found)
    labels = ["a", "b", "c"] if task == "sequence_classification" else None
    quantization = QuantizationSettings() if four_bit else None
    loaded = base.load_model(
        found, model, config, tokenizer, device=CPU, dtype=torch.float32, labels=labels, attn="sdpa", quantization=quantization
    )
    torch.manual_seed(1)
    adapted = adapters.attach(loaded, settings, task, None)
    for name, p in adapted.named_parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, mean=1.0 if "magnitude" in name else 0.0, std=noise)
    adapters.save(adapted, folder)
    tokenizer.save_pretrained(folder)
    task_file = {"task": task, "base": str(home), "labels": labels, "max_length": 64, "dtype": "float32"}
    task_file["quantization"] = (
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} if four_bit else None
    )
    (folder / "lorica.json").write_text(json.dumps(task_file))
    return folder


def _written(adapter: Path, folder: Path, original: bool = False) -> Any:
    """The merged model as transformers loads it."""
    opened = open_trained(adapter)
    plan = merging.plan(opened)
    assert plan is not None
    folder.mkdir()
    merging.write(plan, folder, torch.float32, CPU, original, _quiet)
    return base.loader(opened.task["task"]).from_pretrained(folder).eval()


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return out


SETTINGS = {
    "lora": LoraSettings(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]),
    "rslora": LoraSettings(r=4, lora_alpha=8, target_modules="all-linear", use_rslora=True),
    "dora": LoraSettings(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"], use_dora=True),
    "a tied head": LoraSettings(r=4, target_modules=["q_proj", "lm_head"]),
    "a layer kept whole": LoraSettings(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"]),
}


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_the_merged_model_gives_the_adapters_logits(name: str, four_bit: bool, tiny_mistral: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "adapter", tiny_mistral, SETTINGS[name], four_bit=four_bit)
    before, merged = _logits(load_trained(adapter, CPU).model), _logits(_written(adapter, tmp_path / "merged"))
    torch.testing.assert_close(merged, before, rtol=1e-4, atol=2e-4 * float(before.abs().max()))


@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "nf4"])
def test_a_classifier_on_a_causal_base_is_merged_with_its_head(four_bit: bool, tiny_mistral: Path, tmp_path: Path) -> None:
    settings = LoraSettings(r=4, target_modules=["q_proj", "v_proj"])
    adapter = _adapter(tmp_path / "adapter", tiny_mistral, settings, "sequence_classification", four_bit)
    merged = _written(adapter, tmp_path / "merged")
    assert merged.config.id2label == {0: "a", 1: "b", 2: "c"}
    torch.testing.assert_close(_logits(merged), _logits(load_trained(adapter, CPU).model), rtol=1e-4, atol=1e-3)


def test_weights_kept_the_other_way_round(tiny_mistral: Path, tmp_path: Path) -> None:
    """GPT-2's layers hold [in, out]."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    home = tmp_path / "gpt2"
    AutoTokenizer.from_pretrained(tiny_mistral).save_pretrained(home)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=4096, n_positions=128, eos_token_id=2)).save_pretrained(home)
    model = GPT2LMHeadModel.from_pretrained(home)
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(home)}))
    merged = _written(tmp_path / "adapter", tmp_path / "merged")
    torch.testing.assert_close(_logits(merged), _logits(load_trained(tmp_path / "adapter", CPU).model), rtol=1e-4, atol=1e-4)


def test_what_a_plan_cannot_say_is_left_to_peft(tiny_mistral: Path, tmp_path: Path) -> None:
    adapter = _adapter(tmp_path / "adapter", tiny_mistral, LoraSettings(r=4, target_modules=["q_proj"], bias="lora_only"))
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": ["q_proj", "embed_tokens"]}))
    assert merging.plan(open_trained(adapter)) is None


def test_shards_stay_shards(tiny_mistral: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home = tmp_path / "base"
    AutoTokenizer.from_pretrained(tiny_mistral).save_pretrained(home)
    AutoModelForCausalLM.from_pretrained(tiny_mistral).save_pretrained(home, max_shard_size="4MB")
    files = len(list(home.glob("*.safetensors")))
    adapter = _adapter(tmp_path / "adapter", home, SETTINGS["a tied head"], four_bit=True)
    merged = _written(adapter, tmp_path / "merged")
    assert files > 2 and len(list((tmp_path / "merged").glob("*.safetensors"))) == files
    torch.testing.assert_close(_logits(merged), _logits(load_trained(adapter, CPU).model), rtol=1e-4, atol=1e-2)


def test_weights_are_quantised_as_training_loaded_them(tiny_mistral: Path, tmp_path: Path) -> None:
    """A base in fp32 that is trained in bf16: its codes are those of the bf16 weights."""
    from bitsandbytes.functional import dequantize_4bit

    settings = ModelConfig(name="m", task="causal_lm", base=str(tiny_mistral))
    found = base.find_base(str(tiny_mistral), None)
    config, tokenizer = base.load_config(found, settings), base.load_tokenizer(found)
    nf4 = QuantizationSettings()
    loaded = base.load_model(
        found, settings, config, tokenizer, device=CPU, dtype=torch.bfloat16, labels=None, attn="sdpa", quantization=nf4
    )
    adapter = _adapter(tmp_path / "adapter", tiny_mistral, SETTINGS["lora"], four_bit=True)
    task = json.loads((adapter / "lorica.json").read_text())
    (adapter / "lorica.json").write_text(json.dumps({**task, "dtype": "bfloat16"}))
    plan = merging.plan(open_trained(adapter))
    assert plan is not None
    name = "model.layers.1.mlp.up_proj"
    weight = loaded.get_submodule(name).weight
    trained = dequantize_4bit(weight.data, weight.quant_state)
    ours = merging._merged(plan, f"{name}.weight", CPU, original=False)
    assert ours.dtype == trained.dtype == torch.bfloat16
    assert float((ours.float() - trained.float()).abs().max()) <= 2**-7 * float(trained.float().abs().max())
    assert float((ours == trained).float().mean()) > 0.98


PEAK = """
import sys
from pathlib import Path
import torch
from lorica.models import merging
from lorica.models.trained import open_trained

def high() -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

def now() -> int:
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) * 1024

torch.set_num_threads(1)
opened = open_trained(Path(sys.argv[1]))
plan = merging.plan(opened)
Path(sys.argv[2]).mkdir()
merging.through_four_bits(torch.ones(64, 64), opened, torch.device("cpu"))  # bitsandbytes loads
Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
before = now()
merging.write(plan, Path(sys.argv[2]), torch.bfloat16, torch.device("cpu"), False, lambda done, total: None)
print(high() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_holds_a_tensor_not_a_model(tiny_mistral: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    home, sizes = tmp_path / "base", {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16}
    AutoTokenizer.from_pretrained(tiny_mistral).save_pretrained(home)
    shape = MistralConfig(vocab_size=4096, num_attention_heads=12, num_key_value_heads=4, **sizes)
    MistralForCausalLM(shape).to(torch.bfloat16).save_pretrained(home, max_shard_size="96MB")
    files = [f.stat().st_size for f in home.glob("*.safetensors")]
    adapter = _adapter(tmp_path / "adapter", home, SETTINGS["lora"], four_bit=True)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(adapter), str(tmp_path / "merged")], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1])
    print(f"\npeak {peak / 2**20:.0f} MiB, largest shard {max(files) / 2**20:.0f} MiB, all {sum(files) / 2**20:.0f} MiB")
    assert len(files) >= 3 and peak <= 1.3 * max(files), (peak, files)
