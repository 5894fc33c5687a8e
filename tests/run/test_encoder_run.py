"""The embedded default, small: a run leaves what is promised, its adapter loads in plain PEFT, its merged model in transformers."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

Lorica = Callable[..., tuple[int, str]]
FAST = ("debug=fast", "data.max_test_examples=24", "trainer.max_steps=4")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of the embedded default."""
    from lorica.cli import main

    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(SystemExit) as end:
        main("train", [*FAST, f"run_dir={folder}"])
    assert end.value.code == 0
    return folder


def test_the_run_folder_is_complete(run: Path) -> None:
    names = {p.name for p in run.iterdir()}
    assert {
        "config.yaml",
        "adapter",
        "checkpoints",
        "data_report.json",
        "data_report.md",
        "metrics.json",
        "metrics.csv",
        "predictions.jsonl",
        "train.log",
        ".hydra",
        "curves.png",
        "confusion.png",
    } <= names
    assert not [n for n in names if n.startswith(".") and n != ".hydra"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["optimizer"]["lr"] == 2e-3 and config["trainer"]["batch_size"] == 4


def test_figures_are_flat_and_add_up(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("test/accuracy", "test/f1_macro", "test/loss", "train/tokens_per_second", "train/samples_per_second", "memory/peak_gib"):
        assert isinstance(metrics[name], float), name
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 24
    right = sum(r["label"] == r["prediction"] for r in rows) / len(rows)
    assert metrics["test/accuracy"] == pytest.approx(right, abs=1e-6)
    assert all(sum(r["probabilities"].values()) == pytest.approx(1.0, abs=1e-4) for r in rows)
    with (run / "metrics.csv").open(newline="") as file:
        steps = [int(r["step"]) for r in csv.DictReader(file) if r["train/loss"]]
    assert steps == [1, 2, 3, 4]


def test_the_adapter_in_plain_peft_gives_the_same_probabilities(run: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from lorica.models.base import find_base

    task = json.loads((run / "adapter" / "lorica.json").read_text())
    base = AutoModelForSequenceClassification.from_pretrained(find_base(task["base"], None).path, num_labels=4)
    model = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()][:8]
    for row in rows:
        with torch.no_grad():
            p = model(**tokenizer(row["text"], return_tensors="pt")).logits.softmax(-1)[0]
        assert torch.allclose(p, torch.tensor(list(row["probabilities"].values())), atol=1e-4)


def test_the_merged_model_answers_alike_in_a_pipeline(run: Path, tmp_path: Path, lorica: Lorica) -> None:
    from transformers import pipeline

    code, printed = lorica("merge", f"run={run}", f"output={tmp_path / 'merged'}")
    assert code == 0 and "merged into its base" in printed
    pipe: Any = pipeline("text-classification", str(tmp_path / "merged"))
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()][:8]
    for row in rows:
        out = pipe(row["text"])[0]
        assert out["label"] == row["prediction"] and out["score"] == pytest.approx(row["probability"], abs=1e-4)
    assert (
        lorica("predict", f"run={tmp_path / 'merged'}", "text=goal")[1].split()[0]
        == lorica("predict", f"run={run}", "text=goal")[1].split()[0]
    )


def test_predict_answers_every_row_of_a_file_in_order(run: Path, tmp_path: Path, lorica: Lorica) -> None:
    file, out = tmp_path / "in.csv", tmp_path / "out.csv"
    with file.open("wb") as f:
        f.write(b'id,text\n1,Shares fell\n2,\n3,"He scored, twice"\n4,bad \xff bytes\n5,Too,many,cells\n6,A new comet\n')
    code, printed = lorica("predict", f"run={run}", f"input={file}", f"output={out}")
    assert code == 1 and "3 rows answered" in printed and "in.csv:3" in printed
    with out.open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [r["id"] for r in rows] == ["1", "2", "3", "4", "5", "6"]
    assert [bool(r["prediction"]) for r in rows] == [True, False, True, False, False, True]
    assert all(r["error"] for r in rows if not r["prediction"])
    single = lorica("predict", f"run={run}", "text=Shares fell")[1]
    assert single.startswith(rows[0]["prediction"])


def test_predict_writes_jsonl_with_all_probabilities(run: Path, tmp_path: Path, lorica: Lorica) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "Shares fell", "n": 1}\n{"text": "A goal", "n": 2}\n')
    code, _ = lorica("predict", f"run={run}", f"input={file}")
    rows = [json.loads(line) for line in (tmp_path / "in.scored.jsonl").read_text().splitlines()]
    assert code == 0 and [r["n"] for r in rows] == [1, 2]
    assert set(rows[0]["probabilities"]) == {"World", "Sports", "Business", "Sci/Tech"}


def test_a_file_without_the_text_column_is_refused(run: Path, tmp_path: Path, lorica: Lorica) -> None:
    (tmp_path / "a.csv").write_text("id,review\n1,good\n")
    code, printed = lorica("predict", f"run={run}", f"input={tmp_path / 'a.csv'}")
    assert code == 2 and "text_column" in printed and "review" in printed


def test_a_finished_run_is_not_overwritten(run: Path, lorica: Lorica) -> None:
    code, printed = lorica("train", *FAST, f"run_dir={run}")
    assert code == 2 and "finished run" in printed


def test_a_refused_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lorica: Lorica) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("text,label\ngood,yes\n,no\n")
    code, printed = lorica("train", "data=classification", "data.path=a.csv", *FAST[1:])
    assert code == 2 and "a.csv:3" in printed
    assert not [p for p in (tmp_path / "outputs").rglob("*") if p.is_file()] if (tmp_path / "outputs").exists() else True


def test_full_fine_tuning_leaves_a_whole_model(tmp_path: Path, lorica: Lorica) -> None:
    code, _ = lorica("train", *FAST, "model=minilm_full", f"run_dir={tmp_path / 'full'}")
    assert code == 0 and (tmp_path / "full" / "model" / "model.safetensors").is_file()
    code, printed = lorica("predict", f"run={tmp_path / 'full'}", "text=goal")
    assert code == 0 and "(" in printed
    assert lorica("merge", f"run={tmp_path / 'full'}")[0] == 2


def test_a_base_is_tested_as_it_is_where_nothing_is_to_be_trained(tmp_path: Path, lorica: Lorica) -> None:
    code, printed = lorica("train", "data.max_test_examples=40", "trainer.max_steps=0", f"run_dir={tmp_path / 'run'}")
    assert code == 0 and "nothing is trained" in printed
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert figures["train/seconds"] == 0 and figures["test/accuracy"] < 0.6 and figures["train/best_step"] == 0
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(not value.any() for name, value in adapter.items() if "lora_B" in name)
    assert not (tmp_path / "run" / "adapter" / "calibration.json").exists(), "of 40 validation rows"
    assert lorica("predict", f"run={tmp_path / 'run'}", "text=hello")[0] == 0
