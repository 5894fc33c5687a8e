"""`lorica train`: wires data, model, callbacks and loggers into one Lightning Trainer and leaves a complete run folder."""

from __future__ import annotations

import dataclasses
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
from lorica.runs import (
    TASK_FILE,
    checkpoint_step,
    choose_run_dir,
    last_checkpoint,
    point_latest,
    replaced_folder,
    start_run,
    write_json,
    write_text,
)
from lorica.screen import Screen, duration, quiet_libraries, short

quiet_libraries()

import torch  # noqa: E402  (after the libraries' noise is off)
from lightning.pytorch import Callback, Trainer, seed_everything  # noqa: E402
from lightning.pytorch.callbacks import EarlyStopping  # noqa: E402
from lightning.pytorch.loggers import Logger  # noqa: E402

from lorica import callbacks as cb  # noqa: E402
from lorica import hardware, loggers, metrics, plots  # noqa: E402
from lorica.data.encoding import CausalEncoder, ClassifierEncoder  # noqa: E402
from lorica.data.module import Batching, LoricaDataModule  # noqa: E402
from lorica.data.registry import build_data  # noqa: E402
from lorica.data.report import data_report, report_markdown  # noqa: E402
from lorica.kernels import attention  # noqa: E402
from lorica.models import adapters, base, optimizers  # noqa: E402
from lorica.models.causal_lm import CausalLMModule  # noqa: E402
from lorica.models.module import LoricaModule  # noqa: E402
from lorica.models.sequence_classifier import SequenceClassifierModule  # noqa: E402

GENERATION_BATCH = 32  # test prompts answered at once
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

    @property
    def weights(self) -> Path:
        """Where the best weights go: an adapter, or the whole model of a full fine-tuning."""
        return self.folder / ("adapter" if self.config.model.lora is not None else "model")


def run(config: TrainConfig) -> int:
    """Train, evaluate and write the run folder.

    Returns:
        0, or 1 when training failed (its traceback is in train.log).
    Raises:
        ConfigError: data, model or hardware can't do what is asked; nothing is left behind.
    """
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0"))))
    main = rank == 0
    given = os.environ.get("LORICA_RUN_DIR")  # a rank that rank 0's Lightning started
    folder, checkpoint = (Path(given), Path(c) if (c := os.environ.get("LORICA_CHECKPOINT")) else None) if given else choose_run_dir(config)
    existed = folder.exists()
    if main:
        folder = start_run(folder, config, sys.argv[1:])
        os.environ["LORICA_RUN_DIR"], os.environ["LORICA_CHECKPOINT"] = str(folder), str(checkpoint or "")
    screen = Screen(folder / "train.log", main)
    the_run = Run(config, folder, screen, [], checkpoint, main)
    try:
        if main:
            the_run.loggers, note = loggers.build_loggers(config, folder, checkpoint_step(checkpoint) if checkpoint else None)
            the_run.notes += [note] if note else []
        _train(the_run)
    except ConfigError:
        loggers.finish_wandb(the_run.loggers, folder, None, [], {}, failed=True)
        screen.close()
        if main and not existed and config.run_dir is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        loggers.finish_wandb(the_run.loggers, folder, None, [], {}, failed=True)
        saved = last_checkpoint(folder) is not None
        screen.print(f"interrupted; go on with: python train.py resume={folder}" if saved else "interrupted before any state was saved")
        return 130
    except Exception as e:
        screen.log(traceback.format_exc())
        screen.print(f"failed: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''} (the traceback is in {folder}/train.log)")
        loggers.finish_wandb(the_run.loggers, folder, None, [], {}, failed=True)
        if os.environ.get("LORICA_VERBOSE"):
            raise
        return 1
    finally:
        screen.close()
        for name in ("LORICA_RUN_DIR", "LORICA_CHECKPOINT"):
            os.environ.pop(name, None)
    return 0


