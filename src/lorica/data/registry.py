"""Names of data sets: the package's own, and those that installed packages register (entry point `lorica.data`)."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from lorica.config import ConfigError, DataConfig
from lorica.data.rows import Rows
from lorica.proposals import nearest

if TYPE_CHECKING:
    from lorica.data.module import LoricaDataModule

# `data.module` -> how its classes are called: ChatRows in lorica.data.chat, ChatData in lorica.data.modules.
MODULES = {
    "classification": "Classification",
    "instruction": "Instruction",
    "ag_news": "AGNews",
    "sentiment": "Sentiment",
    "healthcare_qa": "HealthcareQA",
    "chat": "Chat",
}


def build_data(config: DataConfig, seed: int = 0) -> LoricaDataModule:
    """The data module that a configuration names.

    Raises:
        ConfigError: no installed package has it.
    """
    name = config.module
    cls = getattr(import_module("lorica.data.modules"), f"{MODULES[name]}Data") if name in MODULES else _of_package(name)
    module: LoricaDataModule = cls(config, seed)
    return module


def build_rows(config: DataConfig, seed: int = 0) -> Rows:
    """The rows of that data module, without torch; another package's module serves itself, with whatever it imports.

    Raises:
        ConfigError: no installed package has it.
    """
    name = config.module
    cls = getattr(import_module(f"lorica.data.{name}"), f"{MODULES[name]}Rows") if name in MODULES else _of_package(name)
    rows: Rows = cls(config, seed)
    return rows


def look_ahead(config: DataConfig, seed: int = 0) -> int | None:
    """How many training rows small files have; None for large ones, the hub's, and those of other packages, which may import anything.

    Raises:
        ConfigError: what is seen at once can't be used.
    """
    return build_rows(config, seed).look_ahead() if config.module in MODULES else None


def _of_package(name: str) -> Any:
    """The class that an installed package registered."""
    plugins = {p.name: p for p in entry_points(group="lorica.data")}
    if name not in plugins:
        known = [*MODULES, *plugins]
        raise ConfigError(
            "data.module",
            name,
            "no installed package has this data module",
            f"data.module={nearest(name, known) or known[0]}",
        )
    return plugins[name].load()
