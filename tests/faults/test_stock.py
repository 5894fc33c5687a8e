"""The same faults under Lightning alone: what the promises of docs/reliability.md are measured against."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

pytestmark = pytest.mark.faults


class Plain(LightningModule):
    """A linear layer with dropout."""

    def __init__(self, nan_at: int = -1, signal_at: int = -1, stop_at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
        self.nan_at, self.signal_at, self.stop_at = nan_at, signal_at, stop_at
        self.rows: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.rows.append(float(batch[0, 0]))
        if self.global_step == self.signal_at:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.global_step == self.stop_at:
            raise RuntimeError("power cut")
        loss: torch.Tensor = self.net(batch).square().mean()
        return loss * float("nan") if self.global_step == self.nan_at else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.1)


def fit(model: Plain, folder: Path, resume: Path | None = None) -> Trainer:
    rows = torch.arange(48.0).view(12, 4)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)],
    )
    trainer.fit(model, DataLoader(rows, batch_size=2), ckpt_path=resume, weights_only=True)
    return trainer


def test_a_nan_loss_gets_into_the_weights_and_the_run_ends_well(tmp_path: Path) -> None:
    model = Plain(nan_at=2)
    trainer = fit(model, tmp_path)
    assert trainer.state.finished and any(p.isnan().any() for p in model.parameters())
    saved = torch.load(max(tmp_path.glob("*.ckpt"), key=os.path.getmtime), weights_only=True)["state_dict"]
    assert any(t.isnan().any() for t in saved.values())


def test_a_signal_saves_nothing(tmp_path: Path) -> None:
    with pytest.raises(BaseException, match=r"^$"):  # SIGTERMException
        fit(Plain(signal_at=2), tmp_path)
    assert sorted(f.name for f in tmp_path.glob("*.ckpt")) == ["step=2.ckpt"]  # step 3 was done


def test_a_resumed_run_reads_other_rows_and_ends_with_other_weights(tmp_path: Path) -> None:
    whole, cut, resumed = Plain(), Plain(stop_at=3), Plain()
    fit(whole, tmp_path / "whole")
    with pytest.raises(RuntimeError):
        fit(cut, tmp_path / "cut")
    fit(resumed, tmp_path / "resumed", tmp_path / "cut" / "step=2.ckpt")
    assert resumed.rows != whole.rows[2:]
    assert not all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def test_a_flipped_bit_loads_as_if_nothing_were(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({"w": torch.ones(1000)}, tmp_path / "w.safetensors")
    content = bytearray((tmp_path / "w.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "w.safetensors").write_bytes(content)
    assert not torch.equal(load_file(tmp_path / "w.safetensors")["w"], torch.ones(1000))
