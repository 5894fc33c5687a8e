"""The same training whatever the batching; the same weights after an interruption; nothing secret in a run folder."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorica import callbacks
from lorica.models.module import LoricaModule

Lorica = Callable[..., tuple[int, str]]
SMALL = ("data.max_train_examples=24", "data.max_validation_examples=8", "data.max_test_examples=8", "trainer.log_every_n_steps=1")


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_micro_batches_change_nothing(tmp_path: Path, tiny_mistral: Path, lorica: Lorica) -> None:
    """3 steps of 8 examples of different lengths as 8 x 1, 4 x 2 and 1 x 8, without dropout: the same adapters up to rounding."""
    model = ["model=tiny_mistral_qlora", f"model.base={tiny_mistral}", "data=sentiment"]
    runs = []
    for size, accumulate in ((8, 1), (4, 2), (1, 8)):
        run = tmp_path / f"{size}x{accumulate}"
        batches = [f"trainer.batch_size={size}", f"trainer.accumulate_grad_batches={accumulate}", "trainer.group_by_length=false"]
        code, printed = lorica(
            "train", *model, *SMALL, "trainer.max_epochs=1", "optimizer.name=sgd", "optimizer.lr=0.5", *batches, f"run_dir={run}"
        )
        assert code == 0, printed
        runs.append(_weights(run))
    for other in runs[1:]:
        for name, value in runs[0].items():
            assert (other[name] - value).norm() <= 1e-4 * value.norm() + 1e-7, name


def test_weights_laid_end_to_end_learn_the_same(tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on one GPU, with a validation in between: Lightning clears gradients there and before the first step."""
    runs = []
    for joined in (False, True):
        monkeypatch.setattr(LoricaModule, "joins", lambda self, joined=joined: joined)
        run = tmp_path / str(joined)
        steps = [
            "model.lora.r=16",
            "trainer.batch_size=4",
            "trainer.max_epochs=2",
            "trainer.val_check_interval=2",
            "trainer.accumulate_grad_batches=2",
        ]
        code, printed = lorica("train", *SMALL, *steps, f"run_dir={run}")
        assert code == 0, printed
        runs.append(_weights(run))
    moved = [name for name in runs[0] if "lora_B" in name]
    assert moved and all(runs[0][name].any() for name in moved)
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-5, atol=1e-7)


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [
        *SMALL,
        "trainer.batch_size=4",
        "trainer.max_epochs=2",
        "trainer.checkpoint_every_n_steps=3",
        "model.lora.lora_dropout=0.1",
    ]
    assert lorica("train", *arguments, f"run_dir={tmp_path / 'whole'}")[0] == 0
    record = callbacks.RecordLoss.on_train_batch_end

    def stop_at_8(self: callbacks.RecordLoss, trainer: object, pl_module: object, *rest: object) -> None:
        record(self, trainer, pl_module, *rest)  # type: ignore[arg-type]
        if trainer.global_step == 8:  # type: ignore[attr-defined]
            raise RuntimeError("power cut")

    with monkeypatch.context() as m:
        m.setattr(callbacks.RecordLoss, "on_train_batch_end", stop_at_8)
        code, printed = lorica("train", *arguments, f"run_dir={tmp_path / 'cut'}")
    assert code == 1 and "power cut" in printed
    code, printed = lorica("train", f"resume={tmp_path / 'cut'}")
    assert code == 0 and "resumed at micro-step 6" in printed
    whole, cut = _weights(tmp_path / "whole"), _weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert json.loads((tmp_path / "whole" / "metrics.json").read_text())["test/loss"] == pytest.approx(
        json.loads((tmp_path / "cut" / "metrics.json").read_text())["test/loss"], abs=1e-6
    )


def test_the_logged_learning_rate_is_the_steps_own(tmp_path: Path, lorica: Lorica) -> None:
    steps = [
        "trainer.batch_size=4",
        "trainer.max_steps=4",
        "optimizer.warmup_steps=2",
        "optimizer.lr=0.01",
        "optimizer.lr_scheduler_type=linear",
    ]
    assert lorica("train", *SMALL, *steps, f"run_dir={tmp_path / 'run'}")[0] == 0
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rates = [float(row["train/lr"]) for row in csv.DictReader(file) if row["train/lr"]]
    assert rates == pytest.approx([0, 0.005, 0.01, 0.005])


def test_resume_required_without_a_run_is_refused(tmp_path: Path, lorica: Lorica) -> None:
    code, printed = lorica("train", *SMALL, "resume=required", f"run_dir={tmp_path / 'none'}")
    assert code == 2 and "no unfinished run" in printed


def test_wandb_records_offline_and_secrets_reach_nothing(tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = ["hf_PLANTEDbyflag0123456789", "PLANTEDbyenvironment0123456789abcdef", "hf_PLANTEDbyyaml01234567890"]
    monkeypatch.setenv("HF_TOKEN", planted[1])
    (tmp_path / "conf" / "logger").mkdir(parents=True)
    (tmp_path / "conf" / "logger" / "mine.yaml").write_text(f"name: wandb\nproject: p\ntags: [{planted[2]}, {planted[1]}]\n")
    run = tmp_path / "run"
    flag = f"logger.run_name=note-{planted[0]}"
    code, printed = lorica("train", "--config-dir", str(tmp_path / "conf"), "debug=fast", "logger=mine", flag, f"run_dir={run}")
    assert code == 0, printed
    assert "offline" in printed and list((run / "wandb").glob("offline-run-*/*.wandb"))
    for file in run.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            for secret in planted:
                assert secret.encode() not in content, file
    assert not any(secret in printed for secret in planted)
