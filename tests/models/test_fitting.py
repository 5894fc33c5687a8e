"""Layers are compiled where they can be and where it pays, and as many keep their activations as the memory has room for."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lorica.composition import compose
from lorica.config import ConfigError, OptimizerConfig
from lorica.kernels import frozen
from lorica.kernels.layers import Layers
from lorica.models import fitting
from lorica.models.fitting import SPARE, SPARE_BYTES, WORTH_COMPILING, Fit, Fitting, amount, compiles
from lorica.models.module import LoricaModule

CHEAP = settings(max_examples=60, deadline=None, database=None)
GPU, CPU = torch.device("cuda"), torch.device("cpu")
MIB = 1 << 20

# ---------------------------------------------------------------------------------------------------------- compilation


def loaded(layers: int, padded: bool = False) -> Any:
    return SimpleNamespace(layers=[None] * layers, padded=padded)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(fitting, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("layers", "padded", "device", "lacks"),
    [
        (4, False, CPU, "NVIDIA GPU"),
        (4, True, GPU, "variable-length attention"),
        (0, False, GPU, "this architecture's layers"),
        (0, True, CPU, "NVIDIA GPU"),
    ],
)
@pytest.mark.usefixtures("compiler")
def test_what_compilation_lacks_is_said_where_it_is_asked_for(layers: int, padded: bool, device: torch.device, lacks: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compiles(True, None, loaded(layers, padded), device, 10_000)
    error = refused.value
    assert (error.where, error.value, error.fix) == ("trainer.compile", True, "trainer.compile=null") and lacks in error.rule
    for asked, began in ((None, None), (None, True), (False, True)):
        assert compiles(asked, began, loaded(layers, padded), device, 10_000) is False


def test_compilation_needs_triton_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(triton: bool, named: bool, found: bool) -> bool:
        monkeypatch.setattr(fitting, "find_spec", lambda name: name if triton else None)
        monkeypatch.setattr(shutil, "which", lambda name: name if found else None)
        if named:
            monkeypatch.setenv("CC", "my-cc")
        else:
            monkeypatch.delenv("CC", raising=False)
        return compiles(None, None, loaded(4), GPU, 10_000)

    assert compiled(True, True, False) and compiled(True, False, True)
    assert not compiled(False, True, True) and not compiled(True, False, False)
    with pytest.raises(ConfigError, match="Triton and a C compiler"):
        compiles(True, None, loaded(4), GPU, 10_000)


@pytest.mark.usefixtures("compiler")
def test_unasked_layers_are_compiled_in_long_runs_and_as_a_run_began() -> None:
    for asked, began, steps, expected in [
        (None, None, WORTH_COMPILING, True),
        (None, None, WORTH_COMPILING - 1, False),
        (None, False, 10_000, False),
        (None, True, 1, True),
        (True, False, 1, True),
        (False, True, 10_000, False),
    ]:
        assert compiles(asked, began, loaded(4), GPU, steps) is expected


# --------------------------------------------------------------------------------------------------------------- amount


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (True, (12, False)),
        (False, (0, False)),
        ("offload", (12, True)),
        (0, (0, False)),
        (1, (1, False)),
        (5, (5, False)),
        (99, (12, False)),
    ],
)
def test_what_is_asked_for_is_so_many_layers(asked: Any, expected: tuple[int, bool]) -> None:
    assert amount(asked, 12) == expected


def test_a_fit_is_told_in_words() -> None:
    assert str(Fit(12, 0, False, True, captured=True)) == "compiled, whole micro-steps captured as CUDA graphs, activations kept"
    assert str(Fit(12, 0, False, True, resident=True)) == "compiled, 4-bit weights kept plain as well, activations kept"
    assert str(Fit(12, 5, False, False)) == "not compiled, 5 of 12 computed again in backward"
    assert str(Fit(12, 12, True, False)).endswith("every layer computed again in backward, its input in host memory meanwhile")


# ---------------------------------------------------------------------------------------------------------------- memory


class Layer(GradientCheckpointingLayer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Bare(LoricaModule):
    """A module that the stand-in for a GPU runs."""

    def loss_sum(self, batch: dict[str, Any]) -> torch.Tensor:
        raise NotImplementedError

    def evaluate(self, batch: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError


@dataclass
class Memory:
    """A GPU on which layers and the head take so many bytes in a step, and the optimiser's state after it.

    unforeseen: what each layer that keeps its activations takes over what it says.
    """

    limit: int
    base: int
    layers: int
    full: int
    small: int
    head: int
    state: int = 0
    unforeseen: int = 0

    def peak(self, recomputed: int, offload: bool) -> int:
        """Of forward's end, or of the moment when the last of the recomputed layers is computed again."""
        inputs = 0 if offload else recomputed * self.small
        kept = (self.layers - recomputed) * (self.full + self.unforeseen)
        return self.base + self.state + inputs + max(kept + self.head, self.full if recomputed else 0)

    def fits(self, recomputed: int, offload: bool = False) -> bool:
        return self.peak(recomputed, offload) <= self.limit

    @property
    def allowed(self) -> float:
        return self.limit * (1 - SPARE) - SPARE_BYTES


