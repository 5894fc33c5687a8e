"""How a peer that trains by HF's Trainer is timed: device-synchronised at the beginning of a step, the first steps left out.

The device is waited for only where a figure needs it, so that a peer's host may run ahead of it as Lorica's does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

WARM = 4  # steps left out
GPU = torch.cuda.is_available()


def now() -> float:
    """The time when the device has done what it was given."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):  # type: ignore[misc]
    """When steps 0, 1 and WARM begin. Peak memory is counted from the first step, as Lorica counts its own."""

    def __init__(self) -> None:
        self.begun = 0
        self.times: dict[int, float] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.begun in (0, 1, WARM):
            self.times[self.begun] = now()
        if GPU and self.begun == 0:
            torch.cuda.reset_peak_memory_stats()
        self.begun += 1


class Counted:
    """A collator that notes the tokens of each batch that are not padding; built in the training process (no workers)."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.collate = collate
        self.counts: list[int] = []

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        batch = self.collate(rows)
        mask = batch.get("attention_mask")
        self.counts.append(int(mask.sum()) if mask is not None and mask.dim() == 2 else batch["input_ids"].numel())
        return batch


def run(trainer: Any, clock: Clock, steps: int) -> tuple[float, dict[str, Any]]:
    """Train. Returns the seconds of the steps after the first WARM, and the figures that every peer has."""
    trainer.train()
    seconds = now() - clock.times[WARM]
    assert clock.begun == steps, f"{clock.begun} steps were taken, not {steps}: too few rows"
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    figures = {
        "first_step_seconds": clock.times[1] - clock.times[0],
        "step_seconds": seconds / (steps - WARM),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
    }
    return seconds, figures


def report(row: dict[str, Any]) -> None:
    """What `side_by_side.peer` reads."""
    print("ROW " + json.dumps(row), flush=True)
