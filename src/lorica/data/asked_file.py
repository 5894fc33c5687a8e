"""A file of rows to answer: looked through once for what its answers need to know, and read again chunk by chunk, where it is not small."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from lorica.config import ConfigError
from lorica.data.asking import ask_row, text_column
from lorica.data.examples import Example
from lorica.data.readers import Row, bytes_column, csv_header, parquet_columns, read_rows
from lorica.data.rows import BadRow
from lorica.proposals import nearest, pasted

ADDED = frozenset(("prediction", "probability", "probabilities", "error"))  # what an answered row has besides its own
CHUNK_LETTERS = 1 << 23  # of a chunk's rows: what they take in memory
KEPT_ROWS, FIELD = 1 << 14, 64  # of a file that is read once only, if they hold no more than CHUNK_LETTERS, a field counted as so many
MOST_COLUMNS = 10_000  # of a table
SHOWN_FAULTS = 3
WHOLE = 2**53  # integers up to here are floating-point numbers too


@dataclass
class Survey:
    """What is in a file.

    chunks: (rows, rows that can be answered) of each. first_faults: of rows that can't be, by file and line. columns: name -> kind of
    its values: text, bool, int (wide beyond WHOLE), float or json, "" where nobody asks; in the order they first appear, none where
    the output has no columns. column: the one with the texts, where it was said. only: the only one of the first sound row, which has
    none by the names of the training data. kept: the rows as they are asked, of a small file that was looked through just now.
    """

    chunks: list[tuple[int, int]] = field(default_factory=list)
    faults: int = 0
    first_faults: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    column: str | None = None
    only: str | None = None
    kept: list[tuple[Row, Example | str]] | None = None

    def keep(self, row: Row, asked: Example | str, held: int) -> None:
        """One more of the rows, which take as much memory as so many letters in all; none are kept once they are many."""
        if self.kept is not None:
            self.kept.append((row, asked))
            if len(self.kept) > KEPT_ROWS or held > CHUNK_LETTERS:
                self.kept = None

    def __getstate__(self) -> dict[str, Any]:
        """Other processes read the file."""
        return self.__dict__ | {"kept": None}

    @property
    def answerable(self) -> int:
        """Rows of the file that can be answered."""
        return sum(sound for _, sound in self.chunks)


@dataclass
class Chunk:
    """Some rows in a row: examples by their place among them, and why the others can't be answered."""

    number: int
    rows: list[Row]
    examples: dict[int, Example]
    faults: dict[int, str]


def read_input(path: Path) -> Iterator[Row]:
    """`read_rows`, with the key of `predict` in its errors."""
    try:
        yield from read_rows(path)
    except ConfigError as e:
        raise ConfigError("input" if e.where == "data.path" else e.where, e.value, e.rule, e.fix) from None


def look_ahead(path: Path, task: dict[str, Any], column: str | None) -> str | None:
    """`Survey.only`, by the file's first sound row.

    Raises:
        ConfigError: it has columns with the names of ours, two of one name, or no text column.
    """
    _refuse_twins(path)
    row = next((row for row in read_input(path) if not row.fault), None)
    if row is None:
        return None
    _refuse_added(path, row.fields)
    return _only_column(path, task, column, row.fields)


def look_through(path: Path, task: dict[str, Any], column: str | None, chunk_rows: int, ending: str) -> Survey:
    """Read the whole file once: rows in chunks of `chunk_rows`, or fewer that hold CHUNK_LETTERS.

    Args:
        task: lorica.json. column: the one with the text, where it was said. ending: of the file that the answers are written to.
    Raises:
        ConfigError: columns with the names of ours, no text column, too many columns for a table, bytes that are no text and would be
            written as such, a file that can't be read.
    """
    survey = Survey(column=column, only=look_ahead(path, task, column), kept=[])
    table, kinds = ending != ".jsonl", ending == ".parquet"
    if not kinds and (name := bytes_column(path)) is not None:
        raise ConfigError("output", None, f"column {name} of {path.name} holds bytes, which {ending} can't", "output=scored.parquet")
    rows = sound = letters = held = 0
    for row in read_input(path):
        _refuse_added(path, row.fields)
        if table:
            if kinds:
                _note_kinds(survey.columns, row.fields)
            elif not row.fields.keys() <= survey.columns.keys():
                survey.columns.update(dict.fromkeys(row.fields, ""))
            if len(survey.columns) > MOST_COLUMNS:
                raise ConfigError("output", None, f"{path.name} has more than {MOST_COLUMNS:,} columns", "output=scored.jsonl")
        size = _letters(row.fields)
        rows, letters, held = rows + 1, letters + size, held + size + FIELD * len(row.fields)
        if isinstance(asked := ask(row, task, survey), Example):
            sound += 1
            held += len(asked.prompt)
        else:
            survey.faults += 1
            if len(survey.first_faults) < SHOWN_FAULTS:
                survey.first_faults.append(asked)
        survey.keep(row, asked, held)
        if rows == chunk_rows or letters >= CHUNK_LETTERS:
            survey.chunks.append((rows, sound))
            rows = sound = letters = 0
    if rows:
        survey.chunks.append((rows, sound))
    if table and not survey.columns:
        survey.columns.update({name: "" for name in [*csv_header(path), *parquet_columns(path)] if name not in ADDED})
    return survey


