"""`format=safetensors`: one plain transformers model in half precision (or whole), for every runtime that reads those."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.config import ConfigError, ExportConfig
from lorica.exports.formats import Format, Scorer

if TYPE_CHECKING:
    from lorica.exports.source import Source


class Plain(Format):
    """Merged weights, tensor by tensor."""

    packages = ("transformers", "torch", "safetensors")

    def write(self, source: Source, folder: Path, variant: str, config: ExportConfig) -> dict[str, Any]:
        import torch

        try:
            source.write_plain(folder, getattr(torch, variant))
        except ConfigError as e:
            raise ConfigError("safetensors", variant, e.rule, "safetensors=[float32]") from None
        source.write_asking(folder)
        return {"dtype": variant}

    def load(self, folder: Path, variant: str, task: str, longest: int) -> Scorer:
        import torch

        from lorica.exports.torch_scorer import TorchScorer
        from lorica.models.base import loader

        return TorchScorer(loader(task).from_pretrained(folder, use_safetensors=True, dtype=getattr(torch, variant)), task)
