"""Before training: real micro-batches are run to compile the layers, to see how much memory they take, and to choose by that how many
layers are computed again in backward. None of it leaves a trace in weights, gradients or random numbers."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch._dynamo.exc
import torch._inductor.exc

from lorica import caches
from lorica.config import ConfigError, TrainConfig
from lorica.data.module import LoricaDataModule
from lorica.hardware import Machine, forget, grow_segments, memory_limit
from lorica.kernels import frozen
from lorica.kernels.embedding import keep_on_host
from lorica.kernels.layers import Layers
from lorica.models.captured import CapturedSteps, waiting_refused
from lorica.models.loaded import Loaded
from lorica.models.module import LoricaModule
from lorica.models.optimizers import effective_name, state_bytes

SPARE = 0.06  # share of the memory that is left free: fragments, evaluation, library workspaces
SPARE_BYTES = 256 << 20
PLENTY = 2  # times the plain weights' bytes
LONG = 0.5  # seconds of a micro-step that need not be captured where the host keeps ahead of the GPU
# Of a micro-step's time: so long at least the GPU works on after all is launched where the host keeps ahead of it. The host is at most
# some thousand launches ahead.
AHEAD = 0.05
WORTH_COMPILING = 60  # micro-steps: compiling takes as long as it saves in about as many


class TooLarge(ConfigError):
    """The largest micro-batch does not fit into the GPU's memory."""


@dataclass
class Fit:
    """How a run's micro-steps will run.

    seconds: what finding out took, compilation included. notes: what the user did not ask for but should know.
    """

    layers: int
    recomputed: int
    offload: bool
    compiled: bool
    captured: bool = False
    resident: bool = False
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        ways = ["compiled" if self.compiled else "not compiled"]
        if self.captured:
            ways.append("whole micro-steps captured as CUDA graphs")
        if self.resident:
            ways.append("4-bit weights kept plain as well")
        if self.recomputed == 0:
            ways.append("activations kept")
        elif self.recomputed == self.layers:
            ways.append("every layer computed again in backward" + (", its input in host memory meanwhile" if self.offload else ""))
        else:
            ways.append(f"{self.recomputed} of {self.layers} computed again in backward")
        return ", ".join(ways)


