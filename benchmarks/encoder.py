"""MiniLM LoRA on AG News, one epoch at batch 16, through train.py beside HF Trainer + PEFT, in turn, several rounds, same rows.

`python -m benchmarks.encoder DATA_FOLDER OUT.json [--rounds 3] [--examples 2000]`
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch


def lorica(folder: str, examples: int) -> dict[str, Any]:
    """One run of train.py."""
    run_dir = Path(tempfile.mkdtemp()) / "run"
    limits = ["data.max_validation_examples=64", "data.max_test_examples=64", f"data.max_train_examples={examples}"]
    command = [sys.executable, "train.py", "model=minilm_lora", "data=ag_news", "data.source=files", f"data.path={folder}"]
    subprocess.run([*command, *limits, "trainer.max_epochs=1", "seed=0", f"run_dir={run_dir}"], check=True, capture_output=True)
    metrics = json.loads((run_dir / "metrics.json").read_text())
    shutil.rmtree(run_dir.parent)
    return {"who": "Lorica", "samples_per_second": metrics["train/samples_per_second"], "seconds": metrics["train/seconds"]}


def peer(folder: str, examples: int) -> dict[str, Any]:
    """One run of HF Trainer."""
    command = [sys.executable, "-m", "benchmarks.encoder_hf", folder, str(examples), "16", "1e-3", "--no-test"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    row: dict[str, Any] = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("ROW "))[4:])
    return row


def main() -> None:
    """Both, in turn; the ratio of each round and their median."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=2000)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    ratios: list[float] = []
    for _ in range(options.rounds):
        ours, theirs = lorica(options.folder, options.examples), peer(options.folder, options.examples)
        runs += [ours, theirs]
        ratios.append(ours["samples_per_second"] / theirs["samples_per_second"])
        report = {
            "what": f"MiniLM LoRA, AG News, {options.examples} rows, batch 16, one epoch, fp32",
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
            "versions": {n: importlib.metadata.version(n) for n in ("torch", "transformers", "peft", "lightning")},
            "date": time.strftime("%Y-%m-%d"),
            "ratio_median": statistics.median(ratios),
            "ratios": ratios,
            "runs": runs,
        }
        Path(options.out).write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps({"ratio": ratios[-1], "lorica": ours["samples_per_second"], "hf": theirs["samples_per_second"]}), flush=True)


if __name__ == "__main__":
    main()
