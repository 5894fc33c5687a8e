"""Flat micro-batches are filled up to very few sizes, which every one of them fits into, at no loss of what is learnt: the plan's batches
all have the sizes that were chosen before training."""

from __future__ import annotations

from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorica.config import ClassificationDataConfig
from lorica.data.batching import BatchPlan
from lorica.data.collate import collate_causal, collate_classifier, fill
from lorica.data.encoding import IGNORE, CausalEncoder, ClassifierEncoder, Encoded
from lorica.data.module import Batching, LoricaDataModule
from lorica.data.registry import build_data
from lorica.data.shapes import MOST, STEP, WORTH, Shape, _sizes, shapes

CHEAP = settings(max_examples=25, deadline=None, database=None)
PAD = 7777  # no real token

ROW = st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=90).map(
    lambda row: Encoded([t for t, _ in row], [t if learnt else IGNORE for t, learnt in row])
)
MICRO_BATCHES = st.lists(st.lists(ROW, min_size=1, max_size=5), min_size=1, max_size=12)


def tokens(rows: list[Encoded]) -> int:
    return sum(len(r.ids) for r in rows)


def shapes_of(batches: list[list[Encoded]]) -> list[Shape]:
    longest = max(len(r.ids) for rows in batches for r in rows)
    return shapes([tokens(b) for b in batches], [len(b) for b in batches], [sum(r.supervised for r in b) for b in batches], longest)


def fitting(found: list[Shape], n: int) -> Shape:
    return next(s for s in found if s.tokens >= n)


# -------------------------------------------------------------------------------------------------------------- shapes


@CHEAP
@given(MICRO_BATCHES)
def test_every_micro_batch_fits_into_its_shape_with_its_fillers(batches: list[list[Encoded]]) -> None:
    found = shapes_of(batches)
    assert found == sorted(found) and 1 <= len(found) <= MOST and all(s.tokens % STEP == 0 for s in found)
    for rows in batches:
        shape = fitting(found, tokens(rows))
        fillers = -(-(shape.tokens - tokens(rows)) // shape.longest)
        assert len(rows) + fillers <= shape.sequences and sum(r.supervised for r in rows) <= shape.targets


@CHEAP
@given(MICRO_BATCHES)
def test_no_shape_is_larger_than_some_micro_batch_needs(batches: list[list[Encoded]]) -> None:
    found = shapes_of(batches)
    for shape in found:
        own = [rows for rows in batches if fitting(found, tokens(rows)) == shape]
        assert max(tokens(rows) for rows in own) > shape.tokens - STEP
        assert max(sum(r.supervised for r in rows) for rows in own) == shape.targets


@CHEAP
@given(st.lists(st.integers(1, 9).map(lambda n: n * STEP), min_size=1, max_size=30))
def test_sizes_are_the_fewest_within_what_another_must_be_worth(rounded: list[int]) -> None:
    values = np.asarray(rounded)

    def cost(chosen: tuple[int, ...]) -> int:
        return int(np.asarray(chosen)[np.searchsorted(chosen, values)].sum())

    below = sorted(set(rounded) - {max(rounded)})
    best = [min(cost((*c, max(rounded))) for c in combinations(below, k)) for k in range(min(MOST, len(below) + 1))]
    allowed = best[-1] + WORTH * sum(rounded)
    found = _sizes(values)
    assert found == sorted(set(found)) and found[-1] == max(rounded) and set(found) <= set(rounded)
    assert cost(tuple(found)) == best[len(found) - 1] <= allowed
    assert all(fewer > allowed for fewer in best[: len(found) - 1])


def test_packed_batches_that_are_all_nearly_full_need_one_size() -> None:
    assert shapes([8000, 8190, 8192, 8100], [20, 30, 25, 22], [900, 800, 700, 600], 1000) == [Shape(8192, 31, 900, 1000)]


# ---------------------------------------------------------------------------------------------------------------- fill


@CHEAP
@given(MICRO_BATCHES, st.booleans())
def test_a_filled_batch_has_its_shapes_sizes_and_what_it_had(batches: list[list[Encoded]], causal: bool) -> None:
    if not causal:
        batches = [[Encoded(r.ids, label=len(r.ids) % 3) for r in rows] for rows in batches]
    found = shapes_of(batches)
    names = ("predict_at", "targets") if causal else ("labels",)
    for rows in batches:
        bare, shape = (collate_causal if causal else collate_classifier)(rows, PAD, padded=False), fitting(found, tokens(rows))
        batch = fill(dict(bare), shape, PAD)
        assert batch.keys() == bare.keys() and all(batch[k].dtype == v.dtype for k, v in bare.items() if k != "max_seqlen")
        assert batch["input_ids"].shape == batch["position_ids"].shape == (1, shape.tokens)
        assert batch["cu_seqlens"].shape == (shape.sequences + 1,) and batch["max_seqlen"] == shape.longest
        assert all(batch[name].shape == (shape.targets,) for name in names)
        for name in ("input_ids", "position_ids"):
            assert torch.equal(batch[name][:, : tokens(rows)], bare[name])
        for name in ("cu_seqlens", *names):
            assert torch.equal(batch[name][: len(bare[name])], bare[name])
        assert (batch["input_ids"][0, tokens(rows) :] == PAD).all()


@CHEAP
@given(MICRO_BATCHES)
def test_sequences_of_a_filled_batch_end_with_it_none_too_long_and_fillers_teach_nothing(batches: list[list[Encoded]]) -> None:
    found = shapes_of(batches)
    for rows in batches:
        shape = fitting(found, tokens(rows))
        batch = fill(collate_causal(rows, PAD, padded=False), shape, PAD)
        ends = batch["cu_seqlens"].tolist()
        lengths = [b - a for a, b in pairwise(ends)]
        assert ends[0] == 0 and ends[-1] == shape.tokens and all(0 <= n <= shape.longest for n in lengths)
        assert batch["position_ids"][0].tolist() == [i for n in lengths for i in range(n)]
        learnt = batch["targets"] != IGNORE
        assert int(learnt.sum()) == sum(r.supervised for r in rows)
        assert (batch["predict_at"][learnt] < tokens(rows)).all()
        assert batch["predict_at"].tolist() == [at for at in batch["predict_at"].tolist() if 0 <= at < shape.tokens]


# ----------------------------------------------------------------------------------------------------- a whole module


def sizes(batch: dict[str, Any]) -> tuple[Any, ...]:
    """All that a compiled or captured step depends on, besides values."""
    of_rows = ("weight", "count", "rows")
    return tuple(sorted((k, tuple(v.shape) if isinstance(v, torch.Tensor) else v) for k, v in batch.items() if k not in of_rows))


def planned(tiny_mistral: Path, causal: bool, rank: int, world_size: int, **plan: Any) -> LoricaDataModule:
    from lorica.models.base import Base, load_tokenizer

    tokenizer = load_tokenizer(Base("", str(tiny_mistral)))
    config = ClassificationDataConfig(name="sentiment", module="sentiment", source="sample", text_column="text", max_train_examples=150)
    data = build_data(config, 3)
    data.load()
    data.encode(CausalEncoder(tokenizer, 48, False, data.labels or ()) if causal else ClassifierEncoder(tokenizer, 48))
    data.connect(Batching(tokenizer.pad_token_id, padded=False, world_size=world_size, rank=rank, plan=plan))
    return data


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("plan", "ranks"),
    [({"tokens_per_batch": 512, "accumulate": 4, "max_epochs": 2}, 1), ({"batch_size": 7, "accumulate": 3}, 2), ({"batch_size": 1}, 4)],
)
def test_all_batches_of_a_plan_have_the_shapes_sizes(tiny_mistral: Path, causal: bool, plan: dict[str, Any], ranks: int) -> None:
    met: set[tuple[Any, ...]] = set()
    for rank in range(ranks):
        data = planned(tiny_mistral, causal, rank, ranks, **plan)
        plain = list(data.train_dataloader())
        data.fill_batches()
        filled = list(data.train_dataloader())
        assert 1 <= len(data.shapes) <= MOST and len(filled) == len(plain) == len(data.plan)
        for batch, bare in zip(filled, plain, strict=True):
            shape = fitting(data.shapes, bare["input_ids"].numel())
            assert batch["input_ids"].shape == (1, shape.tokens) and batch["cu_seqlens"].shape == (shape.sequences + 1,)
            assert batch["targets" if causal else "labels"].shape == (shape.targets,) and batch["max_seqlen"] == shape.longest
            assert (batch["weight"], batch["count"]) == (bare["weight"], bare["count"])
        met |= {sizes(batch) for batch in filled}
        tried = data.largest_batches()
        assert [b["input_ids"].numel() for b in tried] == [s.tokens for s in data.shapes]
    assert met == {sizes(batch) for batch in tried}, "training meets a size that was not tried before, or not all that were"


