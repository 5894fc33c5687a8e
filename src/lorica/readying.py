"""All that comes before the first step of a run: its rows are looked at, its weights read, its Trainer made."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer, seed_everything

from lorica import checkpoints, distillation, fingerprint, hardware, launch, loggers, resuming, sizing, summary
from lorica.assembly import Parts, Run, assemble, batching, check_rows
from lorica.checkpoints import Checkpoints
from lorica.config import ConfigError
from lorica.data.gates import check_report
from lorica.data.module import LoricaDataModule
from lorica.data.registry import build_data
from lorica.data.report import data_report, write_report
from lorica.models import fitting
from lorica.models.loaded import Loaded, Prepared, load, prepare
from lorica.models.module import LoricaModule
from lorica.planning import memory
from lorica.planning.parts import Size
from lorica.runs import write_config
from lorica.screen import counted, duration


@dataclass
class Ready:
    """A run that only has to learn: its rows are batches, its weights are read, its Trainer is made.

    Attributes:
        state: the checkpoint to go on from, until that is done. compiled: the layers are. expected: memory, where that can be told.
        made_for: what a checkpoint of this run says that it belongs to.
    """

    data: LoricaDataModule
    machine: hardware.Machine
    loaded: Loaded
    size: Size
    compiled: bool
    expected: memory.Fit | None
    module: LoricaModule
    trainer: Trainer
    parts: Parts
    made_for: dict[str, Any]
    state: dict[str, Any] | None


def make_ready(run: Run) -> Ready | None:
    """Read rows and weights and put the run together; None where only the data report was asked for.

    Raises:
        ConfigError: data, model or hardware can't do what is asked; the run that is gone on with was another.
    """
    config = run.config
    seed_everything(config.seed, workers=True, verbose=False)
    state = checkpoints.load(run.resume_from) if run.resume_from is not None else None
    saved = state["callbacks"][Checkpoints.__name__] if state is not None else None
    asked = fingerprint.of_configuration(config)
    began: dict[str, str] = {}
    if saved is not None:
        fingerprint.check_same(run.folder, saved["made_for"]["configuration"], asked)
        began = saved["made_for"]["found"]
    if run.main and not (config.data.report_only or config.drill):
        run.loggers, notes = loggers.build_loggers(config, run.folder, saved)
        run.notes += notes
    data = build_data(config.data, config.seed)
    data.load()
    if config.data.report_only:
        _look_at_data(run, data)
        return None
    taught_by = _find_teacher(run, data, began)
    machine = hardware.choose(config.trainer, began.get("precision"))
    run.notes += machine.notes
    if config.trainer.fp8:
        hardware.check_fp8(machine)
    prepared = _look_at_data(run, data)
    data.leave_out_unsupervised()
    check_rows(run, data, machine)
    _ask_teacher(run, data, machine)
    architecture = prepared.architecture.to_dict()
    size = _size(run, data, machine, architecture, began)
    loaded = load(config, data, machine, prepared)
    data.connect(batching(run, data, loaded, machine, size.parts))
    before = began["compiled layers"] == "yes" if began else None
    compiled = fitting.compiles(config.trainer.compile, before, loaded, machine.device, len(data.plan))
    base = fingerprint.of_base(loaded.base.path, loaded.base.revision)
    made_for = {
        "configuration": asked,
        "found": {**fingerprint.of_data(data), **fingerprint.of_machine(machine, compiled, loaded.attention, base), **taught_by},
        "versions": fingerprint.versions(),
    }
    if state is not None:
        run.notes += resuming.go_on(run.folder, state, data, made_for["found"])
        if run.main:
            write_config(run.folder, config, sys.argv[1:])
    module, trainer, parts = assemble(run, data, loaded, machine, made_for, saved)
    if state is not None and run.main:
        kept = state["callbacks"].get(parts.keep.state_key)
        run.notes += resuming.mend_best(run.folder, run.weights, kept, module, parts.keep.write)
    expected = sizing.expected(config, data, machine, architecture, size)
    _announce(run, data, loaded, machine, expected)
    fitting.prepare(module, config, machine, size.host_embeddings)
    return Ready(data, machine, loaded, size, compiled, expected, module, trainer, parts, made_for, state)


def _size(run: Run, data: LoricaDataModule, machine: hardware.Machine, architecture: dict[str, Any], began: dict[str, str]) -> Size:
    """In how many parts micro-batches run, and where embeddings wait.

    Args:
        architecture: the base's config.json. began: what a run that goes on began with.
    """
    if began:
        return sizing.going_on(run.config, data, machine, architecture, int(began.get("parts of a micro-batch", "1")))
    into, on_host, why = launch.decided_once(
        lambda: sizing.choose(run.config, data, machine, architecture), run.config.trainer.accelerator, "LORICA_SIZE"
    )
    run.notes += filter(None, [why])
    return Size(into, on_host)


def _find_teacher(run: Run, data: LoricaDataModule, began: dict[str, str]) -> dict[str, str]:
    """Set the run's teacher where it has one; what the fingerprint says of it.

    Args:
        began: what a run that goes on began with.
    Raises:
        ConfigError: it can't be asked, or is another one.
    """
    asked = run.config.distillation
    if asked.teacher is not None and asked.weight == 0:
        run.notes.append("distillation.weight=0: the teacher is not asked")
    elif asked.teacher is not None:
        run.teacher = distillation.find(asked, data.labels or [])
        if why := distillation.doubt(run.teacher, data):
            run.notes.append(why)
    found = {"teacher": f"sha256 {run.teacher.digest[:16]}" if run.teacher is not None else "none"}
    fingerprint.check_same(run.folder, {name: began[name] for name in found if name in began}, found)
    return found


def _ask_teacher(run: Run, data: LoricaDataModule, machine: hardware.Machine) -> None:
    """Give the data what the teacher says of its training rows. The first rank asks; the others find it on disk."""
    teacher, trainer = run.teacher, run.config.trainer
    if teacher is None:
        return

    def ask() -> None:
        labels = data.labels or []
        run.lesson = distillation.ask(teacher, data.splits.train, labels, machine.device, run.screen, trainer.enable_progress_bar)

    launch.decided_once(ask, trainer.accelerator, "LORICA_TEACHER")
    if run.lesson is None:
        ask()
    assert run.lesson is not None
    data.teacher_scores = run.lesson.scores


def _look_at_data(run: Run, data: LoricaDataModule) -> Prepared:
    """Encode the data, write its report, and refuse what must not be trained on; no weights are read.

    Raises:
        ConfigError: on every rank, when a limit of the report is broken.
    """
    config, screen = run.config, run.screen
    with screen.counting("tokenising", config.trainer.enable_progress_bar) as progress:
        prepared = prepare(config, data, run.folder, run.main, run.resume_from is not None, progress)
    if tokenised := summary.tokenised_line(data):
        screen.print(tokenised)
    launch.decided_once(lambda: _report(run, data), config.trainer.accelerator, "LORICA_REPORT")
    return prepared


def _report(run: Run, data: LoricaDataModule) -> None:
    """data_report.*, its time where it is long, and its notes."""
    began = time.perf_counter()
    report = data_report(data)
    write_report(report, run.folder)
    seconds = time.perf_counter() - began
    where, only = run.folder / "data_report.html", run.config.data.report_only
    if only or seconds > 1.0:
        run.screen.print(f"data report of {counted(sum(report['rows'].values()), 'row')} in {duration(seconds)}: {where}")
    try:
        check_report(report, run.config.data, run.folder)
    except ConfigError:
        run.reported = True
        raise
    if only:
        for note in report["notes"]:
            run.screen.note(note)
    run.notes += report["notes"]


def _announce(run: Run, data: LoricaDataModule, loaded: Loaded, machine: hardware.Machine, expected: memory.Fit | None) -> None:
    """What will run, on the screen, before it does."""
    where = str(run.folder) + (f", resumed at micro-step {data.resume_at}" if run.resume_from else "")
    facts = summary.plan_facts(run.config, data, loaded, machine)
    if run.teacher is not None:
        asked = run.config.distillation
        facts.append(("teacher", f"{run.teacher}, temperature {asked.temperature:g}, weight {asked.weight:g}; {run.lesson}"))
    if expected is not None:
        facts.append(("memory", summary.memory_line(expected, sizing.card_at_hand(machine))))
    run.screen.facts("lorica train", [("run", where), *facts])
    for note in [*run.notes, *summary.plan_notes(run.config, data, loaded, machine)]:
        run.screen.note(note)
