"""What is answered of a file so far, kept in `<output>.partial/` until all is: a part a chunk, each written at once and synced.

state.json    what the answers depend on, and the survey of the input, with their sha256
lock          one process at a time
whole         the output, until it is written and gets its name
<fingerprint>-head-<sum>.<ending>, <fingerprint>-<chunk>-<sum>.<ending>
              what the output begins with, and each chunk's rows with their answers; parts of another fingerprint are nobody's, and what
              has not the sum of its name (of its sha256) was damaged since
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
from lorica.screen import counted

STATE, LOCK, WHOLE, HEAD = "state.json", "lock", "whole", "head"
PART = re.compile(r"([0-9a-f]{12})-(head|[0-9]{7})-[0-9a-f]{12}\.[a-z]+")
OURS = re.compile(r"[0-9a-f]{12}-(head|[0-9]{7})(-[0-9a-f]{12})?\.[a-z]+|state\.json|lock|whole|\..+\.tmp")
DIGITS = 12  # of a sha256 in names


class Parts:
    """The parts of one output.

    Args:
        output: the file that they will be. identity: what the answers depend on, by the key that a user would change; of JSON's types.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any]) -> None:
        self.output, self.identity = output, dict(identity)
        self.folder = output.with_name(f"{output.name}.partial")
        self.fingerprint = _sum(self.identity)[:DIGITS]
        self._held: Held | None = None

    def surveyed(self) -> Survey | None:
        """The survey that an earlier run of the same made."""
        state = self._state()
        return Survey(**state["survey"]) if state.get("identity") == self.identity else None

    def hold(self, survey: Survey) -> str:
        """Make the folder, or take it over where it is of the same, without what was damaged; else empty it. Returns what is to be said.

        Raises:
            ConfigError: another process writes there.
        """
        self.folder.mkdir(exist_ok=True)
        self._held = Held(self.folder, LOCK, "output", "answering")
        before, note = self._state().get("identity"), ""
        if before != self.identity:
            for file in self._files():
                if file.name not in (STATE, LOCK):
                    note = f"what {self.folder} had is not gone on with ({_difference(before, self.identity)})"
                    file.unlink()
        elif damaged := [file for file in self._parts().values() if sha256(file)[:DIGITS] != file.stem[-DIGITS:]]:
            for file in damaged:
                file.unlink()
            note = f"{counted(len(damaged), 'part')} of {self.folder} {'was' if len(damaged) == 1 else 'were'} damaged, and made again"
        known = dataclasses.asdict(dataclasses.replace(survey, kept=None)) | {"chunks": [list(chunk) for chunk in survey.chunks]}
        state = {"identity": self.identity, "survey": known}
        write_json(self.folder / STATE, state | {"sha256": _sum(state)})
        return note

    def done(self) -> set[int]:
        """Which chunks are answered."""
        return {int(name) for name in self._parts() if name != HEAD}

    @property
    def begun(self) -> bool:
        """Whether what the output begins with is there."""
        return HEAD in self._parts()

    def keep(self, chunk: int | None, content: bytes) -> None:
        """Write a chunk's part, or the head; it lasts when this returns.

        Raises:
            DiskFull: it doesn't fit.
        """
        name = HEAD if chunk is None else f"{chunk:07d}"
        whole = f"{self.fingerprint}-{name}-{hashlib.sha256(content).hexdigest()[:DIGITS]}{self.output.suffix.lower()}"
        with replacing(self.folder / whole, len(content)) as file:
            file.write(content)

    def join(self, chunks: int) -> None:
        """Make the output of the parts of so many chunks, and remove them.

        Raises:
            DiskFull: it doesn't fit; the parts stay.
        """
        parts = self._parts()
        paths = [parts[f"{chunk:07d}"] for chunk in range(chunks)]
        with replacing(self.folder / WHOLE, sum(path.stat().st_size for path in paths)) as file:
            join(parts[HEAD], paths, file)
        os.replace(self.folder / WHOLE, self.output)
        sync_folder(self.output.parent)
        for ours in sorted(self._files(), key=lambda file: (file.name == LOCK, file.name != STATE)):
            ours.unlink()  # the state first: without it parts are nobody's; the lock last: until then nobody else comes in
        with suppress(OSError):  # somebody else's file is in it
            self.folder.rmdir()

    def release(self) -> None:
        """Let others in."""
        if self._held is not None:
            self._held.release()

    def _files(self) -> list[Path]:
        """The folder's files that this module wrote."""
        return [file for file in self.folder.iterdir() if OURS.fullmatch(file.name)]

    def _parts(self) -> dict[str, Path]:
        """The head and the chunks' parts by name."""
        found = ((PART.fullmatch(file.name), file) for file in self.folder.iterdir())
        return {name[2]: file for name, file in found if name is not None and name[1] == self.fingerprint}

    def _state(self) -> dict[str, Any]:
        """state.json, or {} where there is none that can be read, as it was written."""
        try:
            state = json.loads((self.folder / STATE).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) and state.pop("sha256", "") == _sum(state) else {}


def identity_of(folder: Path) -> str | list[Any]:
    """Which weights a folder holds: its manifest's sha256, or where it has none the names, sizes and times of its files."""
    if (folder / MANIFEST).is_file():
        return sha256(folder / MANIFEST)
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _sum(value: Any) -> str:
    """sha256 of what is of JSON's types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
