"""`lorica plan`'s memory beside the measured one: a grid of runs through train.py on the GPU at hand, several at a time.

`python -m benchmarks.memory OUT.json --models DIR [--points N] [--seed S] [--at-once 6]`

Models of random weights are built in DIR: Mistral-7B, two smaller Mistrals, RoBERTa-base. A point is drawn by the seed from every
combination of model, bits, full or LoRA, rank, what has adapters, tokens of a micro-batch, layers computed again, optimiser, compiled
or not; seed 0 was looked at while the formulas were written, seed 1 was not. Measured: memory/peak_gib of the run's metrics.json, which
spans training, validation and test. How layers run is given, not left to what is free on a card that others use, too.

`--again` plans the points of OUT.json anew, without a GPU, once the formulas have changed: what was measured stays, and what was planned
before the points were run is kept as first_predicted_gib. It needs the models' configurations and the rows, no weights.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Lock
from typing import Any

from benchmarks.side_by_side import Failed, call, machine, versions
from lorica.composition import compose
from lorica.data.readers import SAMPLES
from lorica.planning import memory, runner
from lorica.planning.cards import CARDS, GIB, Card
from lorica.planning.lengths import look
from lorica.planning.shapes import find_shape

STEPS = 4
MISTRALS: dict[str, dict[str, Any]] = {
    "mistral-7b": {},
    "mistral-1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "mistral-200m": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
}
KINDS = {  # how often each is drawn
    "mistral-7b nf4": 10,
    "mistral-7b bf16": 4,
    "mistral-1b nf4": 4,
    "mistral-1b bf16": 3,
    "mistral-1b full": 2,
    "mistral-200m nf4": 2,
    "mistral-200m full": 2,
    "roberta lora": 5,
    "roberta full": 4,
    "roberta nf4": 2,
}
LINEARS = "[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]"


@dataclass(frozen=True)
class Point:
    """One run of the grid."""

    name: str
    overrides: tuple[str, ...]


def points(count: int, seed: int, models: Path) -> list[Point]:
    """Drawn without repetition."""
    rng = random.Random(seed)
    found: dict[str, Point] = {}
    kinds = list(KINDS)
    while len(found) < count:
        point = _draw(rng, rng.choices(kinds, [KINDS[k] for k in kinds])[0], models)
        found.setdefault(point.name, point)
    return list(found.values())


def _draw(rng: random.Random, kind: str, models: Path) -> Point:
    base, how = kind.split()
    causal = base.startswith("mistral")
    tokens = rng.choice((512, 1024, 2048, 4096, 8192) if causal else (1024, 4096, 8192, 16384, 32768))
    compiled = rng.random() < 0.7
    again = rng.choice(("false", "false", "true", "half", "offload"))
    layers = {"mistral-7b": 32, "mistral-1b": 16, "mistral-200m": 10, "roberta": 12}[base]
    values = {
        "trainer.tokens_per_batch": tokens,
        "trainer.fit": "false",
        "trainer.compile": str(compiled).lower(),
        "trainer.gradient_checkpointing": layers // 2 if again == "half" else again,
        "optimizer.name": rng.choice(("adamw", "adamw_8bit", "paged_adamw_8bit")),
        "model.max_length": 512,
    }
    if how == "full":
        values |= {"model.lora": "null", "model.quantization": "null"}
    else:
        values["model.lora.r"] = rng.choice((8, 16, 64))
        if causal:
            values["model.lora.target_modules"] = rng.choice((LINEARS, LINEARS, "[q_proj,v_proj]"))
            values["trainer.offload_embeddings"] = rng.choice(("false", "false", "true"))
        if how == "nf4":
            values["trainer.resident_weights"] = "true" if again == "false" and rng.random() < 0.4 else "false"
        elif causal:
            values["model.quantization"] = "null"
    short = [str(v) for k, v in values.items() if k not in ("model.max_length", "model.lora", "model.quantization", "trainer.fit")]
    name = " ".join([kind, *short]).replace(LINEARS, "all").replace("[q_proj,v_proj]", "qv")
    group = "mistral_qlora" if causal else {"nf4": "roberta_qlora", "lora": "roberta_lora", "full": "roberta_full"}[how]
    data = (
        ["data=instruction", "data.input_column=null", "data.max_generated_examples=0", f"data.path={models}/rows-causal"]
        if causal
        else ["data=ag_news", f"data.path={models}/rows-news"]
    )
    if not causal:
        values.pop("model.lora", None)
        values.pop("model.quantization", None)
    fixed = [
        "data.source=files",
        "data.max_validation_examples=16",
        "data.max_test_examples=16",
        f"trainer.max_steps={STEPS}",
        "trainer.max_epochs=-1",
    ]
    own = [f"model={group}", f"model.base={models / base}", *(["model.use_chat_template=false"] if causal else [])]
    return Point(name, (*own, *data, *fixed, *(f"{k}={v}" for k, v in values.items())))


def prepare(models: Path, texts: list[Path], needed: set[str]) -> None:
    """Build the models and the rows, each in a process of its own, unless they are there."""
    models.mkdir(parents=True, exist_ok=True)
    texts = texts or sorted(SAMPLES.glob("*/*"))
    programs = {name: f"from benchmarks.random_mistral import build; build(folder, texts, **{sizes})" for name, sizes in MISTRALS.items()}
    programs["roberta"] = "from benchmarks.random_roberta import build; build(folder, texts)"
    running = []
    for name, program in programs.items():
        if name in needed and not (models / name / "config.json").is_file():
            files = [str(text.resolve()) for text in texts]
            head = f"from pathlib import Path; folder = Path({str(models / name)!r}); texts = [Path(t) for t in {files!r}]"
            running.append(subprocess.Popen([sys.executable, "-c", f"{head}\n{program}"]))
    if any(process.wait() for process in running):
        raise SystemExit("a model could not be built")
    from benchmarks import random_text
    from lorica.models.base import find_base, load_tokenizer

    causal = next((name for name in needed if name != "roberta"), None)
    if causal is not None and not (models / "rows-causal").is_dir():
        random_text.write_instructions(models / "rows-causal", load_tokenizer(find_base(str(models / causal), None)), 800)
    if "roberta" in needed and not (models / "rows-news").is_dir():
        random_text.write_news(models / "rows-news", load_tokenizer(find_base(str(models / "roberta"), None)), 8000)


def predicted(point: Point, card: Card) -> runner.Plan:
    """What `lorica plan` says of it."""
    config = compose("train", point.overrides)
    lengths = look(config, 2000)
    shape = find_shape(config.model, lengths.labels if lengths is not None else 0)
    return runner.make(config, card, shape, lengths)


class Room:
    """Memory of the card that runs under way may take."""

    def __init__(self, size: float) -> None:
        self.left, self.changed = size, Condition()

    def take(self, size: float) -> None:
        with self.changed:
            self.changed.wait_for(lambda: self.left >= size)
            self.left -= size

    def give(self, size: float) -> None:
        with self.changed:
            self.left += size
            self.changed.notify_all()


def measured(point: Point, folder: Path, timeout: float) -> dict[str, Any]:
    """The figures of one run.

    Raises:
        Failed: it gave none.
    """
    output = call([sys.executable, "train.py", *point.overrides, f"run_dir={folder}"], timeout)
    if not (folder / "metrics.json").is_file():
        raise Failed("no metrics.json", output)
    figures: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return figures


def of_plan(plan: runner.Plan) -> dict[str, Any]:
    """What is kept of a plan: GiB at the peak, and of what."""
    parts = {k: round(v / GIB, 3) for k, v in memory.train(plan.fit.job, plan.card).items()}
    return {"predicted_gib": plan.fit.peak / GIB, "parts_gib": parts}


def take(point: Point, plan: runner.Plan, room: Room, timeout: float, folder: Path) -> dict[str, Any]:
    """Measure one point, once there is room for it."""
    needs = plan.fit.peak * 1.15 + (2 << 30)
    room.take(needs)
    began = time.perf_counter()
    row: dict[str, Any] = {"name": point.name, "overrides": list(point.overrides), **of_plan(plan)}
    try:
        figures = measured(point, folder, timeout)
        row["measured_gib"], row["reserved_gib"] = figures["memory/peak_gib"], figures.get("memory/reserved_gib")
        row["error"] = row["predicted_gib"] / row["measured_gib"] - 1
    except Failed as e:
        row |= {"failed": str(e), "output": e.tail}
    finally:
        room.give(needs)
    row["seconds"] = time.perf_counter() - began
    shown = (
        f"{row['error']:+7.2%} predicted {row['predicted_gib']:7.3f} measured {row['measured_gib']:7.3f}"
        if "error" in row
        else row["failed"]
    )
    print(f"{shown}  {point.name}  {row['seconds']:.0f} s", flush=True)
    return row


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of the relative errors."""
    errors = [row["error"] for row in rows if "error" in row]
    if not errors:
        return {}
    return {
        "points": len(errors),
        "median_absolute": statistics.median(map(abs, errors)),
        "worst_absolute": max(map(abs, errors)),
        "most_below": min(errors),
        "most_above": max(errors),
        "failed": sum("failed" in row for row in rows),
    }


