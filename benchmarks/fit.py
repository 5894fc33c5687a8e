"""`trainer.fit` on cards of several sizes, which a large one plays by giving a process so much of its memory.

`python -m benchmarks.fit OUT.json --model DIR [--limits 6,7.5,11,15,22] [--lengths 512,1024,2048] [--stages fitted,settings]
[--ways 1:true,2:16]`

fitted: QLoRA of Mistral-7B, 8,192 tokens a step, at every limit and length with `trainer.fit=true`: tokens/s, peak, and the loss of every
step, which is to be the same at every limit. settings: every way by hand (parts, layers computed again), each once without a limit, for
a rate does not depend on what is left; the best of a cell is the fastest whose reserved memory is within the limit. A way that is in no
cell, by the plan, is not run.
A cell that the plan says does not fit is to be refused, not run into. Where OUT.json is there, what it has is kept and not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import memory, qlora
from benchmarks.side_by_side import Failed, call, machine, scratch, versions
from lorica.planning.cards import CARDS, GIB

TOKENS, STEPS, WARM = 8192, 16, 6
PARTS = (1, 2, 4, 8)
AGAIN = ("false", "8", "16", "24", "true", "offload")
WAYS = [f"{parts}:{again}" for parts in PARTS for again in AGAIN]
PLAN_ERROR = 1.08  # the plan is at most so many times too high


def recipe(model: Path, rows: Path, length: int, *more: str) -> list[str]:
    """The overrides of every run."""
    steps = (f"trainer.max_steps={STEPS}", "trainer.log_every_n_steps=1", f"model.max_length={length}")
    return qlora.recipe(model, rows, f"trainer.tokens_per_batch={TOKENS}", *steps, *more)


def trained(overrides: list[str], limit: float | None, timeout: float) -> dict[str, Any]:
    """Figures of one run, or why there are none: refused (exit code 2), out of memory, or another failure."""
    folder = scratch() / "run"
    program = ["train.py"] if limit is None else ["-m", "benchmarks.capped_train", f"{limit}"]
    began = time.perf_counter()
    try:
        call([sys.executable, *program, *overrides, f"run_dir={folder}"], timeout)
        figures = json.loads((folder / "metrics.json").read_text())
        with (folder / "metrics.csv").open(newline="") as file:
            steps = [row for row in csv.DictReader(file) if row.get("train/loss")]
    except (Failed, OSError) as e:
        tail = getattr(e, "tail", [])
        kind = "refused" if "exit code 2" in str(e) else "out of memory" if any("out of memory" in line for line in tail) else "failed"
        return {"ended": kind, "output": tail}
    rates = [float(row["train/tokens_per_second"]) for row in steps[WARM:] if row.get("train/tokens_per_second")]
    return {
        "ended": "trained",
        "tokens_per_second": statistics.median(rates),
        "peak_gib": figures["memory/peak_gib"],
        "reserved_gib": figures["memory/reserved_gib"],
        "predicted_gib": figures.get("memory/predicted_gib"),
        "notes": [line for line in (folder / "train.log").read_text().splitlines() if "note:" in line or " layers " in line],
        "losses": [float(row["train/loss"]) for row in steps],
        "seconds": time.perf_counter() - began,
    }


def settings(length: int, ways: list[str]) -> list[tuple[str, list[str]]]:
    """(name, overrides) of ways by hand, `parts:layers computed again` each: the same tokens a step."""
    found = []
    for name in ways:
        parts, _, again = name.partition(":")
        tokens = TOKENS // int(parts)
        if tokens >= length:
            batch = [f"trainer.tokens_per_batch={tokens}", f"trainer.accumulate_grad_batches={parts}"]
            way = [f"trainer.gradient_checkpointing={again}", "trainer.resident_weights=false", "trainer.fit=false"]
            found.append((f"{parts} parts, again {again}", [*batch, *way]))
    return found


def table(rows: list[dict[str, Any]], by_hand: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each cell beside the best way by hand that is within its limit."""
    found = []
    for row in rows:
        own = [r for r in by_hand if r["length"] == row["length"] and r["ended"] == "trained" and r["reserved_gib"] <= row["limit"]]
        best = max(own, key=lambda r: float(r["tokens_per_second"]), default=None)
        share = row["tokens_per_second"] / best["tokens_per_second"] if best and row["ended"] == "trained" else None
        found.append(
            {
                **{k: row.get(k) for k in ("limit", "length", "ended", "tokens_per_second", "peak_gib", "predicted_gib")},
                "best": best["name"] if best else None,
                "share_of_best": share,
            }
        )
    return found


