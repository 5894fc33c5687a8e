"""What happens around a step: seeding, validation points, progress, evaluation figures, best weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lorica.calibration import Calibration, calibrate, parse
from lorica.metrics import EvaluationMetrics
from lorica.models.module import LoricaModule
from lorica.screen import Screen


class SeedSteps(Callback):
    """Every random draw of a micro-step (dropout) follows from (seed, micro-step, rank), so that it is the same after a resume."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.set(trainer, pl_module, batch_idx)

    def set(self, trainer: Trainer, pl_module: LightningModule, micro_step: int) -> None:
        """Seed the generators of a micro-step."""
        seed = ((self.seed * 1_000_003 + micro_step) * 65_537 + trainer.global_rank) % (1 << 63)
        # not torch.manual_seed, which queues the seed with a formatted stack for every kind of device that is not in use: milliseconds
        torch.default_generator.manual_seed(seed)
        if pl_module.device.type in ("cuda", "mps"):
            getattr(torch, pl_module.device.type).manual_seed(seed)


class ValidationPoints(Callback):
    """Validate after given optimiser steps.

    A run is one Lightning epoch, so `trainer.val_check_batch`, the number of micro-steps whose multiples are validated, is set
    to the next point each time.
    """

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = steps

    def _aim(self, trainer: Trainer, done: int) -> None:
        points = (step * trainer.accumulate_grad_batches for step in self.steps)
        trainer.val_check_batch = next((p for p in points if p > done), float("inf"))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._aim(trainer, batch_idx)


class Throughput(Callback):
    """Counts tokens and examples of training on this rank, and the time they took without validation and checkpoints.

    What was counted before an interruption is kept in the checkpoint. The device is waited for only when the clock stops.

    Args:
        meter: tells joules from some time on; None: what training takes is not known.
    """

    def __init__(self, meter: Callable[[], float] | None = None) -> None:
        self.tokens = self.examples = 0
        self.seconds = 0.0
        self.joules: float | None = 0.0 if meter is not None else None
        self._meter, self._joules_before = meter, 0.0
        self._since: float | None = None
        self.first_step_seconds: float | None = None
        self.first_step_after = 0.0  # seconds from the run's beginning to that of its first step

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def elapsed(self) -> float:
        """Seconds of training until now, as the host sees them: the device is not waited for."""
        return self.seconds + (time.perf_counter() - self._since if self._since is not None else 0.0)

    def pause(self) -> None:
        """Stop the clock."""
        if self._since is not None:
            self.seconds += self._now() - self._since
            self._since = None
            self.joules = self._used()

    def _used(self) -> float | None:
        """Joules of training until now."""
        if self.joules is None or self._meter is None:
            return None
        return self.joules + self._meter() - self._joules_before

    def _start(self) -> None:
        self._since = self._now()
        if self._meter is not None:
            self._joules_before = self._meter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._since is None:
            self._start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.tokens += batch["count"]["tokens"]
        self.examples += batch["count"]["examples"]
        if self.first_step_seconds is None:
            self.pause()
            self.first_step_seconds = self.seconds
            self._start()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pause()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pause()

    def state_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "examples": self.examples,
            "seconds": self.elapsed(),
            "joules": self._used() if self._since is not None else self.joules,
            "first": self.first_step_seconds,
            "after": self.first_step_after,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tokens, self.examples, self.seconds = state_dict["tokens"], state_dict["examples"], state_dict["seconds"]
        self.first_step_seconds, self.first_step_after = state_dict["first"], state_dict.get("after", 0.0)
        self.joules = state_dict.get("joules") if self._meter is not None else None

    def figures(self, trainer: Trainer) -> dict[str, float]:
        """Rates a second over all ranks and all training time, the first micro-step (which allocates and loads kernels) included."""
        seconds = self.seconds
        tokens, examples, joules, known = over_ranks(trainer, self.tokens, self.examples, self.joules or 0.0, self.joules is not None)
        energy = {"train/energy_joules": joules} if known == trainer.world_size else {}
        return energy | {
            "train/tokens_per_second": tokens / max(seconds, 1e-9),
            "train/samples_per_second": examples / max(seconds, 1e-9),
            "train/seconds": seconds,
            "train/first_step_seconds": self.first_step_seconds or 0.0,
            "time/first_step_seconds": self.first_step_after + (self.first_step_seconds or 0.0),
        }


def over_ranks(trainer: Trainer, *counts: float) -> list[float]:
    """Sums over all ranks, each of which must call this."""
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return [float(c) for c in counts]
    own = torch.tensor([float(c) for c in counts], device=trainer.strategy.root_device)
    summed: list[float] = trainer.strategy.reduce(own, reduce_op="sum").tolist()  # type: ignore[union-attr]
    return summed