def plan_again(out: Path, models: Path, card: Card) -> None:
    """The points of a file as they are planned now."""
    text = json.loads(out.read_text())
    rows = {row["name"]: row for row in text["points"]}
    for point in points(len(rows), text["seed"], models):
        if point.name not in rows:
            raise SystemExit(f"{out} was cut short: {point.name} is missing")
        row = rows[point.name]
        row.setdefault("first_predicted_gib", row["predicted_gib"])
        row |= of_plan(predicted(point, card))
        if "measured_gib" in row:
            row["error"] = row["predicted_gib"] / row["measured_gib"] - 1
    out.write_text(json.dumps({**text, "summary": summary(text["points"]), "planned_again": time.strftime("%Y-%m-%d")}, indent=1) + "\n")


def main() -> None:
    """All points, as many at once as the card holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", type=Path, required=True, help="folder for models and rows, in memory if there is such a file system")
    parser.add_argument(
        "--texts", type=Path, nargs="*", default=[], help="files that tokenizers are trained on; none: the packaged samples"
    )
    parser.add_argument("--points", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--timeout", type=float, default=180)
    parser.add_argument("--within", type=float, default=1e9, help="seconds after which no further point is begun")
    parser.add_argument("--card", default="h200_141gb", choices=list(CARDS))
    parser.add_argument("--again", action="store_true", help="plan the points of OUT anew")
    options = parser.parse_args()
    began = time.perf_counter()
    card = CARDS[options.card]
    if options.again:
        plan_again(options.out, options.models, card)
        return
    chosen = points(options.points, options.seed, options.models)
    prepare(options.models, options.texts, {point.name.split()[0] for point in chosen})
    plans = [predicted(point, card) for point in chosen]  # one by one: Hydra is not made for threads
    print(f"{len(plans)} points are predicted after {time.perf_counter() - began:.0f} s", flush=True)
    room, runs = Room(card.usable * 0.93), options.models / f"runs-{options.seed}"
    rows: list[dict[str, Any]] = []
    writing = Lock()

    def one(number: int) -> None:
        if time.perf_counter() - began > options.within:
            return
        row = take(chosen[number], plans[number], room, options.timeout, runs / str(number))
        with writing:
            rows.append(row)
            facts = {"card": card.name, "seed": options.seed, "steps": STEPS, **machine(), "versions": versions(), "summary": summary(rows)}
            options.out.write_text(json.dumps({**facts, "points": rows}, indent=1) + "\n")

    with ThreadPoolExecutor(options.at_once) as pool:
        list(pool.map(one, range(len(chosen))))
    print(json.dumps(summary(rows)))


if __name__ == "__main__":
    main()
