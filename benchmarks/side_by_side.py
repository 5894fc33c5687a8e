"""What the comparisons have in common: one process a measurement, a time limit for each, rounds in turn, and a report that is
written after every one of them, so that what was measured is kept whatever happens next."""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

OURS = "lorica"
TAIL = 15  # lines of a failed process's output that the report keeps
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "lightning", "accelerate", "triton", "trl", "liger-kernel", "unsloth")

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
ENVIRONMENT |= {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}  # so that the last lines of a failure are about the failure


class Failed(Exception):
    """A measurement that gave no figure. tail: the end of what it printed."""

    def __init__(self, why: str, output: str) -> None:
        super().__init__(why)
        self.tail = output.splitlines()[-TAIL:]


def call(command: list[str], timeout: float) -> str:
    """Run one process to its end and return what it printed on both streams.

    Raises:
        Failed: see `finish`.
    """
    return finish(start(command), timeout)


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """A process for `finish`, with more environment variables than this one has."""
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its data loaders go with it
        env={**os.environ, **ENVIRONMENT, **environment},
    )


def finish(process: subprocess.Popen[str], timeout: float, told: str = "") -> str:
    """Tell a process something on its stdin and wait for its end: what it printed on both streams.

    Raises:
        Failed: it exits with an error, or is not done in time; then it is stopped with all processes it started.
    """
    try:
        output, _ = process.communicate(told, timeout=timeout)
    except BaseException as e:
        stop(process)
        output, _ = process.communicate()
        if isinstance(e, subprocess.TimeoutExpired):
            raise Failed(f"not done after {timeout:.0f} s", output) from None
        raise
    if process.returncode:
        raise Failed(f"exit code {process.returncode}", output)
    return output


def stop(process: subprocess.Popen[str]) -> None:
    """Kill it with all processes it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def peer(module: str, *arguments: str, timeout: float) -> dict[str, Any]:
    """Run `python -m MODULE ...` and return the `ROW {json}` it prints."""
    output = call([sys.executable, "-m", module, *arguments], timeout)
    line = next((x for x in output.splitlines() if x.startswith("ROW ")), None)
    if line is None:
        raise Failed("no result printed", output)
    row: dict[str, Any] = json.loads(line[4:])
    return row


def scratch() -> Path:
    """A new folder for runs, in memory where there is such a file system, so that disks don't enter the measurement."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="lorica-bench-", dir=memory if os.access(memory, os.W_OK) else None))


def train(overrides: list[str], timeout: float, warm: int, run_dir: Path | None = None) -> dict[str, Any]:
    """One run of train.py and its own figures.

    The rate is the median of the records in metrics.csv that begin at step `warm` or later.

    Args:
        run_dir: where the run stays; None: it is removed.
    """
    folder = run_dir or scratch() / "run"
    try:
        output = call([sys.executable, "train.py", *overrides, f"run_dir={folder}"], timeout)
        if not (folder / "metrics.json").is_file():
            raise Failed("no metrics.json", output)
        metrics = json.loads((folder / "metrics.json").read_text())
        with (folder / "metrics.csv").open(newline="") as file:
            table = [r for r in csv.DictReader(file) if r.get("train/loss")]
    finally:
        if run_dir is None:
            shutil.rmtree(folder.parent, ignore_errors=True)
    begins = [0, *(int(float(r["step"])) for r in table)]
    rated = [(b, float(r["train/tokens_per_second"])) for b, r in zip(begins, table, strict=False) if r.get("train/tokens_per_second")]
    warmed = [rate for b, rate in rated if b >= warm]
    whole = metrics["train/tokens_per_second"]
    rate = statistics.median(warmed) if warmed else rated[-1][1] if rated else whole
    return {
        "tokens_per_second": rate,
        "records": len(warmed),
        "tokens_per_second_with_first_step": whole,
        "samples_per_second_with_first_step": metrics["train/samples_per_second"],
        "seconds": metrics["train/seconds"],
        "first_step_seconds": metrics["train/first_step_seconds"],
        "peak_gib": metrics["memory/peak_gib"],
        "energy_joules": metrics.get("train/energy_joules"),
        "first_loss": float(table[0]["train/loss"]) if table else None,
        "last_loss": float(table[-1]["train/loss"]) if table else None,
        "settings": list(overrides),
    }


def versions(names: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, str]:
    """Device, driver, Python, date."""
    facts = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    if not torch.cuda.is_available():
        return {"device": f"{platform.machine()}, {torch.get_num_threads()} threads", **facts}
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split() if shutil.which(asked[0]) else []
    cuda = str(torch.version.cuda)
    return {"device": torch.cuda.get_device_name(), "driver": driver[0] if driver else "", "cuda": cuda, **facts}


