"""Readers of csv, jsonl, json and parquet: what was written is read back, every row knows its line, damage is a row's and not the
file's, and whatever the bytes, nothing but a ConfigError comes out."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.config import ClassificationDataConfig, ConfigError, DataConfig
from lorica.data.readers import SPLIT_NAMES, Row, check_columns, csv_header, read_hub, read_rows, split_files
from lorica.data.registry import build_rows

CHEAP = settings(max_examples=25, deadline=None, database=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all the files of a property."""
    return tmp_path_factory.mktemp("readers")


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[Row]]:
    """The rows of a file of that name and content."""

    def write_and_read(name: str, content: bytes | str, columns: list[str] | None = None) -> list[Row]:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return list(read_rows(path, columns))

    return write_and_read


def sound(*rows: tuple[str, dict[str, Any]]) -> list[Row]:
    return [Row(origin, fields) for origin, fields in rows]


# ----------------------------------------------------------------------------------------------------------------- csv


def test_csv_rows_have_the_headers_names_and_their_line(read: Callable[..., list[Row]]) -> None:
    assert read("a.csv", "text,label\ngood,1\nbad,0\n") == sound(
        ("a.csv:2", {"text": "good", "label": "1"}), ("a.csv:3", {"text": "bad", "label": "0"})
    )


def test_csv_without_a_header_line_takes_the_given_names(read: Callable[..., list[Row]]) -> None:
    assert read("a.csv", "1,good\n", ["label", "text"]) == sound(("a.csv:1", {"label": "1", "text": "good"}))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
def test_csv_lines_may_end_in_any_way_and_the_last_in_none(read: Callable[..., list[Row]], end: str) -> None:
    rows = read("a.csv", end.join(["text,label", "good,1", "bad,0"]))
    assert [(r.origin, r.fields["text"], r.fault) for r in rows] == [("a.csv:2", "good", ""), ("a.csv:3", "bad", "")]


def test_csv_byte_order_mark_and_spaces_are_no_part_of_the_columns_names(read: Callable[..., list[Row]]) -> None:
    assert read("a.csv", b"\xef\xbb\xbftext, label \ngood,1\n") == sound(("a.csv:2", {"text": "good", "label": "1"}))


def test_csv_quoted_cells_may_hold_commas_quotes_and_line_breaks(read: Callable[..., list[Row]]) -> None:
    rows = read("a.csv", 'text,label\n"one, ""two""\nthree\n",1\nnext,0\n')
    assert rows == sound(("a.csv:2", {"text": 'one, "two"\nthree\n', "label": "1"}), ("a.csv:5", {"text": "next", "label": "0"}))


def test_csv_empty_lines_are_skipped_and_counted(read: Callable[..., list[Row]]) -> None:
    assert read("a.csv", "\ntext,label\n\n\ngood,1\n\n") == sound(("a.csv:5", {"text": "good", "label": "1"}))


def test_csv_rows_of_another_width_are_named_and_the_rest_survives(read: Callable[..., list[Row]]) -> None:
    rows = read("a.csv", "text,label\na,b,c\nlonely\ngood,1\n")
    assert rows[0] == Row("a.csv:2", {"text": "a", "label": "b"}, "has 3 columns, not 2")
    assert rows[1] == Row("a.csv:3", {"text": "lonely"}, "has 1 columns, not 2")
    assert rows[2:] == sound(("a.csv:4", {"text": "good", "label": "1"}))


def test_csv_bytes_that_are_not_utf_8_are_named_and_the_rest_survives(read: Callable[..., list[Row]]) -> None:
    rows = read("a.csv", b"text,label\n" + "café,1\n".encode("latin-1") + "café,0\n".encode())
    assert [(r.origin, r.fault) for r in rows] == [("a.csv:2", "has bytes that are not UTF-8"), ("a.csv:3", "")]
    assert rows[1].fields["text"] == "café"


