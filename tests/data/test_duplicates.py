"""Near duplicates: what is found is what comparing all pairs finds, planted edits are found, order and crowds don't matter."""

from __future__ import annotations

import csv
import random
import time
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.data.duplicates import LEAST, SHINGLE, near_duplicates, normalise, without_wording
from lorica.data.readers import SAMPLES

SENTENCE = "the doctor said that pain in my left arm may come from sleeping badly on a very old mattress near cold windows"
WORDS = SENTENCE.split()
EDITS = {
    "case and punctuation": lambda words, i, text: text.upper().replace(",", " -").replace(".", "!") + " ...",
    "passed on": lambda words, i, text: f"RT @someone: {text} https://t.co/aB3dE",
    "typing mistake": lambda words, i, text: " ".join([*words[:i], words[i][::-1], *words[i + 1 :]]),
    "word left out": lambda words, i, text: " ".join(words[:i] + words[i + 1 :]),
    "word put in": lambda words, i, text: " ".join([*words[:i], "really", *words[i:]]),
    "word replaced": lambda words, i, text: " ".join([*words[:i], "thing", *words[i + 1 :]]),
    "end cut off": lambda words, i, text: text[: len(text) * 9 // 10],
}


def found(texts: list[str], threshold: float = 0.7) -> set[tuple[int, int]]:
    """Every pair of texts that groups and links say is alike."""
    alike = near_duplicates(texts, threshold)
    pairs = {pair for group in alike.groups for pair in combinations(group, 2)}
    for one, other, _ in alike.links:
        pairs |= {(min(a, b), max(a, b)) for a in alike.groups[one] for b in alike.groups[other]}
    return pairs


def similarity(one: str, other: str) -> float:
    a, b = ({t[i : i + SHINGLE] for i in range(len(t) - SHINGLE + 1)} for t in (normalise(one), normalise(other)))
    return len(a & b) / len(a | b)


def edited(text: str, kind: str, draw: random.Random) -> str:
    words = text.split()
    return EDITS[kind](words, draw.choice([i for i, word in enumerate(words[1:-1], 1) if len(word) > 3]), text)


def sample_texts(name: str, columns: slice) -> list[str]:
    """The packaged texts of twelve words or more."""
    with (SAMPLES / name / "train.csv").open(encoding="utf-8", newline="") as file:
        texts = (". ".join(row[columns]) for row in csv.reader(file))
        return sorted({text for text in texts if len(text.split()) >= 12})


def test_what_is_found_is_what_comparing_all_pairs_finds() -> None:
    draw = random.Random(5)
    texts = []
    for _ in range(60):  # families of texts that differ in more and more words
        words = draw.choices(WORDS, k=draw.randint(8, 30))
        for changes in range(5):
            for _ in range(changes):
                words[draw.randrange(len(words))] = draw.choice(WORDS)
            texts.append(" ".join(words))
    true = {(a, b): similarity(texts[a], texts[b]) for a, b in combinations(range(len(texts)), 2)}
    alike = {pair for pair, s in true.items() if s >= 0.7}
    said = found(texts)
    assert len(alike) > 50
    assert said <= alike
    assert len(said) >= 0.99 * len(alike)


@pytest.mark.parametrize(("name", "columns"), [("ag_news", slice(1, 3)), ("sentiment", slice(1))])
def test_planted_edits_are_found_and_nothing_else(name: str, columns: slice) -> None:
    draw = random.Random(0)
    texts = sample_texts(name, columns)
    kinds = [list(EDITS)[i % len(EDITS)] for i in range(len(texts))]
    planted = {(i, i + len(texts)) for i in range(len(texts))}
    said = found([*texts, *(edited(text, kind, draw) for text, kind in zip(texts, kinds, strict=True))])
    assert len(texts) > 300
    assert len(said & planted) >= 0.95 * len(planted)
    assert said <= planted


@given(st.lists(st.lists(st.sampled_from(WORDS[:12]), min_size=5, max_size=9).map(" ".join), max_size=14), st.randoms())
@settings(max_examples=60, deadline=None)
def test_the_order_of_texts_does_not_matter(texts: list[str], draw: random.Random) -> None:
    order = list(range(len(texts)))
    draw.shuffle(order)
    again = {tuple(sorted((order[a], order[b]))) for a, b in found([texts[i] for i in order])}
    assert again == found(texts)


@given(st.lists(st.text(max_size=60), max_size=20))
@settings(max_examples=100, deadline=None)
def test_any_text_can_be_compared(texts: list[str]) -> None:
    alike = near_duplicates(texts, 0.7)
    assert all(len(normalise(texts[i])) >= LEAST for group in alike.groups for i in group)
    assert all(a < b and 0.7 <= s < 1.0 for a, b, s in alike.links)


def test_the_same_text_in_other_dress_is_one_group() -> None:
    plain = "Storm closes the harbour for a third day"
    assert near_duplicates([plain, f"{plain.upper()}!", f"@port {plain} http://x.y/z"], 0.7).groups == [[0, 1, 2]]


def test_links_and_names_are_left_out_wherever_they_stand() -> None:
    assert normalise("@ann See www.x.org/a?b=1 for @bob's (https://t.co/xY) Plan_B, a@b.org!") == "see for s plan b a b org"


def test_short_texts_are_not_compared() -> None:
    assert found(["good morning", "Good morning!", "good mornings"]) == set()


def test_texts_without_spaces_are_compared() -> None:
    text = "市政府周二宣布将从下个月开始关闭老港口以便修复在风暴中受损的码头和仓库"
    assert found([text, text.replace("周二", "周三"), "完全不同的一句话讲的是足球比赛在昨天晚上以平局结束观众都很失望"]) == {(0, 1)}


def test_a_crowd_of_alike_texts_takes_no_longer_and_each_is_found() -> None:
    texts = [f"departure of ship number {i:05d} from the old harbour at noon, bound for the islands in the north" for i in range(4000)]
    began = time.perf_counter()
    alike = near_duplicates(texts, 0.7)
    assert time.perf_counter() - began < 60
    assert {g for one, other, _ in alike.links for g in (one, other)} == set(range(4000))


def test_wording_that_many_rows_share_is_left_out() -> None:
    questions = [f"what about {word} and {word[::-1]}" for word in WORDS]
    prompts = [f"### Instruction:\nIf you are a doctor, answer as well as you can.\n\n### Input:\n{q}\n" for q in questions]
    assert [text.strip() for text in without_wording(prompts)] == questions
    assert without_wording(prompts[:5]) == prompts[:5]


@pytest.mark.shared
def test_planted_edits_of_real_texts_are_found(shared: Path) -> None:
    draw = random.Random(0)
    with (shared / "data" / "ag_news" / "test.csv").open(encoding="utf-8", newline="") as file:
        texts = [". ".join(row[1:]) for row in csv.reader(file)]
    texts = [text for text in texts if len(text.split()) >= 12][:3000]
    kinds = [list(EDITS)[i % len(EDITS)] for i in range(len(texts))]
    said = found([*texts, *(edited(text, kind, draw) for text, kind in zip(texts, kinds, strict=True))])
    assert sum((i, i + len(texts)) in said for i in range(len(texts))) >= 0.99 * len(texts)