class Report:
    """The JSON of one comparison, written again after every measurement.

    Args:
        unit: the figure that is compared, as `tokens_per_second`.
        limits: what the device could do at most, by case, in that unit.
        beside: the case whose peers a case is compared with; itself where none is given.
    """

    def __init__(
        self, path: Path, unit: str, facts: dict[str, Any], limits: dict[str, float] | None = None, beside: dict[str, str] | None = None
    ) -> None:
        self.path, self.unit, self.facts = path, unit, facts
        self.limits, self.beside = limits or {}, beside or {}
        self.runs: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """Keep one measurement, print it, write the file."""
        self.runs.append(row)
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "settings"}), flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(json.dumps({**self.facts, "medians": self.medians(), "runs": self.runs}, indent=2) + "\n")
        os.replace(temporary, self.path)

    def medians(self) -> list[dict[str, Any]]:
        """One line for each who and case: median and spread, peak memory, first step, share of the limit, ratio to the best peer."""
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in self.runs:
            if self.unit in row:
                groups.setdefault((row["case"], row["who"]), []).append(row)
        rates = {key: [r[self.unit] for r in rows] for key, rows in groups.items()}
        lines = []
        for (case, who), rows in groups.items():
            median = statistics.median(rates[case, who])
            base = self.beside.get(case, case)
            theirs = [statistics.median(v) for (c, w), v in rates.items() if c == base and w != OURS]
            first = [r["first_step_seconds"] for r in rows if r.get("first_step_seconds") is not None]
            lines.append(
                {
                    "who": who,
                    "case": case,
                    self.unit: median,
                    "min": min(rates[case, who]),
                    "max": max(rates[case, who]),
                    "rounds": len(rows),
                    "peak_gib": max((r.get("peak_gib") or 0.0 for r in rows), default=0.0),
                    "first_step_seconds": statistics.median(first) if first else None,
                    "share_of_limit": median / self.limits[case] if self.limits.get(case) else None,
                    "ratio_to_best_peer": median / max(theirs) if theirs and who == OURS else None,
                }
            )
        return lines

    def table(self) -> str:
        """The medians for the eye, then what failed."""
        head = ("who", "case", self.unit.replace("_per_second", "/s") + " [min-max]", "peak GiB", "first s", "of limit", "x best peer")
        rows = [head]
        for m in self.medians():
            share, ratio, first = m["share_of_limit"], m["ratio_to_best_peer"], m["first_step_seconds"]
            rate = f"{m[self.unit]:,.0f} [{m['min']:,.0f}-{m['max']:,.0f}]"
            cells = (f"{m['peak_gib']:.2f}", "" if first is None else f"{first:.1f}", "" if share is None else f"{share:.1%}")
            rows.append((m["who"], m["case"], rate, *cells, "" if ratio is None else f"{ratio:.2f}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *(f"{r['who']} {r['case']}: {r['failed']}" for r in self.runs if "failed" in r)])


Measurement = tuple[str, str, Callable[[], dict[str, Any]]]  # who, case, what gives its figures


def measure(measurements: list[Measurement], rounds: int, report: Report) -> None:
    """All, in turn, round after round. What failed is not tried again: the machine's time is for the others."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the process under way is stopped too
    failed: set[tuple[str, str]] = set()
    for number in range(rounds):
        for who, case, take in measurements:
            if (who, case) in failed:
                continue
            begun = time.perf_counter()
            row: dict[str, Any] = {"who": who, "case": case, "round": number}
            try:
                row = {**take(), **row}
            except Failed as e:
                failed.add((who, case))
                row |= {"failed": str(e), "output": e.tail}
            except (OSError, ValueError, LookupError) as e:  # figures that are not where they should be
                failed.add((who, case))
                row |= {"failed": f"{type(e).__name__}: {e}"}
            report.add({"who": who, "case": case, **row, "wall_seconds": time.perf_counter() - begun})
    print(report.table(), flush=True)


def add_options(parser: argparse.ArgumentParser, rounds: int, timeout: int) -> None:
    """The options that every comparison has."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--timeout", type=float, default=timeout, help="seconds that one measurement may take")
    parser.add_argument("--extra", action="append", default=[], help="one more override for train.py; may be given again")


def chosen(text: str | None, known: Iterable[str], what: str) -> list[str]:
    """The names of a comma-separated list; all that are known without one."""
    names = list(known)
    wanted = text.split(",") if text else names
    unknown = [n for n in wanted if n not in names]
    if unknown:
        raise SystemExit(f"--{what}: no {', '.join(unknown)}; there are {', '.join(names)}")
    return wanted
