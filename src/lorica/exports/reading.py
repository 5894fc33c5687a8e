"""Reads the questions with one model, in a process of its own: `python -m lorica.exports.reading FOLDER`.

FOLDER holds request.json and questions.json. It gets 0.npy, 1.npy ... (what each row's logits were), scores.npy of labelled rows, and
measured.json: how long it took and what it took. Times are of one row after the other, each alone; the process's memory is its own.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lorica.config import ConfigError
from lorica.durable import MANIFEST, write_json
from lorica.exports.formats import Scorer, check_intact, find
from lorica.exports.questions import Questions, Row
from lorica.screen import quiet_libraries

WARM_UP = 2  # rows that are read before time is taken


def main(home: Path) -> int:
    """Returns 0, or 2 with the mistake in measured.json."""
    quiet_libraries()
    request: dict[str, Any] = json.loads((home / "request.json").read_text("utf-8"))
    questions = Questions.read(home / "questions.json")
    try:
        measured = read(request, questions, home)
    except ConfigError as e:
        write_json(home / "measured.json", {"error": [e.where, str(e.value), e.rule, e.fix]})
        return 2
    write_json(home / "measured.json", measured)
    return 0


def read(request: dict[str, Any], questions: Questions, home: Path) -> dict[str, Any]:
    """Load, read, write what was found.

    Raises:
        ConfigError: the files are damaged.
    """
    folder = Path(request["folder"])
    begun = time.perf_counter()
    if request["format"] != "original" and (folder / MANIFEST).exists():
        check_intact(folder)
    scorer = find(request["format"]).load(folder, request["variant"], questions.task, questions.longest)
    loaded = time.perf_counter() - begun
    if differs := _other_tokens(scorer, questions):
        return {"tokenizer": differs}
    for row in questions.rows[:WARM_UP]:
        _answer(scorer, row)
    seconds, tokens, scores = [], 0, []
    for i, row in enumerate(questions.rows):
        begun = time.perf_counter()
        answers = _answer(scorer, row)
        seconds.append(time.perf_counter() - begun)
        tokens += sum(len(ids) for ids, _ in row.asked)
        if row.sequences:
            scores.append(_label_scores(row, answers))
            answers = [scorer.logits(row.ids, row.first)]
        np.save(home / f"{i}.npy", answers[0].astype(np.float32))
    if scores:
        np.save(home / "scores.npy", np.stack(scores))
    return {
        "load_seconds": loaded,
        "latency_p50_ms": 1000 * float(np.quantile(seconds, 0.5)),
        "latency_p95_ms": 1000 * float(np.quantile(seconds, 0.95)),
        "tokens_per_second": tokens / sum(seconds),
        "peak_memory_bytes": peak_memory(),
        "tokenizer": None,
    }


def _answer(scorer: Scorer, row: Row) -> list[np.ndarray]:
    return [scorer.logits(ids, first) for ids, first in row.asked]


def _label_scores(row: Row, answers: list[np.ndarray]) -> np.ndarray:
    """log p(label) of each label [K], of logits of each sequence from its first asked position."""
    firsts = [first for _, first in row.asked]
    known: dict[tuple[int, int], np.ndarray] = {}

    def log_p(sequence: int, place: int) -> np.ndarray:
        if (sequence, place) not in known:
            values = answers[sequence][place - firsts[sequence]].astype(np.float64)
            known[sequence, place] = values - values.max() - np.log(np.exp(values - values.max()).sum())
        return known[sequence, place]

    return np.array([sum(log_p(s, place)[token] for s, place, token in picks) for picks in row.picks])


def _other_tokens(scorer: Scorer, questions: Questions) -> str | None:
    """The first text that the runtime's own tokenizer reads otherwise, in words."""
    for text, special, ids in questions.texts:
        found = scorer.tokens(text, special)
        if found is None:
            return None
        if found != ids:
            at = next((i for i, (a, b) in enumerate(zip(ids, found, strict=False)) if a != b), min(len(ids), len(found)))
            there = f"{ids[at : at + 4]}, {found[at : at + 4]}"
            return f"{text[:80]!r} is {len(ids)} ids in training and {len(found)} here; from place {at + 1} on they differ: {there}"
    return None


def peak_memory() -> int:
    """Largest resident size of this process, in bytes.

    Linux's VmHWM: getrusage's figure is at least what the process that started this one had.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(code)  # some runtimes take long, or fail, to take themselves apart
