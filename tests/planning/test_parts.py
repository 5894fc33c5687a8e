"""`trainer.fit`: what is chosen for a card, and that the loss is the same whatever it is."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorica import sizing
from lorica.composition import compose
from lorica.config import ConfigError, TrainConfig
from lorica.planning import memory, parts
from lorica.planning.cards import CARDS, GIB, Card
from lorica.planning.known import KNOWN
from lorica.planning.lengths import Lengths, look
from lorica.planning.pace import captured
from lorica.planning.parts import Size
from lorica.planning.shapes import Shape, find_shape

Lorica = Callable[..., tuple[int, str]]
OnGpu = Callable[..., tuple[Any, Any, Any, Any]]
LIMITS = (6, 7.5, 11, 15, 22)


def run(*overrides: str) -> tuple[TrainConfig, Shape, Lengths | None]:
    config = compose("train", ["model=mistral_qlora", "data=healthcare_qa", "trainer.compile=true", *overrides])
    return config, find_shape(config.model, 0), look(config, 2000)


def card(gib: float) -> Card:
    return replace(CARDS["h200_141gb"], memory=int(gib * GIB), context=0)


def test_a_large_card_runs_what_was_asked_for() -> None:
    config, shape, lengths = run("trainer.tokens_per_batch=16384")
    found = parts.fastest(config, shape, card(139), lengths)
    assert found is not None and found.size == Size(1, False) and found.fit.job.resident


@pytest.mark.parametrize("length", [512, 1024, 2048])
@pytest.mark.parametrize("gib", LIMITS)
def test_on_every_smaller_card_something_fits(gib: float, length: int) -> None:
    config, shape, lengths = run("trainer.tokens_per_batch=16384", f"model.max_length={length}")
    found = parts.fastest(config, shape, card(gib), lengths)
    assert found is not None and found.fit.peak <= gib * GIB


def test_the_smaller_the_card_the_less_it_holds_at_once() -> None:
    config, shape, lengths = run("trainer.tokens_per_batch=16384")
    held = [parts.fastest(config, shape, card(gib), lengths) for gib in LIMITS]
    assert all(held)
    peaks = [one.fit.peak for one in held if one is not None]
    assert peaks == sorted(peaks)


def test_a_way_that_may_not_fit_when_it_is_tried_is_taken_where_others_are_far_slower() -> None:
    config, shape, lengths = run("trainer.tokens_per_batch=8192")
    whole = parts.sized(config, shape, card(6), lengths, Size(1, True)).fit
    assert whole.fits and whole.peak > memory.limit(card(6))
    found = parts.fastest(config, shape, card(6), lengths)
    assert found is not None and found.size.parts > 1 and captured(found.fit.job, card(6))
    one_row, shape, lengths = run("trainer.batch_size=1", "trainer.gradient_checkpointing=offload", "trainer.offload_embeddings=true")
    least = parts.smallest(one_row, shape, card(6), lengths).fit.peak
    almost = card(1.03 * least / GIB)
    found = parts.fastest(one_row, shape, almost, lengths)
    assert found is not None and found.fit.peak > memory.limit(almost)


def test_short_steps_leave_room_for_evaluation_so_that_they_can_be_captured() -> None:
    def chosen(*overrides: str) -> memory.Job:
        found = parts.fastest(*run("trainer.tokens_per_batch=8192", *overrides)[:2], card(15), run()[2])
        assert found is not None
        return found.fit.job

    job = chosen()
    assert job.room_for_evaluation and captured(job, card(15)) and job.evaluated <= job.tokens
    assert memory.with_evaluation(job, card(15)) <= memory.limit(card(15))
    for hindrance in ("trainer.cuda_graphs=false", "trainer.detect_anomaly=true", "trainer.devices=2"):
        assert not chosen(hindrance).room_for_evaluation
    dropout = chosen("model.lora.lora_dropout=0.05", "trainer.gradient_checkpointing=4")
    assert dropout.recomputed == 4 and captured(dropout, card(139))  # its masks follow from a seed
    again = replace(job, recomputed=2)
    assert not captured(replace(again, random=True), card(139)) and captured(again, card(139))


def test_what_was_turned_off_is_not_done() -> None:
    config, shape, lengths = run("trainer.tokens_per_batch=16384", "trainer.fit=false", "trainer.gradient_checkpointing=false")
    assert parts.fastest(config, shape, card(11), lengths) is None


def test_what_fits_nowhere_is_refused_with_what_would() -> None:
    config, shape, lengths = run("model.quantization=null")
    error = sizing.refusal(config, shape, card(7.5), lengths or pytest.fail("rows are at hand"))
    assert "needs 1" in str(error) and "of 7.5" in str(error) and "model.quantization={load_in_4bit:true}" in str(error)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> OnGpu:
    """What `sizing` is asked with, for a GPU of so much memory."""

    def asked(gib: float, *overrides: str) -> tuple[Any, Any, Any, Any]:
        config, _, lengths = run(*overrides)
        monkeypatch.setattr(sizing, "card_at_hand", lambda machine: card(gib))
        monkeypatch.setattr(sizing, "lengths_of", lambda data, config: lengths)
        machine = SimpleNamespace(device=SimpleNamespace(type="cuda"))
        return config, SimpleNamespace(labels=None), machine, KNOWN["mistralai/Mistral-7B-v0.1"]

    return asked


def test_a_run_that_goes_on_has_its_embeddings_where_it_fits(on_a_gpu: OnGpu) -> None:
    tight = on_a_gpu(4.75)
    into, on_host, _ = sizing.choose(*tight)
    assert on_host
    assert sizing.going_on(*tight, into=into) == Size(into, True)
    assert sizing.going_on(*on_a_gpu(22), into=into) == Size(into, False)
    assert sizing.going_on(*on_a_gpu(4.75, "trainer.fit=false"), into=2) == Size(2, False)


def test_a_run_that_trains_nothing_is_not_refused_for_its_training(on_a_gpu: OnGpu) -> None:
    with pytest.raises(ConfigError, match="in the smallest parts"):
        sizing.choose(*on_a_gpu(3))
    assert sizing.choose(*on_a_gpu(3, "trainer.max_steps=0")) == (1, False, "")


def losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


@pytest.fixture
def trained(tmp_path: Path, tiny_mistral: Path, lorica: Lorica, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Train the tiny Mistral in so many parts; the run folder."""

    def train(count: int, *more: str) -> Path:
        monkeypatch.setattr(sizing, "choose", lambda *_: (count, False, ""))
        folder = tmp_path / f"parts-{count}-{len(more)}"
        settings = ["model=tiny_mistral_qlora", f"model.base={tiny_mistral}", "data=sentiment", "trainer.tokens_per_batch=1024"]
        settings += [
            "optimizer.lr_scheduler_type=constant",
            "trainer.accumulate_grad_batches=2",
            "trainer.max_steps=4",
            "trainer.log_every_n_steps=1",
            "trainer.precision=32-true",
        ]
        code, printed = lorica("train", *settings, f"run_dir={folder}", "logger=csv", "data.max_test_examples=8", *more)
        assert code == 0, printed
        return folder

    return train


