"""What one training run holds together, and the Trainer that is made of it: module, callbacks, batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger

from lorica import callbacks as cb
from lorica import checkpoints, distillation, evaluation, hardware, loggers, states
from lorica.checkpoints import Checkpoints
from lorica.checks import check_step
from lorica.config import ConfigError, TrainConfig
from lorica.data.module import Batching, LoricaDataModule
from lorica.metrics_log import MetricsLog
from lorica.models import weights
from lorica.models.loaded import Loaded
from lorica.models.module import CausalLMModule, LoricaModule, SequenceClassifierModule
from lorica.models.soft_labels import SoftLabels
from lorica.screen import Screen
from lorica.signals import Stop

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
    stop: Stop
    besides: Sequence[Callback]
    notes: list[str] = field(default_factory=list)
    reported: bool = False  # the folder holds a data report that the run was refused by
    teacher: distillation.Teacher | None = None
    lesson: distillation.Lesson | None = None

    @property
    def weights(self) -> Path:
        """Where the best weights go: an adapter, or the whole model of a full fine-tuning."""
        return self.folder / ("adapter" if self.config.model.lora is not None else "model")


def check_rows(run: Run, data: LoricaDataModule, machine: hardware.Machine) -> None:
    """Refuse more than there are rows for, before weights are read.

    Raises:
        ConfigError: more examples a step, or more devices, than there are rows.
    """
    check_step(run.config.trainer, len(data.train_rows), machine.world_size)
    for split, rows in data.eval_rows.items():
        if 0 < len(rows) < machine.world_size:
            raise ConfigError(
                "trainer.devices", machine.world_size, f"there are only {len(rows)} {split} rows to share", f"trainer.devices={len(rows)}"
            )


def batching(run: Run, data: LoricaDataModule, loaded: Loaded, machine: hardware.Machine, parts: int) -> Batching:
    """How the run's batches are made.

    Args:
        parts: that each micro-batch is cut into.
    """
    t = run.config.trainer
    longest = max(len(r.ids) for r in data.train_rows)
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
            "parts": parts,
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


def assemble(
    run: Run,
    data: LoricaDataModule,
    loaded: Loaded,
    machine: hardware.Machine,
    made_for: dict[str, Any],
    resumed: dict[str, Any] | None,
) -> tuple[LoricaModule, Trainer, Parts]:
    """The module, and a Trainer with all callbacks.

    Args:
        made_for: what a state that is written says of the run (`fingerprint`). resumed: what the state that is gone on from says.
    Raises:
        ConfigError: early stopping without validation.
    """
    config, t, plan = run.config, run.config.trainer, data.plan
    cls = CausalLMModule if config.model.task == "causal_lm" else SequenceClassifierModule
    scaled = machine.precision == "16-mixed"
    module = cls(loaded.model, config.optimizer, plan.steps, fused=not (scaled and t.gradient_clip_val is not None))
    if data.teacher_scores is not None:
        assert isinstance(module, SequenceClassifierModule)
        module.soft = SoftLabels(config.distillation.temperature, config.distillation.weight)
    has_validation = bool(data.eval_rows["validation"])
    throughput = cb.Throughput(hardware.energy_meter(machine.device))
    record = cb.RecordLoss(throughput, t.log_every_n_steps, plan.steps, plan.epoch_at)
    d: Any = config.data
    write_answers = (lambda: evaluation.answer(data, module, d.max_generated_examples, d.max_new_tokens)) if data.generative else None
    evaluate = cb.Evaluate(data.labels, write_answers)
    keep = cb.KeepBest(
        "val/f1_macro" if data.labels else "val/loss",
        lambda calibration: weights.save(run.weights, config, data, loaded.base, loaded.tokenizer, module.model, calibration),
        evaluate.calibration,
    )
    points = plan.validation_steps(t.val_check_interval)
    every = t.checkpoint_every_n_steps
    save_after = (lambda step: step % every == 0 or step == plan.steps) if every else set(points).__contains__
    progress = cb.ShowProgress(run.screen, record, plan.steps, t.enable_progress_bar)
    skipped = cb.SkippedSteps(t.max_skipped_steps, t.log_every_n_steps, data.rows_of_step, run.screen.note)
    parts: list[Callback] = [*run.besides, throughput, cb.SeedSteps(config.seed), skipped, record, evaluate]
    if has_validation:
        parts += [cb.ValidationPoints(points), keep]
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
    log = run.loggers[0] if run.loggers else None
    io = checkpoints.DurableIO(lambda: states.retain(run.folder, t.keep_checkpoints))
    assert log is None or isinstance(log, MetricsLog)
    parts += [
        Checkpoints(
            run.folder,
            io,
            checkpoints.When(save_after, validated),
            made_for,
            throughput.pause,
            run.stop,
            log,
            loggers.wandb_id(run.folder) if len(run.loggers) > 1 else None,
            resumed,
        ),
        progress,
    ]
    trainer = _trainer(run, machine, plan.accumulate, parts, io, has_validation)
    return module, trainer, Parts(throughput, evaluate, keep)


def _trainer(
    run: Run, machine: hardware.Machine, accumulate: int, callbacks: list[Callback], io: checkpoints.DurableIO, validates: bool
) -> Trainer:
    """Lightning's loop over the plan's micro-steps; what it would print, count and save by itself is off."""
    t = run.config.trainer
    return Trainer(
        accelerator=machine.accelerator,
        devices=machine.devices,
        num_nodes=t.num_nodes,
        strategy=machine.strategy(t.strategy),
        precision=machine.precision,  # type: ignore[arg-type]
        max_epochs=1,  # the plan is one sequence of micro-steps over all epochs
        accumulate_grad_batches=accumulate,
        gradient_clip_val=t.gradient_clip_val,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        limit_val_batches=None if validates else 0,
        deterministic=t.deterministic or None,
        detect_anomaly=t.detect_anomaly,
        logger=run.loggers or False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        default_root_dir=str(run.folder),
        plugins=[io],
    )