def of_ranks(trainer: Trainer, own: Any) -> list[Any]:
    """What every rank has, by rank, on each of them; each must call this."""
    if trainer.world_size == 1:
        return [own]
    found: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, own)
    return found


class RecordLoss(Callback):
    """train/loss, learning rate, epoch and rates every `trainer.log_every_n_steps` optimiser steps, and at the last."""

    def __init__(self, throughput: Throughput, every: int, total_steps: int, epoch_at: Callable[[int], float]) -> None:
        self.throughput, self.every, self.total_steps, self.epoch_at = throughput, every, total_steps, epoch_at
        self.last_logged = 0
        self.history: list[tuple[int, float]] = []
        self.tokens_per_second: float | None = None  # of all ranks, since the record before
        self._mark: tuple[int, float] | None = None
        self._lr = 0.0  # of the step under way; after it the schedule has moved on

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.last_logged = trainer.global_step
        self._mark = (self.throughput.tokens, self.throughput.elapsed())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._lr = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step == self.last_logged or (step % self.every and step != self.total_steps):
            return
        self.last_logged = step
        assert isinstance(pl_module, LoricaModule)
        loss = pl_module.read_loss()
        self.history.append((step, loss))
        figures = {"train/loss": loss, "train/lr": self._lr, "train/epoch": self.epoch_at(step)}
        now = self.throughput.elapsed()
        if self._mark is not None and now > self._mark[1]:
            tokens = over_ranks(trainer, self.throughput.tokens - self._mark[0])[0]
            self.tokens_per_second = figures["train/tokens_per_second"] = tokens / (now - self._mark[1])
        self._mark = (self.throughput.tokens, now)
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=step)
            logger.save()


class SkippedSteps(Callback):
    """Says which steps were skipped because their gradient was no number, and of which rows they were; ends the run after too many.

    On a CPU each step is looked at; elsewhere every `every` steps, since looking waits for the device.

    Args:
        most: in a row. rows_of: where the rows of an optimiser step come from. note: tells the user.
    """

    def __init__(self, most: int, every: int, rows_of: Callable[[int], str], note: Callable[[str], None]) -> None:
        self.most, self.every, self.rows_of, self.note = most, every, rows_of, note

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, LoricaModule)
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or (pl_module.device.type != "cpu" and step % self.every):
            return
        skipping = pl_module.skipping
        for bad in skipping.read():
            self.note(f"step {bad} was skipped: its gradient is NaN or infinite; rows {self.rows_of(bad)}")
        if skipping.in_a_row >= self.most:
            raise FloatingPointError(
                f"trainer.max_skipped_steps={self.most}: so many steps in a row, up to step {step}, had a gradient that is NaN or "
                f"infinite; the last were rows {self.rows_of(step)}. Try a smaller optimizer.lr or trainer.precision=32-true"
            )


class Evaluate(Callback):
    """Figures of validation and test passes; a test pass also keeps each row's scores for predictions.jsonl.

    Args:
        answer: generates texts for test prompts; called on rank 0 at the end of a test pass, while the model is still on its device.
    """

    def __init__(self, labels: Sequence[str] | None, answer: Callable[[], list[str]] | None = None) -> None:
        self.labels, self.answer = labels, answer
        self.answers: list[str] = []
        self.metrics: EvaluationMetrics | None = None
        self.figures: dict[str, float] = {}
        self.confusion: list[list[int]] | None = None
        self.rows: dict[int, list[float]] = {}  # test row -> its labels' log-probabilities
        self.scored: list[tuple[torch.Tensor, torch.Tensor]] = []  # of the latest validation: log-probabilities [B, K], labels [B]
        self.at_step: int | None = None  # the step that figures are of, where nothing is left to train

    def _start(self, pl_module: LightningModule) -> None:
        if self.metrics is None:
            self.metrics = EvaluationMetrics(self.labels).to(pl_module.device)
        self.metrics.reset()

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)
        self.scored = []

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)
        self.rows = {}

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        assert self.metrics is not None
        self.metrics.update(outputs, batch.get("labels"))
        if "scores" in outputs and trainer.state.fn != "test":
            self.scored.append((outputs["scores"], batch["labels"]))

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if "scores" in outputs:
            self.rows |= dict(zip(batch["index"], outputs["scores"].float().tolist(), strict=True))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer, pl_module, "test")
        if trainer.is_global_zero and self.answer is not None:
            self.answers = self.answer()

    def calibration(self, trainer: Trainer) -> Calibration | None:
        """Of the latest validation, over all ranks; None where there are no labels."""
        if self.labels is None:
            return None
        own = [torch.cat(parts).cpu() for parts in zip(*self.scored, strict=True)] if self.scored else []
        ranks = [rank for rank in of_ranks(trainer, own) if rank]
        if not ranks:
            return None
        scores, labels = (torch.cat([rank[i] for rank in ranks]) for i in (0, 1))
        return calibrate(scores.double().numpy(), labels.numpy())

    def _finish(self, trainer: Trainer, pl_module: LightningModule, prefix: str) -> None:
        assert self.metrics is not None
        figures, confusion = self.metrics.compute()
        self.figures = {f"{prefix}/{name}": value for name, value in figures.items()}
        self.confusion = confusion
        if prefix == "val":
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in self.figures.items()})
        for logger in trainer.loggers:
            logger.log_metrics(self.figures, step=trainer.global_step if self.at_step is None else self.at_step)
            logger.save()


