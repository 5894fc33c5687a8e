"""`lorica train`: wires data, model, callbacks and loggers into one Lightning Trainer and leaves a complete run folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorica.config import ConfigError, TrainConfig
from lorica.runs import checkpoint_step, choose_run_dir, last_checkpoint, point_latest, start_run, write_config, write_json, write_text
from lorica.screen import Screen, duration, quiet_libraries

quiet_libraries()

import torch  # noqa: E402  (after the libraries' noise is off)
from lightning.pytorch import Callback, Trainer, seed_everything  # noqa: E402
from lightning.pytorch.callbacks import EarlyStopping  # noqa: E402
from lightning.pytorch.loggers import Logger  # noqa: E402

from lorica import accumulation, evaluation, hardware, launch, loggers, plots, summary  # noqa: E402
from lorica import callbacks as cb  # noqa: E402
from lorica.data.gates import check_report  # noqa: E402
from lorica.data.module import Batching, LoricaDataModule  # noqa: E402
from lorica.data.registry import build_data  # noqa: E402
from lorica.data.report import data_report, write_report  # noqa: E402
from lorica.models import fitting, weights  # noqa: E402
from lorica.models.causal_lm import CausalLMModule  # noqa: E402
from lorica.models.loaded import Loaded, Prepared, load, prepare  # noqa: E402
from lorica.models.module import LoricaModule  # noqa: E402
from lorica.models.sequence_classifier import SequenceClassifierModule  # noqa: E402

EVAL_TOKENS_FACTOR = 4  # evaluation keeps no activations: its batches may be larger


@dataclass
class Run:
    """Everything that one training run holds together."""

    config: TrainConfig
    folder: Path
    screen: Screen
    loggers: list[Logger]
    resume_from: Path | None
    main: bool
    notes: list[str] = field(default_factory=list)
    reported: bool = False  # the folder holds a data report that the run was refused by

    @property
    def weights(self) -> Path:
        """Where the best weights go: an adapter, or the whole model of a full fine-tuning."""
        return self.folder / ("adapter" if self.config.model.lora is not None else "model")


def run(config: TrainConfig) -> int:
    """Train, evaluate and write the run folder.

    Returns:
        0, or 1 when training failed (its traceback is in train.log).
    Raises:
        ConfigError: data, model or hardware can't do what is asked; a folder that was made for the run by its time is removed again,
            unless it holds the data report that says why.
    """
    rank = launch.rank()
    main = rank == 0
    chosen, state, existed = launch.decided_once(lambda: _start(config), config.trainer.accelerator, "LORICA_RUN")
    folder, checkpoint = Path(chosen), Path(state) if state else None
    screen = Screen(folder / "train.log", rank)
    the_run = Run(config, folder, screen, [], checkpoint, main)
    try:
        if main and not config.data.report_only:
            the_run.loggers, note = loggers.build_loggers(config, folder, checkpoint_step(checkpoint) if checkpoint else None)
            the_run.notes += [note] if note else []
        return _train(the_run)
    except ConfigError as e:
        screen.log(f"refused: {e}")
        loggers.finish_wandb(the_run.loggers, folder, None, [], {}, failed=True)
        screen.close()
        if main and not existed and not the_run.reported and config.run_dir is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        loggers.finish_wandb(the_run.loggers, folder, None, [], {}, failed=True)
        saved = last_checkpoint(folder) is not None
        screen.print(f"interrupted; go on with: python train.py resume={folder}" if saved else "interrupted before any state was saved")
        return 130
    except Exception as e:
        screen.fail(f"failed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}", traceback.format_exc())
        loggers.finish_wandb(the_run.loggers, folder, None, [], {}, failed=True)
        if os.environ.get("LORICA_VERBOSE"):
            raise
        return 1
    finally:
        screen.close()
        os.environ.pop("LORICA_RUN", None)
        os.environ.pop("LORICA_REPORT", None)


def _start(config: TrainConfig) -> tuple[str, str | None, bool]:
    """(the run's folder, made; the checkpoint to go on from; whether the folder was there before)."""
    folder, checkpoint = choose_run_dir(config)
    existed = folder.exists()
    try:
        folder = start_run(folder, config, sys.argv[1:])
    except OSError as e:
        raise ConfigError("run_dir", folder, f"can't be written ({e.strerror})", "run_dir=<a folder of yours>") from None
    return str(folder), str(checkpoint) if checkpoint else None, existed


def _resume(run: Run, state: dict[str, Any], data: LoricaDataModule, made_for: dict[str, str]) -> None:
    """Where training goes on.

    Raises:
        ConfigError: the checkpoint is of another plan, or of a longer one.
    """
    saved = state["callbacks"][cb.Checkpoints.__name__]
    differing = [name for name, value in saved["made_for"].items() if made_for[name] != value]
    if differing:
        raise ConfigError(
            "resume",
            run.folder,
            f"the run was started with {' and '.join(differing)} that differ from now: it can't go on to the same weights",
            f"resume={run.folder} with nothing else, or a new run",
        )
    data.resume_at = int(state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"])
    if data.resume_at > len(data.plan):
        raise ConfigError(
            "resume",
            run.folder,
            f"{data.resume_at} micro-steps were trained, more than the {len(data.plan)} that are asked for now",
            "a larger trainer.max_epochs or trainer.max_steps",
        )
    if saved["stopped"]:  # early: only the test is missing
        data.resume_at = len(data.plan)


def _train(run: Run) -> int:
    config, screen, started = run.config, run.screen, time.perf_counter()
    seed_everything(config.seed, workers=True, verbose=False)
    data = build_data(config.data, config.seed)
    data.load()
    if config.data.report_only:
        _look_at_data(run, data)
        return 0
    state = torch.load(run.resume_from, weights_only=True, map_location="cpu") if run.resume_from is not None else None
    began = state["callbacks"][cb.Checkpoints.__name__]["made_for"] if state is not None else {}
    machine = hardware.choose(config.trainer, began.get("a precision"))
    run.notes += machine.notes
    if config.trainer.fp8:
        hardware.check_fp8(machine)
    prepared = _look_at_data(run, data)
    data.leave_out_unsupervised()
    loaded = load(config, data, machine, prepared)
    batching = _batching(run, data, loaded, machine)
    data.connect(batching)
    before = began["compiled layers"] == "yes" if "compiled layers" in began else None
    compiled = fitting.compiles(config.trainer.compile, before, loaded, machine.device, len(data.plan))
    made_for = {
        "rows, a seed, batches or devices": data.plan.fingerprint(),
        "a kind of device": machine.device.type,
        "a precision": machine.precision,
        "FP8": "yes" if config.trainer.fp8 else "no",
        "compiled layers": "yes" if compiled else "no",
    }
    if state is not None:
        _resume(run, state, data, made_for)
        if run.main:
            write_config(run.folder, config, sys.argv[1:])
    module, trainer, parts = _assemble(run, data, loaded, machine, made_for)
    _announce(run, data, loaded, machine)
    fitting.prepare(module, config, machine)
    if config.drill == "accumulation":
        return _drill(run, module, data, machine, trainer)
    if run.main:
        point_latest(run.folder)
    if state is None or data.resume_at < len(data.plan):
        arithmetic = trainer.precision_plugin.train_step_context
        found = fitting.fit(module, loaded.layers, data, machine, config, compiled, arithmetic, screen.note)
        if found.seconds or found.recomputed:
            screen.print(f"  layers     {found}; tried in {duration(found.seconds)}")
        for note in found.notes:
            screen.note(note)
        hardware.reset_peak_memory()
        parts.throughput.first_step_after = time.perf_counter() - started
        trainer.fit(module, datamodule=data, ckpt_path=str(run.resume_from) if run.resume_from else None, weights_only=True)
        if trainer.interrupted:
            raise KeyboardInterrupt
    else:  # all was trained before, and only the test is missing
        module.load_state_dict(state["state_dict"])
        for part in (parts.throughput, parts.keep):
            if part.state_key in state["callbacks"]:
                part.load_state_dict(state["callbacks"][part.state_key])
    del state
    figures = parts.throughput.figures(trainer)
    if parts.keep.best is None and run.main:
        parts.keep.write()  # nothing was validated: the last weights are kept
    trainer.strategy.barrier()
    weights.load(run.weights, module.model)
    figures_of_test, predictions = evaluation.test(data, module, trainer, parts.evaluate)
    if not run.main:
        return 0
    if not predictions:
        screen.note("there are no test rows")
    figures |= figures_of_test
    figures["memory/peak_gib"] = hardware.peak_memory_gib(machine.device)
    figures["time/total_seconds"] = time.perf_counter() - started
    _finish(run, data, parts, figures, predictions)
    screen.table(f"{config.data.name} with {config.model.name}", summary.closing_rows(figures))
    screen.print(f"run folder  {run.folder}")
    screen.print(f"next        {summary.next_command(run.folder, data)}")
    return 0


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
        prepared = prepare(config, data, run.folder, run.main, progress)
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


def _batching(run: Run, data: LoricaDataModule, loaded: Loaded, machine: hardware.Machine) -> Batching:
    t = run.config.trainer
    longest = max(len(r.ids) for r in data.train_rows)
    if t.batch_size is not None:
        window = t.batch_size * t.accumulate_grad_batches * machine.world_size
        if window > len(data.train_rows):
            raise ConfigError(
                "trainer.batch_size",
                t.batch_size,
                f"a step would take {t.batch_size} x {t.accumulate_grad_batches} x {machine.world_size} devices = {window} examples; "
                f"there are {len(data.train_rows)}",
                f"trainer.batch_size={max(1, len(data.train_rows) // (t.accumulate_grad_batches * machine.world_size))}",
            )
    for split, rows in data.eval_rows.items():
        if 0 < len(rows) < machine.world_size:
            raise ConfigError(
                "trainer.devices", machine.world_size, f"there are only {len(rows)} {split} rows to share", f"trainer.devices={len(rows)}"
            )
    return Batching(
        pad_id=loaded.tokenizer.pad_token_id,
        padded=loaded.padded,
        eval_tokens=EVAL_TOKENS_FACTOR * max(t.tokens_per_batch or 0, min((t.batch_size or 1) * longest, 4096), 1024),
        world_size=machine.world_size,
        rank=machine.rank,
        plan={
            "batch_size": t.batch_size,
            "tokens_per_batch": t.tokens_per_batch,
            "accumulate": t.accumulate_grad_batches,
            "group_by_length": t.group_by_length,
            "max_epochs": t.max_epochs,
            "max_steps": t.max_steps,
        },
    )


@dataclass
class Parts:
    """The callbacks that are asked for figures afterwards."""

    throughput: cb.Throughput
    evaluate: cb.Evaluate
    keep: cb.KeepBest


def _assemble(
    run: Run, data: LoricaDataModule, loaded: Loaded, machine: hardware.Machine, made_for: dict[str, str]
) -> tuple[LoricaModule, Trainer, Parts]:
    config, t, plan = run.config, run.config.trainer, data.plan
    cls = CausalLMModule if config.model.task == "causal_lm" else SequenceClassifierModule
    scaled = machine.precision == "16-mixed"
    module = cls(loaded.model, config.optimizer, plan.steps, fused=not (scaled and t.gradient_clip_val is not None))
    has_validation = bool(data.eval_rows["validation"])
    throughput = cb.Throughput()
    record = cb.RecordLoss(throughput, t.log_every_n_steps, plan.steps, plan.epoch_at)
    d: Any = config.data
    write_answers = (lambda: evaluation.answer(data, module, d.max_generated_examples, d.max_new_tokens)) if data.generative else None
    evaluate = cb.Evaluate(data.labels, write_answers)
    keep = cb.KeepBest(
        "val/f1_macro" if data.labels else "val/loss",
        lambda: weights.save(run.weights, config, data, loaded.base, loaded.tokenizer, module.model),
    )
    points = plan.validation_steps(t.val_check_interval)
    every = t.checkpoint_every_n_steps
    save_after = (lambda step: step % every == 0 or step == plan.steps) if every else set(points).__contains__
    progress = cb.ShowProgress(run.screen, record, plan.steps, t.enable_progress_bar)
    parts: list[Callback] = [throughput, cb.SeedSteps(config.seed), record, evaluate]
    if has_validation:
        parts += [cb.ValidationPoints(points, t.accumulate_grad_batches), keep]
    if t.early_stopping_patience is not None:
        if not has_validation:
            raise ConfigError(
                "trainer.early_stopping_patience",
                t.early_stopping_patience,
                "there are no validation rows to watch",
                "data.validation_fraction=0.1",
            )
        mode = "min" if keep.monitor.endswith("loss") else "max"
        parts.append(EarlyStopping(keep.monitor, patience=t.early_stopping_patience, mode=mode, check_on_train_epoch_end=False))
    validated = set(points).__contains__ if has_validation else lambda step: False
    parts += [cb.Checkpoints(run.folder / "checkpoints", save_after, validated, made_for, throughput.pause), progress]
    trainer = Trainer(
        accelerator=machine.accelerator,
        devices=machine.devices,
        num_nodes=t.num_nodes,
        strategy=machine.strategy(t.strategy),
        precision=machine.precision,  # type: ignore[arg-type]
        max_epochs=1,  # the plan is one sequence of micro-steps over all epochs
        accumulate_grad_batches=t.accumulate_grad_batches,
        gradient_clip_val=t.gradient_clip_val,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        limit_val_batches=None if has_validation else 0,
        deterministic=t.deterministic or None,
        detect_anomaly=t.detect_anomaly,
        logger=run.loggers or False,
        callbacks=parts,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=str(run.folder),
    )
    return module, trainer, Parts(throughput, evaluate, keep)


def _announce(run: Run, data: LoricaDataModule, loaded: Loaded, machine: hardware.Machine) -> None:
    """What will run, on the screen, before it does."""
    where = str(run.folder) + (f", resumed at micro-step {data.resume_at}" if run.resume_from else "")
    run.screen.facts("lorica train", [("run", where), *summary.plan_facts(run.config, data, loaded, machine)])
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
    loggers.finish_wandb(
        run.loggers, folder, run.weights if getattr(run.config.logger, "log_model", False) else None, predictions, figures, failed=False
    )
    write_json(folder / "metrics.json", figures)
