"""curves.png and confusion.png can be painted, whatever a run logged and however many labels it has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorica import plots

NOTHING = "step,train/loss,val/loss,val/f1_macro,train/lr\n"
LOGS = {"nothing": NOTHING, "a step": f"{NOTHING}1,0.7,,,0.002\n", "steps": f"{NOTHING}1,0.7,,,0.002\n2,0.6,,,0.001\n2,,0.65,0.4,\n"}


@pytest.fixture(autouse=True)
def painted(pictures: Callable[[Any, Path], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "save_figure", pictures)


def _colours(file: Path) -> int:
    import matplotlib.image

    return len(np.unique(matplotlib.image.imread(file)[..., 0]))


@pytest.mark.parametrize("log", LOGS.values(), ids=LOGS)
def test_curves(log: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(log)
    plots.draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png", "val/f1_macro", 2 if log != NOTHING else 0)
    assert _colours(tmp_path / "curves.png") > 10


@pytest.mark.parametrize("labels", [["a", "b"], ["a label with a very long name", *"bcdef"], [str(i) for i in range(25)]], ids=len)
def test_confusion(labels: list[str], tmp_path: Path) -> None:
    k = len(labels)
    plots.draw_confusion([[i + j for j in range(k)] for i in range(k)], labels, tmp_path / "confusion.png")
    assert _colours(tmp_path / "confusion.png") > 10
