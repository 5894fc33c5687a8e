"""How far a classifier's probabilities can be believed: a temperature that mends them, and from which one on its answers are sure enough.

Both are fitted on the validation rows of the weights that are kept, and lie beside them in calibration.json.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorica.beside_weights import read_object
from lorica.config import ConfigError
from lorica.durable import write_json
from lorica.statistics import rate_at_most

FILE = "calibration.json"
BINS = 15
POINTS = 1000  # of the curve of risk that are kept
LEAST = 100  # rows; of fewer a temperature would say more about them than about the model
MORE_ROWS = "more validation rows (data.validation_fraction, data.max_validation_examples)"
COLDEST, HOTTEST = 0.05, 20.0


@dataclass(frozen=True)
class Calibration:
    """Of one model.

    Attributes:
        temperature: what log-probabilities are divided by before they are made probabilities again.
        rows: that it was fitted on. ece, ece_before: expected calibration error on them with it and without.
        risk: (probability, rows answered, wrong ones) if all rows from that probability on are answered, the surest first.
    """

    temperature: float
    rows: int
    ece: float
    ece_before: float
    risk: list[tuple[float, int, int]]

    def threshold(self, target: float) -> float:
        """The lowest probability from which on answers are wrong in at most a share `target`, with 95 % confidence.

        Raises:
            ConfigError: the rows show no such probability.
        """
        for p, answered, wrong in sorted(self.risk):
            if wrong / answered <= target and rate_at_most(wrong, answered) <= target:
                return p
        _, answered, wrong = min(self.risk, key=lambda point: rate_at_most(point[2], point[1]))
        raise ConfigError(
            "target_risk",
            target,
            f"its {self.rows:,} validation rows show no such sureness: of the surest {answered:,}, {wrong:,} are wrong, "
            f"which says at most {rate_at_most(wrong, answered):.3g}",
            f"target_risk={reached:.2g}, or more validation rows"
            if (reached := 1.05 * rate_at_most(wrong, answered)) < 0.99
            else MORE_ROWS,
        )


def threshold(calibration: Calibration | None, target: float) -> float:
    """`Calibration.threshold` of a model that may have none.

    Raises:
        ConfigError: it has none, or its rows show no such probability.
    """
    if calibration is None:
        raise ConfigError(
            "target_risk",
            target,
            f"needs a run on labelled data with {LEAST} validation rows, some answered rightly and some wrongly (calibration.json); "
            "this model has none",
            MORE_ROWS,
        )
    return calibration.threshold(target)


def calibrate(scores: np.ndarray, labels: np.ndarray) -> Calibration | None:
    """Fit to log-probabilities [N, K] and true classes [N]; None for fewer than LEAST rows, or where all are right or wrong."""
    known = labels >= 0
    scores, labels = scores[known].astype(np.float64), labels[known]
    right = scores.argmax(1) == labels
    if len(labels) < LEAST or right.all() or not right.any():
        return None
    temperature = fit_temperature(scores, labels)
    surest = tempered(scores, temperature).max(1)
    order = np.argsort(-surest, kind="stable")
    wrong = np.cumsum(~right[order])
    last = np.append(np.diff(surest[order]) < 0, True).nonzero()[0]  # rows of one probability are answered together or not at all
    kept = last[np.unique(np.linspace(0, len(last) - 1, POINTS).round().astype(int))]
    risk = [(float(surest[order[i]]), int(i) + 1, int(wrong[i])) for i in kept]
    before = expected_calibration_error(tempered(scores, 1.0).max(1), right)
    return Calibration(temperature, len(labels), expected_calibration_error(surest, right), before, risk)


def tempered(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities [N, K] of log-probabilities at a temperature."""
    logits = scores / temperature
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(weights / weights.sum(1, keepdims=True))


def fit_temperature(scores: np.ndarray, labels: np.ndarray) -> float:
    """The temperature of the smallest cross-entropy (Guo et al. 2017, arXiv:1706.04599), by golden section over its logarithm.

    The loss is convex in 1 / temperature, so that it has one lowest place.
    """
    rows = np.arange(len(labels))

    def loss(log_temperature: float) -> float:
        logits = scores / np.exp(log_temperature)
        top = logits.max(1)
        return float((np.log(np.exp(logits - top[:, None]).sum(1)) + top - logits[rows, labels]).mean())

    low, high, ratio = np.log(COLDEST), np.log(HOTTEST), (5**0.5 - 1) / 2
    for _ in range(60):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return float(np.exp((low + high) / 2))


def expected_calibration_error(probabilities: np.ndarray, right: np.ndarray) -> float:
    """Mean distance of probability and share right, over BINS bins of equal width (Naeini et al. 2015).

    Args:
        probabilities: of the predicted class [N]. right: whether it is the true one [N].
    """
    at = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    count = np.bincount(at, minlength=BINS)
    apart = np.abs(np.bincount(at, probabilities, BINS) - np.bincount(at, right, BINS))
    return float(apart[count > 0].sum() / len(right))


def write(folder: Path, calibration: Calibration) -> None:
    """Keep it in a folder."""
    write_json(folder / FILE, asdict(calibration))


def read(folder: Path) -> Calibration | None:
    """What a folder keeps; None where it keeps nothing.

    Raises:
        ConfigError: the file is damaged.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    return parse(read_object(file), file)


def parse(value: dict[str, Any], source: object) -> Calibration:
    """The content of calibration.json.

    Raises:
        ConfigError: it is not of that form.
    """
    try:
        found = Calibration(
            float(value["temperature"]),
            int(value["rows"]),
            float(value["ece"]),
            float(value["ece_before"]),
            [(float(p), int(answered), int(wrong)) for p, answered, wrong in value["risk"]],
        )
        sound = COLDEST / 2 < found.temperature < HOTTEST * 2 and all(0 <= wrong <= n and 0 <= p <= 1 < n + 1 for p, n, wrong in found.risk)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound or not found.risk:
        raise ConfigError("run", source, "is damaged: it is no calibration that Lorica wrote", "a copy of it, or a new run; or remove it")
    return found