def test_csv_with_a_stray_quote_names_the_line_and_the_rest_survives(read: Callable[..., list[Row]]) -> None:
    rows = read("a.csv", 'text,label\n"a"b,1\ngood,1\n')
    assert rows[0].origin == "a.csv:2" and rows[0].fault.startswith("is not csv") and not rows[0].fields
    assert rows[1:] == sound(("a.csv:3", {"text": "good", "label": "1"}))


def test_csv_with_an_unclosed_quote_names_the_line_it_opens_on(read: Callable[..., list[Row]]) -> None:
    rows = read("a.csv", 'text,label\ngood,1\n"open,0\nlast,1\n')
    assert rows[0] == Row("a.csv:2", {"text": "good", "label": "1"})
    assert [r.origin for r in rows[1:]] == ["a.csv:3"] and rows[1].fault.startswith("is not csv")


def test_csv_rows_are_never_named_by_a_row_of_data(read: Callable[..., list[Row]]) -> None:
    with pytest.raises(ConfigError, match="header line"):
        read("a.csv", '"te"xt,label\ngood,1\nbad,0\n')


def test_csv_nul_bytes_harm_no_other_row(read: Callable[..., list[Row]]) -> None:
    rows = read("a.csv", b"text,label\na\0b,1\ngood,1\n")
    assert [r.origin for r in rows] == ["a.csv:2", "a.csv:3"]
    assert rows[0].fault or rows[0].fields["text"] == "a\0b"
    assert rows[1] == Row("a.csv:3", {"text": "good", "label": "1"})


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
@pytest.mark.parametrize(
    ("encoding", "says"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16LE"),
        ("utf-16-be", "UTF-16BE"),
        ("utf-32", "UTF-32"),
        ("utf-32-le", "UTF-32LE"),
        ("utf-32-be", "UTF-32BE"),
    ],
)
def test_wide_encodings_are_refused_by_their_name(read: Callable[..., list[Row]], name: str, encoding: str, says: str) -> None:
    content = "text,label\ngood,1\n" if name == "a.csv" else '[{"text": "good", "label": 1}]'
    assert content.encode(encoding).decode(says) == content
    with pytest.raises(ConfigError, match=f"{name}: is in {says}, must be in UTF-8\n  try: iconv -f {says} "):
        read(name, content.encode(encoding))


def test_csv_cells_may_be_huge(read: Callable[..., list[Row]]) -> None:
    text = "word " * 200_000
    assert read("a.csv", f"text,label\n{text},1\n")[0].fields["text"] == text


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"text,label\n"])
def test_csv_without_rows_has_none(read: Callable[..., list[Row]], content: bytes) -> None:
    assert read("a.csv", content) == []


# --------------------------------------------------------------------------------------------------------------- jsonl


