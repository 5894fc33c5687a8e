"""What a run prints of itself: what will run, before it does; the figures and the next command, after."""

from __future__ import annotations

from pathlib import Path

from lorica import hardware
from lorica.config import TrainConfig
from lorica.data.module import LoricaDataModule
from lorica.models import adapters, optimizers
from lorica.models.loaded import Loaded
from lorica.models.weights import dtype_name
from lorica.screen import duration, short


def plan_facts(config: TrainConfig, data: LoricaDataModule, loaded: Loaded, machine: hardware.Machine) -> list[tuple[str, str]]:
    """(name, value) lines of what will run."""
    t, plan, splits = config.trainer, data.plan, data.splits
    trainable, total = adapters.count(loaded.model)
    quantization = config.model.quantization
    bits = f"4-bit {quantization.bnb_4bit_quant_type}" if quantization and quantization.load_in_4bit else dtype_name(loaded.model)
    attn = loaded.attention.removeprefix("lorica_") if loaded.padded else "varlen, no padding"
    size = f"{t.batch_size} examples" if t.batch_size is not None else f"up to {t.tokens_per_batch:,} tokens"
    devices = f"{machine.world_size} device{'s' if machine.world_size > 1 else ''}"
    name, _ = optimizers.effective_name(str(config.optimizer.name), machine.device)
    warmup = optimizers.warmup_steps(config.optimizer, plan.steps)
    rows = f"{len(splits.train):,} train, {len(splits.validation):,} validation, {len(splits.test):,} test"
    return [
        ("model", f"{loaded.base.name}, {short(total)} weights ({bits}), {short(trainable)} trainable ({trainable / total:.2%})"),
        ("data", f"{config.data.name} ({config.data.source}): {rows}; {data.truncation}"),
        (
            "steps",
            f"{plan.steps:,} ({plan.epoch_at(plan.steps):.3g} epochs) of {size} x {t.accumulate_grad_batches} accumulated x {devices}",
        ),
        ("optimiser", f"{name}, lr {config.optimizer.lr:g} {config.optimizer.lr_scheduler_type}, warm-up {warmup}"),
        ("machine", f"{machine.description}, precision {machine.precision}, attention {attn}"),
    ]


def plan_notes(config: TrainConfig, data: LoricaDataModule, loaded: Loaded, machine: hardware.Machine) -> list[str]:
    """What the user did not ask for but should know."""
    notes = []
    architecture = loaded.model.config
    rate = getattr(architecture, "attention_probs_dropout_prob", getattr(architecture, "attention_dropout", 0.0))
    if rate and not loaded.padded:
        notes.append(f"variable-length attention has no dropout: the model's {rate:g} is left out; model.attn_implementation=sdpa keeps it")
    _, why = optimizers.effective_name(str(config.optimizer.name), machine.device)
    if why:
        notes.append(why)
    ends = data.plan.epoch_ends
    if len(ends) > 1 and ends[0] == 1:
        notes.append(f"one step takes all {len(data.train_rows)} training rows; a smaller trainer.tokens_per_batch gives more steps")
    if data.faults:
        notes.append(f"{len(data.faults):,} bad rows were skipped (data_report.md)")
    return notes


def closing_rows(figures: dict[str, float]) -> list[tuple[str, str]]:
    """(name, value) lines of the closing table."""
    rows = [
        (k, f"{v:.4f}")
        for k, v in figures.items()
        if k.startswith("test/") and not k.endswith("per_second") and "/" not in k.removeprefix("test/")
    ]
    rows += [(k, f"{figures[k]:.4f}") for k in figures if k.startswith("test/f1/")]
    rates = f"{figures['train/tokens_per_second']:,.0f} tokens/s, {figures['train/samples_per_second']:,.1f} examples/s"
    rows.append(("training", f"{duration(figures['train/seconds'])}, {rates}"))
    rows.append(("peak memory", f"{figures['memory/peak_gib']:.2f} GiB"))
    rows.append(("in all", duration(figures["time/total_seconds"])))
    return rows


def next_command(folder: Path, data: LoricaDataModule) -> str:
    """A command that asks the new model about a row it was not trained on."""
    example = data.splits.test[0] if data.splits.test else data.splits.train[0]
    text = example.text or (example.messages[0].content if example.messages else "...")
    text = text.replace('"', "'").replace("\n", " ")
    return f'python predict.py run={folder} text="{text if len(text) <= 90 else text[:87] + "..."}"'
