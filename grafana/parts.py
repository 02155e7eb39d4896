"""What the dashboards are made of: panels that look alike, variables, rows, and the links between the three.

A panel has a number of its own, which the alerts' links name: it stays, whatever comes before or after the panel. Its
text says what is bad, and ends with the sections of docs/runbook.md that say what to do: those of the alerts that lead
to it.
"""

import re
from collections.abc import Sequence
from typing import Literal, TypeAlias

from grafana_foundation_sdk.builders import common as looks
from grafana_foundation_sdk.builders import dashboard as boards
from grafana_foundation_sdk.builders import heatmap, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    DataSourceRef,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

# Grafana's width in columns, and a panel's height in rows of its grid.
WIDTH = 24
HEIGHT = 8
LOW = 4
# The mark by which the three find each other.
TAG = "lifeguard"
# The value from which, or up to which, something is bad: the alert's, where there is one.
Limit: TypeAlias = tuple[Literal["above", "below"], float]
# An expression and the legend of its lines.
Query: TypeAlias = tuple[str, str]
Panel: TypeAlias = timeseries.Panel | stat.Panel | statetimeline.Panel | heatmap.Panel
# A heading and what stands below it.
Row: TypeAlias = tuple[str, list[Panel]]
GOOD, BAD, NEUTRAL = "green", "red", "blue"


def source() -> DataSourceRef:
    """Return the data source that is chosen on the dashboard: whichever Prometheus the reader has."""
    return DataSourceRef(type_val="prometheus", uid="${datasource}")


def ratio(part: str, whole: str) -> str:
    """Divide one expression by another."""
    return f"{part} / {whole}"


