"""`lorica plan`: what is printed, what makes a run fit, and how long it takes to say so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lorica.composition import compose
from lorica.planning import changes, memory, runner
from lorica.planning.cards import CARDS, GIB
from lorica.planning.lengths import look
from lorica.planning.pace import rate
from lorica.planning.shapes import find_shape

Lorica = Callable[..., tuple[int, str]]


def planned(*overrides: str, card: str = "rtx3070_8gb") -> runner.Plan:
    config = compose("train", list(overrides))
    lengths = look(config, 2000)
    return runner.make(config, CARDS[card], find_shape(config.model, 3), lengths)


def test_a_run_that_fits(lorica: Lorica) -> None:
    code, printed = lorica("plan", "model=mistral_qlora", "data=sentiment", "gpu=rtx3070_8gb")
    assert code == 0
    for said in ("load", "train", "evaluate", "save", "merge", "predict", "quantisation state", "fits: peak", "an epoch", "Wh"):
        assert said in printed
    assert "lorica merge takes 13.72 GiB, more than this card has" in printed and "lorica predict takes" not in printed
    assert "lorica merge takes" not in lorica("plan", "model=mistral_qlora", "data=sentiment", "gpu=l4_24gb")[1]
    code, printed = lorica("plan", "model=mistral_qlora", "data=sentiment", "gpu.memory_gib=6")
    assert code == 0 and "lorica predict takes" not in printed  # its batches are halved


def test_batches_of_prediction_are_halved_until_they_fit_down_to_single_rows() -> None:
    job = planned("model=mistral_qlora", "data=sentiment", card="h200_141gb").fit.job
    weights = memory.total(memory.predict(job, CARDS["h200_141gb"])) - memory.predict(job, CARDS["h200_141gb"])["activations"]

    def activations(gib: float) -> float:
        return memory.predict(job, replace(CARDS["h200_141gb"], memory=int(weights + gib * GIB), context=0))["activations"]

    assert activations(9) == 2 * activations(1.5) == 4 * activations(0.7)
    assert activations(0) == pytest.approx(memory.forward(job, job.tokens // job.rows), rel=1.0)


def test_a_run_that_does_not_fit_is_told_what_to_change(lorica: Lorica) -> None:
    wanted = ["model=mistral_lora", "data=healthcare_qa", "gpu=rtx4070_12gb"]
    code, printed = lorica("plan", *wanted)
    assert code == 1 and "does NOT fit" in printed and "what makes it fit" in printed
    command = next(line for line in printed.splitlines() if line.startswith("  model.quantization"))
    code, printed = lorica("plan", *wanted, *command.split())
    assert code == 0 and "fits: peak" in printed


@pytest.mark.parametrize("gpu", ["rtx3070_8gb", "t4_16gb", "l4_24gb"])
@pytest.mark.parametrize("model", ["mistral_lora", "mistral_qlora"])
def test_every_proposal_fits_as_it_is_pasted(model: str, gpu: str) -> None:
    wanted = [f"model={model}", "data=healthcare_qa", "trainer.tokens_per_batch=16384", "trainer.gradient_checkpointing=false"]
    wanted += ["trainer.fit=false"]
    config = compose("train", wanted)
    shape, lengths, card = find_shape(config.model, 0), look(config, 2000), CARDS[gpu]
    assert not runner.make(config, card, shape, lengths).fit.fits
    found = runner.proposals(config, card, shape, lengths)
    assert found
    for proposal in found:
        pasted = compose("train", [*wanted, *(o for change in proposal.taken for o in change.overrides)])
        assert runner.make(pasted, card, shape, lengths).fit.fits


NF4, ALL_LINEAR = "model.quantization={load_in_4bit:true}", "model.lora={r:16,target_modules:all-linear}"


@pytest.mark.parametrize(
    ("given", "gib", "proposed"),
    [
        (["model.lora.r=256"], 5, ["model.lora.r=32 model.lora.lora_alpha=4", "model.train_layers=last_4"]),
        (["model.lora.r=256", "model.lora.use_rslora=true"], 5, ["model.lora.r=32 model.lora.lora_alpha=11", "model.train_layers=last_4"]),
        (  # 32 would be scaled by 0.5 / 32, or by another
            ["model.lora.r=256", "model.lora.lora_alpha=4"],
            5,
            ["model.lora.r=64 model.lora.lora_alpha=1 model.train_layers=last_16", "model.train_layers=last_4"],
        ),
        (
            ["model.quantization=null", "trainer.precision=32-true"],
            20,
            ["trainer.precision=auto", "model.quantization={load_in_4bit:true}"],
        ),
        (
            ["model.quantization=null", "model.lora=null"],
            8,
            [f"{ALL_LINEAR} {NF4} optimizer.lr=2e-4"],
        ),
        (
            ["model.quantization=null", "model.lora=null"],
            40,
            [f"{ALL_LINEAR} optimizer.lr=2e-4", "model.train_layers=last_8"],
        ),
    ],
)
def test_fewer_weights_to_learn_are_proposed_where_that_is_enough(given: list[str], gib: int, proposed: list[str]) -> None:
    config = compose("train", ["model=mistral_qlora", "data=sentiment", *given])
    shape, lengths, card = find_shape(config.model, 0), look(config, 2000), replace(CARDS["rtx3070_8gb"], memory=gib * GIB)
    pasted = [[o for change in one.taken for o in change.overrides] for one in runner.proposals(config, card, shape, lengths)]
    assert [" ".join(one) for one in pasted] == proposed
    for overrides in pasted:
        again = compose("train", ["model=mistral_qlora", "data=sentiment", *given, *overrides])
        assert runner.make(again, card, shape, lengths).fit.fits


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["trainer.max_steps=5"], "; 5 micro-steps: too few to compile layers for"),
        (["trainer.max_steps=1"], "; 1 micro-step: too few"),
        (["trainer.max_steps=200", "trainer.max_epochs=-1"], "layers       compiled"),
        (["trainer.max_steps=5", "trainer.compile=false"], "precision bf16-mixed "),
    ],
)
def test_why_layers_are_not_compiled_is_said(given: list[str], says: str, lorica: Lorica) -> None:
    code, printed = lorica("plan", "model=mistral_qlora", "data=sentiment", "gpu=l4", *given)
    assert code == 0 and says in printed.replace("\n", " ")


def test_a_card_without_bf16_is_slow_in_32_bits() -> None:
    half, whole = (planned("model=mistral_qlora", "data=sentiment", f"trainer.precision={p}", card="t4_16gb") for p in ("auto", "32-true"))
    assert 6 < half.pace.tokens / whole.pace.tokens < 10  # 65 and 8.1 teraflops, and the launches of neither


def test_no_change_of_the_cheapest_can_be_left_out() -> None:
    config = compose("train", ["model=mistral_lora", "data=healthcare_qa", "trainer.tokens_per_batch=8192"])
    shape, lengths, card = find_shape(config.model, 0), look(config, 2000), CARDS["rtx3070_8gb"]

    def fits(one: object) -> bool:
        return runner.make(one, card, shape, lengths).fit.fits  # type: ignore[arg-type]

    taken = changes.makes_fit(config, lengths, shape.layers, fits)
    assert taken
    for left_out in taken:
        assert not fits(changes.changed(config, [c for c in taken if c is not left_out]))


def test_what_can_not_fit_is_said_to(lorica: Lorica) -> None:
    code, printed = lorica("plan", "model=mistral_lora", "data=sentiment", "gpu.memory_gib=2")
    assert code == 1 and "nothing that Lorica can change makes it fit" in printed
    assert "at the least: micro-batches run in" in printed and "to fit" not in printed


def test_as_json(lorica: Lorica) -> None:
    code, printed = lorica("plan", "model=roberta_full", "data=ag_news", "gpu=t4", "--json")
    said = json.loads(printed)
    assert code == 0 and said["fits"] and said["model"]["weights"] == said["model"]["trained"] == 124_648_708
    assert said["phases"]["train"]["optimiser"] == 8 * 124_648_708
    assert said["peak_bytes"] == pytest.approx(sum(said["phases"]["train"].values()), rel=1e-6)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["gpu=rtx9090"], "must be one of rtx3060_12gb"),
        (["gpu=l4", "model.max_length=600"], "MiniLM-L6-v2 has 512 positions"),
        (["gpus=l4"], "gpu=l4"),
        (["gpu=16gb"], "try: gpu.memory_gib=16"),
        (["gpu=l4,t4"], "try: one value"),
        (["gpu.memory_gib=1e30"], "gpu.memory_gib"),
        (["gpu=l4", "model.base=Qwen/Qwen2.5-0.5B"], "target_modules=[q_proj,k_proj,"),
        (["gpu=l4", "model.lora.ran=8"], "model.lora.r"),
        (["gpu=l4", "trainer.devices=-1"], "try: trainer.devices=2"),
        (["gpu=l4", "model=mistral_qlora", "model.base=someone/unheard-of"], "HF_HUB_OFFLINE is set"),
    ],
)
def test_mistakes(typed: list[str], says: str, lorica: Lorica) -> None:
    code, printed = lorica("plan", *typed)
    assert code == 2 and says in printed


def test_costs_are_said_where_prices_are_given(lorica: Lorica) -> None:
    _, printed = lorica("plan", "model=mistral_qlora", "data=healthcare_qa", "gpu=h200", "price_per_hour=4", "price_per_kwh=0.3")
    assert "for electricity" in printed and "for the card" in printed


@pytest.mark.parametrize(("case", "tokens", "again"), [("512-smallest", 512, 32), ("2k", 2048, 0), ("16k", 16384, 0)])
def test_the_rate_on_an_h200_is_the_measured_one(case: str, tokens: int, again: int) -> None:
    rows = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "qlora_rates_h200.json").read_text())["runs"]
    measured = next(row["tokens_per_second"] for row in rows if row["case"] == case)
    plan = planned(
        "model=mistral_qlora", "data=healthcare_qa", f"trainer.tokens_per_batch={tokens}", "model.max_length=512", card="h200_141gb"
    )
    way = replace(plan.fit.job.way, compiled=True)
    job = replace(plan.fit.job, way=way, tokens=tokens, targets=round(0.55 * tokens), resident=not again, recomputed=again)
    sizes = replace(plan.sizes, rows=1, mean=float(tokens))
    assert rate(job, sizes, CARDS["h200_141gb"]) == pytest.approx(measured, rel=0.1)


def test_the_rates_of_all_ways_by_hand_are_met_within_ten_percent() -> None:
    """Layers computed again, in several parts: what `trainer.fit` chooses by. What is launched bit by bit depends on the host."""
    found = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "fit_h200.json").read_text())
    rows = [row for row in found["settings"] if row["ended"] == "trained"]
    plan = planned("model=mistral_qlora", "data=healthcare_qa", "trainer.tokens_per_batch=8192", "model.max_length=512", card="h200_141gb")
    launched = 0
    for row in rows:
        parts, again = row["name"].split()[0], row["name"].split()[-1]
        tokens, count = found["tokens"] // int(parts), int({"true": 32, "offload": 32, "false": 0}.get(again, again))
        way = replace(plan.fit.job.way, compiled=True)
        job = replace(
            plan.fit.job, way=way, tokens=tokens, targets=round(0.55 * tokens), resident=False, recomputed=count, offload=again == "offload"
        )
        if "notes" in row and not any("whole micro-steps captured" in note for note in row["notes"]):  # five were kept without notes
            job, launched = replace(job, capturable=False), launched + 1
        sizes = replace(plan.sizes, rows=1, mean=float(tokens))
        assert rate(job, sizes, CARDS["h200_141gb"]) == pytest.approx(row["tokens_per_second"], rel=0.1), row["name"]
    assert len(rows) >= 50 and launched >= 2


def test_two_cards_take_half_the_time_of_an_epoch_and_as_much_of_each() -> None:
    one = planned("model=mistral_qlora", "data=healthcare_qa", card="h200_141gb")
    two = planned("model=mistral_qlora", "data=healthcare_qa", "trainer.devices=2", card="h200_141gb")
    assert one.pace.epoch is not None and two.pace.epoch == pytest.approx(one.pace.epoch / 2)
    assert two.pace.joules == pytest.approx(one.pace.joules) and two.fit.peak == one.fit.peak
    steps = [planned("data=ag_news", "trainer.max_steps=7", f"trainer.devices={n}", card="t4_16gb").pace.whole for n in (1, 2)]
    assert steps[0] == pytest.approx(steps[1])


def test_all_devices_are_those_of_the_machine(lorica: Lorica, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.cards, "choose", lambda asked: replace(CARDS["l4_24gb"], count=4))
    wanted = ("plan", "model=mistral_qlora", "data=healthcare_qa", "--json")
    said = json.loads(lorica(*wanted, "trainer.devices=-1")[1])
    assert said == json.loads(lorica(*wanted, "trainer.devices=4")[1])
    assert said["time"]["tokens"] == pytest.approx(4 * json.loads(lorica(*wanted, "trainer.cuda_graphs=false")[1])["time"]["tokens"])


def test_fp8_is_faster_where_there_is_any(lorica: Lorica) -> None:
    wanted = ("model=mistral_qlora", "data=healthcare_qa")
    plain, fp8 = (planned(*wanted, f"trainer.fp8={on}", card="h200_141gb").pace.tokens for on in ("false", "true"))
    assert fp8 > plain
    code, printed = lorica("plan", *wanted, "trainer.fp8=true", "gpu=a100_80gb")
    assert code == 2 and "no products in FP8" in printed


def test_the_phase_that_decides_is_named(lorica: Lorica) -> None:
    code, printed = lorica("plan", "model=mistral_lora", "data=sentiment", "gpu=rtx3070_8gb", "--json")
    said = json.loads(printed)
    assert code == 1 and said["needed_bytes"] > said["usable_bytes"]
    _, printed = lorica("plan", "model=mistral_qlora", "data=sentiment", "gpu=rtx3070_8gb")
    assert "(train, with 2% for pieces)" in printed


def test_the_order_of_cards_by_speed_is_that_of_their_makers() -> None:
    seconds = [
        planned("model=mistral_qlora", "data=healthcare_qa", card=card).pace.epoch
        for card in ("rtx3070_8gb", "l4_24gb", "a100_80gb", "h200_141gb")
    ]
    assert all(s is not None for s in seconds) and seconds == sorted(seconds, reverse=True)  # type: ignore[type-var]


@pytest.mark.parametrize("length", [512, 1024])
@pytest.mark.parametrize("data", ["ag_news", "sentiment", "healthcare_qa", "chat"])
@pytest.mark.parametrize(("trainer", "card"), [("gpu_8gb", "rtx3070_8gb"), ("gpu_8gb", "rtx4060_8gb"), ("gpu_16gb_t4", "colab_t4")])
def test_the_recipes_of_small_cards_hold_a_7b(trainer: str, card: str, data: str, length: int) -> None:
    wanted = ["model=mistral_qlora", f"data={data}", f"trainer={trainer}", f"model.max_length={length}"]
    found = planned(*wanted, card=card)
    assert found.fit.fits
    assert not found.fit.job.offload, "the layers' inputs need no host memory"
    assert found.fit.job.way.flat == (trainer == "gpu_8gb") and not (found.fit.job.way.compiled and trainer == "gpu_16gb_t4")
    if data == "healthcare_qa":  # rows may all be as long as they may be
        assert runner.make(compose("train", wanted), CARDS[card], found.shape, None).fit.fits


def test_fewer_layers_are_proposed_where_they_are_enough(lorica: Lorica) -> None:
    wanted = ["model=roberta_full", "data=ag_news", "gpu.memory_gib=1.9"]
    code, printed = lorica("plan", *wanted)
    assert code == 1 and "model.train_layers=last_" in printed
    command = next(line.strip() for line in printed.splitlines() if line.startswith("  model.train_layers"))
    assert lorica("plan", *wanted, *command.split())[0] == 0
    code, printed = lorica("plan", "model=roberta_lora", "data=ag_news", "gpu=t4", "model.train_layers=last_13")
    assert code == 2 and "model.train_layers=last_13: FacebookAI/roberta-base has 12 layers" in printed


def test_a_run_ends_with_its_steps_where_they_come_first() -> None:
    wanted = ("model=mistral_qlora", "data=healthcare_qa", "trainer.tokens_per_batch=null", "trainer.batch_size=5")
    epochs = planned(*wanted, card="h200_141gb").pace
    ten = planned(*wanted, "trainer.max_steps=10", "trainer.accumulate_grad_batches=2", "trainer.compile=true", card="h200_141gb").pace
    assert epochs.whole is not None and epochs.epoch is not None and epochs.whole == pytest.approx(3 * epochs.epoch)
    assert ten.whole is not None and ten.epoch is not None and ten.whole == pytest.approx(100 / 95 * ten.epoch)
    assert planned(*wanted, "trainer.max_steps=0", card="h200_141gb").pace.whole == 0
    unseen = planned("experiment=chatdoctor", "data.source=hub", card="h200_141gb").pace
    assert unseen.epoch is None and unseen.whole == pytest.approx(500 * 2048 / unseen.tokens)


@pytest.mark.alone
def test_it_answers_within_two_and_a_half_seconds_and_imports_no_torch() -> None:
    program = "import sys; from lorica.cli import main\ntry: main('plan', ['model=mistral_qlora', 'data=sentiment', 'gpu=rtx3070_8gb'])\n"
    program += "finally: print(sorted({'torch', 'transformers', 'lightning', 'peft'} & set(sys.modules)))"
    best = 99.0
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ}, check=True)
        best = min(best, time.perf_counter() - began)
    assert done.stdout.strip().endswith("[]")
    assert best <= 2.5
