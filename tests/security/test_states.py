"""Hostile checkpoints and manifests: pickles are not run, and no name leads out of the folder."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorica import durable, states
from lorica.checkpoints import load
from lorica.config import ConfigError

HASH = "0" * 64
NAMES = {
    "climbs": "../outside.txt",
    "climbs later": "a/../../outside.txt",
    "absolute": "/etc/passwd",
    "climbs to a device": "../../../../../../dev/zero",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_hostile_manifests(name: str, work: Path) -> None:
    (work / durable.MANIFEST).write_text(durable.manifest({name: HASH}))
    assert "outside its folder" in durable.damage(work / durable.MANIFEST)
    with pytest.raises(ValueError, match="outside its folder"):
        durable.read_manifest(work / durable.MANIFEST)


def test_a_hostile_manifest_of_a_state_sets_the_state_aside_and_nothing_else(work: Path) -> None:
    (work / states.FOLDER).mkdir()
    state = work / states.FOLDER / "step-000000003.ckpt"
    state.write_bytes(b"x")
    states.manifest_of(state).write_text(durable.manifest({"../../outside.txt": HASH}))
    assert states.newest_intact(work)[0] is None
    assert sorted(f.name for f in state.parent.iterdir()) == [f"damaged-{state.name}", f"damaged-{state.name}.sha256"]


STATES: dict[str, Callable[[bytes], bytes]] = {
    "pickle": lambda p: p,
    "pickled list": lambda p: pickle.dumps([1, 2]),
    "no bytes": lambda p: b"",
    "archive of nothing": lambda p: b"PK\x05\x06" + b"\0" * 18,
}


@pytest.mark.parametrize("content", STATES.values(), ids=STATES)
def test_hostile_states(content: Callable[[bytes], bytes], work: Path, pickled: bytes) -> None:
    (work / "step-000000003.ckpt").write_bytes(content(pickled))
    with pytest.raises(ConfigError, match="is no state of this program"):
        load(work / "step-000000003.ckpt")


def test_a_hostile_torch_file_as_a_state(work: Path, torch_pickled: Callable[[Path], None]) -> None:
    torch_pickled(work / "step-000000003.ckpt")
    with pytest.raises(ConfigError, match="is no state of this program"):
        load(work / "step-000000003.ckpt")


@pytest.mark.parametrize("value", [{}, {"state_dict": 3}, [1], {"callbacks": "evil.run"}], ids=["nothing", "number", "list", "text"])
def test_hostile_values_of_a_state(value: Any, work: Path) -> None:
    torch.save(value, work / "step-000000003.ckpt")
    with pytest.raises(ConfigError, match="is no state of this program"):
        load(work / "step-000000003.ckpt")
