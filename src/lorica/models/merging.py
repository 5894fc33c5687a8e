"""An adapter and its base as one set of plain weights: W + scaling * B A (or DoRA's form), computed in fp32.

`plan` says how each tensor of the merged model comes about, by PEFT's own modules on a model without weights; `write` then goes through
the base's files tensor by tensor, so that memory holds one tensor at a time. What a plan can't say (adapters with biases or on
embeddings, new tokens, architectures whose files name weights otherwise) is merged in memory by PEFT itself: `merge_whole`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lorica.config import ConfigError
from lorica.models import base, shards
from lorica.models.trained import Opened, load_trained

PREFIX = "base_model.model."  # of every name in an adapter's file


@dataclass
class Update:
    """What an adapter does to one weight [out, in]: down [r, in] is A, up [out, r] is B. magnitude [out]: of DoRA.

    transposed: the weight is kept as [in, out] (PEFT's fan_in_fan_out).
    """

    down: torch.Tensor
    up: torch.Tensor
    scaling: float
    transposed: bool = False
    magnitude: torch.Tensor | None = None

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """The merged weight in fp32, in the layout of `weight`. DoRA: arXiv:2402.09353, equation 5."""
        merged = weight.to(torch.float32, copy=True)
        wide = merged.T if self.transposed else merged
        down, up = (x.to(merged.device, torch.float32) for x in (self.down, self.up))
        wide.addmm_(up, down, alpha=self.scaling)
        if self.magnitude is not None:
            wide *= (self.magnitude.to(merged.device, torch.float32) / wide.norm(dim=1))[:, None]
        return merged


@dataclass
class Plan:
    """How each tensor of a merged model comes about.

    model: the empty model. kinds: type and shape of its tensors by name; in `sources` the file and the name there of those that come
    from the base. updates, whole: what the adapter changes or holds. quantized: weights that training saw in 4 bits.
    """

    opened: Opened
    model: Any
    kinds: dict[str, shards.Kind] = field(default_factory=dict)
    sources: dict[str, tuple[Path, str]] = field(default_factory=dict)
    updates: dict[str, Update] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)
    quantized: set[str] = field(default_factory=set)

    def shards(self, dtype: torch.dtype) -> list[dict[str, shards.Kind]]:
        """The tensors of each file to write, in `dtype`: those of one file of the base stay together."""
        files = sorted({file for file, _ in self.sources.values()})
        found: list[dict[str, shards.Kind]] = [{} for _ in files]
        for name, (kept, shape) in self.kinds.items():
            place = files.index(self.sources[name][0]) if name in self.sources else -1
            found[place][name] = (dtype if kept.is_floating_point else kept, shape)
        return [kinds for kinds in found if kinds]


# ----------------------------------------------------------------------------------------------------------------- plans


def plan(opened: Opened) -> Plan | None:
    """How to merge a run's adapter tensor by tensor; None where only PEFT can.

    Raises:
        ConfigError: the base's files can't be had.
    """
    settings, labels = opened.settings, opened.task.get("labels")
    empty = base.empty_model(settings, copy.deepcopy(opened.config), opened.tokenizer, labels)
    if len(opened.tokenizer) > empty.get_input_embeddings().weight.shape[0]:
        return None
    found = Plan(opened, empty)
    named = {name: (value.dtype, tuple(value.shape)) for name, value in empty.state_dict().items()}
    tied: dict[str, str] = dict(getattr(empty, "all_tied_weights_keys", None) or {})
    if opened.quantization is not None:
        other = base.empty_model(settings, copy.deepcopy(opened.config), opened.tokenizer, labels)
        found.quantized = {f"{name}.weight" for name in base.quantized_linears(settings, other, opened.quantization)}
    if not _read_adapter(found):
        return None
    changed = found.updates.keys() | found.whole.keys()
    if untied := {name for name, other in tied.items() if {name, other} & changed}:
        for config in (empty.config, empty.config.get_text_config()):
            config.tie_word_embeddings = False
    for name in named:
        if name not in tied or name in untied:
            found.kinds[name] = named[name]
    return found if _find_sources(found, tied) else None


def _read_adapter(found: Plan) -> bool:
    """Fill `updates` and `whole`; whether they say all that the adapter's file holds."""
    from peft import PeftConfig, get_peft_model
    from peft.tuners.lora import Linear, LoraLayer
    from peft.utils.other import ModulesToSaveWrapper
    from transformers.pytorch_utils import Conv1D

    folder = found.opened.folder
    state = load_file(folder / "adapter_model.safetensors")
    try:
        adapted = get_peft_model(copy.deepcopy(found.model), PeftConfig.from_pretrained(str(folder)), low_cpu_mem_usage=True)
    except (ValueError, TypeError):
        return False  # PEFT says why when it loads the adapter
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            for inner in module.original_module.state_dict():
                if (value := state.pop(f"{PREFIX}{name}.{inner}", None)) is None:
                    return False
                found.whole[f"{name}.{inner}"] = value
        elif isinstance(module, LoraLayer):
            down, up = (state.pop(f"{PREFIX}{name}.lora_{x}.weight", None) for x in "AB")
            if type(module) is not Linear or type(module.get_base_layer()) not in (torch.nn.Linear, Conv1D) or down is None or up is None:
                return False
            dora = bool(module.use_dora["default"])
            magnitude = state.pop(f"{PREFIX}{name}.lora_magnitude_vector", None) if dora else None
            if dora and magnitude is None:
                return False
            update = Update(down, up, module.scaling["default"], module.fan_in_fan_out, magnitude)
            found.updates[f"{name}.weight"] = update
    return not state


def _find_sources(found: Plan, tied: dict[str, str]) -> bool:
    """Fill `sources`; whether every tensor has one of its shape."""
    files = base.weight_files(found.opened.base)
    prefix = f"{found.model.base_model_prefix}."
    for name, (_, shape) in found.kinds.items():
        if name in found.whole:
            if tuple(found.whole[name].shape) != shape:
                return False
            continue
        original = tied.get(name, name)
        there = next((n for n in (original, original.removeprefix(prefix)) if n in files), None)
        if there is None:
            return False
        with safe_open(files[there], "pt") as file:
            if tuple(file.get_slice(there).get_shape()) != shape:
                return False
        found.sources[name] = (files[there], there)
    return True


# --------------------------------------------------------------------------------------------------------------- writing


def write(
    found: Plan, folder: Path, dtype: torch.dtype, device: torch.device, original: bool, progress: Callable[[int, int], None]
) -> None:
    """Write the merged model's weights and configuration.

    Args:
        dtype: of the weights written. device: where 4-bit codes are made and products computed.
        original: merge into the weights as the base's files hold them, not as training saw them.
        progress: told (bytes written, of how many).
    Raises:
        ConfigError: a merged weight is no number, or too large for `dtype`.
    """
    parts = found.shards(dtype)
    total, done = sum(shards.size(kind) for kinds in parts for kind in kinds.values()), 0

    def tensor(name: str) -> torch.Tensor:
        nonlocal done
        value = _merged(found, name, device, original)
        value = value.to(dtype) if value.is_floating_point() else value
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ConfigError("dtype", str(dtype).removeprefix("torch."), f"{name} holds NaN or infinity after merging", "dtype=float32")
        done += value.nbytes
        progress(done, total)
        return value

    shards.write_shards(folder, parts, tensor)
    _save_configuration(found, folder, dtype)


def _merged(found: Plan, name: str, device: torch.device, original: bool) -> torch.Tensor:
    """A tensor of the merged model, of any type."""
    if name in found.whole:
        return found.whole[name]
    path, there = found.sources[name]
    with safe_open(path, "pt") as file:
        value: torch.Tensor = file.get_tensor(there)
    if value.is_floating_point() and not original:
        value = value.to(found.opened.dtype)
        if name in found.quantized:
            value = through_four_bits(value, found.opened, device)
    return found.updates[name].apply(value.to(device)) if name in found.updates else value


def through_four_bits(weight: torch.Tensor, opened: Opened, device: torch.device) -> torch.Tensor:
    """The weight that training multiplied by: quantised and made plain again. weight: in the type that training loaded it in.

    On a GPU in the type of training; on a CPU in fp32, where codes are the nearest ones, as the GPU's are.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    settings = opened.quantization
    assert settings is not None
    value = weight.to(device) if device.type == "cuda" else weight.to(device, torch.float32)
    kind = {"compress_statistics": settings.bnb_4bit_use_double_quant, "quant_type": settings.bnb_4bit_quant_type}
    codes = Params4bit(value, requires_grad=False, **kind).to(device)
    named = settings.bnb_4bit_compute_dtype
    plain: torch.Tensor = dequantize_4bit(codes.data, codes.quant_state)
    return plain.to(opened.dtype if named == "auto" else getattr(torch, named))


def _save_configuration(found: Plan, folder: Path, dtype: torch.dtype) -> None:
    """config.json, and generation_config.json of a model that writes."""
    from transformers import GenerationConfig

    empty, opened = found.model, found.opened
    empty.config.architectures, empty.config.dtype = [type(empty).__name__], dtype
    empty.config.pad_token_id = opened.tokenizer.pad_token_id
    empty.config.save_pretrained(folder)
    if not empty.can_generate():
        return
    try:
        generation = GenerationConfig.from_pretrained(opened.base.path, revision=opened.base.revision)
    except OSError:
        generation = empty.generation_config
    generation.pad_token_id = opened.tokenizer.pad_token_id
    generation.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------- whole models


def merge_whole(run: Path, base_name: str | None, folder: Path, dtype: torch.dtype, device: torch.device, original: bool) -> None:
    """As `plan` and `write`, by PEFT with the whole model in memory, in fp32: 4 bytes a weight."""
    trained = load_trained(run, device, base_name, "original" if original else "dequantised")
    merge(trained.model).to(dtype).save_pretrained(folder)


def merge(model: Any) -> Any:
    """A PEFT model on plain weights as one plain model: W + scaling * B A, computed in fp32.

    An output head that shares its weight with the embeddings and has an adapter gets a weight of its own: the adapter changed the
    head alone.
    """
    model = model.float()
    whole = model.get_base_model()
    head = whole.get_output_embeddings()
    adapted = head is not None and hasattr(head, "base_layer")
    if adapted and head.base_layer.weight is whole.get_input_embeddings().weight:
        head.base_layer.weight = torch.nn.Parameter(head.base_layer.weight.detach().clone(), requires_grad=False)
        whole.config.tie_word_embeddings = whole.config.get_text_config().tie_word_embeddings = False
    return model.merge_and_unload(safe_merge=True)


def requantize(merged: Path, folder: Path, opened: Opened, dtype: torch.dtype, device: torch.device) -> None:
    """Write a merged model once more, with its linear layers rounded to the 4 bits that the base had in training."""
    settings = opened.quantization
    assert settings is not None
    config = base.quantization_config(settings, dtype, base.unquantized(opened.settings))
    loader: Any = base.loader(opened.task["task"])
    model = loader.from_pretrained(merged, use_safetensors=True, quantization_config=config, dtype=dtype, device_map={"": device})
    model.save_pretrained(folder)


def compute_in(model: Any, dtype: torch.dtype) -> None:
    """Let a model that was read from 4-bit files multiply in a type of this machine: bfloat16 takes CPUs minutes a row."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
