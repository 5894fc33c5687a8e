"""Labelled texts of anybody's: a text column, a label column, labels by name or number, given or found."""

from __future__ import annotations

from typing import Any

from lorica.config import ClassificationDataConfig, ConfigError
from lorica.data.examples import Example
from lorica.data.module import BadRow, LoricaDataModule
from lorica.data.readers import Row

MOST_LABELS = 1000


class ClassificationData(LoricaDataModule):
    """`data=classification`. After `load()`, `labels` holds the class names in the order of their numbers."""

    config: ClassificationDataConfig

    def columns(self) -> dict[str, str]:
        return {"data.text_column": self.config.text_column, "data.label_column": self.config.label_column}

    def describe(self) -> dict[str, Any]:
        return {"kind": "classification", "text_column": self.config.text_column, "prompt_template": self.config.prompt_template}

    def prepare_rows(self, rows: dict[str, list[Row]]) -> None:
        """Number the labels: those given, or the distinct values of training, sorted."""
        config = self.config
        if config.labels is not None:
            self.labels = list(config.labels)
            written = config.label_values or []
        else:
            found = {self._written(r.fields.get(config.label_column)) for r in rows["train"] if not r.fault} - {""}
            if not 2 <= len(found) <= MOST_LABELS:
                raise ConfigError(
                    "data.label_column",
                    config.label_column,
                    f"has {len(found):,} different values in training; a label set has 2 to {MOST_LABELS}",
                    "another data.label_column",
                )
            self.labels, written = (
                sorted(found, key=lambda v: (not v.lstrip("-").isdigit(), int(v) if v.lstrip("-").isdigit() else 0, v)),
                [],
            )
        self._number = {name.casefold(): i for i, name in enumerate(self.labels)}
        by_number = [] if written or config.labels is None else [str(i) for i in range(len(self.labels))]
        self._number |= {value.casefold(): i for i, value in enumerate([*written, *by_number]) if value.casefold() not in self._number}

    @staticmethod
    def _written(value: Any) -> str:
        return "" if value is None else str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()

    def text_of(self, row: Row) -> str:
        """The text of a row."""
        text = row.fields.get(self.config.text_column)
        if text is None or not str(text).strip():
            raise BadRow(f"has no {self.config.text_column}")
        return str(text).strip()

    def to_example(self, row: Row) -> Example:
        """text, label and the prompt that asks a causal model for it."""
        value = self._written(row.fields.get(self.config.label_column))
        if not value:
            raise BadRow(f"has no {self.config.label_column}")
        number = self._number.get(value.casefold())
        if number is None:
            raise BadRow(f"has the unknown label {value[:40]!r}")
        text = self.text_of(row)
        return Example(row.origin, text=text, label=number, prompt=self.ask(text))

    def ask(self, text: str) -> str:
        """The question a causal model is asked about a text."""
        return fill_prompt(self.config.prompt_template, text, self.labels or [])


def fill_prompt(template: str, text: str, labels: list[str]) -> str:
    """`template` with {labels} as `a, b or c` and {text}; braces in the text are left alone."""
    listing = f"{', '.join(labels[:-1])} or {labels[-1]}" if len(labels) > 1 else "".join(labels)
    before, _, after = template.partition("{text}")
    return before.replace("{labels}", listing) + text + after.replace("{labels}", listing)
