"""debug=accumulation: the same gradient however a step is cut into micro-batches, where means of means give another."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorica import accumulation

Lorica = Callable[..., tuple[int, str]]
DATA = ("data=healthcare_qa", "data.max_train_examples=30", "data.validation_fraction=0", "data.max_test_examples=4")


@pytest.mark.parametrize(("size", "accumulate"), [(1, 12), (4, 3), (12, 1)])
def test_a_step_of_twelve_rows_has_one_gradient(size: int, accumulate: int, tmp_path: Path, tiny_mistral: Path, lorica: Lorica) -> None:
    """30 rows: two steps of 12, and a last one of 6."""
    model = ["model=tiny_mistral_qlora", f"model.base={tiny_mistral}", "model.lora.lora_dropout=0.1", "trainer.accelerator=cpu"]
    batches = [f"trainer.batch_size={size}", f"trainer.accumulate_grad_batches={accumulate}", "trainer.group_by_length=false"]
    code, printed = lorica("train", "debug=accumulation", *model, *DATA, *batches, f"run_dir={tmp_path / 'run'}")
    assert code == 0 and "equal: in 32-true" in printed, printed
    found = json.loads((tmp_path / "run" / "accumulation.json").read_text())
    assert [w["rows"] for w in found["windows"]] == [12, 6] and found["exact"]
    for window in found["windows"]:
        assert window["whole"] and max(window["ours"], window["loss"]) < 1e-5
        assert window["stock"] > 1e-3 if accumulate > 1 else window["stock"] < 1e-5, "means of means weigh tokens by their micro-batch"
    assert not (tmp_path / "run" / "metrics.json").exists() and not (tmp_path / "run" / "checkpoints").exists()


def test_ranks_share_a_step_exactly(tmp_path: Path, tiny_mistral: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan of two ranks with two micro-batches each, both ranks' computed here."""
    measure = accumulation.measure

    def with_two_ranks(module: Any, data: Any, arithmetic: Any) -> Any:
        data.batching.world_size = 2
        data.connect(data.batching)
        return measure(module, data, arithmetic)

    monkeypatch.setattr(accumulation, "measure", with_two_ranks)
    model = ["model=tiny_mistral_qlora", f"model.base={tiny_mistral}", "trainer.accelerator=cpu", "trainer.devices=1"]
    batches = ["trainer.batch_size=3", "trainer.accumulate_grad_batches=2", "trainer.group_by_length=false"]
    code, printed = lorica("train", "debug=accumulation", *model, *DATA, *batches, f"run_dir={tmp_path / 'run'}")
    assert code == 0, printed
    windows = json.loads((tmp_path / "run" / "accumulation.json").read_text())["windows"]
    assert [(w["micro_batches"], w["rows"]) for w in windows] == [(4, 12), (4, 6)]
    assert max(w["ours"] for w in windows) < 1e-5 < 1e-3 < min(w["stock"] for w in windows)


def test_a_difference_is_not_called_equal() -> None:
    import torch

    window = accumulation.Window("first step", 2, 4, 100, ours=2e-3, stock=1e-2, loss=1e-7, whole=True)
    assert accumulation.report([window], torch.float32)[2] is False
    assert accumulation.report([window], torch.bfloat16)[2] is True
