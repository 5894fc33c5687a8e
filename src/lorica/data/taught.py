"""What of its rows a model is taught: counts over token ids, and rows as text in which the learnt stretches are told apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from lorica.data.encoding import IGNORE, Candidates, CausalEncoder, ClassifierEncoder, Encoded, Truncation
from lorica.data.examples import Example
from lorica.data.oddities import visible
from lorica.data.personal import masked

PERCENTILES = (5, 50, 95, 99, 100)
BARS = 16  # of the histogram, at most
HEAD, TAIL = 400, 160  # characters of a long stretch that are shown
SHOWN_ROWS = 4  # rows of the sample, evenly spaced, besides the longest and those with a fault


@dataclass(frozen=True)
class Taught:
    """A row as the model reads it.

    pieces: (text, whether it is learnt) in order, personal data masked, long stretches shortened, unseen characters named.
    """

    origin: str
    why: str
    tokens: int
    supervised: int
    label: str | None
    pieces: list[tuple[str, bool]]


def lengths(rows: Sequence[Encoded] | Sequence[Candidates]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Tokens of each row; of a labelled text to score, those of its longest sequence."""
    return np.fromiter((len(r.ids) if isinstance(r, Encoded) else max(map(len, r.sequences)) for r in rows), np.int64)


def length_figures(counts: np.ndarray[tuple[int], np.dtype[np.int64]]) -> dict[str, Any]:
    """Sum, percentiles and a histogram of equally wide bars: `from` is the first bar's start, `width` of each."""
    if not len(counts):
        return {"sum": 0}
    width = _round_up(max(1, -(-int(counts.max() + 1) // BARS)))
    first = int(counts.min()) // width
    bars = np.bincount(counts // width)[first:]
    return {
        "sum": int(counts.sum()),
        **{f"p{p}": int(np.percentile(counts, p)) for p in PERCENTILES},
        "histogram": {"from": first * width, "width": width, "rows": bars.tolist()},
    }


def _round_up(number: int) -> int:
    """The next of 1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 40, 50, 64, 80, 100, ..."""
    size = 1
    while True:
        for step in (1, 2, 4, 5, 8) if size == 1 else (1, 1.6, 2, 2.5, 3.2, 4, 5, 6.4, 8):
            if step * size >= number:
                return int(step * size)
        size *= 10


def rows_that_learn(rows: Sequence[Encoded], token: int) -> int:
    """How many rows have a token among those that are learnt (the first place is never predicted)."""
    flat = np.concatenate([np.frombuffer(r.labels, np.intc)[1:] for r in rows] or [np.empty(0, np.intc)])
    ends = np.cumsum(np.fromiter((max(0, len(r.labels) - 1) for r in rows), np.int64))
    return len(np.unique(np.searchsorted(ends, np.flatnonzero(flat == token), "right")))


def leading(rows: Sequence[Encoded], token: int) -> dict[str, int]:
    """Rows by how often a token stands at their beginning."""
    found: Counter[int] = Counter()
    for row in rows:
        n = 0
        while n < len(row.ids) and row.ids[n] == token:
            n += 1
        found[n] += 1
    return {str(n): found[n] for n in sorted(found)}


def sample(
    examples: Sequence[Example], rows: Sequence[Encoded], encoder: ClassifierEncoder | CausalEncoder, labels: Sequence[str] | None
) -> list[Taught]:
    """Evenly spaced rows, the longest, and the first with nothing to learn.

    A row with personal data is encoded again without it, for tokenizers may lower its case or set spaces into addresses.
    """
    chosen: dict[int, str] = {}
    for i in range(SHOWN_ROWS if rows else 0):
        chosen.setdefault(i * len(rows) // SHOWN_ROWS, "one of the rows")
    if len(rows):
        chosen.setdefault(int(np.argmax(lengths(rows))), "the longest row")
    for i, row in enumerate(rows):
        if row.supervised == 0:
            chosen[i] = "a row with nothing to learn"
            break
    shown = []
    for i, why in chosen.items():
        row, example = rows[i], examples[i]
        label = labels[example.label] if labels is not None and example.label is not None and not row.labels else None
        told = masked_example(example)
        parts = pieces(row if told == example else encoder.encode([told], Truncation())[0], encoder.tokenizer)
        parts = [(visible(shorten(text)), learnt) for text, learnt in parts]
        shown.append(Taught(example.origin, why, len(row.ids), row.supervised, label, parts))
    return shown


def masked_example(example: Example) -> Example:
    """An example without its personal data."""
    messages = tuple(replace(m, content=masked(m.content)) for m in example.messages)
    return replace(
        example, text=masked(example.text), prompt=masked(example.prompt), completion=masked(example.completion), messages=messages
    )


def pieces(row: Encoded, tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of a row in stretches: (text, whether it is learnt)."""
    learnt = [label != IGNORE and i > 0 for i, label in enumerate(row.labels)] if row.labels else [False] * len(row.ids)
    borders = [i for i in range(1, len(learnt)) if learnt[i] != learnt[i - 1]]
    found: list[tuple[str, bool]] = []
    done = 0
    for start, end in pairwise([0, *borders, len(learnt)]):
        # From the beginning each time: some decoders drop the space before a stretch's first word.
        upto = tokenizer.decode(list(row.ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        found.append((upto[done:], learnt[start]))
        done = len(upto)
    return found


def shorten(text: str, head: int = HEAD, tail: int = TAIL) -> str:
    """A text whose middle, where it is long, is a count of characters."""
    cut = len(text) - head - tail
    return text if cut < 40 else f"{text[:head]} […{cut:,} characters…] {text[-tail:]}"
