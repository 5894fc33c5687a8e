"""Charts as SVG that takes the page's colours, light and dark, and its width. Nothing but text: no scripts, nothing loaded."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 300  # units of a chart, whatever its size on the page
LEFT, RIGHT, TOP, BOTTOM = 68, 14, 12, 44  # around the plot
COLOURS = 8  # series beyond take them again
LINE = 14  # from one name to the next below it

# The colours of series are of Okabe and Ito's palette for all kinds of colour vision (2008), lighter where the page is dark.
STYLE = """
svg.chart { width: 100%; min-width: 34em; max-width: 46em; height: auto; display: block; margin: .4em 0 }
svg.chart text { fill: currentColor; font: 12px system-ui, sans-serif } svg.chart .axis { stroke: #9aa5b1; stroke-width: 1 }
svg.chart .rule { stroke: #9aa5b1; stroke-width: .5; opacity: .5 } svg.chart polyline { fill: none; stroke-width: 2 }
.legend { display: flex; flex-wrap: wrap; gap: .2em 1.2em; list-style: none; padding: 0; margin: .4em 0 }
.legend span { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em }
:root { --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #aa3377; --c4: #b8860b; --c5: #56b4e9; --c6: #666; --c7: #882255 }
@media (prefers-color-scheme: dark) {
  :root { --c0: #56a8e0; --c1: #f08a4b; --c2: #3fcf9f; --c3: #e58ac4; --c4: #e0b94f; --c5: #9ad7ff; --c6: #b0b6bd; --c7: #d98fb0 }
}
"""


@dataclass(frozen=True)
class Axis:
    """A range of values over a length of the chart."""

    low: float
    high: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Where a value lies, 0 to 1."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round values in the range: powers of ten, halves and fifths of them; or about five at equal steps."""
        if self.logarithmic:
            tens = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**n for n in tens for m in (1, 2, 5) if self.low <= m * 10.0**n <= self.high]
            if len(found) > 2:
                return found if len(found) <= 8 else [v for v in found if math.log10(v) % 1 < 1e-9]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next((m for m in (1, 2, 5) if (self.high - self.low) / (step * m) <= 6), 10)
        return [n * step for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def _around(values: Sequence[float], logarithmic: bool = False) -> Axis:
    """A range with some room on both sides."""
    low, high = min(values), max(values)
    if logarithmic:
        return Axis(low / 1.5, high * 1.5, True)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(low - room, high + room)


def _words(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _frame(x: Axis, y: Axis, x_label: str, y_label: str, inner: Sequence[str]) -> str:
    out = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(f"{y_label} by {x_label}", quote=True)}">'
    ]
    for value in y.ticks():
        at = _y(y, value)
        out.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_words(value)}</text>')
    for value in x.ticks():
        at = _x(x, value)
        out.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM + 4}"/>')
        out.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{_words(value)}</text>')
    out.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_label)}</text>')
    out.append(
        f'<text transform="translate(13 {(TOP + HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
    )
    return "".join(['<div class="wide">', *out, *inner, "</svg></div>"])


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.at(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.at(value) * (HEIGHT - TOP - BOTTOM)


def legend(names: Sequence[str]) -> str:
    """Which colour each series has."""
    items = (f'<li><span style="background:var(--c{i % COLOURS})"></span>{html.escape(name)}</li>' for i, name in enumerate(names))
    return f'<ul class="legend">{"".join(items)}</ul>'


def lines(series: Sequence[Sequence[tuple[float, float]]], x_label: str, y_label: str) -> str:
    """A line for each series of (x, y), in the order of the legend; a series without points is left out."""
    points = [p for s in series for p in s]
    x, y = _around([p[0] for p in points]), _around([p[1] for p in points])
    inner = []
    for i, one in enumerate(series):
        if len(one) == 1:
            inner.append(f'<circle cx="{_x(x, one[0][0]):.1f}" cy="{_y(y, one[0][1]):.1f}" r="4" style="fill:var(--c{i % COLOURS})"/>')
        elif one:
            path = " ".join(f"{_x(x, a):.1f},{_y(y, b):.1f}" for a, b in one)
            inner.append(f'<polyline points="{path}" style="stroke:var(--c{i % COLOURS})"/>')
    return _frame(x, y, x_label, y_label, inner)


@dataclass(frozen=True)
class Point:
    """A value with its interval, at a cost."""

    name: str
    x: float
    y: float
    low: float
    high: float


def points(given: Sequence[Point | None], x_label: str, y_label: str) -> str:
    """A dot and its interval for each, in the order of the legend, the cost by factors; None is left out."""
    shown = [p for p in given if p is not None]
    x, y = _around([p.x for p in shown], True), _around([v for p in shown for v in (p.low, p.high)])
    inner: list[str] = []
    named: list[tuple[float, float]] = []  # where names stand
    for i, p in enumerate(given):
        if p is None:
            continue
        colour, across, up, right = f"var(--c{i % COLOURS})", _x(x, p.x), _y(y, p.y), x.at(p.x) > 0.7
        whisker = f'x1="{across:.1f}" x2="{across:.1f}" y1="{_y(y, p.low):.1f}" y2="{_y(y, p.high):.1f}"'
        while any(abs(up - b) < LINE and abs(across - a) < WIDTH / 3 for a, b in named):
            up += LINE
        named.append((across, up))
        beside = f'x="{across + (-10 if right else 10):.1f}" y="{up + 4:.1f}" text-anchor="{"end" if right else "start"}"'
        inner.append(f'<line {whisker} style="stroke:{colour};stroke-width:2"/>')
        inner.append(f'<circle cx="{across:.1f}" cy="{_y(y, p.y):.1f}" r="5" style="fill:{colour}"/>')
        inner.append(f"<text {beside}>{html.escape(p.name)}</text>")
    return _frame(x, y, x_label, y_label, inner)
