"""Data modules turn the rows of files into examples: labels get their numbers, wording is exact, bad rows are refused by file and line or
skipped and counted, and the packaged samples are whole."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from lorica.config import DATA_SCHEMAS, ChatDataConfig, ClassificationDataConfig, ConfigError, DataConfig, InstructionDataConfig
from lorica.data.ag_news import tidy
from lorica.data.encoding import CausalEncoder, ClassifierEncoder
from lorica.data.examples import SPLITS, Example, Message
from lorica.data.module import Batching, LoricaDataModule
from lorica.data.modules import AGNewsData, ChatData, ClassificationData, InstructionData
from lorica.data.registry import MODULES, build_data, build_rows

WHOLE = {"name": "x", "source": "files", "validation_fraction": 0.0, "test_fraction": 0.0}
SHIPPED = Path(__file__).parents[2] / "conf" / "data"
Writer = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """A csv file of a header and rows, a jsonl file of objects, or a parquet file of objects; its path."""

    def put(name: str, rows: Iterable[Any]) -> str:
        path = tmp_path / name
        if name.endswith(".csv"):
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows)
        elif name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(list(rows)), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        return str(path)

    return put


def classification(path: str, **values: Any) -> ClassificationData:
    return ClassificationData(ClassificationDataConfig(**(WHOLE | {"module": "classification", "path": path} | values)))


def instruction(path: str, **values: Any) -> InstructionData:
    return InstructionData(InstructionDataConfig(**(WHOLE | {"module": "instruction", "path": path} | values)))


def chat(path: str, **values: Any) -> ChatData:
    return ChatData(ChatDataConfig(**(WHOLE | {"module": "chat", "path": path} | values)))


def shipped(name: str, **values: Any) -> LoricaDataModule:
    """The data module of a shipped configuration."""
    found = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text("utf-8"))
    return build_data(DATA_SCHEMAS[found["module"]](**(found | values)))


def numbers(data: LoricaDataModule) -> list[int | None]:
    return [e.label for e in data.splits.train]


# ------------------------------------------------------------------------------------------------------ classification


def test_an_example_has_the_text_its_label_and_the_question(write: Writer) -> None:
    path = write("a.csv", [("text", "label"), (" so {label} good ", "yes"), ("bad", "no")])
    data = classification(path, labels=["no", "yes"], prompt_template="Is it {labels}?\n{text}\n{labels}:")
    assert data.splits.train == [
        Example("a.csv:2", text="so {label} good", label=1, prompt="Is it no or yes?\nso {label} good\nno or yes:"),
        Example("a.csv:3", text="bad", label=0, prompt="Is it no or yes?\nbad\nno or yes:"),
    ]


def test_the_wording_of_a_text_is_not_filled_in(write: Writer) -> None:
    path = write("a.csv", [("text", "label"), ("{text} {labels}", "yes"), ("b", "no")])
    assert classification(path).splits.train[0].prompt == "Text: {text} {labels}\nLabel:"


def test_given_labels_are_known_by_name_in_any_case_or_by_number(write: Writer) -> None:
    path = write("a.csv", [("text", "label"), *((f"t{i}", label) for i, label in enumerate(["NEG", "neg", " Pos ", "0", "1"]))])
    data = classification(path, labels=["neg", "pos"])
    assert numbers(data) == [0, 0, 1, 0, 1] and data.labels == ["neg", "pos"]


def test_given_values_say_how_labels_are_written(write: Writer) -> None:
    path = write("a.csv", [("text", "label"), ("t0", "4"), ("t1", "1"), ("t2", "B"), ("t3", "a")])
    assert numbers(classification(path, labels=["a", "b"], label_values=["1", "4"])) == [1, 0, 1, 0]
    with pytest.raises(ConfigError, match="unknown label '0'"):
        classification(write("b.csv", [("text", "label"), ("t", "0")]), labels=["a", "b"], label_values=["1", "4"]).load()


def test_given_values_come_before_names(write: Writer) -> None:
    path = write("a.csv", [("text", "label"), ("t0", "0"), ("t1", "1"), ("t2", "2")])
    assert numbers(classification(path, labels=["1", "2", "3"], label_values=["0", "1", "2"])) == [0, 1, 2]


def test_found_labels_are_sorted_as_numbers_where_they_are(write: Writer) -> None:
    path = write("a.csv", [("text", "label"), *((f"t{i}", label) for i, label in enumerate(["10", "9", "-1", "zebra", "ant", "9"]))])
    data = classification(path)
    assert data.labels is None
    assert numbers(data) == [2, 1, 0, 4, 3, 1] and data.labels == ["-1", "9", "10", "ant", "zebra"]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_whole_numbers_written_as_floats_are_whole_numbers(write: Writer, ending: str) -> None:
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate([2.0, 0.0, 1.0])]
    assert numbers(classification(write(f"a.{ending}", rows), labels=["a", "b", "c"])) == [2, 0, 1]
    found = classification(write(f"b.{ending}", rows))
    assert numbers(found) == [2, 0, 1] and found.labels == ["0", "1", "2"]


def test_whole_numbers_and_true_and_false_are_labels(write: Writer) -> None:
    data = classification(write("a.jsonl", [{"text": "a", "label": True}, {"text": "b", "label": False}, {"text": "c", "label": 7}]))
    assert numbers(data) == [2, 1, 0] and data.labels == ["7", "False", "True"]


@pytest.mark.parametrize("label", ["--1", "²"])
def test_found_labels_may_look_like_numbers(write: Writer, label: str) -> None:
    data = classification(write("a.csv", [("text", "label"), ("a", label), ("b", "1")]))
    assert sorted(set(numbers(data))) == [0, 1]


def test_every_found_label_has_rows(write: Writer) -> None:
    data = classification(write("a.csv", [("text", "label"), ("a", "Good"), ("b", "good"), ("c", "bad")]))
    found = set(numbers(data))
    assert found == set(range(len(data.labels or [])))


@pytest.mark.parametrize(("labels", "count"), [(["a", "a", "a"], 1), ([f"l{i}" for i in range(1001)], 1001)])
def test_a_column_that_is_no_label_set_is_refused(write: Writer, labels: list[str], count: int) -> None:
    path = write("a.csv", [("text", "label"), *((f"t{i}", label) for i, label in enumerate(labels))])
    with pytest.raises(ConfigError, match=f"data.label_column=label: has {count:,} different values? in training"):
        classification(path).load()


def test_labels_are_found_in_training_and_hold_for_test(tmp_path: Path, write: Writer) -> None:
    write("train.csv", [("text", "label"), ("a", "x"), ("b", "y")])
    write("test.csv", [("text", "label"), ("c", "y"), ("d", "z")])
    with pytest.raises(ConfigError, match=r"1 of 4 rows can't be used: test\.csv:3 has the unknown label 'z'"):
        classification(str(tmp_path)).load()
    data = classification(str(tmp_path), on_bad_rows="skip")
    assert [e.label for e in data.splits.test] == [1] and data.labels == ["x", "y"]


BAD_TEXTS = [
    {"text": "good", "label": "a"},
    {"text": None, "label": "a"},
    {"text": " \n", "label": "b"},
    {"text": "t", "label": None},
    {"text": "u", "label": ""},
    {"text": "v", "label": "c" * 60},
    {"label": "a"},
    {"text": "fine", "label": "b"},
]


def test_bad_rows_are_refused_by_file_line_and_count(write: Writer) -> None:
    with pytest.raises(ConfigError) as refused:
        classification(write("a.jsonl", BAD_TEXTS), labels=["a", "b"]).load()
    assert str(refused.value) == (
        "data.on_bad_rows=refuse: 6 of 8 rows can't be used: a.jsonl:2 has no text; a.jsonl:3 has no text; a.jsonl:4 has no label; "
        "and 3 more\n  try: mend them, or data.on_bad_rows=skip"
    )


def test_bad_rows_are_skipped_and_counted_by_reason(write: Writer) -> None:
    data = classification(write("a.jsonl", BAD_TEXTS), labels=["a", "b"], on_bad_rows="skip")
    assert [e.text for e in data.splits.train] == ["good", "fine"]
    assert data.fault_counts() == {"has no text": 3, "has no label": 2, f"has the unknown label '{'c' * 40}'": 1}
    assert [origin for origin, _ in data.faults] == [f"a.jsonl:{line}" for line in (2, 3, 4, 5, 6, 7)]


def test_damaged_rows_are_refused_with_the_rest(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\ngood,a\ncaf\xe9,b\nx,y,z\nbad,b\n")
    why = r"a\.csv:3 has bytes that are not UTF-8; a\.csv:4 has 3 columns, not 2"
    with pytest.raises(ConfigError, match=f"2 of 4 rows can't be used: {why}"):
        classification(str(tmp_path / "a.csv")).load()
    data = classification(str(tmp_path / "a.csv"), on_bad_rows="skip")
    assert [e.text for e in data.splits.train] == ["good", "bad"]


def test_a_file_that_names_its_columns_itself_is_told_to(write: Writer) -> None:
    rows = [("text", "label"), ("well", "a"), ("so", "b")]
    with pytest.raises(ConfigError, match=r"3 of 3 rows can't be used(.|\n)*try: data\.csv_columns=null"):
        classification(write("a.csv", rows), csv_columns=["label", "title", "description"]).load()


def test_a_file_of_nothing_but_damaged_rows_is_refused_by_its_lines(write: Writer) -> None:
    with pytest.raises(ConfigError, match=r"2 of 2 rows can't be used: a\.csv:2 has 3 columns, not 2"):
        classification(write("a.csv", [("text", "label"), ("well", "well", "a"), ("so", "so", "b")])).load()


def test_nothing_left_after_skipping_is_refused(write: Writer) -> None:
    path = write("a.csv", [("text", "label"), ("", "a"), ("", "b")])
    with pytest.raises(ConfigError, match="no rows are left to train on"):
        classification(path, on_bad_rows="skip").load()


@pytest.mark.parametrize(
    ("header", "key", "column"), [(("texts", "label"), "data.text_column", "text"), (("text", "labels"), "data.label_column", "label")]
)
def test_a_missing_column_is_refused_with_the_nearest(write: Writer, header: tuple[str, str], key: str, column: str) -> None:
    with pytest.raises(ConfigError) as refused:
        classification(write("a.csv", [header, ("a", "b")])).load()
    listing = ", ".join(header)
    assert str(refused.value) == f"{key}={column}: the train file has no such column; it has {listing}\n  try: {key}={column}s"


def test_a_column_that_only_the_test_file_lacks_is_refused_there(tmp_path: Path, write: Writer) -> None:
    write("train.csv", [("text", "label"), ("a", "x"), ("b", "y")])
    write("test.csv", [("review", "label"), ("c", "x")])
    with pytest.raises(ConfigError, match="the test file has no such column; it has review, label"):
        classification(str(tmp_path)).load()


def test_other_columns_may_be_named_and_more_may_be_there(write: Writer) -> None:
    path = write("a.csv", [("id", "review", "stars"), ("1", "a", "5"), ("2", "b", "3")])
    data = classification(path, text_column="review", label_column="stars")
    assert [(e.text, e.label) for e in data.splits.train] == [("a", 1), ("b", 0)] and data.labels == ["3", "5"]


def test_files_are_read_once(write: Writer) -> None:
    path = write("a.csv", [("text", "label"), ("a", "x"), ("b", "y")])
    data = classification(path)
    first = data.splits
    Path(path).unlink()
    assert data.splits is first


def test_a_module_without_a_sample_says_so() -> None:
    with pytest.raises(ConfigError, match="data=mine has no packaged sample"):
        ClassificationData(ClassificationDataConfig(name="mine", module="classification", source="sample")).load()


FRAGMENTS = ['"', ",", "\n", "\r", "text", "label", "text,label\n", "a,1\n", "b,2\n", "\0", "-", "é", "NaN", "[", "]", "{", "}"]
FRAGMENTS += ['{"text": null}\n', '{"text": "a", "label": 1}\n', '{"text": "b", "label": 2.5}\n']
FRAGMENTS += ['{"text": [1], "label": {}}\n', '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n']
FRAGMENTS += ['{"messages": [3]}\n', '{"messages": [{"role": [], "content": 1}]}\n']
CONTENT = st.binary(max_size=100) | st.lists(st.sampled_from(FRAGMENTS), max_size=25).map(lambda parts: "".join(parts).encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all the files of a property."""
    return tmp_path_factory.mktemp("modules")


