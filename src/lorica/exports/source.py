"""What exports are made of: the trained weights as one plain model, its tokenizer, how it is asked, and training rows for calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lorica import plain_yaml
from lorica.config import DATA_SCHEMAS, ConfigError
from lorica.data.encoding import Truncation, build_encoder
from lorica.data.registry import build_data
from lorica.models import base, merging
from lorica.models.trained import Opened
from lorica.proposals import nearest

Count = Callable[[int, int], None]
CPU = torch.device("cpu")


@dataclass
class Source:
    """A run to export.

    Attributes:
        run: its folder. base_name: where the base is, where it was said. work: a folder for what is needed on the way. count: told how
            many bytes of how many are written. texts: (text, with special tokens, its ids) that a runtime's tokenizer must give.
    """

    run: Path
    opened: Opened
    base_name: str | None
    work: Path
    count: Count
    texts: list[tuple[str, bool, list[int]]]

    @property
    def task(self) -> str:
        """As in lorica.json."""
        return str(self.opened.task["task"])

    def plain(self) -> Path:
        """The model in the type of training, as a folder that transformers loads; written when it is first asked for."""
        folder = self.work / "plain"
        if not folder.is_dir():
            folder.mkdir()
            self.write_plain(folder, self.opened.dtype)
            self.opened.tokenizer.save_pretrained(folder)
        return folder

    def write_plain(self, folder: Path, dtype: torch.dtype) -> None:
        """Weights and configuration in a type; those of a 4-bit base as they were trained on: the values of its codes.

        Raises:
            ConfigError: a weight is no number, or too large for the type.
        """
        if not self.opened.is_adapter:
            model = base.loader(self.task).from_pretrained(self.opened.folder, use_safetensors=True, dtype=dtype)
            if bad := next((name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())), None):
                raise ConfigError("dtype", str(dtype).removeprefix("torch."), f"{bad} holds NaN or infinity in it", "dtype=float32")
            model.save_pretrained(folder)
        elif (plan := merging.plan(self.opened)) is not None:
            merging.write(plan, folder, dtype, CPU, False, self.count)
        else:
            merging.merge_whole(self.run, self.base_name, folder, dtype, CPU, False)

    def write_asking(self, folder: Path) -> None:
        """How the model is asked: tokenizer, lorica.json, token contract, a classifier's temperature."""
        changes = {"weights": "exported", "quantization": None, "exported_from": str(self.opened.folder)}
        self.opened.write_asking(folder, changes)

    def training_rows(self, rows: int) -> list[list[int]]:
        """Token ids of training rows, at equal distances.

        Raises:
            ConfigError: the run's folder, or the data that its config.yaml names, is not there.
        """
        run = self.run.parent if self.run.name in ("adapter", "model") else self.run
        fix = "a run folder with its config.yaml and the data that it names, or another format"
        if not (run / "config.yaml").is_file():
            raise ConfigError("run", self.run, "has no config.yaml, which says what gptq is to be calibrated on", fix)
        saved = plain_yaml.read(run / "config.yaml", "run", fix)
        found = saved.get("data") if isinstance(saved, dict) else None
        schema = DATA_SCHEMAS.get(str(found.get("module"))) if isinstance(found, dict) else None
        if schema is None or not isinstance(found, dict):
            raise ConfigError("run", run / "config.yaml", "names no data module that is known", fix)
        known = {f.name for f in dataclasses.fields(schema)}
        if other := set(found) - known:
            near = nearest(min(other), known)
            raise ConfigError("run", run / "config.yaml", f"has data.{min(other)}, which there is not", f"data.{near}" if near else fix)
        data = build_data(schema(**found), int(saved.get("seed") or 0))
        examples = data.splits.train
        chosen = [examples[i * len(examples) // rows] for i in range(rows)] if len(examples) > rows else examples
        encoder = build_encoder(self.opened.task, self.opened.tokenizer)
        return [list(row.ids) for row in encoder.encode(chosen, Truncation())]
