"""Pictures: one look for all, on white, with the spread of the rounds wherever there are rounds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.measure import Series

# What is compared has the same colour in every picture.
COLOURS = {"ours": "#0b7285", "floor": "#868e96", "textbook": "#c92a2a", "asyncpg": "#e67700", "waits": "#364fc7"}
OTHER = "#5f3dc4"
WIDTH = 11.2  # Inches: what a page shows without making the letters smaller.
INK, GRID = "#343a40", "#e9ecef"


@dataclass
class Panel:
    """One pair of axes: curves over the same x, each a series of rounds for each x."""

    title: str
    y_label: str
    x_label: str
    x: Sequence[float]
    curves: Mapping[str, Sequence[Series]]
    log_x: bool = False
    log_y: bool = False
    # Where something lies on x, by what it is; two at most.
    marks: Mapping[str, float] = field(default_factory=dict)


def lines(*panels: Panel) -> Figure:
    """Draw panels side by side: medians as lines, the spread as a band."""
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 4.0), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for label, rounds in panel.curves.items():
            colour = _colour(label)
            lowest, highest = [min(one.values) for one in rounds], [max(one.values) for one in rounds]
            axis.fill_between(panel.x, lowest, highest, color=colour, alpha=0.15, linewidth=0)
            axis.plot(panel.x, [one.median for one in rounds], "o-", markersize=4, color=colour, label=label)
        for (text, x), style in zip(panel.marks.items(), ("--", ":"), strict=False):
            axis.axvline(x, color="#868e96", linewidth=1.3, linestyle=style, label=text)
        if panel.log_x:
            axis.set_xscale("log")
        axis.set_xticks(panel.x, [f"{x:,.7g}" for x in panel.x])
        axis.xaxis.set_minor_locator(NullLocator())
        if panel.log_y:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_minor_locator(NullLocator())
        else:
            axis.set_ylim(0, axis.get_ylim()[1] * 1.1)
        _dress(axis, panel.title, panel.x_label, panel.y_label)
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.7g}"))
        if len(panel.curves) + len(panel.marks) > 1:
            axis.legend(frameon=False, fontsize=9)
    figure.tight_layout(w_pad=3)
    return figure


def bars(title: str, x_label: str, values: Mapping[str, Series]) -> Figure:
    """Draw one bar for each series: the median, with the spread as a whisker."""
    figure, axis = plt.subplots(figsize=(8.5, 0.8 + 0.5 * len(values)))
    for place, (label, rounds) in enumerate(values.items()):
        middle, low, high = rounds.median, min(rounds.values), max(rounds.values)
        axis.barh(place, middle, color=_colour(label), height=0.62)
        axis.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color=INK, capsize=3, linewidth=1)
        axis.text(high, place, f"  {middle:,.0f}", va="center", fontsize=9, color=INK)
    axis.set_yticks(range(len(values)), list(values))
    axis.invert_yaxis()
    axis.margins(x=0.12)
    _dress(axis, title, x_label, "")
    axis.grid(visible=False, axis="y")
    figure.tight_layout()
    return figure


def _colour(label: str) -> str:
    return next((colour for name, colour in COLOURS.items() if label.startswith(name)), OTHER)


def _dress(axis: Axes, title: str, x_label: str, y_label: str) -> None:
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axis.set_xlabel(x_label, color=INK)
    axis.set_ylabel(y_label, color=INK)
    axis.grid(visible=True, color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
