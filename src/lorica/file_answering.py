"""Answers the rows of a file chunk by chunk, on one device or on several, each a process of its own.

Memory holds three chunks at most, one that is read, one that is answered, one that is written, or a small file's rows. What a chunk is
and how its batches are made follows from the file and the settings alone, so that the output is the same bytes however often it was
broken off.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch

from lorica import hardware
from lorica.answered_parts import Parts
from lorica.answering import Predictor
from lorica.answers import Answer, Layout
from lorica.config import ConfigError, PredictConfig, TrainerConfig
from lorica.data.asked_file import Chunk, Survey, read_chunks
from lorica.data.encoding import Truncation
from lorica.models.trained import load_trained
from lorica.screen import Screen, duration, quiet_libraries
from lorica.signals import EXIT_CODE, Interrupted, Stop

LINE_SECONDS = 30.0  # between lines of progress where there is no terminal
LOOK_SECONDS = 0.5  # between looks at whether to stop, while other processes answer

T = TypeVar("T")


@dataclass
class Job:
    """A file to answer. kind: of the devices. task: lorica.json's content."""

    config: PredictConfig
    kind: str
    source: Path
    task: dict[str, Any]
    survey: Survey
    parts: Parts

    def predictor(self, device: int) -> Predictor:
        """The model on one of the devices."""
        machine = hardware.choose(TrainerConfig(accelerator=self.kind, devices=[device] if self.kind == "cuda" else 1))
        trained = load_trained(Path(self.config.run).expanduser(), machine.device, self.config.base)
        return Predictor(trained, self.config.max_new_tokens, self.config.target_risk)

    def layout(self, labels: Sequence[str] | None) -> Layout:
        """How answers are written."""
        return Layout(self.parts.output.suffix.lower(), self.survey, labels, self.source)


def answer_chunks(job: Job, predictor: Predictor, wanted: Sequence[int], done: Callable[[int], None], stop: Stop) -> float:
    """Answer chunks and keep them. Returns the seconds it took, but for the warm-up.

    Args:
        done: called with the number of rows of each batch on its way.
    Raises:
        Interrupted: `stop` was asked; what is complete is kept.
    """
    layout, size = job.layout(predictor.labels), job.config.batch_size
    answered: deque[tuple[Chunk, Callable[[], list[Answer]]]] = deque()
    chunks = read_chunks(job.source, job.survey, job.task, set(wanted))

    def noted(n: int) -> None:
        done(n)
        if stop.asked is not None:
            raise Interrupted(stop.asked)

    def keep() -> None:
        chunk, answers = answered.popleft()
        found = dict(zip(chunk.examples, answers(), strict=True))
        job.parts.keep(chunk.number, layout.part(chunk.rows, found, chunk.faults))

    if not job.parts.begun:
        job.parts.keep(None, layout.head())
    if job.kind == "cuda":
        _warm_up(job, predictor)
    gc.freeze()  # a search through all that is loaded for garbage would take as long as thousands of rows
    begun = time.perf_counter()
    try:
        with closing(_one_ahead(chunks)) as coming:
            for chunk in coming:
                answered.append((chunk, predictor.begin(list(chunk.examples.values()), size, noted)))
                while len(answered) > (1 if job.kind == "cuda" else 0):  # the chunk before is written while a GPU has this one to do
                    keep()
    finally:
        gc.unfreeze()
        while answered:
            keep()
    return time.perf_counter() - begun


def _warm_up(job: Job, predictor: Predictor) -> None:
    """By the file's first rows, whichever are wanted: what is captured for them may not depend on where an earlier run was broken off."""
    first = next((number for number, (_, sound) in enumerate(job.survey.chunks) if sound), None)
    for chunk in read_chunks(job.source, job.survey, job.task, {first} if first is not None else set()):
        predictor.warm_up(list(chunk.examples.values()), job.config.batch_size, job.survey.answerable)


def _one_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The items; a thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1, "read") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
            del item


# ------------------------------------------------------------------------------------------------------ several devices