def test_jsonl_rows_have_their_line_and_empty_lines_count(read: Callable[..., list[Row]]) -> None:
    rows = read("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\n   \n{"text": "b", "n": [1, null]}')
    assert rows == sound(("a.jsonl:1", {"text": "a"}), ("a.jsonl:4", {"text": "b", "n": [1, None]}))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b"{broken", "is not JSON"),
        (b'{"a": 1} {"b": 2}', "is not JSON"),
        (b'{"a": "\xff"}', "has bytes that are not UTF-8"),
        (b'{"a": "\\ud800"}', "has text that can't be in UTF-8"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a":' * 100_000, "is not JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "is not JSON"),
        (b"[1, 2]", "is a JSON list, not an object"),
        (b'"text"', "is a JSON str, not an object"),
        (b"17", "is a JSON int, not an object"),
        (b"null", "is a JSON NoneType, not an object"),
        (b"\0", "is not JSON"),
    ],
    ids=["broken", "two", "bytes", "surrogate", "deep list", "deep object", "long number", "list", "text", "number", "null", "nul"],
)
def test_jsonl_lines_that_hold_no_object_are_named_and_the_rest_survives(read: Callable[..., list[Row]], line: bytes, fault: str) -> None:
    rows = read("a.jsonl", b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    assert rows[1].origin == "a.jsonl:2" and rows[1].fault.startswith(fault)
    assert [rows[0], rows[2]] == sound(("a.jsonl:1", {"text": "a"}), ("a.jsonl:3", {"text": "b"}))


def test_jsonl_text_that_no_encoding_has_is_named_inside_lists_too(read: Callable[..., list[Row]]) -> None:
    rows = read("a.jsonl", rb'{"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "yes"}]}')
    assert rows[0].fault


def test_jsonl_text_may_be_huge(read: Callable[..., list[Row]]) -> None:
    assert len(read("a.jsonl", json.dumps({"text": "word " * 200_000}))[0].fields["text"]) == 1_000_000


# ---------------------------------------------------------------------------------------------------------------- json


def test_json_list_is_one_row_an_object_and_others_are_named(read: Callable[..., list[Row]]) -> None:
    rows = read("a.json", b'\xef\xbb\xbf[\n {"text": "a"},\n 3,\n {"text": "b"}\n]')
    assert [rows[0], rows[2]] == sound(("a.json#1", {"text": "a"}), ("a.json#3", {"text": "b"}))
    assert rows[1] == Row("a.json#2", {}, "is a JSON int, not an object")


def test_json_that_is_no_list_is_read_line_by_line(read: Callable[..., list[Row]]) -> None:
    assert read("a.json", '{"text": "a"}\n{"text": "b"}\n') == sound(("a.json:1", {"text": "a"}), ("a.json:2", {"text": "b"}))


def test_json_that_is_broken_has_faulty_rows(read: Callable[..., list[Row]]) -> None:
    assert [r.fault.startswith("is not JSON") for r in read("a.json", '[{"text": "a"},\n{]')] == [True, True]


def test_json_that_is_nested_deeply_is_a_fault(read: Callable[..., list[Row]]) -> None:
    assert all(r.fault for r in read("a.json", "[" * 100_000))


# ------------------------------------------------------------------------------------------------------------- parquet


def test_parquet_rows_have_pythons_values_and_their_number(tmp_path: Path) -> None:
    records = [{"text": "a", "label": 1, "messages": [{"role": "user", "content": "hi"}]}, {"text": None, "label": None, "messages": None}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == sound(*((f"a.parquet#{i}", record) for i, record in enumerate(records, 1)))


@pytest.mark.parametrize("keep", [0, 3, 4, 100, -1])
def test_parquet_that_is_cut_off_is_refused(tmp_path: Path, keep: int) -> None:
    pq.write_table(pa.table({"text": ["a"] * 100}), tmp_path / "whole.parquet")
    path = tmp_path / "a.parquet"
    path.write_bytes((tmp_path / "whole.parquet").read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"a\.parquet: is not a parquet file"):
        list(read_rows(path))


def test_parquet_text_that_is_not_utf_8_is_named_and_the_rest_survives(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"\xff\xfe"], pa.binary())
    pq.write_table(pa.table({"text": pa.Array.from_buffers(pa.string(), 2, raw.buffers())}), tmp_path / "a.parquet")
    rows = list(read_rows(tmp_path / "a.parquet"))
    assert rows[0] == Row("a.parquet#1", {"text": "good"}) and rows[1].origin == "a.parquet#2" and rows[1].fault


# ---------------------------------------------------------------------------------------------------- files as a whole


@pytest.mark.parametrize("name", ["a.txt", "a.csv.gz", "a"])
def test_other_endings_are_refused_with_those_that_can_be_read(read: Callable[..., list[Row]], name: str) -> None:
    with pytest.raises(ConfigError, match=r"must end in \.csv, \.jsonl, \.json, \.parquet"):
        read(name, "text,label\n")


def test_endings_may_be_in_capitals(read: Callable[..., list[Row]]) -> None:
    assert read("A.CSV", "text\na\n") == sound(("A.CSV:2", {"text": "a"}))


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.parquet"])
def test_files_that_cannot_be_opened_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: can't be read"):
        list(read_rows(tmp_path / name))
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=name):
        list(read_rows(tmp_path / name))


