"""The data report: what is in the data and what of it will be learnt, counted before any weights are read.

data_report.json for machines, data_report.md and data_report.html for people (`lorica.data.report_pages`), all with personal data
masked. `lorica.data.gates` refuses a run by it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path
from typing import Any

from lorica.data import oddities, personal
from lorica.data.encoding import CausalEncoder, ClassifierEncoder, Encoded
from lorica.data.examples import SPLITS, Example
from lorica.data.module import LoricaDataModule
from lorica.data.repeats import by_content, conflicts, repeats, words
from lorica.data.report_pages import html_page, markdown_page, share
from lorica.data.taught import leading, length_figures, lengths, rows_that_learn, sample
from lorica.durable import write_json, write_text
from lorica.screen import counted

SHOWN = 5  # places named of each kind of finding
IMBALANCE = 10  # times as many rows of one label as of another are worth a note
MOST_COMPARED = 50  # labels that are compared with each other
SHARE = 0.01  # of rows; fewer near duplicates, or shortened answers, are not worth a note


def data_report(data: LoricaDataModule) -> dict[str, Any]:
    """Everything that the report says, as JSON has it. `data` is encoded."""
    splits, config = data.splits, data.config
    encoder = data.encoder
    rows = data.train_rows
    token_counts = {"train": lengths(rows), **{split: lengths(data.eval_rows[split]) for split in SPLITS[1:]}}
    supervised = sum(r.supervised for r in rows)
    without = [e.origin for e, r in zip(splits.train, rows, strict=True) if r.supervised == 0]
    tokenizer = encoder.tokenizer
    bos = tokenizer.bos_token_id
    contents = by_content(splits)
    texts = words(contents)
    figures = {split: length_figures(counts) for split, counts in token_counts.items()}
    report: dict[str, Any] = {
        "name": config.name,
        "source": config.source,
        "path": config.path if config.source == "files" else None,
        "hub_id": config.hub_id if config.source == "hub" else None,
        "revision": data.revision,
        "rows": {split: len(splits[split]) for split in SPLITS},
        "split_from": splits.sources,
        "dropped_as_duplicates_of_held_out_rows": splits.dropped_as_duplicates,
        "skipped_bad_rows": {
            "count": len(data.faults),
            "by_reason": _reasons(data.fault_counts()),
            "first": [f"{o} {personal.masked(why)}" for o, why in data.faults[:20]],
        },
        "train_tokens": {
            "sum": figures["train"].get("sum", 0),
            "supervised": int(supervised),
            **{k: v for k, v in figures["train"].items() if k.startswith("p")},
        },
        "tokens": figures,
        "max_length": encoder.max_length,
        "shortened": {k: getattr(data.truncation, k) for k in ("rows", "texts", "prompts", "completions", "turns", "tokens_cut")},
        "rows_with_nothing_to_learn": {"count": len(without), "first": without[:SHOWN]},
        "eos": _eos(encoder, rows),
        "bos": {"token": tokenizer.bos_token, "rows_by_count": leading(rows, bos)} if bos is not None else None,
        "duplicates": repeats(splits, contents, texts, config.near_duplicate_similarity),
        "conflicts": conflicts(contents, texts, data.labels),
        "oddities": _findings(data, oddities.KINDS, lambda text: [(kind, "") for kind in oddities.oddities(text)]),
        "personal": _findings(data, personal.KINDS, lambda text: [(kind, personal.dots(text[a:b])) for kind, a, b in personal.spans(text)]),
        "sample": [
            {
                "origin": t.origin,
                "why": t.why,
                "tokens": t.tokens,
                "supervised": t.supervised,
                "label": t.label,
                "pieces": [{"text": text, "learnt": learnt} for text, learnt in t.pieces],
            }
            for t in sample(splits.train, rows, encoder, data.labels)
        ],
    }
    if data.labels is not None:
        counts = {split: Counter(e.label for e in splits[split]) for split in SPLITS}
        report["labels"] = {split: {name: counts[split][i] for i, name in enumerate(data.labels)} for split in SPLITS}
    report["notes"] = list(_notes(report))
    return report


def _reasons(counts: dict[str, int]) -> dict[str, int]:
    """Why rows were skipped, personal data masked: an unknown label may be an address."""
    found: Counter[str] = Counter()
    for why, n in counts.items():
        found[personal.masked(why)] += n
    return dict(found)


def _eos(encoder: ClassifierEncoder | CausalEncoder, rows: Sequence[Encoded]) -> dict[str, Any] | None:
    """How many rows teach a model to stop; None for a classifier, which writes nothing."""
    if not isinstance(encoder, CausalEncoder):
        return None
    return {"token": encoder.tokenizer.eos_token, "rows_that_learn_it": rows_that_learn(rows, encoder.eos)}


def write_report(report: dict[str, Any], folder: Path) -> None:
    """data_report.json, .md and .html."""
    write_json(folder / "data_report.json", report)
    write_text(folder / "data_report.md", markdown_page(report))
    write_text(folder / "data_report.html", html_page(report))


def _texts(example: Example) -> Iterator[str]:
    """What the row's author wrote; the wording of prompts is in it where it can't be told apart."""
    yield from filter(None, (example.text or example.prompt, example.completion, *(m.content for m in example.messages)))


def _findings(data: LoricaDataModule, kinds: dict[str, str], find: Callable[[str], list[tuple[str, str]]]) -> dict[str, Any]:
    """Kind -> rows by split that have it, how often it stands there in all, and the first places.

    Args:
        find: of a text: (kind, what may be shown of it) of everything found.
    """
    found: dict[str, Any] = {kind: {"rows": dict.fromkeys(SPLITS, 0), "count": 0, "first": []} for kind in kinds}
    for split in SPLITS:
        for example in data.splits[split]:
            if not (here := [one for text in _texts(example) for one in find(text)]):
                continue
            for kind in dict.fromkeys(kind for kind, _ in here):
                found[kind]["rows"][split] += 1
            for kind, shown in here:
                found[kind]["count"] += 1
                if len(found[kind]["first"]) < SHOWN:
                    found[kind]["first"].append(f"{example.origin} {shown}".rstrip())
    return found


def _notes(report: dict[str, Any]) -> Iterator[str]:
    """What to look at, in sentences; also printed before training."""
    rows, near = report["rows"], report["duplicates"]["near"]
    if bad := report["skipped_bad_rows"]["count"]:
        yield f"{counted(bad, 'bad row')} skipped"
    for pair, alike in (near["across"] if near else {}).items():
        one, other = pair.split("-")
        if one == "train" and alike > SHARE * rows[other]:
            yield f"{share(alike, rows[other], f'{other} rows')} have a near duplicate in training"
    if report["conflicts"]["texts"] and "labels" in report:
        of_rows = counted(report["conflicts"]["rows"], "row")
        yield f"{counted(report['conflicts']['texts'], 'text')} of training with more than one label ({of_rows})"
    if near and "labels" in report and (pairs := near["pairs_with_another_label"]):
        yield f"{counted(pairs, 'pair')} of near duplicates with different labels"
    if without := report["rows_with_nothing_to_learn"]["count"]:
        yield f"{share(without, rows['train'], 'training rows')} have nothing to learn"
    cut = report["shortened"]
    if cut["completions"] > SHARE * rows["train"]:
        answers = share(cut["completions"], rows["train"], "training answers")
        yield f"{answers} are shortened to fit model.max_length={report['max_length']}"
    if report["eos"] and (lacking := rows["train"] - report["eos"]["rows_that_learn_it"]):
        yield f"{share(lacking, rows['train'], 'training rows')} don't learn the end-of-sequence token {report['eos']['token']}"
    if report["bos"] and (twice := sum(n for k, n in report["bos"]["rows_by_count"].items() if int(k) > 1)):
        yield f"{share(twice, rows['train'], 'training rows')} begin with {report['bos']['token']} more than once"
    if "labels" in report:
        counts = report["labels"]["train"]
        most, least = max(counts, key=counts.__getitem__), min(counts, key=counts.__getitem__)
        if counts[most] >= IMBALANCE * counts[least]:
            yield f"training has {counted(counts[most], 'row')} of {most} and {counts[least]:,} of {least}"
        alike = list(_alike(list(counts)))
        for one, other in alike[:SHOWN]:
            yield f"the labels {one} ({counted(counts[one], 'row')}) and {other} ({counts[other]:,}) are written nearly alike"
        if alike[SHOWN:]:
            yield f"{len(alike) - SHOWN:,} more pairs of labels are"
    for kind in ("mojibake", "replacement_character", "control_characters", "escapes"):
        if n := sum(report["oddities"][kind]["rows"].values()):
            yield f"{counted(n, 'row')} with {oddities.KINDS[kind]}"
    kinds = [kind for kind in ("email", "phone", "national_id", "patient_name") if report["personal"][kind]["count"]]
    if kinds:
        yield "personal data: " + ", ".join(f"{personal.KINDS[kind]} ({report['personal'][kind]['count']:,})" for kind in kinds)


def _alike(labels: list[str]) -> Iterator[tuple[str, str]]:
    """Labels that differ by case, or by a letter in ten: a misspelt one is a class of its own."""
    for one, other in combinations(labels, 2) if len(labels) <= MOST_COMPARED else ():
        first, second = one.casefold(), other.casefold()
        numbered = re.sub(r"\d", "", first) == re.sub(r"\d", "", second)
        long = min(len(first), len(second)) >= 5
        if first == second or (long and not numbered and SequenceMatcher(None, first, second).ratio() >= 0.9):
            yield one, other
