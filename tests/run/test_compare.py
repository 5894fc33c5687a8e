"""`lorica compare`: what is trained and what is not, once; the same rows; pages that need nothing else and run nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorica import comparison_pages, composition
from lorica.cells import Cell
from lorica.charts import Axis, Point, lines, points
from lorica.compare import Entry, plan
from lorica.config import CompareConfig, ConfigError, NotApplicable

Lorica = Callable[..., tuple[int, str]]
OPTIONS = ["minilm_full", "minilm_lora", "roberta_qlora", "tiny_mistral_qlora"]
SMALL = [
    "data=ag_news",
    "trainer.max_epochs=1",
    "data.max_train_examples=32",
    "data.max_validation_examples=8",
    "data.max_test_examples=24",
]


def compose(cell: list[str]) -> Any:
    return composition.compose("train", cell)


def planned(models: list[str], runs: list[str] | None = None, overrides: list[str] | None = None) -> tuple[Path, list[Entry]]:
    return plan(CompareConfig(models=models, runs=runs or []), overrides or ["data=ag_news"], compose, OPTIONS, None)


def test_a_model_is_trained_with_what_was_typed_and_an_untuned_one_is_not(tmp_path: Path) -> None:
    folder, entries = planned(["minilm_lora", "minilm_untuned", "roberta_qlora_untuned", "minilm_lora"], [str(tmp_path)])
    assert [e.name for e in entries] == ["minilm_lora", "minilm_untuned", "roberta_qlora_untuned", "minilm_lora (2)", tmp_path.name]
    cells = [e.cell for e in entries]
    assert cells[0] == cells[3] == Cell(("data=ag_news", "model=minilm_lora"), ("model=minilm_lora",)) and cells[4] is None
    assert cells[1] is not None and cells[1].varied == ("model=minilm_lora", "trainer.max_steps=0")
    assert cells[2] is not None and "model=roberta_qlora" in cells[2].varied
    assert len({e.run for e in entries}) == 4 and all(folder in e.run.parents for e in entries[:4])


def test_a_few_shot_model_is_shown_rows_and_not_trained() -> None:
    (_, entries) = planned(["tiny_mistral_fewshot", "tiny_mistral_qlora_untuned"])
    assert entries[0].cell is not None
    assert entries[0].cell.varied == ("model=tiny_mistral_qlora", "trainer.max_steps=0", "data.shots=4")
    with pytest.raises(NotApplicable, match="causal"):
        planned(["minilm_fewshot", "minilm_untuned"])


def test_another_model_of_the_same_comparison_trains_no_other_again() -> None:
    (folder, few), (same, more) = planned(["minilm_lora", "minilm_full"]), planned(["minilm_full", "minilm_untuned", "minilm_lora"])
    assert folder == same and {e.run for e in few} < {e.run for e in more}
    assert planned(["minilm_lora", "minilm_full"], overrides=["data=ag_news", "seed=1"])[0] != folder


@pytest.mark.parametrize(
    ("models", "overrides", "says"),
    [
        (["minilm_lora"], ["data=ag_news"], "two or more"),
        (["minilm_lora", "minlm_full"], ["data=ag_news"], "minilm_full"),
        (["minilm_lora", "mistral_untuned"], ["data=ag_news"], "must be of"),
        (["minilm_lora", "minilm_full"], ["data=ag_news", "model=minilm_full"], "models="),
        (["minilm_lora", "minilm_full"], ["data=ag_news", "resume=auto"], "sets it"),
        (["minilm_lora", "minilm_full"], ["data=healthcare_qa"], "no labels"),
        (["minilm_lora", "minilm_full"], ["data=ag_news", "data.report_only=true"], "stops before"),
    ],
)
def test_what_can_not_be_compared_is_refused_before_anything_runs(models: list[str], overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        planned(models, overrides=overrides)


def test_keys_are_compares_or_trains(lorica: Lorica) -> None:
    for typed, says in (
        ("modles=[a,b]", "models=[a,b]"),
        ("trainer.max_epoch=2", "trainer.max_epochs"),
        ("latency_rows=-1", "latency_rows"),
    ):
        code, said = lorica("compare", "models=[minilm_lora,minilm_full]", typed)
        assert code == 2 and says in said, said
    assert lorica("compare", "models=[minilm_lora,minilm_full]", "-m")[0] == 2
    code, said = lorica("compare", "--help")
    assert code == 0 and "price_per_kwh" in said and "lorica train --help" in said


def _report(**more: Any) -> dict[str, Any]:
    names = ["<script>alert(1)</script>", "b|c"]
    model: dict[str, Any] = {"run": "outputs/x", "rows": 4, "accuracy": 0.5, "accuracy_interval": [0.2, 0.8], "f1_macro": 0.4}
    model |= {"f1_macro_interval": [0.1, 0.7], "ece": 0.1, "temperature": None, "confusion": [[1, 1], [1, 1]], "storage_bytes": 1234}
    model |= {"curves": {"train/loss": [[0.5, 1.0], [1.0, 0.5]]}, "train_seconds": 10.0, "train_joules": None, "train_cost": None}
    model |= {"trainable": 10.0, "weights": 100.0, "train_samples_per_second": 3.0, "test_samples_per_second": 30.0, "peak_gib": 1.0}
    model |= {"latency": {"asked": 3, "rows": 3, "p50_seconds": 0.1, "p95_seconds": 0.2}}
    row: dict[str, Any] = {"text": "<img src=x onerror=alert(2)> | `a`", "label": "x<y"}
    row["answers"] = {n: {"label": "x<y" if n == "b|c" else "z", "probability": 0.9} for n in names}
    whole = {"data": "d&d", "rows": 4, "labels": ["x<y", "z"], "choice": {"words": "b|c is the best."}, "price_per_kwh": None}
    whole |= {"all_right": 1, "none_right": 1, "models": [{**model, "name": name} for name in names], "disagreements": [row]}
    return whole | {"pairs": [{"verdict": "no <b>difference</b>"}]} | more


def test_pages_show_hostile_text_as_text_and_load_nothing() -> None:
    page = comparison_pages.html_page(_report())
    assert "<script" not in page and "<img" not in page and "<b>" not in page and "&lt;img src=x" in page
    assert not re.search(r"""(src|href)=|url\(|https?:""", page.replace("src=x", "")) and "default-src 'none'" in page
    assert page.count("<svg") == 2 and page.count("<table") == 5
    text = comparison_pages.markdown_page(_report())
    assert "b\\|c" in text and "\\<img" in text and not re.search(r"(?<!\\)<img", text)


def test_energy_and_its_cost_are_said_where_they_are_known() -> None:
    header, body = comparison_pages.costs(_report())
    assert "unknown" in body[0] and "cost" not in header
    known = _report(price_per_kwh=0.5)
    for model in known["models"]:
        model |= {"train_joules": 7200.0, "train_cost": 0.001}
    header, body = comparison_pages.costs(known)
    assert body[0][header.index("Wh")] == "2.00" and body[0][header.index("cost")] == "0.0010"
    assert "energy of training" in comparison_pages.html_page(known)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (120.0, 130.0), (0.0031, 0.0032), (-5.0, 2e6)])
def test_ticks_are_round_and_in_the_range(low: float, high: float) -> None:
    ticks = Axis(low, high).ticks()
    assert 2 <= len(ticks) <= 8 and all(low - 1e-9 <= t <= high + 1e-9 for t in ticks)
    if low > 0:
        assert all(low <= t <= high for t in Axis(low, high, True).ticks()) and len(Axis(low, high, True).ticks()) >= 2


def test_charts_take_one_value_and_equal_ones() -> None:
    assert "circle" in lines([[(1.0, 2.0)], []], "x", "y")
    drawn = points([Point("a", 3.0, 0.5, 0.5, 0.5), None, Point("b", 3.0, 0.5, 0.5, 0.5)], "x", "y")
    names = re.findall(r'<text x="([\d.]+)" y="([\d.]+)"[^>]*>[ab]<', drawn)
    assert len(names) == 2 and names[0] != names[1]


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_comparison_trains_once_and_says_what_rows_show(lorica: Lorica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ["models=[minilm_untuned,minilm_lora,minilm_lora]", *SMALL, "latency_rows=4"]
    code, said = lorica("compare", *typed)
    (folder,) = tmp_path.glob("outputs/compare/*")
    assert code == 0 and "no difference between minilm_lora and minilm_lora (2)" in said, said
    report = json.loads((folder / "comparison.json").read_text())
    assert [m["name"] for m in report["models"]] == ["minilm_untuned", "minilm_lora", "minilm_lora (2)"]
    untuned, tuned, again = report["models"]
    assert untuned["train_seconds"] == 0 and tuned["train_seconds"] > 0 and tuned["latency"] == again["latency"]
    assert tuned["latency"]["p95_seconds"] >= tuned["latency"]["p50_seconds"] > 0 and 0 < tuned["trainable"] < tuned["weights"]
    code, said = lorica("compare", *typed, f"runs=[{folder / 'minilm_lora'}]", f"output={tmp_path / 'mine'}")
    assert code == 0 and said.count("done before") == 2 and (tmp_path / "mine" / "comparison.html").is_file()
    (other,) = [m for m in json.loads((tmp_path / "mine" / "comparison.json").read_text())["models"] if m["name"] == "minilm_lora (3)"]
    assert other["confusion"] == tuned["confusion"]


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_a_model_that_fails_leaves_the_others_compared(lorica: Lorica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, said = lorica("compare", "models=[minilm_untuned,minilm_lora_untuned,roberta_untuned]", *SMALL, "latency_rows=0")
    assert code == 1 and "roberta_untuned failed" in said and "comparison.html" in said, said
