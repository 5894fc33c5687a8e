"""Rows shown before a question: of training only, of all labels in turn, the same for the same seed, and asked for a new text too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lorica.composition import compose
from lorica.config import ConfigError, NotApplicable
from lorica.data.asking import ask_text
from lorica.data.module import LoricaDataModule
from lorica.data.registry import build_data


def _data(*more: str, seed: int = 0) -> LoricaDataModule:
    data = build_data(compose("train", ["model=tiny_mistral_qlora", "data=sentiment", *more]).data, seed)
    data.load()
    return data


def test_what_is_shown_is_of_training_and_of_each_label_in_turn() -> None:
    data = _data("data.shots=6")
    template = data.describe()["prompt_template"]
    shown = [e for e in data.splits.train if f"{e.text}\n" in template]
    assert len(shown) == 6 and sorted(e.label or 0 for e in shown) == [0, 0, 1, 1, 2, 2]
    assert not [e for e in [*data.splits.test, *data.splits.validation] if f"{e.text}\n" in template]
    asked = data.splits.test[0].prompt
    assert asked.count("Sentiment:") == 7 and asked.endswith("Sentiment:") and data.splits.test[0].text in asked
    assert ask_text({**data.describe(), "labels": data.labels}, data.splits.test[0].text).prompt == asked


def test_the_seed_chooses_them() -> None:
    first, again, other = (_data("data.shots=3", seed=seed).describe()["prompt_template"] for seed in (0, 0, 1))
    assert first == again != other
    assert _data().describe()["prompt_template"].count("Sentiment:") == 1


def test_too_few_rows_and_models_that_read_no_prompt_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotApplicable, match="causal"):
        compose("train", ["model=minilm_lora", "data=sentiment", "data.shots=2"])
    with pytest.raises(ConfigError, match="short enough"):
        _data("data.shots=60", "data.max_train_examples=20", "trainer.batch_size=4", "trainer.tokens_per_batch=null")


@pytest.mark.slow
def test_a_model_is_tested_as_it_is_with_rows_shown(lorica: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    typed = ["model=tiny_mistral_qlora", "data=sentiment", "data.shots=2", "debug=fast", "trainer.max_steps=0", "model.max_length=512"]
    code, said = lorica("train", *typed, f"run_dir={tmp_path / 'run'}")
    assert code == 0, said
    template = json.loads((tmp_path / "run" / "adapter" / "lorica.json").read_text())["prompt_template"]
    assert template.count("Sentiment:") == 3
    assert lorica("predict", f"run={tmp_path / 'run'}", "text=good")[0] == 0
