"""Three-class sentiment: text,label with negative, neutral or positive (or TweetEval's 0, 1, 2)."""

from __future__ import annotations

from typing import ClassVar

from lorica.data.classification import ClassificationRows


class SentimentRows(ClassificationRows):
    """`data=sentiment`."""

    sample_name: ClassVar[str] = "sentiment"
