"""The data report: one planted fault each, counted exactly, and refused where a limit says so; the pages show them and nothing private."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lorica.config import ChatDataConfig, ClassificationDataConfig, ConfigError, InstructionDataConfig
from lorica.data.encoding import CausalEncoder, ClassifierEncoder
from lorica.data.gates import check_report
from lorica.data.module import LoricaDataModule
from lorica.data.modules import ChatData, ClassificationData, InstructionData
from lorica.data.report import data_report, write_report

WHOLE: dict[str, Any] = {"name": "x", "source": "files", "validation_fraction": 0.0, "test_fraction": 0.0, "token_cache": False}
CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
MUTE = CHAT.replace("{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% endif %}")  # leaves every answer out
TOWNS = ("Antwerp", "Bergen", "Cadiz", "Dublin", "Evora", "Faro", "Ghent", "Haifa", "Izmir", "Jena", "Kiel", "Lviv", "Malmo")


def news(i: int) -> str:
    """The i-th of texts that are not alike."""
    town, other = TOWNS[i % 13], TOWNS[i // 13 % 13][::-1].lower()
    return " ".join(
        f"{word}{(i * 7919 + k * 104729) % 9973}" for k, word in enumerate((town, other, "council", "harbour", "votes", "fund"))
    )


@pytest.fixture(scope="module")
def tokenizer(tiny_mistral: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_mistral)


@pytest.fixture
def labelled(tmp_path: Path) -> Callable[..., ClassificationData]:
    """A labelled set of the given (text, label) rows by split."""

    def make(train: list[tuple[str, str]], test: list[tuple[str, str]] | None = None, **values: Any) -> ClassificationData:
        for split, rows in (("train", train), ("test", test)):
            if rows is not None:
                with (tmp_path / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
                    csv.writer(file).writerows([("text", "label"), *rows])
        return ClassificationData(ClassificationDataConfig(**(WHOLE | {"module": "classification", "path": str(tmp_path)} | values)))

    return make


@pytest.fixture
def instructions(tmp_path: Path) -> Callable[..., InstructionData]:
    """An instruction set of the given (prompt, answer) rows."""

    def make(rows: list[tuple[str, str]], **values: Any) -> InstructionData:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps({"q": q, "a": a}) + "\n" for q, a in rows), "utf-8")
        own = {"module": "instruction", "path": str(path), "prompt_column": "q", "input_column": None, "completion_column": "a"}
        return InstructionData(InstructionDataConfig(**(WHOLE | own | values)))

    return make


@pytest.fixture
def conversations(tmp_path: Path) -> Callable[..., ChatData]:
    """A chat set of the given conversations, user and assistant in turn."""

    def make(rows: list[list[str]], **values: Any) -> ChatData:
        path = tmp_path / "rows.jsonl"
        turns = ([{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(row)] for row in rows)
        path.write_text("".join(json.dumps({"messages": t}) + "\n" for t in turns), "utf-8")
        return ChatData(ChatDataConfig(**(WHOLE | {"module": "chat", "path": str(path)} | values)))

    return make


def report_of(
    data: LoricaDataModule, tokenizer: Any, length: int = 256, causal: bool = True, template: str | None = None
) -> dict[str, Any]:
    data.load()
    tokenizer.chat_template = template
    names = data.labels or ()
    data.encode(CausalEncoder(tokenizer, length, True, names) if causal else ClassifierEncoder(tokenizer, length))
    return data_report(data)


def refusal(report: dict[str, Any], data: LoricaDataModule) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        check_report(report, data.config, Path("run"))
    assert refused.value.fix
    return refused.value


def passes(report: dict[str, Any], data: LoricaDataModule, **limits: Any) -> None:
    for name, value in limits.items():
        setattr(data.config, name, value)
    check_report(report, data.config, Path("run"))


# --------------------------------------------------------------------------------------------------------- repeated rows


def test_leakage_by_exact_duplicates_is_dropped_and_counted(labelled: Any, tokenizer: Any) -> None:
    train = [(news(i), "ab"[i % 2]) for i in range(40)]
    data = labelled(train, [(news(i).upper(), "a") for i in range(7)] + [(news(i), "b") for i in range(100, 105)])
    report = report_of(data, tokenizer)
    assert report["rows"] == {"train": 33, "validation": 0, "test": 12}
    assert report["duplicates"]["exact"] == {
        "within": {"train": 0, "validation": 0, "test": 0},
        "dropped": {"train": 7, "validation": 0},
    }
    assert report["duplicates"]["near"]["across"]["train-test"] == 0
    passes(report, data, max_leakage=0.0)


def test_leakage_by_near_duplicates_is_counted_listed_and_refused(labelled: Any, tokenizer: Any) -> None:
    train = [(news(i), "ab"[i % 2]) for i in range(60)]
    test = [(f"BREAKING: {news(i)} (update)", "a") for i in range(6)] + [(news(i), "b") for i in range(100, 114)]
    data = labelled(train, test)
    report = report_of(data, tokenizer)
    near = report["duplicates"]["near"]
    assert near["across"] == {"train-validation": 0, "train-test": 6, "validation-test": 0}
    assert near["within"] == {"train": 0, "validation": 0, "test": 0}
    assert {(p["test"], p["train"]) for p in near["test_and_training"]} == {(f"test.csv:{i + 2}", f"train.csv:{i + 2}") for i in range(6)}
    refused = refusal(report, data)
    assert (refused.where, refused.value) == ("data.max_leakage", 0.2)
    assert "6 of 20 test rows (30.00%)" in refused.rule and "data.max_leakage=0.3" in refused.fix
    passes(report, data, max_leakage=0.3)


def test_near_duplicates_are_looked_for_only_where_asked(labelled: Any, tokenizer: Any) -> None:
    data = labelled([(news(0), "a"), (news(1), "b")], [(news(0) + " too", "a")], near_duplicate_similarity=None)
    report = report_of(data, tokenizer)
    assert report["duplicates"]["near"] is None
    passes(report, data)


def test_every_row_of_equal_texts_counts_as_leaking(labelled: Any, tokenizer: Any) -> None:
    """Two test rows and one of training that are equal but for punctuation: whichever comes first, both leak."""
    text = news(0)
    data = labelled([(text, "a"), (text, "a"), (news(1), "b")], [(text + "!", "a"), (text + "?", "a")])
    near = report_of(data, tokenizer)["duplicates"]["near"]
    assert near["across"]["train-test"] == 2 and near["within"]["test"] == 2
    assert len(near["test_and_training"]) == 4


def test_rows_repeated_within_a_split_are_counted(labelled: Any, tokenizer: Any) -> None:
    rows = [(news(i), "ab"[i % 2]) for i in range(20)] + [(f"  {news(i).upper()}", "ab"[i % 2]) for i in range(5)] + [(news(0), "a")]
    report = report_of(labelled(rows), tokenizer)
    assert report["duplicates"]["exact"]["within"]["train"] == 6
    assert report["conflicts"] == {"texts": 0, "rows": 0, "examples": []}


def test_conflicting_labels_are_counted_with_their_places(labelled: Any, tokenizer: Any) -> None:
    rows = [(news(i), "a") for i in range(10)] + [(news(10), "b")] + [(news(i), "b") for i in range(3)] + [(news(0), "a")]
    report = report_of(labelled(rows), tokenizer)
    found = report["conflicts"]
    assert (found["texts"], found["rows"]) == (3, 7)
    assert [(a["origin"], a["answer"]) for a in found["examples"][0]["answers"]] == [
        ("train.csv:2", "a"),
        ("train.csv:13", "b"),
        ("train.csv:16", "a"),
    ]
    assert any("3 texts of training with more than one label (7 rows)" in note for note in report["notes"])


def test_a_misspelt_label_is_noted(labelled: Any, tokenizer: Any) -> None:
    kinds = ["so good", "So good", "disappointed", "dissapointed", "fine", "file"]
    notes = report_of(labelled([(news(i), kinds[i % 6]) for i in range(60)]), tokenizer)["notes"]
    alike = [note for note in notes if "nearly alike" in note]
    numbered = report_of(labelled([(news(i), f"category_{i % 20:02}") for i in range(60)]), tokenizer)["notes"]
    assert not any("nearly alike" in note for note in numbered)
    assert len(alike) == 2 and "the labels So good (" in alike[0] and "the labels disappointed (" in alike[1], alike


def test_prompts_with_two_answers_are_counted(instructions: Any, tokenizer: Any) -> None:
    rows = [(news(0), "yes"), (news(0), "no"), (news(1), "yes"), (news(1), "yes")]
    found = report_of(instructions(rows), tokenizer)["conflicts"]
    assert (found["texts"], found["rows"]) == (1, 2)
    assert found["examples"][0]["answers"][1]["answer"] == "no"


# ------------------------------------------------------------------------------------------------------- what is learnt


def test_a_skipped_class_is_refused(labelled: Any, tokenizer: Any) -> None:
    data = labelled([(news(i), "ab"[i % 2]) for i in range(8)], labels=["a", "b", "c"])
    report = report_of(data, tokenizer, causal=False)
    assert report["labels"]["train"] == {"a": 4, "b": 4, "c": 0}
    refused = refusal(report, data)
    assert refused.where == "data.min_label_examples" and "c (0)" in refused.rule
    passes(report, data, min_label_examples=0)
    data.config.min_label_examples = 5
    assert "a (4), b (4), c (0)" in refusal(report, data).rule


def test_rows_that_are_all_masked_are_refused(conversations: Any, tokenizer: Any) -> None:
    data = conversations([[news(i), "an answer"] for i in range(6)])
    report = report_of(data, tokenizer, template=MUTE)
    assert report["rows_with_nothing_to_learn"]["count"] == 6 and report["train_tokens"]["supervised"] == 0
    refused = refusal(report, data)
    assert refused.where == "data.max_unsupervised" and "all 6 training rows" in refused.rule
    data.config.max_unsupervised = 1.0
    assert "all 6 training rows" in refusal(report, data).rule  # no share lets that pass


def test_rows_with_nothing_to_learn_are_refused_above_a_share(conversations: Any, tokenizer: Any) -> None:
    template = CHAT.replace("{{ m.content }}", "{% if m.content != 'mute' %}{{ m.content }}{% endif %}").replace("\n", "")
    data = conversations([[news(i), "mute" if i < 3 else "an answer"] for i in range(12)])
    report = report_of(data, tokenizer, template=template)
    assert report["rows_with_nothing_to_learn"] == {"count": 3, "first": ["rows.jsonl:1", "rows.jsonl:2", "rows.jsonl:3"]}
    refused = refusal(report, data)
    assert "3 of 12 training rows (25.00%)" in refused.rule and "data.max_unsupervised=0.25" in refused.fix
    passes(report, data, max_unsupervised=0.25)
    data.leave_out_unsupervised()
    assert len(data.train_rows) == 9


def test_an_end_that_is_never_learnt_is_refused(conversations: Any, tokenizer: Any) -> None:
    """Conversations that are cut after a turn, by a template whose turns end in a mark of its own."""
    data = conversations([[news(i), "short", news(i + 50), "long " * 80] for i in range(5)])
    report = report_of(data, tokenizer, length=128, template=CHAT.replace("\n", "<|end|>"))
    assert report["eos"] == {"token": "</s>", "rows_that_learn_it": 0}
    assert report["shortened"]["turns"] == report["shortened"]["rows"] == 5
    refused = refusal(report, data)
    assert refused.where == "data.min_eos_share" and "none of 5 training rows learns" in refused.rule
    passes(report, data, min_eos_share=0.0)


def test_ends_that_are_learnt_are_counted(conversations: Any, tokenizer: Any) -> None:
    data = conversations([[news(i), "short", news(i + 50), "long " * (80 if i < 2 else 1)] for i in range(5)])
    report = report_of(data, tokenizer, length=128, template=CHAT.replace("\n", "<|end|>"))
    assert report["eos"]["rows_that_learn_it"] == 3
    passes(report, data)


def test_truncated_answers_are_counted(instructions: Any, tokenizer: Any) -> None:
    data = instructions([(news(i), "long words " * (100 if i < 4 else 1)) for i in range(10)])
    report = report_of(data, tokenizer, length=128)
    cut = report["shortened"]
    assert (cut["rows"], cut["completions"], cut["turns"], cut["texts"]) == (4, 4, 0, 0) and cut["tokens_cut"] > 4 * 100
    assert report["eos"]["rows_that_learn_it"] == 10
    assert any("4 of 10 training answers (40.0%) are shortened" in note for note in report["notes"])
    assert report["tokens"]["train"]["p100"] == 128


def test_a_doubled_beginning_is_noted(conversations: Any, tokenizer: Any) -> None:
    report = report_of(conversations([[news(i), "yes"] for i in range(3)]), tokenizer, template="<s><s>" + CHAT)
    assert report["bos"] == {"token": "<s>", "rows_by_count": {"2": 3}}
    assert any("begin with <s> more than once" in note for note in report["notes"])


def test_figures_add_up(labelled: Any, tokenizer: Any) -> None:
    data = labelled([(news(i) * (1 + i % 3), "ab"[i % 2]) for i in range(50)], [(news(i), "a") for i in range(200, 210)])
    report = report_of(data, tokenizer)
    for split, rows in report["rows"].items():
        if rows:
            assert sum(report["tokens"][split]["histogram"]["rows"]) == rows == sum(report["labels"][split].values())
    assert report["train_tokens"]["sum"] == sum(len(r.ids) for r in data.train_rows)
    assert report["train_tokens"]["supervised"] == sum(r.supervised for r in data.train_rows)
    json.dumps(report, allow_nan=False)


# ------------------------------------------------------------------------------------------------------------ the pages

SECRETS = ("jane.doe@example.com", "415-555-2671", "123-45-6789", "Jane Doe", "Roe")


class Page(HTMLParser):
    """The tags of a page and the text of its marks."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.marked: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.inside |= tag == "mark"

    def handle_endtag(self, tag: str) -> None:
        self.inside &= tag != "mark"

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.marked.append(data)