class Simulated(Fitting):
    """Fitting, with steps that only take memory."""

    def __init__(self, memory: Memory, patch: pytest.MonkeyPatch) -> None:
        self.memory, self.highest, self.ran = memory, 0, []
        layers = Layers(nn.Sequential(*(Layer() for _ in range(memory.layers))))
        batches = [{"input_ids": torch.zeros(1, n)} for n in (64, 128)]
        super().__init__(Bare(nn.Linear(8, 8), OptimizerConfig(), 1), layers, batches, nullcontext)
        patch.setattr(fitting, "state_bytes", lambda module, name: memory.state)
        patch.setattr(fitting, "memory_limit", lambda device: memory.limit)
        patch.setattr(frozen, "plain_bytes", lambda model: 0)
        patch.setattr(torch.cuda, "memory_allocated", lambda device: memory.base)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(self, "highest", 0))
        patch.setattr(torch.cuda, "max_memory_allocated", lambda: self.highest)

    def _run(self, batch: dict[str, Any]) -> None:
        of, layers = self.memory, self.layers
        self.ran.append(batch["input_ids"].numel())
        if not of.fits(layers.recomputed, layers.offload):
            raise torch.cuda.OutOfMemoryError
        self.highest = max(self.highest, of.peak(layers.recomputed, layers.offload))
        if layers.measuring:
            layers.kept = {i: of.small if i < layers.recomputed else of.full for i in range(of.layers)}

    def _hold(self, size: int) -> torch.Tensor:
        assert size == self.memory.state
        return torch.empty(0)

    def _forget(self) -> None:
        """There is nothing to be freed."""


@st.composite
def memories(draw: st.DrawFn) -> Memory:
    layers = draw(st.integers(1, 40))
    small = draw(st.integers(1, 64))
    full = small * draw(st.integers(2, 40))
    base, head = draw(st.integers(100, 20_000)), draw(st.integers(0, 4000))
    state = draw(st.integers(0, 3000))
    limit = base + state + draw(st.integers(small, 2 * (layers * full + head) + 1000))
    return Memory(*(limit * MIB, base * MIB, layers, full * MIB, small * MIB, head * MIB), state=state * MIB)


