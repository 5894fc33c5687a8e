"""Micro-steps captured as CUDA graphs: forward, backward and the sum into the gradients as one launch. Forwards that score, likewise.

A step of a few thousand tokens costs the host more time to launch than the GPU to run. What is captured is the module's own step on a
batch of a fixed `Shape`; a replay reads the batch from the tensors that were captured. Random draws of a replay follow from the seed
that the device's generator has then, as they do without capture.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

WARM_UP = 2  # runs before the capture, for what is allocated or compiled once
IN_FLIGHT = 8  # batches on their way to the device: 80 ms of an encoder's work, while rows are written and the next ones encoded


class CapturedSteps:
    """Captured micro-steps by the size of their batch.

    Args:
        loss_sum: the module's. arithmetic: a context for its forward (autocast), made anew for each use. accumulate: micro-steps a window.
    """

    def __init__(
        self, loss_sum: Callable[[dict[str, Any]], torch.Tensor], arithmetic: Callable[[], AbstractContextManager[Any]], accumulate: int
    ) -> None:
        self._loss_sum, self._arithmetic, self._accumulate = loss_sum, arithmetic, accumulate
        self._steps: dict[int, _Step] = {}
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()  # steps run one after another: they may share their memory
        self._besides = self._before = 0

    @contextmanager
    def stream(self) -> Iterator[None]:
        """The stream of the captures, for what is run before them: each stream that multiplies has a workspace of cuBLAS, 64 MiB."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def capture(self, batches: list[dict[str, Any]]) -> None:
        """Make a graph of the step for each batch's size, the largest first. Gradients must exist and are left changed."""
        steps = [_Step(batch) for batch in batches]
        with self.stream():
            for step in steps * WARM_UP:  # all of them before the first capture: its memory can't be lent to runs that aren't captured
                step.run(self._loss_sum, self._arithmetic)
        torch.cuda.synchronize()
        self._before = torch.cuda.max_memory_allocated()
        for step in steps:
            torch.cuda.reset_peak_memory_stats()
            with torch.cuda.graph(step.graph, pool=self._pool, stream=self._stream):  # which gives cached memory back first
                step.run(self._loss_sum, self._arithmetic)
            self._besides = max(self._besides, torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())
            self._steps[step.batch["input_ids"].numel()] = step

    def peak(self) -> int:
        """Bytes that were in use at most so far: the allocator counts what a graph uses while it is captured, not while it is replayed."""
        return max(self._before, torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated() + self._besides)

    def covers(self, batch: dict[str, Any]) -> bool:
        """Whether there is a graph for batches of this size."""
        return "max_seqlen" in batch and batch["input_ids"].numel() in self._steps

    def replay(self, batch: dict[str, Any]) -> torch.Tensor:
        """Run the step on a batch: its gradients are added, its summed loss is returned (a tensor of its own)."""
        step = self._steps[batch["input_ids"].numel()]
        _put(step.batch, batch)
        step.weight.fill_(batch["weight"] / self._accumulate)
        step.graph.replay()
        return step.total.clone()


class _Step:
    """One graph with the tensors that it reads and writes."""

    def __init__(self, batch: dict[str, Any]) -> None:
        self.batch = _own(batch)
        self.weight = torch.zeros((), device=batch["input_ids"].device)
        self.graph = torch.cuda.CUDAGraph()
        self.total = torch.zeros(())

    def run(self, loss_sum: Callable[[dict[str, Any]], torch.Tensor], arithmetic: Callable[[], AbstractContextManager[Any]]) -> None:
        with arithmetic():
            total = loss_sum(self.batch)
        (total * self.weight).backward()
        self.total = total.detach()


class CapturedScores:
    """A forward that scores batches of one size, captured. A call may return before the batch has been read.

    Args:
        score: [rows, labels] of a batch on the device, which is not waited for. batch: of that size.
    """

    def __init__(self, score: Callable[[dict[str, Any]], torch.Tensor], batch: dict[str, Any]) -> None:
        self._batch = _own(batch)
        self._hosts = itertools.cycle([(_pinned(batch), torch.cuda.Event()) for _ in range(IN_FLIGHT)])
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                score(self._batch)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, stream=stream):
            self._scores = score(self._batch)

    def __call__(self, batch: dict[str, Any]) -> torch.Tensor:
        """Its scores (a tensor of their own) of a batch in host memory."""
        host, read = next(self._hosts)
        read.synchronize()
        _put(host, batch)
        _put(self._batch, host)
        read.record()
        self._graph.replay()
        return self._scores.clone()


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Waiting for the device is a RuntimeError here: who waits can't be captured, and a failed capture is not undone (pytorch#190348)."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waits_for_the_device(run: Callable[[], Any]) -> bool:
    """Whether what is run waits for the GPU, and so can't be captured."""
    try:
        with waiting_refused():
            run()
    except RuntimeError as e:
        if "synchroniz" not in str(e):
            raise
        return True
    return False


def _own(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def _pinned(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: torch.empty(v.shape, dtype=v.dtype, pin_memory=True) for k, v in batch.items() if isinstance(v, torch.Tensor)}


def _put(places: dict[str, Any], batch: dict[str, Any]) -> None:
    """The tensors of a batch where others of the same sizes are."""
    for name, place in places.items():
        if isinstance(place, torch.Tensor):
            place.copy_(batch[name], non_blocking=True)
