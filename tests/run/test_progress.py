"""A long count has a bar on a terminal, and nothing but one line elsewhere; nobody has to look."""

import io
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lorica import screen as screen_module
from lorica.screen import Screen
from lorica.summary import tokenised_line


def counted(monkeypatch: pytest.MonkeyPatch, terminal: bool, enabled: bool = True, rank: int = 0, log: Path | None = None) -> str:
    monkeypatch.setattr(screen_module, "COUNT_SECONDS", 0.0)
    screen, out = Screen(log, rank), io.StringIO()
    screen.console = Console(file=out, force_terminal=terminal, width=100, quiet=rank > 0)
    with screen.counting("tokenising", enabled) as progress:
        for done in (1000, 2000, 3000):
            progress(done, 3000)
    screen.close()
    return out.getvalue()


def test_a_terminal_shows_a_bar_that_the_log_does_not_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown = counted(monkeypatch, terminal=True, log=tmp_path / "train.log")
    assert "tokenising" in shown and "3,000" in shown
    assert (tmp_path / "train.log").read_text() == ""


@pytest.mark.parametrize("where", [{"terminal": False}, {"terminal": True, "enabled": False}, {"terminal": True, "rank": 1}])
def test_elsewhere_there_is_none(monkeypatch: pytest.MonkeyPatch, where: dict[str, Any]) -> None:
    assert counted(monkeypatch, **where) == ""


def test_a_bar_is_taken_down_when_its_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen_module, "COUNT_SECONDS", 0.0)
    screen = Screen()
    screen.console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with pytest.raises(ValueError), screen.counting("tokenising") as progress:
        progress(1, 3)
        progress(2, 3)
        raise ValueError
    assert screen.console.set_live(SimpleNamespace()) is not False  # type: ignore[arg-type]  # as the first, or not at all


@pytest.mark.parametrize(
    ("found", "made", "seconds", "line"),
    [
        (0, 100, 0.5, ""),
        (0, 100_000, 4.1, "tokenised 100,000 rows in 4.1 s"),
        (100_000, 0, 0.0, "100,000 tokenised rows from the cache"),
        (3_000, 500, 0.1, "3,000 tokenised rows from the cache"),
        (3_000, 1_500, 75.0, "3,000 tokenised rows from the cache, tokenised 1,500 rows in 1 min 15 s"),
    ],
)
def test_the_line_says_what_took_long_or_was_found(found: int, made: int, seconds: float, line: str) -> None:
    data: Any = SimpleNamespace(tokens=SimpleNamespace(found=found, made=made, seconds=seconds))
    assert tokenised_line(data) == line


def test_a_line_says_of_which_step_its_loss_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorica.callbacks import ShowProgress

    monkeypatch.setattr("lorica.callbacks.LINE_SECONDS", 0.0)
    screen, out = Screen(), io.StringIO()
    screen.console = Console(file=out, width=100)
    record: Any = SimpleNamespace(history=[(10, 1.5)], tokens_per_second=165.0)
    shown = ShowProgress(screen, record, 69, True)
    for step in (10, 16):
        shown.on_train_batch_end(SimpleNamespace(is_global_zero=True, global_step=step), None, None, None, 0)  # type: ignore[arg-type]
    assert out.getvalue().splitlines() == ["step 10/69  loss 1.5000  165 tokens/s", "step 16/69  loss 1.5000 (at step 10)  165 tokens/s"]


@pytest.mark.slow
def test_a_run_goes_on_when_nobody_reads_its_screen_any_more(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "train.py"), "debug=fast", f"run_dir={tmp_path / 'run'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait() == 0 and "Traceback" not in said, said
    assert (tmp_path / "run" / "metrics.json").is_file()
    assert "predict.py" in (tmp_path / "run" / "train.log").read_text("utf-8").splitlines()[-1]
