"""Where figures go: metrics.csv always, Weights & Biases on request, online when there is a key and a network, else offline."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import secrets
import shlex
import sys
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from lorica import wandb_login
from lorica.config import ConfigError, TrainConfig, WandbLoggerConfig
from lorica.durable import write_text
from lorica.metrics_log import MetricsLog
from lorica.secrets import redact, redact_tree

INIT_SECONDS = 3.0

_given_up: list[str] = []  # W&B runs of this process that could not be closed
FINISH_SECONDS = 2.0  # between two looks whether an upload can still end


def build_loggers(config: TrainConfig, run_dir: Path, resumed: dict[str, Any] | None) -> tuple[list[Logger], list[str]]:
    """(the loggers, metrics.csv's first; what to tell the user).

    Args:
        resumed: what a checkpoint says of the loggers: `log`, the place of metrics.csv, and `wandb_id`.
    """
    log = MetricsLog(run_dir / "metrics.csv", resumed["log"] if resumed is not None else None)
    notes = [log.lost] if log.lost else []
    if not isinstance(config.logger, WandbLoggerConfig):
        return [log], notes
    wandb_logger, note = _wandb(config, config.logger, run_dir, resumed["wandb_id"] if resumed is not None else None)
    return [log, wandb_logger], [*notes, note]


def _wandb(config: TrainConfig, settings: WandbLoggerConfig, run_dir: Path, run_id: str | None) -> tuple[Logger, str]:
    mode, why = wandb_login.mode_of(settings.mode)
    sys.argv = [redact(a) for a in sys.argv]  # wandb records it
    try:
        import wandb
    except ImportError:
        raise ConfigError("logger", "wandb", "the package wandb is not installed", "pip install wandb") from None
    from lightning.pytorch.loggers import WandbLogger

    def open_as(mode: str) -> Logger:
        logger = WandbLogger(
            project=redact(settings.project),
            name=redact(settings.run_name or run_dir.name),
            entity=settings.entity,
            group=redact(settings.group) if settings.group else None,
            tags=redact_tree(settings.tags),
            save_dir=str(run_dir),
            offline=mode == "offline",
            id=run_id or wandb_id(run_dir),
            resume="allow" if mode == "online" else None,
            config=redact_tree(dataclasses.asdict(config)),
            settings=wandb.Settings(console="off", init_timeout=INIT_SECONDS, disable_git=True, save_code=False, silent=True),
        )
        verbose = os.environ.get("LORICA_VERBOSE")
        with contextlib.nullcontext() if verbose else contextlib.redirect_stderr(io.StringIO()):  # it warns of what Lightning gives it
            _ = logger.experiment
        return logger

    try:
        logger = open_as(mode)
    except wandb.errors.Error as e:
        if mode == "offline" or settings.mode == "online":
            raise ConfigError("logger.mode", settings.mode, str(e).splitlines()[0], "logger.mode=offline") from None
        mode, why = "offline", f"{type(e).__name__} when the run was begun"
        logger = open_as(mode)
    note = (f"W&B is offline: {why}" if why else f"W&B is {mode}, project {settings.project}") + (
        f"; later: wandb sync {shlex.quote(str(run_dir / 'wandb'))}/offline-run-*" if mode == "offline" else ""
    )
    return logger, note


def wandb_id(run_dir: Path) -> str:
    """The run's W&B id, the same when it is resumed."""
    file = run_dir / ".hydra" / "wandb_id"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, secrets.token_hex(4))
    return file.read_text().strip()


def finish_wandb(
    loggers: list[Logger], run_dir: Path, weights: Path | None, predictions: list[dict[str, Any]], figures: dict[str, float], failed: bool
) -> str:
    """Final figures, a table of predictions, the weights as an artifact; then close the W&B run. What to tell the user, or ""."""
    lost = ""
    for logger in loggers:
        if type(logger).__name__ != "WandbLogger":
            continue
        import wandb

        run: Any = getattr(logger, "experiment")  # noqa: B009 (the base class does not declare it)
        if not failed:
            run.summary.update(figures)
            if predictions:
                columns = list(predictions[0])
                run.log(
                    {
                        "test/predictions": wandb.Table(
                            columns=columns,
                            data=[
                                [str(p.get(c)) if isinstance(p.get(c), (dict, list)) else p.get(c) for c in columns]
                                for p in predictions[:200]
                            ],
                        )
                    }
                )
            if weights is not None:
                artifact = wandb.Artifact(f"{run_dir.parent.name}-{run.id}".replace("/", "-"), type="model")
                artifact.add_dir(str(weights))
                run.log_artifact(artifact)
        if not _finish(run, 1 if failed else 0):
            lost = f"W&B does not answer any more; nothing is lost: wandb sync {run_dir}/wandb/run-*-{run.id}"
    return lost


def record_table(config: TrainConfig, folder: Path, name: str, table: str, columns: list[str], rows: list[list[Any]]) -> str:
    """A W&B run that has only a table, in the group of that name; what to tell the user, "" where runs aren't recorded there."""
    if not isinstance(config.logger, WandbLoggerConfig):
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.replace(config.logger, run_name=name, group=config.logger.group or name)
    logger, note = _wandb(config, settings, folder, None)
    import wandb

    run: Any = getattr(logger, "experiment")  # noqa: B009 (the base class does not declare it)
    run.log({table: wandb.Table(columns=columns, data=rows)})
    return note if _finish(run, 0) else f"W&B does not answer any more; nothing is lost: wandb sync {folder}/wandb/run-*-{run.id}"


def _finish(run: Any, exit_code: int) -> bool:
    """Close a W&B run, waiting for its uploads as long as W&B answers; whether it was closed."""
    thread = threading.Thread(target=run.finish, kwargs={"exit_code": exit_code}, daemon=True)
    thread.start()
    thread.join(FINISH_SECONDS)
    while thread.is_alive():
        if not run.settings._offline and not wandb_login.answers():
            _given_up.append(run.id)
            return False
        thread.join(FINISH_SECONDS)
    return True


def leave(code: int) -> None:
    """End this process at once where W&B was given up: wandb's exit hooks would wait for it; all they would send is on the disk."""
    if _given_up:
        import wandb

        with contextlib.suppress(AttributeError):  # a version that keeps its own process elsewhere: it ends with ours, later
            wandb.setup()._connection._proc._process.kill()  # type: ignore[union-attr]
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
