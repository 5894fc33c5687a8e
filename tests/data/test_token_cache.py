"""Rows from the cache are the rows that encoding makes, whatever they hold; what they depend on is in a file's name; a file that can't be
trusted, read or written costs time and nothing else."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lorica.config import ClassificationDataConfig
from lorica.data import token_cache
from lorica.data.encoding import Candidates, CausalEncoder, ClassifierEncoder, Encoded, Truncation
from lorica.data.examples import Example, Message
from lorica.data.modules import ClassificationData
from lorica.data.token_cache import TokenCache, encoder_key, folder, rows_key

CHEAP = settings(max_examples=25, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEMPLATE = "{{bos_token}}{% for m in messages %}[{{m.role}}] {{m.content}}{{ eos_token if m.role=='assistant' }}{% endfor %}"
LABELS = ["yes", "very bad", "yes and no"]


def byte_tokenizer(template: str | None = None, extra: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a byte, with bos and eos around a text."""
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *extra]
    inner = Tokenizer(BPE({token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *letters])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = template
    return fast


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, that keeps small sets too."""
    monkeypatch.setenv("LORICA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "FEWEST", 1)
    return tmp_path / "cache" / "tokens"


def plain(row: Encoded | Candidates) -> Any:
    return row if isinstance(row, Candidates) else (row.ids, row.labels, row.label, row.supervised)


def run(encoder: Any, examples: Sequence[Example], scored: bool = False) -> tuple[list[Any], Truncation, TokenCache]:
    tokens, truncation = TokenCache(encoder), Truncation(turns=1)
    rows: list[Any] = tokens.candidates(examples) if scored else tokens.rows(examples, truncation)
    return [plain(row) for row in rows], truncation, tokens


def causal(limit: int = 64, template: str | None = None, **settings: Any) -> CausalEncoder:
    return CausalEncoder(byte_tokenizer(template), limit, label_names=LABELS, **settings)


def labelled(*texts: str) -> list[Example]:
    return [Example("", text=text, label=i % 3, prompt=f"{text}?") for i, text in enumerate(texts)]


THREE = labelled("a", "b", "c")

# --------------------------------------------------------------------------------------------------------- the same rows

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="<>"), min_size=1, max_size=40)
CLASSIFIED = st.builds(lambda text, label: Example("", text=text, label=label, prompt=text), TEXT, st.sampled_from([None, -1, 0, 2]))
LABELLED = st.builds(lambda text, label: Example("", text=text, label=label, prompt=text), TEXT, st.integers(0, 2))
ASKED = st.builds(lambda prompt, answer: Example("", prompt=prompt, completion=answer), TEXT, TEXT | st.just(""))
CHAT = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3).map(
    lambda pairs: Example("", messages=tuple(m for a, b in pairs for m in (Message("user", a), Message("assistant", b))))
)


def check(encoder: Any, examples: list[Example], scored: bool = False) -> None:
    made, cut, first = run(encoder, examples, scored)
    found, cut_again, second = run(encoder, examples, scored)
    bare = Truncation(turns=1)
    assert found == made == [plain(r) for r in (encoder.candidates(examples) if scored else encoder.encode(examples, bare))]
    assert scored or cut == cut_again == bare
    assert second.found == first.found + first.made == len(examples) and second.made == 0


@CHEAP
@given(st.lists(CLASSIFIED, min_size=1, max_size=5), st.integers(8, 60))
def test_rows_of_classifiers_come_back_as_they_were(examples: list[Example], limit: int) -> None:
    check(ClassifierEncoder(byte_tokenizer(), limit), examples)


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "template"])
@CHEAP
@given(examples=st.lists(LABELLED | ASKED | CHAT, min_size=1, max_size=5), limit=st.integers(8, 90))
def test_rows_of_causal_models_come_back_as_they_were(template: str | None, examples: list[Example], limit: int) -> None:
    check(causal(limit, template), examples)


@CHEAP
@given(st.lists(CLASSIFIED, min_size=1, max_size=4), st.integers(20, 90))
def test_candidates_come_back_as_they_were(examples: list[Example], limit: int) -> None:
    check(causal(limit), examples, scored=True)


def test_found_rows_leave_the_tokenizer_as_tokenising_does() -> None:
    states = []
    for _ in range(2):
        encoder = ClassifierEncoder(byte_tokenizer(), 9)
        run(encoder, THREE)
        states.append(encoder.tokenizer.backend_tokenizer.to_str())
    assert states[0] == states[1]


# ----------------------------------------------------------------------------------------------------------------- keys


def key(encoder: Any, examples: Sequence[Example] = THREE, kind: str = "rows") -> str:
    return rows_key(encoder_key(encoder), kind, examples)


def test_a_key_holds_all_that_rows_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [
        key(causal()),
        key(causal(), kind="candidates"),
        key(causal(65)),
        key(causal(template=TEMPLATE)),
        key(causal(template=TEMPLATE + " ")),
        key(causal(template=TEMPLATE, use_chat_template=False)),
        key(CausalEncoder(byte_tokenizer(), 64, label_names=LABELS[::-1])),
        key(CausalEncoder(byte_tokenizer(extra=["more"]), 64, label_names=LABELS)),
        key(ClassifierEncoder(byte_tokenizer(), 64)),
        key(causal(), THREE[::-1]),
        key(causal(), THREE[:2]),
    ]
    monkeypatch.setattr(token_cache.importlib.metadata, "version", lambda package: "0")
    keys.append(key(causal()))
    assert len(set(keys)) == len(keys)


def test_a_key_does_not_depend_on_what_the_tokenizer_did_before() -> None:
    encoder = ClassifierEncoder(byte_tokenizer(), 64)
    before = key(encoder)
    encoder.tokenizer(["a", "b"], padding=True, truncation=True, max_length=4)
    assert key(encoder) == before == key(ClassifierEncoder(byte_tokenizer(), 64))


def test_a_changed_encoder_reads_no_old_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(causal())
    changed = tmp_path / "encoding.py"
    changed.write_bytes(Path(str(token_cache.encoding.__file__)).read_bytes() + b"\n")
    monkeypatch.setattr(token_cache.encoding, "__file__", str(changed))
    assert key(causal()) != before


def test_a_template_that_writes_the_day_holds_for_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = causal(template=TEMPLATE + "{{ strftime_now('%d') }}")
    before = key(encoder)

    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date.today() + timedelta(days=1)

    monkeypatch.setattr(token_cache, "date", Tomorrow)
    assert key(encoder) != before and key(causal()) == key(causal())


A, B = Message("user", "a"), Message("assistant", "b")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([Example("", text="ab")], [Example("", prompt="ab")]),
        ([Example("", prompt="a", completion="b")], [Example("", prompt="ab")]),
        ([Example("", prompt="a")], [Example("", completion="a")]),
        ([Example("", text="a", label=None)], [Example("", text="a", label=-1)]),
        ([Example("", text="a"), Example("", text="b")], [Example("", text="ab"), Example("", text="")]),
        ([Example("", messages=(A, B))], [Example("", messages=(A, dataclasses.replace(B, role="user")))]),
        ([Example("", messages=(A, B)), Example("", messages=())], [Example("", messages=(A,)), Example("", messages=(B,))]),
        ([Example("", text="é")], [Example("", text="e\u0301")]),
        ([Example("", text="\ud83d\ude00")], [Example("", text="\U0001f600")]),
    ],
)
def test_different_examples_have_different_keys(one: list[Example], other: list[Example]) -> None:
    assert rows_key(b"", "rows", one) != rows_key(b"", "rows", other)


def test_where_a_row_came_from_does_not_matter() -> None:
    assert rows_key(b"", "rows", [Example("a.csv:1", text="a")]) == rows_key(b"", "rows", [Example("b.csv:9", text="a")])


# ---------------------------------------------------------------------------------------------------------------- files


def test_the_folder_is_the_users_to_choose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert folder() == tmp_path / "cache" / "tokens"
    monkeypatch.delenv("LORICA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert folder() == Path("/x/lorica/tokens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert folder() == Path("/h/.cache/lorica/tokens")


def the_file(cache: Path) -> Path:
    (file,) = cache.iterdir()
    return file


def other_rows(content: bytes, file: Path) -> bytes:
    """A sound file of the same name, whose checksum says that it is of another."""
    token_cache.write(file.with_name("x.npz"), token_cache._pack_rows([Encoded([7, 7])] * 3))
    return file.with_name("x.npz").rename(file).read_bytes()


DAMAGE = {
    "empty": lambda content, file: b"",
    "cut short": lambda content, file: content[: len(content) // 2],
    "a wrong byte": lambda content, file: content[:200] + bytes([content[200] ^ 1]) + content[201:],
    "not a zip file": lambda content, file: b"rows",
    "rows of others": other_rows,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_made_again(cache: Path, damage: Any) -> None:
    rows, _, _ = run(causal(), THREE)
    file = the_file(cache)
    sound = file.read_bytes()
    file.write_bytes(damage(sound, file))
    again, _, tokens = run(causal(), THREE)
    assert again == rows and tokens.made == 3 and tokens.found == 0
    again, _, tokens = run(causal(), THREE)
    assert again == rows and tokens.found == 3
    assert the_file(cache) == file


def test_pickled_contents_are_not_read(cache: Path) -> None:
    run(causal(), THREE)
    file = the_file(cache)
    with file.open("wb") as out:
        np.savez(out, ids=np.array([{"a": 1}], dtype=object))
    assert token_cache.read(file) is None and not file.exists()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("LORICA_CACHE", str(tmp_path / "file"))
    rows, _, tokens = run(causal(), THREE)
    assert len(rows) == tokens.made == 3


def test_a_full_disk_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache.os, "fsync", full)
    rows, _, _ = run(causal(), THREE)
    assert len(rows) == 3 and not list(cache.iterdir())


def test_files_used_longest_ago_go_first(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [labelled(*"abc"), labelled(*"def"), labelled(*"ghi")]
    for i, examples in enumerate(sets[:2]):
        run(causal(), examples)
        os.utime(cache / f"{key(causal(), examples)}.npz", (i, i))
    run(causal(), sets[0])  # used again
    left = cache / ".left.tmp"
    left.write_bytes(b"")
    os.utime(left, (0, 0))
    ours = cache / ".written.tmp"
    ours.write_bytes(b"")
    size = (cache / f"{key(causal(), sets[0])}.npz").stat().st_size
    monkeypatch.setattr(token_cache, "LIMIT", 2.5 * size)
    run(causal(), sets[2])
    assert set(cache.iterdir()) == {ours, *(cache / f"{key(causal(), sets[i])}.npz" for i in (0, 2))}


def test_what_is_larger_than_all_may_be_is_not_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "LIMIT", 10)
    run(causal(), THREE)
    assert not cache.exists()


def test_many_at_once_get_the_same_rows(cache: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: run(causal(), THREE)[0], range(24)))
    assert all(rows == made[0] for rows in made) and len(list(cache.iterdir())) == 1


# ---------------------------------------------------------------------------------------------------------- data modules


def data_module(tmp_path: Path, **values: Any) -> ClassificationData:
    file = tmp_path / "rows.csv"
    file.write_text("text,label\n" + "".join(f"row {i},{'xy'[i % 2]}\n" for i in range(60)))
    config = ClassificationDataConfig(name="a", module="classification", source="files", path=str(file), **values)
    data = ClassificationData(config)
    data.load()
    return data


@pytest.mark.parametrize("kind", ["causal", "classifier"])
def test_a_data_module_finds_all_its_splits_again(tmp_path: Path, kind: str) -> None:
    made = []
    for _ in range(2):
        data, told = data_module(tmp_path), []
        tokenizer = byte_tokenizer()
        encoder = CausalEncoder(tokenizer, 64, label_names=data.labels or []) if kind == "causal" else ClassifierEncoder(tokenizer, 64)
        data.encode(encoder, lambda done, total, told=told: told.append((done, total)))  # type: ignore[misc]
        made.append([[plain(r) for r in rows] for rows in (data.train_rows, *data.eval_rows.values())])
        assert told[-1] == (60, 60) and [done for done, _ in told] == sorted(done for done, _ in told)
    assert made[0] == made[1] and data.tokens.found == 60 and data.tokens.made == 0


def test_token_cache_false_neither_reads_nor_writes(tmp_path: Path, cache: Path) -> None:
    data = data_module(tmp_path, token_cache=False)
    data.encode(ClassifierEncoder(byte_tokenizer(), 64))
    assert not cache.exists() and data.tokens.made == 60


def test_small_sets_are_not_kept(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "FEWEST", 2_000)
    data_module(tmp_path).encode(ClassifierEncoder(byte_tokenizer(), 64))
    assert not cache.exists()


def test_an_encoder_of_others_is_not_kept(cache: Path) -> None:
    class Own(CausalEncoder):
        pass

    run(Own(byte_tokenizer(), 64), [Example("", prompt="a", completion="b")])
    assert not cache.exists()
