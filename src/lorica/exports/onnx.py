"""`format=onnx`: classifiers for onnxruntime, in fp32 and with matrices in 8 bits. Loading needs neither torch nor transformers."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorica.config import ConfigError, ExportConfig
from lorica.exports.formats import Format, Scorer

if TYPE_CHECKING:
    from lorica.exports.source import Source

FILE = "model.onnx"
INPUTS = ("input_ids", "attention_mask")  # int64 [B, T]
OPSET = 20


class Onnx(Format):
    """torch's own exporter; onnxruntime's dynamic quantisation."""

    tasks = ("sequence_classification",)
    packages = ("onnx", "onnxscript", "onnxruntime", "torch", "transformers")

    def write(self, source: Source, folder: Path, variant: str, config: ExportConfig) -> dict[str, Any]:
        whole = source.work / FILE
        if not whole.is_file():
            _export(source, whole)
        if variant == "int8":
            _quantize(whole, folder / FILE)
        else:
            shutil.copy(whole, folder / FILE)
        source.write_asking(folder)
        return {"opset": OPSET, "inputs": list(INPUTS), "output": "logits"}

    def load(self, folder: Path, variant: str, task: str, longest: int) -> Scorer:
        return OnnxScorer(folder / FILE)


class OnnxScorer:
    """A session of onnxruntime on the CPU."""

    def __init__(self, file: Path) -> None:
        import onnxruntime

        try:
            self.session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        except Exception as e:  # its own kinds of errors, by what is wrong with the file
            raise ConfigError("run", file, f"onnxruntime can't load it: {str(e).splitlines()[0][:200]}", "again=true") from None

    def logits(self, ids: list[int], first: int) -> np.ndarray:
        """As `Scorer`."""
        read = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
        found = self.session.run(["logits"], read)[0]
        return np.asarray(found, np.float32)

    def tokens(self, text: str, special: bool) -> list[int] | None:
        """None: onnxruntime has no tokenizer; tokenizer.json lies beside the model."""
        return None


def _export(source: Source, file: Path) -> None:
    """fp32, with batch and length left open.

    Raises:
        ConfigError: torch can't follow this architecture.
    """
    import torch

    from lorica.models.base import loader

    auto = loader(source.task)
    model = auto.from_pretrained(source.plain(), use_safetensors=True, dtype=torch.float32, attn_implementation="eager").eval()
    example = {name: torch.ones(2, 16, dtype=torch.long) for name in INPUTS}
    sizes = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("length", min=1, max=_longest(source))}
    try:
        with torch.inference_mode(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            torch.onnx.export(
                _only_logits(model).eval(),
                (),
                str(file),
                kwargs=example,
                dynamo=True,
                external_data=False,
                opset_version=OPSET,
                output_names=["logits"],
                dynamic_shapes=dict.fromkeys(INPUTS, sizes),
                verbose=False,
            )
    except Exception as e:  # torch.export has many kinds, all of which mean that it can't follow the model
        file.unlink(missing_ok=True)
        kind = source.opened.config.model_type
        why = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise ConfigError("format", "onnx", f"torch can't export {kind}: {why}", "format=safetensors, or format=torchao") from None


def _longest(source: Source) -> int:
    from lorica.checks import positions_of

    return positions_of(source.opened.config.to_dict()) or 1 << 20


def _only_logits(model: Any) -> Any:
    """The model with its logits as the only output."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
            return found

    return Logits()


def _quantize(whole: Path, file: Path) -> None:
    """Matrices to 8 bits, a scale for each column; activations are quantised as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(str(whole), str(file), weight_type=QuantType.QInt8, per_channel=True, reduce_range=_saturates())


def _saturates() -> bool:
    """Whether this CPU's 8-bit products saturate at 16 bits, so that weights get 7 bits (x86 before VNNI)."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.is_file() else ""
    return "avx2" in flags and "vnni" not in flags
