"""What every model of the ladder is asked: held-out rows as token ids, so that all read the very same.

Kept as JSON, for each model is read in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorica.durable import write_json


@dataclass
class Row:
    """A held-out row.

    Attributes:
        ids: with its answer, where it has one. first: the first position whose next token is compared. targets: what is right there
            (-100: not known), [len(ids) - first]. label: its class, -1 where that is not known.
        sequences, picks: of a labelled text for a causal model: what must be read to score its labels; for each label (sequence,
            position, token) whose log-probabilities are added.
    """

    ids: list[int]
    first: int = 0
    targets: list[int] = field(default_factory=list)
    label: int = -1
    sequences: list[list[int]] = field(default_factory=list)
    picks: list[list[tuple[int, int, int]]] = field(default_factory=list)

    @property
    def asked(self) -> list[tuple[list[int], int]]:
        """(ids, first position) of what is read to answer it."""
        if not self.sequences:
            return [(self.ids, self.first)]
        places = [[place for picks in self.picks for s, place, _ in picks if s == i] for i in range(len(self.sequences))]
        return [(ids, min(found, default=len(ids) - 1)) for ids, found in zip(self.sequences, places, strict=True)]


@dataclass
class Questions:
    """All of them. texts: (text, with special tokens, its ids), for runtimes with a tokenizer of their own."""

    task: str
    labels: list[str]
    origin: str
    rows: list[Row]
    texts: list[tuple[str, bool, list[int]]] = field(default_factory=list)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(ids) for row in self.rows for ids in (row.ids, *row.sequences))

    def digest(self) -> str:
        """A sha256 of all that is read."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()

    def write(self, file: Path) -> None:
        """As JSON."""
        write_json(file, asdict(self))

    @classmethod
    def read(cls, file: Path) -> Questions:
        """What `write` wrote."""
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
        return cls(**{**found, "rows": [Row(**row) for row in found["rows"]], "texts": [tuple(text) for text in found["texts"]]})
