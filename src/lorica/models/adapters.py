"""LoRA adapters by PEFT: attach, count, save, load, and merge into the weights they were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorica.beside_weights import read_adapter
from lorica.config import ConfigError, LoraSettings
from lorica.kernels import frozen, lora_linear
from lorica.models.freezing import Last
from lorica.proposals import nearest


def attach(model: Any, settings: LoraSettings, task: str, revision: str | None, last: Last | None = None) -> Any:
    """`model` with fresh adapters, every other weight frozen; what is trained (heads too) is in fp32.

    Modules that the base's files did not hold (a classifier's new head, whatever it is called) are trained and saved whole.

    Args:
        last: the only layers that get adapters; None: all.
    Raises:
        ConfigError: target names that the model does not have, or not there.
    """
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    targets = settings.target_modules
    if isinstance(targets, list):
        heads = {"classifier", "score", "out_proj"} if task == "sequence_classification" else set()
        linear = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)} - heads)
        suffixes = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        for target in targets:
            if not any(name == target or name.endswith("." + target) for name in suffixes):
                raise ConfigError(
                    "model.lora.target_modules",
                    target,
                    f"is no linear layer of this model; it has {', '.join(linear)}",
                    f"model.lora.target_modules=[{nearest(target, linear) or ','.join(linear[:2])}]",
                )
    if last is not None:
        last.check_whole(model, settings.modules_to_save or [])
        targets = last.targets(targets, [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)])
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if task == "causal_lm" else TaskType.SEQ_CLS,
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=targets,
        modules_to_save=sorted({*(settings.modules_to_save or []), *getattr(model, "lorica_new_modules", [])}) or None,
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        bias=settings.bias,
        layers_to_transform=last.numbers if last is not None else None,
        revision=revision,
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as e:
        if targets is not None:
            raise ConfigError("model.lora.target_modules", targets, str(e).splitlines()[0]) from None
        raise ConfigError(
            "model.lora.target_modules", None, "PEFT has no default for this architecture", "model.lora.target_modules=all-linear"
        ) from None
    for p in adapted.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    for m in adapted.modules():  # CPUs add no fp32 bias after a norm of another type
        if isinstance(m, nn.LayerNorm) and m.bias is not None and m.bias.requires_grad:
            m.weight.data = m.weight.data.float()
    return _fast(adapted)


def count(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; a 4-bit weight counts as the weights it stands for."""
    trainable = total = 0
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        n = state.shape.numel() if state is not None else p.numel()
        total += n
        trainable += n if p.requires_grad else 0
    return trainable, total


def save(model: Any, folder: Path, state: dict[str, Any] | None = None) -> None:
    """Write the adapter in PEFT's own format (safetensors) into an empty folder; resized embeddings go with it.

    Args:
        state: the model's, of which the adapter's is taken; None: as it lies.
    """
    resized = bool(getattr(model.config, "lorica_resized", False))
    model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=resized, state_dict=state)
    file = folder / "adapter_config.json"
    written = json.loads(file.read_text("utf-8"))
    if isinstance(written.get("target_modules"), list):  # PEFT holds a set, whose order is another in each process
        written["target_modules"].sort()
    file.write_text(json.dumps(written, indent=2, sort_keys=True), "utf-8")


def check_files(folder: Path) -> None:
    """Refuse an adapter's folder without safetensors.

    Raises:
        ConfigError: there is none, or a .bin in its place.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        other = "; adapter_model.bin is refused, it can hold code" if (folder / "adapter_model.bin").is_file() else ""
        raise ConfigError("run", folder, f"has no adapter_model.safetensors{other}")


def load(model: Any, folder: Path) -> Any:
    """`model` with the adapter of a folder, for inference.

    Raises:
        ConfigError: no safetensors, a configuration that names more than LoRA needs, or weights of another base.
    """
    from peft import PeftModel

    check_files(folder)
    read_adapter(folder / "adapter_config.json")
    try:
        loaded = PeftModel.from_pretrained(model, str(folder))
    except (OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:  # weights that are damaged, or of another base
        raise ConfigError("run", folder, f"its adapter does not fit the base: {' '.join(str(e).split())[:300]}") from None
    return _fast(loaded)


def _fast(model: Any) -> Any:
    """The same modules, with the fast path's forwards."""
    lora_linear.install(model)
    frozen.install(model)
    return model


def dequantize_linears(model: Any, dtype: torch.dtype) -> int:
    """Make a 4-bit model plain: each 4-bit linear with exactly the weights that training multiplied by; return how many there were.

    Merging into these keeps what the adapter was trained on; the original 16-bit weights differ from them by the
    quantisation error (peft#1043, transformers#31293).
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, Linear4bit):
                continue
            weight = dequantize_4bit(child.weight.data, child.weight.quant_state).to(dtype)
            plain = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None, device="meta", dtype=dtype)
            plain.weight = nn.Parameter(weight, requires_grad=False)
            if child.bias is not None:
                plain.bias = nn.Parameter(child.bias.data.to(dtype), requires_grad=False)
            setattr(parent, name, plain)
            replaced += 1
    for name, value in (("is_loaded_in_4bit", False), ("is_quantized", False), ("hf_quantizer", None), ("quantization_method", None)):
        if hasattr(model, name):
            setattr(model, name, value)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return replaced