def test_personal_data_is_counted_and_in_no_file(instructions: Any, tokenizer: Any, tmp_path: Path) -> None:
    told = "Patient: Jane Doe writes to jane.doe@example.com, calls 415-555-2671"
    data = instructions(
        [(told, "Dear Mrs. Roe, your number 123-45-6789 is noted."), (told + ".", "Other"), (told, "Nothing"), ("Hi", "Hello")]
    )
    report = report_of(data, tokenizer)
    counts = {kind: found["count"] for kind, found in report["personal"].items()}
    assert counts == {"email": 3, "phone": 3, "national_id": 1, "patient_name": 3, "titled_name": 1}
    assert report["personal"]["email"]["rows"]["train"] == 3
    assert report["conflicts"]["texts"] == 1 and report["duplicates"]["near"]["pairs"] == 1
    write_report(report, tmp_path)
    for file in tmp_path.glob("data_report.*"):
        assert not [secret for secret in SECRETS if secret in file.read_text("utf-8")], file


@pytest.mark.parametrize("causal", [True, False])
def test_a_lower_casing_tokenizer_does_not_bring_names_back(labelled: Any, causal: bool, tmp_path: Path) -> None:
    from lorica.models.base import find_base, load_tokenizer

    uncased = load_tokenizer(find_base("sentence-transformers/all-MiniLM-L6-v2", None))
    uncased.eos_token = "[SEP]"
    data = labelled([("My name is Jane Doe, jane.doe@example.com", "a"), ("Mr. Roe, 415-555-2671", "b")])
    write_report(report_of(data, uncased, causal=causal), tmp_path)
    for file in tmp_path.glob("data_report.*"):
        text = file.read_text("utf-8").casefold()
        assert not [word for word in ("jane", "roe", "2671", "example.com", "example. com") if word in text], file


