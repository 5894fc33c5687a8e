"""docs/configuration.md is what the schema and conf/ say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorica import config
from lorica.configuration_page import page
from lorica.options import conf_dir, schema_keys

FILE = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"
SCHEMAS = [v for v in vars(config).values() if dataclasses.is_dataclass(v) and v.__module__ == config.__name__]  # not other packages'


def typed_keys() -> Iterator[str]:
    """Every key as it is typed: those of the verbs, and those of each data set and logger."""
    for verb in config.VERBS.values():
        yield from schema_keys(verb)
    for section, schemas in (("data", config.DATA_SCHEMAS), ("logger", config.LOGGER_SCHEMAS)):
        for schema in schemas.values():
            if schema in SCHEMAS:
                yield from schema_keys(schema, f"{section}.")


def test_the_page_is_what_the_schema_says() -> None:
    assert FILE.read_text("utf-8") == page(), "docs/configuration.md is behind src/lorica/config.py or conf/: run `make docs`"


def test_every_key_is_on_the_page() -> None:
    rows = set(re.findall(r"^\| `([\w.]+)` \|", page(), re.MULTILINE))
    assert not set(typed_keys()) - rows


def test_every_option_is_on_the_page() -> None:
    rows = set(re.findall(r"^\| `(\w+=\w+)` \| \S", page(), re.MULTILINE))
    assert rows == {f"{file.parent.name}={file.stem}" for file in conf_dir().glob("*/*.yaml")}


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_field_is_on_the_page(schema: type) -> None:
    named = re.findall(r"^(?:\| `|#+ )(?:[\w]+\.)*(\w+)(?:` \||$)", page(), re.MULTILINE)
    assert not {f.name for f in dataclasses.fields(schema)} - set(named)


def test_every_row_has_a_type_a_default_and_a_meaning() -> None:
    rows = re.findall(r"^\| `[\w.]+` \| (.*?) \| .*? \| (.*?) \| (.*) \|$", page(), re.MULTILINE)
    assert len(rows) >= len(set(typed_keys()))
    assert not [row for row in rows if not all(cell.strip() for cell in row)]


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.__name__)
def test_every_field_has_a_meaning(schema: type) -> None:
    leaves = {key.rpartition(".")[2] for key, owner in schema_keys(schema).items() if owner is schema}
    silent = [f.name for f in dataclasses.fields(schema) if f.name in leaves and not f.metadata.get("meaning")]
    assert not silent