def compiles(asked: bool | None, began: bool | None, loaded: Loaded, device: torch.device, micro_steps: int) -> bool:
    """Whether the layers are compiled.

    Args:
        asked: `trainer.compile`. began: what a run that goes on began with. micro_steps: of the whole run.
    Raises:
        ConfigError: it is asked for where it can't be.
    """
    lacking = [
        why
        for why, lacks in (
            ("needs an NVIDIA GPU", device.type != "cuda"),
            ("needs variable-length attention, which this GPU, precision or architecture lacks", loaded.padded),
            ("does not know this architecture's layers", not len(loaded.layers)),
            (
                "needs Triton and a C compiler",
                not (find_spec("triton") and (os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc"))),
            ),
        )
        if lacks
    ]
    if asked and lacking:
        raise ConfigError("trainer.compile", True, lacking[0], "trainer.compile=null")
    if asked is not None or lacking:
        return bool(asked)
    return micro_steps >= WORTH_COMPILING if began is None else began


def prepare(module: LoricaModule, config: TrainConfig, machine: Machine, host_embeddings: bool) -> None:
    """Put the module on its device, its frozen weights as they were asked for: before training, and before a test alone.

    Args:
        host_embeddings: the input embeddings stay in host memory.
    Raises:
        ConfigError: the model can't do what is asked.
    """
    trainer = config.trainer
    module.to(machine.device).train()
    if host_embeddings and not keep_on_host(module.whole):
        raise ConfigError(
            "trainer.offload_embeddings",
            True,
            "this model's input embeddings are trained, or are its output head's too",
            "trainer.offload_embeddings=false",
        )
    if config.model.lora is not None:
        frozen.prepare_layers(module.model, machine.compute_dtype, trainer.fp8, bool(trainer.resident_weights))


def fit(
    module: LoricaModule,
    layers: Layers,
    data: LoricaDataModule,
    machine: Machine,
    config: TrainConfig,
    compiled: bool,
    room_for_evaluation: bool,
    arithmetic: Callable[[], AbstractContextManager[Any]],
    note: Callable[[str], None],
) -> Fit:
    """Set how the layers of a prepared module run, and find out on a GPU what fits.

    Args:
        compiled: see `compiles`; `data` then fills its batches up. room_for_evaluation: leave it, for batches no larger than those
            of training, so that micro-steps can be captured. arithmetic: a context for forwards (autocast), made anew for each use.
        note: tells the user of what could not be done later.
    Raises:
        TooLarge: the largest micro-batch does not fit, or not as asked.
        ConfigError: what is asked for can't be done.
    """
    trainer, device, asked = config.trainer, machine.device, config.trainer.gradient_checkpointing
    if asked and not len(layers):
        raise ConfigError(
            "trainer.gradient_checkpointing", asked, "this architecture's layers are not known", "trainer.gradient_checkpointing=null"
        )
    if device.type != "cuda" or not len(layers):
        layers.recomputed, layers.offload = amount(asked or False, len(layers))
        return Fit(len(layers), layers.recomputed, layers.offload, False)
    if compiled:
        caches.keep_compiled()
        data.fill_batches()
    batches = [_on(device, batch) for batch in data.largest_batches()]
    fitting = Fitting(module, layers, batches, arithmetic)
    lora = config.model.lora
    if trainer.resident_weights is None and lora is not None and not lora.use_dora and lora.bias == "none":
        fitting.keep_plain = partial(frozen.prepare_layers, module.model, machine.compute_dtype, trainer.fp8, True)
    name, _ = effective_name(str(config.optimizer.name), device)
    fitting.room = _evaluation(fitting, data, device, small=True) if room_for_evaluation else 0
    found = fitting.fit(asked, compiled, name)
    evaluation = fitting.room or _evaluation(fitting, data, device)
    module.roomy = found.recomputed < found.layers  # memory is not short
    if why := effective_name(name, device, module.roomy)[1]:
        found.notes.append(why)
    short = fitting.peak + evaluation > fitting.limit()
    hindrances = [
        why
        for why, hinders in (
            ("its layers are not compiled", not found.compiled),
            ("there are several devices", machine.world_size > 1),
            ("the precision is 16-mixed", machine.precision == "16-mixed"),
            ("anomalies are looked for", trainer.detect_anomaly),
            ("layers with dropout are computed again", bool(found.recomputed) and layers.random),
            ("a head with dropout is computed again", not all(map(module.capturable, batches))),
            # graphs hold on to their memory, evaluation comes between them, and a capture that fails keeps what it took (pytorch#190348)
            ("memory is short", short),
            ("it takes long", trainer.cuda_graphs is None and fitting.takes_long()),
        )
        if hinders
    ]
    if trainer.cuda_graphs and hindrances:
        found.notes.append(f"trainer.cuda_graphs=true: a micro-step can't be captured where {hindrances[0]}")
    if trainer.cuda_graphs is not False and not hindrances:  # all sizes or none: captured ones can't lend their memory to others
        module.capture = partial(fitting.capture, data.plan.accumulate, note)
        found.captured = True
    elif short:
        grow_segments()
    return found


def _on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def _evaluation(fitting: Fitting, data: LoricaDataModule, device: torch.device, small: bool = False) -> int:
    """Bytes that evaluation takes; its batches are made smaller until the largest takes no more than training does, in memory or in tokens.

    Args:
        small: in tokens.
    Raises:
        ConfigError: not even single rows fit.
    """
    while data.batching.world_size == 1 and (batch := data.largest_evaluation_batch()) is not None:  # ranks must have the same batches
        size, rows = fitting.evaluation_bytes(_on(device, batch)), len(batch["index"])
        least = rows == 1 or batch["input_ids"].numel() <= fitting.batches[-1]["input_ids"].numel()
        if size is not None and (least or (not small and torch.cuda.memory_allocated(device) + fitting.stay + size <= fitting.peak)):
            return size
        if rows == 1:
            raise ConfigError(
                "model.max_length", batch["input_ids"].numel(), "one row of so many tokens does not fit into the GPU's memory"
            )
        data.batching.eval_tokens //= 2
    return 0


class Fitting:
    """Runs micro-batches of a module before training.

    Args:
        batches: one for each size that training will meet, on the device, the largest last.
        arithmetic: a context for forwards (autocast), made anew for each use.

    Attributes:
        keep_plain: lets 4-bit weights stay plain, where that may be decided here. room: bytes to be left beside a micro-step.
        stay: bytes of the optimiser's state and of gradients, which stay through evaluation. peak: bytes of the largest micro-batch, with
            all that stays. seconds: of a micro-step of each batch, and how many of them the GPU worked on after all was launched.
            Known after `fit`.
    """

    keep_plain: Callable[[], None] | None = None
    room = 0

    def __init__(
        self, module: LoricaModule, layers: Layers, batches: list[dict[str, Any]], arithmetic: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.module, self.layers, self.batches, self.arithmetic = module, layers, batches, arithmetic

    def fit(self, asked: bool | int | str | None, compiled: bool, optimizer: str) -> Fit:
        """Choose and set how the layers run.

        Args:
            asked: `trainer.gradient_checkpointing`; None: what fits. optimizer: its name, whose state comes on top.
        Raises:
            ConfigError: the largest micro-batch does not fit, or not as asked.
        """
        begun, notes = time.perf_counter(), []
        self._watch()
        self.layers.compile(compiled)
        try:
            self._set(asked, optimizer)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as e:
            if not compiled:
                raise
            compiled, self.room = False, 0
            notes.append(f"the layers could not be compiled ({type(e).__name__}: {str(e).splitlines()[0]}): they run as they are")
            self.layers.compile(False)
            self._forget()
            self._set(asked, optimizer)
        self._forget()
        layers, seconds = self.layers, time.perf_counter() - begun
        return Fit(len(layers), layers.recomputed, layers.offload, compiled, resident=self.resident, seconds=seconds, notes=notes)

    def _watch(self) -> None:
        """See whether the layers draw random numbers, as the device's generator shows."""
        self.layers.recomputed, self.layers.offload, self.layers.watching = len(self.layers), False, True
        with suppress(torch.cuda.OutOfMemoryError):
            self._run(self.batches[0])
        self.layers.watching = False
        self._forget()

    def _hold(self, size: int) -> torch.Tensor:
        """Memory that is in use while micro-batches are tried, as the optimiser's state will be."""
        return torch.empty(size, dtype=torch.uint8, device=self.module.device)

    def _set(self, asked: bool | int | str | None, optimizer: str) -> None:
        state = state_bytes(self.module, optimizer)
        self.stay = state + sum(p.numel() * p.element_size() for p in self.module.parameters() if p.requires_grad)
        try:
            held = self._hold(state)
        except torch.cuda.OutOfMemoryError:
            raise self._too_large("beside the optimiser's state", "optimizer.name=adamw_8bit") from None
        if not self._keeps_plain(asked):
            if asked is None:
                self._choose()
            else:
                self.layers.recomputed, self.layers.offload = amount(asked, len(self.layers))
                if not self._fits():
                    raise self._too_large("as asked", "trainer.gradient_checkpointing=null")
        torch.cuda.reset_peak_memory_stats()
        self.seconds = [self._timed(batch) for batch in self.batches]
        self.peak = torch.cuda.max_memory_allocated()
        del held

    def _keeps_plain(self, asked: bool | int | str | None) -> bool:
        """Let 4-bit weights stay plain, if that may be and there is plenty of room besides for all activations."""
        plain = frozen.plain_bytes(self.module.model)
        self.resident = not asked and self.keep_plain is not None and 0 < PLENTY * plain < self._free()
        if self.resident:
            assert self.keep_plain is not None
            self.keep_plain()
            self.layers.recomputed, self.layers.offload = 0, False
            self.resident = self._fits() and torch.cuda.max_memory_allocated() < self.limit() - self.room
            if not self.resident:
                frozen.release(self.module.model)
                self._forget()
        return self.resident

    def _free(self) -> int:
        return memory_limit(self.module.device) - torch.cuda.memory_allocated(self.module.device)

    def limit(self) -> float:
        """Bytes that may be taken when there is a choice."""
        return memory_limit(self.module.device) * (1 - SPARE) - SPARE_BYTES

    def _choose(self) -> None:
        """Recompute as few layers as can be; where there can be room for evaluation, and micro-steps can be captured then, as leave it."""
        layers = self.layers
        layers.recomputed, layers.offload = len(layers) - 1, False  # the last keeps its activations, to see how much they are
        layers.measuring = True
        measured = self._fits()
        layers.measuring = False
        if measured:
            more = max(1, layers.kept[len(layers) - 1] - layers.kept[0])  # for each layer that keeps its own
            keep = 1 + int((self.limit() - self.room - torch.cuda.max_memory_allocated()) // more)
            layers.recomputed = min(len(layers), max(0, len(layers) - keep))
            while not (fits := self._fits()) or (self.room and self._lacks_room()):
                if layers.recomputed == len(layers):
                    break
                layers.recomputed = min(len(layers), layers.recomputed + (1 if fits else max(1, len(layers) // 8)))
            if self.room and (not fits or self._lacks_room() or (layers.recomputed and layers.random)):
                self.room = 0
                self._choose()
                return
            if fits:
                return
        layers.recomputed, layers.offload = len(layers), False
        if not self._fits():
            layers.offload = True
            if not self._fits():
                raise self._too_large("even with every layer computed again in backward", "a smaller trainer.tokens_per_batch")
        if self._lacks_room():
            self.room = 0

    def _lacks_room(self) -> bool:
        return torch.cuda.max_memory_allocated() > self.limit() - self.room

    def _fits(self) -> bool:
        """Whether the largest micro-batch runs, with gradients left from one before."""
        try:
            self._run(self.batches[-1])
            torch.cuda.reset_peak_memory_stats()  # what compiling takes is not asked for again
            self._run(self.batches[-1])
            return True
        except RuntimeError as e:
            if not isinstance(e, torch.cuda.OutOfMemoryError) and "ALLOC_FAILED" not in str(e):
                raise
        self._forget()  # not before: what the failed run holds is held by the exception, too
        return False

    def evaluation_bytes(self, batch: dict[str, Any]) -> int | None:
        """Bytes that an evaluation batch takes for the time being; None: more than there are."""
        self._forget()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.module.eval()
        size = None
        try:
            with torch.no_grad(), self.arithmetic():
                self.module.evaluate(batch)
            size = torch.cuda.max_memory_allocated() - before
        except torch.cuda.OutOfMemoryError:
            pass
        self.module.train()
        self._forget()
        return size

    def _timed(self, batch: dict[str, Any]) -> tuple[float, float]:
        """Of a micro-step, after one in which it is compiled: see `seconds`."""
        self._run(batch)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        self._run(batch)
        launched = time.perf_counter()
        torch.cuda.synchronize()
        ended = time.perf_counter()
        return ended - begun, ended - launched

    def takes_long(self) -> bool:
        """Whether the host keeps ahead of the GPU in some long micro-step: one that it is waited for in is long on a slow host only."""
        return any(whole >= LONG and after >= AHEAD * whole for whole, after in self.seconds)

    def _run(self, batch: dict[str, Any]) -> None:
        with self.arithmetic():
            total = self.module.loss_sum(batch)
        (total * batch["weight"]).backward()

    def _forget(self) -> None:
        """No gradients, no cached memory."""
        self.module.zero_grad(set_to_none=True)
        forget()

    def _too_large(self, how: str, fix: str) -> TooLarge:
        tokens = self.batches[-1]["input_ids"].numel()
        have = memory_limit(self.module.device) / 2**30
        return TooLarge("trainer.tokens_per_batch", tokens, f"does not fit into the GPU's {have:.1f} GiB {how}", fix)

    def capture(self, accumulate: int, note: Callable[[str], None]) -> CapturedSteps | None:
        """Graphs of the micro-steps of all sizes, for which gradients are made; None, with a note, where one can't be captured."""
        steps: CapturedSteps | None = CapturedSteps(self.module.loss_sum, self.arithmetic, accumulate)
        assert steps is not None
        try:
            with steps.stream():
                self._run(self.batches[-1])  # makes the gradients of all that the loss depends on
                with waiting_refused():
                    for batch in reversed(self.batches):
                        self._run(batch)
            steps.capture(self.batches[::-1])
        except (torch.cuda.OutOfMemoryError, RuntimeError) as e:
            note(f"micro-steps could not be captured as CUDA graphs ({str(e).splitlines()[0]}): they are launched bit by bit")
            steps = None
            forget()
        self.module.zero_grad(set_to_none=False)
        return steps


def amount(asked: bool | int | str, layers: int) -> tuple[int, bool]:
    """(layers computed again in backward, whether their inputs go to host memory) of `trainer.gradient_checkpointing`."""
    if asked == "offload":
        return layers, True
    if isinstance(asked, bool):
        return (layers if asked else 0), False
    return min(int(asked), layers), False
