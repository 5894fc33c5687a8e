"""The export ladder: every export beside the original, on the same rows, in one table.

export_report.json of an export holds its figures; exports/ladder.json and ladder.md hold all of one original, on one set of rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorica.exports.questions import Questions


@dataclass(frozen=True)
class Rung:
    """A model of the ladder.

    Attributes:
        metric, value: accuracy, perplexity or nothing that is known of the rows. positions: that were compared; differing: of them with
            another most likely token or class than the original's. rows: with labels; other_labels: of them with another answer.
        kl: mean divergence from the original, nats a position. largest: difference of a logit. size_bytes: of its weights.
        load_seconds: from a bare Python to the first row, imports included. latency: of answering a row, alone.
        tokens_per_second: read, one row after the other. peak_memory_bytes: of the process, libraries and all.
        refused: why, in words.
    """

    name: str
    metric: str = ""
    value: float | None = None
    positions: int = 0
    differing: int = 0
    rows: int = 0
    other_labels: int = 0
    kl: float | None = None
    largest: float | None = None
    size_bytes: int = 0
    load_seconds: float = math.nan
    latency_p50_ms: float = math.nan
    latency_p95_ms: float = math.nan
    tokens_per_second: float = math.nan
    peak_memory_bytes: int = 0
    refused: str = ""

    @property
    def agreement(self) -> float | None:
        """Share of the positions with the original's most likely token or class."""
        return 1 - self.differing / self.positions if self.positions else None

    @property
    def label_agreement(self) -> float | None:
        """Share of the rows with the original's label."""
        return 1 - self.other_labels / self.rows if self.rows else None

    def broken(self, least: float) -> str:
        """Why this is not the original, in words; "" where it is. One that differs is always let through."""
        if self.kl is None or not math.isfinite(self.kl):
            return "its answers are no numbers"
        agreement, labels = self.agreement, self.label_agreement
        if labels is not None and self.other_labels > 1 and labels < least:
            return f"its label is the original's in {labels:.1%} of {self.rows} rows only"
        if agreement is not None and self.differing > 1 and agreement < least:
            return f"its most likely answer is the original's at {agreement:.1%} of {self.positions:,} positions only"
        return ""

    def as_json(self) -> dict[str, Any]:
        """For the report."""
        return {**dataclasses.asdict(self), "agreement": self.agreement, "label_agreement": self.label_agreement}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Rung:
        """What `as_json` gave; figures that were no numbers are NaN again."""
        names = {f.name: f for f in dataclasses.fields(cls)}
        known: dict[str, Any] = {k: math.nan if v is None and names[k].type == "float" else v for k, v in found.items() if k in names}
        return cls(**known)


def compare(name: str, questions: Questions, home: Path, original: Path, measured: dict[str, Any], size: int) -> Rung:
    """A model's figures from what `reading` wrote into `home`; those of the original are in `original`, which may be the same."""
    kl, largest, differing, positions, loss, known = 0.0, 0.0, 0, 0, 0.0, 0
    for i, row in enumerate(questions.rows):
        mine, theirs = (np.load(folder / f"{i}.npy").astype(np.float64) for folder in (home, original))
        log_q, log_p = _log_softmax(mine), _log_softmax(theirs)
        kl += float((np.exp(log_p) * (log_p - log_q)).sum())
        largest = max(largest, float(np.abs(mine - theirs).max()))
        differing += int((mine.argmax(-1) != theirs.argmax(-1)).sum())
        positions += len(mine)
        if row.targets:
            there = np.flatnonzero(np.asarray(row.targets) >= 0)
            loss, known = loss - float(log_q[there, np.asarray(row.targets)[there]].sum()), known + len(there)
    metric, value, rows, other = ("perplexity", math.exp(min(loss / known, 700)), 0, 0) if known else ("", None, 0, 0)
    if questions.labels:
        mine_said, their_said = (_labels(questions, folder) for folder in (home, original))
        true = np.array([row.label for row in questions.rows])
        rows, other = len(true), int((mine_said != their_said).sum())
        metric, value = ("accuracy", float((mine_said == true)[true >= 0].mean())) if (true >= 0).any() else ("", None)
    figures: dict[str, Any] = {k: v for k, v in measured.items() if k in {f.name for f in dataclasses.fields(Rung)}}
    return Rung(name, metric, value, positions, differing, rows, other, kl / positions, largest, size, **figures)


def _log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _labels(questions: Questions, home: Path) -> np.ndarray:
    """The class that each row is answered with."""
    if questions.task == "sequence_classification":
        return np.array([np.load(home / f"{i}.npy")[0].argmax() for i in range(len(questions.rows))])
    return np.asarray(np.load(home / "scores.npy").argmax(-1))


def heads(rungs: Sequence[Rung]) -> list[str]:
    """Of the table."""
    metric = next((rung.metric for rung in rungs if rung.metric), "metric")
    both = any(rung.rows and rung.rows != rung.positions for rung in rungs)
    agreement = "label / token" if both else "agreement"
    return ["", metric, agreement, "mean KL", "MB", "load, s", "p50 / p95, ms", "tokens/s", "peak, MiB"]


def cells(rung: Rung) -> list[str]:
    """A rung's row of the table."""
    agreement, labels = rung.agreement, rung.label_agreement
    if rung.refused and rung.kl is None:
        return [rung.name, *[""] * 8]
    said = "" if agreement is None else f"{agreement:.1%}"
    if labels is not None and rung.positions != rung.rows:
        said = f"{labels:.1%} / {said}"
    form = ".1%" if rung.metric == "accuracy" else ".2f"
    return [
        rung.name,
        "" if rung.value is None else f"{rung.value:{form}}",
        said,
        "" if rung.kl is None else f"{rung.kl:.1e}",
        f"{rung.size_bytes / 1e6:,.1f}",
        f"{rung.load_seconds:.1f}",
        f"{_short(rung.latency_p50_ms)} / {_short(rung.latency_p95_ms)}",
        f"{rung.tokens_per_second:,.0f}",
        f"{rung.peak_memory_bytes / 2**20:,.0f}",
    ]


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def markdown(rungs: Sequence[Rung], about: Sequence[str]) -> str:
    """ladder.md."""
    names = heads(rungs)
    lines = ["# Export ladder", "", *about, "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cells(rung)) + " |" for rung in rungs]
    lines += ["", *(f"- {rung.name} was refused: {rung.refused}" for rung in rungs if rung.refused)]
    return "\n".join(lines).rstrip() + "\n"
