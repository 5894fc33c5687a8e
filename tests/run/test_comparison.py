"""Runs beside each other: the same rows or an error, and verdicts that say no more than the rows show."""

import json
from pathlib import Path

import numpy as np
import pytest

from lorica import comparison
from lorica.config import ConfigError

LABELS = ["bad", "good", "so-so"]


def _run(folder: Path, share_right: float, rows: int = 2000, seed: int = 0, texts: str = "text") -> Path:
    """A finished run that answers so many rows rightly, by chance; the rows are those of any other with as many."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"x" * 1000)
    true = np.random.default_rng(99).integers(0, 3, rows)
    rng = np.random.default_rng(seed)
    answers = np.where(rng.random(rows) < share_right, true, (true + rng.integers(1, 3, rows)) % 3)
    lines = []
    for i, (label, answer) in enumerate(zip(true, answers, strict=True)):
        p = {name: 0.8 if k == answer else 0.1 for k, name in enumerate(LABELS)}
        row = {"text": f"{texts} {i}", "label": LABELS[label], "prediction": LABELS[answer], "probability": 0.8, "probabilities": p}
        lines.append(json.dumps(row) + "\n")
    (folder / "predictions.jsonl").write_text("".join(lines))
    (folder / "metrics.json").write_text(json.dumps({"train/seconds": 12.5, "memory/peak_gib": 1.5}))
    return folder


def test_a_model_and_itself_show_no_difference(tmp_path: Path) -> None:
    run = _run(tmp_path / "a", 0.8)
    (pair,) = comparison.pairs([comparison.read(run, "a"), comparison.read(run, "the same")])
    assert (
        pair.p == 1.0 and pair.difference == 0.0 and pair.verdict.startswith("no difference between a and the same that these 2,000 rows")
    )


def test_a_difference_is_said_where_there_is_one_and_only_there(tmp_path: Path) -> None:
    runs = [comparison.read(_run(tmp_path / f"{i}", share, seed=i), f"m{i}") for i, share in enumerate((0.90, 0.80, 0.802))]
    verdicts = {(p.first, p.second): p for p in comparison.pairs(runs)}
    assert "m0 is better than m1 by" in verdicts["m0", "m1"].verdict and "m0 is better than m2" in verdicts["m0", "m2"].verdict
    near = verdicts["m1", "m2"]
    assert near.verdict.startswith("no difference") and near.shows > abs(near.difference)


def test_of_twenty_equal_models_none_is_called_better_more_than_once_in_twenty_comparisons(tmp_path: Path) -> None:
    alarms = 0
    for trial in range(20):
        runs = [comparison.read(_run(tmp_path / f"{trial}-{i}", 0.8, 400, 50 * trial + i), str(i)) for i in range(5)]
        alarms += any(pair.p < comparison.ENOUGH for pair in comparison.pairs(runs))
    assert alarms <= 3


def test_figures_are_those_of_the_rows(tmp_path: Path) -> None:
    run = comparison.read(_run(tmp_path / "a", 0.8), "a")
    found = comparison.figures(run)
    low, high = found["accuracy_interval"]
    assert found["accuracy"] == run.right.mean() and low < found["accuracy"] < high and high - low < 0.04
    assert np.array(found["confusion"]).sum() == 2000 and found["ece"] == pytest.approx(abs(0.8 - found["accuracy"]), abs=1e-9)
    assert found["storage_bytes"] == 1000 and found["train_seconds"] == 12.5 and found["test_samples_per_second"] is None


def test_rows_that_are_answered_differently_are_found(tmp_path: Path) -> None:
    runs = [comparison.read(_run(tmp_path / f"{i}", 0.9, seed=i), f"m{i}") for i in range(2)]
    rows = comparison.disagreements(runs, 10_000)
    assert len(rows) == (runs[0].predicted != runs[1].predicted).sum()
    assert all(len({answer["label"] for answer in row["answers"].values()}) == 2 for row in rows)


@pytest.mark.parametrize("what", ["other rows", "fewer rows", "unfinished", "no rows", "no labels"])
def test_what_can_t_be_compared_is_refused(what: str, tmp_path: Path) -> None:
    first = comparison.read(_run(tmp_path / "a", 0.8), "a")
    run = _run(tmp_path / "b", 0.8, rows=1999 if what == "fewer rows" else 2000, texts="another" if what == "other rows" else "text")
    if what == "unfinished":
        (run / "metrics.json").unlink()
    if what == "no rows":
        (run / "predictions.jsonl").unlink()
    if what == "no labels":
        (run / "predictions.jsonl").write_text('{"text": "a", "prediction": "b"}\n')
    with pytest.raises(ConfigError, match=r"tested on|no finished run|no test rows"):
        comparison.check_same_rows([first, comparison.read(run, "b")])


def test_holm_keeps_order_and_is_never_below_the_single_value() -> None:
    assert comparison.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert comparison.holm([0.9]) == [0.9]


def test_no_difference_is_smaller_than_what_would_have_shown(tmp_path: Path) -> None:
    """Several pairs at once ask for more than one alone."""
    runs = [comparison.read(_run(tmp_path / f"{i}", 0.80 + 0.004 * i, seed=i), f"m{i}") for i in range(6)]
    for pair in comparison.pairs(runs):
        assert pair.p < comparison.ENOUGH or abs(pair.difference) < pair.shows, pair
    far = [comparison.read(_run(tmp_path / f"far-{share}", share), str(share)) for share in (0.99, 0.05)]
    assert "(p < 1e-15)" in comparison.pairs(far)[0].verdict


def test_no_name_comes_first_where_accuracies_are_the_same(tmp_path: Path) -> None:
    runs = [comparison.read(_run(tmp_path / "a", 0.8), "a"), comparison.read(tmp_path / "a", "b")]
    less = comparison.read(_run(tmp_path / "c", 0.78, seed=3), "c")
    same = "a and b have the same accuracy, and none is better that these rows could tell. Of these a was the cheapest to train."
    assert comparison.choose(runs, comparison.pairs(runs)).words == same
    words = comparison.choose([*runs, less], comparison.pairs([*runs, less])).words
    assert less.right.sum() < runs[0].right.sum()
    assert words.startswith("a and b have the same accuracy") and "from c." in words
