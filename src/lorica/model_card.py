"""The model card beside weights: what they are, how to load them, how good they are, of what data and recipe, and what limits them.

Everything is read from the run folder, so that the card of a merged model has the figures of its adapter. It is in the hub's format.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorica import calibration, plain_yaml, statistics
from lorica.durable import FOR_PEOPLE, write_text
from lorica.pages import markdown, md
from lorica.runs import read_task
from lorica.screen import duration

ENVIRONMENT = "environment.json"  # machine and versions of a run
RATES = ("test/loss", "test/perplexity", "test/accuracy", "test/f1_macro", "test/ece", "test/rouge_l")
HEALTH = re.compile(r"health|medic|patient|clinic", re.IGNORECASE)


@dataclass(frozen=True)
class Merged:
    """What a merge adds. how: onto which base. dtype: of its weights. certificate: how far it is from its adapter."""

    how: str
    dtype: str
    certificate: str


@dataclass(frozen=True)
class Facts:
    """What a run folder says; each is empty where a file is missing, as beside an adapter that came alone.

    Attributes:
        task: lorica.json. config: config.yaml. report: data_report.json. figures: metrics.json. rows: predictions.jsonl. environment:
            machine and versions. temperature: of a classifier's probabilities.
    """

    task: dict[str, Any]
    config: dict[str, Any]
    report: dict[str, Any]
    figures: dict[str, float]
    rows: list[dict[str, Any]]
    environment: dict[str, Any]
    temperature: float | None


def write(run: Path, weights: Path, figures: dict[str, float], merged: Merged | None = None) -> None:
    """Write the card of weights into their folder.

    Args:
        run: their run folder. figures: metrics.json's content, which may not be written yet; {} for what the folder has.
    """
    write_text(weights / FOR_PEOPLE, card(read(run, weights, figures), merged))


def read(run: Path, weights: Path, figures: dict[str, float]) -> Facts:
    """What is known of a run."""
    config = plain_yaml.read(run / "config.yaml", "run", "") if (run / "config.yaml").is_file() else {}
    lines = (run / "predictions.jsonl").read_text("utf-8").splitlines() if (run / "predictions.jsonl").is_file() else []
    found = calibration.read(weights)
    return Facts(
        read_task(weights),
        config,
        _object(run / "data_report.json"),
        figures or _object(run / "metrics.json"),
        [json.loads(line) for line in lines],
        _object(run / ENVIRONMENT),
        found.temperature if found else None,
    )


def _object(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    return found


def card(facts: Facts, merged: Merged | None = None) -> str:
    """The card, in Markdown."""
    model, data = facts.config.get("model") or {}, facts.config.get("data") or {}
    name = f"{model.get('name') or 'A model'} on {facts.task.get('data') or 'unnamed data'}" + (", merged" if merged else "")
    parts = [
        *_head(facts, merged),
        "",
        f"# {md(name)}",
        "",
        _what(facts, merged),
        "",
        "## Use",
        "",
        *_use(facts, merged),
        *_section("Results", _results(facts, merged)),
        *_section("Data", _data(facts)),
        *_section("Training", _training(facts)),
        *_section("Limits", [_limits(facts)]),
        *_section("Licences", [_licences(model, data)]),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _section(title: str, parts: list[Any]) -> list[str]:
    shown = [line for part in parts for line in [*markdown(part), ""]]
    return ["", f"## {title}", "", *shown[:-1]] if shown else []


def _head(facts: Facts, merged: Merged | None) -> list[str]:
    """What the hub reads."""
    model, data = facts.config.get("model") or {}, facts.config.get("data") or {}
    adapter = merged is None and facts.task.get("weights") == "adapter"
    tags = ["lorica", *(["lora"] if model.get("lora") else []), *(["qlora"] if facts.task.get("quantization") else [])]
    values: dict[str, Any] = {
        "base_model": facts.task.get("base"),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": _pipeline(facts),
        "license": model.get("license"),
        "datasets": [data["hub_id"]] if data.get("source") == "hub" and data.get("hub_id") else None,
        "tags": tags,
    }
    return ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value is not None), "---"]


def _pipeline(facts: Facts) -> str:
    return "text-generation" if facts.task.get("task") == "causal_lm" else "text-classification"


def _what(facts: Facts, merged: Merged | None) -> str:
    rows = (facts.report.get("rows") or {}).get("train")
    of = f"{rows:,} rows of {facts.task.get('data')}" if rows else str(facts.task.get("data") or "unnamed data")
    base = f"`{facts.task.get('base')}`" + (f" at commit `{facts.task['revision']}`" if facts.task.get("revision") else "")
    if merged is not None:
        return f"An adapter of {base}, trained by Lorica on {of} and merged {merged.how}, in {merged.dtype}."
    kind = "A LoRA adapter of" if facts.task.get("weights") == "adapter" else "All weights of"
    return f"{kind} {base}, trained by Lorica on {of}."


def _use(facts: Facts, merged: Merged | None) -> list[str]:
    """Code for transformers and PEFT alone."""
    task, labels = facts.task, facts.task.get("labels")
    causal = task.get("task") == "causal_lm"
    if merged is not None or task.get("weights") != "adapter":
        lines = ["from transformers import pipeline", "", f'answer = pipeline("{_pipeline(facts)}", "<this folder>")']
        lines.append('print(answer("..."))')
    else:
        auto = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
        arguments = [json.dumps(task.get("base"), ensure_ascii=False)]
        arguments += [f"revision={json.dumps(task['revision'])}"] if task.get("revision") else []
        arguments += [f"num_labels={len(labels)}"] if labels and not causal else []
        four = task.get("quantization")
        lines = [
            "from peft import PeftModel",
            f"from transformers import {auto}, AutoTokenizer" + (", BitsAndBytesConfig" if four else ""),
            "",
        ]
        if four:
            settings = {"load_in_4bit": True, **{k: four[k] for k in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant") if k in four}}
            settings["bnb_4bit_compute_dtype"] = task.get("dtype")
            lines += ["four_bit = BitsAndBytesConfig(", *(f"    {key}={value!r}," for key, value in settings.items()), ")"]
            arguments.append("quantization_config=four_bit")
        lines += [f"base = {auto}.from_pretrained({', '.join(arguments)})", 'model = PeftModel.from_pretrained(base, "<this folder>")']
        lines.append('tokenizer = AutoTokenizer.from_pretrained("<this folder>")')
    asked = "The text is put into the prompt of training by `lorica predict run=<this folder> text=...`"
    said = f"{asked}; labels are compared by their likelihood there." if causal and labels else f"{asked}."
    return ["```python", *lines, "```", "", *([said] if causal else ["`lorica predict run=<this folder> text=...` answers too."])]


def _results(facts: Facts, merged: Merged | None) -> list[Any]:
    """Figures of the test rows, with intervals where rows have labels."""
    known = [(key, facts.figures[key]) for key in RATES if facts.figures.get(key) is not None]
    parts: list[Any] = []
    if known:
        spread = _intervals(facts)
        body = [[key.removeprefix("test/"), f"{value:.4f}", spread.get(key.removeprefix("test/"), "")] for key, value in known]
        parts += [f"On {len(facts.rows):,} test rows that were not trained on:", (["", "value", "95 % interval"], body)]
    if facts.temperature is not None:
        parts.append(f"Probabilities are calibrated on validation rows: logits are divided by {facts.temperature:.3f} (calibration.json).")
    if merged is not None:
        parts.append([f"Certificate: {merged.certificate}"])
        if known:
            parts.append("The figures are those of the adapter on the base that it was trained on.")
    return parts


def _intervals(facts: Facts) -> dict[str, str]:
    labels = facts.task.get("labels")
    rows = [row for row in facts.rows if row.get("label") is not None]
    if not labels or not rows:
        return {}
    number = {label: i for i, label in enumerate(labels)}
    true, said = (np.array([number[row[key]] for row in rows]) for key in ("label", "prediction"))
    found = statistics.intervals(true, said, len(labels))
    return {name: f"{low:.4f} to {high:.4f}" for name, (low, high) in found.items()}


def _data(facts: Facts) -> list[Any]:
    report = facts.report
    if not report:
        return []
    source = f"{report['name']}, {report['source']}" + "".join(f", {report[k]}" for k in ("hub_id", "revision") if report.get(k))
    parts: list[Any] = [
        f"{source}.",
        (["split", "rows", "from"], [[s, f"{n:,}", report["split_from"].get(s, "")] for s, n in report["rows"].items()]),
    ]
    cut, rows = report["shortened"]["rows"], report["rows"]["train"]
    facts_of_rows = [f"Longest sequence: {report['max_length']:,} tokens; {cut:,} of {rows:,} training rows were shortened."]
    if near := report["duplicates"].get("near"):
        leaked = near["across"].get("train-test", 0)
        facts_of_rows.append(f"Test rows with a near duplicate in training: {leaked:,} of {report['rows']['test']:,}.")
    personal = sum(kind["count"] for kind in report["personal"].values() if isinstance(kind, dict) and "count" in kind)
    facts_of_rows.append(f"Personal data found by patterns (e-mail addresses, phone numbers, names ...): {personal:,}.")
    return [*parts, facts_of_rows]


def _training(facts: Facts) -> list[Any]:
    """Recipe, machine and cost."""
    if not facts.config:
        return []
    model, optimizer, trainer = (facts.config[k] for k in ("model", "optimizer", "trainer"))
    lora, four, figures = model.get("lora"), model.get("quantization"), facts.figures
    size = f"{trainer['batch_size']} examples" if trainer.get("batch_size") else f"{trainer.get('tokens_per_batch')} tokens"
    last = model.get("train_layers")
    whole = "weights" if last else "every weight"
    trained = f"LoRA r={lora['r']}, alpha {lora['lora_alpha']}, dropout {lora['lora_dropout']:g}" if lora else whole
    rows = [["trained", trained + (f", of the last {last.removeprefix('last_')} layers and what comes after them" if last else "")]]
    rows += [
        ["base in training", f"4 bits, {four['bnb_4bit_quant_type']}" if four and four["load_in_4bit"] else str(facts.task.get("dtype"))]
    ]
    rows += [["optimiser", f"{optimizer['name']}, learning rate {optimizer['lr']:g}, {optimizer['lr_scheduler_type']}"]]
    rows += [["micro-batch", f"{size} x {trainer['accumulate_grad_batches']} accumulated"]]
    taught = facts.config.get("distillation") or {}
    if taught.get("teacher") and taught.get("weight"):
        how = f"temperature {taught['temperature']:g}, weight {taught['weight']:g}"
        rows += [["teacher", f"its label probabilities beside the true labels, {how}"]]
    rows += [["seed", str(facts.config["seed"])]]
    if facts.environment:
        versions = facts.environment["versions"]
        rows += [["machine", f"{facts.environment['machine']}, precision {facts.environment['precision']}"]]
        rows += [["versions", ", ".join(f"{k} {v}" for k, v in versions.items())]]
    if "train/seconds" in figures:
        rows += [["time", f"{duration(figures['train/seconds'])}, peak memory {figures['memory/peak_gib']:.2f} GiB"]]
        joules = figures.get("train/energy_joules")
        rows += [["energy", f"{joules / 3600:,.2f} Wh (GPU, by NVML)" if joules is not None else "not measured"]]
    return [(["", ""], rows)]


def _limits(facts: Facts) -> list[str]:
    data = facts.config.get("data") or {}
    labels = facts.task.get("labels")
    lines = []
    if HEALTH.search(f"{facts.task.get('data')} {data.get('hub_id')} {data.get('path')}"):
        lines.append("Answers are not medical advice: they are a language model's, can be wrong, and stand for no physician.")
    if labels:
        lines.append(
            f"It answers with one of {', '.join(labels)}, whatever the text is; its errors on other kinds of text were not measured."
        )
    else:
        lines.append("What it writes can be wrong or made up; nobody has checked it.")
    return [*lines, "What is wrong or one-sided in the base model and in the rows it was trained on can be in its answers."]


def _licences(model: dict[str, Any], data: dict[str, Any]) -> list[str]:
    sample = "written for Lorica, its own licence" if data.get("source") == "sample" else data.get("license") or "not stated"
    return [
        f"Base model: {model.get('license') or 'not stated; see where it came from'}.",
        f"Data: {sample}.",
        "What is made of both is bound by both.",
    ]
