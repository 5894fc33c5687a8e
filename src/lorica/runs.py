"""The run folder: what is in it, where a run begins or goes on. No torch.

config.yaml        resolved, secrets redacted       adapter/ or model/   the best weights, loadable without Lorica
metrics.json       final figures; last to be written: its presence means the run is finished
metrics.csv        every logged figure by step      predictions.jsonl    every test row with its prediction
data_report.*      what was in the data             checkpoints/         resumable state
train.log .hydra/  what was printed and typed       curves.png confusion.png
environment.json   machine, precision, versions
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import platform
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from lorica import beside_weights, plain_yaml
from lorica.config import ConfigError, TrainConfig
from lorica.durable import write_text
from lorica.proposals import pasted
from lorica.secrets import REDACTED, redact, redact_tree
from lorica.states import last_state, manifest_of, newest_intact, put_away, states

GRIDS, COMPARISONS = Path("outputs") / "grids", Path("outputs") / "compare"
FAILED = "failed.json"  # how a run of a grid or a comparison failed
LOG = "train.log"
LOGS = (".err", ".log", ".out")  # what schedulers write into a run's folder before it begins
ROOT = "lost+found"  # of a file system of its own
SHOWN = 3  # names of files that a refusal shows
TASK_FILE = "lorica.json"  # beside an adapter's or a model's weights: what it answers and how it is asked


@dataclass
class Beginning:
    """Where a run writes, and where it goes on from.

    checkpoint: the state to go on from, checked; None: fresh. existed: whether the folder was there before. notes: what to tell the
    user. held: keeps other processes out of the folder.
    """

    folder: Path
    checkpoint: Path | None
    existed: bool
    notes: list[str]
    held: Held


def begin(config: TrainConfig, argv: list[str]) -> Beginning:
    """Choose the run's folder by run_dir and resume, make it, and keep others out of it.

    Raises:
        ConfigError: there is nothing to resume where that was required; a finished run would be overwritten; another process trains
            there; the folder can't be written.
    """
    notes: list[str] = []
    if config.resume is not None:
        found = _resumable(config, notes)
        if found is not None:
            return found
        notes.append("resume=auto: there is no unfinished run with an intact state; this one is fresh")
    elif config.run_dir is None and (left := _left_unfinished(config)) is not None:
        notes.append(f"an unfinished run of this configuration is in {left}: {going_on(left)} goes on with it; this one is fresh")
    family = _family(config)
    folder = Path(config.run_dir) if config.run_dir is not None else family / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    refuse_taken(folder)
    existed = folder.exists()
    try:
        folder = _make(folder, config.run_dir is None)
        held = Held(folder)
        if (away := put_away(folder)) is not None:
            notes.append(f"an earlier start's states are now in {away}: this run is fresh, which one with resume=auto would not have been")
        write_config(folder, config, argv)
    except OSError as e:
        raise ConfigError("run_dir", folder, f"can't be written ({e.strerror or e})", "run_dir=<a folder of yours>") from None
    return Beginning(folder, None, existed, notes, held)


def refuse_taken(folder: Path) -> None:
    """Keep a finished run, and files that are no run's, from being overwritten.

    Raises:
        ConfigError: there are some.
    """
    fix = "another run_dir, or none for a new one by time"
    if (folder / "metrics.json").exists():
        raise ConfigError("run_dir", folder, "holds a finished run", fix)
    if folder.exists() and not folder.is_dir():
        raise ConfigError("run_dir", folder, "is a file", fix)
    there = sorted(path.name for path in folder.glob("[!.]*") if path.name == LOG or (path.suffix not in LOGS and path.name != ROOT))
    ours = any((folder / name).exists() for name in (".hydra/lock", FAILED)) or {"config.yaml", "checkpoints"} <= set(there)
    if there and not ours:
        more = f" and {len(there) - SHOWN:,} more" if len(there) > SHOWN else ""
        raise ConfigError("run_dir", folder, f"has {', '.join(there[:SHOWN])}{more}, of no run", fix)


def refuse_at_once(config: TrainConfig) -> None:
    """What `begin` would refuse, as far as it is seen without reading states.

    Raises:
        ConfigError: the folder is taken; there is nothing to resume where that was required.
    """
    if config.resume == "required" and not _with_states(_candidates(config)):
        raise _nothing_to_resume(config, [])
    if config.resume in (None, "auto") and config.run_dir is not None and not _with_states([Path(config.run_dir)]):
        refuse_taken(Path(config.run_dir))


def _family(config: TrainConfig) -> Path:
    return Path("outputs") / f"{config.data.name}-{config.model.name}"


def _resumable(config: TrainConfig, notes: list[str]) -> Beginning | None:
    """The unfinished run to go on with, at its newest intact state."""
    for folder in _with_states(_candidates(config)):
        held = Held(folder)
        checkpoint, damaged = newest_intact(folder)
        notes += [f"{what}; it was set aside as damaged-*" for what in damaged]
        if checkpoint is not None:
            return Beginning(folder, checkpoint, True, notes, held)
        held.release()
    if config.resume == "auto":
        return None
    raise _nothing_to_resume(config, notes)


def _candidates(config: TrainConfig) -> list[Path]:
    return [Path(config.run_dir)] if config.run_dir else _newest_first(_family(config))


def _left_unfinished(config: TrainConfig) -> Path | None:
    """The newest run with a state and its checksum that was asked for by the same configuration, and that no process trains."""
    from yaml import safe_load

    asked = _compared(safe_load(to_yaml(config)))
    for folder in _with_states(_candidates(config)):
        with contextlib.suppress(ConfigError, OSError):  # another's, or unreadable
            same = _compared(plain_yaml.read(folder / "config.yaml", "resume")) == asked
            if same and any(manifest_of(state).is_file() for state in states(folder)) and not Held.is_held(folder):
                return folder
    return None


def _compared(config: Any) -> Any:
    """A configuration without what says where it is written."""
    return {k: v for k, v in config.items() if k not in ("run_dir", "resume")} if isinstance(config, dict) else config


def _with_states(folders: list[Path]) -> list[Path]:
    """The unfinished ones with a state to go on from."""
    return [folder for folder in folders if last_state(folder) is not None and not (folder / "metrics.json").exists()]


def _nothing_to_resume(config: TrainConfig, notes: list[str]) -> ConfigError:
    where = config.run_dir or str(_family(config))
    finished = any((folder / "metrics.json").exists() for folder in _candidates(config))
    why = " (it is finished)" if finished else f" ({'; '.join(notes)})" if notes else ""
    return ConfigError("resume", config.resume, f"there is no unfinished run with an intact checkpoint in {where}{why}", "resume=auto")


def _newest_first(family: Path) -> list[Path]:
    return sorted((f for f in family.glob("*") if f.is_dir()), key=lambda f: f.stat().st_mtime, reverse=True) if family.is_dir() else []


def _make(folder: Path, by_time: bool) -> Path:
    """Make the folder; a number is added where a name by time is taken by another start of the same second."""
    base, n = folder, 1
    while by_time:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            folder, n = base.with_name(f"{base.name}-{n}"), n + 1
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Held:
    """A folder that no other process may write to: an advisory lock, which the system gives up when this process ends.

    Args:
        lock: its file in the folder. key: what the user chose the folder by. doing: what others would do there.
    Raises:
        ConfigError: another process has it.
    """

    _open: ClassVar[set[int]] = set()

    def __init__(self, folder: Path, lock: str = ".hydra/lock", key: str = "run_dir", doing: str = "training") -> None:
        file = folder / lock
        file.parent.mkdir(exist_ok=True)
        self.descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self.descriptor).st_nlink == 0:  # whoever had it has just removed the folder
                raise BlockingIOError
        except BlockingIOError:
            who = os.read(self.descriptor, 100).decode("utf-8", "replace").strip()
            os.close(self.descriptor)
            raise ConfigError(
                key, folder, f"another process is {doing} there ({who or 'unknown'})", f"another {key}, or wait for it"
            ) from None
        except OSError:
            pass  # a file system without locks
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())
        self._open.add(self.descriptor)

    @staticmethod
    def is_held(folder: Path, lock: str = ".hydra/lock") -> bool:
        """Whether a process has it; nothing is written.

        Raises:
            OSError: there is no lock, or none that may be looked at.
        """
        descriptor = os.open(folder / lock, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def release(self) -> None:
        """Let others in."""
        if self.descriptor in self._open:
            self._open.discard(self.descriptor)
            os.close(self.descriptor)

    @classmethod
    def leave_to_parent(cls) -> None:
        """In a forked child (a data worker): the lock must not outlive the process that trains."""
        for descriptor in cls._open:
            os.close(descriptor)
        cls._open.clear()


os.register_at_fork(after_in_child=Held.leave_to_parent)


def write_config(folder: Path, config: TrainConfig, argv: list[str]) -> None:
    """config.yaml and .hydra/: what was asked for."""
    write_text(folder / "config.yaml", to_yaml(config))
    (folder / ".hydra").mkdir(exist_ok=True)
    write_text(folder / ".hydra" / "overrides.yaml", "".join(f"- {json.dumps(redact(a))}\n" for a in argv))
    write_text(folder / ".hydra" / "config.yaml", to_yaml(config))


def recorded(folder: Path) -> dict[str, Any]:
    """Key -> value of a run's config.yaml, but for what was redacted."""
    found: dict[str, Any] = {}

    def add(prefix: str, node: dict[str, Any]) -> None:
        for name, value in node.items():
            if isinstance(value, dict):
                add(f"{prefix}{name}.", value)
            elif REDACTED not in str(value):
                found[f"{prefix}{name}"] = value

    add("", plain_yaml.read(folder / "config.yaml", "resume", "resume=auto"))
    return found