@CHEAP
@given(memories(), st.sampled_from((0, 0, 300 * MIB)))
def test_as_many_layers_keep_their_activations_as_there_is_room_for(memory: Memory, room: int) -> None:
    n = memory.layers
    with pytest.MonkeyPatch.context() as patch:
        tried = Simulated(memory, patch)
        tried.room = room
        if not (memory.fits(n - 1) or memory.fits(n) or memory.fits(n, True)):
            with pytest.raises(ConfigError, match="even with every layer computed again") as refused:
                tried.fit(None, False, "adamw")
            assert (refused.value.where, refused.value.value) == ("trainer.tokens_per_batch", 128) and refused.value.fix
            return
        assume(memory.fits(n) or memory.fits(n, True))
        found = tried.fit(None, False, "adamw")
    assert memory.fits(found.recomputed, found.offload)
    assert (tried.layers.recomputed, tried.layers.offload) == (found.recomputed, found.offload) and not tried.layers.measuring
    roomy = [r for left in (room, 0) for r in range(n + (left > 0)) if memory.peak(r, False) <= memory.allowed - left]
    assert found.recomputed == (roomy[0] if roomy else n)
    assert tried.room == (room if memory.peak(found.recomputed, found.offload) <= memory.allowed - room else 0)
    assert found.offload == (not roomy and not memory.fits(n))
    assert 64 in tried.ran, "the other sizes are not run, and would be compiled in the middle of training"


