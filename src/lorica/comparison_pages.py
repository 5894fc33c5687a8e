"""A comparison for people: Markdown, and a page of HTML that needs nothing else. Whatever comes from runs is escaped."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from lorica import charts
from lorica.pages import HTML_END, Table, as_html, html_begin, markdown
from lorica.screen import duration, short

UNKNOWN = "unknown"
STYLE = """
.choice { font-size: 1.1em; border-left: 4px solid var(--c2); padding: .3em 1em } li { overflow-wrap: anywhere }
.grids { display: flex; flex-wrap: wrap; gap: 1em 2.5em } .grids figure { margin: 0; min-width: 0; max-width: 100%; overflow-x: auto }
.grids td { text-align: right; padding: .25em .7em; font-variant-numeric: tabular-nums }
.wrong { color: var(--c1) } .right { color: var(--c2) }
"""


def _interval(value: float, interval: Sequence[float]) -> str:
    return f"{value:.4f} ({interval[0]:.3f} to {interval[1]:.3f})"


def _known(value: float | None, words: str) -> str:
    return UNKNOWN if value is None else words.format(value)


def quality(report: dict[str, Any]) -> Table:
    """How good each is."""
    body = [
        [
            m["name"],
            _interval(m["accuracy"], m["accuracy_interval"]),
            _interval(m["f1_macro"], m["f1_macro_interval"]),
            f"{m['ece']:.4f}",
            "none" if m["temperature"] is None else f"{m['temperature']:.3f}",
        ]
        for m in report["models"]
    ]
    return ["model", "accuracy", "macro-F1", "calibration error", "temperature"], body


def costs(report: dict[str, Any]) -> Table:
    """What each took to train, takes to keep and to ask."""
    price = report["price_per_kwh"] is not None
    body = []
    for m in report["models"]:
        share = m["trainable"] / m["weights"] if m["trainable"] is not None and m["weights"] else None
        latency = m["latency"]
        body.append(
            [
                m["name"],
                "-" if not m["train_seconds"] else duration(m["train_seconds"]),
                "-" if not m["train_seconds"] else _known(m["train_samples_per_second"], "{:,.1f}"),
                _known(m["peak_gib"], "{:.2f}"),
                _known(None if m["train_joules"] is None else m["train_joules"] / 3600, "{:,.2f}"),
                *([_known(m["train_cost"], "{:,.4f}")] if price else []),
                _known(share, "{:.2%}") if m["train_seconds"] else "-",
                short(m["storage_bytes"]) + "B",
                f"{1000 * latency['p50_seconds']:.1f} / {1000 * latency['p95_seconds']:.1f}" if latency else UNKNOWN,
                _known(m["test_samples_per_second"], "{:,.0f}"),
            ]
        )
    header = [
        "model",
        "training",
        "examples/s",
        "peak GiB",
        "Wh",
        *(["cost"] if price else []),
        "trained",
        "to keep",
        "answer, ms p50 / p95",
        "tested/s",
    ]
    return header, body


def figures(report: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Every number, a row for each model."""
    names = [k for k, v in report["models"][0].items() if isinstance(v, int | float | str) or v is None]
    return names, [[m[name] for name in names] for m in report["models"]]


def verdicts(report: dict[str, Any]) -> list[str]:
    """Of every pair."""
    return [pair["verdict"] + "." for pair in report["pairs"]]


def _how(report: dict[str, Any]) -> list[str]:
    timed = next((m["latency"] for m in report["models"] if m["latency"]), None)
    lines = [
        "Intervals: 95 %, of rows drawn anew (bootstrap). Verdicts: McNemar's exact test on the rows that only one of two has right, "
        "corrected for the number of pairs (Holm), at 5 %.",
        "Calibration error: expected, of the probability of the predicted label; the temperature was fitted on validation rows.",
        "Wh: of the GPU while it trained, by NVML; unknown where nothing measures it. Peak: of the GPU's memory, or of the process on a "
        "CPU.",
    ]
    return [*lines, f"Answers: {timed['rows']} test rows one after another."] if timed else lines


def _title(report: dict[str, Any]) -> str:
    return f"{len(report['models'])} models on {report['data']}"


def _agreement(report: dict[str, Any]) -> str:
    return f"Of {report['rows']:,} test rows all models have {report['all_right']:,} right, and none has {report['none_right']:,}."


def _disagreements(report: dict[str, Any]) -> Table:
    names = [m["name"] for m in report["models"]]
    cells = [
        [row["text"], row["label"], *(f"{row['answers'][n]['label']} ({row['answers'][n]['probability']:.2f})" for n in names)]
        for row in report["disagreements"]
    ]
    return ["text", "label", *names], cells


# ------------------------------------------------------------------------------------------------------------- Markdown


