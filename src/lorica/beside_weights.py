"""The JSON files that lie beside weights and come with them from anywhere: what may stand in them. No torch.

Their words reach loaders: a name that is imported, a pattern that is matched for hours, a size that is allocated, a path that is opened.
Only what Lorica and PEFT's LoRA write is let through.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from lorica.config import TASKS, ConfigError, QuantizationSettings

LARGEST = 1 << 24  # bytes of one file
MOST_RANKS = 1 << 14
MOST_LAYERS = 1 << 14

Rule = Callable[[Any], bool]


def read_object(file: Path, key: str = "run") -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConfigError: the file holds something else.
    """
    try:
        if file.stat().st_size > LARGEST:
            raise ConfigError(key, file, f"has more than {LARGEST:,} bytes")
        value = json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as e:
        raise ConfigError(key, file, f"is damaged: {str(e).splitlines()[0]}") from None
    except OSError as e:
        raise ConfigError(key, file, f"can't be read ({e.strerror or e})") from None
    if not isinstance(value, dict):
        raise ConfigError(key, file, f"is damaged: it holds a {type(value).__name__}, not an object")
    return value


def _check(found: dict[str, Any], rules: dict[str, Rule], file: Path, why: str) -> None:
    for name, holds in rules.items():
        if found.get(name) is not None and not holds(found[name]):
            raise ConfigError("run", file, f"has {name}={str(found[name])[:80]!r}; {why}")


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 100_000


def _whole(low: int, high: int) -> Rule:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def _name(value: Any) -> bool:
    """A module's name: nothing that a pattern could repeat."""
    return isinstance(value, str) and bool(re.fullmatch(r"[\w.-]{1,300}", value))


def _names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 100_000 and all(map(_name, value))


# ---------------------------------------------------------------------------------------------------------- lorica.json


def _quantization(value: Any) -> bool:
    fields = {f.name: f for f in dataclasses.fields(QuantizationSettings)}
    return isinstance(value, dict) and all(
        name in fields and isinstance(v, type(fields[name].default)) and v in (fields[name].metadata["choices"] or (v,))
        for name, v in value.items()
    )


TASK: dict[str, Rule] = {
    "task": lambda v: v in TASKS,
    "dtype": lambda v: v in ("float32", "bfloat16", "float16"),
    "labels": lambda v: isinstance(v, list) and 1 <= len(v) <= 100_000 and all(map(_text, v)),
    "quantization": _quantization,
    "use_chat_template": lambda v: isinstance(v, bool),
    "tidy": lambda v: isinstance(v, bool),
    **dict.fromkeys(("max_length", "max_new_tokens"), _whole(1, 1 << 24)),
    **dict.fromkeys(("kind", "base", "revision", "text_column", "messages_column", "prompt_column", "input_column"), _text),
    **dict.fromkeys(("prompt_template", "prompt_template_with_input", "shared_prompt"), _text),
}


def read_task(file: Path) -> dict[str, Any]:
    """lorica.json.

    Raises:
        ConfigError: it is damaged, or holds what Lorica does not write.
    """
    task = read_object(file)
    _check(task, TASK, file, "Lorica writes no such value")
    for name in {"classification": ("prompt_template",), "instruction": ("prompt_template", "prompt_template_with_input")}.get(
        str(task.get("kind")), ()
    ):
        if task.get(name) is None:
            raise ConfigError("run", file, f"is damaged: it has no {name}")
    return task


# -------------------------------------------------------------------------------------------------- adapter_config.json


def _ranks(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(k, str) and re.fullmatch(r"\^?[\w.\\-]{1,300}\$?", k) and isinstance(v, (int, float)) and 0 < v <= MOST_RANKS
        for k, v in value.items()
    )


ADAPTER: dict[str, Rule] = {
    "peft_type": lambda v: v == "LORA",
    "task_type": _name,
    "r": _whole(1, MOST_RANKS),
    "lora_alpha": lambda v: isinstance(v, (int, float)) and 0 < v <= 1e6,
    "lora_dropout": lambda v: isinstance(v, (int, float)) and 0 <= v < 1,
    "target_modules": lambda v: _names(v) or v == "all-linear",
    **dict.fromkeys(("exclude_modules", "modules_to_save"), _names),
    "layers_to_transform": lambda v: (
        _whole(0, MOST_LAYERS)(v) or (isinstance(v, list) and len(v) <= MOST_LAYERS and all(map(_whole(0, MOST_LAYERS), v)))
    ),
    "layers_pattern": lambda v: _name(v) or _names(v),
    "target_parameters": _names,
    "bias": lambda v: v in ("none", "all", "lora_only"),
    "init_lora_weights": lambda v: isinstance(v, bool) or _name(v),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _ranks),
    **dict.fromkeys(("base_model_name_or_path", "revision"), lambda v: isinstance(v, str)),
    **dict.fromkeys(("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode", "lora_bias"), lambda v: isinstance(v, bool)),
}
# Keys of PEFT's that import a module by name, read pickles, repeat layers or compute at length: null in what inference needs.
REFUSED = (
    *("megatron_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "monteclora_config"),
    *("layer_replication", "arrow_config", "kasa_config", "use_bdlora", "use_qalora"),
)


def read_adapter(file: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter.

    Raises:
        ConfigError: it is damaged, of another kind, or has what could run code, take for ever or take all memory.
    """
    config = read_object(file)
    if config.get("peft_type") is None:
        raise ConfigError("run", file, "is damaged: it has no peft_type")
    _check(config, ADAPTER, file, "an adapter that can be loaded is LoRA, with names of layers and no patterns")
    for name in REFUSED:
        if config.get(name):
            raise ConfigError("run", file, f"has {name}, which is not loaded: it can import, unpickle or unfold what it names")
    return config


# --------------------------------------------------------------------------------------------------------------- shards


def check_shards(folder: Path, key: str) -> None:
    """Refuse a folder whose list of weight files names one outside of it, or one that is no safetensors file.

    Raises:
        ConfigError: names it.
    """
    file = folder / "model.safetensors.index.json"
    if not file.is_file():
        return
    shards = read_object(file, key).get("weight_map")
    if not isinstance(shards, dict):
        raise ConfigError(key, file, "is damaged: it has no weight_map")
    refuse_outside(shards.values(), file, key)


def refuse_outside(names: Iterable[Any], file: Path, key: str) -> None:
    """Refuse names of weight files that lead out of the folder."""
    for name in set(map(str, names)):
        if PurePosixPath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ConfigError(key, file, f"names {name[:200]!r}, which is no safetensors file of this folder")
