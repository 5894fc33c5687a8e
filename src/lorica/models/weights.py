"""The weights that a run keeps: adapter/ or model/ with tokenizer, lorica.json and model card; written whole, and put back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lorica.calibration import Calibration
from lorica.calibration import write as write_calibration
from lorica.config import ConfigError, TrainConfig
from lorica.data import token_contract
from lorica.data.module import LoricaDataModule
from lorica.durable import MANIFEST, damage, recover_folder, replaced_folder, write_json, write_text
from lorica.models import adapters
from lorica.models.base import Base
from lorica.runs import TASK_FILE


def asked(config: TrainConfig, data: LoricaDataModule) -> dict[str, Any]:
    """How the model is asked, as lorica.json has it."""
    return {
        "task": config.model.task,
        "labels": data.labels,
        "max_length": config.model.max_length,
        "use_chat_template": config.model.use_chat_template,
        "data": config.data.name,
        **data.describe(),
    }


def save(
    folder: Path,
    config: TrainConfig,
    data: LoricaDataModule,
    base: Base,
    tokenizer: Any,
    model: Any,
    calibration: Calibration | None = None,
) -> None:
    """Write adapter/ or model/: weights, tokenizer, lorica.json, the token contract, a classifier's calibration, at once."""
    task = {
        **asked(config, data),
        "base": base.name,
        "revision": base.revision,
        "weights": "adapter" if config.model.lora is not None else "model",
        "quantization": dataclasses.asdict(config.model.quantization)
        if config.model.quantization and config.model.quantization.load_in_4bit
        else None,
        "dtype": dtype_name(model),
    }
    check_finite(model, "training")
    size = sum(p.nbytes for p in model.parameters() if p.requires_grad or config.model.lora is None)
    with replaced_folder(folder, size) as new:
        if config.model.lora is not None:
            adapters.save(model, new)
        else:
            model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        write_json(new / TASK_FILE, task)
        token_contract.write(new, token_contract.made(task, tokenizer))
        if calibration is not None:
            write_calibration(new, calibration)
        write_text(new / "README.md", _card(config, data, base))


def check_finite(model: torch.nn.Module, where: str) -> None:
    """NaN and infinity never get into a file.

    Raises:
        FloatingPointError: a trained weight holds one.
    """
    for name, p in model.named_parameters():
        if p.requires_grad and not bool(torch.isfinite(p).all()):
            raise FloatingPointError(f"{name} holds NaN or infinity after {where}; a smaller optimizer.lr is the usual remedy")


def check_intact(folder: Path) -> None:
    """Refuse weights whose files are not those that were written; those that came without a manifest are not looked at.

    Raises:
        ConfigError: a file is damaged or missing.
    """
    if (folder / MANIFEST).exists() and (what := damage(folder / MANIFEST)):
        raise ConfigError(
            "run", folder, what, f"a copy of that folder, or a new run; without its {MANIFEST}, if you changed the files yourself"
        )


def load(folder: Path, model: Any) -> None:
    """Put the weights of adapter/ or model/ back into the model that they were saved from.

    Raises:
        ConfigError: they are damaged.
    """
    recover_folder(folder)
    check_intact(folder)
    if (folder / "adapter_config.json").is_file():
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    else:
        for file in sorted(folder.glob("*.safetensors")):
            model.load_state_dict(load_file(file), strict=False)


def dtype_name(model: Any) -> str:
    """`bfloat16`, `float32`: of the weights that are not in 4 bits."""
    return str(model.dtype).removeprefix("torch.")


def _card(config: TrainConfig, data: LoricaDataModule, base: Base) -> str:
    lora = config.model.lora
    kind = "LoRA adapter" if lora else "model"
    load = (
        f'PeftModel.from_pretrained({_auto_class(config)}.from_pretrained("{base.name}"{_head_arguments(config, data)}), "<this folder>")'
        if lora
        else 'pipeline(..., model="<this folder>")'
    )
    card = [
        "---",
        f"base_model: {base.name}",
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
    taught = config.distillation
    if taught.teacher is not None and taught.weight:
        how = f"temperature {taught.temperature:g}, weight {taught.weight:g}"
        card.append(f"- Learnt a teacher's label probabilities beside the true labels ({how})")
    if data.generative and "health" in config.data.name:
        card += ["- Answers are not medical advice."]
    return "\n".join(card) + "\n"


def _auto_class(config: TrainConfig) -> str:
    return "AutoModelForCausalLM" if config.model.task == "causal_lm" else "AutoModelForSequenceClassification"


def _head_arguments(config: TrainConfig, data: LoricaDataModule) -> str:
    """What the base's loader must be told of a classifier's new head."""
    return f", num_labels={len(data.labels)}" if config.model.task != "causal_lm" and data.labels else ""
