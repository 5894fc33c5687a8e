"""The data report of a run: written before any weights are read, refusing with exit code 2, and all there is with data.report_only."""

from __future__ import annotations

import csv
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorica.config import ClassificationDataConfig
from lorica.data.encoding import ClassifierEncoder
from lorica.data.gates import check_report
from lorica.data.registry import build_data
from lorica.data.report import data_report
from lorica.models import base

Lorica = Callable[..., tuple[int, str]]
PLAIN = ("data=classification", "data.validation_fraction=0", "data.test_fraction=0", "trainer.batch_size=2", "trainer.max_steps=2")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights is an error."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(base, "load_model", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten training rows of two labels, and ten test rows of which four stand in training, reworded."""
    words = ("storm", "harbour", "vote", "fund", "road")
    texts = [" ".join(f"{word}{(i * 7919 + k * 104729) % 9973}" for k, word in enumerate(words)) for i in range(20)]
    for split, rows in (("train", texts[:10]), ("test", [f"{t}, again" for t in texts[:4]] + texts[10:16])):
        with (tmp_path / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *((text, "ab"[i % 2]) for i, text in enumerate(rows))])
    return tmp_path


@pytest.mark.usefixtures("no_weights")
def test_report_only_stops_after_the_report(lorica: Lorica, folder: Path) -> None:
    run = folder / "run"
    code, said = lorica("train", *PLAIN, f"data.path={folder}", "data.report_only=true", "data.max_leakage=1.0", f"run_dir={run}")
    assert code == 0, said
    assert re.search(rf"data report of 20 rows in [\d.]+ s: {re.escape(str(run))}/data_report.html", " ".join(said.split()))
    assert "4 of 10 test rows (40.0%) have a near duplicate in training" in said
    names = {path.name for path in run.iterdir()}
    assert names == {"config.yaml", ".hydra", "train.log", "data_report.json", "data_report.md", "data_report.html", "token_contract.json"}


@pytest.mark.usefixtures("no_weights")
def test_a_broken_limit_refuses_and_leaves_the_report(lorica: Lorica, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    code, said = lorica("train", *PLAIN, f"data.path={folder}")
    assert code == 2
    assert "data.max_leakage=0.2: 4 of 10 test rows (40.00%) have a near duplicate in training" in said
    (report,) = (folder / "outputs").glob("*/*/data_report.json")
    assert str(report.relative_to(folder)) in said
    near = json.loads(report.read_text("utf-8"))["duplicates"]["near"]
    assert len(near["test_and_training"]) == 4
    code, said = lorica("train", *PLAIN, f"data.path={folder}", "data.report_only=true")
    assert code == 2 and "data.max_leakage" in said


@pytest.mark.usefixtures("no_weights")
def test_a_label_missing_from_training_refuses(lorica: Lorica, folder: Path) -> None:
    code, said = lorica("train", *PLAIN, f"data.path={folder}", "data.labels=[a,b,c]", "data.max_leakage=1.0", f"run_dir={folder / 'run'}")
    assert code == 2 and "data.min_label_examples=1: a label with fewer rows among the 10 of training: c (0)" in said


def test_a_run_within_the_limits_goes_on(lorica: Lorica, folder: Path) -> None:
    code, said = lorica("train", *PLAIN, f"data.path={folder}", "data.max_leakage=0.4", "logger=none", f"run_dir={folder / 'run'}")
    assert code == 0 and "note: 4 of 10 test rows (40.0%) have a near duplicate in training" in said


def test_a_grid_trains(lorica: Lorica) -> None:
    code, said = lorica("train", "-m", "seed=0,1", "data.report_only=true")
    assert code == 2 and "data.report_only=true: stops before training" in said


@pytest.mark.parametrize("value", ["0.5", "1.1", "high"])
def test_similarities_out_of_range_are_refused(lorica: Lorica, value: str) -> None:
    code, said = lorica("train", f"data.near_duplicate_similarity={value}")
    assert code == 2 and "data.near_duplicate_similarity" in said


CLASSIFIED = [("minilm_lora", "ag_news"), ("minilm_lora", "sentiment")]


@pytest.mark.parametrize(
    ("model", "data"), CLASSIFIED + [("tiny_mistral_qlora", d) for d in ("ag_news", "sentiment", "healthcare_qa", "chat")]
)
@pytest.mark.usefixtures("no_weights")
def test_the_packaged_samples_are_within_the_limits(lorica: Lorica, tmp_path: Path, model: str, data: str) -> None:
    code, said = lorica("train", f"model={model}", f"data={data}", "data.report_only=true", f"run_dir={tmp_path / 'run'}")
    assert code == 0, said


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.usefixtures("no_weights")
def test_real_sets_are_within_the_limits(lorica: Lorica, shared: Path, tmp_path: Path) -> None:
    """But for the sentiment set, whose report is timed below."""
    for data, path, model in (
        ("ag_news", "ag_news", "minilm_lora"),
        ("healthcare_qa", "healthcare_qa/healthcare_qa.jsonl", "tiny_mistral_qlora"),
        ("chat", "chat", "tiny_mistral_qlora"),
    ):
        run = tmp_path / data
        source = ("data.source=files", f"data.path={shared / 'data' / path}")
        code, said = lorica("train", f"model={model}", f"data={data}", *source, "data.report_only=true", f"run_dir={run}")
        assert code == 0, said
    near = json.loads((tmp_path / "ag_news" / "data_report.json").read_text("utf-8"))["duplicates"]["near"]
    assert 0.03 < near["across"]["train-test"] / 7600 < 0.07


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.alone
def test_the_report_of_a_large_set_takes_seconds_and_is_within_the_limits(shared: Path) -> None:
    """62,385 rows; in the processor's time, for other work may run beside."""
    labels = ["negative", "neutral", "positive"]
    values = {"name": "sentiment", "module": "sentiment", "source": "files", "path": str(shared / "data" / "sentiment"), "labels": labels}
    data = build_data(ClassificationDataConfig(**values))
    data.encode(ClassifierEncoder(base.load_tokenizer(base.find_base("sentence-transformers/all-MiniLM-L6-v2", None)), 128))
    began = time.process_time()
    report = data_report(data)
    assert sum(report["rows"].values()) == 62_385 and time.process_time() - began <= 20
    check_report(report, data.config, shared)
