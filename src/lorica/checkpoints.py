"""Resumable state: when it is written, how, and what it says of the run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer

from lorica import durable, states
from lorica.config import ConfigError
from lorica.metrics_log import MetricsLog
from lorica.models.weights import check_finite
from lorica.signals import Interrupted, Stop

SLACK = 1 << 20  # bytes of a state besides its tensors, at most
BESIDE = 1 << 30  # bytes of a state that is copied and written while training goes on; a larger one is waited for


class DurableIO(TorchCheckpointIO):
    """Lightning's reading and writing of states: on the disk with a manifest before it has its name, and never unpickled.

    A state is copied to host memory and written by a thread of its own; what goes wrong there is raised by the next call.

    Args:
        after: called by that thread when a state is on the disk.
    """

    def __init__(self, after: Callable[[], None] = lambda: None) -> None:
        self.after = after
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Begin to write; one state at a time.

        Raises:
            DiskFull: it does not fit, or the one before did not.
        """
        self.wait()
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        size = sum(t.nbytes for t in tensors(checkpoint)) + SLACK
        durable.check_room(path, size)
        if size > BESIDE:
            self._write(checkpoint, path, size)
            return
        copy = copied(checkpoint)

        def work() -> None:
            try:
                self._write(copy, path, size)
            except BaseException as e:
                self._error = e

        self._thread = threading.Thread(target=work, name="state")
        self._thread.start()

    def wait(self) -> None:
        """Until the state before is on the disk."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if (error := self._error) is not None:
            self._error = None
            raise error

    def _write(self, checkpoint: dict[str, Any], path: Path, size: int) -> None:
        with durable.replacing(path, size) as file:
            hashing = durable.Hashing(file)
            torch.save(checkpoint, cast(BinaryIO, hashing))
            durable.write_text(states.manifest_of(path), durable.manifest({path.name: hashing.digest.hexdigest()}))
        self.after()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = True) -> dict[str, Any]:
        return load(Path(path))


def copied(node: Any) -> Any:
    """Nested dicts and lists with their tensors as they are now, in host memory."""
    if isinstance(node, torch.Tensor):
        return node.detach().to("cpu", copy=True)
    if isinstance(node, dict):
        return {key: copied(value) for key, value in node.items()}
    return type(node)(copied(value) for value in node) if type(node) in (list, tuple) else node


def load(path: Path) -> dict[str, Any]:
    """A state, on the CPU; tensors and plain values only.

    Raises:
        ConfigError: it holds anything else.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        state["callbacks"][Checkpoints.__name__]["made_for"]["versions"]
    except OSError:
        raise
    except Exception as e:  # what a pickle names, or a damaged one raises, is anything
        raise ConfigError("resume", path, f"is no state of this program ({type(e).__name__})", "a new run, or an older state") from None
    return state


def tensors(node: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested dicts and lists."""
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, dict):
        for value in node.values():
            yield from tensors(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from tensors(value)


@dataclass
class When:
    """After which optimiser steps states are written.

    save: whether to save after a step. validated: whether a step is followed by validation, which is then waited for.
    """

    save: Callable[[int], bool]
    validated: Callable[[int], bool]


class Checkpoints(Callback):
    """Writes resumable state, after given steps and when the process is asked to stop.

    Where a step is also validated, the state is written after the validation, so that a resumed run does not miss it. A state written
    in a validation says so, and a resumed run begins with that validation.

    Args:
        io: Lightning's, which writes them.
        made_for: what a resumed run must agree with; kept in the state. pause: stops the clock of training.
        log, wandb_id: whose place and whose name go into the state. resumed: a state that training goes on from.
    """

    def __init__(
        self,
        run: Path,
        io: DurableIO,
        when: When,
        made_for: dict[str, Any],
        pause: Callable[[], None],
        stop: Stop,
        log: MetricsLog | None = None,
        wandb_id: str | None = None,
        resumed: dict[str, Any] | None = None,
    ) -> None:
        self.run, self.io, self.when, self.made_for, self.pause, self.stop = run, io, when, made_for, pause, stop
        self.metrics, self.wandb_id = log, wandb_id
        self.stopped = self.pending = False
        self.to_validate = bool(resumed and resumed["pending"])

    def state_dict(self) -> dict[str, Any]:
        return {
            "made_for": self.made_for,
            "stopped": self.stopped,
            "pending": self.pending,
            "log": self.metrics.position() if self.metrics is not None else None,
            "wandb_id": self.wandb_id,
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Signals wait for whole steps from here on; a validation that was broken off is made up for."""
        self.stop.listen()
        self.stop.deferred = True
        if not self.to_validate:
            return
        self.to_validate = False
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.restarting = False
        trainer.validating = True
        loop.run()
        trainer.training = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        asked, validated = self._asked(trainer), self.when.validated(step)
        if asked or (self.when.save(step) and not validated):
            self._save(trainer, pl_module, pending=validated)
        self._end(asked)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        if trainer.state.fn == "fit" and trainer.world_size == 1 and self.stop.asked is not None:  # ranks have other numbers of batches
            self._save(trainer, pl_module, pending=True)
            self._end(True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        asked = self._asked(trainer)
        if asked or self.when.save(trainer.global_step):
            self._save(trainer, pl_module, pending=False)
        self._end(asked)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.io.wait()
        self._end(self._asked(trainer))  # after the last state was saved
        self.stop.deferred = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with contextlib.suppress(Exception):  # what ends the run is another fault, or this one again
            self.io.wait()

    def _asked(self, trainer: Trainer) -> bool:
        """Whether to stop here: on all ranks where one was asked."""
        asked = self.stop.asked is not None
        return asked if trainer.world_size == 1 else bool(trainer.strategy.reduce_boolean_decision(asked, all=False))

    def _end(self, asked: bool) -> None:
        if asked:
            self.io.wait()
            self.stop.deferred = False
            raise Interrupted(self.stop.asked or 15)

    def _save(self, trainer: Trainer, pl_module: LightningModule, pending: bool) -> None:
        self.pause()
        step = trainer.global_step
        check_finite(pl_module, f"step {step}; the states before it are intact")
        self.stopped, self.pending = bool(trainer.should_stop), pending
        trainer.save_checkpoint(states.next_name(self.run, step))
