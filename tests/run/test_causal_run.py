"""A 4-bit Mistral on labelled texts, end to end on a CPU: it learns, and adapter, plain PEFT and merged model agree."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorica.models.trained import load_trained

Lorica = Callable[..., tuple[int, str]]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_mistral: Path) -> Path:
    """Twelve steps of tiny_mistral_qlora on the sentiment sample."""
    from lorica.cli import main

    folder = tmp_path_factory.mktemp("runs") / "run"
    limits = ["data.max_train_examples=48", "data.max_validation_examples=8", "data.max_test_examples=12"]
    trainer = ["trainer.max_steps=12", "trainer.max_epochs=-1", "trainer.batch_size=8", "trainer.log_every_n_steps=1"]
    with pytest.raises(SystemExit) as end:
        main("train", ["model=tiny_mistral_qlora", f"model.base={tiny_mistral}", "data=sentiment", f"run_dir={folder}", *limits, *trainer])
    assert end.value.code == 0
    return folder


def test_the_loss_falls(run: Path) -> None:
    with (run / "metrics.csv").open(newline="") as file:
        losses = [float(r["train/loss"]) for r in csv.DictReader(file) if r["train/loss"]]
    assert len(losses) == 12 and losses[-1] < 0.8 * losses[0]


def test_the_base_is_in_four_bits(run: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    trained = load_trained(run, CPU)
    assert sum(isinstance(m, Linear4bit) for m in trained.model.modules()) == 4 * 7


def _logits(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids).logits
    return out.float()


def test_plain_peft_gives_the_same_logits(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    # else bitsandbytes' own forward rounds to bf16 on some processors
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)
    task = json.loads((run / "adapter" / "lorica.json").read_text())
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    base = AutoModelForCausalLM.from_pretrained(task["base"], quantization_config=nf4, dtype=torch.float32, device_map="cpu")
    plain = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    assert (_logits(plain) - _logits(load_trained(run, CPU).model)).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_merged_onto_dequantised_weights_equals_the_adapter(run: Path, tmp_path: Path, lorica: Lorica, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    code, printed = lorica("merge", f"run={run}", f"output={tmp_path / 'merged'}", f"dtype={dtype}")
    assert code == 0 and "dequantised" in printed
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.to_dict().get("quantization_config") is None
    ours, theirs = _logits(load_trained(run, CPU).model), _logits(merged)
    # bf16 has 8 bits of mantissa: weights are rounded by up to 2^-9 of their size.
    assert (ours - theirs).abs().max() < (1e-4 if dtype == "float32" else 2**-5 * ours.abs().max())


def test_predict_compares_the_labels(run: Path, lorica: Lorica) -> None:
    code, printed = lorica("predict", f"run={run}", "text=What a lovely day")
    assert code == 0 and {"negative", "neutral", "positive"} <= set(printed.replace("(", " ").replace(",", " ").split())


def test_a_predicted_label_is_the_one_with_the_highest_likelihood(run: Path) -> None:
    trained = load_trained(run, CPU)
    row = json.loads((run / "predictions.jsonl").read_text().splitlines()[0])
    prompt = trained.task["prompt_template"].replace("{labels}", "negative, neutral or positive").replace("{text}", row["text"])
    scores = {}
    for label in ("negative", "neutral", "positive"):
        ids = trained.tokenizer(f"{prompt} {label}", return_tensors="pt")["input_ids"]
        start = trained.tokenizer(prompt, return_tensors="pt")["input_ids"].shape[1]
        with torch.no_grad():
            logp = trained.model(input_ids=ids).logits.float().log_softmax(-1)
        scores[label] = float(sum(logp[0, t - 1, ids[0, t]] for t in range(start, ids.shape[1])))
    total = torch.logsumexp(torch.tensor(list(scores.values())), 0)
    for label, score in scores.items():
        assert row["probabilities"][label] == pytest.approx(float((score - total).exp()), abs=1e-4)


def test_a_causal_base_classifies_whatever_the_padding_side(tiny_mistral: Path) -> None:
    from lorica.config import ModelConfig, OptimizerConfig
    from lorica.data.collate import collate_classifier
    from lorica.data.encoding import Encoded
    from lorica.models import base
    from lorica.models.module import SequenceClassifierModule

    settings = ModelConfig(name="c", task="sequence_classification", base=str(tiny_mistral))
    found = base.find_base(settings.base, None)
    tokenizer = base.load_tokenizer(found)
    config = base.load_config(found, settings)
    model = base.load_model(found, settings, config, tokenizer, device=CPU, dtype=torch.float32, labels=["a", "b"], attn="sdpa")
    module = SequenceClassifierModule(model.eval(), OptimizerConfig(), 1)
    rows = [Encoded(list(range(5, 5 + n)), label=0) for n in (3, 9, 17)]
    with torch.no_grad():
        right, left = (module.logits(collate_classifier(rows, tokenizer.pad_token_id, left=side)) for side in (False, True))
    assert torch.allclose(right, left, atol=1e-5)


def test_answers_are_generated_and_scored(tiny_mistral: Path, tmp_path: Path, lorica: Lorica) -> None:
    limits = ["data.max_train_examples=8", "data.max_validation_examples=2", "data.max_test_examples=3", "data.max_new_tokens=4"]
    code, _ = lorica(
        "train",
        "model=tiny_mistral_qlora",
        f"model.base={tiny_mistral}",
        "data=healthcare_qa",
        "trainer.max_steps=1",
        f"run_dir={tmp_path / 'r'}",
        *limits,
    )
    assert code == 0
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert {"test/rouge_l", "test/perplexity", "val/loss_best"} <= metrics.keys()
    rows = [json.loads(line) for line in (tmp_path / "r" / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(isinstance(r["prediction"], str) and r["reference"] for r in rows)
    assert lorica("predict", f"run={tmp_path / 'r'}", "text=My knee hurts", "max_new_tokens=3")[0] == 0


def test_chats_train(tiny_mistral: Path, tmp_path: Path, lorica: Lorica) -> None:
    limits = ["data.max_train_examples=6", "data.max_test_examples=2", "data.max_generated_examples=1", "data.max_new_tokens=2"]
    code, printed = lorica(
        "train",
        "model=tiny_mistral_qlora",
        f"model.base={tiny_mistral}",
        "data=chat",
        "trainer.max_steps=1",
        f"run_dir={tmp_path / 'r'}",
        *limits,
    )
    assert code == 0, printed