def to_yaml(config: Any) -> str:
    """A configuration as YAML, secrets redacted."""
    import yaml

    return yaml.safe_dump(redact_tree(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def point_latest(folder: Path) -> None:
    """outputs/latest -> the newest run; only for runs under outputs/, and none of a grid or a comparison: nobody typed these."""
    outputs = Path("outputs").resolve()
    target = folder.resolve()
    if not target.is_relative_to(outputs) or target.is_relative_to(GRIDS.resolve()) or target.is_relative_to(COMPARISONS.resolve()):
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
    yet = " yet; the run is unfinished" if (run / "config.yaml").is_file() else ""
    raise ConfigError(
        "run",
        run,
        f"has no adapter or model{yet}",
        f"{command}, then this"
        if yet and (command := going_on(run))
        else "the folder of a finished run, an adapter folder or a merged model",
    )


def unfinished(run: Path) -> str | None:
    """What is said to who asks a run that is not finished; None for a finished run, an adapter or a merged model."""
    if not (run / "config.yaml").is_file() or (run / "metrics.json").is_file():
        return None
    goes_on = f" ({command} goes on with it)" if (command := going_on(run)) else ""
    return f"the run is not finished: these are its best weights so far{goes_on}"


def going_on(run: Path) -> str | None:
    """The command that goes on with a run; None where it has no state to go on from."""
    return f"python train.py {pasted('resume', str(run))}" if last_state(run) is not None else None


def read_task(folder: Path) -> dict[str, Any]:
    """lorica.json beside the weights, or {} where another tool wrote them."""
    file = folder / TASK_FILE
    return beside_weights.read_task(file) if file.is_file() else {}
