"""A few of the kills that `make faults` does by the hundred."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def test_killed_runs_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "kills.py"), "--few", "--keep", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "4 of 4" in done.stdout, done.stdout + done.stderr