class KeepBest(Callback):
    """Writes the weights whenever the validation figure is the best so far.

    Args:
        monitor: `val/f1_macro` or such (higher is better), or `val/loss` (lower is better).
        write: writes the weights, with the calibration of their validation; called on rank 0 only.
        calibrate: the calibration of the latest validation; called on every rank.
    """

    def __init__(
        self, monitor: str, write: Callable[[Calibration | None], None], calibrate: Callable[[Trainer], Calibration | None]
    ) -> None:
        self.monitor, self._write, self.calibrate = monitor, write, calibrate
        self.calibration: Calibration | None = None
        self.sign = -1.0 if monitor.endswith("loss") else 1.0
        self.best: float | None = None
        self.best_step = 0
        self.at_step: int | None = None  # the step that is validated, where nothing is left to train

    def state_dict(self) -> dict[str, Any]:
        calibration = asdict(self.calibration) if self.calibration is not None else None
        return {"best": self.best, "best_step": self.best_step, "calibration": calibration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]
        kept = state_dict.get("calibration")  # states of earlier versions have none
        self.calibration = parse(kept, "the checkpoint") if kept else None

    def write(self) -> None:
        """Write the weights as they are."""
        self._write(self.calibration)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.state.fn != "fit" and self.at_step is None) or self.monitor not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.monitor])
        if value == value and (self.best is None or self.sign * value > self.sign * self.best):
            self.best, self.best_step = value, trainer.global_step if self.at_step is None else self.at_step
            self.calibration = self.calibrate(trainer)
            if trainer.is_global_zero:
                self.write()


LINE_SECONDS = 15.0  # between two lines of progress where no bar can be drawn


class ShowProgress(Callback):
    """A bar with loss, tokens/s and time left on a terminal; a plain line every so often elsewhere."""

    def __init__(self, screen: Screen, record: RecordLoss, total: int, enabled: bool) -> None:
        self.screen, self.record, self.total = screen, record, total
        self.enabled = enabled
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.eval_task: TaskID | None = None
        self._last_line = 0.0

    def _loss(self) -> str:
        return f"{self.record.history[-1][1]:.4f}" if self.record.history else "-"

    def _rate(self) -> str:
        rate = self.record.tokens_per_second
        return f"{rate:,.0f} tokens/s" if rate is not None else ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled and trainer.is_global_zero and self.screen.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
            self.bar = Progress(
                *columns,
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self.screen.console,
                refresh_per_second=4,
            )
            self.bar.start()
            self.task = self.bar.add_task("train", total=self.total, completed=trainer.global_step, note="")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not (self.enabled and trainer.is_global_zero):
            return
        step = trainer.global_step
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, note=f"loss {self._loss()}  {self._rate()}")
        elif self.record.history and (time.perf_counter() - self._last_line > LINE_SECONDS or step == self.total):
            self._last_line = time.perf_counter()
            at = self.record.history[-1][0]
            recorded = "" if at == step else f" (at step {at})"
            self.screen.print(f"step {step}/{self.total}  loss {self._loss()}{recorded}  {self._rate()}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is not None and trainer.state.fn == "fit":
            total = sum(int(n) for n in trainer.num_val_batches)
            self.eval_task = self.bar.add_task("validate", total=total, note="")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.bar is not None and self.eval_task is not None:
            self.bar.advance(self.eval_task)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is not None and self.eval_task is not None:
            self.bar.remove_task(self.eval_task)
            self.eval_task = None
        figures = {
            k.removeprefix("val/"): float(v)
            for k, v in trainer.callback_metrics.items()
            if k in ("val/loss", "val/accuracy", "val/f1_macro", "val/perplexity")
        }
        if self.enabled and trainer.is_global_zero and trainer.state.fn == "fit":
            self.screen.print(
                f"step {trainer.global_step:>6}  validation  " + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()), highlight=False
            )

    def stop(self) -> None:
        """Take the bar down."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.stop()
