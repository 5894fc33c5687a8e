"""The memory of runs: against figures that were measured, and as the product decides."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorica import assembly, scoring
from lorica.composition import compose
from lorica.kernels import loss
from lorica.models import fitting
from lorica.planning import jobs, memory, pace
from lorica.planning.cards import CARDS, GIB, Card
from lorica.planning.lengths import Lengths
from lorica.planning.shapes import find_shape, shape_of

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
H200 = CARDS["h200_141gb"]


def job(*overrides: str, lengths: Lengths | None = None, card: Card = H200) -> memory.Job:
    config = compose("train", ["model=mistral_qlora", "data=sentiment", "trainer.compile=true", *overrides])
    return jobs.job_of(config, find_shape(config.model, 3), card, lengths)[0]


def test_the_numbers_are_the_products_own() -> None:
    assert memory.TILE_ELEMENTS == loss.TILE_ELEMENTS and memory.EVALUATION_ELEMENTS == loss.EVALUATION_ELEMENTS
    assert (memory.SPARE, memory.SPARE_BYTES, memory.PLENTY) == (fitting.SPARE, fitting.SPARE_BYTES, fitting.PLENTY)
    assert memory.PREDICTED_ELEMENTS == scoring.ELEMENTS
    assert jobs.EVALUATED == assembly.EVAL_TOKENS_FACTOR and jobs.WORTH_COMPILING == fitting.WORTH_COMPILING


@pytest.mark.parametrize("case", ["512", "2k", "16k"])
def test_measured_peaks_of_the_7b_are_met_within_three_percent(case: str) -> None:
    rows = json.loads((RESULTS / "qlora_rates_h200.json").read_text())["runs"]
    measured = next(r["peak_gib"] for r in rows if r["case"] == case)
    tokens = {"512": 512, "2k": 2048, "16k": 16384}[case]
    planned = replace(job(f"trainer.tokens_per_batch={tokens}", "model.max_length=512"), resident=True, targets=round(0.55 * tokens))
    assert memory.total(memory.train(planned, H200)) / GIB == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("grid", ["memory_h200.json", "memory_held_out_h200.json", "memory_held_out_2_h200.json"])
def test_the_measured_grids_are_as_near_as_is_said(grid: str) -> None:
    """As the figures' own summary has it, which docs/planning.md names."""
    rows = json.loads((RESULTS / grid).read_text())["points"]
    errors = sorted(abs(row["predicted_gib"] / row["measured_gib"] - 1) for row in rows)
    assert len(errors) >= 10 and errors[len(errors) // 2] < 0.01 and errors[-1] < 0.08
    assert all(sum(row["parts_gib"].values()) == pytest.approx(row["predicted_gib"], abs=0.01) for row in rows)


@pytest.mark.parametrize(
    ("size", "counted"), [(0.5, 0.5), (1.5, 1.5 + 0.5 / 13), (4, 4), (6, 6), (9, 9), (11, 12), (13, 14), (28, 28), (28.5, 28.5)]
)
def test_tensors_take_what_is_left_of_their_segment(size: float, counted: float) -> None:
    """MiB, as torch's allocator cuts its segments: 20 MiB for tensors of 1 to 10, else one for each, in steps of 2."""
    assert memory.handed_out(size * 2**20) / 2**20 == pytest.approx(counted)


@pytest.mark.parametrize(("tiles", "copies"), [(1, 2), (3, 2 + 4)])
def test_a_trained_heads_largest_moment_holds_its_copy_and_the_sum_of_its_gradients(
    tiles: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes for each of its weights beside the tiles' logits, as torch runs it under an autocast that keeps no copies, like Lightning's."""
    vocabulary, hidden, rows = 2000, 64, 100
    monkeypatch.setattr(loss, "TILE_ELEMENTS", rows * vocabulary)
    head = torch.nn.Linear(hidden, vocabulary, bias=False)
    states = torch.randn(tiles * rows, hidden, requires_grad=True)
    with (watched := Storages(2 * vocabulary * hidden)), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        total = loss.head_cross_entropy(head, vocabulary, states, torch.zeros(tiles * rows, dtype=torch.int64)).sum()
        total.backward()
    assert watched.most == copies * vocabulary * hidden + 12 * rows * vocabulary
    planned = job("model.lora=null", "model.quantization=null")
    places = memory.TILE_ELEMENTS // planned.shape.vocabulary
    planned = replace(planned, targets=tiles * places, shape=replace(planned.shape, hidden=hidden))
    of_head = planned.shape.vocabulary * planned.shape.hidden
    tile = 12.0 * places * planned.shape.vocabulary
    assert memory.logits(planned) - 8.0 * planned.targets * planned.shape.hidden == pytest.approx(
        max(tile + copies * of_head, 6.0 * of_head), rel=0.01
    )


class Storages(TorchDispatchMode):
    """The most bytes at once of storages of at least so many that operations made."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.most = least, 0
        self.live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, made if isinstance(made, (tuple, list)) else (made,)):
            storage = tensor.untyped_storage()
            if storage.nbytes() >= self.least and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.live.values()))
        return made


