"""Pictures: one look for all, light background, direct labels."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"ours": "#0b7285", "floor": "#868e96", "textbook": "#c92a2a"}
OTHERS = ("#5f3dc4", "#e67700", "#2b8a3e", "#364fc7")
Points = tuple[Sequence[float], Sequence[float]]


def lines(
    panels: Sequence[tuple[str, str, Mapping[str, Points]]],
    *,
    x_label: str,
    log_x: bool = False,
    log_y: Sequence[bool] = (),
    marks: Mapping[str, float] | None = None,
) -> Figure:
    """Draw one panel for each (title, label of y, curves), side by side."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5.6 * len(panels), 3.9), squeeze=False)
    for number, (axis, (title, y_label, curves)) in enumerate(zip(axes[0], panels, strict=True)):
        spare = iter(OTHERS)
        for label, (x, y) in curves.items():
            colour = COLOURS.get(label) or next(spare)
            axis.plot(x, y, marker="o", markersize=4, linewidth=2, color=colour, label=label)
        for text, x_mark in (marks or {}).items():
            axis.axvline(x_mark, color="#adb5bd", linewidth=1, linestyle=":")
            axis.annotate(text, (x_mark, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=7, ha="right")
        if log_x:
            axis.set_xscale("log", base=2 if max(max(x) for x, _ in curves.values()) <= 64 else 10)  # noqa: PLR2004
        if number < len(log_y) and log_y[number]:
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        _dress(axis, title, x_label, y_label)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    return figure


def bars(title: str, y_label: str, values: Mapping[str, tuple[float, float, float]]) -> Figure:
    """Draw medians with their spread: (median, lowest, highest) by label."""
    figure, axis = plt.subplots(figsize=(7.5, 3.6))
    spare = iter(OTHERS)
    for place, (label, (middle, low, high)) in enumerate(values.items()):
        colour = COLOURS.get(label) or next(spare, "#495057")
        axis.barh(place, middle, color=colour, height=0.62)
        axis.errorbar(middle, place, xerr=[[middle - low], [high - middle]], color="#212529", capsize=3, linewidth=1)
        axis.annotate(
            f"{middle:,.0f}", (high, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
        )
    axis.set_yticks(range(len(values)), list(values))
    axis.invert_yaxis()
    axis.margins(x=0.15)
    _dress(axis, title, y_label, "")
    axis.grid(visible=False, axis="y")
    figure.tight_layout()
    return figure


def _dress(axis: Axes, title: str, x_label: str, y_label: str) -> None:
    axis.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(visible=True, color="#e9ecef", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