def markdown_page(report: dict[str, Any]) -> str:
    """The comparison for people."""
    out = [f"# {_title(report)}", "", *markdown(report["choice"]["words"]), ""]
    for title, parts in (
        ("How good", [quality(report), _agreement(report), verdicts(report)]),
        ("What it takes", [costs(report)]),
        ("Confusion", _confusions(report)),
        ("Rows that they answer differently", [_disagreements(report)]),
        ("How this was measured", [_how(report), [f"{m['name']}: {m['run']}" for m in report["models"]]]),
    ):
        out += [f"## {title}", ""]
        for part in parts:
            out += [*markdown(part), ""]
    return "\n".join(out).rstrip() + "\n"


def _confusions(report: dict[str, Any]) -> list[Any]:
    parts: list[Any] = []
    for m in report["models"]:
        rows = [[label, *(f"{n:,}" for n in row)] for label, row in zip(report["labels"], m["confusion"], strict=True)]
        parts += [f"{m['name']}: rows are true labels, columns answers.", (["", *report["labels"]], rows)]
    return parts


# ----------------------------------------------------------------------------------------------------------------- HTML


def html_page(report: dict[str, Any]) -> str:
    """The same as a page with charts: no scripts, nothing loaded from elsewhere."""
    names = [m["name"] for m in report["models"]]
    out = [
        *html_begin(_title(report), charts.STYLE + STYLE),
        f'<p class="choice">{html.escape(report["choice"]["words"])}</p>',
        "<h2>How good</h2>",
        as_html(quality(report), figures=True),
        as_html(_agreement(report)),
        as_html(verdicts(report)),
        "<h2>What it takes</h2>",
        as_html(costs(report), figures=True),
        *_cost_chart(report),
        *_curve_charts(report, names),
        "<h2>Confusion</h2><p>Rows are true labels, columns answers; a cell's colour is its share of the row.</p>",
        f'<div class="grids">{"".join(_confusion_grid(report["labels"], m) for m in report["models"])}</div>',
        "<h2>Rows that they answer differently</h2>",
        _differences(report, names),
        "<h2>How this was measured</h2>",
        as_html(_how(report)),
        as_html([f"{m['name']}: {m['run']}" for m in report["models"]]),
    ]
    return "\n".join([*out, HTML_END]) + "\n"


def _cost_chart(report: dict[str, Any]) -> list[str]:
    """Accuracy by what training took: the energy where it is known of all that were trained, else the time."""
    trained = [m for m in report["models"] if m["train_seconds"]]
    if not trained:
        return []
    energy = all(m["train_joules"] for m in trained)
    cost = [(m["train_joules"] / 3600 if energy else m["train_seconds"]) if m["train_seconds"] else None for m in report["models"]]
    points = [
        charts.Point(m["name"], c, m["accuracy"], *m["accuracy_interval"]) if c else None
        for m, c in zip(report["models"], cost, strict=True)
    ]
    untrained = [m for m in report["models"] if not m["train_seconds"]]
    below = "; ".join(f"{m['name']}, not trained: {m['accuracy']:.4f}" for m in untrained)
    label = "energy of training, Wh" if energy else "seconds of training"
    return ["<h3>Accuracy against cost</h3>", charts.points(points, label, "accuracy"), *([as_html(below + ".")] if below else [])]


def _curve_charts(report: dict[str, Any], names: list[str]) -> list[str]:
    """Loss and accuracy by epoch, where some model has more than one point of it."""
    out = []
    for key, label in (("train/loss", "training loss"), ("val/accuracy", "accuracy in validation")):
        series = [m["curves"].get(key, []) for m in report["models"]]
        if max(map(len, series)) > 1:
            out.append(charts.lines(series, "epochs", label))
    return ["<h2>Learning curves</h2>", charts.legend(names), *out] if out else []


def _confusion_grid(labels: list[str], model: dict[str, Any]) -> str:
    head = "".join(f"<th>{html.escape(label)}</th>" for label in labels)
    rows = []
    for label, counts in zip(labels, model["confusion"], strict=True):
        cells = "".join(
            f'<td style="background:color-mix(in srgb, var(--c0) {round(70 * n / max(1, sum(counts)))}%, transparent)">{n:,}</td>'
            for n in counts
        )
        rows.append(f"<tr><th>{html.escape(label)}</th>{cells}</tr>")
    return f"<figure><figcaption>{html.escape(model['name'])}</figcaption><table><tr><th></th>{head}</tr>{''.join(rows)}</table></figure>"


def _differences(report: dict[str, Any], names: list[str]) -> str:
    """A table whose answers are coloured by whether they are right."""
    if not report["disagreements"]:
        return as_html("There are none.")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["text", "label", *names])
    rows = []
    for row in report["disagreements"]:
        cells = [f"<td>{html.escape(row['text'])}</td><td>{html.escape(row['label'])}</td>"]
        for name in names:
            answer = row["answers"][name]
            kind = "right" if answer["label"] == row["label"] else "wrong"
            cells.append(f'<td class="{kind}">{html.escape(answer["label"])} ({answer["probability"]:.2f})</td>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