@pytest.mark.parametrize(("plan", "ranks"), [({"tokens_per_batch": 512, "accumulate": 4}, 1), ({"batch_size": 1}, 4)])
def test_a_teachers_scores_go_with_their_rows(tiny_mistral: Path, plan: dict[str, Any], ranks: int) -> None:
    """In filled batches, in parts of one, on ranks that run a row for company, and in the batches that are tried first."""
    met = 0
    for rank in range(ranks):
        data = planned(tiny_mistral, False, rank, ranks, **plan)
        scores = data.teacher_scores = torch.arange(1.0, 2 * len(data.train_rows) + 1).view(-1, 2)
        data.fill_batches()
        for batch in (*data.train_dataloader(), *data.largest_batches()):
            rows = batch["rows"] or [0]
            assert batch["teacher"].shape == (*batch["labels"].shape, 2)
            assert torch.equal(batch["teacher"][: len(rows)], scores[rows])
            assert not batch["teacher"][len(rows) :].any() and (batch["labels"][len(rows) :] == IGNORE).all()
            for part in data.parts_of(batch, 2) if batch["rows"] else []:
                assert torch.equal(part["teacher"], scores[part["rows"]])
            met += len(batch["rows"])
        assert "teacher" not in next(iter(data.val_dataloader()))
    assert met >= len(data.train_rows)


def test_without_shapes_only_the_largest_batch_is_tried(tiny_mistral: Path) -> None:
    data = planned(tiny_mistral, False, 0, 1, tokens_per_batch=512)
    (tried,) = data.largest_batches()
    assert tried["input_ids"].numel() == max(batch["input_ids"].numel() for batch in data.train_dataloader())
    data.connect(Batching(PAD, padded=True, plan={"batch_size": 8}))
    (tried,) = data.largest_batches()
    assert tried["input_ids"].numel() == max(batch["input_ids"].numel() for batch in data.train_dataloader())


def test_sizes_of_a_plan_are_those_of_its_micro_batches() -> None:
    lengths, supervised = list(range(1, 6)), list(range(5, 0, -1))
    plan = BatchPlan(lengths, supervised, seed=0, batch_size=2, accumulate=2, world_size=4, padded=False, max_epochs=2)
    micro = [plan.micro_batch(k, rank).rows for k in range(len(plan)) for rank in range(4)]
    assert () in micro
    expected = [([lengths[r] for r in rows or (0,)], [supervised[r] for r in rows or (0,)]) for rows in micro]
    assert plan.sizes() == ([sum(n) for n, _ in expected], [len(n) for n, _ in expected], [sum(s) for _, s in expected])