@pytest.mark.slow
def test_parts_change_the_loss_by_rounding_only_and_a_run_goes_on_in_its_own(
    trained: Callable[..., Path], lorica: Lorica, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, straight = losses(trained(1)), losses(trained(3))
    assert len(whole) == 4 and straight == pytest.approx(whole, rel=1e-4)
    begun = trained(3, "trainer.max_steps=2", "trainer.checkpoint_every_n_steps=2")
    (begun / "metrics.json").unlink()
    monkeypatch.setattr(sizing, "choose", lambda *_: pytest.fail("a run that goes on has its parts"))
    code, printed = lorica("train", f"resume={begun}", "trainer.max_steps=4")
    assert code == 0, printed
    assert losses(begun) == straight


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("filled", [False, True])
def test_what_is_expected_of_a_run_is_of_its_real_batches(
    padded: bool, filled: bool, tiny_mistral: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from lorica.data.encoding import build_encoder
    from lorica.data.module import Batching
    from lorica.data.registry import build_data
    from lorica.hardware import Machine
    from lorica.models import base, weights
    from lorica.models.fitting import Fit

    overrides = ["model=tiny_mistral_qlora", f"model.base={tiny_mistral}", "data=healthcare_qa", "trainer.tokens_per_batch=1024"]
    config = compose("train", overrides)
    data = build_data(config.data, config.seed)
    data.load()
    found = base.find_base(config.model.base, None)
    tokenizer = base.load_tokenizer(found)
    data.encode(build_encoder(weights.asked(config, data), tokenizer))
    size = Size(2)
    plan = {"tokens_per_batch": 1024, "accumulate": 1, "parts": size.parts, "max_epochs": 1}
    data.connect(Batching(pad_id=3, padded=padded, plan=plan))
    if filled and not padded:
        data.fill_batches()
    machine = Machine("cuda", [0], torch.device("cuda"), 0, 1, "bf16-mixed")
    monkeypatch.setattr(sizing, "card_at_hand", lambda _: card(8))
    architecture = base.load_config(found, config.model).to_dict()
    assert sizing.choose(config, data, machine, architecture) == (1, False, "")
    before = sizing.expected(config, data, machine, architecture, size)
    assert before is not None and before.fits and before.job.tokens <= 1024
    largest = max(batch["input_ids"].numel() for batch in data.largest_batches())
    assert before.job.tokens == largest
    after = sizing.after_trying(before, Fit(4, 4, False, False), data, size, machine)
    assert 0 < after <= before.peak / GIB


def test_nothing_is_expected_of_a_cpu() -> None:
    import torch

    from lorica.hardware import Machine

    config = compose("train", [])
    machine = Machine("cpu", 1, torch.device("cpu"), 0, 1, "32-true")
    assert sizing.choose(config, None, machine, {}) == (1, False, "")  # type: ignore[arg-type]
    assert sizing.expected(config, None, machine, {}, Size()) is None  # type: ignore[arg-type]
