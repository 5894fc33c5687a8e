"""`make docs`: draws what `lorica plan` says of a run's memory beside what was measured, from the figures under benchmarks/results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lorica.plots import BLUE, INK, ORANGE, new_figure, save_figure

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
# The legend's name -> (files, colour).
GRIDS = {
    "looked at while developing": (["memory_h200.json"], BLUE),
    "held out": (["memory_held_out_h200.json", "memory_held_out_2_h200.json"], ORANGE),
}


def draw(file: Path) -> None:
    """Predicted over measured, and the relative error, by measured size."""
    figure, axes = new_figure(11, 4.2, 2)
    sizes, errors = axes[0]
    for label, (names, colour) in GRIDS.items():
        found = [json.loads((RESULTS / name).read_text("utf-8")) for name in names]
        points = [point for grid in found for point in grid["points"] if "error" in point]
        measured = [point["measured_gib"] for point in points]
        sizes.plot(measured, [point["predicted_gib"] for point in points], "o", color=colour, markersize=5, label=f"{len(points)} {label}")
        errors.plot(measured, [100 * point["error"] for point in points], "o", color=colour, markersize=5)
    sizes.plot([0.3, 45], [0.3, 45], color=INK, linewidth=1)
    sizes.set(xscale="log", yscale="log", xlabel="measured peak, GiB", ylabel="planned peak, GiB")
    sizes.set_title("A run's memory on an H200", loc="left")
    sizes.legend(frameon=False)
    for limit in (-3, 8):
        errors.axhline(limit, color=INK, linewidth=1, linestyle=":")
    errors.set(xscale="log", xlabel="measured peak, GiB", ylabel="planned beyond measured, %", ylim=(-10, 10))
    errors.set_title("Its error", loc="left")
    save_figure(figure, file)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
