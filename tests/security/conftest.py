"""A workplace with a canary: code that nobody asked for would leave a file, and so would a write outside of the workplace."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


class Payload:
    """What a pickle runs when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that the program runs in. After the test: no code has run, and nothing was written beside the folder.

    A module `evil` and its variants can be imported; whoever imports or calls one leaves the canary.
    """
    canary, folder = tmp_path / "canary", tmp_path / "work"
    folder.mkdir()
    (tmp_path / "outside.txt").write_text("as it was")
    modules = tmp_path / "modules"
    modules.mkdir()
    leave = f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
    for name in ("evil", "modeling_evil", "configuration_evil", "tokenization_evil", "data_evil"):
        (modules / f"{name}.py").write_text(leave)
    (modules / "hydra_plugins").mkdir()
    (modules / "evil_package").mkdir()
    (modules / "evil_package" / "__init__.py").write_text(leave)
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CANARY", str(canary))
    monkeypatch.setenv("HOSTILE_WISH", "a-value-that-only-the-environment-has")
    before = _content(tmp_path, folder)
    yield folder
    for name in list(sys.modules):
        if name.startswith(("evil", "modeling_evil", "configuration_evil", "tokenization_evil", "data_evil")):
            del sys.modules[name]
    assert not canary.exists(), "code has run"
    assert _content(tmp_path, folder) == before, "something was written outside"


def _content(folder: Path, but: Path) -> dict[str, bytes]:
    return {str(f): f.read_bytes() for f in folder.rglob("*") if f.is_file() and not f.is_relative_to(but) and "__pycache__" not in f.parts}


@pytest.fixture
def pickled(tmp_path: Path) -> bytes:
    """A pickle that leaves the canary."""
    return pickle.dumps(Payload(tmp_path / "canary"))


@pytest.fixture
def torch_pickled(tmp_path: Path) -> Callable[[Path], None]:
    """Writes a torch file that leaves the canary when it is read as torch once did."""

    def write(path: Path) -> None:
        import torch

        torch.save({"weight": Payload(tmp_path / "canary")}, path)

    return write
