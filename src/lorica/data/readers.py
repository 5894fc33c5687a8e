"""Rows of csv, jsonl, json and parquet files, and of the hub. Every row knows its file and line; damage is a row's, not the file's."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lorica.checks import DATA_ENDINGS
from lorica.config import ConfigError, DataConfig
from lorica.proposals import nearest, pasted

SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev", "eval"),
    "test": ("test", "testing"),
}
PUBLISHED_KINDS = ("csv", "json", "parquet", "arrow", "text")  # of files that a data set on the hub may be made of
NOT_UTF8 = "has bytes that are not UTF-8"
SAMPLES = Path(__file__).parent / "samples"
# A parquet file may unpack to so many bytes: real text packs to a tenth, a few kilobytes that say one thing a billion times don't.
MOST_UNPACKED, SMALLEST_UNPACKED = 200, 1 << 26
PARQUET_ROWS, ROW_BYTES = 256, 300  # read at once; what each takes besides its values
SEPARATOR = re.compile(r'"?sep=(.)"?[,;]*\r?\n?', re.IGNORECASE)  # the first line of what Excel is to read
WIDE = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}  # by byte order marks


@dataclass(frozen=True, slots=True)
class Row:
    """One record as it stands in its source. `fault` says why it can't be used; then `fields` may be empty."""

    origin: str
    fields: dict[str, Any]
    fault: str = ""


def read_rows(path: Path, columns: list[str] | None = None) -> Iterator[Row]:
    """The rows of one file by its ending.

    Args:
        columns: names for a csv file that has no header line.
    Raises:
        ConfigError: when the file as a whole can't be read.
    """
    reader = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}.get(path.suffix.lower())
    if reader is None:
        raise ConfigError("data.path", path, f"must end in {', '.join(DATA_ENDINGS)}")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ConfigError("data.path", path, "is no plain file: a pipe or a device may never end")
    try:
        if reader is not _parquet_rows:
            _check_encoding(path)
        yield from reader(path, columns)
    except OSError as e:
        raise ConfigError("data.path", path, f"can't be read: {e.strerror or e}") from None


def _check_encoding(path: Path) -> None:
    """Refuse UTF-16 and UTF-32, which spreadsheets call Unicode text: by the mark or the zero bytes that they begin with."""
    with path.open("rb") as file:
        head = file.read(4)
    wide = next((name for mark, name in WIDE.items() if head.startswith(mark)), None)
    if wide is None and len(head) == 4 and any(head) and b"\0" in head[:2]:  # without a mark: by where the zeros of the first letter are
        ends = "BE" if head[0] == 0 else "LE"
        wide = ("UTF-32" if head.count(0) == 3 else "UTF-16") + ends
    if wide is not None:
        fix = f"iconv -f {wide} -t UTF-8 {shlex.quote(path.name)} > utf8{path.suffix}, or save it as UTF-8"
        raise ConfigError("data.path", path, f"is in {wide}, must be in UTF-8", fix)


def csv_header(path: Path) -> list[str]:
    """The columns that a csv file's header line names; none of other files, nor where there is no line that can be read, of which
    reading the rows says more."""
    if path.suffix.lower() != ".csv" or not path.is_file():
        return []
    with suppress(OSError, csv.Error), path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        delimiter, _ = _begin(file)
        return [cell.strip() for cell in next(csv.reader([file.readline()], delimiter=delimiter), [])]
    return []


def parquet_columns(path: Path) -> dict[str, Any]:
    """The columns of a parquet file with Arrow's types; none of other files, nor of what can't be read."""
    if path.suffix.lower() != ".parquet" or not path.is_file():
        return {}
    import pyarrow as pa
    import pyarrow.parquet

    with suppress(OSError, pa.ArrowException):
        return {column.name: column.type for column in pa.parquet.read_schema(path)}
    return {}


def bytes_column(path: Path) -> str | None:
    """The first column of a parquet file that holds bytes which are no text, at any depth."""
    columns = parquet_columns(path)
    if not columns:
        return None
    import pyarrow as pa

    plain = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)

    def holds(kind: Any) -> bool:
        if pa.types.is_dictionary(kind):
            return holds(kind.value_type)
        return any(of(kind) for of in plain) or any(holds(kind.field(i).type) for i in range(kind.num_fields))

    return next((name for name, kind in columns.items() if holds(kind)), None)


def _begin(file: TextIO, has_header: bool = True) -> tuple[str, int]:
    """(what separates the cells, lines before the first of them); the file is left there."""
    first = file.readline()
    if said := SEPARATOR.fullmatch(first):
        return said[1], 1
    file.seek(0)
    return _delimiter(first) if has_header else ",", 0


