"""`experiment=chatdoctor` through train.py beside the same recipe in HF Trainer: one GPU, one after the other, several rounds.

`python -m benchmarks.chatdoctor ROWS.jsonl OUT.json [--rounds 2] [--steps 25]` builds a random-weight Mistral-7B in /dev/shm.
Lorica's rate leaves its first steps out as the peer's does: it is read from metrics.csv between two records.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from benchmarks.side_by_side import OURS, Measurement, Report, add_options, call, machine, measure, peer, train, versions

MODEL = Path("/dev/shm/mistral-7b-random")
WARM = 5  # steps of ours that are left out, of about four of the peer's


def main() -> None:
    """Both, in turn; medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=25)
    add_options(parser, rounds=2, timeout=600)
    options = parser.parse_args()
    if not (MODEL / "config.json").is_file():
        call([sys.executable, "-m", "benchmarks.random_mistral", str(MODEL), options.rows], 900)
    overrides = [
        "experiment=chatdoctor",
        f"model.base={MODEL}",
        "data.source=files",
        f"data.path={options.rows}",
        f"trainer.max_steps={options.steps}",
        "trainer.log_every_n_steps=5",
        "trainer.compile=true",  # as longer runs do by themselves
        "data.max_validation_examples=16",
        "data.max_test_examples=16",
        "data.max_generated_examples=4",
        "data.max_new_tokens=32",
        *options.extra,
    ]
    facts = {
        **machine(),
        "versions": versions(),
        "recipe": "batch 4, r=64 + lm_head, NF4, gradient checkpointing, paged_adamw_8bit, at most 512 tokens; random-weight Mistral-7B",
        "steps": options.steps,
    }
    theirs = (str(MODEL), options.rows, str(options.steps))
    measurements: list[Measurement] = [
        (OURS, "chatdoctor", partial(train, overrides, options.timeout, WARM)),
        ("hf", "chatdoctor", partial(peer, "benchmarks.chatdoctor_hf", *theirs, timeout=options.timeout)),
    ]
    measure(measurements, options.rounds, Report(options.out, "tokens_per_second", facts))


if __name__ == "__main__":
    main()
