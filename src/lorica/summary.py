"""What a run prints of itself: what will run, before it does; the figures and the next command, after."""

from __future__ import annotations

import shlex
from pathlib import Path

from lorica import hardware
from lorica.config import OptimizerConfig, TrainConfig
from lorica.data.asking import ask_text, typed_text
from lorica.data.module import LoricaDataModule
from lorica.models import adapters, optimizers
from lorica.models.loaded import Loaded
from lorica.models.weights import dtype_name
from lorica.planning import memory
from lorica.planning.cards import GIB, Card
from lorica.screen import counted, duration, short

ROWS_TO_ASK = 20  # rows looked at for one that a single text can ask


def plan_facts(config: TrainConfig, data: LoricaDataModule, loaded: Loaded, machine: hardware.Machine) -> list[tuple[str, str]]:
    """(name, value) lines of what will run."""
    t, plan, splits = config.trainer, data.plan, data.splits
    trainable, total = adapters.count(loaded.model)
    quantization = config.model.quantization
    bits = f"4-bit {quantization.bnb_4bit_quant_type}" if quantization and quantization.load_in_4bit else dtype_name(loaded.model)
    attn = loaded.attention.removeprefix("lorica_") + ("" if loaded.padded else ", no padding")
    size = f"{t.batch_size} examples" if t.batch_size is not None else f"up to {t.tokens_per_batch:,} tokens"
    devices = f"{machine.world_size} device{'s' if machine.world_size > 1 else ''}"
    epochs = f"{plan.epoch_at(plan.steps):.3g} epochs" if plan.epoch_at(plan.steps) != 1 else "1 epoch"
    cut = f", each micro-batch in {plan.parts} parts" if plan.parts > 1 else ""
    name, _ = optimizers.effective_name(str(config.optimizer.name), machine.device)
    rows = f"{len(splits.train):,} train, {len(splits.validation):,} validation, {len(splits.test):,} test"
    return [
        ("model", f"{loaded.base.name}, {short(total)} weights ({bits}), {short(trainable)} trainable ({trainable / total:.2%})"),
        ("data", f"{config.data.name} ({config.data.source}): {rows}; {data.truncation}"),
        (
            "steps",
            f"{plan.steps:,} ({epochs}) of {size} x {t.accumulate_grad_batches} accumulated x {devices}{cut}",
        ),
        ("optimiser", f"{name}, lr {config.optimizer.lr:g} {config.optimizer.lr_scheduler_type}, {_warmup(config.optimizer, plan.steps)}"),
        ("machine", f"{machine.description}, precision {machine.precision}, attention {attn}"),
    ]


def memory_line(expected: memory.Fit, card: Card) -> str:
    """What the plan expects of the GPU's memory at the peak of training."""
    return f"{expected.peak / GIB:.2f} GiB expected at the peak, of {card.usable / GIB:.2f}; {memory.layers_line(expected.job)}"


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
    return notes


def tokenised_line(data: LoricaDataModule) -> str:
    """Where the token ids came from; empty where they were made within a second."""
    tokens = data.tokens
    parts = [f"{counted(tokens.found, 'tokenised row')} from the cache"] if tokens.found else []
    if tokens.seconds > 1.0:
        parts.append(f"tokenised {counted(tokens.made, 'row')} in {duration(tokens.seconds)}")
    return ", ".join(parts)


def closing_rows(figures: dict[str, float], resumed: bool = False) -> list[tuple[str, str]]:
    """(name, value) lines of the closing table.

    Args:
        resumed: the run goes on from an earlier start: training counts all starts, the time in all this one alone.
    """
    rows = [
        (k, f"{v:.4f}")
        for k, v in figures.items()
        if k.startswith("test/") and not k.endswith("per_second") and "/" not in k.removeprefix("test/")
    ]
    rows += [(k, f"{figures[k]:.4f}") for k in figures if k.startswith("test/f1/")]
    rates = f"{figures['train/tokens_per_second']:,.0f} tokens/s, {figures['train/samples_per_second']:,.1f} examples/s"
    rows.append(("training, all starts" if resumed else "training", f"{duration(figures['train/seconds'])}, {rates}"))
    expected = f" ({figures['memory/predicted_gib']:.2f} expected)" if "memory/predicted_gib" in figures else ""
    rows.append(("peak memory", f"{figures['memory/peak_gib']:.2f} GiB{expected}"))
    rows.append(("in all, this start" if resumed else "in all", duration(figures["time/total_seconds"])))
    return rows


def next_command(folder: Path, data: LoricaDataModule) -> str:
    """A command that asks the new model about a row it was not trained on."""
    rows = (data.splits.test or data.splits.train)[:ROWS_TO_ASK]
    task = {**data.describe(), "labels": data.labels}
    texts = [typed_text(task, row) for row in rows]
    whole = (text for text, row in zip(texts, rows, strict=True) if ask_text(task, text).prompt == row.prompt)
    text = "".join(c if c.isprintable() else " " for c in next(whole, texts[0])).strip() or "..."
    return " ".join(["python predict.py", _typed("run", str(folder)), _typed("text", text if len(text) <= 90 else text[:87] + "...")])


def _typed(name: str, value: str) -> str:
    """`name=value` for a shell; predict takes the value as it is, but for one pair of double quotes around it all."""
    quoted = f'"{value}"' if len(value) >= 2 and value[0] == value[-1] == '"' else value
    if "'" in quoted and not set(quoted) & set('"$`\\!'):
        return f'{name}="{quoted}"'
    return f"{name}={shlex.quote(quoted)}"


def _warmup(config: OptimizerConfig, steps: int) -> str:
    """`warm-up 12`; the constant schedule has none, whatever is set."""
    return f"warm-up {optimizers.warmup_steps(config, steps)}" if config.lr_scheduler_type != "constant" else "no warm-up"
