"""Answers, and rows with their answers as csv, jsonl or parquet, part by part.

An answered row has its own columns and `prediction`; `probability` of the predicted label, and in jsonl and parquet `probabilities`
of all, where labels are scored; `error` where it could not be answered. A csv or parquet file has the column `error` only where there
is such a row.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lorica.data.asked_file import Survey
from lorica.data.readers import Row, encodable

QUOTE = '"'  # around a csv file's cell; inside one it stands twice
ROW_GROUP = 1 << 16  # rows of a parquet file that lie together, at least
LINE_ENDS = {ord(c): f"\\u{ord(c):04x}" for c in "\x85\u2028\u2029"}  # some readers take these for ends of lines


@dataclass(frozen=True)
class Answer:
    """A label with its probability and all of them, or a text. prediction: None where the model is not sure enough to say."""

    prediction: str | None
    probabilities: dict[str, float] | None = None

    @property
    def probability(self) -> float | None:
        """Of the likeliest label."""
        return max(self.probabilities.values()) if self.probabilities else None


class Layout:
    """How answered rows are written to a file of one ending: a head, and parts in any order, for `join`.

    Args:
        labels: those that are scored; None where texts are written. source: the file that was surveyed; a parquet file's columns keep
            their types in a parquet file.
    """

    def __init__(self, ending: str, survey: Survey, labels: Sequence[str] | None, source: Path) -> None:
        self.ending, self.survey, self.labels, self.source = ending, survey, labels, source
        self.added = ["prediction", *(["probability"] if labels else []), *(["error"] if survey.faults else [])]

    def head(self) -> bytes:
        """What a file begins with, whatever its rows are."""
        if self.ending == ".csv":
            return csv_line([*self.survey.columns, *self.added]).encode("utf-8", "replace")
        return self.part([], {}, {})

    def part(self, rows: Sequence[Row], answers: Mapping[int, Answer], faults: Mapping[int, str]) -> bytes:
        """Rows in their order with their answers and faults by place."""
        if self.ending == ".parquet":
            return self._parquet(rows, answers, faults)
        lines = self._jsonl if self.ending == ".jsonl" else self._csv
        return "".join(lines(rows, answers, faults)).encode("utf-8", "replace")

    # -------------------------------------------------------------------------------------------------------- csv, jsonl

    def _jsonl(self, rows: Sequence[Row], answers: Mapping[int, Answer], faults: Mapping[int, str]) -> Iterator[str]:
        for i, row in enumerate(rows):
            record = dict(row.fields)
            if (answer := answers.get(i)) is None:
                record |= {"prediction": None, "error": faults[i]}
            else:
                record["prediction"] = answer.prediction
                if answer.probabilities:
                    record |= {"probability": answer.probability, "probabilities": answer.probabilities}
            line = json.dumps(record, ensure_ascii=False, default=str)
            if not line.isascii():  # what can't be in UTF-8 is kept as its number
                line = line.translate(LINE_ENDS) if encodable(line) else json.dumps(record, ensure_ascii=True, default=str)
            yield line + "\n"

    def _csv(self, rows: Sequence[Row], answers: Mapping[int, Answer], faults: Mapping[int, str]) -> Iterator[str]:
        names = list(self.survey.columns)
        for i, row in enumerate(rows):
            answer, of = answers.get(i), row.fields
            cells = [of.get(name, "") for name in names]
            cells.append(answer.prediction if answer else "")
            if self.labels:
                cells.append(f"{answer.probability:.6f}" if answer else "")
            if self.survey.faults:
                cells.append(faults.get(i, ""))
            yield csv_line(cells)

    # ----------------------------------------------------------------------------------------------------------- parquet

    def _schema(self) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        known = {"bool": pa.bool_(), "int": pa.int64(), "wide": pa.int64(), "float": pa.float64()}
        given = {field.name: field.type for field in pq.read_schema(self.source)} if self.source.suffix.lower() == ".parquet" else {}
        fields = [(name, given.get(name, known.get(kind, pa.string()))) for name, kind in self.survey.columns.items()]
        fields.append(("prediction", pa.string()))
        if self.labels:
            fields += [("probability", pa.float64()), ("probabilities", pa.struct([(name, pa.float64()) for name in self.labels]))]
        if self.survey.faults:
            fields.append(("error", pa.string()))
        return pa.schema(fields)

    def _parquet(self, rows: Sequence[Row], answers: Mapping[int, Answer], faults: Mapping[int, str]) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        found = [answers.get(i) for i in range(len(rows))]
        columns: dict[str, list[Any]] = {
            "prediction": [a and a.prediction for a in found],
            "probability": [a and a.probability for a in found],
            "probabilities": [a and a.probabilities for a in found],
            "error": [faults.get(i) for i in range(len(rows))],
        }
        schema = self._schema()
        for name, kind in self.survey.columns.items():
            values = [row.fields.get(name) for row in rows]
            columns[name] = [_text(v, kind) for v in values] if pa.types.is_string(schema.field(name).type) else values
        buffer = io.BytesIO()
        pq.write_table(pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema), buffer)
        return buffer.getvalue()


def join(head: Path, parts: Sequence[Path], file: BinaryIO) -> None:
    """The whole file, of its head and its parts in order, which have its ending."""
    if head.suffix == ".parquet":
        _join_parquet(head, parts, file)
        return
    for part in (head, *parts):
        with part.open("rb") as of:
            shutil.copyfileobj(of, file, 1 << 20)


def _join_parquet(head: Path, parts: Sequence[Path], file: BinaryIO) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables: list[Any] = []
    with pq.ParquetWriter(file, pq.read_schema(head)) as writer:
        for i, part in enumerate(parts):
            tables.append(pq.ParquetFile(part).read())
            if i + 1 == len(parts) or sum(table.num_rows for table in tables) >= ROW_GROUP:
                writer.write_table(pa.concat_tables(tables), ROW_GROUP)
                tables = []


def _text(value: Any, kind: str) -> str | None:
    """A value of a column of texts, or, where its values are of several kinds, as JSON."""
    if value is None:
        return None
    text = value if kind == "text" and isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode("utf-8")


def csv_line(cells: Iterable[Any]) -> str:
    """Two cells or more as csv.writer would write them, which looks at each character; a carriage return too is quoted."""
    return ",".join(map(_cell, cells)) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, default=str) if isinstance(value, (dict, list)) else str(value)
    return f'"{text.replace(QUOTE, QUOTE * 2)}"' if "," in text or QUOTE in text or "\n" in text or "\r" in text else text