def test_a_missing_column_is_refused_with_the_nearest_of_the_first_sound_row() -> None:
    rows = [Row("a.csv:2", {}, "is not csv"), Row("a.csv:3", {"texts": "a", "label": "b"})]
    with pytest.raises(ConfigError) as refused:
        check_columns(rows, {"data.label_column": "label", "data.text_column": "text"}, "the train file")
    assert str(refused.value) == (
        "data.text_column=text: the train file has no such column; it has texts, label\n  try: data.text_column=texts"
    )


def test_a_column_that_the_first_json_row_leaves_out_is_there(read: Callable[..., list[Row]]) -> None:
    rows = read("a.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "a", "input": "c", "output": "b"}\n')
    check_columns(rows, {"data.input_column": "input"}, "the train file")


# ---------------------------------------------------------------------------------------------------------- properties


@CHEAP
@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), max_size=8), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_csv_reads_back_what_was_written(folder: Path, rows: list[tuple[str, str]], end: str, mark: bool) -> None:
    written = io.StringIO()
    writer = csv.writer(written, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "label"), *rows])
    path = folder / "a.csv"
    path.write_bytes(written.getvalue().encode("utf-8-sig" if mark else "utf-8"))
    back = list(read_rows(path))
    assert [(r.fields["text"], r.fields["label"], r.fault) for r in back] == [(*row, "") for row in rows]
    lines = [int(r.origin.removeprefix("a.csv:")) for r in back]
    assert lines == sorted(set(lines)) and all(line >= i for i, line in enumerate(lines, 2))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.lists(st.dictionaries(st.text(max_size=6), JSON, max_size=4), max_size=6)