def loss_spread(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The largest relative difference of a step's loss between limits, by length and day: another version may plan other batches."""
    spread = {}
    for length, day in sorted({(row["length"], row.get("date", "")) for row in rows}):
        same = [row for row in rows if (row["length"], row.get("date", "")) == (length, day)]
        curves = [row["losses"] for row in same if row["ended"] == "trained"]
        if len(curves) > 1:
            spread[f"{length} {day}".strip()] = max(max(at) / min(at) - 1 for at in zip(*curves, strict=False))
    return spread


def main() -> None:
    """Both stages, written after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--limits", default="6,7.5,11,15,22")
    parser.add_argument("--lengths", default="512,1024,2048")
    parser.add_argument("--stages", default="fitted,settings")
    parser.add_argument("--ways", default=",".join(WAYS), help="of the settings by hand")
    parser.add_argument("--timeout", type=float, default=150)
    parser.add_argument("--card", default="h200_141gb", choices=list(CARDS), help="that it is run on")
    parser.add_argument("--within", type=float, default=1e9, help="seconds after which no further run is begun")
    options = parser.parse_args()
    began = time.perf_counter()
    rows_folder = options.model.with_name(f"{options.model.name}-rows")
    qlora.prepare(options.model, rows_folder, "mixed")
    limits = [float(limit) for limit in options.limits.split(",")]
    earlier: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    fitted: list[dict[str, Any]] = earlier.get("fitted", [])
    by_hand: list[dict[str, Any]] = earlier.get("settings", [])
    by_hand = [row for row in by_hand if row["ended"] != "fits no limit"]  # of these limits, perhaps
    done = {(row["length"], row.get("limit", row.get("name"))) for row in [*fitted, *by_hand]}

    def to_do(length: int, what: float | str) -> bool:
        return (length, what) not in done and time.perf_counter() - began < options.within

    def keep(row: dict[str, Any], where: list[dict[str, Any]]) -> None:
        where.append({**row, "date": time.strftime("%Y-%m-%d")})
        print(json.dumps({k: v for k, v in row.items() if k not in ("losses", "output", "notes")}), flush=True)
        facts = {"tokens": TOKENS, "steps": STEPS, **machine(), "versions": versions()}
        text = {
            **earlier,
            **facts,
            "cells": table(fitted, by_hand),
            "loss_spread": loss_spread(fitted),
            "fitted": fitted,
            "settings": by_hand,
        }
        options.out.write_text(json.dumps(text, indent=1) + "\n")

    for length in map(int, options.lengths.split(",")):
        for limit in limits if "fitted" in options.stages else ():
            if to_do(length, limit):
                own = recipe(options.model, rows_folder / "mixed", length)
                keep({"limit": limit, "length": length, **trained(own, limit, options.timeout)}, fitted)
        for name, way in settings(length, options.ways.split(",")) if "settings" in options.stages else ():
            if to_do(length, name):
                own = recipe(options.model, rows_folder / "mixed", length, *way)
                needs = memory.predicted(memory.Point(name, tuple(own)), CARDS[options.card]).fit.peak / GIB
                fits = needs <= max(limits) * PLAN_ERROR
                figures = trained(own, None, options.timeout) if fits else {"ended": "fits no limit"}
                keep({"name": name, "length": length, "predicted_gib": needs, **figures}, by_hand)
    print(json.dumps(table(fitted, by_hand), indent=1))


if __name__ == "__main__":
    main()