@settings(max_examples=100, deadline=None, database=None)
@given(
    CONTENT, st.sampled_from(["a.csv", "a.jsonl", "a.json"]), st.sampled_from(["refuse", "skip"]), st.sampled_from([classification, chat])
)
def test_whatever_is_in_a_file_examples_or_a_config_error_come_out(
    folder: Path, content: bytes, name: str, on_bad_rows: str, make: Callable[..., LoricaDataModule]
) -> None:
    (folder / name).write_bytes(content)
    try:
        data = make(str(folder / name), on_bad_rows=on_bad_rows)
        data.load()
    except ConfigError:
        return
    assert data.splits.train and all(e.content for e in data.splits.train)


# ------------------------------------------------------------------------------------------------------------- ag_news

NEWS = {
    "module": "ag_news",
    "csv_columns": ["label", "title", "description"],
    "labels": ["World", "Sports", "Business", "Sci/Tech"],
    "label_values": ["1", "2", "3", "4"],
    "prompt_template": "{labels}?\n{text}",
}


def ag_news(path: str, **values: Any) -> AGNewsData:
    return AGNewsData(ClassificationDataConfig(**(WHOLE | NEWS | {"path": path} | values)))


def test_canonical_news_have_title_and_description_in_one_text(write: Writer) -> None:
    rows = [("3", "Oil rises", "Prices  #36;50 up."), ("2", "Who won?", "They did."), ("4", "", "Chip news"), ("1", "Alone", "")]
    data = ag_news(write("a.csv", rows))
    assert [(e.text, e.label) for e in data.splits.train] == [
        ("Oil rises. Prices $50 up.", 2),
        ("Who won? They did.", 1),
        ("Chip news", 3),
        ("Alone", 0),
    ]
    assert data.splits.train[3].prompt == "World, Sports, Business or Sci/Tech?\nAlone"


