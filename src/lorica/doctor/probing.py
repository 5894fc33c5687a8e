"""Things that may hang or end a process are tried in one of their own, which says line by line how they went."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROBES = ("driver", "torch", "gpu", "triton", "bitsandbytes", "attention")  # in this order; those after torch need it
LEAST_SECONDS = 1.0  # a probe of that age is not called hung
LEAST_WORK = 0.1  # nor one that computes for this share of its time


@dataclass(frozen=True)
class Outcome:
    """What a probe told (docstrings in `probes` say what), or the trouble with it in words.

    hung: it waited for something until the time was over. late: it was at work until then. untried: its turn did not come.
    """

    facts: dict[str, Any] | None
    trouble: str = ""
    hung: bool = False
    late: bool = False
    untried: bool = False


class Probing:
    """The process with the probes; where one of them ends it, another goes on with those after it.

    Args:
        until: of time.monotonic; what runs on is ended then.
    """

    def __init__(self, until: float) -> None:
        self._until, self._seconds = until, until - time.monotonic()
        self._outcomes: dict[str, Outcome] = {}
        self._changed = threading.Condition()
        self._process: subprocess.Popen[bytes] | None = None
        self._current = PROBES[0]
        self._begun = (0.0, 0.0)  # of the current one: the clock, and the process's seconds of work
        threading.Thread(target=self._run, daemon=True).start()

    def outcome(self, name: str) -> Outcome:
        """Waits until it is known, or the time is over."""
        with self._changed:
            while name not in self._outcomes:
                if not self._changed.wait(max(0.0, self._until - time.monotonic())):
                    self._give_up()
            return self._outcomes[name]

    def close(self) -> None:
        """End what still runs."""
        with self._changed:
            self._give_up()

    def _run(self) -> None:
        while (process := self._next()) is not None:
            assert process.stdout is not None
            for line in process.stdout:
                self._read(line)
            code = process.wait()
            if self._current not in self._outcomes:
                how = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
                self._settle(self._current, Outcome(None, f"it ends the process that tries it ({how})"))

    def _next(self) -> subprocess.Popen[bytes] | None:
        """A process for what is not known yet."""
        with self._changed:
            left = [name for name in PROBES if name not in self._outcomes]
            if not left or time.monotonic() >= self._until:
                self._give_up()
                return None
            self._current, self._begun = left[0], (time.monotonic(), 0.0)
            try:
                self._process = _start(left)
            except OSError as e:
                self._give_up(f"no process can be started ({e.strerror or e})")
                return None
            return self._process

    def _read(self, line: bytes) -> None:
        try:
            told = json.loads(line)
        except ValueError:
            return
        if "begin" in told:
            self._current, self._begun = told["begin"], (time.monotonic(), self._worked())
        else:
            self._settle(told["name"], Outcome(told.get("facts"), told.get("trouble", "")))

    def _settle(self, name: str, outcome: Outcome) -> None:
        with self._changed:
            self._outcomes.setdefault(name, outcome)
            if name == "torch" and outcome.facts is None:
                for other in PROBES[PROBES.index("torch") + 1 :]:
                    self._outcomes.setdefault(other, Outcome(None, "not tried, for torch can't be imported", untried=True))
                self._kill()
            self._changed.notify_all()

    def _give_up(self, why: str = "") -> None:
        """Under the lock: nothing more is waited for."""
        late = self._at_work()
        self._kill()
        end = f"{'it was still at work' if late else 'it did not come to an end'} after {self._seconds:.3g} s"
        for name in PROBES:
            if why:
                given_up = Outcome(None, f"not tried: {why}", untried=True)
            elif name == self._current:
                given_up = Outcome(None, end, hung=not late, late=late)
            else:
                given_up = Outcome(None, f"not tried, for {self._current} had not come to an end", untried=True)
            self._outcomes.setdefault(name, given_up)
        self._changed.notify_all()

    def _worked(self) -> float:
        """Seconds that the process has computed or read, with what it started and waited for."""
        import psutil

        try:
            times = psutil.Process(self._process.pid).cpu_times() if self._process is not None else (0.0,)
        except psutil.Error:
            return 0.0
        return float(sum(times))

    def _at_work(self) -> bool:
        """Whether the current probe computes, or has hardly begun: a slow disk or a slow machine, and no hang."""
        begun, before = self._begun
        elapsed = time.monotonic() - begun
        return elapsed < LEAST_SECONDS or self._worked() - before > LEAST_WORK * elapsed

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except OSError:
                self._process.kill()


def _start(names: list[str]) -> subprocess.Popen[bytes]:
    """A process of its own session, so that what it starts (a compiler) ends with it."""
    verbose = bool(os.environ.get("LORICA_VERBOSE"))
    source = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "lorica.doctor.probes", *names],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH", ""), source]))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if verbose else subprocess.DEVNULL,
        start_new_session=True,
    )
