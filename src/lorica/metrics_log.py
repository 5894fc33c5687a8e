"""metrics.csv: every figure by step. A run that goes on cuts it back to where its checkpoint was written."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from lorica import durable


def read_metrics(file: Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.csv as name -> [(step, value)]."""
    series: dict[str, list[tuple[int, float]]] = {}
    with file.open(newline="") as f:
        for row in csv.DictReader(f):
            for name, value in row.items():
                if name != "step" and value:
                    series.setdefault(name, []).append((int(float(row["step"])), float(value)))
    return series


class MetricsLog(Logger):
    """A csv file with a row for each record; a new column, empty in the rows before, is put in by replacing the file.

    Its content but for train/tokens_per_second is the same for a run that was interrupted, however often.

    Args:
        position: of an earlier `MetricsLog`, to go on from; None: a new file.
    Attributes:
        lost: what was missing or different before `position`, in words; "" where nothing was.
    """

    def __init__(self, path: Path, position: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.path = path
        self.keys: list[str] = []
        self.rows: list[dict[str, str]] = []
        self.lost = ""
        if position is not None:
            self._cut_back(position)
        elif path.exists():
            path.unlink()

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Those are in config.yaml."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Add a row."""
        row = {name: str(value) for name, value in {**metrics, "step": step}.items()}
        self.rows.append(row)
        new = sorted(row.keys() - set(self.keys))
        if new or not self.path.exists():
            self.keys = sorted([*self.keys, *new])
            durable.write_text(self.path, self._text())
            return
        durable.append(self.path, self._lines(self.rows[-1:]))

    def position(self) -> dict[str, Any]:
        """Where the log is now, with all before it on the disk."""
        if self.path.exists():
            with self.path.open("rb+") as file:
                os.fsync(file.fileno())
        return {"rows": len(self.rows), "keys": list(self.keys), "sha256": hashlib.sha256(self._text().encode()).hexdigest()}

    def _cut_back(self, position: dict[str, Any]) -> None:
        self.keys = list(position["keys"])
        try:
            with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
                found = list(csv.DictReader(file))[: position["rows"]]
        except (OSError, csv.Error):
            found = []
        self.rows = [{k: row[k] for k in self.keys if row.get(k)} for row in found]
        text = self._text()
        if hashlib.sha256(text.encode()).hexdigest() != position["sha256"]:
            self.lost = f"{self.path} was changed or damaged: {len(self.rows)} of its first {position['rows']} rows can be read"
        if self.rows:
            durable.write_text(self.path, text)
        elif self.path.exists():
            self.path.unlink()

    def _text(self) -> str:
        return self._lines([dict(zip(self.keys, self.keys, strict=True)), *self.rows]) if self.keys else ""

    def _lines(self, rows: list[dict[str, str]]) -> str:
        out = io.StringIO()
        csv.DictWriter(out, self.keys).writerows(rows)
        return out.getvalue()
