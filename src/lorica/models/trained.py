"""What a run left, ready to answer: adapter on its base, or a whole or merged model, with its tokenizer and task."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lorica import calibration
from lorica.beside_weights import read_adapter, read_object
from lorica.calibration import Calibration
from lorica.config import ConfigError, LoraSettings, ModelConfig, QuantizationSettings
from lorica.data import token_contract
from lorica.durable import write_json
from lorica.kernels import attention
from lorica.models import adapters, base, weights
from lorica.runs import TASK_FILE, read_task, weights_folder


@dataclass
class Trained:
    """A model for inference. task: lorica.json's content. adapter: the adapter's folder, None for whole models.

    padded: batches must be padded, for there is no variable-length attention. calibration: of a classifier's validation rows.
    """

    model: Any
    tokenizer: Any
    task: dict[str, Any]
    adapter: Path | None
    base: base.Base
    padded: bool
    calibration: Calibration | None = None

    @property
    def temperature(self) -> float:
        """What log-probabilities of labels are divided by."""
        return self.calibration.temperature if self.calibration is not None else 1.0

    def arithmetic(self) -> torch.autocast:
        """A context for forwards: on a GPU in the type of the weights, where that is half precision."""
        device, dtype = self.model.device, self.model.dtype
        half = device.type == "cuda" and dtype != torch.float32
        return torch.autocast(device.type, dtype if half else torch.bfloat16, enabled=half)


@dataclass
class Opened:
    """What a run left, before any weights are loaded.

    folder: of the weights. settings: the model as it was trained, as far as loading needs it. config: the architecture's.
    quantization: of an adapter's base, None where it was trained on plain weights.
    """

    folder: Path
    is_adapter: bool
    task: dict[str, Any]
    settings: ModelConfig
    base: base.Base
    tokenizer: Any
    config: Any
    quantization: QuantizationSettings | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that were not in 4 bits in training."""
        named: torch.dtype = getattr(torch, self.task.get("dtype") or "float32")
        return named

    def write_asking(self, folder: Path, changes: dict[str, Any]) -> None:
        """How it is asked, for weights made of these: tokenizer, the same tokens, the same probabilities, lorica.json with changes."""
        self.tokenizer.save_pretrained(folder)
        for name in (token_contract.FILE, calibration.FILE):
            if (self.folder / name).is_file():
                shutil.copy(self.folder / name, folder / name)
        write_json(folder / TASK_FILE, {**self.task, **changes})


def open_trained(run: Path, base_name: str | None = None) -> Opened:
    """Find what a run, an adapter folder or a merged model needs.

    Args:
        base_name: the base is here instead of where the adapter says.
    Raises:
        ConfigError: no weights, damaged ones, or a base that can't be had.
    """
    folder = weights_folder(run)
    weights.check_intact(folder)
    task = read_task(folder)
    is_adapter = (folder / "adapter_config.json").is_file()
    task = {**(_guess_adapter(folder) if is_adapter else _guess_model(folder)), **task}
    kept = _modules_to_save(folder) if is_adapter else []
    lora = LoraSettings(modules_to_save=kept) if kept else None
    settings = ModelConfig(
        name="trained", lora=lora, task=task["task"], base=base_name or task["base"], max_length=task.get("max_length") or 512
    )
    if not is_adapter:
        settings.base = str(folder)
    elif base_name is None and (run / "base" / "config.json").is_file():
        settings.base = str(run / "base")
    elif base_name is None and not Path(settings.base).is_dir() and Path(settings.base).is_absolute():
        raise ConfigError("base", settings.base, "the adapter's base model is not there any more", "base=<its folder now>")
    found = base.find_base(settings.base, task.get("revision") if base_name is None else None, key="base")
    tokenizer = base.load_tokenizer(
        base.Base(str(folder), str(folder)) if (folder / "tokenizer_config.json").is_file() else found, key="run"
    )
    token_contract.check(folder, task, tokenizer, key="run")
    config = base.load_config(found, ModelConfig(name="", task=settings.task, base=settings.base, max_length=8))
    quantization = QuantizationSettings(**task["quantization"]) if is_adapter and task.get("quantization") else None
    return Opened(folder, is_adapter, task, settings, found, tokenizer, config, quantization)


def load_trained(run: Path, device: torch.device, base_name: str | None = None, four_bit: str = "kept") -> Trained:
    """Load a run, an adapter folder or a merged model for inference.

    Args:
        base_name: load the base from here instead of where the adapter says.
        four_bit: what becomes of a base that was trained on in 4 bits. kept: it is loaded in 4 bits; dequantised: as plain weights
            with the values that its 4-bit codes stand for; original: as the weights that its files hold.
    Raises:
        ConfigError: no weights, damaged ones, or a base that can't be had.
    """
    return load_opened(open_trained(run, base_name), device, four_bit)


def load_opened(opened: Opened, device: torch.device, four_bit: str = "kept") -> Trained:
    """`load_trained` of what was opened already."""
    task, settings, found, tokenizer = opened.task, opened.settings, opened.base, opened.tokenizer
    config = copy.deepcopy(opened.config)  # loading writes into it
    dtype = opened.dtype if device.type == "cuda" else torch.float32
    quantization = opened.quantization if four_bit != "original" else None
    attn = base.attention_name("auto", config, settings.task, device, dtype)
    model = base.load_model(
        found, settings, config, tokenizer, device=device, dtype=dtype, labels=task.get("labels"), attn=attn, quantization=quantization
    )
    if quantization is not None and four_bit == "dequantised":
        adapters.dequantize_linears(model, torch.float32)
    if opened.is_adapter:
        model = adapters.load(model, opened.folder)
    adapter, calibrated = opened.folder if opened.is_adapter else None, calibration.read(opened.folder)
    return Trained(model.to(device).eval(), tokenizer, task, adapter, found, attn != attention.VARLEN, calibrated)


def _modules_to_save(folder: Path) -> list[str]:
    """Modules that an adapter holds whole; a base in 4 bits must leave them as they are."""
    return list(read_adapter(folder / "adapter_config.json").get("modules_to_save") or [])


def _guess_adapter(folder: Path) -> dict[str, Any]:
    """What PEFT's own files say of an adapter that Lorica did not write."""
    config = read_adapter(folder / "adapter_config.json")
    task = {"SEQ_CLS": "sequence_classification"}.get(str(config.get("task_type")), "causal_lm")
    known: dict[str, Any] = {
        "task": task,
        "base": config.get("base_model_name_or_path"),
        "revision": config.get("revision"),
        "max_length": 512,
    }
    file_of_weights = folder / "adapter_model.safetensors"
    adapters.check_files(folder)
    if task == "sequence_classification" and file_of_weights.is_file():
        with safe_open(file_of_weights, "pt") as file:
            heads = [k for k in file.keys() if k.endswith(("classifier.weight", "score.weight", "out_proj.weight"))]  # noqa: SIM118
            rows = [file.get_slice(k).get_shape()[0] for k in heads]
        known["labels"] = [f"LABEL_{i}" for i in range(rows[0])] if rows else None
    return known


def _guess_model(folder: Path) -> dict[str, Any]:
    config = read_object(folder / "config.json")
    classifier = "SequenceClassification" in str(config.get("architectures"))
    labels = base.trained_labels(folder) if classifier else None
    return {"task": "sequence_classification" if classifier else "causal_lm", "base": str(folder), "labels": labels, "max_length": 512}
