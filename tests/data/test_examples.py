"""Samples and splits go by content: a sample is part of every larger one, equal content stays together, none stands in two splits, and
what is held out does not depend on the seed."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorica.config import ConfigError, DataConfig
from lorica.data.examples import SPLITS, Example, Message, Splits, hold_out, sample, split_examples

CHEAP = settings(max_examples=25, deadline=None, database=None)

TEXTS = st.lists(st.text("ab ", min_size=1, max_size=4).filter(str.strip), max_size=30)  # few letters: many are equal


def examples(texts: list[str], file: str = "a.csv") -> list[Example]:
    return [Example(f"{file}:{i}", text=text, label=0) for i, text in enumerate(texts)]


def numbered(count: int, first: int = 0, file: str = "a.csv") -> list[Example]:
    return examples([f"text {i}" for i in range(first, first + count)], file)


def config(**values: Any) -> DataConfig:
    return DataConfig(**({"name": "x", "module": "classification", "validation_fraction": 0.0, "test_fraction": 0.0} | values))


def contents(rows: list[Example]) -> set[str]:
    return {e.content for e in rows}


# ------------------------------------------------------------------------------------------------------------- content


def test_content_is_the_text_or_the_prompt_or_all_messages_but_for_case_and_spacing() -> None:
    assert Example("a", text=" Große\n\tFRAGE ", prompt="other", label=1).content == Example("b", text="grosse frage", label=0).content
    assert Example("a", prompt="Why?", completion="so").content == Example("b", prompt="why?", completion="otherwise").content
    one, other = (Example("a", messages=(Message("user", "Hi"), Message("assistant", answer))) for answer in ("Yes", "No"))
    assert one.content == "hi yes" and one.content != other.content


# -------------------------------------------------------------------------------------------------------------- sample


@CHEAP
@given(TEXTS, st.integers(0, 40), st.integers(0, 40), st.sampled_from(["x", "y"]))
def test_a_sample_is_part_of_every_larger_one_in_its_own_order(texts: list[str], a: int, b: int, salt: str) -> None:
    rows = examples(texts)
    small, large = sample(rows, min(a, b), salt), sample(rows, max(a, b), salt)
    assert len(small) == min(a, b, len(rows)) and len(large) == min(max(a, b), len(rows))
    assert [e for e in large if e in small] == small
    assert [e for e in rows if e in large] == large


@CHEAP
@given(st.sets(st.integers(0, 999), max_size=20), st.integers(0, 20), st.randoms(use_true_random=False))
def test_a_sample_goes_by_content_and_not_by_place(names: set[int], count: int, shuffler: Random) -> None:
    texts = [f"text {i}" for i in names]
    moved = shuffler.sample(texts, len(texts))
    assert contents(sample(examples(texts), count, "s")) == contents(sample(examples(moved), count, "s"))


def test_a_sample_of_none_is_everything() -> None:
    assert sample(numbered(7), None, "s") == numbered(7)


def test_another_salt_gives_another_sample() -> None:
    assert sample(numbered(100), 50, "train-0") == sample(numbered(100), 50, "train-0") != sample(numbered(100), 50, "train-1")


# ------------------------------------------------------------------------------------------------------------ hold out


@CHEAP
@given(TEXTS, st.floats(0, 1))
def test_hold_out_keeps_equal_content_together_and_order_within(texts: list[str], fraction: float) -> None:
    rows = examples(texts)
    kept, held = hold_out(rows, fraction, "s")
    assert sorted([*kept, *held], key=rows.index) == rows
    assert kept == [e for e in rows if e in kept] and held == [e for e in rows if e in held]
    assert not contents(kept) & contents(held)


@CHEAP
@given(TEXTS, st.floats(0, 1))
def test_hold_out_stops_at_the_fraction_or_the_first_group_beyond(texts: list[str], fraction: float) -> None:
    rows, wanted = examples(texts), round(len(texts) * fraction)
    held = hold_out(rows, fraction, "s")[1]
    largest = max(Counter(e.content for e in held).values(), default=1)
    assert wanted <= len(held) < wanted + largest


@CHEAP
@given(TEXTS, st.floats(0, 1), st.floats(0, 1))
def test_a_smaller_fraction_holds_out_part_of_what_a_larger_one_does(texts: list[str], a: float, b: float) -> None:
    rows = examples(texts)
    small, large = (contents(hold_out(rows, f, "s")[1]) for f in sorted((a, b)))
    assert small <= large


# -------------------------------------------------------------------------------------------------------------- splits


@CHEAP
@given(
    st.fixed_dictionaries({"train": TEXTS}, optional={"validation": TEXTS, "test": TEXTS}),
    st.floats(0, 0.4),
    st.floats(0, 0.4),
    st.sampled_from(["train", "test"]),
    st.tuples(*[st.none() | st.integers(1, 20)] * 3),
)
def test_no_content_stands_in_two_splits_and_every_row_is_from_the_source(
    texts: dict[str, list[str]], validation: float, test: float, source: str, limits: tuple[int | None, ...]
) -> None:
    given_rows = {split: examples(of_split, split) for split, of_split in texts.items()}
    most = dict(zip(("max_train_examples", "max_validation_examples", "max_test_examples"), limits, strict=True))
    try:
        splits = split_examples(given_rows, config(validation_fraction=validation, test_fraction=test, validation_from=source, **most), 0)
    except ConfigError as e:
        assert "nothing" in str(e) or "no rows are left" in str(e)
        return
    by_split = [contents(splits[split]) for split in SPLITS]
    assert not (by_split[0] & by_split[1] or by_split[0] & by_split[2] or by_split[1] & by_split[2])
    origins = [e.origin for split in SPLITS for e in splits[split]]
    assert len(origins) == len(set(origins)) and set(origins) <= {e.origin for rows in given_rows.values() for e in rows}
    assert all(limit is None or len(splits[split]) <= limit for split, limit in zip(SPLITS, limits, strict=True))


@CHEAP
@given(st.fixed_dictionaries({"train": TEXTS}, optional={"validation": TEXTS, "test": TEXTS}), st.floats(0, 0.4), st.floats(0, 0.4))
def test_every_row_is_in_a_split_or_counted_as_dropped(texts: dict[str, list[str]], validation: float, test: float) -> None:
    given_rows = {split: examples(of_split, split) for split, of_split in texts.items()}
    try:
        splits = split_examples(given_rows, config(validation_fraction=validation, test_fraction=test), 0)
    except ConfigError:
        assume(False)
    assert sum(len(splits[split]) for split in SPLITS) + sum(splits.dropped_as_duplicates.values()) == sum(map(len, texts.values()))


def sizes(splits: Splits) -> tuple[int, ...]:
    return tuple(len(splits[split]) for split in SPLITS)


def test_missing_splits_are_cut_from_training_as_shares_of_all_rows() -> None:
    splits = split_examples({"train": numbered(1000)}, config(validation_fraction=0.05, test_fraction=0.2), 0)
    assert sizes(splits) == (750, 50, 200)
    assert splits.sources == {"train": "given", "test": "20% of train", "validation": "5% of train"}
    assert splits.dropped_as_duplicates == {"validation": 0, "train": 0}


def test_given_splits_are_left_whole() -> None:
    rows = {"train": numbered(100), "validation": numbered(10, 100), "test": numbered(20, 200)}
    splits = split_examples(rows, config(validation_fraction=0.5, test_fraction=0.5), 0)
    assert {split: splits[split] for split in SPLITS} == rows
    assert set(splits.sources.values()) == {"given"}


def test_validation_is_a_share_of_training_where_test_is_given() -> None:
    rows = {"train": numbered(100), "test": numbered(40, 200)}
    assert sizes(split_examples(rows, config(validation_fraction=0.1, test_fraction=0.9), 0)) == (90, 10, 40)


def test_validation_from_test_leaves_training_alone() -> None:
    rows = {"train": numbered(100), "test": numbered(40, 200)}
    splits = split_examples(rows, config(validation_fraction=0.25, validation_from="test"), 0)
    assert sizes(splits) == (100, 10, 30)
    assert splits.train == rows["train"] and contents(splits.validation) | contents(splits.test) == contents(rows["test"])
    assert splits.sources["validation"] == "25% of test"


def test_validation_from_test_is_cut_from_the_part_that_was_cut_from_training() -> None:
    of = config(validation_fraction=0.5, test_fraction=0.2, validation_from="test")
    assert sizes(split_examples({"train": numbered(100)}, of, 0)) == (80, 10, 10)


def test_a_fraction_of_nothing_holds_out_nothing() -> None:
    assert sizes(split_examples({"train": numbered(10)}, config(), 0)) == (10, 0, 0)


def test_rows_that_stand_in_a_held_out_split_are_dropped_from_the_others_and_counted() -> None:
    rows = {
        "train": examples(["One ", "two", "two", "three", "four"], "train"),
        "validation": examples(["TWO", "five", "one"], "validation"),
        "test": examples(["one", "five", "five"], "test"),
    }
    splits = split_examples(rows, config(), 0)
    assert [e.text for e in splits.train] == ["three", "four"]
    assert [e.text for e in splits.validation] == ["TWO"]
    assert [e.text for e in splits.test] == ["one", "five", "five"]
    assert splits.dropped_as_duplicates == {"validation": 2, "train": 3}


def test_duplicates_within_training_stay() -> None:
    assert sizes(split_examples({"train": examples(["a", "a", "b"])}, config(), 0)) == (3, 0, 0)


def test_limits_take_a_sample_of_each_split_after_the_cut() -> None:
    limits = {"max_train_examples": 30, "max_validation_examples": 20, "max_test_examples": 10}
    shares = {"validation_fraction": 0.25, "test_fraction": 0.25}
    cut, whole = (split_examples({"train": numbered(200)}, config(**shares, **more), 0) for more in (limits, {}))
    assert sizes(whole) == (100, 50, 50) and sizes(cut) == (30, 20, 10)
    assert all(contents(cut[split]) < contents(whole[split]) for split in SPLITS)


def test_max_examples_bounds_the_rows_before_any_is_held_out() -> None:
    splits = split_examples({"train": numbered(200)}, config(validation_fraction=0.1, test_fraction=0.1, max_examples=50), 0)
    assert sizes(splits) == (40, 5, 5)


def test_the_seed_chooses_the_training_sample_and_nothing_else() -> None:
    limits = {"max_examples": 100, "max_train_examples": 30, "max_validation_examples": 10, "max_test_examples": 10}
    of = config(validation_fraction=0.2, test_fraction=0.2, **limits)
    one, again, other = (split_examples({"train": numbered(200)}, of, seed) for seed in (1, 1, 2))
    assert one == again
    assert one.train != other.train and (one.validation, one.test) == (other.validation, other.test)


def test_a_larger_training_sample_of_the_same_seed_has_the_smaller_one_in_it() -> None:
    small, large = (split_examples({"train": numbered(100)}, config(max_train_examples=n), 5) for n in (10, 20))
    assert contents(small.train) < contents(large.train)


@pytest.mark.parametrize(
    "rows",
    [{"train": []}, {"train": examples(["a", "A"]), "test": examples(["a"])}, {"train": [], "test": numbered(5)}],
    ids=["none", "all in test", "test only"],
)
def test_nothing_to_train_on_is_refused(rows: dict[str, list[Example]]) -> None:
    with pytest.raises(ConfigError, match="data=x: no rows are left to train on"):
        split_examples(rows, config(), 0)