def test_a_bad_row_does_not_tell_either(labelled: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = [(news(i), "ab"[i % 2]) for i in range(4)] + [("moved", "jane.doe@example.com"), ("moved", "john.roe@example.com")]
    report = report_of(labelled(rows, labels=["a", "b"], on_bad_rows="skip"), tokenizer)
    why = "has the unknown label '••••.•••@•••••••.•••'"
    assert report["skipped_bad_rows"] == {"count": 2, "by_reason": {why: 2}, "first": [f"train.csv:6 {why}", f"train.csv:7 {why}"]}


def test_hostile_rows_stay_text(instructions: Any, tokenizer: Any, tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script><img src=x onerror=alert(1)> ``` | x | \u202egnp.exe \x1b[31m"
    data = instructions([(evil + news(i), evil + "</mark>&lt;") for i in range(3)] + [(evil + news(0), "other")])
    write_report(report_of(data, tokenizer), tmp_path)
    page = Page((tmp_path / "data_report.html").read_text("utf-8"))
    assert not page.tags & {"script", "img", "link", "iframe"} and not [a for a in page.attributes if a.startswith("on")]
    assert any("<script>alert(1)</script>" in text for text in page.marked)
    for file in tmp_path.glob("data_report.[mh]*"):
        assert not re.search("[\x1b\u202e]", file.read_text("utf-8"))
    markdown = (tmp_path / "data_report.md").read_text("utf-8")
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "````text" in markdown and not re.search(r"(?<!\\)<script", outside)


ANYTHING = st.text(max_size=80) | st.sampled_from(
    ["<script>", "|", "```", "\u202e", "\x00", "a@b.co", "\ufeff", "Mr. A B", "</mark>", "&lt;"]
)


@given(rows=st.lists(ANYTHING.map(lambda text: text + "x"), min_size=1, max_size=8), causal=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_rows_have_a_report(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory, rows: list[str], causal: bool) -> None:
    folder = tmp_path_factory.mktemp("rows")
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": t, "label": "ab"[i % 2]}) + "\n" for i, t in enumerate(rows)))
    config = ClassificationDataConfig(
        **(WHOLE | {"module": "classification", "path": str(folder), "labels": ["a", "b"], "on_bad_rows": "skip"})
    )
    report = report_of(ClassificationData(config), tokenizer, causal=causal)
    write_report(report, folder)
    assert json.loads((folder / "data_report.json").read_text("utf-8"))["rows"]["train"] == report["rows"]["train"]
    assert not Page((folder / "data_report.html").read_text("utf-8")).tags & {"script", "img"}


def test_learnt_text_is_marked(instructions: Any, tokenizer: Any, tmp_path: Path) -> None:
    write_report(report_of(instructions([("What is up?", "Not much.")], prompt_template="{prompt}\n"), tokenizer), tmp_path)
    assert Page((tmp_path / "data_report.html").read_text("utf-8")).marked == ["What is learnt", "Not much.</s>"]
    assert "<s>What is up?\n⟦Not much.</s>⟧" in (tmp_path / "data_report.md").read_text("utf-8")


def test_the_report_needs_no_held_out_rows(labelled: Any, tokenizer: Any, tmp_path: Path) -> None:
    data = labelled([(news(i), "ab"[i % 2]) for i in range(4)])
    report = report_of(data, tokenizer, causal=False)
    passes(report, data)
    write_report(report, tmp_path)
    assert "| test | 0 |" in (tmp_path / "data_report.md").read_text("utf-8")
