"""Runs on the same test rows beside each other: how good each is, how sure that is, whether two differ, and what each cost.

Everything is read from run folders: metrics.json, metrics.csv, predictions.jsonl and what lies beside the weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from lorica import calibration, statistics
from lorica.config import ConfigError
from lorica.metrics_log import read_metrics
from lorica.runs import going_on, weights_folder

ENOUGH = 0.05  # p-values below it speak of a difference
TINY = 1e-15  # p-values below it are not told apart
CURVES = ("train/loss", "val/accuracy")


@dataclass
class Compared:
    """One finished run on a labelled test set.

    Attributes:
        rows: (text, label) of each test row [N]. labels: class names [K].
        true, predicted: classes [N]. probabilities: of each class [N, K].
        metrics: metrics.json. calibration: of its validation rows, where it has one. storage: bytes of what must be kept of it.
        curves: (epochs, value) of the training loss and of accuracy in validation.
    """

    name: str
    run: Path
    labels: list[str]
    rows: list[tuple[str, str]]
    true: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray
    metrics: dict[str, float]
    calibration: calibration.Calibration | None
    storage: int
    curves: dict[str, list[tuple[float, float]]]

    @property
    def right(self) -> np.ndarray:
        """Whether each row is answered rightly [N]."""
        return np.asarray(self.true == self.predicted)

    @property
    def confusion(self) -> np.ndarray:
        """Counts [K, K], a row for each true class."""
        k = len(self.labels)
        return np.bincount(self.true * k + self.predicted, minlength=k * k).reshape(k, k)


@dataclass(frozen=True)
class Pair:
    """Two runs beside each other.

    Attributes:
        only_first, only_second: rows that only one has right. p: of McNemar's test, for all pairs of the comparison (Holm 1979).
        shows: the difference of accuracies from which on these rows would have shown one, whatever the other pairs are.
    """

    first: str
    second: str
    rows: int
    only_first: int
    only_second: int
    p: float
    shows: float

    @property
    def difference(self) -> float:
        """Accuracy of the first less that of the second."""
        return (self.only_first - self.only_second) / self.rows

    @property
    def verdict(self) -> str:
        """In plain words."""
        if self.p < ENOUGH:
            better, worse = (self.first, self.second) if self.difference > 0 else (self.second, self.first)
            chance = f"p = {self.p:.2g}" if self.p > TINY else f"p < {TINY:g}"
            return f"{better} is better than {worse} by {100 * abs(self.difference):.2f} points ({chance})"
        seen = f"{100 * abs(self.difference):.2f} points apart"
        enough = f"; {100 * self.shows:.2f} would have shown" if np.isfinite(self.shows) else ""
        return f"no difference between {self.first} and {self.second} that these {self.rows:,} rows can show ({seen}{enough})"


def read(run: Path, name: str) -> Compared:
    """One run.

    Raises:
        ConfigError: it is not finished, or has no labelled test rows.
    """
    finished = run / "metrics.json"
    if not finished.is_file():
        raise ConfigError("runs", run, "is no finished run: it has no metrics.json", going_on(run) or "the folder of a finished run")
    answers = run / "predictions.jsonl"
    rows = [json.loads(line) for line in answers.read_text("utf-8").split("\n") if line] if answers.is_file() else []
    if not rows or any(row.get("label") is None or "probabilities" not in row for row in rows):
        raise ConfigError("runs", run, "has no test rows with labels to compare", "a run on labelled data, with test rows")
    labels = list(rows[0]["probabilities"])
    number = {label: i for i, label in enumerate(labels)}
    weights = weights_folder(run)
    return Compared(
        name,
        run,
        labels,
        [(row["text"], row["label"]) for row in rows],
        np.array([number[row["label"]] for row in rows]),
        np.array([number[row["prediction"]] for row in rows]),
        np.array([[row["probabilities"][label] for label in labels] for row in rows]),
        json.loads(finished.read_text("utf-8")),
        calibration.read(weights),
        sum(f.stat().st_size for f in weights.glob("*.safetensors")),
        _curves(run / "metrics.csv"),
    )


def _curves(file: Path) -> dict[str, list[tuple[float, float]]]:
    """Of each of CURVES that was recorded."""
    series = read_metrics(file) if file.is_file() else {}
    epochs = series.get("train/epoch")
    if not epochs:
        return {}
    last_step, last_epoch = epochs[-1]
    scale = last_epoch / max(1, last_step)  # of a step; epochs have the same number of steps but for a few
    return {name: [(step * scale, value) for step, value in series[name]] for name in CURVES if name in series}


def check_same_rows(runs: Sequence[Compared]) -> None:
    """All were tested on the same rows in the same order.

    Raises:
        ConfigError: the first difference.
    """
    first = runs[0]
    for other in runs[1:]:
        if first.labels != other.labels:
            raise ConfigError("runs", other.run, f"has labels {', '.join(other.labels)}; {first.name} has {', '.join(first.labels)}")
        if len(first.rows) != len(other.rows):
            raise ConfigError("runs", other.run, f"was tested on {len(other.rows):,} rows, {first.name} on {len(first.rows):,}")
        for i, (a, b) in enumerate(zip(first.rows, other.rows, strict=True)):
            if a != b:
                raise ConfigError(
                    "runs", other.run, f"was tested on other rows than {first.name}: row {i + 1} is {b[0][:60]!r}, not {a[0][:60]!r}"
                )


def figures(of: Compared) -> dict[str, Any]:
    """What is said of one run: how good, with intervals; how far its probabilities can be believed; what it cost."""
    spread = statistics.intervals(of.true, of.predicted, len(of.labels))
    known = {name: of.metrics.get(key) for name, key in COSTS.items()}
    return {
        "name": of.name,
        "run": str(of.run),
        "rows": len(of.true),
        "accuracy": float(of.right.mean()),
        "accuracy_interval": spread["accuracy"],
        "f1_macro": float(statistics.macro_f1(of.confusion)),
        "f1_macro_interval": spread["f1_macro"],
        "ece": calibration.expected_calibration_error(of.probabilities.max(1), of.right),
        "temperature": of.calibration.temperature if of.calibration else None,
        "confusion": of.confusion.tolist(),
        "storage_bytes": of.storage,
        "curves": of.curves,
        **known,
    }


# figure -> key of metrics.json
COSTS = {
    "train_seconds": "train/seconds",
    "train_joules": "train/energy_joules",
    "trainable": "model/trainable",
    "weights": "model/weights",
    "train_samples_per_second": "train/samples_per_second",
    "test_samples_per_second": "test/samples_per_second",
    "peak_gib": "memory/peak_gib",
}


def pairs(runs: Sequence[Compared]) -> list[Pair]:
    """Every two runs, in the order given."""
    counted = [(a, b, int((a.right & ~b.right).sum()), int((b.right & ~a.right).sum())) for a, b in combinations(runs, 2)]
    below = ENOUGH / max(1, len(counted))  # a pair below it shows a difference whatever the others show
    corrected = holm([statistics.mcnemar(only_a, only_b) for _, _, only_a, only_b in counted])
    return [
        Pair(a.name, b.name, len(a.true), only_a, only_b, p, statistics.smallest_difference(only_a + only_b, len(a.true), below))
        for (a, b, only_a, only_b), p in zip(counted, corrected, strict=True)
    ]


@dataclass(frozen=True)
class Choice:
    """Which model to ship.

    Attributes:
        best: of the highest accuracy. alike: those that the rows can't tell from it, itself included. cheapest: of these, the one that took
            the least time to train; then the smallest. tied: others with the best one's accuracy.
    """

    best: str
    alike: list[str]
    cheapest: str
    tied: list[str]

    @property
    def words(self) -> str:
        """In plain words."""
        if len(self.alike) == 1:
            return f"{self.best} is the best: better than each of the others."
        if self.tied:
            said = f"{_listed([self.best, *self.tied])} have the same accuracy, and none is better that these rows could tell"
            rest = [name for name in self.alike if name not in (self.best, *self.tied)]
            said += f"; nor can they tell them from {_listed(rest)}." if rest else "."
        else:
            others = _listed([name for name in self.alike if name != self.best])
            said = f"{self.best} has the highest accuracy, and these rows can't tell it from {others}."
        return said + (f" Of these {self.cheapest} was the cheapest to train." if self.tied or self.cheapest != self.best else "")


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def choose(runs: Sequence[Compared], compared: Sequence[Pair]) -> Choice:
    """By accuracy, by what the rows show, and by cost."""
    best = max(runs, key=lambda run: run.right.mean())
    worse = {
        pair.second if pair.first == best.name else pair.first
        for pair in compared
        if best.name in (pair.first, pair.second) and pair.p < ENOUGH
    }
    alike = [run for run in runs if run.name not in worse]
    cheapest = min(alike, key=lambda run: (run.metrics.get("train/seconds", float("inf")), run.storage))
    tied = [run.name for run in alike if run is not best and run.right.sum() == best.right.sum()]
    return Choice(best.name, [run.name for run in alike], cheapest.name, tied)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests, so that the chance of any false alarm is that of one (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - rank)))
        corrected[i] = highest
    return corrected


def agreement(runs: Sequence[Compared]) -> tuple[int, int]:
    """(rows that all runs have right, rows that none has)."""
    right = np.stack([run.right for run in runs])
    return int(right.all(0).sum()), int((~right).all(0).sum())


def disagreements(runs: Sequence[Compared], most: int = 200) -> list[dict[str, Any]]:
    """Rows that the runs answer differently, those with the fewest right answers first."""
    answers = np.stack([run.predicted for run in runs])
    apart = (answers != answers[0]).any(0).nonzero()[0]
    right = np.stack([run.right for run in runs]).sum(0)
    chosen = sorted(apart.tolist(), key=lambda i: (int(right[i]), i))[:most]
    labels = runs[0].labels
    return [
        {
            "text": runs[0].rows[i][0],
            "label": runs[0].rows[i][1],
            "answers": {run.name: {"label": labels[run.predicted[i]], "probability": float(run.probabilities[i].max())} for run in runs},
        }
        for i in chosen
    ]
