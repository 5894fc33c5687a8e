"""Being asked to stop: SIGTERM, SIGINT and SIGUSR1 (which SLURM sends ahead of time) let the step under way be saved first. No torch."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command, tried again, goes on
NOTHING_KEPT = 130  # what shells say of a program that SIGINT ended
WORKER_SECONDS = 30  # that a data worker has to end by itself after SIGTERM


class Interrupted(BaseException):
    """The run ends here because it was asked to; no error, so that nothing that handles errors swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


def exit_code(signum: int, kept: bool) -> int:
    """Where nothing is kept, only who pressed Ctrl-C is not told to try again: a scheduler that needs the machine starts it anew."""
    return NOTHING_KEPT if not kept and signum == signal.SIGINT else EXIT_CODE


class Stop:
    """Whether this process was asked to stop.

    While `deferred`, a signal is only noted: whoever set it looks at `asked` where it can save. Otherwise, and at a second Ctrl-C,
    `Interrupted` is raised at once.

    Args:
        promise: what a person is told when a signal is noted; nothing where it is empty.
    """

    def __init__(self, promise: str = "the state is saved after this step; a second Ctrl-C does not wait for it") -> None:
        self.promise = promise
        self.asked: int | None = None
        self.deferred = False
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take the signals over; again after somebody else did (Lightning does when a fit starts). Main thread only."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in SIGNALS:
            before = signal.signal(signum, self._note)
            self._before.setdefault(signum, before)

    def ignore(self) -> None:
        """Nothing interrupts what is left to do."""
        self.deferred = True

    def close(self) -> None:
        """Give the signals back."""
        self.deferred = False
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}

    def _note(self, signum: int, frame: FrameType | None) -> None:
        again = self.asked is not None and signum == signal.SIGINT
        self.asked = signum
        if again or not self.deferred:
            raise Interrupted(signum)
        if self.promise:
            os.write(2, f"\nlorica: {signal.Signals(signum).name}: {self.promise}\n".encode())


@contextmanager
def none_for_children() -> Iterator[None]:
    """Processes that are started here never get SIGNALS, which schedulers send to the whole process group; this one gets them later."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_worker(worker: int) -> None:
    """Data workers get the signals of their process group too: they go on until the main process has saved and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.alarm(WORKER_SECONDS) and None)
