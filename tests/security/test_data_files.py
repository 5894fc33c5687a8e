"""Hostile data files: each is read harmlessly, its bad rows named, or refused in one line, within a second and with little memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorica.config import ConfigError, DataConfig
from lorica.data.readers import read_hub, read_rows, split_files

CODE = "__import__('os').system('touch $CANARY')"


def parquet(table: pa.Table, **options: Any) -> bytes:
    written = io.BytesIO()
    pq.write_table(table, written, **options)
    return written.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        archive.writestr(name, content)
    return written.getvalue()


def repeated(value: str, times: int) -> bytes:
    """A parquet file that says one thing many times, in a few kilobytes."""
    column = pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([value]))
    return parquet(pa.table({"text": column}), compression="zstd", dictionary_pagesize_limit=1 << 24, store_schema=False)


def shifted_footer() -> bytes:
    data = bytearray(parquet(pa.table({"text": ["a"] * 50})))
    data[-8:-4] = (2**31 - 1).to_bytes(4, "little")
    return bytes(data)


FILES: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    # name -> file, content (of the pickle at hand), what the error says; "" where its rows are read or named as faults
    "pickle as csv": ("a.csv", lambda p: p, ""),
    "pickle as jsonl": ("a.jsonl", lambda p: p, ""),
    "pickle as json": ("a.json", lambda p: p, ""),
    "pickle as parquet": ("a.parquet", lambda p: p, "is not a parquet file"),
    "pickle by its own name": ("a.pkl", lambda p: p, "must end in"),
    "torch file": ("a.pt", lambda p: p, "must end in"),
    "numpy file": ("a.npy", lambda p: p, "must end in"),
    "archive": ("a.zip", lambda p: zipped("../../outside.txt", p), "must end in"),
    "archive as csv": ("a.csv", lambda p: zipped("../../outside.txt", p), ""),
    "archive as parquet": ("a.parquet", lambda p: zipped("x", p), "is not a parquet file"),
    "gzip bomb": ("a.csv.gz", lambda p: gzip.compress(b"\0" * (64 << 20)), "must end in"),
    "gzip bomb as jsonl": ("a.jsonl", lambda p: gzip.compress(b"\0" * (64 << 20)), ""),
    "code in cells": ("a.csv", lambda p: f'text,label\n"{CODE}",=cmd|\' /C calc\'!A0\n"{{0.__class__}}","%s%s"\n'.encode(), ""),
    "code in objects": ("a.jsonl", lambda p: json.dumps({"__class__": "evil.run", "py/object": "evil.run", "text": CODE}).encode(), ""),
    "template in a cell": ("a.csv", lambda p: b"text,label\n{{ ''.__class__.__mro__ }},{% include '/etc/passwd' %}\n", ""),
    "nul bytes": ("a.csv", lambda p: b"\0" * 500_000, ""),
    "one line of quotes": ("a.csv", lambda p: b"text,label\n" + b'"' * 500_001, ""),
    "million columns": ("a.csv", lambda p: b"," * 500_000 + b"\n1\n", ""),
    "deep json": ("a.json", lambda p: b"[" * 300_000, ""),
    "deep objects": ("a.jsonl", lambda p: b'{"a":' * 100_000 + b"1" + b"}" * 100_000, ""),
    "number of a million digits": ("a.json", lambda p: b'[{"text": ' + b"9" * 500_000 + b"}]", ""),
    "number beyond all": ("a.jsonl", lambda p: b'{"text": 1e999999999, "label": -Infinity}', ""),
    "keys that collide": ("a.json", lambda p: json.dumps([{str(i): i for i in range(50_000)}]).encode(), ""),
    "parquet bomb of one long text": ("a.parquet", lambda p: repeated("x" * 500_000, 2_000), "unpacks to more than"),
    "parquet bomb of many rows": ("a.parquet", lambda p: repeated("x", 1_000_000), "unpacks to more than"),
    "parquet bomb of zeros": (
        "a.parquet",
        lambda p: parquet(pa.table({"text": ["\0" * (70 << 20)]}), compression="zstd", use_dictionary=False),
        "unpacks to more than",
    ),
    "parquet with a footer beyond its end": ("a.parquet", lambda p: shifted_footer(), "is not a parquet file"),
    "parquet of nothing but marks": ("a.parquet", lambda p: b"PAR1PAR1", "is not a parquet file"),
    "parquet with pickled types": (
        "a.parquet",
        lambda p: parquet(
            pa.table({"text": ["a"]}).replace_schema_metadata({b"ARROW:extension:name": b"arrow.py_extension_type", b"x": p})
        ),
        "",
    ),
    "parquet with a pickled column": (
        "a.parquet",
        lambda p: parquet(
            pa.table(
                [pa.array([b"x"])],
                schema=pa.schema(
                    [
                        pa.field(
                            "text", pa.binary(), metadata={"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": p}
                        )
                    ]
                ),
            )
        ),
        "",
    ),
}


@pytest.mark.parametrize(("name", "content", "says"), FILES.values(), ids=FILES)
def test_hostile_files(name: str, content: Callable[[bytes], bytes], says: str, work: Path, pickled: bytes) -> None:
    path = work / name
    path.write_bytes(content(pickled))
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if says:
        with pytest.raises(ConfigError, match=says):
            list(read_rows(path))
    else:
        rows = list(read_rows(path))
        assert all(row.fault or row.fields for row in rows)
    assert time.process_time() - begun < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KiB


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet"])
def test_hostile_pipes_are_not_waited_for(name: str, work: Path) -> None:
    os.mkfifo(work / name)
    with pytest.raises(ConfigError, match="no plain file"):
        list(read_rows(work / name))
    assert not split_files_or_none(work)


def split_files_or_none(folder: Path) -> dict[str, Path]:
    try:
        return split_files(folder, "x")
    except ConfigError:
        return {}


def test_a_hostile_link_to_a_device_is_not_read_without_end(work: Path) -> None:
    (work / "train.csv").symlink_to("/dev/zero")
    assert not split_files_or_none(work)
    with pytest.raises(ConfigError, match="no plain file"):
        list(read_rows(work / "train.csv"))


def tarred(name: str, content: bytes) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return written.getvalue()


SETS: dict[str, tuple[dict[str, Callable[[bytes], bytes]], str]] = {
    "script": ({"set.py": lambda p: b"import evil\n"}, "can't be read"),
    "script beside data": ({"loader.py": lambda p: b"import evil\n", "train.csv": lambda p: b"text,label\na,b\n"}, ""),
    "archive of pickles": ({"train.tar": lambda p: tarred("0.pickle", p)}, "is made of webdataset files"),
    "archive of torch files": ({"train.tar": lambda p: tarred("../../outside.pth", p)}, "is made of webdataset files"),
    "pickled frame": ({"train.pkl": lambda p: p}, "can't be read"),
    "files outside": (
        {"README.md": lambda p: b"---\nconfigs:\n- config_name: default\n  data_files: ../../outside.csv\n---\n"},
        "outside its folder|can't be read",
    ),
    "files far away": (
        {"README.md": lambda p: b"---\nconfigs:\n- config_name: default\n  data_files: /etc/passwd\n---\n"},
        "outside its folder|can't be read|is made of",
    ),
    "tag in its card": (
        {"README.md": lambda p: b"---\nconfigs: !!python/object/apply:os.system ['touch $CANARY']\n---\n", "a.csv": lambda p: b"text\na\n"},
        "can't be read",
    ),
}


@pytest.mark.parametrize(("files", "says"), SETS.values(), ids=SETS)
def test_hostile_published_sets(files: dict[str, Callable[[bytes], bytes]], says: str, work: Path, pickled: bytes) -> None:
    (work / "set").mkdir()
    (work / "outside.csv").write_text("text,label\na,b\n")
    for name, content in files.items():
        (work / "set" / name).write_bytes(content(pickled))
    config = DataConfig(name="x", module="x", source="hub", hub_id=str(work / "set"), test_split=None)
    if says:
        with pytest.raises(ConfigError, match=says):
            read_hub(config)
    else:
        assert read_hub(config)[0]["train"][0].fields == {"text": "a", "label": "b"}
