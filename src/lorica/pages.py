"""Pages for people, as Markdown and as HTML that needs nothing else: no scripts, nothing loaded from elsewhere, light and dark. Whatever
comes from data is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

BAR = 40  # characters of the histogram's longest bar

Table = tuple[list[str], list[list[str]]]  # header, rows
Section = tuple[str, list[Any]]  # title; paragraphs (text), tables, lists of lines and histograms

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #1b1f24; background: #fff }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #d7dce1 }
table { border-collapse: collapse; margin: .6em 0 } th, td { padding: .2em .8em .2em 0; text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } td.n { white-space: nowrap } th { border-bottom: 1px solid #d7dce1 }
.bar { background: #4c78a8; height: .8em; display: inline-block }
.notes { background: #fff6df; border-left: 4px solid #e0a100; padding: .4em 1.6em }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f6f8; color: #5b6570; padding: .7em; border-radius: 4px }
mark, .label { background: #bfe8c5; color: #0b3d17; border-radius: 2px } .label { padding: 0 .4em }
@media (prefers-color-scheme: dark) {
  body { color: #d9dee4; background: #15181c } pre { background: #1e2329; color: #9aa5b1 } .notes { background: #332a10 }
  mark, .label { background: #1f5a2c; color: #dff5e3 } h2, th { border-color: #3a424b }
}
.wide { overflow-x: auto }
"""


class Histogram(list[tuple[str, int]]):
    """(range, rows) of each bar."""


def markdown(part: Any) -> list[str]:
    """Lines of a paragraph, a table, a list of lines or a histogram."""
    if isinstance(part, Histogram):
        most = max(n for _, n in part)
        wide, digits = max(len(name) for name, _ in part), len(f"{most:,}")
        return ["```text", *(f"{name:>{wide}}  {n:>{digits},}  {'█' * -(-BAR * n // most)}".rstrip() for name, n in part), "```"]
    if isinstance(part, str):
        return [md(part)]
    if isinstance(part, list):
        return [f"- {md(line)}" for line in part]
    header, body = part
    return [md_row(header), "|" + "---|" * len(header), *(md_row(row) for row in body)]


def md_row(cells: Sequence[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(map(md, cells))} |"


def md(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&$])", r"\\\1", " ".join(str(text).split()))


def html_begin(title: str, more_style: str = "") -> list[str]:
    """Lines of a page up to its heading."""
    return [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}{more_style}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
    ]


HTML_END = "</body></html>"


def as_html(part: Any, figures: bool = False) -> str:
    """The same as HTML. figures: all columns of a table but the first are, whatever is said where one is not known."""
    if isinstance(part, Histogram):
        most = max(n for _, n in part)
        rows = [
            f'<tr><td class="n">{html.escape(name)}</td><td class="n">{n:,}</td>'
            f'<td><span class="bar" style="width:{30 * n / most:.2f}em"></span></td></tr>'
            for name, n in part
        ]
        return f"<table>{''.join(rows)}</table>"
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    if isinstance(part, list):
        return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in part)}</ul>"
    header, body = part
    numbers = [bool(body) and all(re.match(r"[\d,.]*( \(.*\))?$", row[i]) for row in body) for i in range(len(header))]
    if figures:
        numbers = [i > 0 for i in range(len(header))]
    cells = [' class="n"' if number else "" for number in numbers]
    lines = (
        "".join(f"<{tag}{c}>{html.escape(cell)}</{tag}>" for c, cell in zip(cells, row, strict=True))
        for tag, row in [("th", header), *(("td", row) for row in body)]
    )
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'
