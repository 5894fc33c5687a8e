"""Names of data modules: the package's own, and those that installed packages register (entry point `lorica.data`)."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from lorica.checks import nearest
from lorica.config import ConfigError, DataConfig
from lorica.data.module import LoricaDataModule

MODULES = {
    "classification": "lorica.data.classification:ClassificationData",
    "instruction": "lorica.data.instruction:InstructionData",
    "ag_news": "lorica.data.ag_news:AGNewsData",
    "sentiment": "lorica.data.sentiment:SentimentData",
    "healthcare_qa": "lorica.data.healthcare_qa:HealthcareQAData",
    "chat": "lorica.data.chat:ChatData",
}


def build_data(config: DataConfig, seed: int = 0) -> LoricaDataModule:
    """The data module that a configuration names.

    Raises:
        ConfigError: no installed package has it.
    """
    plugins = {p.name: p for p in entry_points(group="lorica.data")}
    if config.module in MODULES:
        path, _, name = MODULES[config.module].partition(":")
        cls = getattr(import_module(path), name)
    elif config.module in plugins:
        cls = plugins[config.module].load()
    else:
        known = [*MODULES, *plugins]
        raise ConfigError(
            "data.module",
            config.module,
            "no installed package has this data module",
            f"data.module={nearest(config.module, known) or known[0]}",
        )
    module: LoricaDataModule = cls(config, seed)
    return module
