"""The traps of these tests work: what they plant would be noticed."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def test_a_read_pickle_leaves_the_canary(work: Path, pickled: bytes) -> None:
    pickle.loads(pickled)
    (work.parent / "canary").unlink()


def test_a_read_torch_file_leaves_the_canary(work: Path, torch_pickled: Callable[[Path], None]) -> None:
    torch_pickled(work / "x.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(work / "x.pt", weights_only=True)
    assert not (work.parent / "canary").exists()
    torch.load(work / "x.pt", weights_only=False)
    (work.parent / "canary").unlink()


@pytest.mark.parametrize("name", ["evil", "evil_package", "modeling_evil"])
def test_an_imported_module_leaves_the_canary(name: str, work: Path) -> None:
    importlib.import_module(name)
    (work.parent / "canary").unlink()
