"""`lorica train`: gets a run ready, trains it, tests it and leaves a complete run folder; how it ends when that is broken off."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorica.config import ConfigError, TrainConfig
from lorica.durable import write_json, write_text
from lorica.runs import Held, begin, going_on, point_latest
from lorica.screen import Screen, duration, quiet_libraries
from lorica.signals import Interrupted, Stop, exit_code
from lorica.states import last_state, step_of

quiet_libraries()

import torch  # noqa: E402
from lightning.pytorch import Callback  # noqa: E402

from lorica import (  # noqa: E402
    accumulation,
    evaluation,
    fingerprint,
    hardware,
    launch,
    loggers,
    model_card,
    oom,
    plots,
    sizing,
    summary,
)
from lorica.assembly import Parts, Run  # noqa: E402
from lorica.checkpoints import Checkpoints  # noqa: E402
from lorica.data.module import LoricaDataModule  # noqa: E402
from lorica.models import adapters, weights  # noqa: E402
from lorica.readying import Ready, make_ready  # noqa: E402

RETRIES = 10  # of the allocator in training; validation's other sizes take some


def run(config: TrainConfig, besides: Sequence[Callback] = ()) -> int:
    """Train, evaluate and write the run folder.

    Args:
        besides: callbacks that look on, called before ours after each micro-step.
    Returns:
        0; 1 when training failed (its traceback is in train.log); 75 when it was asked to stop, or 130
            where that was Ctrl-C before any state was saved.
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
        return exit_code(e.signum, kept=False)
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
        where = f"saved at step {step_of(saved)}; go on with: {going_on(folder)}" if saved else "before any state was saved"
        screen.print(f"interrupted ({str(e) or type(e).__name__}), {where}")
        _close_loggers(run)
        return exit_code(e.signum if isinstance(e, Interrupted) else signal.SIGINT, kept=saved is not None)
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
    started = time.perf_counter()
    ready = make_ready(run)
    if ready is None:  # the data report was all that was asked for
        return 0
    if run.config.drill == "accumulation":
        return _drill(run, ready)
    if run.main:
        machine = ready.machine
        facts = {"machine": machine.description, "precision": machine.precision, "versions": ready.made_for["versions"]}
        write_json(run.folder / model_card.ENVIRONMENT, facts)
        point_latest(run.folder)
    predicted: dict[str, float] = {}
    if not len(ready.data.plan):
        run.screen.note("trainer.max_steps=0: nothing is trained, the base as it is is tested")
    if ready.data.resume_at < len(ready.data.plan):
        predicted = _learn(run, ready, started)
    else:
        _have_learnt(ready)
    _test(run, ready, predicted, started)
    return 0


def _learn(run: Run, ready: Ready, started: float) -> dict[str, float]:
    """Fit the layers to the GPU and train; the memory that was predicted, for metrics.json."""
    config, screen = run.config, run.screen
    data, machine, module, trainer = ready.data, ready.machine, ready.module, ready.trainer
    before, ready.state = ready.state["parts"] if ready.state else 1, None
    if config.trainer.on_oom == "halve":
        oom.split_where_needed(module, ready.loaded.layers, data, machine, config, trainer, screen.note, before)
    room = ready.compiled and ready.expected is not None and ready.expected.job.room_for_evaluation
    found = oom.fit(module, ready.loaded.layers, data, machine, config, ready.compiled, room, trainer, screen.note)
    ready.made_for["found"] |= fingerprint.of_data(data)  # micro-batches may be in more parts now
    if found.seconds or found.recomputed:
        screen.print(f"  layers     {found}; tried in {duration(found.seconds)}")
    for note in found.notes:
        screen.note(note)
    predicted = {}
    if ready.expected is not None:
        predicted["memory/predicted_gib"] = sizing.after_trying(ready.expected, found, data, ready.size, machine)
    hardware.reset_peak_memory()
    ready.parts.throughput.first_step_after = time.perf_counter() - started
    retries = hardware.allocator_retries(machine.device)
    trainer.fit(module, datamodule=data, ckpt_path=str(run.resume_from) if run.resume_from else None, weights_only=True)
    if (retries := hardware.allocator_retries(machine.device) - retries) > RETRIES:
        screen.note(f"memory was so short that training stopped {retries} times to give pieces back; a smaller micro-batch may be faster")
    return predicted


def _have_learnt(ready: Ready) -> None:
    """All was trained before, and only the test is missing, or the last validation too; or there is nothing to train."""
    parts, state, ready.state = ready.parts, ready.state, None
    if state is not None:
        ready.module.load_state_dict(state["state_dict"])
        for part in (parts.throughput, parts.keep):
            if part.state_key in state["callbacks"]:
                part.load_state_dict(state["callbacks"][part.state_key])
        ready.module.skipping.load_state_dict(state["skipped_steps"])
    parts.evaluate.at_step = parts.keep.at_step = int(state["global_step"]) if state is not None else 0
    if state is None or state["callbacks"][Checkpoints.__name__]["pending"]:
        ready.trainer.validate(ready.module, datamodule=ready.data, verbose=False)


def _test(run: Run, ready: Ready, predicted: dict[str, float], started: float) -> None:
    """Test the best weights, write what a finished run has, and say what came out."""
    config, screen = run.config, run.screen
    data, module, parts, device = ready.data, ready.module, ready.parts, ready.machine.device
    figures = parts.throughput.figures(ready.trainer)
    if parts.keep.best is None and run.main:
        parts.keep.write()  # nothing was validated: the last weights are kept
    ready.trainer.strategy.barrier()
    weights.load(run.weights, module.model)
    figures_of_test, predictions = evaluation.test(data, module, ready.trainer, parts.evaluate, parts.keep.calibration)
    if not run.main:
        return
    if not predictions:
        screen.note("there are no test rows")
    figures |= figures_of_test
    figures["train/skipped_steps"] = float(module.skipping.skipped)
    figures["model/trainable"], figures["model/weights"] = map(float, adapters.count(ready.loaded.model))
    figures["memory/peak_gib"] = hardware.peak_memory_gib(device, module.captured_peak)
    if (reserved := hardware.reserved_memory_gib(device)) is not None:
        figures["memory/reserved_gib"] = reserved
    figures |= predicted
    if run.lesson is not None:
        figures["time/teacher_seconds"] = run.lesson.seconds
    figures["time/total_seconds"] = time.perf_counter() - started
    _finish(run, data, parts, figures, predictions)
    screen.table(f"{config.data.name} with {config.model.name}", summary.closing_rows(figures, run.resume_from is not None))
    screen.print(f"run folder  {run.folder}")
    screen.print(f"next        {summary.next_command(run.folder, data)}")


def _drill(run: Run, ready: Ready) -> int:
    """`debug=accumulation`: 0 where the gradients differ by rounding only, else 1."""
    machine = ready.machine
    if machine.world_size > 1:
        raise ConfigError("trainer.devices", machine.world_size, "debug=accumulation runs on one", "trainer.devices=1")
    windows = accumulation.measure(ready.module, ready.data, ready.trainer.precision_plugin.train_step_context)
    computed = machine.compute_dtype if machine.precision != "32-true" else torch.float32
    found, lines, exact = accumulation.report(windows, computed)
    write_json(run.folder / "accumulation.json", found)
    run.screen.facts("accumulation: relative difference from one large batch", lines)
    bound = found["rounding"]
    run.screen.print(
        f"{'equal' if exact else 'NOT equal'}: in {machine.precision} up to {bound:.0e} is rounding; {run.folder / 'accumulation.json'}"
    )
    return 0 if exact else 1


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
