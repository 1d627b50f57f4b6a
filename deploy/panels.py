"""What a dashboard shows, in our own words, and as Grafana's JSON: `grafana`.

A query that may have nothing to show says why: on a machine without a GPU, say. All others must show something
(tests/deploy/test_prometheus.py asks a real Prometheus).
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, Threshold, ThresholdsMode

Kind = Literal["lines", "number"]
Unit = Literal["short", "s", "bytes", "Bps", "reqps", "percentunit", "hertz", "celsius", "cps", "dateTimeAsIso"]

SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")  # the uid of grafana/provisioning/datasources
INSTANCES = "label_values(up, instance)"
WIDTH, HEIGHT, NUMBER_WIDTH, NUMBER_HEIGHT = 8, 8, 4, 4  # of 24 columns, as Grafana counts


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A PromQL expression; `legend` may have labels, as {{model}}."""

    expr: str
    legend: str = ""
    may_be_empty: str | None = None  # why


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """`about` says what it shows and what is good; `bad` is the value from which a number turns red."""

    title: str
    about: str
    queries: Sequence[Query]
    unit: Unit = "short"
    kind: Kind = "lines"
    highest: float | None = None
    bad: float | None = None
    is_low_bad: bool = False

    @property
    def why_empty(self) -> str:
        return "; ".join(dict.fromkeys(query.may_be_empty for query in self.queries if query.may_be_empty))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    title: str
    panels: Sequence[Panel]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    uid: str
    title: str
    about: str
    rows: Sequence[Row]

    @property
    def panels(self) -> Sequence[Panel]:
        return [panel for row in self.rows for panel in row.panels]


def grafana(board: Dashboard) -> str:
    """The dashboard as Grafana 10 and later read it."""
    built = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .description(board.about)
        .tags(["appliance"])
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(
            dashboard.QueryVariable("instance")
            .label("Machine")
            .datasource(SOURCE)
            .query(INSTANCES)
            .multi(True)
            .include_all(True)
            .all_value(".*")
        )
    )
    for row in board.rows:
        built = built.with_row(dashboard.Row(row.title))
        for panel in row.panels:
            built = built.with_panel(_number(panel) if panel.kind == "number" else _lines(panel))
    return JSONEncoder(sort_keys=True, indent=1).encode(built.build()) + "\n"


def _lines(panel: Panel) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .title(panel.title)
        .description(_about(panel))
        .datasource(SOURCE)
        .unit(panel.unit)
        .min(0)
        .span(WIDTH)
        .height(HEIGHT)
        .line_width(1)
        .fill_opacity(8)
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )
    if panel.highest is not None:
        built = built.max(panel.highest)
    for query in panel.queries:
        built = built.with_target(_target(query))
    return built


def _number(panel: Panel) -> stat.Panel:
    built = (
        stat.Panel()
        .title(panel.title)
        .description(_about(panel))
        .datasource(SOURCE)
        .unit(panel.unit)
        .span(NUMBER_WIDTH)
        .height(NUMBER_HEIGHT)
        .no_value("–")
    )
    if panel.bad is not None:
        below, above = ("red", "green") if panel.is_low_bad else ("green", "red")
        steps = [Threshold(value=None, color=below), Threshold(value=panel.bad, color=above)]
        built = built.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    for query in panel.queries:
        built = built.with_target(_target(query))
    return built


def _target(query: Query) -> prometheus.Dataquery:
    return prometheus.Dataquery().expr(query.expr).legend_format(query.legend or "__auto")


def _about(panel: Panel) -> str:
    return f"{panel.about} Empty: {panel.why_empty}." if panel.why_empty else panel.about