def test_news_with_a_header_are_read_by_their_text_column(write: Writer) -> None:
    rows = [{"text": "Oil &amp; gas", "label": "Business"}, {"text": "Goal", "label": "sports"}]
    assert [(e.text, e.label) for e in ag_news(write("a.jsonl", rows), csv_columns=None).splits.train] == [("Oil & gas", 2), ("Goal", 1)]


def test_news_without_title_and_description_or_of_a_fifth_class_are_refused(write: Writer) -> None:
    why = r"a\.csv:1 has neither title nor description; a\.csv:2 has the unknown label '5'"
    with pytest.raises(ConfigError, match=f"2 of 3 rows can't be used: {why}"):
        ag_news(write("a.csv", [("1", "", " "), ("5", "a", "b"), ("1", "c", "d")])).load()


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("Arsenal #39;s win", "Arsenal's win"),
        ("the  #36;5 note", "the $5 note"),
        ("AT&amp;T", "AT&T"),
        ("&lt;b&gt;Bold&lt;/b&gt; move", "Bold move"),
        ('<A HREF="http://x.com/a?b=1">Link</A> to', "Link to"),
        ("first&lt;br&gt;second", "first second"),
        (r"first\second\\third", "first second third"),
        ("3 < 5 and 7 > 2", "3 < 5 and 7 > 2"),
        ("ticket #39 is sold", "ticket #39 is sold"),
        ("one\n two\t three", "one two three"),
        ("Stocks up; oil falls; Dow DL; more", "Stocks up; oil falls; Dow DL; more"),
        ("a  quot;major victory quot; won", 'a "major victory" won'),
        ("Axis  amp; Allies", "Axis & Allies"),
        ("With  nbsp;food and hellip;", "With food and\u2026"),
        ("Arsenal&#39;s win", "Arsenal's win"),
    ],
)
def test_entities_tags_and_backslashes_are_tidied(written: str, meant: str) -> None:
    assert tidy(written) == meant