def read_chunks(path: Path, survey: Survey, task: dict[str, Any], wanted: Collection[int]) -> Iterator[Chunk]:
    """Those chunks of a surveyed file that are wanted, in order.

    Raises:
        ConfigError: the file has other rows now.
    """
    reader: Iterator[tuple[Row, Example | str | None]]
    reader = iter(survey.kept) if survey.kept is not None else ((row, None) for row in read_input(path))
    for number, (size, sound) in enumerate(survey.chunks[: max(wanted, default=-1) + 1]):
        rows = list(islice(reader, size)) if number in wanted else []
        if number not in wanted:
            next(islice(reader, size - 1, size), None)
            continue
        asked = {i: ask(row, task, survey) if known is None else known for i, (row, known) in enumerate(rows)}
        examples = {i: e for i, e in asked.items() if isinstance(e, Example)}
        if (len(rows), len(examples)) != (size, sound):
            raise changed(path)
        yield Chunk(number, [row for row, _ in rows], examples, {i: e for i, e in asked.items() if isinstance(e, str)})


def changed(path: Path) -> ConfigError:
    """Of a file that somebody writes to."""
    return ConfigError("input", path, "was changed while it was read", "the same command again, once it is whole")


def ask(row: Row, task: dict[str, Any], survey: Survey) -> Example | str:
    """A row of a surveyed file as an example, or why it can't be one, by file and line."""
    try:
        if row.fault:
            raise BadRow(row.fault)
        return ask_row(task, row.fields, survey.column, row.origin, survey.only)
    except BadRow as e:
        return f"{row.origin} {e}"


def _refuse_twins(path: Path) -> None:
    """A csv file's columns have names of their own: of two with one name, the output could have one only."""
    header = csv_header(path)
    if twins := [name for name, n in Counter(header).items() if n > 1]:
        what = f"named {twins[0]}" if twins[0] else "without a name"
        raise ConfigError("input", path, f"has {header.count(twins[0])} columns {what}", "other names for all but one, each its own")


def _refuse_added(path: Path, fields: dict[str, Any]) -> None:
    if not ADDED.isdisjoint(fields):
        name = next(name for name in fields if name in ADDED)
        raise ConfigError("input", path, f"has a column {name}, which the answers would be written over", "rename that column")


def _only_column(path: Path, task: dict[str, Any], column: str | None, fields: dict[str, Any]) -> str | None:
    """`Survey.only`, by the file's first sound row, which is refused where it has no text column."""
    name = column or text_column(task, fields)
    if name in fields:
        return name if len(fields) == 1 and column is None else None
    if task.get("kind") not in ("chat", "instruction"):
        there = ", ".join(fields) or "none"
        near = nearest(name, fields) or next((known for known in (str(task.get("text_column")), "text") if known in fields), None)
        fix = pasted("text_column", near) if near else "text_column=<one of these>"
        raise ConfigError("text_column", name, f"{path.name} has no such column; it has {there}", fix)
    return None


def _letters(fields: dict[str, Any]) -> int:
    return sum(len(v) if isinstance(v, str) else len(str(v)) if isinstance(v, (list, dict)) else 8 for v in fields.values())


def _note_kinds(kinds: dict[str, str], fields: dict[str, Any]) -> None:
    """Widen the kinds of columns to a row's values; a column that had no value yet has the kind ""."""
    for name, value in fields.items():
        before = kinds.setdefault(name, "")
        if before != "json" and value is not None and (kind := _kind(value)) != before:
            pair = {before, kind}
            kinds[name] = kind if not before else "float" if pair == {"int", "float"} else "wide" if pair == {"int", "wide"} else "json"


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if abs(value) <= WHOLE else "wide" if -(2**63) <= value < 2**63 else "json"
    return "float" if isinstance(value, float) else "json"
