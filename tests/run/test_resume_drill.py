"""debug=resume_drill: a run that was killed is compared with one that was not, and the first difference is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica.resume_drill import digest, first_divergence

Lorica = Callable[..., tuple[int, str]]


def _trace(*micro_steps: int, **changed: Any) -> list[dict[str, Any]]:
    return [
        {"micro_step": k, "rows": [k], "random numbers": "a", "loss": "0x1p0", **(changed if k == max(micro_steps) else {})}
        for k in micro_steps
    ]


@pytest.mark.parametrize(
    ("interrupted", "expected"),
    [
        (_trace(0, 1, 2, 3), None),
        (_trace(0, 1, 2) + _trace(1, 2, 3), None),
        (_trace(0, 1, 2, loss="0x1p1") + _trace(1, 2, 3), (2, ["loss"])),
        (_trace(0, 1, 2) + _trace(1, 2, 3, rows=[9], loss="0x1p1"), (3, ["rows", "loss"])),
        (_trace(0, 1, 2), (3, ["missing"])),
    ],
)
def test_the_first_difference_is_found(interrupted: list[dict[str, Any]], expected: Any) -> None:
    assert first_divergence(_trace(0, 1, 2, 3), interrupted) == expected


def test_one_bit_changes_a_digest() -> None:
    x = torch.zeros(3, dtype=torch.bfloat16)
    other = x.clone()
    other.view(torch.int16)[1] = 1
    assert digest([x]) == digest([x.clone()]) != digest([other])


@pytest.mark.slow
def test_a_drill_of_a_run_that_resumes_finds_nothing(tmp_path: Path, tiny_mistral: Path, lorica: Lorica) -> None:
    model = ["model=tiny_mistral_qlora", f"model.base={tiny_mistral}", "model.lora.lora_dropout=0.1", "data=sentiment"]
    few = ["data.max_train_examples=48", "data.max_validation_examples=4", "trainer.batch_size=2", "trainer.accumulate_grad_batches=2"]
    code, printed = lorica("train", "debug=resume_drill", *model, *few, "trainer.accelerator=cpu", f"run_dir={tmp_path / 'drill'}")
    assert code == 0, printed
    assert "identical: rows, learning rate, random numbers, loss, weights, optimiser of all 24 micro-steps" in " ".join(printed.split())
    found = json.loads((tmp_path / "drill" / "resume_drill.json").read_text())
    assert found["first_divergence"] is None and found["kept_weights_identical"] and found["trained_again"] > 0


def test_a_drill_is_refused_on_several_devices_and_in_a_grid(tmp_path: Path, lorica: Lorica) -> None:
    code, printed = lorica("train", "debug=resume_drill", "trainer.devices=2", f"run_dir={tmp_path / 'drill'}")
    assert code == 2 and "runs on one device" in printed and not (tmp_path / "drill").exists()
    code, printed = lorica("train", "-m", "debug=accumulation", "model.lora.r=4,8")
    assert code == 2 and "stops before training" in " ".join(printed.split())
