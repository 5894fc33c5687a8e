"""The data report for people: Markdown, and a page of HTML that needs nothing else. Whatever comes from the data is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

from lorica.data import oddities, personal
from lorica.data.examples import SPLITS
from lorica.pages import HTML_END, Histogram, Section, as_html, html_begin, markdown, md
from lorica.screen import counted

OPEN, CLOSE = "⟦", "⟧"  # around what is learnt, in Markdown


def sections(report: dict[str, Any]) -> Iterator[Section]:
    """What both pages say, but for the sample."""
    yield "Rows", list(_rows(report))
    if "labels" in report:
        names = list(report["labels"]["train"])
        whole = {s: sum(report["labels"][s].values()) for s in SPLITS}
        body = [[name, *(_part(report["labels"][s][name], whole[s]) for s in SPLITS)] for name in names]
        yield "Labels", [(["label", *SPLITS], body)]
    yield "Lengths in tokens", list(_lengths(report))
    yield "What is learnt", list(_learnt(report))
    yield "Repeated rows", list(_repeats(report))
    yield "Encoding", [_found(report["oddities"], oddities.KINDS, "nothing odd was found")]
    yield "Personal data", [_found(report["personal"], personal.KINDS, "none was found"), "Found by patterns: some is missed."]


def _rows(report: dict[str, Any]) -> Iterator[Any]:
    yield ["split", "rows", "from"], [[s, f"{n:,}", report["split_from"].get(s, "")] for s, n in report["rows"].items()]
    dropped = report["dropped_as_duplicates_of_held_out_rows"]
    yield (
        f"Dropped because they also stand in a held-out split: {dropped.get('train', 0):,} of training, "
        f"{dropped.get('validation', 0):,} of validation."
    )
    bad = report["skipped_bad_rows"]
    yield f"Skipped bad rows: {bad['count']:,}."
    if bad["count"]:
        yield [f"{n:,} x {why}" for why, n in bad["by_reason"].items()]


def _lengths(report: dict[str, Any]) -> Iterator[Any]:
    tokens = report["tokens"]
    names = [k for k in tokens["train"] if k.startswith("p")]
    shown = [s for s in SPLITS if report["rows"][s]]
    yield (
        ["split", "in all", *("longest" if n == "p100" else f"{n[1:]} % up to" for n in names)],
        [[s, f"{tokens[s]['sum']:,}", *(f"{tokens[s][n]:,}" for n in names)] for s in shown],
    )
    if histogram := tokens["train"].get("histogram"):
        width, start = histogram["width"], histogram["from"]
        ranges = [f"{start + i * width:,} to {start + (i + 1) * width - 1:,}" for i in range(len(histogram["rows"]))]
        yield "Training rows by length:"
        yield Histogram(zip(ranges, histogram["rows"], strict=True))
    cut, rows = report["shortened"], report["rows"]["train"]
    if not cut["rows"]:
        yield f"No training row is longer than model.max_length={report['max_length']:,}."
        return
    what = (
        ("texts", "texts at their end"),
        ("prompts", "prompts in their middle"),
        ("completions", "answers at their end"),
        ("turns", "conversations by whole turns"),
    )
    listing = ", ".join(f"{words} ({cut[k]:,})" for k, words in what if cut[k])
    whole = report["tokens"]["train"]["sum"] + cut["tokens_cut"]
    yield f"Shortened to model.max_length={report['max_length']:,}: {share(cut['rows'], rows, 'training rows')}: {listing}."
    yield f"Cut: {share(cut['tokens_cut'], whole, 'training tokens')}."


def _learnt(report: dict[str, Any]) -> Iterator[Any]:
    rows = report["rows"]["train"]
    if report["eos"] is None:
        yield f"Each of {rows:,} training rows teaches its label."
    else:
        t, eos = report["train_tokens"], report["eos"]
        yield f"Learnt: {share(t['supervised'], t['sum'], 'training tokens')}."
        yield f"The end-of-sequence token {eos['token']} is learnt by {share(eos['rows_that_learn_it'], rows, 'training rows')}."
    without = report["rows_with_nothing_to_learn"]
    yield f"Training rows with nothing to learn: {without['count']:,}" + (
        f", as {', '.join(without['first'])}." if without["count"] else "."
    )
    if report["bos"]:
        counts = "; ".join(f"{n:,} rows begin with {_times(int(k))}" for k, n in report["bos"]["rows_by_count"].items())
        yield f"Beginning-of-sequence token {report['bos']['token']}: {counts}."


def _times(count: int) -> str:
    return {0: "none", 1: "one"}.get(count, f"{count} of them")


def _repeats(report: dict[str, Any]) -> Iterator[Any]:
    exact, near, rows = report["duplicates"]["exact"]["within"], report["duplicates"]["near"], report["rows"]
    header = ["", *SPLITS]
    body = [["repeats an earlier row of the split", *(_part(exact[s], rows[s]) for s in SPLITS)]]
    if near:
        body.append(["has a near duplicate in the split", *(_part(near["within"][s], rows[s]) for s in SPLITS)])
        for one in SPLITS[:-1]:
            cells = [_part(near["across"][f"{one}-{s}"], rows[s]) if f"{one}-{s}" in near["across"] else "" for s in SPLITS]
            body.append([f"has a near duplicate in {one}", *cells])
    yield header, body
    if near:
        yield (
            f"Near duplicates: at least {near['similarity']:g} of the five-character runs of two texts in common (Jaccard), case, "
            "punctuation, links and @names aside."
        )
        if near["examples"]:
            yield ["alike", "row", "text"], [line for e in near["examples"] for line in _pair(e)]
    found, what = report["conflicts"], "labels" if "labels" in report else "answers"
    others = near["pairs_with_another_label"] if near and "labels" in report else None
    also = f" Near duplicates with different labels: {counted(others, 'pair')}." if others is not None else ""
    yield f"Training texts with different {what}: {found['texts']:,} ({counted(found['rows'], 'row')}).{also}"
    if found["examples"]:
        lines = [[e["text"], "; ".join(f"{a['answer']} ({a['origin']})" for a in e["answers"])] for e in found["examples"]]
        yield ["text", what], lines


def _pair(example: dict[str, Any]) -> list[list[str]]:
    one, other = ([f"{row['split']} {row['origin']}", row["text"]] for row in example["rows"])
    return [[f"{example['similarity']:.2f}", *one], ["", *other]]


def _found(found: dict[str, Any], kinds: dict[str, str], nothing: str) -> Any:
    body = [
        [words, *(f"{found[kind]['rows'][s]:,}" for s in SPLITS), f"{found[kind]['count']:,}", "; ".join(found[kind]["first"])]
        for kind, words in kinds.items()
        if found[kind]["count"]
    ]
    if not body:
        return nothing.capitalize() + "."
    return ["kind", *(f"{s} rows" for s in SPLITS), "found", "first"], body


def share(part: int, whole: int, what: str) -> str:
    """`12 of 900 test rows (1.3%)`."""
    return f"{part:,} of {whole:,} {what} ({part / max(1, whole):.1%})"


def _part(part: int, whole: int) -> str:
    """A cell: `12 (1.3%)`."""
    return f"{part:,} ({part / whole:.1%})" if part else "0"


def _source(report: dict[str, Any]) -> str:
    return f"Source: {report['source']}" + "".join(f", {report[k]}" for k in ("path", "hub_id", "revision") if report[k])


def _heading(row: dict[str, Any], causal: bool) -> str:
    return f"{row['origin']}, {row['why']}: {row['tokens']:,} tokens" + (f", {row['supervised']:,} of them learnt" if causal else "")


# ------------------------------------------------------------------------------------------------------------- Markdown


def markdown_page(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [f"# Data: {md(report['name'])}", "", md(_source(report)), ""]
    if report["notes"]:
        lines += ["**To look at**", "", *(f"- {md(note)}" for note in report["notes"]), ""]
    for title, parts in sections(report):
        lines += [f"## {title}", ""]
        for part in parts:
            lines += [*markdown(part), ""]
    causal = report["eos"] is not None
    lines += ["## Sample", "", f"What is learnt stands in {OPEN} {CLOSE}." if causal else "Texts as the model reads them.", ""]
    for row in report["sample"]:
        text = "".join(f"{OPEN}{p['text']}{CLOSE}" if p["learnt"] else p["text"] for p in row["pieces"])
        label = f"; label {OPEN}{row['label']}{CLOSE}" if row["label"] is not None else ""
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        lines += [md(_heading(row, causal) + label), "", f"{fence}text", text, fence, ""]
    return "\n".join(lines).rstrip() + "\n"


# ----------------------------------------------------------------------------------------------------------------- HTML


def html_page(report: dict[str, Any]) -> str:
    """The same as a page: no scripts, nothing loaded from elsewhere, learnt text coloured."""
    causal = report["eos"] is not None
    title = f"Data: {report['name']}"
    out = [*html_begin(title), f"<p>{html.escape(_source(report))}</p>"]
    if report["notes"]:
        out += ['<div class="notes"><b>To look at</b>', as_html(report["notes"]), "</div>"]
    for heading, parts in sections(report):
        out += [f"<h2>{html.escape(heading)}</h2>", *map(as_html, parts)]
    learnt = "<mark>What is learnt</mark> is coloured." if causal else "Texts as the model reads them."
    out += [f"<h2>Sample</h2><p>{learnt}</p>"]
    for row in report["sample"]:
        label = f' <span class="label">{html.escape(row["label"])}</span>' if row["label"] is not None else ""
        text = "".join(f"<mark>{html.escape(p['text'])}</mark>" if p["learnt"] else html.escape(p["text"]) for p in row["pieces"])
        out.append(f"<p>{html.escape(_heading(row, causal))}{label}</p><pre>{text}</pre>")
    return "\n".join([*out, HTML_END]) + "\n"
