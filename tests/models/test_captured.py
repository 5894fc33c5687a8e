"""A step that is replayed counts, weighs and learns as one that is run: here its place is taken by one that runs when it is replayed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from lorica.config import OptimizerConfig
from lorica.models.captured import WARM_UP, CapturedSteps
from lorica.models.module import LoricaModule

ACCUMULATE = 3


class Regression(LoricaModule):
    """Summed squares."""

    def loss_sum(self, batch: dict[str, Any]) -> torch.Tensor:
        return (self.model(batch["input_ids"]) - batch["y"]).square().sum()

    def evaluate(self, batch: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError


class Replayed:
    """CapturedSteps without a GPU: gradients come into being in `replay`, and are added to the tensors that were there at first."""

    def __init__(self, module: LoricaModule, covered: set[int]) -> None:
        self.module, self.covered, self.replayed = module, covered, 0
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        self.places = [p.grad for p in module.parameters()]

    def peak(self) -> int:
        return 7

    def covers(self, batch: dict[str, Any]) -> bool:
        return batch["input_ids"].numel() in self.covered

    def replay(self, batch: dict[str, Any]) -> torch.Tensor:
        assert all(p.grad is place for p, place in zip(self.module.parameters(), self.places, strict=True))
        total = self.module.loss_sum(batch)
        (total * (batch["weight"] / ACCUMULATE)).backward()
        self.replayed += 1
        return total.detach()


def _batches() -> list[dict[str, Any]]:
    """Micro-batches of two sizes; one is empty and runs for company (weight 0)."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for i in range(4 * ACCUMULATE):
        rows = 2 + i % 2
        x = torch.randn(rows, 3, generator=generator)
        empty = i == 7
        count = {"examples": rows * (not empty), "tokens": rows * (not empty), "supervised": rows * (not empty), "epoch": 0}
        weight = 0.0 if empty else ACCUMULATE / 7
        batches.append({"input_ids": x, "y": x.sum(1, keepdim=True), "weight": weight, "count": count})
    return batches


def _trained(covered: set[int] | None, clip: float | None) -> tuple[list[torch.Tensor], float, int, int]:
    torch.manual_seed(0)
    module = Regression(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), OptimizerConfig(name="adamw", lr=0.05), 4)
    made: list[Replayed] = []
    if covered is not None:
        module.capture = lambda: made.append(Replayed(module, covered)) or made[0]  # type: ignore[assignment, return-value, func-returns-value]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(_batches(), batch_size=None))  # type: ignore[arg-type]
    assert module.captured is None, "its memory is held after training"
    replayed = made[0].replayed if made else 0
    supervised = module.supervised_account
    return [p.detach() for p in module.parameters()], module.read_loss(), supervised, replayed


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(("covered", "replayed"), [({6, 9}, 12), ({6}, 6), (set(), 0)], ids=["all", "of one size", "none"])
def test_replayed_steps_learn_and_count_as_steps_that_are_run(covered: set[int], replayed: int, clip: float | None) -> None:
    expected, loss, supervised, _ = _trained(None, clip)
    ours, our_loss, our_supervised, count = _trained(covered, clip)
    assert count == replayed and our_supervised == supervised == sum(b["count"]["supervised"] for b in _batches())
    assert our_loss == pytest.approx(loss, rel=1e-6) and loss > 0
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_a_step_that_is_replayed_runs_nothing_before_backward() -> None:
    module = Regression(nn.Linear(3, 1), OptimizerConfig(), 1)
    module.captured = steps = Replayed(module, {6})  # type: ignore[assignment]
    batch = _batches()[0]
    loss = module.training_step(batch, 0)
    assert steps.replayed == 0 and loss == 0 and not loss.requires_grad and module.loss_account is None
    module.backward(loss)
    assert steps.replayed == 1 and module.supervised_account == 2
    assert module.loss_account is not None and torch.equal(module.loss_account, module.loss_sum(batch).detach())
    other = _batches()[1]
    module.backward(module.training_step(other, 1))
    assert steps.replayed == 1 and module.supervised_account == 5


def test_gradients_are_cleared_in_place_where_something_holds_them() -> None:
    for joined, captured, kept in ((False, False, False), (True, False, True), (False, True, True)):
        module = Regression(nn.Linear(3, 1), OptimizerConfig(), 1)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module.joined = joined
        module.captured = Replayed(module, set()) if captured else None  # type: ignore[assignment]
        module.loss_sum(_batches()[0]).backward()
        before = [p.grad for p in module.parameters()]
        module.optimizer_zero_grad(0, 0, optimizer)
        after = [p.grad for p in module.parameters()]
        assert all(a is b and (a == 0).all() for a, b in zip(after, before, strict=True)) if kept else after == [None, None]


def test_all_sizes_are_warmed_up_before_the_first_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph keeps its memory to itself: what runs uncaptured after it would need its own beside that."""
    happened: list[tuple[str, int]] = []
    capturing = False

    @contextmanager
    def graph(*given: Any, **named: Any) -> Iterator[None]:
        nonlocal capturing
        capturing = True
        yield
        capturing = False

    def loss_sum(batch: dict[str, Any]) -> torch.Tensor:
        happened.append(("captured" if capturing else "run", batch["input_ids"].numel()))
        return torch.zeros((), requires_grad=True)

    for name in ("Stream", "CUDAGraph", "graph_pool_handle", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("max_memory_allocated", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    steps = CapturedSteps(loss_sum, nullcontext, 1)
    batches = [{"input_ids": torch.zeros(size, dtype=torch.long), "max_seqlen": size} for size in (128, 64)]
    steps.capture(batches)
    assert happened == [("run", 128), ("run", 64)] * WARM_UP + [("captured", 128), ("captured", 64)]
    assert all(map(steps.covers, batches))
