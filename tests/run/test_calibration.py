"""A fitted temperature mends probabilities that are too sure, and the threshold of a risk keeps it on rows that it was not fitted on."""

from pathlib import Path

import numpy as np
import pytest

from lorica import calibration
from lorica.config import ConfigError


def _rows(n: int, seed: int, sharp: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of three classes and labels drawn from them; `sharp` times as sure as they should be."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (n, 3))
    right = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (right.cumsum(1) > rng.random((n, 1))).argmax(1)
    logits = logits * sharp
    return logits - np.log(np.exp(logits).sum(1, keepdims=True)), labels


@pytest.mark.parametrize("sharp", [0.5, 1.0, 3.0])
def test_the_temperature_that_was_planted_is_found(sharp: float) -> None:
    scores, labels = _rows(20_000, 0, sharp)
    found = calibration.calibrate(scores, labels)
    assert found is not None and found.temperature == pytest.approx(sharp, rel=0.05)
    assert found.ece < 0.02 and (sharp == 1.0 or found.ece < found.ece_before / 3)
    others, theirs = _rows(20_000, 1, sharp)
    p = calibration.tempered(others, found.temperature)
    assert calibration.expected_calibration_error(p.max(1), p.argmax(1) == theirs) < 0.02


def test_the_risk_that_was_asked_for_is_kept_on_other_rows() -> None:
    kept = 0
    for seed in range(40):
        found = calibration.calibrate(*_rows(1500, seed))
        assert found is not None
        threshold = found.threshold(0.1)
        scores, labels = _rows(20_000, 1000 + seed)
        p = calibration.tempered(scores, found.temperature)
        answered = p.max(1) >= threshold
        assert answered.mean() > 0.1
        kept += (p.argmax(1) != labels)[answered].mean() <= 0.1
    assert kept >= 34


def test_a_risk_that_the_rows_can_t_show_is_refused() -> None:
    found = calibration.calibrate(*_rows(calibration.LEAST, 0))
    assert found is not None
    with pytest.raises(ConfigError, match="validation rows show no such sureness"):
        found.threshold(0.001)


def test_nothing_is_fitted_to_nothing() -> None:
    scores, labels = _rows(calibration.LEAST, 0)
    assert calibration.calibrate(scores, labels) is not None
    assert calibration.calibrate(scores[1:], labels[1:]) is None
    assert calibration.calibrate(scores, scores.argmax(1)) is None
    assert calibration.calibrate(scores, np.full(calibration.LEAST, -1)) is None


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert calibration.read(tmp_path) is None
    found = calibration.calibrate(*_rows(3000, 0))
    assert found is not None
    calibration.write(tmp_path, found)
    assert calibration.read(tmp_path) == found and len(found.risk) <= calibration.POINTS
    for damage in ("{}", '{"temperature": -1, "rows": 3, "ece": 0, "ece_before": 0, "risk": [[0.5, 1, 2]]}', "[]"):
        (tmp_path / calibration.FILE).write_text(damage)
        with pytest.raises(ConfigError):
            calibration.read(tmp_path)


def test_a_risk_that_is_proposed_can_be_asked_for() -> None:
    hopeless = calibration.Calibration(1.0, 120, 0.1, 0.1, [(0.5, 120, 120)])
    with pytest.raises(ConfigError, match="try: more validation rows"):
        hopeless.threshold(0.05)
    with pytest.raises(ConfigError, match=r"try: target_risk=0\.\d+, or more validation rows"):
        calibration.Calibration(1.0, 120, 0.1, 0.1, [(0.5, 120, 12)]).threshold(0.01)
