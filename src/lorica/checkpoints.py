"""Resumable state: when it is written, and what it says of the run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Checkpoints(Callback):
    """Resumable state after given optimiser steps: the newest stays, the one before goes when the newest is on the disk.

    Where a step is also validated, the state is written after the validation, so that a resumed run does not miss it.

    The state also says of which plan and precision it is, and whether early stopping had ended the training.

    Args:
        steps: whether to save after a step. validated: whether a step is followed by validation.
        made_for: what a resumed run must agree with; kept in the state. pause: stops the clock of training.
    """

    def __init__(
        self,
        folder: Path,
        steps: Callable[[int], bool],
        validated: Callable[[int], bool],
        made_for: dict[str, str],
        pause: Callable[[], None],
    ) -> None:
        self.folder, self.steps, self.validated, self.made_for, self.pause = folder, steps, validated, made_for, pause
        self.stopped = False

    def state_dict(self) -> dict[str, Any]:
        return {"made_for": self.made_for, "stopped": self.stopped}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole_step and self.steps(trainer.global_step) and not self.validated(trainer.global_step):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and self.steps(trainer.global_step):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self.pause()
        self.stopped = bool(trainer.should_stop)
        path = self.folder / f"step-{trainer.global_step:09d}.ckpt"
        temporary = self.folder / f".{path.name}.tmp"
        self.folder.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(temporary)
        if not trainer.is_global_zero:
            return
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        for old in self.folder.glob("step-*.ckpt"):
            if old != path:
                with contextlib.suppress(OSError):
                    old.unlink()
