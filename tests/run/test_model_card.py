"""The model card: its code loads what it describes, its figures are those of the run, and it states no licence that it does not know."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from lorica import model_card
from lorica.composition import compose

Lorica = Callable[..., tuple[int, str]]
SMALL = ["debug=fast", "data.max_test_examples=12"]


def _code(card: str) -> str:
    return card.split("```python\n")[1].split("```")[0]


def _head(card: str) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(card.split("---\n")[1])
    return found


@pytest.mark.slow
def test_the_card_of_an_adapter_and_of_its_merge(tiny_mistral: Path, lorica: Lorica, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, said = lorica("train", "model=tiny_mistral_qlora", f"model.base={tiny_mistral}", "data=sentiment", f"run_dir={run}", *SMALL)
    assert code == 0, said
    card = (run / "adapter" / "README.md").read_text("utf-8")
    head = _head(card)
    assert head["base_model"] == str(tiny_mistral) and head["library_name"] == "peft" and "qlora" in head["tags"]  # type: ignore[operator]
    assert "license" not in head and "Base model: not stated" in card and "written for Lorica" in card
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"| accuracy | {metrics['test/accuracy']:.4f} |" in card and "On 12 test rows" in card
    low, high = re.search(r"\| accuracy \| [\d.]+ \| ([\d.]+) to ([\d.]+) \|", card).groups()  # type: ignore[union-attr]
    assert float(low) <= metrics["test/accuracy"] <= float(high)
    assert "torch " in card and "4 bits, nf4" in card and "medical" not in card
    scope: dict[str, object] = {}
    exec(_code(card).replace("<this folder>", str(run / "adapter")), scope)
    assert type(scope["model"]).__name__.startswith("PeftModel")

    (run / "adapter" / "README.md").write_text("mine")  # it is in no manifest
    assert lorica("merge", f"run={run}", "certify_rows=4")[0] == 0
    merged = (run / "merged" / "README.md").read_text("utf-8")
    assert _head(merged)["library_name"] == "transformers" and "- Certificate: mean KL divergence" in merged
    assert f"| accuracy | {metrics['test/accuracy']:.4f} |" in merged and "4 bits, nf4" in merged
    exec(_code(merged).replace("<this folder>", str(run / "merged")).replace("print", "str"), scope)


@pytest.mark.slow
def test_the_card_of_a_whole_model(lorica: Lorica, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert lorica("train", "model=minilm_full", "data=ag_news", f"run_dir={run}", *SMALL)[0] == 0
    card = (run / "model" / "README.md").read_text("utf-8")
    assert "All weights of" in card and "Base model: apache-2.0" in card and "every weight" in card
    scope: dict[str, object] = {}
    exec(_code(card).replace("<this folder>", str(run / "model")).replace("print", "str"), scope)


def test_a_card_of_weights_that_came_alone_says_what_is_known(tmp_path: Path) -> None:
    (tmp_path / "lorica.json").write_text(json.dumps({"task": "causal_lm", "base": "a/b", "weights": "adapter", "data": "patients"}))
    card = model_card.card(model_card.read(tmp_path, tmp_path, {}))
    assert "A LoRA adapter of `a/b`" in card and "medical advice" in card and "## Results" not in card and "## Training" not in card


def test_a_licence_is_stated_for_what_it_is_of_only(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,a,b\n")
    assert compose("train", ["model=mistral_qlora", "data=sentiment"]).model.license == "apache-2.0"
    other = compose("train", ["model=mistral_qlora", "model.base=a/b", "data=ag_news", "data.source=files", f"data.path={tmp_path}/a.csv"])
    assert other.model.license is None and other.data.license is None
    assert compose("train", ["model=mistral_qlora", "model.base=a/b", "model.license=mit", "data=ag_news"]).model.license == "mit"