def _train(run: Run) -> None:
    config, screen, started = run.config, run.screen, time.perf_counter()
    seed_everything(config.seed, workers=True, verbose=False)
    data = build_data(config.data, config.seed)
    data.load()
    machine = hardware.choose(config.trainer)
    run.notes += machine.notes
    loaded = _load_model(run, data, machine)
    batching = _batching(run, data, loaded, machine)
    data.connect(batching)
    if run.main:
        report = data_report(data)
        write_json(run.folder / "data_report.json", report)
        write_text(run.folder / "data_report.md", report_markdown(report))
    if run.resume_from is not None:
        state = torch.load(run.resume_from, weights_only=True, map_location="cpu")
        data.resume_at = int(state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"])
        del state
    module, trainer, parts = _assemble(run, data, loaded, machine)
    _summary(run, data, loaded, machine)
    if run.main:
        point_latest(run.folder)
    hardware.reset_peak_memory()
    module.train()
    if data.resume_at < len(data.plan):  # else all was trained before, and only the test is missing
        trainer.fit(module, datamodule=data, ckpt_path=str(run.resume_from) if run.resume_from else None, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    figures = parts.throughput.figures(trainer)
    if parts.keep.best is None and run.main and not run.weights.exists():
        parts.keep.write()  # nothing was validated: the last weights are kept
    trainer.strategy.barrier()
    _load_best(run, module)
    predictions = _test(run, data, module, trainer, parts, figures)
    if not run.main:
        return
    figures["memory/peak_gib"] = hardware.peak_memory_gib(machine.device)
    figures["time/total_seconds"] = time.perf_counter() - started
    _finish(run, data, parts, figures, predictions)
    screen.table(f"{config.data.name} with {config.model.name}", _closing_rows(figures))
    screen.print(f"run folder  {run.folder}")
    screen.print(f"next        {_next_command(run, data)}")


# ---------------------------------------------------------------------------------------------------------------- loading


@dataclass
class Loaded:
    """The model with its adapters, its tokenizer, and where it came from."""

    model: Any
    tokenizer: Any
    base: base.Base
    attention: str
    padded: bool


def _load_model(run: Run, data: LoricaDataModule, machine: hardware.Machine) -> Loaded:
    settings = run.config.model
    name = settings.base
    if name == base.TINY:
        name = str(base.build_tiny_mistral(run.folder / "base", run.config.seed)) if run.main else str(run.folder / "base")
    found = base.find_base(name, settings.revision)
    architecture = base.load_config(found, settings)
    tokenizer = base.load_tokenizer(found)
    causal = settings.task == "causal_lm"
    encoder = (
        CausalEncoder(tokenizer, settings.max_length, settings.use_chat_template, data.labels or ())
        if causal
        else ClassifierEncoder(tokenizer, settings.max_length)
    )
    data.encode(encoder)
    quantization = settings.quantization if settings.quantization and settings.quantization.load_in_4bit else None
    dtype = machine.compute_dtype if settings.lora is not None else torch.float32
    attn = base.attention_name(
        settings.attn_implementation, machine.device, flat_possible=causal and machine.compute_dtype != torch.float32
    )
    torch.manual_seed(run.config.seed)  # a classifier's head and the adapters start from here
    model = base.load_model(
        found,
        settings,
        architecture,
        tokenizer,
        device=machine.device,
        dtype=dtype,
        labels=data.labels,
        attn=attn,
        quantization=quantization,
    )
    if settings.lora is not None:
        model = adapters.attach(model, settings.lora, settings.task, found.revision)
        model.get_base_model().name_or_path = found.name
        for active in model.peft_config.values():
            active.base_model_name_or_path = found.name
    if run.config.trainer.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Loaded(model, tokenizer, found, attn, padded=attn != attention.NAME)


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


# --------------------------------------------------------------------------------------------------------------- assembly


@dataclass
class Parts:
    """The callbacks that are asked for figures afterwards."""

    throughput: cb.Throughput
    evaluate: cb.Evaluate
    keep: cb.KeepBest
    answers: list[str]  # generated during the test pass


def _assemble(run: Run, data: LoricaDataModule, loaded: Loaded, machine: hardware.Machine) -> tuple[LoricaModule, Trainer, Parts]:
    config, t, plan = run.config, run.config.trainer, data.plan
    cls = CausalLMModule if config.model.task == "causal_lm" else SequenceClassifierModule
    scaled = machine.precision == "16-mixed"
    module = cls(loaded.model, config.optimizer, plan.steps, fused=not (scaled and t.gradient_clip_val is not None))
    has_validation = bool(data.eval_rows["validation"])
    throughput = cb.Throughput()
    record = cb.RecordLoss(throughput, t.log_every_n_steps, plan.steps, plan.epoch_at)
    answers: list[str] = []
    evaluate = cb.Evaluate(data.labels, lambda: answers.extend(_answers(run, data, module)) if data.generative else None)
    keep = cb.KeepBest("val/f1_macro" if data.labels else "val/loss", lambda: save_weights(run.weights, config, data, loaded, module))
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
    parts += [cb.Checkpoints(run.folder / "checkpoints", save_after, validated), progress]
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
    return module, trainer, Parts(throughput, evaluate, keep, answers)


def save_weights(folder: Path, config: TrainConfig, data: LoricaDataModule, loaded: Loaded, module: LoricaModule) -> None:
    """Write adapter/ or model/: weights, tokenizer, lorica.json, at once."""
    task = {
        "task": config.model.task,
        "base": loaded.base.name,
        "revision": loaded.base.revision,
        "labels": data.labels,
        "max_length": config.model.max_length,
        "use_chat_template": config.model.use_chat_template,
        "data": config.data.name,
        **data.describe(),
        "weights": "adapter" if config.model.lora is not None else "model",
        "quantization": dataclasses.asdict(config.model.quantization)
        if config.model.quantization and config.model.quantization.load_in_4bit
        else None,
        "dtype": _dtype_name(loaded.model),
    }
    with replaced_folder(folder) as new:
        if config.model.lora is not None:
            adapters.save(module.model, new)
        else:
            module.model.save_pretrained(new)
        loaded.tokenizer.save_pretrained(new)
        write_json(new / TASK_FILE, task)
        write_text(new / "README.md", _card(config, data, loaded))


def _card(config: TrainConfig, data: LoricaDataModule, loaded: Loaded) -> str:
    lora = config.model.lora
    kind = "LoRA adapter" if lora else "model"
    load = (
        f'PeftModel.from_pretrained(AutoModel....from_pretrained("{loaded.base.name}"), "<this folder>")'
        if lora
        else 'pipeline(..., model="<this folder>")'
    )
    card = [
        "---",
        f"base_model: {loaded.base.name}",
        f"library_name: {'peft' if lora else 'transformers'}",
        "---",
        f"# {config.model.name} on {config.data.name}",
        "",
    ]
    card += [f"A {kind} trained by Lorica on {len(data.splits.train):,} rows of {config.data.name} ({config.data.source}).", ""]
    card += [
        f"- Task: {config.model.task}" + (f", labels {', '.join(data.labels)}" if data.labels else ""),
        f"- Load: `{load}`",
        f"- Seed {config.seed}, learning rate {config.optimizer.lr:g}, longest sequence {config.model.max_length} tokens",
    ]
    if data.generative and "health" in config.data.name:
        card += ["- Answers are not medical advice."]
    return "\n".join(card) + "\n"


def _load_best(run: Run, module: LoricaModule) -> None:
    """Put the kept weights back into the module."""
    from safetensors.torch import load_file

    if run.config.model.lora is not None:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(module.model, load_file(run.weights / "adapter_model.safetensors"))
    else:
        for file in sorted(run.weights.glob("*.safetensors")):
            module.model.load_state_dict(load_file(file), strict=False)


# --------------------------------------------------------------------------------------------------------------- the test


def _test(
    run: Run, data: LoricaDataModule, module: LoricaModule, trainer: Trainer, parts: Parts, figures: dict[str, float]
) -> list[dict[str, Any]]:
    """Evaluate on the test rows; return each with its prediction."""
    if not data.eval_rows["test"]:
        run.screen.note("there are no test rows")
        return []
    begun = time.perf_counter()
    trainer.test(module, datamodule=data, verbose=False)
    figures |= parts.evaluate.figures
    figures["test/samples_per_second"] = len(data.eval_rows["test"]) / (time.perf_counter() - begun)
    scores = _gather(parts.evaluate.rows, trainer)
    if not run.main:
        return []
    examples = data.splits.test
    rows: list[dict[str, Any]] = [
        {"origin": e.origin, "text": e.text or e.prompt or "\n".join(f"{m.role}: {m.content}" for m in e.messages[:-1])} for e in examples
    ]
    if data.labels is not None:
        for i, row in enumerate(rows):
            probabilities = torch.tensor(scores[i]).exp().tolist()
            best = max(range(len(probabilities)), key=probabilities.__getitem__)
            label = examples[i].label
            row |= {
                "label": None if label is None else data.labels[label],
                "prediction": data.labels[best],
                "probability": probabilities[best],
            }
            row["probabilities"] = dict(zip(data.labels, probabilities, strict=True))
    elif data.generative:
        for row, example, answer in zip(rows, examples, parts.answers + [None] * len(rows), strict=False):
            row |= {"reference": example.completion or example.messages[-1].content, "prediction": answer}
        if parts.answers:
            figures["test/rouge_l"] = metrics.rouge_l(parts.answers, [str(row["reference"]) for row in rows[: len(parts.answers)]])
    return rows


def _gather(rows: dict[int, list[float]], trainer: Trainer) -> dict[int, list[float]]:
    if trainer.world_size == 1:
        return rows
    parts: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(parts, rows)
    return {k: v for part in parts for k, v in part.items()}


def _answers(run: Run, data: LoricaDataModule, module: LoricaModule) -> list[str]:
    """Generated answers to the first test rows, in order."""
    config: Any = run.config.data
    assert isinstance(module, CausalLMModule) and isinstance(data.encoder, CausalEncoder)
    prompts = [data.encoder.prompt_ids(e) for e in data.splits.test[: config.max_generated_examples]]
    tokenizer = data.encoder.tokenizer
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: dict[int, str] = {}
    for at in range(0, len(order), GENERATION_BATCH):
        group = order[at : at + GENERATION_BATCH]
        generated = module.generate([prompts[i] for i in group], data.batching.pad_id, config.max_new_tokens)
        answers |= {i: tokenizer.decode(ids, skip_special_tokens=True).strip() for i, ids in zip(group, generated, strict=True)}
    return [answers[i] for i in range(len(prompts))]


# ----------------------------------------------------------------------------------------------------- what is left behind


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


def _summary(run: Run, data: LoricaDataModule, loaded: Loaded, machine: hardware.Machine) -> None:
    """What will run, before it does."""
    config, t, plan, splits = run.config, run.config.trainer, data.plan, data.splits
    trainable, total = adapters.count(loaded.model)
    quantization = config.model.quantization
    bits = f"4-bit {quantization.bnb_4bit_quant_type}" if quantization and quantization.load_in_4bit else _dtype_name(loaded.model)
    attn = loaded.attention if loaded.padded else "varlen, no padding"
    size = f"{t.batch_size} examples" if t.batch_size is not None else f"up to {t.tokens_per_batch:,} tokens"
    devices = f"{machine.world_size} device{'s' if machine.world_size > 1 else ''}"
    name, why = optimizers.effective_name(str(config.optimizer.name), machine.device)
    run.notes += [why] if why else []
    if len(plan.epoch_ends) > 1 and plan.epoch_ends[0] == 1:
        run.notes.append(f"one step takes all {len(data.train_rows)} training rows; a smaller trainer.tokens_per_batch gives more steps")
    if data.faults:
        run.notes.append(f"{len(data.faults):,} bad rows were skipped (data_report.md)")
    warmup = optimizers.warmup_steps(config.optimizer, plan.steps)
    rows = f"{len(splits.train):,} train, {len(splits.validation):,} validation, {len(splits.test):,} test"
    run.screen.facts(
        "lorica train",
        [
            ("run", str(run.folder) + (f", resumed at micro-step {data.resume_at}" if run.resume_from else "")),
            ("model", f"{loaded.base.name}, {short(total)} weights ({bits}), {short(trainable)} trainable ({trainable / total:.2%})"),
            ("data", f"{config.data.name} ({config.data.source}): {rows}; {data.truncation}"),
            (
                "steps",
                f"{plan.steps:,} ({plan.epoch_at(plan.steps):.3g} epochs) of {size} x {t.accumulate_grad_batches} accumulated x {devices}",
            ),
            ("optimiser", f"{name}, lr {config.optimizer.lr:g} {config.optimizer.lr_scheduler_type}, warm-up {warmup}"),
            ("machine", f"{machine.description}, precision {machine.precision}, attention {attn}"),
        ],
    )
    for note in run.notes:
        run.screen.note(note)


def _dtype_name(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _closing_rows(figures: dict[str, float]) -> list[tuple[str, str]]:
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


def _next_command(run: Run, data: LoricaDataModule) -> str:
    example = data.splits.test[0] if data.splits.test else data.splits.train[0]
    text = example.text or (example.messages[0].content if example.messages else "...")
    text = text.replace('"', "'").replace("\n", " ")
    return f'python predict.py run={run.folder} text="{text if len(text) <= 90 else text[:87] + "..."}"'
