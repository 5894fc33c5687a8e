"""Whatever stands in files from elsewhere, they are read as plain values or refused by a ConfigError; nothing else comes out."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica import plain_yaml
from lorica.beside_weights import ADAPTER, REFUSED, TASK, read_adapter, read_task, refuse_outside
from lorica.config import ConfigError
from lorica.data.readers import read_rows

CHEAP = settings(max_examples=150, deadline=None, database=None)
MARKS = [
    "!!python/name:os.system",
    "&a ",
    "*a",
    "${oc.env:HOME}",
    "_target_: os.system\n",
    "- ",
    "a: ",
    "{",
    "}",
    "[",
    "]",
    "\n",
    "  ",
    "'",
]
MARKS += ['"', "'", "|\n", "? ", "<<: ", "%TAG ! x\n", "--- ", "\x85", "\ufeff", "0o7", "1e5", "2001-01-01", "~", "#", "\t", "\\"]
YAML = st.text(max_size=60) | st.lists(st.sampled_from(MARKS), max_size=25).map("".join)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all the files of a property."""
    return tmp_path_factory.mktemp("properties")


def plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(plain(k) and plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    return value is None or type(value).__module__ in ("builtins", "datetime")


@CHEAP
@given(YAML)
def test_yaml_is_plain_or_refused(folder: Path, text: str) -> None:
    (folder / "a.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        value = plain_yaml.read(folder / "a.yaml", "key")
    except ConfigError as e:
        assert len(str(e).splitlines()) <= 4
        return
    assert plain(value)


@CHEAP
@given(st.dictionaries(st.sampled_from([*TASK, "other"]), JSON, max_size=5))
def test_a_task_file_is_within_its_rules_or_refused(folder: Path, content: dict[str, Any]) -> None:
    (folder / "lorica.json").write_text(json.dumps(content))
    try:
        task = read_task(folder / "lorica.json")
    except ConfigError:
        return
    assert task.get("dtype") in (None, "float32", "bfloat16", "float16")
    assert task.get("max_length") is None or 1 <= task["max_length"] <= 1 << 24


@CHEAP
@given(st.dictionaries(st.sampled_from([*ADAPTER, *REFUSED]), JSON, max_size=5))
def test_an_adapters_configuration_is_loras_or_refused(folder: Path, content: dict[str, Any]) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **content}))
    try:
        config = read_adapter(folder / "adapter_config.json")
    except ConfigError:
        return
    assert config["peft_type"] == "LORA" and not any(config.get(name) for name in REFUSED)


@CHEAP
@given(st.text(max_size=20) | st.lists(st.sampled_from(["..", "/", "\\", "a", ".safetensors", "~", "\0"]), max_size=6).map("".join))
def test_a_name_of_weights_stays_in_its_folder_or_is_refused(folder: Path, name: str) -> None:
    try:
        refuse_outside([name], folder / "index.json", "run")
    except ConfigError:
        return
    assert (folder / name).parent == folder and name.endswith(".safetensors")


def _written() -> bytes:
    records = [{"text": f"row {i}", "label": i, "turns": [{"role": "user"}] * (i % 3)} for i in range(30)]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), file, compression="zstd")
    return file.getvalue()


WRITTEN = _written()


@settings(CHEAP, max_examples=300)
@given(st.lists(st.tuples(st.integers(0, len(WRITTEN) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 200))
def test_a_broken_parquet_file_has_rows_or_a_config_error(folder: Path, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(WRITTEN)
    for at, byte in changes:
        data[at] = byte
    (folder / "a.parquet").write_bytes(data[: len(data) - cut] if cut > 100 else data)
    try:
        rows = list(read_rows(folder / "a.parquet"))
    except ConfigError as e:
        assert len(str(e).splitlines()) <= 3
        return
    assert all(row.fault or isinstance(row.fields, dict) for row in rows)
