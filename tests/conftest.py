"""What all tests share: no network, one thread a test process, and small models that train in seconds."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", OMP_NUM_THREADS="2", OMP_WAIT_POLICY="passive", TOKENIZERS_PARALLELISM="false")

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason="needs the shared data and models beside the checkout"))


@pytest.fixture(scope="session", autouse=True)
def no_file_in_the_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Token ids are kept in a folder of this session, also by the programs that tests start."""
    os.environ["LORICA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


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
