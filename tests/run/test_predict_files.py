"""Files are answered chunk by chunk: every row in its place, the same bytes however often it was broken off, little memory."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica import answers, file_answering, predict
from lorica.answering import Predictor
from lorica.data import asked_file
from lorica.data.asked_file import look_through, read_chunks
from lorica.runs import Held
from lorica.screen import Screen

Lorica = Callable[..., tuple[int, str]]
ROOT = Path(__file__).resolve().parents[2]
KILLS = 2
LABELS = ["good", "middling", "bad"]
WORDS = ["the", "service", "was", "slow", "so", "we", "waited", "for", "soup", "that", "nobody", "had", "ordered", "bread", "fine"]
TASK = {"task": "sequence_classification", "kind": "classification", "text_column": "text", "prompt_template": "{text}", "labels": LABELS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_mistral: Path) -> Path:
    """A classifier of random weights, as training leaves it."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("run") / "model"
    shutil.copytree(tiny_mistral, folder, ignore=shutil.ignore_patterns("SHA256SUMS"))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    whole = BertForSequenceClassification(BertConfig(**sizes, vocab_size=4096, max_position_embeddings=64, pad_token_id=3, num_labels=3))
    with torch.no_grad():
        for p in whole.parameters():
            if p.ndim > 1:
                p.mul_(20.0)
    whole.save_pretrained(folder)
    (folder / "lorica.json").write_text(json.dumps({**TASK, "max_length": 40}), "utf-8")
    return folder


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "SCORED_ROWS", 4)


def texts(n: int) -> list[str]:
    draw = random.Random(4)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for _ in range(n)]


def write_csv(file: Path, n: int) -> Path:
    with file.open("w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([["id", "text"], *([i, t] for i, t in enumerate(texts(n)))])
    return file


def rows_of(file: Path) -> list[dict[str, Any]]:
    if file.suffix == ".parquet":
        return pq.read_table(file).to_pylist()  # type: ignore[no-any-return]
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    with file.open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# -------------------------------------------------------------------------------------------------------------- formats


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("given", ["csv", "jsonl", "parquet"])
def test_every_row_is_in_its_place_in_every_format(given: str, model: Path, tmp_path: Path, lorica: Lorica) -> None:
    asked = [{"id": i, "text": t} for i, t in enumerate(texts(11))]
    file = tmp_path / f"in.{given}"
    if given == "csv":
        write_csv(file, 11)
    elif given == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in asked), "utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(asked), file)
    found = {}
    for ending in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"out.{ending}"
        code, printed = lorica("predict", f"run={model}", f"input={file}", f"output={out}", "accelerator=cpu")
        assert code == 0 and "11 rows answered" in printed, printed
        found[ending] = rows_of(out)
        assert [(int(r["id"]), r["text"]) for r in found[ending]] == [(r["id"], r["text"]) for r in asked]
    assert list(found["csv"][0]) == ["id", "text", "prediction", "probability"]
    assert found["parquet"] == found["jsonl"]
    for row, other in zip(found["csv"], found["jsonl"], strict=True):
        assert row["prediction"] == other["prediction"] and float(row["probability"]) == pytest.approx(other["probability"], abs=1e-6)
        assert set(other["probabilities"]) == set(LABELS)
    assert len({r["prediction"] for r in found["csv"]}) > 1
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted([file.name, "out.csv", "out.jsonl", "out.parquet"])


def test_chunks_change_no_answer(model: Path, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch) -> None:
    file, found = write_csv(tmp_path / "in.csv", 40), []
    for size in (2048, 7):
        monkeypatch.setattr(predict, "SCORED_ROWS", size)
        assert lorica("predict", f"run={model}", f"input={file}", "accelerator=cpu")[0] == 0
        found.append(rows_of(tmp_path / "in.scored.csv"))
    for one, other in zip(*found, strict=True):
        assert one["prediction"] == other["prediction"]
        assert float(one["probability"]) == pytest.approx(float(other["probability"]), abs=2e-6)


