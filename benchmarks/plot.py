"""Plots of the documentation, drawn from the numbers in `benchmarks/results`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("svg")

from matplotlib.figure import Figure

PANEL = (4.2, 3.2)  # inches
# makes the file reproducible (no date, no random ids) and keeps text as text
STYLE = {"svg.hashsalt": "fusion_hf", "svg.fonttype": "none", "font.size": 9}


class Point(NamedTuple):
    """A median, with the minimum and maximum of the rounds (both equal to it for a single value)."""

    x: float
    median: float
    least: float
    most: float


class Panel(NamedTuple):
    """One diagram: lines by their names in the legend."""

    title: str
    x_label: str
    y_label: str
    lines: dict[str, Sequence[Point]]


def draw(path: Path, panels: Sequence[Panel]) -> None:
    """Draw panels side by side into an SVG file, with bars from the minimum to the maximum."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PANEL[0] * len(panels), PANEL[1]), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for name, points in panel.lines.items():
                medians = [point.median for point in points]
                spread = (
                    [point.median - point.least for point in points],
                    [point.most - point.median for point in points],
                )
                bars = {"yerr": spread, "capsize": 2, "marker": "o", "markersize": 3}
                axes.errorbar([point.x for point in points], medians, label=name, **bars)
            axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
            if len(panel.lines) > 1:
                axes.legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