@CHEAP
@given(RECORDS, st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_jsonl_reads_back_what_was_written(folder: Path, records: list[dict[str, Any]], escaped: bool, end: str) -> None:
    path = folder / "a.jsonl"
    path.write_bytes("".join(json.dumps(r, ensure_ascii=escaped) + end for r in records).encode())
    step = end.count("\n")
    assert list(read_rows(path)) == sound(*((f"a.jsonl:{1 + i * step}", record) for i, record in enumerate(records)))


@CHEAP
@given(RECORDS, st.booleans(), st.sampled_from([None, 1]))
def test_json_reads_back_what_was_written(folder: Path, records: list[dict[str, Any]], escaped: bool, indent: int | None) -> None:
    path = folder / "a.json"
    path.write_bytes(json.dumps(records, ensure_ascii=escaped, indent=indent).encode())
    assert list(read_rows(path)) == sound(*((f"a.json#{i}", record) for i, record in enumerate(records, 1)))


@settings(CHEAP, max_examples=20)
@given(st.lists(st.tuples(st.none() | st.text(max_size=12), st.none() | st.integers(-(2**60), 2**60)), max_size=8))
def test_parquet_reads_back_what_was_written(folder: Path, rows: list[tuple[str | None, int | None]]) -> None:
    records = [{"text": text, "label": label} for text, label in rows]
    path = folder / "a.parquet"
    pq.write_table(pa.Table.from_pylist(records, pa.schema([("text", pa.string()), ("label", pa.int64())])), path)
    assert list(read_rows(path)) == sound(*((f"a.parquet#{i}", record) for i, record in enumerate(records, 1)))


FRAGMENTS = [b'"', b",", b"\n", b"\r", b"\r\n", b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\", b"text,label\n", b"a,1\n", b" "]
FRAGMENTS += [b'{"text": "a"}\n', b'{"a": ', b"}", b"[", b"]", b'"\\ud800"', b"NaN", b"1e999", b"null", b"'", b"\xc3\xa9", b"PAR1"]
BYTES = st.binary(max_size=200) | st.lists(st.sampled_from(FRAGMENTS), max_size=30).map(b"".join)


@settings(CHEAP, max_examples=100)
@given(BYTES, st.sampled_from(["a.csv", "a.jsonl", "a.json"]), st.none() | st.just(["text", "label"]))
def test_whatever_the_bytes_rows_or_a_config_error_come_out(folder: Path, content: bytes, name: str, columns: list[str] | None) -> None:
    path = folder / name
    path.write_bytes(content)
    try:
        rows = list(read_rows(path, columns))
    except ConfigError:
        return
    for row in rows:
        assert row.origin.startswith(name) and "\n" not in row.fault
        if not row.fault:
            "".join(v for v in row.fields.values() if isinstance(v, str)).encode("utf-8")


@settings(CHEAP, max_examples=25)
@given(BYTES)
def test_whatever_the_bytes_of_a_parquet_file_a_config_error_comes_out(folder: Path, content: bytes) -> None:
    path = folder / "fuzz.parquet"
    path.write_bytes(content)
    with pytest.raises(ConfigError):
        list(read_rows(path))


# --------------------------------------------------------------------------------------------------------- split files


def files_in(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def names_of(found: dict[str, Path]) -> dict[str, str]:
    return {split: path.name for split, path in found.items()}


@pytest.mark.parametrize(("split", "word"), [(split, word) for split, words in SPLIT_NAMES.items() for word in words])
def test_a_folders_files_are_known_by_the_usual_names(tmp_path: Path, split: str, word: str) -> None:
    files_in(tmp_path, f"{word.upper()}.jsonl", "mine.csv", "README.md", "train.csv.bak")
    assert names_of(split_files(tmp_path, "mine")) == ({"train": "mine.csv"} if split != "train" else {}) | {split: f"{word.upper()}.jsonl"}


def test_a_folder_has_up_to_three_splits_of_any_ending(tmp_path: Path) -> None:
    files_in(tmp_path, "train.parquet", "dev.json", "test.csv", "notes.txt")
    assert names_of(split_files(tmp_path, "x")) == {"train": "train.parquet", "validation": "dev.json", "test": "test.csv"}


def test_a_file_alone_is_training(tmp_path: Path) -> None:
    files_in(tmp_path, "test.csv", "train.csv")
    assert names_of(split_files(tmp_path / "test.csv", "x")) == {"train": "test.csv"}


def test_the_only_data_file_of_a_folder_is_training(tmp_path: Path) -> None:
    assert names_of(split_files(files_in(tmp_path, "reviews.csv", "README.md"), "x")) == {"train": "reviews.csv"}


def test_the_file_named_like_the_data_set_is_training(tmp_path: Path) -> None:
    assert names_of(split_files(files_in(tmp_path, "sentiment.csv", "other.csv"), "sentiment")) == {"train": "sentiment.csv"}


@pytest.mark.parametrize(("pair", "split"), [(("train.csv", "train.jsonl"), "train"), (("dev.csv", "val.csv"), "validation")])
def test_two_files_for_one_split_are_refused_by_name(tmp_path: Path, pair: tuple[str, str], split: str) -> None:
    files_in(tmp_path, *pair, "train.parquet") if split != "train" else files_in(tmp_path, *pair)
    with pytest.raises(ConfigError, match=f"has {' and '.join(pair)}: which is {split}"):
        split_files(tmp_path, "x")


def test_a_folder_that_leaves_training_open_is_refused_with_its_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has one\.csv, two\.jsonl; it needs a train\.csv"):
        split_files(files_in(tmp_path, "one.csv", "two.jsonl", "three.txt"), "x")


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no data file"):
        split_files(files_in(tmp_path, "README.md"), "x")


def test_a_folder_named_like_a_file_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "train.csv").mkdir()
    with pytest.raises(ConfigError, match="has no data file"):
        split_files(tmp_path, "x")


@pytest.mark.parametrize("name", ["test.csv", "validation.csv"])
def test_one_file_is_not_two_splits(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        split_files(files_in(tmp_path, name), "x")


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path"):
        split_files(tmp_path / "nowhere", "x")


# ------------------------------------------------------------------------------------------------------------------ hub


@pytest.fixture
def published(tmp_path: Path) -> Callable[..., DataConfig]:
    """A data set in the hub's layout with the configurations `first` and `second`, or with none."""

    def write(*, configurations: bool, **values: Any) -> DataConfig:
        names = ("first", "second") if configurations else ("",)
        for name in names:
            (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / name / "train.csv").write_text("text,label\na,b\n", "utf-8")
        if configurations:
            listed = "".join(f"- config_name: {name}\n  data_files: {name}/train.csv\n" for name in names)
            (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{listed}---\n", "utf-8")
        return DataConfig(name="x", module="x", source="hub", hub_id=str(tmp_path / "set"), **values)

    return write


@pytest.mark.parametrize(
    ("values", "where", "fix"),
    [
        ({"configurations": True}, "data.hub_config", "data.hub_config=first"),
        ({"configurations": True, "hub_config": "secnd"}, "data.hub_config", "data.hub_config=second"),
        ({"configurations": False, "train_split": "trian"}, "data.train_split", "data.train_split=train"),
        ({"configurations": False, "train_split": "zzz"}, "data.train_split", "data.train_split=train"),
        ({"configurations": False, "test_split": "test"}, "data.test_split", "data.test_split=null"),
        ({"configurations": False, "validation_split": "valid"}, "data.validation_split", "data.validation_split=null"),
    ],
)
def test_a_wrong_choice_on_the_hub_names_its_own_key(
    published: Callable[..., DataConfig], values: dict[str, Any], where: str, fix: str
) -> None:
    with pytest.raises(ConfigError) as e:
        read_hub(published(**values))
    assert (e.value.where, e.value.fix) == (where, fix)


def test_another_mistake_of_a_published_set_is_not_said_of_a_split(
    published: Callable[..., DataConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def fails(*args: Any, **kwargs: Any) -> None:
        raise ValueError("Feature type 'Odd' not found.")

    monkeypatch.setattr(datasets, "load_dataset_builder", fails)
    with pytest.raises(ConfigError, match=r"^data.hub_id=.*Feature type 'Odd' not found"):
        read_hub(published(configurations=False))


@pytest.mark.parametrize("mark", [";", "\t", ","])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_a_csv_file_may_be_separated_as_spreadsheets_do(mark: str, bom: str, tmp_path: Path) -> None:
    file = tmp_path / "sheet.csv"
    file.write_text(f'{bom}review{mark}stars\r\n"good{mark} really"{mark}5\r\n', encoding="utf-8", newline="")
    assert [row.fields for row in read_rows(file, None)] == [{"review": f"good{mark} really", "stars": "5"}]


def test_the_line_that_tells_excel_what_separates_is_no_row(tmp_path: Path) -> None:
    for line, mark in (("sep=;\n", ";"), ('"sep=,"\r\n', ","), ("SEP=|\n", "|")):
        file = tmp_path / "a.csv"
        file.write_text(f'{line}text{mark}label\nfine{mark}good\n"po\nor"{mark}bad\none\n', "utf-8", newline="")
        rows = list(read_rows(file))
        assert [row.fields for row in rows[:2]] == [{"text": "fine", "label": "good"}, {"text": "po\nor", "label": "bad"}]
        assert [row.origin for row in rows] == ["a.csv:3", "a.csv:4", "a.csv:6"] and rows[2].fault
        assert csv_header(file) == ["text", "label"]


def test_what_a_spreadsheet_wrote_in_its_own_letters_is_told_how_to_be_read(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes("text,label\nschön,gut\nschlecht,übel\n".encode("cp1252"))
    config = ClassificationDataConfig(name="x", module="classification", source="files", path=str(file))
    with pytest.raises(ConfigError, match="iconv -f CP1252 -t UTF-8"):
        build_rows(config).load()
    file.write_bytes(
        file.read_bytes() + "größer,gut\nkleiner,übel\n".encode()
    )  # most of it is UTF-8: another encoding would spoil the rest
    with pytest.raises(ConfigError, match="try: mend them"):
        build_rows(config).load()
