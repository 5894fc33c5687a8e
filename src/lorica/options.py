"""What can be chosen: the options of each group, from the YAML folder, a folder of the user's and installed packages; the keys of a schema.
No torch."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from lorica.config import DATA_SCHEMAS, ConfigError, DataConfig


def conf_dir() -> Path:
    """The YAML folder: beside the package in an installed wheel, else at the top of the clone."""
    packaged = Path(__file__).resolve().parent / "conf"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "conf"


def register_plugins() -> None:
    """Data modules of installed packages: their dataclass types and fills `data=NAME` (entry point `lorica.data_config`).

    Raises:
        ConfigError: a package's dataclass can't be used.
    """
    for plugin in entry_points(group="lorica.data_config"):
        from hydra.core.config_store import ConfigStore

        where = f"lorica.data_config:{plugin.name}"
        try:
            schema = plugin.load()
        except Exception as e:
            raise ConfigError(where, plugin.value, f"an installed package's data set can't be loaded ({e})", "pip uninstall it") from None
        if not (isinstance(schema, type) and issubclass(schema, DataConfig)):
            raise ConfigError(where, plugin.value, "must be a dataclass on lorica.config.DataConfig")
        if DATA_SCHEMAS.setdefault(plugin.name, schema) is not schema:
            raise ConfigError(where, plugin.value, f"data={plugin.name} exists already", "another name for the entry point")
        ConfigStore.instance().store(group="data", name=plugin.name, node={"name": plugin.name, "module": plugin.name})


def group_options(config_dir: str | None = None) -> dict[str, list[str]]:
    """Options of each group, from the YAML folders and from installed packages.

    Raises:
        ConfigError: a file of `config_dir` has the name of one of ours, which Hydra would read in its place.
    """
    found: dict[str, set[str]] = {}
    for file in conf_dir().glob("*/*.yaml"):
        found.setdefault(file.parent.name, set()).add(file.stem)
    for file in sorted(Path(config_dir).glob("*/*.yaml")) if config_dir else ():
        group = file.parent.name
        if file.stem in found.get(group, ()):
            raise ConfigError("--config-dir", file, f"{group}={file.stem} is an option of ours", f"{file.with_stem('my_' + file.stem)}")
        if group in found:
            found[group].add(file.stem)
    found["data"] |= set(DATA_SCHEMAS)  # a package's data set needs no YAML
    return {group: sorted(options) for group, options in sorted(found.items())}


@functools.cache
def schema_keys(schema: type, prefix: str = "") -> dict[str, type]:
    """Every dotted leaf under a dataclass, optional sub-dataclasses included, with the type that holds it."""
    keys: dict[str, type] = {}
    for f, inner in fields_of(schema):
        keys |= schema_keys(inner, f"{prefix}{f.name}.") if inner is not None else {f"{prefix}{f.name}": schema}
    return keys


def fields_of(schema: type) -> Iterator[tuple[dataclasses.Field[Any], type | None]]:
    """Each field of a dataclass, with the dataclass that it holds or None."""
    hints = typing.get_type_hints(schema)
    for f in dataclasses.fields(schema):
        inner = [t for t in (hints[f.name], *typing.get_args(hints[f.name])) if dataclasses.is_dataclass(t)]
        yield f, typing.cast("type | None", inner[0] if inner else None)
