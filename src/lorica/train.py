"""`lorica train`: wires data, model, callbacks and loggers into one Lightning Trainer and leaves a complete run folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorica.config import ConfigError, TrainConfig
from lorica.durable import write_json, write_text
from lorica.runs import Held, begin, point_latest, write_config
from lorica.screen import Screen, duration, quiet_libraries
from lorica.signals import EXIT_CODE, Interrupted, Stop
from lorica.states import last_state, step_of

quiet_libraries()

import torch  # noqa: E402
from lightning.pytorch import Callback, Trainer, seed_everything  # noqa: E402

from lorica import (  # noqa: E402
    accumulation,
    checkpoints,
    distillation,
    evaluation,
    fingerprint,
    hardware,
    launch,
    loggers,
    model_card,
    oom,
    plots,
    resuming,
    sizing,
    summary,
)
from lorica.assembly import Parts, Run, assemble, batching  # noqa: E402
from lorica.checkpoints import Checkpoints  # noqa: E402
from lorica.data.gates import check_report  # noqa: E402
from lorica.data.module import LoricaDataModule  # noqa: E402
from lorica.data.registry import build_data  # noqa: E402
from lorica.data.report import data_report, write_report  # noqa: E402
from lorica.models import adapters, fitting, weights  # noqa: E402
from lorica.models.loaded import Loaded, Prepared, load, prepare  # noqa: E402
from lorica.models.module import LoricaModule  # noqa: E402
from lorica.planning import memory  # noqa: E402
from lorica.planning.parts import Size  # noqa: E402

RETRIES = 10  # of the allocator in training; validation's other sizes take some


def run(config: TrainConfig, besides: Sequence[Callback] = ()) -> int:
    """Train, evaluate and write the run folder.

    Args:
        besides: callbacks that look on, called before ours after each micro-step.
    Returns:
        0; 1 when training failed (its traceback is in train.log); 75 when it was asked to stop.
    Raises:
        ConfigError: data, model or hardware can't do what is asked; a folder that was made for the run by its time is removed again,
            unless it holds the data report that says why.
    """
    rank = launch.rank()
    main = rank == 0
    stop = Stop()
    stop.listen()
    held: list[Held] = []
    the_run: Run | None = None
    try:
        chosen, state, existed, notes = launch.decided_once(lambda: _begin(config, held), config.trainer.accelerator, "LORICA_RUN")
        folder = Path(chosen)
        the_run = Run(config, folder, Screen(folder / "train.log", rank), [], Path(state) if state else None, main, stop, besides, notes)
        return _guarded(the_run, existed)
    except Interrupted as e:  # before there was a run
        print(f"lorica: {e}: interrupted before any state was saved", file=sys.stderr)
        return EXIT_CODE
    finally:
        stop.close()
        if the_run is not None:
            the_run.screen.close()
        for one in held:
            one.release()
        os.environ.pop("LORICA_RUN", None)
        os.environ.pop("LORICA_REPORT", None)
        os.environ.pop("LORICA_TEACHER", None)
        os.environ.pop("LORICA_SIZE", None)


def _begin(config: TrainConfig, held: list[Held]) -> tuple[str, str | None, bool, list[str]]:
    """(the run's folder, made; the checkpoint to go on from; whether the folder was there before; what to tell the user)."""
    beginning = begin(config, sys.argv[1:])
    held.append(beginning.held)
    return str(beginning.folder), str(beginning.checkpoint) if beginning.checkpoint else None, beginning.existed, beginning.notes


def _guarded(run: Run, existed: bool) -> int:
    """Train; the exit code that says how it ended. What is the user's to mend is raised as it is."""
    folder, screen = run.folder, run.screen
    try:
        return _train(run)
    except ConfigError as e:
        screen.log(f"refused: {e}")
        _close_loggers(run)
        if run.main and not existed and not run.reported and run.config.run_dir is None and last_state(folder) is None:
            screen.close()
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except (Interrupted, KeyboardInterrupt, SystemExit) as e:
        run.stop.ignore()
        saved = last_state(folder)
        where = f"saved at step {step_of(saved)}; go on with: python train.py resume={folder}" if saved else "before any state was saved"
        screen.print(f"interrupted ({str(e) or type(e).__name__}), {where}")
        _close_loggers(run)
        return EXIT_CODE
    except torch.OutOfMemoryError:
        screen.fail(f"failed: out of memory; the same loss with less: {oom.remedy(run.config)}", traceback.format_exc())
        _close_loggers(run)
        return 1
    except Exception as e:
        screen.fail(f"failed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}", traceback.format_exc())
        _close_loggers(run)
        if os.environ.get("LORICA_VERBOSE"):
            raise
        return 1


def _close_loggers(run: Run, predictions: Sequence[dict[str, Any]] = (), figures: dict[str, float] | None = None) -> None:
    """Close W&B's run; without figures the run failed."""
    upload = run.weights if figures is not None and getattr(run.config.logger, "log_model", False) else None
    if said := loggers.finish_wandb(run.loggers, run.folder, upload, list(predictions), figures or {}, failed=figures is None):
        run.screen.note(said)


def _train(run: Run) -> int:
    config, screen, started = run.config, run.screen, time.perf_counter()
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
        return 0
    taught_by = _find_teacher(run, data, began)
    machine = hardware.choose(config.trainer, began.get("precision"))
    run.notes += machine.notes
    if config.trainer.fp8:
        hardware.check_fp8(machine)
    prepared = _look_at_data(run, data)
    data.leave_out_unsupervised()
    _ask_teacher(run, data, machine)
    architecture = prepared.architecture.to_dict()
    if began:
        size = sizing.going_on(config, data, machine, architecture, int(began.get("parts of a micro-batch", "1")))
    else:
        into, on_host, why = launch.decided_once(
            lambda: sizing.choose(config, data, machine, architecture), config.trainer.accelerator, "LORICA_SIZE"
        )
        size = Size(into, on_host)
        run.notes += filter(None, [why])
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
    if config.drill == "accumulation":
        return _drill(run, module, data, machine, trainer)
    if run.main:
        facts = {"machine": machine.description, "precision": machine.precision, "versions": made_for["versions"]}
        write_json(run.folder / model_card.ENVIRONMENT, facts)
        point_latest(run.folder)
    predicted: dict[str, float] = {}
    if not len(data.plan):
        screen.note("trainer.max_steps=0: nothing is trained, the base as it is is tested")
    if data.resume_at < len(data.plan):
        if config.trainer.on_oom == "halve":
            oom.split_where_needed(module, loaded.layers, data, machine, config, trainer, screen.note, state["parts"] if state else 1)
        room = compiled and expected is not None and expected.job.room_for_evaluation
        found = oom.fit(module, loaded.layers, data, machine, config, compiled, room, trainer, screen.note)
        made_for["found"] |= fingerprint.of_data(data)  # micro-batches may be in more parts now
        if found.seconds or found.recomputed:
            screen.print(f"  layers     {found}; tried in {duration(found.seconds)}")
        for note in found.notes:
            screen.note(note)
        if expected is not None:
            predicted["memory/predicted_gib"] = sizing.after_trying(expected, found, data, size, machine)
        hardware.reset_peak_memory()
        parts.throughput.first_step_after = time.perf_counter() - started
        retries = hardware.allocator_retries(machine.device)
        trainer.fit(module, datamodule=data, ckpt_path=str(run.resume_from) if run.resume_from else None, weights_only=True)
        if (retries := hardware.allocator_retries(machine.device) - retries) > RETRIES:
            screen.note(
                f"memory was so short that training stopped {retries} times to give pieces back; a smaller micro-batch may be faster"
            )
    else:  # all was trained before, and only the test is missing, or the last validation too; or there is nothing to train
        if state is not None:
            module.load_state_dict(state["state_dict"])
            for part in (parts.throughput, parts.keep):
                if part.state_key in state["callbacks"]:
                    part.load_state_dict(state["callbacks"][part.state_key])
            module.skipping.load_state_dict(state["skipped_steps"])
        parts.evaluate.at_step = parts.keep.at_step = int(state["global_step"]) if state is not None else 0
        if saved is None or saved["pending"]:
            trainer.validate(module, datamodule=data, verbose=False)
    del state
    figures = parts.throughput.figures(trainer)
    if parts.keep.best is None and run.main:
        parts.keep.write()  # nothing was validated: the last weights are kept
    trainer.strategy.barrier()
    weights.load(run.weights, module.model)
    figures_of_test, predictions = evaluation.test(data, module, trainer, parts.evaluate, parts.keep.calibration)
    if not run.main:
        return 0
    if not predictions:
        screen.note("there are no test rows")
    figures |= figures_of_test
    figures["train/skipped_steps"] = float(module.skipping.skipped)
    figures["model/trainable"], figures["model/weights"] = map(float, adapters.count(loaded.model))
    figures["memory/peak_gib"] = hardware.peak_memory_gib(machine.device, module.captured_peak)
    if (reserved := hardware.reserved_memory_gib(machine.device)) is not None:
        figures["memory/reserved_gib"] = reserved
    figures |= predicted
    if run.lesson is not None:
        figures["time/teacher_seconds"] = run.lesson.seconds
    figures["time/total_seconds"] = time.perf_counter() - started
    _finish(run, data, parts, figures, predictions)
    screen.table(f"{config.data.name} with {config.model.name}", summary.closing_rows(figures, run.resume_from is not None))
    screen.print(f"run folder  {run.folder}")
    screen.print(f"next        {summary.next_command(run.folder, data)}")
    return 0


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


def _drill(run: Run, module: LoricaModule, data: LoricaDataModule, machine: hardware.Machine, trainer: Trainer) -> int:
    """`debug=accumulation`: 0 where the gradients differ by rounding only, else 1."""
    if machine.world_size > 1:
        raise ConfigError("trainer.devices", machine.world_size, "debug=accumulation runs on one", "trainer.devices=1")
    windows = accumulation.measure(module, data, trainer.precision_plugin.train_step_context)
    computed = machine.compute_dtype if machine.precision != "32-true" else torch.float32
    found, lines, exact = accumulation.report(windows, computed)
    write_json(run.folder / "accumulation.json", found)
    run.screen.facts("accumulation: relative difference from one large batch", lines)
    bound = found["rounding"]
    run.screen.print(
        f"{'equal' if exact else 'NOT equal'}: in {machine.precision} up to {bound:.0e} is rounding; {run.folder / 'accumulation.json'}"
    )
    return 0 if exact else 1


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
        run.screen.print(f"data report of {sum(report['rows'].values()):,} rows in {duration(seconds)}: {where}")
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


def _finish(run: Run, data: LoricaDataModule, parts: Parts, figures: dict[str, float], predictions: list[dict[str, Any]]) -> None:
    """Plots, predictions, W&B, and metrics.json last."""
    folder = run.folder
    if predictions:
        write_text(folder / "predictions.jsonl", "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in predictions))
    if parts.keep.best is not None:
        figures[parts.keep.monitor + "_best"] = parts.keep.best
        figures["train/best_step"] = float(parts.keep.best_step)
    plots.draw_curves(folder / "metrics.csv", folder / "curves.png", parts.keep.monitor, parts.keep.best_step)
    if parts.evaluate.confusion is not None and data.labels is not None and predictions:
        plots.draw_confusion(parts.evaluate.confusion, data.labels, folder / "confusion.png")
    model_card.write(folder, run.weights, figures)
    _close_loggers(run, predictions, figures)
    write_json(folder / "metrics.json", figures)