def graph(  # noqa: PLR0913  # All that makes panels differ, named at each call.
    number: int, title: str, text: str, *queries: Query, unit: str, limit: Limit | None = None, stacked: bool = False
) -> Panel:
    """Draw lines over time; `unit` is one of Grafana's, `limit` a dashed line."""
    panel = (
        timeseries.Panel()
        .id(number)
        .title(title)
        .description(text)
        .datasource(source())
        .height(HEIGHT)
        .unit(unit)
        .min(0)
        .line_width(1)
        .fill_opacity(30 if stacked else 5)
        .show_points(VisibilityMode.NEVER)
        .legend(looks.VizLegendOptions().display_mode(LegendDisplayMode.LIST).show_legend(show_legend=True))
        .tooltip(looks.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
        .thresholds(_thresholds(limit))
    )
    if stacked:
        panel = panel.stacking(looks.StackingConfig().mode(StackingMode.NORMAL))
    if limit is not None:
        panel = panel.thresholds_style(looks.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
    for letter, query in zip("ABCDEFGH", queries, strict=False):
        panel = panel.with_target(_target(letter, query))
    return panel


def figure(  # noqa: PLR0913  # The same.
    number: int, title: str, text: str, expression: str, *, unit: str, limit: Limit | None = None
) -> Panel:
    """Show the last value as a number that turns red past its limit."""
    return (
        stat.Panel()
        .id(number)
        .title(title)
        .description(text)
        .datasource(source())
        .height(LOW)
        .unit(unit)
        .graph_mode(BigValueGraphMode.NONE)
        .color_mode(BigValueColorMode.NONE if limit is None else BigValueColorMode.VALUE)
        .reduce_options(looks.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(_thresholds(limit))
        .with_target(_target("A", (expression, title)).instant())
    )


def states(
    number: int, title: str, text: str, *queries: Query, names: tuple[str, str], colors: tuple[str, str] = (BAD, GOOD)
) -> Panel:
    """Draw what is 0 or 1 as bars of two colours; `names` and `colors` are those of 0 and of 1."""
    values = {
        str(value): models.ValueMappingResult(text=name, color=color, index=value)
        for value, (name, color) in enumerate(zip(names, colors, strict=True))
    }
    panel = (
        statetimeline.Panel()
        .id(number)
        .title(title)
        .description(text)
        .datasource(source())
        .height(HEIGHT)
        .unit("none")
        .mappings([models.ValueMap(options=values)])
        .show_value(VisibilityMode.NEVER)
        .tooltip(looks.VizTooltipOptions().mode(TooltipDisplayMode.SINGLE))
    )
    for letter, query in zip("ABCDEFGH", queries, strict=False):
        panel = panel.with_target(_target(letter, query))
    return panel


def heat(number: int, title: str, text: str, expression: str, *, unit: str) -> Panel:
    """Draw a histogram over time: the more observations a bucket has, the darker it is."""
    return (
        heatmap.Panel()
        .id(number)
        .title(title)
        .description(text)
        .datasource(source())
        .height(HEIGHT)
        .calculate(calculate=False)
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(64))
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .with_target(_target("A", (expression, "{{le}}")).format(PromQueryFormat.HEATMAP))
    )


def values_of(name: str, label: str, metric: str, *, every: str = ".*") -> boards.QueryVariable:
    """Let the reader choose among the values that a label of this metric has; all of them at first.

    `every` is what all of them are in a query; empty, it is their list.
    """
    return (
        boards.QueryVariable(name)
        .label(name.capitalize())
        .datasource(source())
        .query({"qryType": 1, "query": f"label_values({metric}, {label})", "refId": name})
        .definition(f"label_values({metric}, {label})")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(multi=True)
        .include_all(include_all=True)
        .all_value(every)
        .current(models.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def assemble(
    uid: str,
    title: str,
    text: str,
    variables: Sequence[boards.QueryVariable | boards.TextBoxVariable],
    rows: Sequence[Row],
) -> models.Dashboard:
    """Put the panels into rows, with the variables above them and their alerts as marks in every graph."""
    texts = " ".join(str(panel.build().description) for _, panels in rows for panel in panels)
    alerts = [name for names in re.findall(r"Runbook: ([\w, ]+)\.", texts) for name in names.split(", ")]
    board = (
        boards.Dashboard(title)
        .uid(uid)
        .description(text)
        .tags([TAG])
        .timezone("browser")
        .time("now-30m", "now")
        .refresh("10s")
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(_others())
        .annotation(_firing(alerts))
        .with_variable(
            boards.DatasourceVariable("datasource").label("Data source").type("prometheus").current(_default())
        )
    )
    for variable in variables:
        board = board.with_variable(variable)
    # Of several namespaces or clusters in one Prometheus: the reader adds a label, and every query gets it.
    board = board.with_variable(boards.AdHocVariable("filters").label("Filters").datasource(source()))
    for number, (heading, panels) in enumerate(rows, start=1001):
        board = board.with_row(boards.Row(heading).id(number))
        for panel in panels:
            board = board.with_panel(panel.span(_width(panels)))
    made = board.build()
    # The SDK gives links and marks the place "inControlsMenu", where nobody sees them before that is opened.
    for each in (*(made.links or ()), *(made.annotations.list_val or ())):
        each.placement = None
    return made


def _width(panels: Sequence[Panel]) -> int:
    """Return the columns of each panel of a row: three side by side, or two, and of small ones all."""
    if all(isinstance(panel, stat.Panel) for panel in panels):
        return WIDTH // len(panels)
    return {1: WIDTH, 2: WIDTH // 2, 4: WIDTH // 2}.get(len(panels), WIDTH // 3)


def _target(letter: str, query: Query) -> prometheus.Dataquery:
    expression, legend = query
    return prometheus.Dataquery().ref_id(letter).datasource(source()).expr(expression).legend_format(legend).range()


def _thresholds(limit: Limit | None) -> boards.ThresholdsConfig:
    side, value = limit or (None, None)
    steps = [models.Threshold(color={"above": GOOD, "below": BAD, None: NEUTRAL}[side])]
    if value is not None:
        steps.append(models.Threshold(value=value, color=BAD if side == "above" else GOOD))
    return boards.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)


def _default() -> models.VariableOption:
    return models.VariableOption(selected=True, text="default", value="default")


def _others() -> boards.DashboardLink:
    """Lead to the other two, for the same time and the same instances."""
    return (
        boards.DashboardLink("Lifeguard")
        .type(models.DashboardLinkType.DASHBOARDS)
        .tags([TAG])
        .include_vars(include_vars=True)
        .keep_time(keep_time=True)
    )


def _firing(alerts: Sequence[str]) -> boards.AnnotationQuery:
    """Mark when an alert fired that leads to a panel of this dashboard."""
    names = "|".join(alerts)
    return (
        boards.AnnotationQuery()
        .name("Alerts")
        .datasource(source())
        .enable(enable=True)
        .icon_color(BAD)
        .expr(f'ALERTS{{alertstate="firing", alertname=~"{names}"}}')
        .title_format("{{alertname}}")
        .text_format("{{pool}} {{instance}} {{server}}")
        .tag_keys("severity")
    )
