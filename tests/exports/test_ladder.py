"""The figures of the export ladder, by hand; how a model is read; what is refused."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lorica.config import ConfigError
from lorica.exports import formats, reading
from lorica.exports.ladder import Rung, compare, markdown
from lorica.exports.questions import Questions, Row


class Table:
    """A model whose logits after a token are that token's row of a table."""

    def __init__(self, rows: list[list[float]], own_tokens: dict[str, list[int]] | None = None) -> None:
        self.rows, self.own_tokens = np.array(rows, np.float32), own_tokens

    def logits(self, ids: list[int], first: int) -> np.ndarray:
        return self.rows[ids[first:]]

    def tokens(self, text: str, special: bool) -> list[int] | None:
        return None if self.own_tokens is None else self.own_tokens[text]


class TableFormat(formats.Format):
    def __init__(self, scorer: Table) -> None:
        self.scorer = scorer

    def write(self, source, folder, variant, config):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def load(self, folder: Path, variant: str, task: str, longest: int) -> Table:
        return self.scorer


A = [[0.0, 1.0, 2.0], [3.0, 0.0, 0.0], [0.0, 0.5, 0.0]]
B = [[0.0, 1.0, 2.0], [0.0, 3.0, 0.0], [0.0, 0.5, 0.0]]  # after token 1 something else