def _csv_rows(path: Path, columns: list[str] | None) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        delimiter, above = _begin(file, columns is None)
        reader = csv.reader(file, strict=True, delimiter=delimiter)
        header = columns
        while True:
            line = reader.line_num + 1 + above
            origin = f"{path.name}:{line}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as e:
                if header is None:
                    raise ConfigError("data.path", path, f"its header line is not csv ({e})", "mend the first line") from None
                further = f", and takes what follows up to line {reader.line_num + above}" if reader.line_num + above > line else ""
                yield Row(origin, {}, f"is not csv ({e}){further}")
                continue
            if not cells:
                continue
            if header is None:
                header = [c.strip() for c in cells]
                continue
            if len(cells) != len(header):
                yield Row(origin, dict(zip(header, cells, strict=False)), f"has {len(cells)} columns, not {len(header)}")
                continue
            whole = "".join(cells)
            yield Row(origin, dict(zip(header, cells, strict=True)), "" if whole.isascii() or encodable(whole) else NOT_UTF8)


def _delimiter(header: str) -> str:
    """What separates the names of a header line: a comma, or, where there is none, a semicolon or a tab (spreadsheets write these)."""
    return next((mark for mark in ",;\t" if mark in header), ",")


def encodable(*values: Any) -> bool:
    """Whether all texts, also those inside lists and objects, can be in UTF-8."""
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                return False
    return True


def _jsonl_rows(path: Path, columns: list[str] | None) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if raw.strip():
                yield _json_row(f"{path.name}:{number}", raw.removeprefix(b"\xef\xbb\xbf"))


def _json_row(origin: str, raw: bytes) -> Row:
    fault = ""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text, fault = raw.decode("utf-8", "replace"), NOT_UTF8
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        return Row(origin, {}, fault or f"is not JSON ({e})")
    return _record(origin, value, fault)


def _record(origin: str, value: Any, fault: str = "") -> Row:
    if not isinstance(value, dict):
        return Row(origin, {}, fault or f"is a JSON {type(value).__name__}, not an object")
    return Row(origin, value, fault or ("" if encodable(*value.values()) else "has text that can't be in UTF-8"))


def _json_rows(path: Path, columns: list[str] | None) -> Iterator[Row]:
    """A file that is one JSON list of objects; anything else is read line by line."""
    try:
        values = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, list):
        yield from _jsonl_rows(path, columns)
        return
    for number, value in enumerate(values, 1):
        yield _record(f"{path.name}#{number}", value)


def _parquet_rows(path: Path, columns: list[str] | None) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    limit = SMALLEST_UNPACKED + MOST_UNPACKED * path.stat().st_size
    bomb = ConfigError("data.path", path, f"unpacks to more than {MOST_UNPACKED} times its size", "a file written without such repetition")
    try:
        file = pyarrow.parquet.ParquetFile(path)
        said = file.metadata
        if ROW_BYTES * said.num_rows + sum(said.row_group(i).total_byte_size for i in range(said.num_row_groups)) > limit:
            raise bomb
        number = unpacked = 0
        for batch in file.iter_batches(batch_size=PARQUET_ROWS):
            unpacked += batch.nbytes + ROW_BYTES * batch.num_rows
            if unpacked > limit:
                raise bomb
            for record in _records(batch):
                number += 1
                origin = f"{path.name}#{number}"
                yield Row(origin, {}, NOT_UTF8) if record is None else _record(origin, record)
    except (pyarrow.ArrowException, ValueError, OverflowError) as e:  # Arrow's own, and Python's of a date that can't be
        raise ConfigError("data.path", path, f"is not a parquet file that can be read ({(str(e).splitlines() or [''])[0]})") from None


