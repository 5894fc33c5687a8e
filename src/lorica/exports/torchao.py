"""`format=torchao`: linear layers with weights in 8 or 4 bits.

int8 is a transformers folder, which transformers with torchao loads by itself. int4 is of torchao's CPU kernel, whose layout in memory
depends on the CPU: the file holds the codes themselves, two in a byte, and the layout is made when it is loaded. It computes in bfloat16,
where that kernel is 30 times as fast as in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.config import ConfigError, ExportConfig
from lorica.exports.formats import Format, Scorer

if TYPE_CHECKING:
    import torch

    from lorica.exports.source import Source

GROUP = 32  # weights that share a scale, in int4
FILE = "model.safetensors"
CODES, SCALES = ".int4_codes", ".int4_scale_and_zero"  # uint8 [out, in / 2]; [in / GROUP, out, 2], as torchao has them


class TorchAo(Format):
    """Weight-only quantisation."""

    packages = ("torchao", "torch", "transformers", "safetensors")

    def write(self, source: Source, folder: Path, variant: str, config: ExportConfig) -> dict[str, Any]:
        if variant == "int8":
            _write_int8(source, folder)
        else:
            _write_int4(source, folder)
        source.write_asking(folder)
        return {"bits": int(variant.removeprefix("int")), "group": GROUP if variant == "int4" else None}

    def load(self, folder: Path, variant: str, task: str, longest: int) -> Scorer:
        import torch

        from lorica.exports.torch_scorer import TorchScorer
        from lorica.models.base import loader

        if variant == "int8":
            return TorchScorer(loader(task).from_pretrained(folder, use_safetensors=True, dtype=torch.float32, device_map="cpu"), task)
        return TorchScorer(_load_int4(folder, task), task)


def _write_int8(source: Source, folder: Path) -> None:
    import torch
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    from lorica.models.base import loader

    model = loader(source.task).from_pretrained(
        source.plain(),
        use_safetensors=True,
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
    )
    model.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------------ int4


def _linears(model: Any) -> dict[str, Any]:
    """The layers that get 4 bits, by name: all that groups divide, but for output heads."""
    import torch

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = ("classifier", "score")
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear)
        and layer is not head
        and not set(heads) & set(name.split("."))
        and layer.in_features % GROUP == 0
    }


def _write_int4(source: Source, folder: Path) -> None:
    """Codes and scales of the linear layers, all else as it is.

    Raises:
        ConfigError: no layer can be written so.
    """
    import torch
    from safetensors.torch import save_file
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    from lorica.models.base import loader

    model = loader(source.task).from_pretrained(source.plain(), use_safetensors=True, dtype=torch.bfloat16)
    layers = _linears(model)
    if not layers:
        raise ConfigError("torchao", "int4", f"no linear layer has a multiple of {GROUP} inputs", "torchao=[int8]")
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    for tied in getattr(model, "all_tied_weights_keys", None) or {}:
        state.pop(tied, None)
    for name in layers:
        weight = state.pop(f"{name}.weight")
        scales = Int4OpaqueTensor.from_hp(weight, [1, GROUP]).scale_and_zero.contiguous()
        codes = _codes(weight, scales)
        state[name + CODES], state[name + SCALES] = codes[:, ::2] | codes[:, 1::2] << 4, scales
    save_file(state, folder / FILE, {"format": "pt"})
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _codes(weight: torch.Tensor, scale_and_zero: torch.Tensor) -> torch.Tensor:
    """0 to 15, uint8 [out, in]: a weight is (code - 8) * scale + zero, as torch's `_weight_int4pack_mm_for_cpu` computes."""
    import torch

    scale, zero = scale_and_zero.float().unbind(-1)  # [in / GROUP, out]
    groups = weight.float().reshape(weight.shape[0], -1, GROUP)
    found = (groups - zero.T[..., None]) / scale.T[..., None] + 8
    return found.round().clamp(0, 15).to(torch.uint8).reshape(weight.shape)


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """The kernel's layout on this CPU."""
    import torch

    packed: torch.Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return packed


def _load_int4(folder: Path, task: str) -> Any:
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import load_file
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor
    from transformers import AutoConfig

    from lorica.models.base import loader

    state = load_file(folder / FILE)
    with init_empty_weights(include_buffers=False):  # buffers are in no file; transformers computes them
        model = loader(task).from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False), dtype=torch.bfloat16)
    quantized = [name.removesuffix(CODES) for name in state if name.endswith(CODES)]
    for name in quantized:
        pairs, scales = state.pop(name + CODES), state.pop(name + SCALES)
        codes = torch.stack([pairs & 15, pairs >> 4], -1).flatten(1)
        layer = model.get_submodule(name)
        packed = Int4OpaqueTensor(_pack(codes), scales, [1, GROUP], codes.shape)
        layer.weight = torch.nn.Parameter(packed, requires_grad=False)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    if lost := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ConfigError("run", folder / FILE, f"lacks {lost[0]}", "again=true")
    return model