def _read(scorer: Table, questions: Questions, home: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    home.mkdir()
    (home / "request.json").write_text(json.dumps({"format": "table", "folder": str(home), "variant": ""}))
    questions.write(home / "questions.json")
    monkeypatch.setattr(reading, "find", lambda name: TableFormat(scorer))
    assert reading.main(home) == 0
    found: dict[str, object] = json.loads((home / "measured.json").read_text())
    return found


def test_figures_are_those_of_the_distributions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = Questions("causal_lm", [], "by hand", [Row([0, 1, 2], 1, [2, -100]), Row([2, 0], 0, [0, 1])])
    first = _read(Table(A), questions, tmp_path / "a", monkeypatch)
    second = _read(Table(B), questions, tmp_path / "b", monkeypatch)
    original = compare("original", questions, tmp_path / "a", tmp_path / "a", first, 10)
    assert (original.positions, original.differing, original.kl, original.agreement) == (4, 0, 0.0, 1.0)
    rung = compare("b", questions, tmp_path / "b", tmp_path / "a", second, 10)
    p, q = (np.exp(x) / np.exp(x).sum() for x in (np.array(A[1]), np.array(B[1])))
    assert rung.kl == pytest.approx(float((p * np.log(p / q)).sum()) / 4)
    assert (rung.differing, rung.agreement, rung.largest) == (1, 0.75, 3.0)
    losses = [-math.log(1 / (math.exp(3) + 2)), -math.log(1 / (math.exp(0.5) + 2)), -math.log(math.e / (1 + math.e + math.exp(2)))]
    assert original.metric == "perplexity" and original.value == pytest.approx(math.exp(sum(losses) / 3))
    assert rung.load_seconds >= 0 and rung.latency_p50_ms <= rung.latency_p95_ms and rung.peak_memory_bytes > 2**20


def test_labels_are_scored_by_the_likelihood_of_their_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picks = [[(0, 1, 0)], [(0, 1, 1)], [(0, 1, 2)]]  # the label's token is what follows token 1
    rows = [Row([0, 1], 0, [1, -100], label=0, sequences=[[0, 1]], picks=picks)] * 3
    questions = Questions("causal_lm", ["x", "y", "z"], "by hand", rows)
    figures = {name: _read(Table(rows), questions, tmp_path / name, monkeypatch) for name, rows in (("a", A), ("b", B))}
    scores = np.load(tmp_path / "a" / "scores.npy")
    assert np.exp(scores).sum(1) == pytest.approx([1, 1, 1]) and scores[0].argmax() == 0
    original, other = (compare(name, questions, tmp_path / name, tmp_path / "a", figures[name], 1) for name in "ab")
    assert (original.metric, original.value, original.label_agreement) == ("accuracy", 1.0, 1.0)
    assert (other.value, other.label_agreement, other.agreement) == (0.0, 0.0, 0.5)
    assert "its label is the original's in 0.0% of 3 rows only" in other.broken(0.5) and not original.broken(1.0)


def test_one_answer_may_differ_and_numbers_must_be_numbers() -> None:
    assert Rung("x", positions=4, differing=1, kl=0.1).broken(0.9) == ""
    assert "50.0% of 4 positions" in Rung("x", positions=4, differing=2, kl=0.1).broken(0.9)
    for kl in (math.nan, math.inf, None):
        assert "no numbers" in Rung("x", positions=4, kl=kl).broken(0.0)


def test_a_rung_is_kept_and_read_again() -> None:
    rung = Rung("onnx int8", "accuracy", 0.5, 4, 1, 4, 1, 0.1, 0.2, 100, 1.5, 2.0, 3.0, 4.0, 5)
    assert Rung.from_json(json.loads(json.dumps(rung.as_json()))) == rung
    lost = Rung.from_json({"name": "x", "load_seconds": None, "kl": None})
    assert math.isnan(lost.load_seconds) and lost.kl is None
    page = markdown([rung, Rung("gguf Q4_K_M", refused="llama.cpp can't load it")], ["about"])
    assert "|  | accuracy | agreement |" in page and "| onnx int8 | 50.0% | 75.0% |" in page
    assert "- gguf Q4_K_M was refused: llama.cpp can't load it" in page


def test_a_runtime_with_other_tokens_is_told_by_the_first_text_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [("alike", False, [0, 1]), ("not alike", True, [0, 1, 2])]
    questions = Questions("causal_lm", [], "by hand", [Row([0, 1])], texts)
    found = _read(Table(A, {"alike": [0, 1], "not alike": [0, 2, 2]}), questions, tmp_path / "a", monkeypatch)
    assert "'not alike' is 3 ids in training and 3 here; from place 2 on they differ: [1, 2], [2, 2]" in str(found["tokenizer"])
    assert not list((tmp_path / "a").glob("*.npy"))
    alike = _read(Table(A, {"alike": [0, 1], "not alike": [0, 1, 2]}), questions, tmp_path / "b", monkeypatch)
    assert alike["tokenizer"] is None and (tmp_path / "b" / "0.npy").is_file()


def test_questions_are_the_same_after_they_were_written(tmp_path: Path) -> None:
    rows = [Row([1, 2], 1, [5], 2, [[1, 2]], [[(0, 1, 3)], [(0, 0, 4)]])]
    questions = Questions("causal_lm", ["a", "b"], "by hand", rows, [("text", True, [1])])
    questions.write(tmp_path / "q.json")
    again = Questions.read(tmp_path / "q.json")
    assert again.digest() == questions.digest() and again.texts == questions.texts and again.longest == 2
    assert again.rows[0].asked == [([1, 2], 0)]


def test_memory_is_the_process_own_and_not_that_of_who_started_it() -> None:
    """Linux counts a parent's largest size as its children's in getrusage."""
    ballast = b"x" * (300 << 20)
    code = "from lorica.exports.reading import peak_memory; print(peak_memory())"
    source = str(Path(reading.__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": source})
    assert 5 << 20 < int(done.stdout) < len(ballast)


def test_reading_loads_no_torch_by_itself() -> None:
    code = "import sys, lorica.exports.reading; print([m for m in ('torch', 'transformers', 'lightning') if m in sys.modules])"
    source = str(Path(reading.__file__).resolve().parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": source})
    assert done.stdout.strip() == "[]"


def test_an_export_with_a_changed_file_is_refused(tmp_path: Path) -> None:
    from lorica.durable import replaced_folder

    with replaced_folder(tmp_path / "int8") as folder:
        (folder / "model.onnx").write_bytes(b"weights")
    formats.check_intact(tmp_path / "int8")
    (tmp_path / "int8" / "model.onnx").write_bytes(b"weighte")
    with pytest.raises(ConfigError, match=r"model\.onnx is damaged"):
        formats.check_intact(tmp_path / "int8")