def test_a_parquet_file_keeps_its_columns_types(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    table = pa.table(
        {
            "text": pa.array(["fine", "slow"], pa.large_string()),
            "at": pa.array([datetime(2024, 1, 2, 3, 4, 5, 678901), None], pa.timestamp("us", "UTC")),
            "price": pa.array([Decimal("1.10"), Decimal("2.00")], pa.decimal128(7, 2)),
            "n": pa.array([1, None], pa.int8()),
            "tags": pa.array([["a"], []], pa.list_(pa.string())),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
            "raw": pa.array([b"\xff", None], pa.binary()),
            "of": pa.array([{"a": 1}, None], pa.struct([("a", pa.int32())])),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    assert lorica("predict", f"run={model}", f"input={tmp_path / 'in.parquet'}", "accelerator=cpu")[0] == 0
    scored = pq.read_table(tmp_path / "in.scored.parquet")
    assert scored.select(table.column_names).cast(table.schema).equals(table)
    assert scored.schema.field("price").type == pa.decimal128(7, 2) and scored.column_names[-1] == "probabilities"
    pq.write_table(table.drop_columns("raw"), tmp_path / "text.parquet")
    for ending in ("csv", "jsonl"):
        out = tmp_path / f"out.{ending}"
        assert lorica("predict", f"run={model}", f"input={tmp_path / 'text.parquet'}", f"output={out}", "accelerator=cpu")[0] == 0
        assert len(rows_of(out)) == 2


def test_jsonl_columns_become_typed_where_all_their_values_agree(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    rows = [
        {"text": "fine", "n": 1, "x": 1, "big": 2**62, "mixed": 1, "deep": {"a": 1}, "yes": True, "huge": 2**70, "never": None},
        {"text": "slow", "n": None, "x": 0.5, "big": 1, "mixed": "one", "deep": [], "yes": False, "huge": 1, "late": "ü"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    out = tmp_path / "out.parquet"
    assert lorica("predict", f"run={model}", f"input={tmp_path / 'in.jsonl'}", f"output={out}", "accelerator=cpu")[0] == 0
    one, two = rows_of(out)
    assert (one["n"], one["x"], one["big"], one["yes"], one["never"], one["late"]) == (1, 1.0, 2**62, True, None, None)
    assert [json.loads(row[name]) for row in (one, two) for name in ("mixed", "deep", "huge")] == [1, {"a": 1}, 2**70, "one", [], 1]
    assert (two["n"], two["x"], two["late"]) == (None, 0.5, "ü")


# ------------------------------------------------------------------------------------------------------------- bad rows

BAD_CSV = b'id,text\n0,fine\n1,\n2,"  "\n3,bad \xff bytes\n4,too,many\n5\n6,"two\nlines"\n\n7,bad "quote" "x\n8,"a"b\n9,soup\n'
BAD_JSONL = (
    b'\xef\xbb\xbf{"text": "fine", "id": 0}\n{"text": \n[1]\n"word"\n{"id": 4}\n{"text": null}\n{"text": ""}\n{"text": ["a"]}\n'
    b'{"text": {"a": 1}}\n{"text": "\xff"}\n{"text": "\\ud800"}\n\n{"text": 12}\n'
    + b"[" * 100_000
    + b'\n{"text": "soup", "id": 14}\n{"text": "last", "id": 15'
)


CELL = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.text(' ,"\n\ra;é', max_size=8)


@settings(max_examples=200, deadline=None, database=None)
@given(cells=st.lists(CELL | st.lists(CELL, max_size=2), min_size=2, max_size=4))
def test_a_line_of_csv_is_read_back_as_its_cells(cells: list[Any]) -> None:
    line = answers.csv_line(cells)
    expected = ["" if c is None else json.dumps(c) if isinstance(c, list) else str(c) for c in cells]
    assert next(csv.reader(io.StringIO(line, newline=""), strict=True)) == expected
    if not any("\r" in cell for cell in expected):  # which Python 3.11 leaves bare
        by_library = io.StringIO()
        csv.writer(by_library, lineterminator="\n").writerow(expected)
        assert line == by_library.getvalue()


def test_a_carriage_return_in_a_text_breaks_no_row(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,n\n"soup\rbread",1\nfine,2\n')
    code, _ = lorica("predict", f"run={model}", f"input={tmp_path / 'a.csv'}", f"output={tmp_path / 'b.csv'}")
    with (tmp_path / "b.csv").open(newline="") as file:
        assert [row["text"] for row in csv.DictReader(file)] == ["soup\rbread", "fine"] and code == 0


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_bad_rows_of_csv_stand_in_their_places_and_say_why(ending: str, model: Path, tmp_path: Path, lorica: Lorica) -> None:
    file, out = tmp_path / "in.csv", tmp_path / f"out.{ending}"
    file.write_bytes(BAD_CSV)
    code, printed = lorica("predict", f"run={model}", f"input={file}", f"output={out}", "accelerator=cpu")
    rows = rows_of(out)
    errors = [r.get("error") or "" for r in rows]
    assert code == 1 and "4 rows answered" in printed and "in.csv:3 has no text: no prediction" in printed and "and 3 more" in printed
    assert [bool(r["prediction"]) for r in rows] == [True, False, False, False, False, False, True, True, False, True]
    assert [e.partition(" ")[0] for e in errors] == ["", *(f"in.csv:{n}" for n in (3, 4, 5, 6, 7)), "", "", "in.csv:12", ""]
    assert errors[3].endswith("not UTF-8") and errors[4].endswith("has 3 columns, not 2") and "is not csv" in errors[8]


def test_jsonl_keeps_its_letters_and_numbers_what_no_utf8_can_be(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text('{"text": "schön"}\n{"text": "a", "note": "\\ud800"}\n{"text": "one\\u2028line"}\n', "utf-8")
    lorica("predict", f"run={model}", f"input={file}", f"output={out}", "accelerator=cpu")
    first, second, third = out.read_text("utf-8").splitlines()
    assert json.loads(third)["text"] == "one\u2028line"
    assert '"text": "schön"' in first and '"note": "\\ud800"' in second


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_bad_rows_of_jsonl_stand_in_their_places_and_say_why(ending: str, model: Path, tmp_path: Path, lorica: Lorica) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / f"out.{ending}"
    file.write_bytes(BAD_JSONL)
    code, printed = lorica("predict", f"run={model}", f"input={file}", f"output={out}", "accelerator=cpu")
    rows = rows_of(out)
    assert code == 1 and "3 rows answered" in printed
    assert [bool(r["prediction"]) for r in rows] == [n in (1, 13, 15) for n in range(1, 17) if n != 12]
    bad = [r["error"] for r in rows if not r["prediction"]]
    assert [r["text"].strip('"') for r in rows if "not UTF-8" in (r.get("error") or "")] == ["\ufffd"]  # JSON in parquet's mixed column
    assert [e.partition(" ")[0] for e in bad] == [f"in.jsonl:{n}" for n in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14, 16)]
    for place, why in ((0, "is not JSON"), (1, "is a JSON list"), (2, "is a JSON str"), (3, "has no text"), (6, "has a list as text")):
        assert why in bad[place]
    assert "not UTF-8" in bad[8] and "can't be in UTF-8" in bad[9] and "is not JSON" in bad[10] and "is not JSON" in bad[11]


def test_the_only_column_of_a_file_is_its_text_but_not_that_of_a_row(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    for content in ('{"review": "fine"}\n{"other": "slow"}\n', '{"text": "fine", "n": 1}\n{"n": 2}\n'):
        (tmp_path / "in.jsonl").write_text(content, "utf-8")
        code, printed = lorica("predict", f"run={model}", f"input={tmp_path / 'in.jsonl'}", "accelerator=cpu")
        assert code == 1 and "1 row answered" in printed and "in.jsonl:2 has no " in printed
    (tmp_path / "in.jsonl").write_text('{"n": 1}\n{"text": "fine", "n": 1}\n', "utf-8")  # who knows what the first row means
    assert lorica("predict", f"run={model}", f"input={tmp_path / 'in.jsonl'}", "accelerator=cpu")[0] == 0


def test_an_unclosed_quote_says_how_far_it_runs(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    (tmp_path / "in.csv").write_text('text\nfine\n"open\nfine\nfine\n', "utf-8")
    code, printed = lorica("predict", f"run={model}", f"input={tmp_path / 'in.csv'}", "accelerator=cpu")
    assert code == 1 and "in.csv:3 is not csv" in printed and "up to line 5" in printed


def test_bad_rows_of_parquet_stand_in_their_places(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    text = pa.array([b"fine", b"\xff", None, b" ", b"soup"]).view(pa.string())
    pq.write_table(pa.table({"text": text, "id": range(5)}), tmp_path / "in.parquet")
    code, _ = lorica("predict", f"run={model}", f"input={tmp_path / 'in.parquet'}", "accelerator=cpu")
    rows = rows_of(tmp_path / "in.scored.parquet")
    assert code == 1 and [bool(r["prediction"]) for r in rows] == [True, False, False, False, True]
    assert [(r["error"] or "").partition(" ")[0] for r in rows] == ["", "in.parquet#2", "in.parquet#3", "in.parquet#4", ""]


@pytest.mark.parametrize("content", [b"", b"text\n", b"text\n,\n"])
def test_a_file_with_nothing_to_answer_is_answered(content: bytes, model: Path, tmp_path: Path, lorica: Lorica) -> None:
    (tmp_path / "in.csv").write_bytes(content)
    code, printed = lorica("predict", f"run={model}", f"input={tmp_path / 'in.csv'}", "accelerator=cpu")
    bad = content.count(b",")
    assert code == bad and "0 rows answered" in printed and len(rows_of(tmp_path / "in.scored.csv")) == bad


@pytest.mark.parametrize(
    ("ending", "kind"),
    [("csv", pa.binary()), ("jsonl", pa.binary(4)), ("csv", pa.struct([("bytes", pa.binary())])), ("jsonl", pa.list_(pa.large_binary()))],
)
def test_bytes_are_not_written_as_text(ending: str, kind: Any, model: Path, tmp_path: Path, lorica: Lorica) -> None:
    image = {"bytes": b"\x89PNG"} if pa.types.is_struct(kind) else [b"\x89PNG"] if pa.types.is_list(kind) else b"\x89PNG"
    pq.write_table(pa.table({"text": ["so", "well"], "image": pa.array([image, None], kind)}), tmp_path / "in.parquet")
    command = ("predict", f"run={model}", f"input={tmp_path / 'in.parquet'}", "accelerator=cpu")
    code, printed = lorica(*command, f"output={tmp_path / f'out.{ending}'}")
    assert code == 2 and f"column image of in.parquet holds bytes, which .{ending} can't" in printed
    assert [f.name for f in tmp_path.iterdir()] == ["in.parquet"]
    assert lorica(*command)[0] == 0
    assert [row["image"] for row in rows_of(tmp_path / "in.scored.parquet")] == [image, None]


def test_a_parquet_file_without_rows_keeps_its_columns(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    schema = pa.schema([("id", pa.int64()), ("text", pa.string()), ("at", pa.date32())])
    pq.write_table(schema.empty_table(), tmp_path / "in.parquet")
    assert lorica("predict", f"run={model}", f"input={tmp_path / 'in.parquet'}", "accelerator=cpu")[0] == 0
    scored = pq.read_table(tmp_path / "in.scored.parquet")
    assert scored.num_rows == 0 and scored.select(schema.names).schema.equals(schema) and "prediction" in scored.column_names


@pytest.mark.usefixtures("small_chunks")
def test_a_column_whose_name_is_no_text_is_kept(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    (tmp_path / "in.csv").write_bytes(b"text,caf\xe9\nso,1\n")
    code, printed = lorica("predict", f"run={model}", f"input={tmp_path / 'in.csv'}", "accelerator=cpu")
    assert code == 0 and "1 row answered" in printed, printed
    assert len((tmp_path / "in.scored.csv").read_bytes().splitlines()) == 2


@pytest.mark.usefixtures("small_chunks")
def test_texts_that_are_cut_are_counted(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    file = write_csv(tmp_path / "in.csv", 6)
    assert "did not fit" not in lorica("predict", f"run={model}", f"input={file}", "accelerator=cpu")[1]
    with file.open("a", encoding="utf-8") as f:
        f.write(f"6,{'soup ' * 50}\n")
    _, printed = lorica("predict", f"run={model}", f"input={file}", "accelerator=cpu")
    assert "1 text did not fit into the 40 tokens that the model reads, and was cut" in " ".join(printed.split())


# -------------------------------------------------------------------------------------------------------------- going on


def broken_off(monkeypatch: pytest.MonkeyPatch, after: int, how: Callable[[], None]) -> list[int]:
    """Something happens when so many chunks have been begun; how many texts each had."""
    begun: list[int] = []
    begin = Predictor.begin

    def counted(self: Predictor, items: Any, *args: Any) -> Any:
        if len(begun) == after:
            how()
        begun.append(len(items))
        return begin(self, items, *args)

    monkeypatch.setattr(Predictor, "begin", counted)
    return begun


def fail() -> None:
    raise RuntimeError("a cosmic ray")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_broken_off_run_goes_on_to_the_same_bytes(
    ending: str, model: Path, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out, straight = write_csv(tmp_path / "in.csv", 18), tmp_path / f"out.{ending}", tmp_path / f"straight.{ending}"
    command = ("predict", f"run={model}", f"input={file}", "accelerator=cpu")
    assert lorica(*command, f"output={straight}")[0] == 0
    with monkeypatch.context() as patch:
        broken_off(patch, 2, fail)
        with pytest.raises(RuntimeError, match="cosmic"):
            lorica(*command, f"output={out}")
    assert not out.exists() and (tmp_path / f"out.{ending}.partial").is_dir()
    os.utime(file)  # the same content
    begun = broken_off(monkeypatch, -1, fail)
    code, printed = lorica(*command, f"output={out}")
    assert code == 0 and "goes on after 8 of 18 rows" in printed and "10 rows answered" in printed and "8 before" in printed
    assert begun == [4, 4, 2]
    assert digest(out) == digest(straight) and not (tmp_path / f"out.{ending}.partial").exists()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("damaged", "says"),
    [
        ("*-0000001-*", ("1 part of", "was damaged", "goes on after 4 of 18 rows")),
        ("*-head-*", ("1 part of", "was damaged", "goes on after 8 of 18 rows")),
        ("*-0??????-*", ("2 parts of", "were damaged", "18 rows answered")),
        ("state.json", ("is not gone on with (its state can't be read)", "18 rows answered")),
    ],
)
def test_a_damaged_part_is_answered_again(
    damaged: str, says: tuple[str, ...], ending: str, model: Path, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out, straight = write_csv(tmp_path / "in.csv", 18), tmp_path / f"out.{ending}", tmp_path / f"straight.{ending}"
    command = ("predict", f"run={model}", f"input={file}", "accelerator=cpu")
    assert lorica(*command, f"output={straight}")[0] == 0
    with monkeypatch.context() as patch:
        broken_off(patch, 2, fail)
        with pytest.raises(RuntimeError, match="cosmic"):
            lorica(*command, f"output={out}")
    found = list((tmp_path / f"out.{ending}.partial").glob(damaged))
    assert found
    for part in found:
        content = bytearray(part.read_bytes())
        if content:  # a head of jsonl has none
            content[len(content) // 2] ^= 1  # still JSON, still csv
        part.write_bytes(bytes(content) or b"{}")
    code, printed = lorica(*command, f"output={out}")
    assert code == 0 and all(words in " ".join(printed.split()) for words in says), printed
    assert digest(out) == digest(straight) and not (tmp_path / f"out.{ending}.partial").exists()


@pytest.mark.usefixtures("small_chunks")
def test_parts_without_their_sums_are_told_of_and_go(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    """As earlier versions wrote them."""
    file, folder = write_csv(tmp_path / "in.csv", 6), tmp_path / "in.scored.csv.partial"
    folder.mkdir()
    (folder / "0123456789ab-0000001.csv").write_text("x\n")
    (folder / "state.json").write_text(json.dumps({"identity": {}, "survey": {}}))
    code, printed = lorica("predict", f"run={model}", f"input={file}", "accelerator=cpu")
    assert code == 0 and "is not gone on with (its state can't be read)" in printed and "6 rows answered" in printed
    assert not folder.exists()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_keeps_what_is_answered_and_exits_with_75(
    signum: int, model: Path, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_csv(tmp_path / "in.csv", 18)
    command = ("predict", f"run={model}", f"input={file}", "accelerator=cpu")
    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        broken_off(patch, 3, lambda: os.kill(os.getpid(), signum))
        code, printed = lorica(*command)
    assert code == 75 and f"interrupted ({signal.Signals(signum).name}), 12 of 18 rows are kept" in printed
    assert signal.getsignal(signum) is before and not (tmp_path / "in.scored.csv").exists()
    code, printed = lorica(*command)
    assert code == 0 and "goes on after 12 of 18 rows" in printed and len(rows_of(tmp_path / "in.scored.csv")) == 18


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("change", ["input", "run", "batch_size", "text_column"])
def test_what_was_answered_of_something_else_is_not_gone_on_with(
    change: str, model: Path, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(model, tmp_path / "run")
    file = write_csv(tmp_path / "in.csv", 18)
    command = ["predict", f"run={run}", f"input={file}", "accelerator=cpu"]
    with monkeypatch.context() as patch:
        broken_off(patch, 2, fail)
        with pytest.raises(RuntimeError, match="cosmic"):
            lorica(*command)
    if change == "input":
        file.write_text(file.read_text("utf-8").replace("soup", "coup", 1), "utf-8")
    elif change == "run":
        os.utime(run / "model.safetensors", ns=(1, 1))
    else:
        command.append("batch_size=2" if change == "batch_size" else "text_column=text")
    code, printed = lorica(*command)
    why = "was null" if change in ("batch_size", "text_column") else "is another"
    assert code == 0 and f"is not gone on with ({change} {why})" in printed and "18 rows answered" in printed
    assert not (tmp_path / "in.scored.csv.partial").exists()


@pytest.mark.usefixtures("small_chunks")
def test_an_input_that_grows_meanwhile_is_refused(model: Path, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_csv(tmp_path / "in.csv", 18)
    broken_off(monkeypatch, 4, lambda: file.write_text(file.read_text("utf-8") + "19,more\n", "utf-8"))
    code, printed = lorica("predict", f"run={model}", f"input={file}", "accelerator=cpu")
    assert code == 2 and "was changed while it was read" in printed and not (tmp_path / "in.scored.csv").exists()


def test_a_second_process_on_one_output_is_refused(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    file, folder = write_csv(tmp_path / "in.csv", 3), tmp_path / "in.scored.csv.partial"
    folder.mkdir()
    held = Held(folder, "lock", "output", "answering")
    code, printed = lorica("predict", f"run={model}", f"input={file}", "accelerator=cpu")
    assert code == 2 and "another process is answering there (process" in printed
    held.release()
    assert lorica("predict", f"run={model}", f"input={file}", "accelerator=cpu")[0] == 0


# ----------------------------------------------------------------------------------------------------- memory, progress


def test_chunks_end_at_so_many_rows_or_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked_file, "CHUNK_LETTERS", 100)
    file = tmp_path / "in.jsonl"
    sizes = [1, 1, 1, 99, 1, 250, 40, 40, 40, 1]
    file.write_text("".join(json.dumps({"text": n * "a"}) + "\n" for n in sizes) + "{}\n", "utf-8")
    survey = look_through(file, TASK, None, 4, ".jsonl")
    assert survey.chunks == [(4, 4), (2, 2), (3, 3), (2, 1)] and survey.faults == 1 and not survey.columns
    for wanted in ([0, 1, 2, 3], [1, 3], [2], []):
        found = list(read_chunks(file, survey, TASK, wanted))
        assert [c.number for c in found] == wanted and [len(c.rows) for c in found] == [survey.chunks[i][0] for i in wanted]
    (chunk,) = read_chunks(file, survey, TASK, [3])
    assert [len(e.text) for e in chunk.examples.values()] == [1] and chunk.faults == {1: "in.jsonl:11 has no text"}


@pytest.mark.parametrize("limit", ["KEPT_ROWS", "CHUNK_LETTERS"])
def test_a_small_file_is_read_once_and_gives_what_a_large_one_does(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, sound = tmp_path / "in.csv", "id,text\n" + "".join(f"{i},row {i}\n" for i in range(20))
    file.write_text(sound + "20,\n" + "21,last\n", "utf-8")
    small = look_through(file, TASK, None, 6, ".csv")
    assert small.kept is not None
    monkeypatch.setattr(asked_file, limit, 10)
    large = look_through(file, TASK, None, 6, ".csv")
    assert large.kept is None and large.faults == 1
    if limit == "KEPT_ROWS":
        assert (large.chunks, large.columns) == (small.chunks, small.columns)
        found = list(read_chunks(file, large, TASK, {0, 2, 3}))
        file.unlink()
        assert found == list(read_chunks(file, small, TASK, {0, 2, 3}))


def test_wide_rows_and_long_prompts_are_not_kept_and_none_go_to_other_processes(tmp_path: Path) -> None:
    (tmp_path / "wide.csv").write_text(",".join(["text", *(f"c{i}" for i in range(400))]) + "\n" + 400 * ("a" + 400 * "," + "\n"))
    assert look_through(tmp_path / "wide.csv", TASK, None, 100, ".csv").kept is None
    (tmp_path / "few.csv").write_text("text\n" + 400 * "a\n")
    small = look_through(tmp_path / "few.csv", TASK, None, 100, ".csv")
    assert small.kept is not None and pickle.loads(pickle.dumps(small)) == dataclasses.replace(small, kept=None)
    long = TASK | {"prompt_template": 50_000 * "a" + "{text}"}
    assert look_through(tmp_path / "few.csv", long, None, 100, ".csv").kept is None


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_memory_does_not_grow_with_the_file(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asked_file, "KEPT_ROWS", 1000)
    peaks = []
    for n in (2_000, 20_000):
        file, rows = tmp_path / f"{n}.{ending}", [{"id": i, "text": f"{i} " + 20 * "word "} for i in range(n)]
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=1000)
        elif ending == "jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        else:
            file.write_text("id,text\n" + "".join(f"{r['id']},{r['text']}\n" for r in rows), "utf-8")
        del rows
        tracemalloc.start()
        survey = look_through(file, TASK, None, 500, ".parquet")
        assert sum(len(chunk.examples) for chunk in read_chunks(file, survey, TASK, range(len(survey.chunks)))) == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 500_000, peaks


def test_a_line_says_now_and_then_how_far_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 100.0, 101.0, 110.0, 140.0])
    monkeypatch.setattr(file_answering.time, "perf_counter", lambda: next(clock))
    with file_answering.Counted(Screen(), 10_000, 5_000) as counted:
        for _ in range(4):
            counted.add(100)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["  5,100 of 10,000 rows", "  5,400 of 10,000 rows, 8 rows/s, 10 min 13 s left"]


# ------------------------------------------------------------------------------------------------------ other processes


def started(*overrides: str, log: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "predict.py"), *overrides, "accelerator=cpu"],
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
    )


def parts_of(folder: Path) -> list[Path]:
    try:
        return list(folder.glob("*-0??????-*"))
    except FileNotFoundError:  # removed meanwhile
        return []


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the processes that are started: sums of other threads end in other bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    file, log = write_csv(tmp_path / "in.csv", 20_000), tmp_path / "log"
    assert lorica("predict", f"run={model}", f"input={file}", f"output={tmp_path / 'straight.csv'}", "accelerator=cpu")[0] == 0
    draw, out, partial = random.Random(0), tmp_path / "out.csv", tmp_path / "out.csv.partial"
    kills = 0
    while kills < KILLS or not out.exists():
        process = started(f"run={model}", f"input={file}", f"output={out}", log=log)
        there = len(parts_of(partial))
        while kills < KILLS and process.poll() is None and len(parts_of(partial)) <= there:
            time.sleep(0.01)
        if kills < KILLS:
            time.sleep(draw.uniform(0, 0.5))
            process.kill()
            kills += process.wait() == -signal.SIGKILL
            assert process.returncode == -signal.SIGKILL, log.read_text()
        assert process.wait() in (0, -signal.SIGKILL), log.read_text()
    assert {f.name for f in tmp_path.iterdir()} == {"in.csv", "straight.csv", "out.csv", "log"}
    assert digest(out) == digest(tmp_path / "straight.csv") and log.read_text().count("goes on after") == KILLS


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("ending", "devices"), [("csv", 3), ("parquet", 2)])
def test_several_devices_make_the_file_of_one(ending: str, devices: int, model: Path, tmp_path: Path, lorica: Lorica) -> None:
    """One process a device, which this one starts."""
    file, one, several = write_csv(tmp_path / "in.csv", 6_500), tmp_path / f"1.{ending}", tmp_path / f"more.{ending}"
    with file.open("ab") as f:
        f.write(b"6500,\n" + b"".join(b"%d,%s\n" % (i, b"soup " * 50) for i in range(6501, 6504)))
    for output, count in ((one, 1), (several, devices)):
        code, printed = lorica("predict", f"run={model}", f"input={file}", f"output={output}", "accelerator=cpu", f"devices={count}")
        assert code == 1 and "6,503 rows answered" in printed and "3 texts did not fit into the 40 tokens" in printed, printed
    assert digest(one) == digest(several)


@pytest.mark.slow
def test_several_processes_stop_and_go_on_together(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    file, log, out = write_csv(tmp_path / "in.csv", 14_000), tmp_path / "log", tmp_path / "out.csv"
    process = started(f"run={model}", f"input={file}", f"output={out}", "devices=2", log=log)
    while process.poll() is None and len(parts_of(tmp_path / "out.csv.partial")) < 2:
        time.sleep(0.05)
    process.terminate()
    assert process.wait() == 75, log.read_text()
    assert "interrupted (SIGTERM)" in log.read_text() and not out.exists()
    code, printed = lorica("predict", f"run={model}", f"input={file}", f"output={out}", "accelerator=cpu", "devices=2")
    assert code == 0 and "goes on after" in printed, printed
    assert [r["id"] for r in rows_of(out)] == [str(i) for i in range(14_000)]


@pytest.mark.slow
def test_what_one_of_several_processes_is_refused_is_said_once(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    run, file = shutil.copytree(model, tmp_path / "run"), write_csv(tmp_path / "in.csv", 5_000)
    (run / "model.safetensors").unlink()
    code, printed = lorica("predict", f"run={run}", f"input={file}", "accelerator=cpu", "devices=2")
    assert code == 2 and printed.count("lorica: ") == 1, printed


def test_a_header_without_rows_keeps_its_columns(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    (tmp_path / "none.csv").write_text("id;text\n")
    assert lorica("predict", f"run={model}", f"input={tmp_path / 'none.csv'}", f"output={tmp_path / 'out.csv'}")[0] == 0
    assert (tmp_path / "out.csv").read_text() == "id,text,prediction,probability\n"


@pytest.mark.parametrize("wrong", ["text_column=txt", "output=nowhere/out.csv"])
def test_what_the_first_row_shows_is_refused_before_torch_is_imported(wrong: str, model: Path, tmp_path: Path) -> None:
    write_csv(tmp_path / "in.csv", 3)
    typed = [f"run={model}", f"input={tmp_path / 'in.csv'}", wrong]
    program = f"import sys\nfrom lorica.cli import main\ntry:\n  main('predict', {typed})\nfinally:\n  print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and wrong in done.stderr and done.stdout == "False\n", done.stderr


def test_the_only_column_is_named_where_it_is_none_of_the_runs(model: Path, tmp_path: Path, lorica: Lorica) -> None:
    """A file without a header line loses a row to it."""
    for header, said in (("so it was", True), ("text", False)):
        (tmp_path / "in.csv").write_text(f"{header}\nfine soup\n")
        code, printed = lorica("predict", f"run={model}", f"input={tmp_path / 'in.csv'}", "accelerator=cpu")
        assert code == 0 and ("texts are read from the only column, so it was" in printed) == said


@pytest.mark.parametrize(("header", "said"), [("id,id,text", "2 columns named id"), ("id,,text,", "2 columns without a name")])
def test_two_columns_of_one_name_are_refused(model: Path, tmp_path: Path, lorica: Lorica, header: str, said: str) -> None:
    (tmp_path / "in.csv").write_text(f"{header}\n{','.join(header.split(',')).replace('text', 'so it is')}\n")
    code, printed = lorica("predict", f"run={model}", f"input={tmp_path / 'in.csv'}")
    assert code == 2 and said in printed and not (tmp_path / "in.scored.csv").exists()


def test_an_input_that_is_gone_when_its_rows_are_answered_is_said(
    model: Path, tmp_path: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, answer = tmp_path / "in.csv", file_answering.answer_chunks
    file.write_text("text\nso it is\n")

    def then_gone(*args: Any) -> float:
        seconds = answer(*args)
        file.unlink()
        return seconds

    monkeypatch.setattr(file_answering, "answer_chunks", then_gone)
    code, printed = lorica("predict", f"run={model}", f"input={file}", "accelerator=cpu")
    assert code == 2 and "was changed while it was read" in printed and "Traceback" not in printed


@pytest.mark.parametrize(("columns", "fix"), [("id,body", "<one of these>"), ("id,texts", "texts")])
def test_only_a_column_that_may_be_meant_is_proposed(model: Path, tmp_path: Path, lorica: Lorica, columns: str, fix: str) -> None:
    (tmp_path / "in.csv").write_text(f"{columns}\n1,so it is\n")
    code, said = lorica("predict", f"run={model}", f"input={tmp_path / 'in.csv'}")
    assert code == 2 and f"try: text_column={fix}" in said


def test_what_is_captured_follows_from_the_files_first_rows_wherever_a_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,text\n1,\n2,\n3,so it is\n4,fine\n5,slow\n6,soup\n")
    survey = look_through(tmp_path / "in.csv", TASK, None, 2, ".csv")
    asked: list[Any] = []

    class Warmed:
        def warm_up(self, examples: list[Any], batch_size: int | None, total: int) -> None:
            asked.append(([e.text for e in examples], batch_size, total))

    job: Any = SimpleNamespace(survey=survey, source=tmp_path / "in.csv", task=TASK, config=SimpleNamespace(batch_size=None))
    file_answering._warm_up(job, Warmed())  # type: ignore[arg-type]
    assert asked == [(["so it is", "fine"], None, 4)]
