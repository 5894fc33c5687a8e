"""`experiment=chatdoctor` through train.py beside the same recipe in HF Trainer: one GPU, one after the other, several rounds.

`python -m benchmarks.chatdoctor ROWS.jsonl OUT.json [--rounds 2] [--steps 25]` builds a random-weight Mistral-7B in /dev/shm.
Lorica's rate leaves its first steps out as the peer's does: it is read from metrics.csv between two records.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

MODEL = Path("/dev/shm/mistral-7b-random")


def lorica(rows: str, steps: int, *extra: str) -> dict[str, Any]:
    """One run of train.py; its own figures."""
    run_dir = Path("/dev/shm/lorica-bench")
    shutil.rmtree(run_dir, ignore_errors=True)
    command = [
        sys.executable,
        "train.py",
        f"run_dir={run_dir}",
        f"trainer.max_steps={steps}",
        "data.source=files",
        f"data.path={rows}",
        *extra,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout[-4000:], done.stderr[-3000:], sep="\n", flush=True)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    with (run_dir / "metrics.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    rates = [float(r["train/tokens_per_second"]) for r in table if r.get("train/tokens_per_second")]
    losses = [float(r["train/loss"]) for r in table if r.get("train/loss")]
    return {
        "who": "Lorica",
        "tokens_per_second": statistics.median(rates) if rates else metrics["train/tokens_per_second"],
        "tokens_per_second_with_first_step": metrics["train/tokens_per_second"],
        "peak_gib": metrics["memory/peak_gib"],
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }


def peer(rows: str, steps: int) -> dict[str, Any]:
    """One run of the same recipe in HF Trainer."""
    command = [sys.executable, "-m", "benchmarks.chatdoctor_hf", str(MODEL), rows, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    line = next((x for x in done.stdout.splitlines() if x.startswith("ROW ")), None)
    if line is None:
        print(done.stdout[-1500:], done.stderr[-3000:], flush=True)
        return {"who": "HF Trainer + PEFT", "failed": True}
    row: dict[str, Any] = json.loads(line[4:])
    return row


def main() -> None:
    """Both, in turn; medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows")
    parser.add_argument("out")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25)
    options = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline")
    if not (MODEL / "config.json").is_file():
        begun = time.time()
        subprocess.run([sys.executable, "-m", "benchmarks.random_mistral", str(MODEL), options.rows], check=True)
        print(f"model written in {time.time() - begun:.0f} s", flush=True)
    every = [
        "trainer.log_every_n_steps=5",
        "data.max_validation_examples=16",
        "data.max_test_examples=16",
        "data.max_generated_examples=4",
        "data.max_new_tokens=32",
    ]
    names = ("torch", "transformers", "peft", "bitsandbytes", "lightning")
    results: list[dict[str, Any]] = []
    report = {
        "device": torch.cuda.get_device_name(),
        "versions": {n: importlib.metadata.version(n) for n in names},
        "recipe": "batch 4, r=64 + lm_head, NF4, gradient checkpointing, paged_adamw_8bit, at most 512 tokens; random-weight Mistral-7B",
        "steps": options.steps,
        "date": time.strftime("%Y-%m-%d"),
        "runs": results,
    }
    for _ in range(options.rounds):
        for measure in (
            lambda: lorica(options.rows, options.steps, "experiment=chatdoctor", f"model.base={MODEL}", *every),
            lambda: peer(options.rows, options.steps),
        ):
            results.append(measure())
            Path(options.out).write_text(json.dumps(report, indent=2) + "\n")
    for row in results:
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


if __name__ == "__main__":
    main()