# --------------------------------------------------------------------------------------------------------- instruction


def test_instructions_are_worded_with_and_without_an_input(write: Writer) -> None:
    rows = [
        {"instruction": "Add {input}.", "input": "1 and {prompt}", "output": "so {prompt}"},
        {"instruction": " Greet. ", "input": "", "output": " hello "},
        {"instruction": "Greet {prompt}.", "input": None, "output": 7},
        {"instruction": "", "input": "only this", "output": "fine"},
    ]
    with_input = "### Instruction:\nAdd {input}.\n\n### Input:\n1 and {prompt}\n\n### Response:\n"
    assert instruction(write("a.jsonl", rows)).splits.train == [
        Example("a.jsonl:1", prompt=with_input, completion="so {prompt}"),
        Example("a.jsonl:2", prompt="### Instruction:\nGreet.\n\n### Response:\n", completion="hello"),
        Example("a.jsonl:3", prompt="### Instruction:\nGreet {prompt}.\n\n### Response:\n", completion="7"),
        Example("a.jsonl:4", prompt="### Instruction:\n\n\n### Input:\nonly this\n\n### Response:\n", completion="fine"),
    ]


def test_a_wording_may_put_the_input_first(write: Writer) -> None:
    path = write("a.csv", [("instruction", "input", "output"), ("What is it?", "a {prompt} box", "x")])
    assert instruction(path, prompt_template_with_input="{input}\n{prompt}\n").splits.train[0].prompt == "a {prompt} box\nWhat is it?\n"


