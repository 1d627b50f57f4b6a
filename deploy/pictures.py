"""Draws a dashboard from what a Prometheus has: for documents, and for whoever has no Grafana at hand."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deploy.panels import Dashboard, Panel, Query

COLUMNS = 3
INCHES = (4.6, 2.6)  # of a panel
SCALES: Mapping[str, tuple[float, str]] = {
    "bytes": (1 << 20, "MiB"),
    "percentunit": (0.01, "%"),
    "hertz": (1e9, "GHz"),
    "s": (1, "s"),
    "celsius": (1, "°C"),
}
MOST_LINES = 12

History = Callable[[str], Sequence[Mapping[str, Any]]]  # of an expression: the series of Prometheus' range queries


def draw(board: Dashboard, history: History, path: Path) -> None:
    """One picture with all panels, in their order; numbers are drawn as lines too."""
    panels = board.panels
    rows = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(INCHES[0] * COLUMNS, INCHES[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(board.title)
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for place, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(place, panel, history)
    for place in grid.flat[len(panels) :]:
        place.set_axis_off()
    figure.savefig(path, dpi=80)


def _draw_panel(place: Axes, panel: Panel, history: History) -> None:
    scale, unit = SCALES.get(panel.unit, (1, ""))
    lines = [(query, series) for query in panel.queries for series in history(query.expr)]
    for query, series in lines[:MOST_LINES]:
        times, values = zip(*((float(time), float(value)) for time, value in series["values"]), strict=True)
        start = lines[0][1]["values"][0][0]
        place.plot([time - start for time in times], [value / scale for value in values], label=_legend(query, series))
    place.set_title(f"{panel.title}{f', {unit}' if unit else ''}", fontsize=9)
    place.tick_params(labelsize=7)
    place.margins(y=0.3)  # for the legend
    place.set_ylim(bottom=0)
    if lines:
        place.grid(alpha=0.3)
        place.legend(fontsize=6, loc="upper left")
    else:
        place.text(0.5, 0.5, f"empty: {panel.why_empty}", ha="center", va="center", fontsize=7, transform=place.transAxes)


def _legend(query: Query, series: Mapping[str, Any]) -> str:
    text = query.legend
    for label, value in series["metric"].items():
        text = text.replace(f"{{{{{label}}}}}", value)
    return text or "value"
