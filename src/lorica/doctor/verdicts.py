"""What a check finds, and how checks run beside each other: none waits for another, ends another or outlives its time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from lorica.secrets import REDACTED, redact

T = TypeVar("T")
OK, WARN, FAIL = "ok", "warn", "fail"


@dataclass(frozen=True)
class Finding:
    """One line: verdict is ok, warn (runs, but slower or not everything) or fail (runs would fail). fix: what to type, where there is
    something to mend. versions: of what was looked at, by name."""

    verdict: str
    found: str
    fix: str = ""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """A finding under the name of its check, with the seconds that it took."""

    name: str
    verdict: str
    found: str
    fix: str
    seconds: float
    versions: dict[str, str]


def ok(found: str, **versions: str) -> Finding:
    """Nothing to mend."""
    return Finding(OK, found, versions=versions)


def warn(found: str, fix: str, **versions: str) -> Finding:
    """Runs work, but slower, or a part of what there is does not."""
    return Finding(WARN, found, fix, versions)


def fail(found: str, fix: str, **versions: str) -> Finding:
    """Runs would fail."""
    return Finding(FAIL, found, fix, versions)


class Check:
    """A check that is under way in a thread of its own."""

    def __init__(self, name: str, look: Callable[[], Finding]) -> None:
        self.name, self._look = name, look
        self._verdict: Verdict | None = None
        self._begun = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            found = self._look()
        except Exception as e:
            if os.environ.get("LORICA_VERBOSE"):
                print(clean(traceback.format_exc()), file=sys.stderr)
            found = fail(f"could not be looked at: {said(e)}", "LORICA_VERBOSE=1 lorica doctor  (shows where)")
        self._verdict = self._named(found)

    def _named(self, found: Finding) -> Verdict:
        seconds = round(time.monotonic() - self._begun, 2)
        return Verdict(self.name, found.verdict, clean(found.found), clean(found.fix), seconds, found.versions)

    def verdict(self, until: float) -> Verdict:
        """What was found; what is not known by then (of time.monotonic) has failed."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._verdict is not None:
            return self._verdict
        waited = f"{time.monotonic() - self._begun:.0f} s"
        return self._named(fail(f"did not come to an end within {waited}", "lorica doctor timeout=60  (more time, where the disk is slow)"))


class Once(Generic[T]):
    """Something that several checks need: found out by the first that asks, while the others wait."""

    def __init__(self, find: Callable[[], T]) -> None:
        self._find, self._lock = find, threading.Lock()
        self._found: list[T] = []

    def __call__(self) -> T:
        with self._lock:
            if not self._found:
                self._found.append(self._find())
            return self._found[0]


def within(seconds: float, ask: Callable[[], T]) -> T:
    """What `ask` gives or raises.

    Raises:
        TimeoutError: it takes longer.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(ask())
        except Exception as e:
            errors.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def said(error: BaseException) -> str:
    """An exception in one line."""
    if isinstance(error, subprocess.CalledProcessError):
        command = error.cmd.split() if isinstance(error.cmd, str) else error.cmd
        return f"{command[0]} fails with exit code {error.returncode}"
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__


_hidden: set[str] = set()


def hide(secret: str) -> None:
    """Never print this, in whatever a library may say of it."""
    if len(secret) >= 4:
        _hidden.add(secret)


def clean(text: str) -> str:
    """Text without any secret."""
    for secret in sorted(_hidden, key=len, reverse=True):
        text = text.replace(secret, REDACTED)
    return redact(text)