def test_other_columns_without_an_input_may_be_named(write: Writer) -> None:
    path = write("a.csv", [("question", "input", "answer"), ("Why?", "unused", "So.")])
    data = instruction(path, prompt_column="question", input_column=None, completion_column="answer", prompt_template="Q: {prompt}\nA: ")
    assert data.splits.train == [Example("a.csv:2", prompt="Q: Why?\nA: ", completion="So.")]


def test_instructions_that_cannot_be_used_are_named(write: Writer) -> None:
    rows = [
        {"instruction": "a", "input": "", "output": None},
        {"instruction": " ", "input": "", "output": "b"},
        {"instruction": ["a"], "input": "", "output": "b"},
        {"instruction": "a", "input": "", "output": "b"},
    ]
    with pytest.raises(ConfigError) as refused:
        instruction(write("a.jsonl", rows)).load()
    why = ["a.jsonl:1 has no output", "a.jsonl:2 has no instruction", "a.jsonl:3 has a list in instruction, not text"]
    assert f"3 of 4 rows can't be used: {'; '.join(why)}\n" in str(refused.value)


def test_a_missing_column_of_instructions_is_refused_by_its_key(write: Writer) -> None:
    path = write("a.csv", [("instruction", "inputs", "output"), ("a", "b", "c")])
    with pytest.raises(ConfigError, match=r"data\.input_column=input: .*\n  try: data\.input_column=inputs"):
        instruction(path).load()


# ---------------------------------------------------------------------------------------------------------------- chat


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]}


def test_conversations_end_with_the_assistants_last_turn(write: Writer) -> None:
    rows = [turns("user", "assistant"), turns("system", "user", "assistant", "user")]
    assert chat(write("a.jsonl", rows)).splits.train == [
        Example("a.jsonl:1", messages=(Message("user", "user 0"), Message("assistant", "assistant 1"))),
        Example("a.jsonl:2", messages=(Message("system", "system 0"), Message("user", "user 1"), Message("assistant", "assistant 2"))),
    ]


def test_conversations_of_parquet_files_are_the_same(write: Writer) -> None:
    rows = [turns("user", "assistant"), turns("user", "assistant", "user", "assistant")]
    by_ending = [[e.messages for e in chat(write(f"a.{ending}", rows)).splits.train] for ending in ("jsonl", "parquet")]
    assert by_ending[0] == by_ending[1]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (turns("assistant", "user", "assistant"), "has roles out of turn"),
        (turns("user", "user", "assistant"), "has roles out of turn"),
        (turns("user", "assistant", "assistant"), "has roles out of turn"),
        (turns("user", "system", "assistant"), "has roles out of turn"),
        (turns("system", "system", "user", "assistant"), "has roles out of turn"),
        (turns("user", "tool", "assistant"), "has the unknown role 'tool'"),
        (turns("user"), "has no answer by the assistant"),
        (turns("system", "user"), "has no answer by the assistant"),
        ({"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "a"}]}, "has an empty user message"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]}, "has an empty assistant message"),
        ({"messages": ["hi", "there"]}, "has the unknown role 'None'"),
        ({"messages": []}, "has no list of messages"),
        ({"messages": "hi"}, "has no list of messages"),
        ({"messages": None}, "has no list of messages"),
    ],
)
def test_conversations_that_cannot_be_used_are_named(write: Writer, row: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError) as refused:
        chat(write("a.jsonl", [turns("user", "assistant"), row])).load()
    assert f"1 of 2 rows can't be used: a.jsonl:2 {why}\n" in str(refused.value)


