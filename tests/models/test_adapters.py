"""What is trained is in fp32 and is saved, also a new head of another name; merging keeps the logits where weights are tied."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.config import ConfigError, LoraSettings, ModelConfig, QuantizationSettings
from lorica.merge import merge
from lorica.models import adapters, base
from lorica.models.trained import load_trained

Lorica = Callable[..., tuple[int, str]]
CPU = torch.device("cpu")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 514}


def _base(folder: Path, tiny_mistral: Path, config: Any, cls: Any) -> Path:
    """A base model's folder, its weights random, with the tiny Mistral's tokenizer."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_mistral).save_pretrained(folder)
    torch.manual_seed(0)
    cls(config).save_pretrained(folder)
    return folder


def _load(folder: Path, task: str, dtype: torch.dtype = torch.float32, quantization: QuantizationSettings | None = None) -> Any:
    settings = ModelConfig(name="m", task=task, base=str(folder))
    found = base.find_base(settings.base, None)
    config, tokenizer = base.load_config(found, settings), base.load_tokenizer(found)
    labels = ["a", "b"] if task == "sequence_classification" else None
    attn = base.attention_name("auto", config, task, CPU, dtype)
    return base.load_model(found, settings, config, tokenizer, device=CPU, dtype=dtype, labels=labels, attn=attn, quantization=quantization)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_heads_and_adapters_are_trained_in_fp32(dtype: torch.dtype, tmp_path: Path, tiny_mistral: Path) -> None:
    from transformers import RobertaConfig, RobertaModel

    folder = _base(tmp_path / "roberta", tiny_mistral, RobertaConfig(**SMALL, vocab_size=4096), RobertaModel)
    model = adapters.attach(
        _load(folder, "sequence_classification", dtype), LoraSettings(target_modules=["query"]), "sequence_classification", None
    )
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert set(trained.values()) == {torch.float32} and any("classifier" in name for name in trained)
    assert model.get_base_model().roberta.encoder.layer[0].output.dense.weight.dtype == dtype


def test_a_new_head_of_another_name_is_trained_and_saved(tmp_path: Path, tiny_mistral: Path) -> None:
    from transformers import DebertaV2Config, DebertaV2Model

    config = DebertaV2Config(**SMALL, vocab_size=4096, relative_attention=True, pos_att_type=["p2c", "c2p"])
    folder = _base(tmp_path / "deberta", tiny_mistral, config, DebertaV2Model)
    settings = LoraSettings(target_modules=["query_proj"])
    model = adapters.attach(_load(folder, "sequence_classification"), settings, "sequence_classification", None).eval()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("pooler" in name for name in trained) and any("classifier" in name for name in trained)
    adapters.save(model, tmp_path / "adapter")
    inputs = {"input_ids": torch.tensor([[1, 5, 9, 2]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    torch.manual_seed(99)
    again = load_trained(tmp_path / "adapter", CPU, base_name=str(folder)).model
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_a_base_that_lacks_weights_is_refused(tmp_path: Path, tiny_mistral: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "broken"
    folder.mkdir()
    for file in tiny_mistral.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in state.items() if "layers.2.mlp.up_proj" not in k}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lack weights of model\.layers\.2\.mlp\.up_proj"):
        _load(folder, "causal_lm")


def test_a_tied_heads_adapter_is_merged_into_the_head_alone(tiny_mistral: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    settings = LoraSettings(r=4, target_modules=["q_proj", "lm_head"])
    model = adapters.attach(_load(tiny_mistral, "causal_lm"), settings, "causal_lm", None).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    ids = torch.tensor([[1, 5, 9, 200, 31]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        merged = merge(model)
        torch.testing.assert_close(merged(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(again(input_ids=ids).logits, before, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_saved_whole_is_not_quantised_at_prediction(tmp_path: Path, tiny_mistral: Path, lorica: Lorica) -> None:
    arguments = ["model=tiny_mistral_qlora", f"model.base={tiny_mistral}", "data=sentiment", "debug=fast"]
    run = tmp_path / "run"
    code, printed = lorica("train", *arguments, "model.lora.modules_to_save=[down_proj]", f"run_dir={run}")
    assert code == 0, printed
    code, printed = lorica("predict", f"run={run}", "text=fine")
    assert code == 0 and printed.split()[0] in ("Positive", "Negative", "Neutral", "positive", "negative", "neutral"), printed


def test_merge_replaces_nothing_but_a_merge(tmp_path: Path, lorica: Lorica) -> None:
    run, keep = tmp_path / "run", tmp_path / "keep"
    assert lorica("train", "debug=fast", f"run_dir={run}")[0] == 0
    keep.mkdir()
    (keep / "thesis.txt").write_text("years")
    for target in (keep, run):
        code, printed = lorica("merge", f"run={run}", f"output={target}")
        assert code == 2 and "would be replaced" in printed
    assert (keep / "thesis.txt").read_text() == "years" and (run / "metrics.json").is_file()
    for _ in range(2):
        assert lorica("merge", f"run={run}", f"output={tmp_path / 'merged'}")[0] == 0


def test_labels_that_a_configuration_leaves_out_are_transformers_own(tmp_path: Path, tiny_mistral: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    folder = _base(tmp_path / "bert", tiny_mistral, BertConfig(**SMALL, vocab_size=4096, num_labels=2), BertForSequenceClassification)
    config = json.loads((folder / "config.json").read_text())
    for name in ("id2label", "label2id"):
        config.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    assert load_trained(folder, CPU).task["labels"] == ["LABEL_0", "LABEL_1"]
