"""data_report.json and data_report.md: what was in the data, as counted before training."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from lorica.data.examples import SPLITS
from lorica.data.module import LoricaDataModule

PERCENTILES = (5, 50, 95, 99, 100)


def data_report(data: LoricaDataModule) -> dict[str, Any]:
    """Rows by split, labels, lengths, what was shortened, dropped or skipped."""
    splits = data.splits
    lengths = np.array([len(r.ids) for r in data.train_rows])
    supervised = sum(r.supervised for r in data.train_rows)
    report: dict[str, Any] = {
        "name": data.config.name,
        "source": data.config.source,
        "path": data.config.path,
        "hub_id": data.config.hub_id if data.config.source == "hub" else None,
        "revision": data.revision,
        "rows": {split: len(splits[split]) for split in SPLITS},
        "split_from": splits.sources,
        "dropped_as_duplicates_of_held_out_rows": splits.dropped_as_duplicates,
        "skipped_bad_rows": {
            "count": len(data.faults),
            "by_reason": data.fault_counts(),
            "first": [f"{o} {why}" for o, why in data.faults[:20]],
        },
        "train_tokens": {
            "sum": int(lengths.sum()),
            "supervised": int(supervised),
            **{f"p{p}": int(np.percentile(lengths, p)) for p in PERCENTILES},
        },
        "shortened": {k: getattr(data.truncation, k) for k in ("texts", "prompts", "completions", "turns", "tokens_cut")},
    }
    if data.labels is not None:
        report["labels"] = {
            split: {name: Counter(e.label for e in splits[split])[i] for i, name in enumerate(data.labels)} for split in SPLITS
        }
    return report


def report_markdown(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"# Data: {report['name']}",
        "",
        f"Source: {report['source']}" + "".join(f", {report[k]}" for k in ("path", "hub_id", "revision") if report[k]),
        "",
    ]
    lines += ["| split | rows | from |", "|---|---|---|"]
    lines += [f"| {split} | {n:,} | {report['split_from'].get(split, '')} |" for split, n in report["rows"].items()]
    if "labels" in report:
        names = list(report["labels"]["train"])
        lines += ["", "| label | " + " | ".join(SPLITS) + " |", "|---|" + "---|" * len(SPLITS)]
        lines += [f"| {name} | " + " | ".join(f"{report['labels'][s][name]:,}" for s in SPLITS) + " |" for name in names]
    t = report["train_tokens"]
    lines += [
        "",
        f"Training tokens: {t['sum']:,}, of them learnt {t['supervised']:,}. Lengths: "
        + ", ".join(f"p{p} {t[f'p{p}']:,}" for p in PERCENTILES)
        + ".",
    ]
    s = report["shortened"]
    shortened = f"{s['texts']:,} texts, {s['prompts']:,} prompts, {s['completions']:,} answers, {s['turns']:,} conversations"
    dropped = report["dropped_as_duplicates_of_held_out_rows"]
    lines += [
        f"Shortened: {shortened}; {s['tokens_cut']:,} tokens cut.",
        "Dropped because they also stand in a held-out split: "
        f"{dropped.get('train', 0):,} of training, {dropped.get('validation', 0):,} of validation.",
    ]
    bad = report["skipped_bad_rows"]
    lines += [f"Skipped bad rows: {bad['count']:,}." + "".join(f"\n- {n:,} x {why}" for why, n in bad["by_reason"].items())]
    return "\n".join(lines) + "\n"
