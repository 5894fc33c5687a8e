"""`format=gptq`: causal models with GPTQ weights (arXiv:2210.17323), calibrated on rows that the run was trained on.

gptqmodel prints much and sets much of its process: it works in one of its own, `python -m lorica.exports.gptq MODEL NEW BITS ROWS.json`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorica.config import ExportConfig
from lorica.exports.formats import Format, Scorer, run_module

if TYPE_CHECKING:
    from lorica.exports.source import Source

GROUP = 32  # weights that share a scale
WORKERS = "2"  # threads at least: gptqmodel 7.5 plans for two and, where there are two cores, makes one


class Gptq(Format):
    """gptqmodel."""

    tasks = ("causal_lm",)
    packages = ("gptqmodel", "torch", "transformers")

    def write(self, source: Source, folder: Path, variant: str, config: ExportConfig) -> dict[str, Any]:
        rows, bits = source.training_rows(config.calibration_rows), variant.removeprefix("int")
        file = source.work / "calibration.json"
        file.write_text(json.dumps(rows))
        what = ["lorica.exports.gptq", str(source.plain()), str(folder), bits, str(file)]
        run_module("gptq", "gptqmodel", what, source.work)  # which keeps logs where it works
        source.write_asking(folder)
        return {"bits": int(bits), "group": GROUP, "calibration_rows": len(rows), "calibration_tokens": sum(map(len, rows))}

    def load(self, folder: Path, variant: str, task: str, longest: int) -> Scorer:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", WORKERS)
        import torch
        from gptqmodel import BACKEND, GPTQModel

        from lorica.exports.torch_scorer import TorchScorer

        # The plain kernel makes the weights anew in every forward: 15 times the time of torch's own for 4 bits.
        kernel = BACKEND.GPTQ_TORCH_ATEN if variant == "int4" else BACKEND.GPTQ_TORCH
        loaded = GPTQModel.load(str(folder), device="cpu", backend=kernel, dtype=torch.bfloat16, trust_remote_code=False)
        return TorchScorer(loaded.model, task)


def main(arguments: Sequence[str]) -> int:
    """Quantise a model's folder into another one."""
    model, new, bits, file = arguments
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", WORKERS)
    from gptqmodel import GPTQModel, QuantizeConfig

    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in json.loads(Path(file).read_text("utf-8"))]
    quantizer = GPTQModel.load(model, QuantizeConfig(bits=int(bits), group_size=GROUP), trust_remote_code=False)
    quantizer.quantize(rows, batch_size=1)
    quantizer.save(new)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