def test_room_is_left_for_evaluation_though_layers_take_more_than_one_did(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(10_000 * MIB, 1000 * MIB, 12, 1000 * MIB, 10 * MIB, 0, unforeseen=100 * MIB)
    tried = Simulated(memory, monkeypatch)
    tried.room = 500 * MIB
    found = tried.fit(None, False, "adamw")
    assert memory.peak(found.recomputed, False) <= memory.allowed - tried.room < memory.peak(found.recomputed - 1, False)


def test_no_room_is_left_where_nothing_can_be_captured_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(10_000 * MIB, 1000 * MIB, 12, 670 * MIB, 10 * MIB, 0)  # all twelve fit, but not with room
    for random, expected in ((False, 1), (True, 0)):
        tried = Simulated(memory, monkeypatch)
        tried.room, tried.layers.random = 700 * MIB, random
        found = tried.fit(None, False, "adamw")
        assert (found.recomputed, tried.room > 0) == (expected, not random)


class Evaluated:
    """Stands in for Fitting and for the data: rows of like lengths, of which a token takes a MiB."""

    def __init__(self, rows: int, tokens: int, limit: int) -> None:
        self.rows, self.tokens, self.limit, self.stay, self.peak = rows, tokens, limit, 0, 0
        self.batching = SimpleNamespace(world_size=1, eval_tokens=rows * tokens)
        self.batches = [{"input_ids": torch.zeros(1, 100)}]

    def largest_evaluation_batch(self) -> dict[str, Any] | None:
        fit = min(self.rows, max(1, self.batching.eval_tokens // self.tokens))
        return {"input_ids": torch.zeros(1, fit * self.tokens), "index": list(range(fit))} if self.rows else None

    def evaluation_bytes(self, batch: dict[str, Any]) -> int | None:
        size = batch["input_ids"].numel()
        return size * MIB if size <= self.limit else None


@pytest.mark.parametrize(
    ("rows", "tokens", "limit", "small", "expected"),
    [
        (16, 50, 10_000, False, 800),  # within what training takes
        (16, 50, 10_000, True, 100),  # no more tokens than a micro-batch
        (16, 50, 60, True, 50),
        (3, 400, 500, True, 400),  # a row is a batch at least
        (0, 50, 10_000, True, 0),
    ],
)
def test_evaluation_has_batches_as_large_as_may_be(
    rows: int, tokens: int, limit: int, small: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    both: Any = Evaluated(rows, tokens, limit)
    both.peak = 900 * MIB
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50 * MIB)
    assert fitting._evaluation(both, both, CPU, small) == expected * MIB


def test_a_row_that_does_not_fit_alone_is_refused() -> None:
    both: Any = Evaluated(2, 400, 300)
    with pytest.raises(ConfigError, match="one row of so many tokens"):
        fitting._evaluation(both, both, CPU)


@CHEAP
@given(memories(), st.integers(1, 30))
def test_layers_that_take_more_than_one_did_are_given_up_until_the_rest_fit(memory: Memory, percent: int) -> None:
    memory.unforeseen = memory.full * percent // 100
    assume(memory.fits(memory.layers))
    with pytest.MonkeyPatch.context() as patch:
        found = Simulated(memory, patch).fit(None, False, "adamw")
    assert memory.fits(found.recomputed) and not found.offload


def test_what_is_asked_for_is_done_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(10_000 * MIB, 1000 * MIB, 12, 1000 * MIB, 10 * MIB, 0)
    for asked, expected in ((4, (4, False)), (True, (12, False)), ("offload", (12, True))):
        found = Simulated(memory, monkeypatch).fit(asked, False, "adamw")
        assert (found.recomputed, found.offload) == expected
    for asked in (False, 2):
        with pytest.raises(ConfigError) as refused:
            Simulated(memory, monkeypatch).fit(asked, False, "adamw")
        error = refused.value
        assert (error.where, error.value, error.fix) == ("trainer.tokens_per_batch", 128, "trainer.gradient_checkpointing=null")
        assert "9.8 GiB as asked" in error.rule


def test_without_a_gpu_layers_run_as_asked_and_nothing_is_tried() -> None:
    layers = Layers(nn.Sequential(*(Layer() for _ in range(6))))
    module: Any = Bare(nn.Linear(2, 2), OptimizerConfig(), 1)
    config = compose("train", ["model=minilm_full"])
    machine: Any = SimpleNamespace(device=CPU, compute_dtype=torch.float32)
    for asked, expected in ((None, (0, False)), (True, (6, False)), (2, (2, False)), ("offload", (6, True))):
        data: Any = None
        config.trainer.gradient_checkpointing = asked
        fitting.prepare(module, config, machine, False)
        found = fitting.fit(module, layers, data, machine, config, False, False, nullcontext, pytest.fail)
        assert (found.recomputed, found.offload, found.compiled, found.captured) == (*expected, False, False)
        assert (layers.recomputed, layers.offload) == expected and module.capture is None


# --------------------------------------------------------------------------------------------------------------- capture


@pytest.mark.parametrize(
    ("launching", "working", "long"), [(0.2, 0.3, False), (0.3, 0.2, False), (0.2, 0.7, True), (0.7, 0.3, False), (0.69, 0.7, False)]
)
def test_a_long_step_is_not_captured_unless_the_gpu_waits_for_the_host(
    launching: float, working: float, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU works from the first launch on, and is done when all is launched at the earliest."""
    tried = Simulated(Memory(10_000 * MIB, 1000 * MIB, 12, 10 * MIB, 1 * MIB, 0), monkeypatch)
    now, busy_until = 0.0, 0.0

    def run(batch: dict[str, Any]) -> None:
        nonlocal now, busy_until
        begun, now = now, now + launching
        busy_until = max(now, begun + working)

    def synchronize() -> None:
        nonlocal now
        now = max(now, busy_until)

    monkeypatch.setattr(tried, "_run", run)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(fitting.time, "perf_counter", lambda: now)
    tried.seconds = [tried._timed(batch) for batch in tried.batches]
    assert max(tried.seconds)[0] == pytest.approx(max(launching, working)) and tried.takes_long() == long


@pytest.mark.parametrize("fails", ["", "operation not permitted when stream is capturing"])
def test_all_sizes_are_captured_or_none_and_the_user_is_told(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[int] = []
    notes: list[str] = []

    class Steps:
        def __init__(self, *given: Any) -> None:
            self.stream = nullcontext

        def capture(self, batches: list[dict[str, Any]]) -> None:
            captured.extend(batch["input_ids"].numel() for batch in batches)
            if fails:
                raise RuntimeError(fails)

    modes: list[str] = []
    monkeypatch.setattr(fitting, "CapturedSteps", Steps)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    tried = Simulated(Memory(10_000 * MIB, 1000 * MIB, 12, 10 * MIB, 1 * MIB, 0), monkeypatch)
    steps = tried.capture(1, notes.append)
    assert captured == [128, 64] and modes[0] == "error" and modes[-1] == "default"
    assert (steps is None) == bool(fails) == bool(notes)
    assert not fails or fails in notes[0]
