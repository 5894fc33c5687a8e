"""What a person sees: one console, copied to train.log, with third parties' noise kept out and secrets redacted."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.table import Table

from lorica.secrets import redact

COUNT_SECONDS = 0.5  # what takes less gets no bar


class _Console(Console):
    """Who reads the screen may go (`| head`, a terminal that is closed): the work goes on without it."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Screen:
    """Prints to the terminal and, without colour, to a log file.

    Ranks other than 0 are silent; what `log` and `fail` are given goes to a log file of their own, that is made when needed.
    """

    def __init__(self, log: Path | None = None, rank: int = 0) -> None:
        self.rank = rank
        width = None if sys.stdout.isatty() else 110
        self.console = _Console(highlighter=NullHighlighter(), soft_wrap=False, width=width, quiet=rank > 0)
        self._path = log if rank == 0 or log is None else log.with_name(f"{log.stem}.rank{rank}{log.suffix}")
        self._file: TextIO | None = None
        self._log: Console | None = None
        if rank == 0:
            self._open()

    def _open(self) -> None:
        if self._path is not None and self._file is None:
            self._file = self._path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
            self._log = Console(file=self._file, width=110, highlighter=NullHighlighter(), color_system=None)

    @contextlib.contextmanager
    def _kept_up(self) -> Iterator[None]:
        """A log that can't be written (the disk is full) ends nothing, and hides no error."""
        try:
            yield
        except OSError:
            self._log = None

    @property
    def is_terminal(self) -> bool:
        """Whether a bar can be drawn."""
        return self.console.is_terminal

    def print(self, what: Any = "", **kwargs: Any) -> None:
        """Text (redacted, markup off) or a rich renderable."""
        if isinstance(what, str):
            what, kwargs = redact(what), {"markup": False, "soft_wrap": True, **kwargs}
        self.console.print(what, **kwargs)
        if self._log is not None:
            with self._kept_up():
                self._log.print(what, **kwargs)

    def log(self, text: str) -> None:
        """To the file only: a traceback, say."""
        with self._kept_up():
            self._open()
            if self._file is not None:
                self._file.write(redact(text).rstrip("\n") + "\n")

    def fail(self, text: str, details: str) -> None:
        """A line on the screen, whatever the rank, and the details in the log."""
        self.log(details)
        where = f" (the traceback is in {self._path})" if self._path is not None else ""
        if self.rank == 0:
            self.print(text + where)
        else:
            print(redact(f"rank {self.rank} {text}{where}"), file=sys.stderr)

    def facts(self, title: str, rows: list[tuple[str, str]]) -> None:
        """A title and `name  value` lines."""
        self.print(title)
        width = max(len(name) for name, _ in rows)
        for name, value in rows:
            self.print(f"  {name:<{width}}  {value}")

    def note(self, text: str) -> None:
        """Something the user did not ask for but should know."""
        self.print(f"  note: {text}")

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Two columns of figures."""
        table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
        table.add_column()
        table.add_column(justify="right")
        for name, value in rows:
            table.add_row(name, value)
        self.print(table)

    @contextlib.contextmanager
    def counting(self, what: str, enabled: bool = True) -> Iterator[Callable[[int, int], None]]:
        """Gives what is to be told (done, of how many): a bar shows it on a terminal, until all is done, if it takes long."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        bar: Progress | None = None
        first: float | None = None

        def show(done: int, total: int) -> None:
            nonlocal bar, first
            first = time.perf_counter() if first is None else first
            if bar is None and done < total and time.perf_counter() - first > COUNT_SECONDS:
                columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f}"))
                bar = Progress(*columns, TimeRemainingColumn(), console=self.console, refresh_per_second=4, transient=True)
                bar.start()
                bar.add_task(what, total=total)
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)
                if done >= total:
                    bar.stop()

        shown = enabled and self.rank == 0 and self.is_terminal
        try:
            yield show if shown else lambda done, total: None
        finally:
            if bar is not None:
                bar.stop()

    def close(self) -> None:
        """Close the log file."""
        if self._file is not None:
            with self._kept_up():
                self._file.close()
            self._path = self._file = self._log = None


def quiet_libraries() -> None:
    """Only our own lines on the screen; what libraries print goes unless LORICA_VERBOSE is set. Call before importing them."""
    if os.environ.get("LORICA_VERBOSE"):
        return
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "WANDB_SILENT": "true",
        "BITSANDBYTES_NOWELCOME": "1",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    }.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def quiet_transformers() -> None:
    """transformers draws its bars by a switch of its own."""
    from transformers.utils import logging as transformers_logging

    if not os.environ.get("LORICA_VERBOSE"):
        transformers_logging.disable_progress_bar()


def short(n: float) -> str:
    """1,234 -> 1.2 k, 7,241,732,096 -> 7.24 B: at most three digits."""
    for size, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:,.0f}"


def counted(n: int, what: str) -> str:
    """1 row, 1,234 rows."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """75 -> 1 min 15 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
