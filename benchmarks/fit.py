"""`trainer.fit` on cards of several sizes, which a large one plays by giving a process so much of its memory.

`python -m benchmarks.fit OUT.json --model DIR [--limits 6,7.5,11,15,22] [--lengths 512,1024,2048] [--stages fitted,settings]
[--ways 1:true,2:16] [--gpus 0,1]`

fitted: QLoRA of Mistral-7B, 8,192 tokens a step, at every limit and length with `trainer.fit=true`: tokens/s, peak, and the loss of every
step, which is to be the same at every limit. settings: every way by hand (parts, layers computed again), each once without a limit, for
a rate does not depend on what is left; the best of a cell is the fastest whose reserved memory is within the limit. A way that is in no
cell, by the plan, is not run.
A cell that the plan says does not fit is to be refused, not run into. Where OUT.json is there, what it has is kept and not run again.
Several GPUs share the runs, one at a time on each; the next run's process imports its libraries meanwhile.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

from benchmarks import memory, qlora
from benchmarks.side_by_side import Failed, finish, machine, scratch, start, stop, versions
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


class Turns:
    """Runs of train.py on one GPU, one after another.

    Args:
        gpu: its number; "": whichever this process would take.
    """

    def __init__(self, gpu: str) -> None:
        self._environment = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        self._now: subprocess.Popen[str] | None = None
        self._next: subprocess.Popen[str] | None = None
        self.closed = False

    def _started(self) -> subprocess.Popen[str]:
        return start([sys.executable, "-m", "benchmarks.next_train"], **self._environment)

    def train(self, overrides: list[str], limit: float | None, timeout: float) -> None:
        """Run it to its end.

        Raises:
            Failed: it exits with an error, or is not done in time.
        """
        self._now = self._next or self._started()
        self._next = self._started()
        finish(self._now, timeout, json.dumps({"limit": limit, "overrides": overrides}) + "\n")

    def close(self) -> None:
        """Nothing more is to be run, nor what runs now to be ended."""
        self.closed = True
        for process in (self._now, self._next):
            if process is not None and process.poll() is None:
                stop(process)


def trained(turns: Turns, overrides: list[str], limit: float | None, timeout: float) -> dict[str, Any]:
    """Figures of one run, or why there are none: refused (exit code 2), out of memory, or another failure."""
    folder = scratch() / "run"
    began = time.perf_counter()
    try:
        turns.train([*overrides, f"run_dir={folder}"], limit, timeout)
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


class Figures:
    """What was measured: there before, and as it comes, written after every run.

    Args:
        out: the file.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._writing = out, Lock()
        self._earlier: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
        self.fitted: list[dict[str, Any]] = self._earlier.get("fitted", [])
        by_hand: list[dict[str, Any]] = self._earlier.get("settings", [])
        self.by_hand = [row for row in by_hand if row["ended"] != "fits no limit"]  # of these limits, perhaps

    def done(self) -> set[tuple[int, Any]]:
        """(length, limit or name) of each."""
        return {(row["length"], row.get("limit", row.get("name"))) for row in [*self.fitted, *self.by_hand]}

    def keep(self, row: dict[str, Any]) -> None:
        """One more, from any thread."""
        with self._writing:
            (self.fitted if "limit" in row else self.by_hand).append({**row, "date": time.strftime("%Y-%m-%d")})
            print(json.dumps({k: v for k, v in row.items() if k not in ("losses", "output", "notes")}), flush=True)
            text = {
                **self._earlier,
                "tokens": TOKENS,
                "steps": STEPS,
                **machine(),
                "versions": versions(),
                "cells": table(self.fitted, self.by_hand),
                "loss_spread": loss_spread(self.fitted),
                "fitted": self.fitted,
                "settings": self.by_hand,
            }
            self._out.write_text(json.dumps(text, indent=1) + "\n")


Run = tuple[dict[str, Any], list[str]]  # what is kept of it beside its figures; its overrides


def wanted(figures: Figures, options: argparse.Namespace, rows: Path) -> Generator[Run]:
    """The runs that have no figures yet; a way that fits no limit is kept as that."""
    done, limits = figures.done(), [float(n) for n in options.limits.split(",")]
    lengths = [int(n) for n in options.lengths.split(",")]
    for length in lengths if "fitted" in options.stages else ():
        yield from (({"limit": n, "length": length}, recipe(options.model, rows, length)) for n in limits if (length, n) not in done)
    for length in lengths if "settings" in options.stages else ():
        for name, way in settings(length, options.ways.split(",")):
            if (length, name) not in done:
                own = recipe(options.model, rows, length, *way)
                needs = memory.predicted(memory.Point(name, tuple(own)), CARDS[options.card]).fit.peak / GIB
                row = {"name": name, "length": length, "predicted_gib": needs}
                if needs <= max(limits) * PLAN_ERROR:
                    yield row, own
                else:
                    figures.keep({**row, "ended": "fits no limit"})


def main() -> None:
    """Both stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--limits", default="6,7.5,11,15,22")
    parser.add_argument("--lengths", default="512,1024,2048")
    parser.add_argument("--stages", default="fitted,settings")
    parser.add_argument("--ways", default=",".join(WAYS), help="of the settings by hand")
    parser.add_argument("--timeout", type=float, default=150)
    parser.add_argument("--card", default="h200_141gb", choices=list(CARDS), help="that it is run on")
    parser.add_argument("--gpus", default="", help="numbers of those that share the runs")
    parser.add_argument("--within", type=float, default=1e9, help="seconds after which no further run is begun")
    options = parser.parse_args()
    last = time.perf_counter() + options.within
    rows = options.model.with_name(f"{options.model.name}-rows")
    qlora.prepare(options.model, rows, "mixed")
    figures = Figures(options.out)
    runs, choosing = wanted(figures, options, rows / "mixed"), Lock()  # planned while others run, one by one: Hydra is not made for threads

    def next_run() -> Run | None:
        with choosing:
            return next(runs, None) if time.perf_counter() < last else None

    def take_turns(turns: Turns) -> None:
        while (run := next_run()) is not None:
            row, overrides = run
            found = trained(turns, overrides, row.get("limit"), options.timeout)
            if not turns.closed:
                figures.keep({**row, **found})

    gpus = [Turns(gpu) for gpu in options.gpus.split(",")]
    with ThreadPoolExecutor(len(gpus)) as pool:
        try:
            list(pool.map(take_turns, gpus))
        finally:
            with choosing:
                runs.close()
            for turns in gpus:
                turns.close()
    print(json.dumps(table(figures.fitted, figures.by_hand), indent=1))


if __name__ == "__main__":
    main()
