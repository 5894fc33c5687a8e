"""Resumable states on disk: their names, which are intact, which stay. No torch.

checkpoints/step-000000120.ckpt           the state after optimiser step 120
checkpoints/step-000000120.ckpt.sha256    its manifest; written before the state gets its name, so that no state is without
checkpoints/step-000000120.1.ckpt         written again after the same step
checkpoints/damaged-step-000000080.ckpt   what was found damaged, kept for whoever wants to look at it
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from lorica import durable

FOLDER = "checkpoints"


def states(run: Path) -> list[Path]:
    """The states of a run, oldest first, intact or not."""
    return sorted((run / FOLDER).glob("step-*.ckpt"), key=_numbers)


def _numbers(state: Path) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", state.name)]


def manifest_of(state: Path) -> Path:
    """The manifest's name."""
    return state.with_name(f"{state.name}.sha256")


def last_state(run: Path) -> Path | None:
    """The newest state, intact or not."""
    found = states(run)
    return found[-1] if found else None


def step_of(state: Path) -> int:
    """The optimiser step that a state was written after."""
    return _numbers(state)[0]


def next_name(run: Path, step: int) -> Path:
    """A name for the state after a step that no other state has."""
    path, n = run / FOLDER / f"step-{step:09d}.ckpt", 0
    while path.exists():
        n += 1
        path = path.with_name(f"step-{step:09d}.{n}.ckpt")
    return path


def newest_intact(run: Path) -> tuple[Path | None, list[str]]:
    """(the newest state whose checksum is right, what was wrong with newer ones); those are set aside under another name."""
    damaged: list[str] = []
    for state in reversed(states(run)):
        what = durable.damage(manifest_of(state))
        if not what and state.name not in durable.read_manifest(manifest_of(state)):
            what = f"{manifest_of(state)} is another file's"
        if not what:
            return state, damaged
        damaged.append(what)
        for file in (state, manifest_of(state)):
            with contextlib.suppress(FileNotFoundError):
                os.replace(file, file.with_name(f"damaged-{file.name}"))
    return None, damaged


def retain(run: Path, keep: int) -> None:
    """Remove all but the newest states, and what killed writers left."""
    found = states(run)
    for state in found[: max(0, len(found) - keep)]:
        for file in (state, manifest_of(state)):  # a state is never without its manifest
            with contextlib.suppress(OSError):
                file.unlink()
    for leftover in (run / FOLDER).glob(".*.tmp"):
        with contextlib.suppress(OSError):
            leftover.unlink()
    for manifest in (run / FOLDER).glob("step-*.ckpt.sha256"):
        if not manifest.with_suffix("").exists():
            with contextlib.suppress(OSError):
                manifest.unlink()


def put_away(run: Path) -> Path | None:
    """Move the states of an earlier start out of the way of a fresh one; where they are now."""
    if not states(run):
        return None
    n = 1
    while (away := run / f"{FOLDER}.earlier-{n}").exists():
        n += 1
    os.replace(run / FOLDER, away)
    durable.sync_folder(run)
    return away
