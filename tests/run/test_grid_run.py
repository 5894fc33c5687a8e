"""A real grid with a cell that fails: a folder and a W&B run for each, and a second call that runs the one cell."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _grid(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), "-m", *overrides]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)


def _rows(file: Path, count: int) -> None:
    lines = [f"sentence number {i} is {'good' if i % 2 else 'bad'},{'yes' if i % 2 else 'no'}" for i in range(count)]
    file.write_text("\n".join(["text,label", *lines]) + "\n")


@pytest.mark.slow
def test_a_failed_cell_is_recorded_and_only_it_runs_again(tmp_path: Path) -> None:
    _rows(tmp_path / "few.csv", 12)  # fewer of a label than the data report lets through, which is seen only when the run has begun
    _rows(tmp_path / "many.csv", 60)
    sweep = ["data=classification", "data.path=few.csv,many.csv", "data.min_label_examples=10", "trainer.batch_size=4"]
    sweep += ["trainer.max_steps=2", "logger=wandb"]
    first = _grid(tmp_path, *sweep)
    runs = sorted(p for p in (tmp_path / "outputs" / "grids").glob("*/*") if p.is_dir())
    assert len(runs) == 2, first.stdout + first.stderr
    assert all(len(list(r.glob("wandb/offline-run-*"))) == 1 for r in runs)
    failed = [r for r in runs if not (r / "metrics.json").is_file()]
    assert first.returncode == 1 and len(failed) == 1 and (failed[0] / "failed.json").is_file()
    table = json.loads((failed[0].parent / "grid.json").read_text())
    assert [c["failed"] for c in table["cells"]].count(True) == 1
    _rows(tmp_path / "few.csv", 60)
    second = _grid(tmp_path, *sweep)
    assert second.returncode == 0 and second.stdout.count("done before") == 1, second.stdout
    assert (failed[0] / "metrics.json").is_file() and not (failed[0] / "failed.json").exists()
