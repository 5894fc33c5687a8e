"""What all tests share: no network, few threads, one arithmetic, small models that train in seconds, and pictures that are not painted."""

import contextlib
import gc
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", OMP_WAIT_POLICY="passive", TOKENIZERS_PARALLELISM="false")
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_VNNI"  # no bf16, which trainer.precision=auto takes where it is faster
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"  # two run beside each other as fast as they can on one

gc.disable()  # until all that tests import is there; it stays, and looking through it for garbage would take minutes in all

import pytest  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, or one of two processes would be left with them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason="needs the shared data and models beside the checkout"))


def pytest_collection_finish() -> None:
    """What was imported is not looked through again."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def no_file_in_the_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Token ids are kept in a folder of this session, also by the programs that tests start."""
    os.environ["LORICA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def pictures() -> Iterator[Callable[[Any, Path], None]]:
    """curves.png and confusion.png are drawn but not painted by runs in this process, as they take a quarter of a short run.

    The function that paints them, as programs that tests start do.
    """
    from lorica import plots

    paint = plots.save_figure
    with pytest.MonkeyPatch.context() as m:
        m.setattr(plots, "save_figure", _close)
        yield paint


def _close(figure: Any, file: Path) -> None:
    import matplotlib.pyplot as plt

    file.write_bytes(b"")
    plt.close(figure)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and models beside the checkout."""
    return SHARED


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral of random weights with a tokenizer, as `model.base=` takes it."""
    from lorica.models.base import build_tiny_mistral

    return build_tiny_mistral(tmp_path_factory.mktemp("base") / "tiny-mistral", seed=0)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of a grid or a comparison, and the readings of an export, start no processes, which would each import torch.

    Those processes have tests of their own (test_grid_run.py, and every format of test_export.py).
    """
    from lorica import cells
    from lorica.cli import main
    from lorica.exports import reading, runner

    def train(command: list[str], environment: dict[str, str]) -> tuple[int, list[str]]:
        assert command[1:4] == ["-m", "lorica", "train"]
        said = io.StringIO()
        with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
            main("train", command[4:])
        return int(end.value.code or 0), said.getvalue().splitlines()

    def read(command: list[str], **_: Any) -> SimpleNamespace:
        assert command[1:3] == ["-m", "lorica.exports.reading"]
        return SimpleNamespace(returncode=reading.main(Path(command[3])), stderr="")

    monkeypatch.setattr(cells, "_call", train)
    monkeypatch.setattr(runner, "subprocess", SimpleNamespace(run=read))


@pytest.fixture
def lorica(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Run a verb in this process: `lorica("train", "data=sentiment", ...)` -> (exit code, what was printed)."""
    from lorica.cli import main

    def call(verb: str, *overrides: str) -> tuple[int, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(verb, list(overrides))
        printed = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, printed.out + printed.err

    return call
