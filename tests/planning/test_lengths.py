"""Lengths of rows before a run, beside what the run itself makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lorica.composition import compose
from lorica.config import ConfigError
from lorica.planning import lengths as lengths_module
from lorica.planning.lengths import look


def own(overrides: list[str], tiny: Path) -> tuple[list[int], list[int]]:
    """(tokens, learnt ones) of the training rows, as training encodes them."""
    from lorica.data.encoding import build_encoder
    from lorica.data.registry import build_data
    from lorica.models import base, weights

    config = compose("train", overrides)
    data = build_data(config.data, config.seed)
    data.load()
    tokenizer = base.load_tokenizer(base.find_base(config.model.base, None))
    data.encode(build_encoder(weights.asked(config, data), tokenizer))
    return [len(r.ids) for r in data.train_rows], [r.supervised for r in data.train_rows]


@pytest.mark.parametrize("data", ["sentiment", "healthcare_qa", "ag_news"])
@pytest.mark.parametrize("max_length", [40, 1024])
def test_they_are_those_of_training(data: str, max_length: int, tiny_mistral: Path) -> None:
    overrides = ["model=tiny_mistral_qlora", f"model.base={tiny_mistral}", f"data={data}", f"model.max_length={max_length}"]
    found = look(compose("train", overrides), 10_000)
    assert found is not None and found.counted
    tokens, learnt = own(overrides, tiny_mistral)
    counted, of_answers = found.cut(max_length)
    assert counted.tolist() == tokens and found.rows == len(tokens)
    assert of_answers.tolist() == learnt


def test_a_classifiers_rows_are_counted_too() -> None:
    overrides = ["model=minilm_lora", "data=sentiment", "model.max_length=16"]
    found = look(compose("train", overrides), 10_000)
    assert found is not None and found.counted and found.labels == 3
    assert found.cut(16)[0].tolist() == own(overrides, Path())[0]
    assert found.shortened(16)[0] > 0.5 and found.shortened(16)[1] == 0.0


def test_without_the_tokenizer_letters_are_counted() -> None:
    found = look(compose("train", ["model=mistral_qlora", "data=healthcare_qa"]), 10_000)
    assert found is not None and not found.counted
    assert 100 < float((found.prompts + found.answers).mean()) < 400


def test_of_a_large_file_the_first_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_mistral: Path) -> None:
    file = tmp_path / "train.jsonl"
    rows = [{"instruction": f"word {i} " * (3 + i % 9), "output": "an answer"} for i in range(5000)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(lengths_module, "LARGE", 1000)
    overrides = ["model=tiny_mistral_qlora", f"model.base={tiny_mistral}", "data=instruction", "data.source=files", f"data.path={file}"]
    found = look(compose("train", [*overrides, "data.input_column=null"]), 500)
    assert found is not None and len(found.prompts) == 500
    assert found.rows == pytest.approx(0.8 * 5000, rel=0.15)
    few = look(compose("train", [*overrides, "data.input_column=null", "data.max_train_examples=300"]), 500)
    assert few is not None and few.rows == 300


def test_a_large_file_in_the_order_of_its_labels_has_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "train.csv"
    file.write_text("text,label\n" + "".join(f"some text {i},kind{i // 1000}\n" for i in range(3000)))
    monkeypatch.setattr(lengths_module, "LARGE", 1000)
    keys = ["data.text_column=text", "data.label_column=label"]
    found = look(compose("train", ["model=minilm_lora", "data=classification", f"data.path={file}", *keys]), 100)
    assert found is not None and found.labels == 3


def test_a_large_file_without_a_row_that_can_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "train.csv"
    file.write_text("question,answer\n" + "what is it,\n" * 1000)
    monkeypatch.setattr(lengths_module, "LARGE", 1000)
    keys = ["data.prompt_column=question", "data.input_column=null", "data.completion_column=answer"]
    for wrong in ([], ["data.completion_column=reply"]):
        with pytest.raises(ConfigError, match="it has question, answer" if wrong else "none of its first 200 rows"):
            look(compose("train", ["model=mistral_qlora", "data=instruction", f"data.path={file}", *keys, *wrong]), 100)


def test_rows_on_the_hub_are_not_asked_for() -> None:
    assert look(compose("train", ["data=ag_news", "data.source=hub"]), 100) is None


def test_shares_that_are_cut() -> None:
    found = lengths_module.Lengths(np.array([10, 90, 10]), np.array([10, 10, 90]), 3, True, 0, False)
    assert found.shortened(60) == (2 / 3, 1 / 3)
    assert found.cut(60)[1].tolist() == [10, 10, 50]