def _records(batch: Any) -> Iterator[dict[str, Any] | None]:
    """A batch's rows as Python's values; None for one whose text has no encoding."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                record = batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError:
                record = None
            yield record


def split_files(path: Path, name: str) -> dict[str, Path]:
    """Which file of a folder is which split; a file alone is training.

    A folder has train.csv, validation.jsonl ... , or one data file, or one that is named like the data set.

    Raises:
        ConfigError: when the folder leaves it open.
    """
    if path.is_file():
        return {"train": path}
    if not path.is_dir():
        raise ConfigError("data.path", path, "there is no such file or folder")
    files = sorted(f for f in path.iterdir() if f.suffix.lower() in DATA_ENDINGS and f.is_file())
    found: dict[str, Path] = {}
    for split, words in SPLIT_NAMES.items():
        matches = [f for f in files if f.stem.lower() in words]
        if len(matches) > 1:
            raise ConfigError("data.path", path, f"has {' and '.join(m.name for m in matches)}: which is {split}?", "move one of them away")
        if matches:
            found[split] = matches[0]
    if "train" not in found:
        spare = [f for f in files if f not in found.values()]
        named = [f for f in spare if f.stem == name] or (spare if len(files) == 1 else [])
        if len(named) != 1:
            listing = ", ".join(f.name for f in files) or "no data file"
            raise ConfigError(
                "data.path",
                path,
                f"has {listing}; it needs a train.csv (jsonl, parquet), or name one file",
                f"data.path={files[0] if files else path / 'train.csv'}",
            )
        found["train"] = named[0]
    return found


def check_columns(rows: Iterable[Row], needed: dict[str, str], where: str) -> None:
    """Refuse a source in which no sound row has the columns that the configuration names.

    Args:
        needed: configuration key -> column name.
    Raises:
        ConfigError: with the columns that are there and the nearest one.
    """
    there = dict.fromkeys(column for row in rows if not row.fault for column in row.fields)
    for key, column in needed.items():
        if there and column not in there:
            listing = ", ".join(map(str, there))
            free = [name for name in there if name not in needed.values()]
            near = nearest(column, free) or (free[0] if len(free) == 1 else None)
            if key == "data.input_column" and not near:
                fix = f"{key}=null, where questions have no input besides"
            else:
                fix = pasted(key, near) if near else f"{key}=<one of these>" if free else f"a file that has a column for {key}"
            raise ConfigError(key, column, f"{where} has no such column; it has {listing}", fix)


def read_hub(config: DataConfig) -> tuple[dict[str, list[Row]], str | None]:
    """Rows of the published data set by split, and the commit they are from (None for a local folder).

    Raises:
        ConfigError: within seconds when the hub can't be reached, is gated, or lacks the split.
    """
    from lorica.hub import hub_errors, resolve_revision

    assert config.hub_id is not None
    import datasets
    import yaml

    datasets.disable_progress_bars()
    local = Path(config.hub_id).expanduser().is_dir()
    revision = config.revision if local else resolve_revision(config.hub_id, config.revision, "dataset", "data.hub_id")
    builder: Any = None
    rows: dict[str, list[Row]] = {}
    for split, name in (("train", config.train_split), ("validation", config.validation_split), ("test", config.test_split)):
        if name is None:
            continue
        with hub_errors("data.hub_id", config.hub_id, offline_fix="data.source=files data.path=FOLDER, or data.source=sample"):
            try:
                if builder is None:
                    builder = datasets.load_dataset_builder(
                        os.path.expanduser(config.hub_id), config.hub_config, revision=None if local else revision
                    )
                    _check_published(config, builder, local)
                    builder.download_and_prepare()
                table = builder.as_dataset(split=name)
            except (ValueError, RuntimeError, datasets.exceptions.DatasetGenerationError, yaml.YAMLError) as e:
                raise _hub_mistake(config, split, name, str(e)) from None
            except OSError as e:
                if not local:
                    raise
                raise _hub_mistake(config, split, name, str(e)) from None
        names = {c: f.names for c, f in table.features.items() if hasattr(f, "names")}
        rows[split] = [
            Row(
                f"{config.hub_id}/{name}#{i}",
                {c: names[c][v] if c in names and isinstance(v, int) and 0 <= v < len(names[c]) else v for c, v in record.items()},
            )
            for i, record in enumerate(table, 1)
        ]
    return rows, revision


def _check_published(config: DataConfig, builder: Any, local: bool) -> None:
    """Refuse a published set of other files than tables and texts (archives of pickles, databases), or one that leads out of its folder."""
    kind = next((k for k in PUBLISHED_KINDS if f".{k}." in f".{type(builder).__module__}."), None)
    if kind is None:
        found = type(builder).__module__.rpartition(".")[2]
        raise ConfigError("data.hub_id", config.hub_id, f"is made of {found} files; {', '.join(PUBLISHED_KINDS)} can be read")
    folder = os.path.abspath(os.path.expanduser(str(config.hub_id)))
    for file in (f for files in (builder.config.data_files or {}).values() for f in files) if local else ():
        if os.path.commonpath([folder, os.path.abspath(str(file))]) != folder or "://" in str(file):
            raise ConfigError("data.hub_id", config.hub_id, f"names {file}, which is outside its folder")


def _hub_mistake(config: DataConfig, split: str, name: str, message: str) -> ConfigError:
    """Which key a ValueError of `load_dataset` is about: the configuration, the split, or the data set as a whole."""
    listed = re.search(r"\[(.*?)\]", message)
    there = re.findall(r"'([^']*)'", listed[1]) if listed else []
    why = " ".join(message.split("\nExample of usage")[0].split())
    if "Config name is missing" in message or "BuilderConfig" in message:
        rule = f"{config.hub_id} has {', '.join(there)}" if there else why
        near = nearest(config.hub_config or "", there) or next(iter(there), "")
        if config.hub_config is None:
            rule = f"must be given: {rule}"
        return ConfigError("data.hub_config", config.hub_config, rule, f"data.hub_config={near or '...'}")
    if re.match(r"(Unknown|Bad) split|Unrecognized instruction", message):
        near = nearest(name, there) or ("null" if split != "train" else next(iter(there), "..."))
        return ConfigError(f"data.{split}_split", name, why, f"data.{split}_split={near}")
    return ConfigError("data.hub_id", config.hub_id, f"can't be read: {why}")
