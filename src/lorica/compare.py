"""`lorica compare`: models trained on the same rows, and finished runs, beside each other; what is trained is not trained again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.cells import Cell, digest, run_missing, why
from lorica.config import CompareConfig, ConfigError, TrainConfig
from lorica.durable import write_json, write_text
from lorica.proposals import nearest
from lorica.runs import COMPARISONS
from lorica.screen import Screen, quiet_libraries

if TYPE_CHECKING:
    from lorica.comparison import Compared

UNTUNED, FEW_SHOT = "_untuned", "_fewshot"
KINDS = ("", "_lora", "_qlora", "_full")  # what `NAME_untuned` may stand for: the base is the same
WARM = 3  # answers before the first that is timed


@dataclass(frozen=True)
class Entry:
    """One of the compared. cell: how it is trained; None: it was before."""

    name: str
    run: Path
    cell: Cell | None


def run_compare(
    config: CompareConfig,
    overrides: Sequence[str],
    compose: Callable[[list[str]], Any],
    options: Sequence[str],
    config_dir: str | None = None,
) -> int:
    """Train what is missing, compare all, write and print the report.

    Args:
        overrides: what was typed for train. compose: checks them and gives the configuration. options: of the group model.
    Returns:
        0; 1 when a model could not be trained (the others are compared); the exit code of a run that was interrupted.
    Raises:
        ConfigError: a configuration that can't be used (nothing has run then), or runs that can't be compared.
    """
    screen = Screen()
    folder, entries = plan(config, overrides, compose, options, config_dir)
    trained = list(dict.fromkeys(entry.cell for entry in entries if entry.cell is not None))
    output = Path(config.output).expanduser() if config.output else folder
    screen.print(f"comparison {folder if trained else output}: {len(entries)} models")
    if code := run_missing(screen, trained, folder, f"compare-{folder.name}", compose, config_dir):
        return code
    failed = [entry for entry in entries if entry.cell is not None and not (entry.run / "metrics.json").is_file()]
    for entry in failed:
        screen.print(f"{entry.name} failed: {why(entry.run)}")
    left = [entry for entry in entries if entry not in failed]
    if len(left) < 2:
        screen.print("fewer than two are left to compare; the same command runs the failed ones again")
        return 1
    settings: TrainConfig = compose(list(left[0].cell.overrides if left[0].cell else overrides))
    report = _report(screen, config, settings, left, output / "comparison.json")
    _write(screen, report, output)
    _record(screen, settings, report, folder)
    if failed:
        screen.print("The same command runs the failed ones again.")
    return 1 if failed else 0


def plan(
    config: CompareConfig, overrides: Sequence[str], compose: Callable[[list[str]], Any], options: Sequence[str], config_dir: str | None
) -> tuple[Path, list[Entry]]:
    """(the comparison's folder, what is compared in the order given); every configuration is checked.

    Raises:
        ConfigError: the first that can't be used.
    """
    for text in overrides:
        name, _, value = text.partition("=")
        if name.lstrip("+") in ("model", "run_dir", "resume", "logger.run_name"):
            raise ConfigError(
                name, value, "a comparison sets it for each of its models", "models=[...]" if name == "model" else "leave it out"
            )
    if len(config.models) + len(config.runs) < 2:
        given = config.models or config.runs or None
        raise ConfigError("models", given, "a comparison needs two or more, of models and runs", "models=[roberta_lora,roberta_full]")
    typed = sorted(overrides, key=lambda text: text.partition("=")[0])
    name = digest([*typed, *(["--config-dir", config_dir] if config_dir else []), *([] if config.models else config.runs)])
    folder = COMPARISONS / name
    entries: list[Entry] = []
    names: dict[str, int] = {}

    def add(name: str, run: Path, cell: Cell | None) -> None:
        names[name] = names.get(name, 0) + 1
        entries.append(Entry(name if names[name] == 1 else f"{name} ({names[name]})", run, cell))

    for model in config.models:
        chosen = _overrides(model, options, config.shots)
        cell = Cell((*overrides, *chosen), tuple(chosen))
        settings = compose(list(cell.overrides))
        if settings.data.report_only or settings.drill:
            raise ConfigError("data.report_only" if settings.data.report_only else "drill", None, "stops before training", "leave it out")
        add(model, folder / cell.name, cell)
    for text in config.runs:
        run = Path(text).expanduser()
        if not run.is_dir():
            raise ConfigError("runs", text, "there is no such folder", "finished run folders, as outputs/latest")
        add(run.resolve().name if run.is_symlink() else run.name, run, None)
    return folder, entries


def _overrides(model: str, options: Sequence[str], shots: int) -> list[str]:
    """What trains, or only tests, a model by its name in a comparison."""
    if model in options:
        return [f"model={model}"]
    for ending, more in ((UNTUNED, []), (FEW_SHOT, [f"data.shots={shots}"])):
        base = next((base for kind in KINDS if (base := model.removesuffix(ending) + kind) in options), None)
        if model.endswith(ending) and base is not None:
            return [f"model={base}", "trainer.max_steps=0", *more]
    near = nearest(model, [f"{option}{ending}" for option in options for ending in ("", UNTUNED, FEW_SHOT)])
    rule = f"must be of {', '.join(options)}, as they are or with {UNTUNED} or {FEW_SHOT} behind"
    raise ConfigError("models", model, rule, f"models=[{near or options[0]},...]")


def _report(screen: Screen, config: CompareConfig, settings: TrainConfig, entries: Sequence[Entry], before: Path) -> dict[str, Any]:
    """comparison.json's content.

    Args:
        before: an earlier one, whose timed answers are taken where the run is the same.
    """
    from lorica import comparison

    quiet_libraries()
    runs = [comparison.read(entry.run, entry.name) for entry in entries]
    comparison.check_same_rows(runs)
    models = [comparison.figures(run) for run in runs]
    timed = _timed_before(before)
    for run, model in zip(runs, models, strict=True):
        model["finished"] = hashlib.sha256((run.run / "metrics.json").read_bytes()).hexdigest()
        known = timed.get((str(run.run), model["finished"], config.latency_rows))
        model["latency"] = known or (_latency(screen, run, config.latency_rows, settings) if config.latency_rows else None)
        timed[str(run.run), model["finished"], config.latency_rows] = model["latency"]
        joules = model["train_joules"]
        known_cost = joules is not None and config.price_per_kwh is not None
        model["train_cost"] = joules / 3.6e6 * config.price_per_kwh if known_cost else None
    pairs = comparison.pairs(runs)
    choice = comparison.choose(runs, pairs)
    all_right, none_right = comparison.agreement(runs)
    return {
        "data": settings.data.name,
        "rows": len(runs[0].rows),
        "labels": runs[0].labels,
        "choice": {**dataclasses.asdict(choice), "words": choice.words},
        "models": models,
        "pairs": [{**dataclasses.asdict(pair), "difference": pair.difference, "verdict": pair.verdict} for pair in pairs],
        "disagreements": comparison.disagreements(runs, config.max_disagreements),
        "all_right": all_right,
        "none_right": none_right,
        "price_per_kwh": config.price_per_kwh,
    }


def _timed_before(file: Path) -> dict[tuple[str, str, int], Any]:
    """(run, its metrics.json's sha256, rows asked for) -> how long answers took."""
    try:
        models = json.loads(file.read_text("utf-8"))["models"]
        return {(m["run"], m["finished"], m["latency"]["asked"]): m["latency"] for m in models if m.get("latency")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _latency(screen: Screen, run: Compared, rows: int, settings: TrainConfig) -> dict[str, float] | None:
    """How long a model takes to answer a text, one after another, on this machine; None with a note where it can't be loaded."""
    import numpy as np

    from lorica import hardware
    from lorica.answering import Predictor
    from lorica.config import TrainerConfig
    from lorica.data.asking import ask_text
    from lorica.models.trained import load_trained

    machine = hardware.choose(TrainerConfig(accelerator=settings.trainer.accelerator, devices=1))
    places = sorted({round(i) for i in np.linspace(0, len(run.rows) - 1, min(rows, len(run.rows)))})
    try:
        begun = time.perf_counter()
        predictor = Predictor(load_trained(run.run, machine.device))
        loaded = time.perf_counter() - begun
    except ConfigError as e:
        screen.note(f"{run.name}: answers are not timed ({e})")
        return None
    seconds = []
    for n, place in enumerate([*places[:WARM], *places]):
        example = ask_text(predictor.task, run.rows[place][0])
        begun = time.perf_counter()
        predictor.answer([example])
        if n >= min(WARM, len(places)):
            seconds.append(time.perf_counter() - begun)
    del predictor
    hardware.forget()
    p50, p95 = np.quantile(seconds, [0.5, 0.95])
    return {"asked": rows, "rows": len(places), "load_seconds": loaded, "p50_seconds": float(p50), "p95_seconds": float(p95)}


def _write(screen: Screen, report: dict[str, Any], folder: Path) -> None:
    """The report's files, and its figures on the screen."""
    from rich.table import Table

    from lorica import comparison_pages

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "comparison.json", report)
        write_text(folder / "comparison.md", comparison_pages.markdown_page(report))
        write_text(folder / "comparison.html", comparison_pages.html_page(report))
    except OSError as e:
        raise ConfigError("output", folder, f"can't be written ({e.strerror or e})", "output=<a folder of yours>") from None
    for header, body in (comparison_pages.quality(report), comparison_pages.costs(report)):
        table = Table()
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", min_width=0 if i else max(len(row[0]) for row in body))
        for row in body:
            table.add_row(*row)
        screen.print(table)
    for pair in report["pairs"]:
        screen.print(pair["verdict"])
    screen.print(report["choice"]["words"])
    screen.print(f"report  {folder / 'comparison.html'}")


def _record(screen: Screen, settings: TrainConfig, report: dict[str, Any], folder: Path) -> None:
    """The figures as a table of W&B, where runs are recorded there."""
    from lorica import comparison_pages, loggers

    if said := loggers.record_table(settings, folder, f"compare-{folder.name}", "comparison", *comparison_pages.figures(report)):
        screen.note(said)
