"""The first rung: what was trained, as `predict` loads it: the adapter on the base that it was trained on, or the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.config import ExportConfig
from lorica.exports.formats import Format, Scorer

if TYPE_CHECKING:
    from lorica.exports.source import Source


class Original(Format):
    """Is not written. variant: JSON of the base's place, where it was said."""

    def write(self, source: Source, folder: Path, variant: str, config: ExportConfig) -> dict[str, Any]:
        raise NotImplementedError

    def load(self, folder: Path, variant: str, task: str, longest: int) -> Scorer:
        import torch

        from lorica.exports.torch_scorer import TorchScorer
        from lorica.models.trained import load_trained

        return TorchScorer(load_trained(folder, torch.device("cpu"), json.loads(variant)).model, task)
