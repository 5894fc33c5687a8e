"""Labelled texts of anybody's: a text column, a label column, labels by name or number, given or found."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from lorica.config import ClassificationDataConfig, ConfigError
from lorica.data.examples import SPLITS, Example
from lorica.data.readers import Row
from lorica.data.rows import BadRow, Rows

MOST_LABELS = 1000
_NUMBER = re.compile(r"-?[0-9]+")


class ClassificationRows(Rows):
    """`data=classification`. After `load()`, `labels` holds the class names in the order of their numbers."""

    config: ClassificationDataConfig
    label_values: Sequence[str] = ()  # how else than by their names the labels are written, in their order
    _template: str | None = None  # with the rows that are shown before each question

    def columns(self) -> dict[str, str]:
        return {"data.text_column": self.config.text_column, "data.label_column": self.config.label_column}

    def describe(self) -> dict[str, Any]:
        c = self.config
        columns = {"text_column": c.text_column, "label_column": c.label_column}
        return {"kind": "classification", **columns, "label_values": self.label_values, "prompt_template": self.template}

    @property
    def template(self) -> str:
        """What a causal model is asked, with the rows that it is shown first."""
        return self._template or self.config.prompt_template

    def load(self) -> None:
        if self._splits is not None:
            return
        super().load()
        if self.config.shots:
            self._template = self._shown() + self.config.prompt_template
            for name in SPLITS:
                of_split = getattr(self._splits, name)
                of_split[:] = [dataclasses.replace(e, prompt=self.ask(e.text)) for e in of_split]

    def _shown(self) -> str:
        """Training rows with their labels, drawn by the seed: of each label in turn, of its shorter half.

        Raises:
            ConfigError: there are too few.
        """
        assert self._splits is not None and self.labels is not None
        rng = np.random.default_rng([self.seed, self.config.shots])
        drawn: list[list[Example]] = []
        for label in range(len(self.labels)):
            own = sorted((e for e in self._splits.train if e.label == label and "{" not in e.text), key=lambda e: len(e.text))
            half = own[: -(-len(own) // 2)]
            drawn.append([half[i] for i in rng.permutation(len(half))])
        turns = [row for turn in itertools.zip_longest(*drawn) for row in turn if row is not None][: self.config.shots]
        if len(turns) < self.config.shots:
            raise ConfigError(
                "data.shots", self.config.shots, f"training has {len(turns)} rows short enough to be shown", f"data.shots={len(turns)}"
            )
        return "".join(f"{self.ask(row.text)} {self.labels[row.label or 0]}\n\n" for row in turns)

    def prepare_rows(self, rows: dict[str, list[Row]]) -> None:
        """Number the labels: those given, or the distinct values of training, sorted."""
        config = self.config
        if config.labels is not None:
            self.labels = list(config.labels)
            self.label_values = config.label_values or self._numbers_beside(self.labels)
        else:
            found = {written_label(r.fields.get(config.label_column)) for r in rows["train"] if not r.fault} - {""}
            if not 2 <= len(found) <= MOST_LABELS:
                values = "value" if len(found) == 1 else "values"
                raise ConfigError(
                    "data.label_column",
                    config.label_column,
                    f"has {len(found):,} different {values} in training; a label set has 2 to {MOST_LABELS}",
                    "another data.label_column",
                )
            self.labels = sorted(found, key=lambda v: (not _NUMBER.fullmatch(v), int(v) if _NUMBER.fullmatch(v) else 0, v))
        self._number = label_numbers(self.labels, self.label_values)

    @staticmethod
    def _numbers_beside(labels: list[str]) -> list[str]:
        """0, 1, ... may stand for the labels, unless a label is a number itself."""
        return [] if any(_NUMBER.fullmatch(name) for name in labels) else [str(i) for i in range(len(labels))]

    def text_of(self, row: Row) -> str:
        """The text of a row."""
        text = row.fields.get(self.config.text_column)
        if text is None or not str(text).strip():
            raise BadRow(f"has no {self.config.text_column}")
        return str(text).strip()

    def to_example(self, row: Row) -> Example:
        """text, label and the prompt that asks a causal model for it."""
        value = written_label(row.fields.get(self.config.label_column))
        if not value:
            raise BadRow(f"has no {self.config.label_column}")
        number = self._number.get(value, self._number.get(value.casefold()))
        if number is None:
            raise BadRow(f"has the unknown label {value[:40]!r}")
        text = self.text_of(row)
        return Example(row.origin, text=text, label=number, prompt=self.ask(text))

    def ask(self, text: str) -> str:
        """The question a causal model is asked about a text."""
        return fill_prompt(self.template, text, self.labels or [])


def written_label(value: Any) -> str:
    """A label column's value as text; "" where there is none."""
    return "" if value is None else str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def label_numbers(labels: Sequence[str], values: Sequence[str]) -> dict[str, int]:
    """How labels may be written -> their numbers: as it stands, then without regard to case; values come before names."""
    found: dict[str, int] = {}
    for spell in (str, str.casefold):
        for names in (values, labels):
            for i, name in enumerate(names):
                found.setdefault(spell(name), i)
    return found


def fill_prompt(template: str, text: str, labels: list[str]) -> str:
    """`template` with {labels} as `a, b or c` and {text}; braces in the text are left alone."""
    before, after = _around_text(template, tuple(labels))
    return before + text + after


@lru_cache
def _around_text(template: str, labels: tuple[str, ...]) -> tuple[str, str]:
    """What stands before the text, and after it."""
    listing = f"{', '.join(labels[:-1])} or {labels[-1]}" if len(labels) > 1 else "".join(labels)
    before, _, after = template.partition("{text}")
    return before.replace("{labels}", listing), after.replace("{labels}", listing)