def test_a_small_micro_step_that_is_not_captured_waits_for_the_host() -> None:
    small = replace(job("trainer.tokens_per_batch=1280"), resident=False, recomputed=0)
    sizes = jobs.Batches(1280, 1280 / small.rows, small.rows, small.targets, None, 512)
    tight = replace(H200, memory=int(10.6 * GIB))
    assert pace.captured(small, H200) and not pace.captured(small, tight)
    assert pace.rate(small, sizes, tight) == pytest.approx(1280 / (32 * pace.LAUNCHED_4BIT), rel=0.01)
    assert pace.rate(small, sizes, H200) > 1.2 * pace.rate(small, sizes, tight)


def test_each_thing_that_saves_memory_does() -> None:
    base = job()
    peak = memory.total(memory.train(base, H200))
    for smaller in (
        replace(base, recomputed=16),
        replace(base, recomputed=32),
        replace(base, tokens=2048, targets=1024),
        replace(base, host_embeddings=True),
        replace(base, trained=base.trained // 2),
    ):
        assert memory.total(memory.train(smaller, H200)) < peak
    assert memory.total(memory.train(replace(base, recomputed=32, offload=True), H200)) < memory.total(
        memory.train(replace(base, recomputed=32), H200)
    )
    assert memory.total(memory.train(replace(base, resident=True), H200)) > peak
    assert memory.total(memory.train(replace(base, four_bit=False, double=False), H200)) > peak


def test_a_smaller_card_has_more_layers_computed_again() -> None:
    def settled(gib: float) -> memory.Fit:
        return memory.settle(job(), replace(H200, memory=int(gib * GIB)), None, None)

    found = [settled(gib) for gib in (139, 24, 12, 7)]
    assert found[0].job.resident and found[0].job.recomputed == 0
    counts = [fit.job.recomputed for fit in found]
    assert counts == sorted(counts) and counts[-1] == 32
    assert all(fit.fits for fit in found)
    assert not settled(4.5).fits


def test_what_was_asked_for_is_not_changed() -> None:
    small = replace(H200, memory=8 * GIB)
    assert memory.settle(job(), small, False, None).job.recomputed == 0
    assert memory.settle(job(), small, 5, None).job.recomputed == 5
    assert memory.settle(job(), H200, True, None).job.recomputed == 32
    assert memory.settle(job(), H200, "offload", None).job.offload


SIZES = {
    "mistral": {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "bert": {"max_position_embeddings": 600},
    "roberta": {"max_position_embeddings": 600, "type_vocab_size": 1, "pad_token_id": 1},
}


@pytest.mark.parametrize("lora", [None, ["q_proj", "down_proj", "query", "output.dense"], "all-linear"], ids=["whole", "named", "all"])
@pytest.mark.parametrize("kind", SIZES)
def test_the_last_layers_have_as_many_trained_weights_as_in_the_model(kind: str, lora: list[str] | str | None) -> None:
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification

    from lorica.models import adapters, freezing

    if lora == "all-linear" and kind == "roberta":
        pytest.skip("its head's own linear layer is trained whole")
    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 160, "vocab_size": 211}
    built_of = CONFIG_MAPPING[kind](**sizes, **SIZES[kind], num_labels=3)
    task = "sequence_classification" if "bert" in kind else "causal_lm"
    config = compose("train", ["data=sentiment", f"model={'roberta' if 'bert' in kind else 'mistral'}_lora", "model.train_layers=last_2"])
    config.model.max_length, settings = 512, config.model
    with torch.device("meta"):
        model: Any = (AutoModelForSequenceClassification if "bert" in kind else AutoModelForCausalLM).from_config(built_of)
    if lora is None:
        settings.lora = None
        freezing.freeze(model, settings)
    else:
        assert settings.lora is not None
        names = [name for name in lora if any(m.endswith(name) for m, _ in model.named_modules())] if isinstance(lora, list) else lora
        settings.lora.target_modules = names
        if kind == "bert":
            model.lorica_new_modules = ["bert.pooler.dense"]
        model = adapters.attach(model, settings.lora, task, None, freezing.Last(model, settings))
    planned = jobs.job_of(config, shape_of(built_of.to_dict(), settings, 3), H200, None)[0]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    pooler = 64 * 64 + 64 if kind == "bert" and lora is not None else 0  # new where the base was not a classifier; not counted
    assert planned.trained == trained - pooler and planned.frozen == 4


def test_frozen_layers_keep_nothing() -> None:
    whole, last = job("trainer.tokens_per_batch=4096"), job("trainer.tokens_per_batch=4096", "model.train_layers=last_8")
    kept = [memory.train(one, H200)["activations"] for one in (whole, last)]
    assert kept[1] == pytest.approx(kept[0] / 4, rel=0.1) and last.trained == whole.trained / 4
    assert pace.flops(last) < 0.65 * pace.flops(whole)
    small = replace(CARDS["rtx3070_8gb"], context=0)
    assert memory.settle(last, small, None, None).job.recomputed <= 8
    assert memory.settle(last, small, True, None).job.recomputed == 8
    full = ["model=roberta_full", "data=sentiment"]
    assert memory.total(memory.stays(job(*full, "model.train_layers=last_2"))) < 0.5 * memory.total(memory.stays(job(*full)))