# ------------------------------------------------------------------------------------------------------------ registry


def test_every_registered_module_has_a_schema_and_a_shipped_configuration() -> None:
    assert set(MODULES) == set(DATA_SCHEMAS) == {path.stem for path in SHIPPED.glob("*.yaml")}
    for name in MODULES:
        data = shipped(name)
        assert data.config.module == name and isinstance(data, LoricaDataModule)
        assert type(build_rows(data.config)) in type(data).__mro__ and not isinstance(build_rows(data.config), LoricaDataModule)


def test_an_unknown_module_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"sentimant: no installed package has this data module\n  try: data\.module=sentiment"):
        build_data(DataConfig(name="x", module="sentimant"))


# ------------------------------------------------------------------------------------------------------------- samples


def sampled(name: str) -> LoricaDataModule:
    data = shipped(name, source="sample")
    data.load()
    return data


def every_row(data: LoricaDataModule) -> list[Example]:
    return [e for split in SPLITS for e in data.splits[split]]


@pytest.mark.parametrize(("name", "rows"), [("ag_news", 480), ("sentiment", 450), ("healthcare_qa", 120), ("chat", 24)])
def test_packaged_samples_are_whole_and_share_nothing_between_splits(name: str, rows: int) -> None:
    data = sampled(name)
    assert not data.faults and set(data.splits.dropped_as_duplicates.values()) == {0}
    assert len(every_row(data)) >= rows and len({e.content for e in every_row(data)}) == len(every_row(data))
    assert all(data.splits[split] for split in SPLITS) and data.splits.sources["test"] == "given"


@pytest.mark.parametrize(("name", "labels", "each"), [("ag_news", 4, 120), ("sentiment", 3, 150)])
def test_packaged_labelled_samples_have_every_class_often_and_in_every_split(name: str, labels: int, each: int) -> None:
    data = sampled(name)
    counts = Counter(e.label for e in every_row(data))
    assert data.labels is not None and len(data.labels) == labels
    assert set(counts) == set(range(labels)) and min(counts.values()) >= each
    assert all({e.label for e in data.splits[split]} == set(range(labels)) for split in SPLITS)


def test_packaged_conversations_have_several_turns_and_some_a_system_message() -> None:
    conversations = [e.messages for e in every_row(sampled("chat"))]
    assert all(m[-1].role == "assistant" for m in conversations)
    assert any(m[0].role == "system" for m in conversations) and sum(len(m) > 3 for m in conversations) > len(conversations) / 2


