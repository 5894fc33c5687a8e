"""The weights that a run keeps: adapter/ or model/ with tokenizer and lorica.json; written whole, and put back."""

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
from lorica.data.rows import Rows
from lorica.durable import FOR_PEOPLE, MANIFEST, damage, recover_folder, replaced_folder, write_json
from lorica.models import adapters
from lorica.models.base import Base
from lorica.runs import TASK_FILE


def asked(config: TrainConfig, data: Rows) -> dict[str, Any]:
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
    data: Rows,
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
            adapters.save(model, new, in_host_memory(model))
        else:
            model.save_pretrained(new, state_dict=in_host_memory(model))
        tokenizer.save_pretrained(new)
        write_json(new / TASK_FILE, task)
        token_contract.write(new, token_contract.made(task, tokenizer))
        if calibration is not None:
            write_calibration(new, calibration)
        (new / FOR_PEOPLE).unlink(missing_ok=True)  # PEFT's, of empty sections; ours is written when the figures are known


def in_host_memory(model: Any) -> dict[str, Any]:
    """A model's state with its trained weights in host memory; tied ones stay one.

    They lie end to end on a GPU, and both libraries' `save_pretrained` would first copy there whatever shares its memory.
    """
    trained = {p.data_ptr() for p in model.parameters() if p.requires_grad}
    copies: dict[int, torch.Tensor] = {}
    state = model.state_dict()
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and (at := value.data_ptr()) in trained:
            if at not in copies:
                copies[at] = value.cpu()
            state[name] = copies[at].view_as(value)
    return dict(state)


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
