"""What is answered of a file so far, kept in `<output>.partial/` until all is: a part a chunk, each written at once and synced.

state.json    what the answers depend on, and the survey of the input
lock          one process at a time
whole         the output, until it is written and gets its name
<fingerprint>-head.<ending>, <fingerprint>-<chunk>.<ending>
              what the output begins with, and each chunk's rows with their answers; parts of another fingerprint are nobody's
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorica.answers import join
from lorica.config import as_typed
from lorica.data.asked_file import Survey
from lorica.durable import MANIFEST, replacing, sha256, sync_folder, write_json
from lorica.runs import Held

STATE, LOCK, WHOLE = "state.json", "lock", "whole"
OURS = re.compile(r"[0-9a-f]{12}-(head|[0-9]{7})\.[a-z]+|state\.json|lock|whole|\..+\.tmp")


class Parts:
    """The parts of one output.

    Args:
        output: the file that they will be. identity: what the answers depend on, by the key that a user would change; of JSON's types.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        self.output, self.identity = output, dict(identity)
        self.folder = output.with_name(f"{output.name}.partial")
        self.fingerprint = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]
        self._held: Held | None = None

    def surveyed(self) -> Survey | None:
        """The survey that an earlier run of the same made."""
        state = self._state()
        return Survey(**state["survey"]) if state.get("identity") == self.identity else None

    def hold(self, survey: Survey) -> str:
        """Make the folder, or take it over where it is of the same; else empty it, and say why.

        Raises:
            ConfigError: another process writes there.
        """
        self.folder.mkdir(exist_ok=True)
        self._held = Held(self.folder, LOCK, "output", "answering")
        before = self._state().get("identity")
        why = ""
        if before != self.identity:
            for file in self._files():
                if file.name not in (STATE, LOCK):
                    why = _difference(before, self.identity)
                    file.unlink()
        known = dataclasses.asdict(dataclasses.replace(survey, kept=None)) | {"chunks": [list(chunk) for chunk in survey.chunks]}
        write_json(self.folder / STATE, {"identity": self.identity, "survey": known})
        return why

    def path(self, chunk: int | None) -> Path:
        """Of a chunk's part, or of the head."""
        name = "head" if chunk is None else f"{chunk:07d}"
        return self.folder / f"{self.fingerprint}-{name}{self.output.suffix.lower()}"

    def done(self, chunks: int) -> set[int]:
        """Which of so many chunks are answered."""
        there = {file.name for file in self.folder.iterdir()}
        return {i for i in range(chunks) if self.path(i).name in there}

    def keep(self, chunk: int | None, content: bytes) -> None:
        """Write a part; it lasts when this returns.

        Raises:
            DiskFull: it doesn't fit.
        """
        with replacing(self.path(chunk), len(content)) as file:
            file.write(content)

    def join(self, chunks: int) -> None:
        """Make the output of its parts, and remove them.

        Raises:
            DiskFull: it doesn't fit; the parts stay.
        """
        paths = [self.path(i) for i in range(chunks)]
        with replacing(self.folder / WHOLE, sum(path.stat().st_size for path in paths)) as file:
            join(self.path(None), paths, file)
        os.replace(self.folder / WHOLE, self.output)
        sync_folder(self.output.parent)
        for ours in self._files():
            ours.unlink()
        with suppress(OSError):  # somebody else's file is in it
            self.folder.rmdir()

    def release(self) -> None:
        """Let others in."""
        if self._held is not None:
            self._held.release()

    def _files(self) -> list[Path]:
        """The folder's files that this module wrote."""
        return [file for file in self.folder.iterdir() if OURS.fullmatch(file.name)]

    def _state(self) -> dict[str, Any]:
        """state.json, or {} where there is none that can be read."""
        try:
            state = json.loads((self.folder / STATE).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}


def identity_of(folder: Path) -> str | list[Any]:
    """Which weights a folder holds: its manifest's sha256, or where it has none the names, sizes and times of its files."""
    if (folder / MANIFEST).is_file():
        return sha256(folder / MANIFEST)
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    """What of the identity has changed, in words."""
    if not isinstance(before, dict):
        return "its state can't be read"
    parts = []
    for name, value in now.items():
        if (old := before.get(name)) != value:
            long = isinstance(value, (list, dict)) or len(str(value)) > 40 or len(str(old)) > 40
            parts.append(f"{name} is another" if long else f"{name} was {as_typed(old)}")
    return ", ".join(parts)