def share_chunks(job: Job, wanted: Sequence[int], devices: Sequence[int], done: Callable[[int], None], stop: Stop) -> Truncation:
    """Each device answers every n-th chunk in a process of its own. Returns what was cut.

    Raises:
        Interrupted: `stop` was asked; every process has kept what it completed. ConfigError, RuntimeError: one of them failed; the
            others have stopped after their batch.
    """
    context = multiprocessing.get_context("spawn")
    processes: dict[connection.Connection, BaseProcess] = {}
    for place, device in enumerate(devices):
        mine, theirs = context.Pipe(duplex=False)
        share = list(wanted[place :: len(devices)])
        process: BaseProcess = context.Process(target=_answer_share, args=(job, share, device, len(devices), theirs), daemon=True)
        process.start()
        theirs.close()
        processes[mine] = process
    waiting, told, cut = list(processes), False, Truncation()
    errors: list[Exception] = []
    while waiting:
        for pipe in connection.wait(waiting, LOOK_SECONDS):
            assert isinstance(pipe, connection.Connection)
            try:
                said = pipe.recv()
            except (EOFError, OSError):
                waiting.remove(pipe)
                processes[pipe].join()
                if (code := processes[pipe].exitcode) not in (0, EXIT_CODE, -signal.SIGTERM):
                    errors.append(RuntimeError(f"the process of device {devices[list(processes).index(pipe)]} ended with {code}"))
                continue
            if isinstance(said, int):
                done(said)
            elif isinstance(said, Truncation):
                cut.add(said)
            else:
                errors.append(ConfigError(*said) if isinstance(said, tuple) else RuntimeError(said))
        if (errors or stop.asked is not None) and not told:
            told = True
            for process in processes.values():
                process.terminate()
    if stop.asked is not None:
        raise Interrupted(stop.asked)
    if errors:
        raise errors[0]
    return cut


def _answer_share(job: Job, wanted: Sequence[int], device: int, among: int, pipe: connection.Connection) -> None:
    """The work of one of several processes; what it says into the pipe: rows answered, what was cut, or the error that ended it."""
    quiet_libraries()
    stop = Stop(promise="")
    stop.listen()
    code = 1
    try:
        if job.kind == "cpu":
            torch.set_num_threads(max(1, torch.get_num_threads() // among))
        predictor = job.predictor(device)
        stop.deferred = True
        answer_chunks(job, predictor, wanted, pipe.send, stop)
        pipe.send(predictor.cut)
        code = 0
    except Interrupted:
        code = EXIT_CODE
    except BrokenPipeError:  # who started this process was killed
        pass
    except Exception as e:
        with suppress(BrokenPipeError):
            pipe.send((e.where, e.value, e.rule, e.fix) if isinstance(e, ConfigError) else f"device {device}: {traceback.format_exc()}")
    pipe.close()
    os._exit(code)


# ------------------------------------------------------------------------------------------------------------- progress


class Counted:
    """Rows answered, rows a second and time left: a bar on a terminal, else a line every LINE_SECONDS.

    Args:
        total: rows to answer. before: of which an earlier run answered so many. what: is being done.
    """

    def __init__(self, screen: Screen, total: int, before: int, what: str = "predict") -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self.screen, self.total, self.done, self._first = screen, total, before, 0
        self._made = self._begun = self._said = time.perf_counter()
        columns = (TextColumn(what), BarColumn(), TextColumn("{task.fields[note]}"))
        self._bar = Progress(*columns, console=screen.console, disable=not screen.is_terminal, refresh_per_second=4)
        self._task = self._bar.add_task("", total=total, completed=before, note="")

    def __enter__(self) -> Counted:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def add(self, n: int) -> None:
        """So many more are answered."""
        now = time.perf_counter()
        self.done += n
        if not self._first:  # the model was loaded before: time runs from here
            self._begun, self._first = now, self.done
        if self.screen.is_terminal:
            self._bar.update(self._task, completed=self.done, note=self._words(now))
        elif now - self._said >= LINE_SECONDS:
            self._said = now
            self.screen.print(f"  {self._words(now)}")

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.perf_counter() - self._made

    def _words(self, now: float) -> str:
        rate = (self.done - self._first) / max(now - self._begun, 1e-9)
        of = f"{self.done:,} of {self.total:,} rows"
        return f"{of}, {rate:,.0f} rows/s, {duration((self.total - self.done) / rate)} left" if rate else of
