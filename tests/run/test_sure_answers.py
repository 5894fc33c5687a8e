"""Probabilities of a run, of predict and of a merged model are calibrated alike; what is not sure enough is not said."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lorica import calibration
from lorica.calibration import Calibration

Lorica = Callable[..., tuple[int, str]]
SMALL = ("data.max_train_examples=96", "data.max_test_examples=60", "trainer.max_epochs=1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lorica.cli import main

    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.raises(SystemExit) as end:
        main("train", ["data.validation_fraction=0.3", *SMALL, f"run_dir={folder}"])
    assert end.value.code == 0
    return folder


def _asked(run: Path, to: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(the run's own test rows with predictions, a file of their texts)."""
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    with to.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["text"], *([row["text"]] for row in rows)])
    return rows, [{"text": row["text"]} for row in rows]


def test_the_runs_probabilities_are_those_of_predict_and_of_the_merged_model(run: Path, tmp_path: Path, lorica: Lorica) -> None:
    kept = calibration.read(run / "adapter")
    assert kept is not None and kept.rows == 120 and kept.temperature != 1.0
    rows, _ = _asked(run, tmp_path / "asked.csv")
    assert lorica("merge", f"run={run}")[0] == 0
    for folder in (run, run / "merged"):
        out = tmp_path / f"{folder.name}.jsonl"
        assert lorica("predict", f"run={folder}", f"input={tmp_path / 'asked.csv'}", f"output={out}")[0] == 0
        answers = [json.loads(line) for line in out.read_text().splitlines()]
        for row, answer in zip(rows, answers, strict=True):
            assert answer["prediction"] == row["prediction"] and answer["probabilities"] == pytest.approx(row["probabilities"], abs=2e-3)
    right = [row["label"] == row["prediction"] for row in rows]
    assert json.loads((run / "metrics.json").read_text())["test/accuracy"] == pytest.approx(sum(right) / len(right))


def test_what_is_not_sure_enough_is_left_unsaid(run: Path, tmp_path: Path, lorica: Lorica) -> None:
    kept = calibration.read(run / "adapter")
    assert kept is not None
    rows, _ = _asked(run, tmp_path / "asked.csv")
    below, above = sorted(float(row["probability"]) for row in rows)[29:31]
    middle = (below + above) / 2
    shown = Calibration(kept.temperature, 1000, 0.0, 0.0, [(middle, 500, 0), (0.01, 1000, 400)])
    calibration.write(run / "adapter", shown)
    (run / "adapter" / "SHA256SUMS").unlink(missing_ok=True)
    command = ["predict", f"run={run}", f"input={tmp_path / 'asked.csv'}"]
    for ending in ("csv", "jsonl"):
        assert lorica(*command, f"output={tmp_path / f'out.{ending}'}", "target_risk=0.05")[0] == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        answers = list(csv.DictReader(file))
    said = [json.loads(line)["prediction"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert said == [a["prediction"] or None for a in answers] and said.count(None) == 30
    for row, answer in zip(rows, said, strict=True):
        assert answer == (row["prediction"] if float(row["probability"]) >= middle else None)
    code, printed = lorica(*command, "target_risk=0.001")
    assert code == 2 and "no such sureness" in " ".join(printed.split())
    (run / "adapter" / calibration.FILE).unlink()
    code, printed = lorica(*command, "target_risk=0.05")
    assert code == 2 and "with 100 validation rows" in " ".join(printed.split()) and "calibration.json" in printed
