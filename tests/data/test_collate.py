"""Rows become tensors exactly, and the padded and the flat layout ask the model for the same (previous token, next token) pairs."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.data.collate import collate_candidates, collate_causal, collate_classifier, flat, inputs, pad
from lorica.data.encoding import IGNORE, Candidates, Encoded

CHEAP = settings(max_examples=25, deadline=None, database=None)
PAD = 0

ROWS = [Encoded([1, 5, 6, 2], [IGNORE, IGNORE, 6, 2]), Encoded([1, 7, 2], [IGNORE, IGNORE, 2])]
SCORED = [
    Candidates([[1, 5, 8], [1, 5, 9]], [[(0, 1, 8), (0, 2, 3)], [(1, 1, 9), (1, 2, 4)], [(0, 1, 7)]], 1),
    Candidates([[1, 6]], [[(0, 1, 8)], [(0, 1, 9)], [(0, 1, 7)]], -1),
]


def same(value: torch.Tensor, expected: list[Any], dtype: torch.dtype = torch.int64) -> bool:
    return value.dtype == dtype and value.tolist() == expected


def pairs(batch: dict[str, Any]) -> list[tuple[int, int]]:
    """(token that is read, token to predict) at every place."""
    return list(zip(batch["input_ids"].flatten()[batch["predict_at"]].tolist(), batch["targets"].tolist(), strict=True))


def test_padding_is_on_the_side_that_is_asked_for_and_masked() -> None:
    ids, mask = pad([[3, 4, 5], [6]], 9)
    assert same(ids, [[3, 4, 5], [6, 9, 9]]) and same(mask, [[1, 1, 1], [1, 0, 0]])
    ids, mask = pad([[3, 4, 5], [6]], 9, left=True)
    assert same(ids, [[3, 4, 5], [9, 9, 6]]) and same(mask, [[1, 1, 1], [0, 0, 1]])


def test_flat_rows_lie_end_to_end_with_their_boundaries() -> None:
    batch = flat([[11, 12, 13], [14], [15, 16]])
    assert same(batch["input_ids"], [[11, 12, 13, 14, 15, 16]])
    assert same(batch["position_ids"], [[0, 1, 2, 0, 0, 1]])
    assert same(batch["cu_seqlens"], [0, 3, 4, 6], torch.int32)
    assert batch["max_seqlen"] == 3 and isinstance(batch["max_seqlen"], int)


def test_inputs_say_where_each_row_begins() -> None:
    assert inputs([[1, 2, 3], [4], [5, 6]], PAD, padded=False)[1] == [0, 3, 4]
    assert inputs([[1, 2, 3], [4], [5, 6]], PAD, padded=True)[1] == [0, 3, 6]


def test_a_padded_causal_batch_is_exact() -> None:
    batch = collate_causal(ROWS, PAD, padded=True)
    assert set(batch) == {"input_ids", "attention_mask", "predict_at", "targets"}
    assert same(batch["input_ids"], [[1, 5, 6, 2], [1, 7, 2, 0]])
    assert same(batch["attention_mask"], [[1, 1, 1, 1], [1, 1, 1, 0]])
    assert same(batch["predict_at"], [1, 2, 5])
    assert same(batch["targets"], [6, 2, 2])


def test_a_flat_causal_batch_is_exact() -> None:
    batch = collate_causal(ROWS, PAD, padded=False)
    assert set(batch) == {"input_ids", "position_ids", "cu_seqlens", "max_seqlen", "predict_at", "targets"}
    assert same(batch["input_ids"], [[1, 5, 6, 2, 1, 7, 2]])
    assert same(batch["predict_at"], [1, 2, 5])
    assert same(batch["targets"], [6, 2, 2])


def test_a_rows_first_token_is_never_predicted_from_the_row_before() -> None:
    rows = [Encoded([5, 6], [5, 6]), Encoded([7, 8], [7, 8])]
    for padded in (True, False):
        assert pairs(collate_causal(rows, PAD, padded)) == [(5, 6), (7, 8)]


def test_a_batch_with_nothing_to_learn_has_no_places() -> None:
    for padded in (True, False):
        batch = collate_causal([Encoded([5, 6], [IGNORE, IGNORE])], PAD, padded)
        assert same(batch["predict_at"], []) and same(batch["targets"], [])


def test_a_classifiers_batch_is_exact() -> None:
    rows = [Encoded([1, 5, 2], label=2), Encoded([1, 2], label=0)]
    right, left = collate_classifier(rows, 9), collate_classifier(rows, 9, left=True)
    assert set(right) == {"input_ids", "attention_mask", "labels"}
    assert same(right["input_ids"], [[1, 5, 2], [1, 2, 9]]) and same(right["attention_mask"], [[1, 1, 1], [1, 1, 0]])
    assert same(left["input_ids"], [[1, 5, 2], [9, 1, 2]]) and same(left["attention_mask"], [[1, 1, 1], [0, 1, 1]])
    assert same(right["labels"], [2, 0])
    flat_batch = collate_classifier(rows, 9, padded=False)
    assert set(flat_batch) == {"input_ids", "position_ids", "cu_seqlens", "max_seqlen", "labels"}
    assert same(flat_batch["input_ids"], [[1, 5, 2, 1, 2]]) and same(flat_batch["labels"], [2, 0])


def test_a_batch_of_candidates_is_exact() -> None:
    batch = collate_candidates(SCORED, PAD, padded=False)
    assert same(batch["input_ids"], [[1, 5, 8, 1, 5, 9, 1, 6]])
    assert same(batch["cu_seqlens"], [0, 3, 6, 8], torch.int32)
    assert same(batch["predict_at"], [1, 2, 4, 5, 1, 7, 7, 7])
    assert same(batch["targets"], [8, 3, 9, 4, 7, 8, 9, 7])
    assert same(batch["slot"], [0, 0, 1, 1, 2, 3, 4, 5])
    assert same(batch["labels"], [1, -1]) and batch["classes"] == 3
    assert same(batch["true_label_tokens"], [2, 0])


def test_padded_candidates_are_read_at_their_padded_places() -> None:
    batch = collate_candidates(SCORED, PAD, padded=True)
    assert same(batch["input_ids"], [[1, 5, 8], [1, 5, 9], [1, 6, 0]])
    assert same(batch["predict_at"], [1, 2, 4, 5, 1, 7, 7, 7])
    shorter_first = collate_candidates(SCORED[::-1], PAD, padded=True)
    assert same(shorter_first["predict_at"], [1, 1, 1, 4, 5, 7, 8, 4])


ENCODED = st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=9).map(
    lambda row: Encoded([t for t, _ in row], [t if learnt else IGNORE for t, learnt in row])
)


@CHEAP
@given(st.lists(ENCODED, min_size=1, max_size=6))
def test_both_layouts_ask_for_the_same_pairs_and_as_many_as_are_supervised(rows: list[Encoded]) -> None:
    expected = [(r.ids[t - 1], r.ids[t]) for r in rows for t in range(1, len(r.ids)) if r.labels[t] != IGNORE]
    assert len(expected) == sum(r.supervised for r in rows)
    for padded in (True, False):
        assert pairs(collate_causal(rows, PAD, padded)) == expected


@st.composite
def candidates(draw: st.DrawFn) -> Candidates:
    sequences = draw(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=6), min_size=1, max_size=3))
    place = st.sampled_from([(s, t) for s, sequence in enumerate(sequences) for t in range(len(sequence))])
    pick = st.tuples(place, st.integers(1, 50)).map(lambda p: (*p[0], p[1]))
    return Candidates(sequences, draw(st.lists(st.lists(pick, min_size=1, max_size=3), min_size=3, max_size=3)), draw(st.integers(-1, 2)))


@CHEAP
@given(st.lists(candidates(), min_size=1, max_size=4))
def test_both_layouts_read_the_same_pairs_of_candidates_into_the_same_slots(rows: list[Candidates]) -> None:
    expected = [(row.sequences[s][t], token) for row in rows for picks in row.picks for s, t, token in picks]
    slots = [i * 3 + label for i, row in enumerate(rows) for label, picks in enumerate(row.picks) for _ in picks]
    for padded in (True, False):
        batch = collate_candidates(rows, PAD, padded)
        assert pairs(batch) == expected and batch["slot"].tolist() == slots
