"""Runs of train as processes of their own: what they are called, how they are started, how they ended."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorica.config import DataConfig, TrainConfig, WandbLoggerConfig
from lorica.data.registry import look_ahead
from lorica.durable import write_json
from lorica.runs import FAILED
from lorica.screen import Screen
from lorica.secrets import redact
from lorica.signals import EXIT_CODE, NOTHING_KEPT

KEPT_LINES = 20  # of a failed run's stderr


@dataclass(frozen=True)
class Cell:
    """One combination. overrides: what it is called with, in the typed order. varied: those of the swept keys."""

    overrides: tuple[str, ...]
    varied: tuple[str, ...]

    @property
    def name(self) -> str:
        """Readable, a valid folder name, and no other cell's."""
        text = ",".join(v.replace("model.lora.", "").replace("model=", "").replace("data=", "") for v in self.varied) or "only"
        slug = re.sub(r"[^\w.,=+-]+", "_", text)
        return slug if slug == text and len(slug) <= 100 else f"{slug[:88]}-{digest(self.varied)}"


def digest(parts: Sequence[str]) -> str:
    """Eight characters that differ where the parts do."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def run_missing(
    screen: Screen, cells: Sequence[Cell], folder: Path, group: str, compose: Callable[[list[str]], Any], config_dir: str | None
) -> int:
    """Run the cells that are not done, each in a folder of its own in `folder`; 0, or the exit code of one that was interrupted.

    Raises:
        ConfigError: rows of one can't be used, as far as that is seen at once; nothing has run then.
    """
    missing = {cell: compose(list(cell.overrides)) for cell in cells if not (folder / cell.name / "metrics.json").is_file()}
    looked_at: list[DataConfig] = []
    for config in missing.values():
        if config.data not in looked_at:
            look_ahead(config.data)
            looked_at.append(config.data)
    for number, cell in enumerate(cells, 1):
        if cell not in missing:
            screen.print(f"[{number}/{len(cells)}] {cell.name}: done before")
            continue
        screen.print(f"[{number}/{len(cells)}] {cell.name}")
        code = _run_cell(cell, folder / cell.name, group, missing[cell], config_dir)
        if code in (NOTHING_KEPT, EXIT_CODE):
            screen.print("interrupted; the same command goes on with the runs that are not done")
            return code
    return 0


def _run_cell(cell: Cell, run_dir: Path, group: str, config: TrainConfig, config_dir: str | None) -> int:
    """One cell as a process of its own, which writes its own run folder and W&B run; one that has begun goes on.

    Args:
        group: of the W&B run, where none was asked for. config: what the overrides make.
    Returns:
        The exit code; what a failed run said is kept in failed.json.
    """
    added = [f"run_dir={json.dumps(str(run_dir), ensure_ascii=False)}", "resume=auto"]
    if isinstance(config.logger, WandbLoggerConfig):
        added += [f"logger.group={config.logger.group or group}", f"logger.run_name={json.dumps(cell.name, ensure_ascii=False)}"]
    flags = ["--config-dir", config_dir] if config_dir else []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    try:
        code, said = _call([sys.executable, "-m", "lorica", "train", *flags, *cell.overrides, *added], environment)
    except KeyboardInterrupt:
        return NOTHING_KEPT
    if code not in (0, EXIT_CODE, NOTHING_KEPT):
        run_dir.mkdir(parents=True, exist_ok=True)
        write_json(run_dir / FAILED, {"exit_code": code, "overrides": cell.overrides, "stderr": [redact(line) for line in said]})
    else:
        (run_dir / FAILED).unlink(missing_ok=True)
    return code


def _call(command: list[str], environment: dict[str, str]) -> tuple[int, list[str]]:
    """Run a command; its stderr is shown as it comes. Returns (exit code, the last lines of its stderr)."""
    last: deque[str] = deque(maxlen=KEPT_LINES)
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    assert process.stderr is not None
    lines = io.TextIOWrapper(process.stderr, "utf-8", "replace", newline="")  # a progress bar's lines end in \r and stay so

    def show() -> None:
        for line in lines:
            sys.stderr.write(line)
            sys.stderr.flush()
            last.append(line.rstrip())

    reader = threading.Thread(target=show, daemon=True)
    reader.start()
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the run got it too, and saves its state; once more ends it
        try:
            process.wait()
        except BaseException:
            process.kill()
            raise
        raise
    except BaseException:
        process.kill()
        raise
    reader.join(5.0)  # a process that outlives the run may hold its stderr open
    if not reader.is_alive():
        lines.close()
    return code, [line for line in last if line]


def why(run_dir: Path) -> str:
    """How a failed run ended, in a line or two."""
    file = run_dir / FAILED
    failure = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    code, said = failure.get("exit_code"), failure.get("stderr") or []
    if code == 1 and (run_dir / "train.log").is_file():
        return f"{run_dir / 'train.log'} says why"
    ours = [i for i, line in enumerate(said) if line.startswith("lorica: ")]
    if code == 2 and ours:
        return "\n    ".join([said[ours[-1]].removeprefix("lorica: "), *said[ours[-1] + 1 :]])
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}" if -code in set(signal.Signals) else f"killed by signal {-code}"
    return f"ended with exit code {code}" + (f": {said[-1]}" if said else "") if code else "left no metrics.json"
