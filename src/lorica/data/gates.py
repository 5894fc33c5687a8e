"""What the data report refuses: rows that teach nothing, an end never learnt, labels never seen, test rows known from training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lorica.config import ConfigError, DataConfig


def check_report(report: dict[str, Any], config: DataConfig, folder: Path) -> None:
    """Refuse a run by what its data report says.

    Args:
        folder: where the report lies.
    Raises:
        ConfigError: the first limit that is broken, with what was found and what to do.
    """
    if "labels" in report:
        _labels(report, config)
    _supervised(report, config, folder)
    _eos(report, config)
    _leakage(report, config, folder)


def _labels(report: dict[str, Any], config: DataConfig) -> None:
    least = config.min_label_examples
    few = {name: n for name, n in report["labels"]["train"].items() if n < least}
    if few:
        listing = ", ".join(f"{name} ({n:,})" for name, n in few.items())
        raise ConfigError(
            "data.min_label_examples",
            least,
            f"{'labels' if len(few) > 1 else 'a label'} with fewer rows among the {report['rows']['train']:,} of training: {listing}",
            f"rows of {next(iter(few))}, data.labels without it, or data.min_label_examples={min(few.values())}",
        )


def _supervised(report: dict[str, Any], config: DataConfig, folder: Path) -> None:
    found, rows = report["rows_with_nothing_to_learn"], report["rows"]["train"]
    count = found["count"]
    look = f"what is learnt is marked in {folder / 'data_report.html'}"
    if count == rows:
        raise ConfigError(
            "data.max_unsupervised", config.max_unsupervised, f"all {rows:,} training rows have nothing to learn", f"{look}; {_REMEDY}"
        )
    if count > config.max_unsupervised * rows:
        raise ConfigError(
            "data.max_unsupervised",
            config.max_unsupervised,
            f"{count:,} of {rows:,} training rows ({count / rows:.2%}) have nothing to learn, as {', '.join(found['first'][:3])}",
            f"{look}; {_REMEDY}, or data.max_unsupervised={_above(count, rows)} to leave them out",
        )


_REMEDY = "answers that are not blank, a larger model.max_length, or model.use_chat_template=false"


def _eos(report: dict[str, Any], config: DataConfig) -> None:
    if report["eos"] is None:  # a classifier writes nothing, so it has no end to learn
        return
    learning, rows = report["eos"]["rows_that_learn_it"], report["rows"]["train"]
    if learning < config.min_eos_share * rows:
        found = f"{learning:,} of {rows:,} training rows learn" if learning else f"none of {rows:,} training rows learns"
        raise ConfigError(
            "data.min_eos_share",
            config.min_eos_share,
            f"{found} the end-of-sequence token {report['eos']['token']}: the model would not know when to stop",
            "a larger model.max_length, so that conversations keep their end, model.use_chat_template=false, or data.min_eos_share=0",
        )


def _leakage(report: dict[str, Any], config: DataConfig, folder: Path) -> None:
    near, rows = report["duplicates"]["near"], report["rows"]["test"]
    if near is None or not rows:
        return
    count = near["across"]["train-test"]
    if count > config.max_leakage * rows:
        raise ConfigError(
            "data.max_leakage",
            config.max_leakage,
            f"{count:,} of {rows:,} test rows ({count / rows:.2%}) have a near duplicate in training: test figures would be too good",
            f"leave out one row of each pair in {folder / 'data_report.json'} (duplicates.near.test_and_training), "
            f"or data.max_leakage={_above(count, rows)}",
        )


def _above(count: int, rows: int) -> float:
    """The share of rows, rounded up to four places: a limit that lets it pass."""
    return math.ceil(count / rows * 10_000) / 10_000