# -------------------------------------------------------------------------------------------------- encode and connect


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, all of them unknown but the marks and the labels."""
    inner = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "<s>": 2, "</s>": 3, "x": 4, "y": 5}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


def labelled(write: Writer, rows: int, **values: Any) -> ClassificationData:
    return classification(write("a.csv", [("text", "label"), *((f"{'w ' * (i % 7)}t{i}", "xy"[i % 2]) for i in range(rows))]), **values)


def encoded(data: LoricaDataModule, kind: str) -> LoricaDataModule:
    data.load()
    data.encode(CausalEncoder(tokenizer(), 64, label_names=data.labels or []) if kind == "causal" else ClassifierEncoder(tokenizer(), 64))
    return data


def batches(data: LoricaDataModule, **plan: Any) -> list[dict[str, Any]]:
    rank, world_size = plan.pop("rank", 0), plan.pop("world_size", 1)
    data.connect(Batching(pad_id=0, padded=plan.pop("padded", True), rank=rank, world_size=world_size, plan=plan))
    return list(data.train_dataloader())


@pytest.mark.parametrize("kind", ["causal", "classifier"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_weights_make_the_mean_of_micro_batches_and_ranks_that_over_all_supervised_tokens(
    write: Writer, kind: str, world_size: int
) -> None:
    data = encoded(labelled(write, 21), kind)
    accumulate = 2
    of_ranks = [batches(data, batch_size=2, accumulate=accumulate, world_size=world_size, rank=rank) for rank in range(world_size)]
    assert len({len(of_rank) for of_rank in of_ranks}) == 1
    for step in range(data.plan.steps):
        micro = [b for of_rank in of_ranks for b in of_rank[step * accumulate : (step + 1) * accumulate]]
        supervised = [b["count"]["supervised"] for b in micro]
        assert sum(n * b["weight"] for n, b in zip(supervised, micro, strict=True)) / len(micro) == pytest.approx(1.0)
        assert len({b["weight"] for b in micro if b["count"]["examples"]}) == 1


def test_a_micro_batch_without_rows_runs_one_row_of_no_weight(write: Writer) -> None:
    data = encoded(labelled(write, 2), "causal")
    ghost, real = sorted((batches(data, batch_size=2, world_size=3, rank=rank)[0] for rank in (0, 1, 2)), key=lambda b: b["weight"])[:2]
    assert ghost["weight"] == 0.0 and ghost["input_ids"].shape[0] == 1
    assert ghost["count"] == {"examples": 0, "tokens": 0, "supervised": 0, "epoch": 0}
    assert real["weight"] > 0 and real["count"]["examples"] == 1


@pytest.mark.parametrize("padded", [True, False])
def test_batches_hold_the_rows_of_the_plan(write: Writer, padded: bool) -> None:
    data = encoded(labelled(write, 20), "causal")
    made = batches(data, tokens_per_batch=40, padded=padded, max_epochs=2)
    for k, batch in enumerate(made):
        rows = [data.train_rows[r] for r in data.plan.micro_batch(k).rows]
        assert batch["count"]["tokens"] == sum(len(r.ids) for r in rows) == int((batch["input_ids"] != 0).sum())
        assert batch["count"]["epoch"] == data.plan.micro_batch(k).epoch
        assert batch["targets"].tolist() == [t for r in rows for t in r.labels if t >= 0]


def test_loading_resumes_at_a_micro_step_with_the_same_batches(write: Writer) -> None:
    data = encoded(labelled(write, 20), "classifier")
    whole = batches(data, batch_size=3, max_epochs=2)
    data.resume_at = 5
    rest = list(data.train_dataloader())
    assert len(rest) == len(whole) - 5
    for one, other in zip(rest, whole[5:], strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"]) and torch.equal(one["labels"], other["labels"])


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_evaluation_has_every_row_once_over_all_ranks_with_its_label(write: Writer, kind: str) -> None:
    data = encoded(labelled(write, 60, validation_fraction=0.3, test_fraction=0.3), kind)
    for split in SPLITS[1:]:
        seen: dict[int, int] = {}
        for rank in range(3):
            data.connect(Batching(pad_id=0, eval_tokens=32, world_size=3, rank=rank, plan={"batch_size": 2}))
            for batch in data.val_dataloader() if split == "validation" else data.test_dataloader():
                assert not set(batch["index"]) & set(seen)
                seen |= dict(zip(batch["index"], batch["labels"].tolist(), strict=True))
        assert seen == {i: e.label for i, e in enumerate(data.splits[split])}


def test_rows_with_nothing_to_learn_can_be_left_out(write: Writer) -> None:
    data = labelled(write, 4)
    data.encode(CausalEncoder(tokenizer(), 64, label_names=["", "b"]))
    without = [e for e in data.splits.train if e.label == 0]
    assert without and [r.supervised == 0 for r in data.train_rows] == [e.label == 0 for e in data.splits.train]
    data.leave_out_unsupervised()
    assert data.splits.train and len(data.train_rows) == len(data.splits.train)
    assert all(r.supervised for r in data.train_rows) and all(e.label for e in data.splits.train)


def test_a_column_that_is_needed_otherwise_is_not_proposed(write: Writer) -> None:
    with pytest.raises(ConfigError) as refused:
        classification(write("a.csv", [("review", "stars"), ("fine", 4), ("bad", 1)]), text_column="review", label_column="reviews").load()
    assert "try: data.label_column=stars" in str(refused.value)


def test_a_file_without_rows_is_said_to_have_none(write: Writer) -> None:
    with pytest.raises(ConfigError, match=r"data\.path=.*: has no rows to train on"):
        classification(write("a.csv", [("text", "label")])).load()
