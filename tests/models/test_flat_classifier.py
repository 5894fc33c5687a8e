"""Classifiers on sequences laid end to end give the logits and gradients that they give on padded batches."""

from typing import Any

import pytest
import torch

from lorica.config import ConfigError, OptimizerConfig
from lorica.data.collate import collate_classifier, fill
from lorica.data.encoding import Encoded
from lorica.data.shapes import Shape
from lorica.kernels import attention
from lorica.models.module import SequenceClassifierModule
from lorica.models.sequence_classifier import pooling

ROWS = [Encoded([0, 11, 12, 13, 2], label=1), Encoded([0, 21, 2], label=0), Encoded([0, *range(30, 44), 2], label=2)]
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}


def _config(kind: str) -> Any:
    import transformers as t

    if kind == "bert":
        return t.BertConfig(**SMALL, max_position_embeddings=20)
    if kind == "roberta":
        return t.RobertaConfig(**SMALL, max_position_embeddings=20, pad_token_id=1)
    return t.MistralConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=20, pad_token_id=1, sliding_window=None)


@pytest.mark.parametrize("kind", ["bert", "roberta", "mistral"])
@pytest.mark.usefixtures("varlen_on_cpu")
def test_flat_is_padded(kind: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    config = _config(kind)
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj"] if kind == "mistral" else ["query", "value"]
    whole = AutoModelForSequenceClassification.from_config(config)
    model = get_peft_model(whole, LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS", init_lora_weights=False)).double().eval()
    module = SequenceClassifierModule(model, OptimizerConfig(), 1)
    assert pooling(config) == {"bert": "pooled", "roberta": "first", "mistral": "last"}[kind]
    results = []
    flat = collate_classifier(ROWS, 1, False)
    batches = {"padded": collate_classifier(ROWS, 1), "flat": flat, "filled": fill(dict(flat), Shape(64, 9, 5, 17), 1)}
    for name, batch in batches.items():
        whole.set_attn_implementation("sdpa" if name == "padded" else attention.VARLEN)
        module.zero_grad()
        logits = module.logits(batch)[: len(ROWS)]
        module.loss_sum(batch).backward()
        results.append([logits.detach(), *(p.grad for p in module.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) == len(results[2]) > 9
    for ours in results[1:]:
        for mine, theirs in zip(ours, results[0], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_an_architecture_that_is_not_known_is_padded() -> None:
    from transformers import DistilBertConfig, GPT2Config

    assert pooling(DistilBertConfig()) is None and pooling(GPT2Config()) is None


def test_another_flash_attention_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorica.kernels import varlen
    from lorica.models import base

    asked: list[str] = []
    monkeypatch.setattr(attention, "varlen_available", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_only_torchs", False)
    arguments = (_config("roberta"), "sequence_classification", torch.device("cpu"))
    with pytest.raises(ImportError):
        attention.use_installed("flash_attention_4", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"flash_attention_3.*needs bf16 or fp16"):
        base.attention_name("flash_attention_3", *arguments, torch.float32)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", asked.append)
    monkeypatch.setattr(varlen, "covers", lambda *_: True)
    monkeypatch.setattr(varlen, "attention", lambda *_: "ours")
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", lambda q, *_, **__: q)
    x, ends = torch.zeros(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    assert attention._varlen(x, x, x, ends, 4, False, None, 8**-0.5) == "ours"
    assert base.attention_name("flash_attention_3", *arguments, torch.bfloat16) == attention.VARLEN and not asked
    attention.use_installed("flash_attention_3", torch.device("cpu"))
    assert asked == ["FA3"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert base.attention_name("flash_attention_4", *arguments, torch.bfloat16) == attention.VARLEN
    with pytest.raises(ConfigError, match=r"flash_attention_3: is for GPUs of compute capability 9.x"):
        base.attention_name("flash_attention_3", *arguments, torch.bfloat16)
    assert isinstance(attention._varlen(x, x, x, ends, 4, False, None, 8**-0.5), torch.Tensor)


def test_a_flash_attention_that_this_torch_can_not_call_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def gives_more(*_: object, **__: object) -> torch.Tensor:
        out, _lse = (torch.zeros(1),) * 4  # as flash-attn-4 from 4.0.0b20 on, of which torch takes two
        return out

    monkeypatch.setattr(attention, "_only_torchs", False)
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", lambda name: None)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", gives_more)
    with pytest.raises(RuntimeError, match="ValueError: too many values to unpack"):
        attention.use_installed("flash_attention_4", torch.device("cpu"))
