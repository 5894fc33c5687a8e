"""A classifier on news lines through train.py beside HF Trainer + PEFT, in turn, several rounds, same rows. Two forms:

`python -m benchmarks.encoder DATA_FOLDER OUT.json [--rounds 3] [--examples 2000]`: MiniLM with LoRA on AG News, one epoch at batch
16, on a CPU; whole-run rates.

`python -m benchmarks.encoder DATA_FOLDER OUT.json --model DIR [--cases lora-32k,predict] [--who lorica,tuned] [--steps N]`:
RoBERTa-base on a GPU. DIR is built with random weights where there is none; random rows in AG News' layout, 53 tokens on average, are
written into DATA_FOLDER once. Rates leave the first steps out. The limit is by `benchmarks.limit`. The
predict cases give rows/s as predict.py prints them, and those of the whole command without its start (7,600 rows less 76).
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import limit, random_text
from benchmarks.side_by_side import (
    OURS,
    Failed,
    Measurement,
    Report,
    add_options,
    call,
    chosen,
    machine,
    measure,
    peer,
    scratch,
    train,
    versions,
)

WARM = 10  # steps of ours that are left out
ASKED = {"asked-7600.csv": 7600, "asked-76.csv": 76}
HELD_OUT = ["data.max_validation_examples=64", "data.max_test_examples=64"]


@dataclass(frozen=True)
class Case:
    """One comparison. beside: the case whose peers this one is compared with, for they have no batches by tokens."""

    model: str
    tokens: int
    steps: int
    beside: str = ""


CASES = {
    "lora-32k": Case("roberta_lora", 32768, 90),
    "lora-8k": Case("roberta_lora", 8192, 200, beside="lora-32k"),
    "full-32k": Case("roberta_full", 32768, 90),
    "full-8k": Case("roberta_full", 8192, 200, beside="full-32k"),
}
PREDICT = {"predict": None, "predict-32": 32}  # batch_size
PEERS = ("tuned", "notebook")
PEER_STEPS = 104  # 4 to warm up and 100: Trainer sorts by length within 50 batches, so that whole turns of them are measured


# ------------------------------------------------------------------------------------------------------------- MiniLM on a CPU


def minilm(options: argparse.Namespace) -> None:
    """Both, in turn; the ratio of each round and their median."""
    folder, examples = str(options.folder), options.examples or 2000
    overrides = ["model=minilm_lora", "data=ag_news", "data.source=files", f"data.path={folder}", f"data.max_train_examples={examples}"]
    overrides += [*HELD_OUT, "trainer.max_epochs=1", "seed=0", *options.extra]
    runs: list[dict[str, Any]] = []
    ratios: list[float] = []
    for _ in range(options.rounds):
        run = train(overrides, options.timeout, 0)
        own = {"who": "Lorica", "samples_per_second": run["samples_per_second_with_first_step"], "seconds": run["seconds"]}
        theirs = peer("benchmarks.encoder_hf", folder, str(examples), "16", "1e-3", "--no-test", timeout=options.timeout)
        runs += [own, theirs]
        ratios.append(own["samples_per_second"] / theirs["samples_per_second"])
        report = {
            "what": f"MiniLM LoRA, AG News, {examples} rows, batch 16, one epoch, fp32",
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": versions(("torch", "transformers", "peft", "lightning")),
            "date": time.strftime("%Y-%m-%d"),
            "ratio_median": statistics.median(ratios),
            "ratios": ratios,
            "runs": runs,
        }
        options.out.write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps({"ratio": ratios[-1], "lorica": own["samples_per_second"], "hf": theirs["samples_per_second"]}), flush=True)


# ----------------------------------------------------------------------------------------------------------- RoBERTa on a GPU


def recipe(name: str, model: Path, folder: Path, *more: str) -> list[str]:
    """The overrides of every run of ours."""
    data = ["data=ag_news", "data.source=files", f"data.path={folder / 'rows'}", *HELD_OUT]
    return [f"model={name}", f"model.base={model}", *data, "optimizer.name=adamw", *more]


def prepare(model: Path, folder: Path, rows: int) -> dict[str, Any]:
    """Write the rows and, as Lorica encodes them, their ids, unless they are there; the facts of them."""
    from lorica.composition import compose
    from lorica.data.encoding import ClassifierEncoder
    from lorica.data.registry import build_data
    from lorica.models.base import find_base, load_tokenizer

    facts = folder / "facts.json"
    if not facts.is_file():
        tokenizer = load_tokenizer(find_base(str(model), None))
        random_text.write_news(folder / "rows", tokenizer, rows)
        for name, n in ASKED.items():
            random_text.write_texts(folder / name, tokenizer, n)
        config = compose("train", recipe("roberta_lora", model, folder))
        data = build_data(config.data, config.seed)
        data.load()
        data.encode(ClassifierEncoder(tokenizer, config.model.max_length))
        with (folder / "ids.jsonl").open("w") as file:
            for row in data.train_rows:
                file.write(json.dumps({"input_ids": row.ids.tolist(), "label": row.label}) + "\n")
        count, n = sum(len(r.ids) for r in data.train_rows), len(data.train_rows)
        facts.write_text(json.dumps({"rows": n, "tokens": count, "mean_tokens": count / n}) + "\n")
    found: dict[str, Any] = json.loads(facts.read_text())
    return found


def ours(overrides: list[str], timeout: float, mean_tokens: float) -> dict[str, Any]:
    """A run of train.py; its samples are those of average length, for the steps that are measured are not all of an epoch."""
    row = train(overrides, timeout, WARM)
    return {**row, "samples_per_second": row["tokens_per_second"] / mean_tokens}


def predict(run: Path, options: argparse.Namespace, batch: int | None) -> dict[str, Any]:
    """Rows/s of predict.py on 7,600 rows, with a run of two steps that is made where there is none."""
    if not (run / "metrics.json").is_file():
        more = ["data.max_train_examples=200", "trainer.max_steps=2", "trainer.batch_size=16", *options.extra]
        train(recipe("roberta_lora", options.model, options.folder, *more), options.timeout, 0, run)
    seconds: dict[str, float] = {}
    printed: dict[str, str] = {}
    for name in ASKED:
        command = [sys.executable, "predict.py", f"run={run}", f"input={options.folder / name}", f"output={run.parent / name}"]
        command += [
            f"batch_size={batch or 'null'}",
            *(x.removeprefix("trainer.") for x in options.extra if x.startswith("trainer.accelerator=")),
        ]
        begun = time.perf_counter()
        printed[name] = call(command, options.timeout)
        seconds[name] = time.perf_counter() - begun
    many, few = ASKED
    line = re.search(r"\(([\d,]+) rows/s\)", " ".join(printed[many].split()))
    if line is None:
        raise Failed("no rate printed", printed[many])
    return {
        "samples_per_second": float(line[1].replace(",", "")),
        "samples_per_second_of_command": (ASKED[many] - ASKED[few]) / (seconds[many] - seconds[few]),
        "seconds_of_command": seconds[many],
        "seconds_of_command_with_76_rows": seconds[few],
        "settings": {"batch_size": batch},
    }


def measurements(options: argparse.Namespace, cases: list[str], who: list[str], folder: Path, mean_tokens: float) -> list[Measurement]:
    """Ours of each case, then the peers of it or of the case it is beside; each peer once."""
    found: list[Measurement] = []
    seen: set[tuple[str, str]] = set()
    for name in cases:
        if name in PREDICT:
            if OURS in who:
                found.append((OURS, name, partial(predict, folder / "run", options, PREDICT[name])))
            continue
        case, base = CASES[name], CASES[name].beside or name
        if OURS in who:
            steps = [f"trainer.tokens_per_batch={case.tokens}", f"trainer.max_steps={options.steps or case.steps}", "trainer.max_epochs=-1"]
            overrides = [*recipe(case.model, options.model, options.folder, *steps), *options.extra]
            found.append((OURS, name, partial(ours, overrides, options.timeout, mean_tokens)))
        for rival in PEERS:
            if rival not in who or (rival, base) in seen:
                continue
            seen.add((rival, base))
            given = json.dumps({"steps": options.steps or PEER_STEPS, "lora": case.model == "roberta_lora"})
            arguments = (rival, str(options.model), str(options.folder / "ids.jsonl"), given)
            found.append((rival, base, partial(peer, "benchmarks.roberta_peer", *arguments, timeout=options.timeout)))
    return found


def roberta(options: argparse.Namespace) -> None:
    """All cases, in turn."""
    cases, who = chosen(options.cases, (*CASES, *PREDICT), "cases"), chosen(options.who, (OURS, *PEERS), "who")
    options.model, options.folder = options.model.expanduser().resolve(), options.folder.expanduser().resolve()
    if not (options.model / "config.json").is_file():
        call([sys.executable, "-m", "benchmarks.random_roberta", str(options.model)], 600)
    rows = prepare(options.model, options.folder, options.examples or 60_000)
    rate = limit.gemm_rate()
    limits: dict[str, float] = {}
    for name, case in CASES.items():
        if rate:
            flops = limit.flops_per_token(options.model, every_weight=case.model == "roberta_full")
            limits[name] = rate / flops / rows["mean_tokens"]
    facts = {
        "what": "RoBERTa-base classifier, four classes, LoRA r=8 on query and value or every weight, AdamW",
        **machine(),
        "versions": versions(),
        "rows": rows,
        "gemm_tflops": rate and rate / 1e12,
        "limits_samples_per_second": limits,
    }
    print(json.dumps(facts), flush=True)
    report = Report(options.out, "samples_per_second", facts, limits, {n: c.beside for n, c in CASES.items() if c.beside})
    folder = scratch()
    try:
        measure(measurements(options, cases, who, folder, rows["mean_tokens"]), options.rounds, report)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """The form that the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--examples", type=int, help="training rows: 2,000 of MiniLM's, 60,000 random ones of RoBERTa's")
    parser.add_argument("--model", type=Path, help="folder of a RoBERTa; built with random weights where there is none")
    parser.add_argument("--cases", help=", ".join((*CASES, *PREDICT)))
    parser.add_argument("--who", help=", ".join((OURS, *PEERS)))
    parser.add_argument("--steps", type=int, help="of every run, in place of the case's own")
    add_options(parser, rounds=3, timeout=600)
    options = parser.parse_args()
    if options.model is None:
        minilm(options)
    else:
        roberta(options)


if __name__ == "__main__":
    main()
