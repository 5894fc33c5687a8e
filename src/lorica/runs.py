"""The run folder: what is in it, and how it is written (temporary name in the same folder, fsync, rename). No torch.

config.yaml        resolved, secrets redacted       adapter/ or model/   the best weights, loadable without Lorica
metrics.json       final figures; last to be written: its presence means the run is finished
metrics.csv        every logged figure by step      predictions.jsonl    every test row with its prediction
data_report.*      what was in the data             checkpoints/         resumable state
train.log .hydra/  what was printed and typed       curves.png confusion.png
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from lorica import beside_weights
from lorica.config import ConfigError, TrainConfig
from lorica.secrets import redact, redact_tree

TASK_FILE = "lorica.json"  # beside an adapter's or a model's weights: what it answers and how it is asked


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: readers see the old text or the new, also after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON, NaN-free."""
    write_text(path, json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not (float("-inf") < value < float("inf")) else value


@contextlib.contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill, that takes the place of `folder` when all went well."""
    temporary, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():  # a crash between the two renames
        os.replace(old, folder)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)  # some writers leave files that only their owner reads
                with file.open("rb") as f:
                    os.fsync(f.fileno())
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def choose_run_dir(config: TrainConfig) -> tuple[Path, Path | None]:
    """(the run's folder, the checkpoint to go on from or None), by run_dir and resume.

    Raises:
        ConfigError: resume=required and there is nothing to resume; a finished run would be overwritten.
    """
    family = Path("outputs") / f"{config.data.name}-{config.model.name}"
    if config.resume is not None:
        candidates = [Path(config.run_dir)] if config.run_dir else _newest_first(family)
        for folder in candidates:
            checkpoint = last_checkpoint(folder)
            if checkpoint is not None and not (folder / "metrics.json").exists():
                return folder, checkpoint
        if config.resume == "required":
            where = config.run_dir or str(family)
            finished = any((f / "metrics.json").exists() for f in candidates)
            raise ConfigError(
                "resume",
                "required",
                f"there is no unfinished run with a checkpoint in {where}" + (" (it is finished)" if finished else ""),
                "resume=auto",
            )
    if config.run_dir is not None:
        folder = Path(config.run_dir)
        if (folder / "metrics.json").exists():
            raise ConfigError("run_dir", folder, "holds a finished run", "another run_dir, or none for a new one by time")
        return folder, None
    return family / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), None


def _newest_first(family: Path) -> list[Path]:
    return sorted((f for f in family.glob("*") if f.is_dir()), key=lambda f: f.stat().st_mtime, reverse=True) if family.is_dir() else []


def last_checkpoint(folder: Path) -> Path | None:
    """The newest resumable state in a run folder."""
    found = sorted((folder / "checkpoints").glob("step-*.ckpt"))
    return found[-1] if found else None


def checkpoint_step(checkpoint: Path) -> int:
    """The optimiser step that a resumable state was written after."""
    return int(checkpoint.stem.partition("-")[2])


def start_run(folder: Path, config: TrainConfig, argv: list[str]) -> Path:
    """Make the folder (a number is added where it is taken by another start of the same second) and write what was asked for."""
    if config.run_dir is None and config.resume is None:
        base, n = folder, 1
        while True:
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                folder, n = base.with_name(f"{base.name}-{n}"), n + 1
    folder.mkdir(parents=True, exist_ok=True)
    if last_checkpoint(folder) is None:  # what a resumed run was started with stays until it is known to fit
        write_config(folder, config, argv)
    return folder


def write_config(folder: Path, config: TrainConfig, argv: list[str]) -> None:
    """config.yaml and .hydra/: what was asked for."""
    write_text(folder / "config.yaml", to_yaml(config))
    (folder / ".hydra").mkdir(exist_ok=True)
    write_text(folder / ".hydra" / "overrides.yaml", "".join(f"- {json.dumps(redact(a))}\n" for a in argv))
    write_text(folder / ".hydra" / "config.yaml", to_yaml(config))


def to_yaml(config: Any) -> str:
    """A configuration as YAML, secrets redacted."""
    import yaml

    return yaml.safe_dump(redact_tree(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def point_latest(folder: Path) -> None:
    """outputs/latest -> the newest run; only for runs under outputs/."""
    outputs = Path("outputs").resolve()
    target = folder.resolve()
    if not target.is_relative_to(outputs):
        return
    link = outputs / f".latest.{os.getpid()}"
    with contextlib.suppress(OSError):
        link.symlink_to(os.path.relpath(target, outputs), target_is_directory=True)
        os.replace(link, outputs / "latest")


def weights_folder(run: Path) -> Path:
    """The folder with a run's trained weights: an adapter, a whole model, or `run` itself when it is one of these.

    Raises:
        ConfigError: there are none.
    """
    for folder in (run / "adapter", run / "model", run):
        if (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
            return folder
    unfinished = " yet; the run is unfinished" if (run / "config.yaml").is_file() else ""
    raise ConfigError(
        "run", run, f"has no adapter or model{unfinished}", "a run folder as outputs/latest, an adapter folder or a merged model"
    )


def read_task(folder: Path) -> dict[str, Any]:
    """lorica.json beside the weights, or {} where another tool wrote them."""
    file = folder / TASK_FILE
    return beside_weights.read_task(file) if file.is_file() else {}
