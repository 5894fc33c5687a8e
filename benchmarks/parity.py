"""Whether the ways to run learn the same: one training each, of the same rows in the same order, their losses compared.

`python -m benchmarks.parity OUT.json [--ways plain,fast,fp8] [--smooth 10] [--together] -- OVERRIDES...`

plain is `benchmarks.plain_train`, fast is train.py as it is typed, fp8 the same with trainer.fp8=true. The first way named is what the
others are compared with: at each record of the loss, averaged over --smooth records, and in what the test gives.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import Failed, call, machine, scratch, versions

FAST = ("trainer.compile=true",)
WAYS = {"plain": ("-m", "benchmarks.plain_train"), "fast": ("train.py", *FAST), "fp8": ("train.py", *FAST, "trainer.fp8=true")}

SHOWN = ("largest", "test/loss", "test/accuracy")


def take(way: str, overrides: list[str], timeout: float) -> dict[str, Any]:
    """One training: its losses by record, its metrics.

    Raises:
        Failed: it does not end well.
    """
    folder = scratch()
    try:
        call([sys.executable, *WAYS[way], *overrides, f"run_dir={folder / 'run'}"], timeout)
        metrics = json.loads((folder / "run" / "metrics.json").read_text())
        with (folder / "run" / "metrics.csv").open(newline="") as file:
            losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {"losses": losses, "metrics": {k: v for k, v in metrics.items() if k.startswith("test/")}}


def smoothed(losses: list[float], over: int) -> list[float]:
    """Means of `over` losses that follow each other."""
    return [sum(losses[i : i + over]) / over for i in range(len(losses) - over + 1)]


def compared(run: dict[str, Any], base: dict[str, Any], over: int) -> dict[str, Any]:
    """Largest relative difference of the smoothed losses, that of the test's figures.

    Raises:
        ValueError: the trainings have not the same number of records, or too few.
    """
    if len(run["losses"]) != len(base["losses"]) or len(base["losses"]) < over:
        raise ValueError(f"{len(run['losses'])} and {len(base['losses'])} records of the loss, at least {over} are needed")
    pairs = zip(smoothed(run["losses"], over), smoothed(base["losses"], over), strict=True)
    return {
        "largest_difference_smoothed": max(abs(a - b) / b for a, b in pairs),
        **{f"{k}_difference": run["metrics"][k] - base["metrics"][k] for k in base["metrics"]},
    }


def main() -> None:
    """All ways, each a process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ways", default="plain,fast", help=", ".join(WAYS))
    parser.add_argument("--smooth", type=int, default=10)
    parser.add_argument("--together", action="store_true", help="all at once, where the memory allows it")
    parser.add_argument("--timeout", type=float, default=600)
    parser.add_argument("overrides", nargs="+")
    options = parser.parse_args()
    ways = options.ways.split(",")
    if unknown := [w for w in ways if w not in WAYS]:
        raise SystemExit(f"--ways: no {', '.join(unknown)}; there are {', '.join(WAYS)}")
    overrides = ["trainer.log_every_n_steps=1", *options.overrides]
    with ThreadPoolExecutor(len(ways) if options.together else 1) as pool:
        pending = {way: pool.submit(take, way, overrides, options.timeout) for way in ways}
        try:
            runs = {way: future.result() for way, future in pending.items()}
        except Failed as e:
            raise SystemExit(f"{e}\n" + "\n".join(e.tail)) from None
    for way in ways[1:]:
        runs[way]["compared"] = compared(runs[way], runs[ways[0]], options.smooth)
    facts = {**machine(), "versions": versions(), "overrides": overrides, "compared_with": ways[0], "smoothed_over": options.smooth}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**facts, "runs": runs}, indent=2) + "\n")
    for way, run in runs.items():
        shown = {k: round(v, 6) for k, v in {**run["metrics"], **run.get("compared", {})}.items() if k.startswith(SHOWN)}
        print(way, f"loss {run['losses'][0]:.4f} to {run['losses'][-1]:.4f}", shown)


if __name__ == "__main__":
    main()
