"""curves.png and confusion.png, on a paper-coloured ground of their own, so that they read in light and dark pages alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAPER, INK, GRID = "#fbfaf7", "#22272e", "#d9d5cc"
BLUE, ORANGE, GREEN = "#2f6db3", "#c8641b", "#3b7d4f"


def new_figure(width: float, height: float, columns: int) -> tuple[Any, Any]:
    """(a figure of so many inches, its axes in one row), in the style of all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {
        "figure.facecolor": PAPER, "axes.facecolor": PAPER, "savefig.facecolor": PAPER, "text.color": INK, "axes.labelcolor": INK,
        "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK, "grid.color": GRID, "axes.grid": True, "axes.spines.top": False,
        "axes.spines.right": False, "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold",
    }  # fmt: skip
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, axes


def save_figure(figure: Any, file: Path) -> None:
    """Lay a figure out, write it and let go of it."""
    import matplotlib.pyplot as plt

    figure.set_dpi(120)
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")  # or savefig lays it out twice more
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_curves(metrics: Path, file: Path, monitor: str, best_step: int) -> None:
    """Loss (training and validation), the validation figure that chose the weights, and the learning rate, by step."""
    from lorica.metrics_log import read_metrics

    series = read_metrics(metrics)
    figure, axes = new_figure(13, 3.8, 3)
    loss, quality, rate = axes[0]
    for name, colour, label in (("train/loss", BLUE, "training"), ("val/loss", ORANGE, "validation")):
        _line(loss, series.get(name, []), colour, label)
    _line(quality, series.get(monitor, []), GREEN, monitor.removeprefix("val/"))
    if best_step:
        quality.axvline(best_step, color=INK, linewidth=1, linestyle=":", label=f"kept: step {best_step}")
    _line(rate, series.get("train/lr", []), BLUE, "learning rate")
    for axis, title in ((loss, "Loss"), (quality, f"Validation {monitor.removeprefix('val/').replace('_', ' ')}"), (rate, "Learning rate")):
        axis.set_title(title, loc="left")
        axis.set_xlabel("optimiser step")
        axis.xaxis.get_major_locator().set_params(integer=True)
        if axis is not rate and axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    save_figure(figure, file)


def _line(axis: Any, points: Sequence[tuple[int, float]], colour: str, label: str) -> None:
    if points:
        marker = "o" if len(points) <= 30 else ""
        axis.plot([s for s, _ in points], [v for _, v in points], color=colour, label=label, marker=marker, markersize=4, linewidth=1.8)


def draw_confusion(matrix: Sequence[Sequence[int]], labels: Sequence[str], file: Path) -> None:
    """Rows are true classes, columns predictions; each cell has its count, and its colour is its share of the row."""
    k = len(labels)
    side = min(16.0, 2.6 + 0.95 * k)
    figure, axes = new_figure(side + 0.8, side, 1)
    axis = axes[0][0]
    share = [[n / max(1, sum(row)) for n in row] for row in matrix]
    axis.imshow(share, cmap="Blues", vmin=0.0, vmax=1.15)
    axis.grid(False)
    names = [name if len(name) <= 18 else name[:17] + "…" for name in labels]
    axis.set_xticks(
        range(k),
        names,
        rotation=30 if k > 4 or max(map(len, names)) > 9 else 0,
        ha="right" if k > 4 or max(map(len, names)) > 9 else "center",
    )
    axis.set_yticks(range(k), names)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    if k <= 20:
        for i, row in enumerate(matrix):
            for j, n in enumerate(row):
                text = f"{n:,}" + (f"\n{share[i][j]:.0%}" if k <= 10 else "")
                axis.text(j, i, text, ha="center", va="center", color="white" if share[i][j] > 0.55 else INK, fontsize=9)
    right = sum(matrix[i][i] for i in range(k))
    total = sum(map(sum, matrix))
    axis.set_title(f"Test rows: {right:,} of {total:,} right", loc="left")
    save_figure(figure, file)
