"""AG News: four topics. Canonical files have no header: class 1-4, title, description; the hub's rows have text and label."""

from __future__ import annotations

import html
import re
from typing import Any, ClassVar

from lorica.data.classification import ClassificationRows
from lorica.data.readers import Row
from lorica.data.rows import BadRow

# The published files lost the "&" of their entities: "Arsenal #39;s" stands for "Arsenal&#39;s".
_BARE_ENTITY = re.compile(r" ?(?<!&)(#[0-9]{2,4};|\b(?:quot|amp|lt|gt|nbsp|hellip|[mn]dash|[lr][sd]quo|apos);)")
_TAG = re.compile(r"</?[A-Za-z][^<>]*>")


class AGNewsRows(ClassificationRows):
    """`data=ag_news`."""

    sample_name: ClassVar[str] = "ag_news"

    def columns(self) -> dict[str, str]:
        by_hub = self.config.source == "hub" or not self.config.csv_columns
        return super().columns() if by_hub else {"data.label_column": self.config.label_column}

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "tidy": True}

    def text_of(self, row: Row) -> str:
        """Title and description in one text, entities resolved."""
        if self.config.text_column in row.fields:
            return tidy(super().text_of(row))
        parts = [str(row.fields.get(c) or "").strip() for c in ("title", "description")]
        if not any(parts):
            raise BadRow("has neither title nor description")
        return tidy(". ".join(p for p in parts if p) if not parts[0].endswith((".", "?", "!")) else " ".join(p for p in parts if p))


def tidy(text: str) -> str:
    """HTML entities as characters, tags and the backslashes that stood for line breaks as spaces."""
    if "&" in text or ";" in text:
        text = html.unescape(_BARE_ENTITY.sub(r"&\1", text))
    if "<" in text:
        text = _TAG.sub(" ", text)
    return " ".join(text.replace("\\", " ").split())
