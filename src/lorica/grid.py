"""`lorica train -m a=1,2 b=x,y`: every combination in a process and a run folder of its own, done once, compared at the end."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorica.cells import Cell, digest, run_missing, why
from lorica.config import ConfigError, NotApplicable, TrainConfig
from lorica.durable import write_json
from lorica.runs import GRIDS
from lorica.screen import Screen, counted


def run_grid(overrides: Sequence[str], compose: Callable[[list[str]], Any], config_dir: str | None = None) -> int:
    """Run the cells that are not done; print a table of all, best first.

    Args:
        overrides: as typed, sweeps included.
        compose: checks one cell's overrides and gives its configuration.
    Returns:
        0 when every cell is done, else 1.
    Raises:
        ConfigError: a cell's configuration can't be used; nothing has run then.
    """
    screen = Screen()
    cells, dropped = plan_cells(overrides, compose)
    typed = sorted(overrides, key=lambda text: text.partition("=")[0])  # of one key given twice, the last counts: they keep their order
    folder = GRIDS / digest([*typed, *(["--config-dir", config_dir] if config_dir else [])])
    for text in dropped:
        screen.note(text)
    screen.print(f"grid {folder}: {counted(len(cells), 'run')}")
    if code := run_missing(screen, cells, folder, f"grid-{folder.name}", compose, config_dir):
        return code
    records = [_record(cell, folder / cell.name) for cell in cells]
    write_json(folder / "grid.json", {"overrides": list(overrides), "cells": records})
    _table(screen, records)
    failed = [r for r in records if r["failed"]]
    if failed:
        screen.print(f"{len(failed)} of {len(records)} failed:")
        for record in failed:
            screen.print(f"  {record['cell']}: {why(Path(record['run']))}")
        screen.print("The same command runs only these again.")
    return 1 if failed else 0


def plan_cells(overrides: Sequence[str], compose: Callable[[list[str]], Any]) -> tuple[list[Cell], list[str]]:
    """Every combination once, each composed and checked.

    A swept key that a cell's model, data or logger has no use for (`model.lora.r` under full fine-tuning) is left out of that
    cell, and cells that are then the same run once.

    Returns:
        (cells, what was left out, in words).
    Raises:
        ConfigError: for the first cell that can't run, for keys that a grid sets itself, and for runs that would not train.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    choices: list[list[tuple[str, bool]]] = []  # for each typed override its values, each with whether the key is swept
    for text in overrides:
        try:
            override = parser.parse_override(text)
        except HydraException:
            compose([text])  # says what is wrong with it
            raise
        if override.key_or_group in ("run_dir", "resume", "logger.run_name"):
            raise ConfigError(override.key_or_group, text.partition("=")[2] or None, "a grid sets it for each of its runs", "leave it out")
        if override.is_sweep_override():
            choices.append([(f"{override.get_key_element()}={value}", True) for value in override.sweep_string_iterator()])
        else:
            choices.append([(text, False)])
        for name, _, folder in (choice.partition("=") for choice, _ in choices[-1]):
            if name == "distillation.teacher" and (link := Path(folder).expanduser()).is_symlink():
                raise ConfigError(name, folder, "points elsewhere as soon as the grid's first run begins", f"{name}={link.resolve()}")
    cells: dict[Cell, None] = {}
    dropped: list[str] = []
    for combination in itertools.product(*choices):
        kept = list(combination)
        while True:
            try:
                config = compose([text for text, _ in kept])
                break
            except NotApplicable as e:
                useless = [(text, swept) for text, swept in kept if swept and text.partition("=")[0].lstrip("+") == e.where]
                if not useless:
                    raise
                kept.remove(useless[0])
                groups = [text for text, swept in kept if swept and "." not in text.partition("=")[0]]
                note = f"{e.where} does not apply to {', '.join(groups) or 'some cells'}"
                if note not in dropped:
                    dropped.append(note)
        if isinstance(config, TrainConfig) and (config.data.report_only or config.drill):
            key, value = ("drill", config.drill) if config.drill else ("data.report_only", True)
            raise ConfigError(key, value, "stops before training, and a grid compares what was trained", "leave -m out")
        cells[Cell(tuple(text for text, _ in kept), tuple(text for text, swept in kept if swept))] = None
    return list(cells), dropped


def _record(cell: Cell, run_dir: Path) -> dict[str, Any]:
    file = run_dir / "metrics.json"
    metrics = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    monitor = next((k for k in metrics if k.startswith("val/") and k.endswith("_best")), None)
    return {
        "cell": cell.name,
        "run": str(run_dir),
        "failed": not metrics,
        "monitor": monitor.removesuffix("_best") if monitor else None,
        "validation": metrics.get(monitor) if monitor else None,
        "metrics": metrics,
    }


def _table(screen: Screen, records: list[dict[str, Any]]) -> None:
    """All cells by their validation figure, best first, failed ones last."""
    from rich.table import Table

    def rank(record: dict[str, Any]) -> tuple[bool, float]:
        value = record["validation"]
        if value is None:
            return True, 0.0
        return False, value if str(record["monitor"]).endswith("loss") else -value

    monitor = next((r["monitor"] for r in records if r["monitor"]), "validation")
    table = Table(title="grid", title_justify="left", title_style="bold")
    for name in ("run", monitor, "test/accuracy", "test/loss", "seconds", "peak GiB"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for record in sorted(records, key=rank):
        m = record["metrics"]
        if record["failed"]:
            table.add_row(record["cell"], "failed", "", "", "", "")
            continue
        figures = (record["validation"], m.get("test/accuracy"), m.get("test/loss"))
        cells = [f"{v:.4f}" if v is not None else "-" for v in figures]
        table.add_row(record["cell"], *cells, f"{m['train/seconds']:.0f}", f"{m['memory/peak_gib']:.2f}")
    screen.print(table)
