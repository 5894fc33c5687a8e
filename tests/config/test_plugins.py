"""An installed package adds a data set by two entry points: `data=NAME` then composes with the keys of the package's dataclass, without
any YAML, and `build_data` gives the package's data module. One that can't be used is named in one line."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorica import cli, composition, options
from lorica.config import DATA_SCHEMAS, ConfigError

ROOT = Path(__file__).resolve().parents[2]

CONFIG = '''
from dataclasses import dataclass

from lorica.config import ClassificationDataConfig, key


@dataclass
class TicketsConfig(ClassificationDataConfig):
    """Support tickets."""

    queue: str = key("billing", "which queue's tickets", choices=("billing", "returns"))
    min_stars: int = key(1, "leave out tickets with fewer", low=1, high=5)
    text_column: str = key("body", "column with the ticket")
'''
MODULE = '''
from lorica.data.modules import ClassificationData


class TicketsData(ClassificationData):
    """Support tickets."""
'''


def install(folder: Path, entries: str, name: str = "tickets") -> None:
    """A package in `folder` as pip leaves it, with these lines of entry_points.txt."""
    package = folder / f"acme_{name}"
    package.mkdir()
    (package / "__init__.py").write_text("", "utf-8")
    (package / "config.py").write_text(CONFIG, "utf-8")
    (package / "data.py").write_text(MODULE, "utf-8")
    info = folder / f"acme_{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-{name}\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text(entries, "utf-8")


GOOD = """
[lorica.data_config]
tickets = acme_tickets.config:TicketsConfig

[lorica.data]
tickets = acme_tickets.data:TicketsData
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages; what they registered is forgotten afterwards."""
    from hydra.core.config_store import ConfigStore

    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    schemas, repository = dict(DATA_SCHEMAS), dict(ConfigStore.instance().repo.get("data", {}))
    importlib.invalidate_caches()
    yield folder
    DATA_SCHEMAS.clear()
    DATA_SCHEMAS.update(schemas)
    ConfigStore.instance().repo["data"] = repository
    for module in [m for m in sys.modules if m.startswith("acme_")]:
        del sys.modules[module]


def compose(*args: str) -> Any:
    options.register_plugins()
    return composition.compose("train", args)


def test_a_packages_data_set_composes_with_its_own_keys(site: Path) -> None:
    install(site, GOOD)
    config = compose("model=roberta_lora", "data=tickets", "data.queue=returns", "data.min_stars=3").data
    assert type(config).__name__ == "TicketsConfig"
    assert (config.name, config.module, config.queue, config.min_stars, config.text_column) == ("tickets", "tickets", "returns", 3, "body")
    assert compose("data=tickets", "data.max_train_examples=50").data.queue == "billing"


def test_its_keys_are_checked_like_ours(site: Path) -> None:
    install(site, GOOD)
    for typed, says in (
        ("data.queue=return", "try: data.queue=returns"),
        ("data.min_stars=6", "must be at most 5"),
        ("data.min_stars=few", "must be a whole number"),
        ("data.quueue=returns", "try: data.queue=returns"),
    ):
        with pytest.raises(ConfigError) as e:
            compose("data=tickets", typed)
        assert typed in str(e.value) and says in str(e.value)
    with pytest.raises(ConfigError, match="is a key of data=tickets, not of data=ag_news"):
        compose("data=ag_news", "data.queue=returns")
    with pytest.raises(ConfigError, match="try: data=tickets"):
        compose("data=ticket")


def test_it_stands_beside_ours_in_help_and_in_the_configuration(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, GOOD)
    for args, says in ((["--help"], "sentiment, tickets"), (["data=tickets", "--cfg", "job"], "queue: billing")):
        with pytest.raises(SystemExit) as end:
            cli.main("train", args)
        assert end.value.code == 0
        assert says in capsys.readouterr().out


def test_a_yaml_file_can_set_its_keys_under_another_name(site: Path, tmp_path: Path) -> None:
    install(site, GOOD)
    (tmp_path / "more" / "data").mkdir(parents=True)
    (tmp_path / "more" / "data" / "returns.yaml").write_text("defaults: [tickets]\nname: returns\nqueue: returns\n", "utf-8")
    options.register_plugins()
    config = composition.compose("train", ["data=returns", "data.min_stars=2"], str(tmp_path / "more")).data
    assert (config.name, config.module, config.queue, config.min_stars) == ("returns", "tickets", "returns", 2)


def test_a_run_on_it_gives_its_configuration_back(site: Path, tmp_path: Path) -> None:
    from lorica.runs import to_yaml

    install(site, GOOD)
    config = compose("data=tickets", "data.queue=returns")
    (tmp_path / "config.yaml").write_text(to_yaml(config), "utf-8")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-000001.ckpt").touch()
    assert compose(f"resume={tmp_path}").data == config.data


def test_registering_twice_is_harmless(site: Path) -> None:
    install(site, GOOD)
    assert compose("data=tickets") == compose("data=tickets")


def test_without_the_package_its_name_is_unknown() -> None:
    with pytest.raises(ConfigError, match="data=tickets: must be one of"):
        compose("data=tickets")


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("tickets = acme_tickets.nowhere:TicketsConfig", "can't be loaded"),
        ("tickets = acme_tickets.config:Nothing", "can't be loaded"),
        ("tickets = acme_tickets.config:dataclass", "must be a dataclass on lorica.config.DataConfig"),
        ("sentiment = acme_tickets.config:TicketsConfig", "data=sentiment exists already"),
    ],
)
def test_a_package_that_can_not_be_used_is_named(entry: str, says: str, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(site, f"[lorica.data_config]\n{entry}\n")
    with pytest.raises(SystemExit) as end:
        cli.main("train", ["--cfg", "job"])
    shown = capsys.readouterr().err
    assert end.value.code == 2
    assert shown.startswith(f"lorica: lorica.data_config:{entry.partition(' ')[0]}=acme_tickets") and says in shown
    assert len(shown.splitlines()) <= 5


@pytest.mark.slow
def test_build_data_gives_the_packages_class(site: Path, tmp_path: Path) -> None:
    from lorica.data.registry import build_data, build_rows

    install(site, GOOD)
    file = tmp_path / "tickets.csv"
    file.write_text("body,label\n" + "".join(f"ticket {i},{'ab'[i % 2]}\n" for i in range(40)), "utf-8")
    data = build_data(compose("data=tickets", "data.source=files", f"data.path={file}").data, seed=3)
    assert (type(data).__module__, type(data).__name__) == ("acme_tickets.data", "TicketsData")
    data.load()
    assert data.labels == ["a", "b"]
    assert build_rows(data.config, seed=3).splits == data.splits


@pytest.mark.slow
def test_build_data_without_the_module_says_so(site: Path) -> None:
    from lorica.data.registry import build_data

    install(site, "[lorica.data_config]\ntickets = acme_tickets.config:TicketsConfig\n")
    with pytest.raises(ConfigError, match=r"data\.module=tickets: no installed package has this data module"):
        build_data(compose("data=tickets").data)


def test_the_program_finds_packages_by_itself(site: Path, tmp_path: Path) -> None:
    install(site, GOOD)
    program = f"import sys; sys.path[:0] = [{str(ROOT / 'src')!r}, {str(site)!r}]; from lorica.cli import main; main('train')"
    done = subprocess.run(
        [sys.executable, "-c", program, "data=tickets", "data.queue=return"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.splitlines()[1:]) == (2, ["  try: data.queue=returns"])
