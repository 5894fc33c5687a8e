"""Micro-batches that don't fit into the GPU's memory: found before training, or met in it; in parts with `trainer.on_oom=halve`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer

from lorica.callbacks import SeedSteps
from lorica.config import NotApplicable, TrainConfig
from lorica.data.module import LoricaDataModule
from lorica.hardware import Machine
from lorica.kernels.layers import Layers
from lorica.models import fitting
from lorica.models.halving import Halving
from lorica.models.module import LoricaModule


def split_where_needed(
    module: LoricaModule,
    layers: Layers,
    data: LoricaDataModule,
    machine: Machine,
    config: TrainConfig,
    trainer: Trainer,
    note: Callable[[str], None],
    parts: int,
) -> None:
    """Have micro-batches run in parts where they don't fit, as many as `parts` from the beginning.

    Raises:
        NotApplicable: several devices, or an fp16 scaler.
    """
    if machine.world_size > 1 or machine.precision == "16-mixed":
        why = "works on one device" if machine.world_size > 1 else "does not work in trainer.precision=16-mixed"
        raise NotApplicable("trainer.on_oom", "halve", why, "trainer.on_oom=stop")
    seeds = SeedSteps(config.seed)

    def changed(parts: int) -> None:
        layers.compile(False)  # parts come in all sizes
        module.captured = None
        note(f"out of memory at step {trainer.global_step + 1}: micro-batches are run in {parts} parts from here on")

    def split(batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
        return [module.transfer_batch_to_device(part, machine.device, 0) for part in data.parts_of(batch, parts)]

    module.halving = Halving(
        split,
        lambda micro_step: seeds.set(trainer, module, micro_step),
        data.plan.accumulate,
        trainer.precision_plugin.train_step_context,
        changed,
        parts,
    )
    data.parts = parts


def fit(
    module: LoricaModule,
    layers: Layers,
    data: LoricaDataModule,
    machine: Machine,
    config: TrainConfig,
    compiled: bool,
    room_for_evaluation: bool,
    trainer: Trainer,
    note: Callable[[str], None],
) -> fitting.Fit:
    """`fitting.fit`, in as many parts as fit: planned ones (`trainer.fit`, unless the run goes on), else halves (`trainer.on_oom`).

    Raises:
        ConfigError: not even single rows fit, or parts are not to be made.
    """
    arithmetic = trainer.precision_plugin.train_step_context
    while True:
        try:
            fixed = data.parts == 1  # sizes of micro-batches
            return fitting.fit(module, layers, data, machine, config, compiled and fixed, room_for_evaluation and fixed, arithmetic, note)
        except fitting.TooLarge:
            planned = config.trainer.fit and machine.world_size == 1 and not data.resume_at
            if not (planned or module.halving) or max(len(batch["rows"]) for batch in data.largest_batches()) < 2:
                raise
        data.shapes = []
        if planned:
            data.in_parts(2 * data.plan.parts)
            trainer.accumulate_grad_batches = data.plan.accumulate
            if module.halving is not None:
                module.halving.accumulate = data.plan.accumulate
        else:
            assert module.halving is not None
            data.parts = module.halving.parts = 2 * data.parts
        parts = data.plan.parts * data.parts
        note(f"the largest micro-batch does not fit: micro-batches are run in {parts} parts, with the same rows and the same loss a step")


def remedy(config: TrainConfig) -> str:
    """What to type after a run that did not fit, for the same loss."""
    if config.trainer.on_oom != "halve":
        return "trainer.on_oom=halve"
    return "trainer.gradient_checkpointing=true" if not config.trainer.gradient_checkpointing else "a smaller model.max_length"
