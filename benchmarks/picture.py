"""One picture for a benchmark: for each row a bar from its least to its greatest value and a dot at the median."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from itertools import groupby

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from offbeat.report import Theme

from .measure import Row
from .record import Record, show

LINE, TITLE, MARGIN = 0.27, 0.4, 0.85
"""Inches that a row takes, the title of a group, and what is around a panel."""
WIDTH = 8.5
LOGARITHMIC = 25.0
"""The range of medians from which a panel is logarithmic."""


def draw(record: Record, theme: Theme) -> Figure:
    """A panel for each unit, and in it the rows in their order, by groups."""
    units = [
        (unit, [row for row in record.rows if row.unit == unit]) for unit in dict.fromkeys(r.unit for r in record.rows)
    ]
    heights = [MARGIN + LINE * len(rows) + TITLE * len(titles(rows)) for _, rows in units]
    title = textwrap.fill(record.question.replace("``", "").rstrip("."), 92)
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.7), layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", size=11.5)
    grid = figure.subplots(len(units), 1, squeeze=False, height_ratios=heights)
    for axes, (unit, rows) in zip(grid[:, 0], units, strict=True):
        panel(axes, unit, rows, theme)
    colours = {colour(row, theme): meaning(row) for row in record.rows if not math.isnan(row.median)}
    dots = [Line2D([], [], marker="o", ls="", color=c, ms=6.5, label=text) for c, text in colours.items()]
    if any(marked(row) for row in record.rows):
        dots.append(Line2D([], [], marker="|", ls="", color=theme.colours[2], ms=11, mew=2, label="aim"))
    if len(dots) > 1:
        figure.legend(handles=dots, loc="outside lower right", ncols=len(dots), frameon=False, fontsize=9.5)
    return figure


def meaning(row: Row) -> str:
    """What the colour of a measured row says."""
    if row.peer:
        return "others"
    return "offbeat, short of the aim" if row.missed else "offbeat"


def marked(row: Row) -> bool:
    """Whether its aim has a mark of its own: that of being as fast is the line at 1."""
    return row.aim is not None and not (row.unit == "x" and row.aim == 1)


def colour(row: Row, theme: Theme) -> str:
    """Of a row's bar, dot and number."""
    if row.peer:
        return theme.colours[7]
    return theme.colours[1] if row.missed else theme.colours[0]


def titles(rows: Sequence[Row]) -> list[str]:
    """The groups that have a name."""
    return [group for group, _ in groupby(rows, lambda row: row.group) if group]


def panel(axes: Axes, unit: str, rows: Sequence[Row], theme: Theme) -> None:
    """All rows of a unit."""
    measured = [row for row in rows if not math.isnan(row.median)]
    marks = [1.0] if unit == "x" else []
    most = max((max(row.high, row.aim or 0) for row in measured), default=1.0)
    least = min((*marks, *(row.low for row in measured)), default=1.0)
    most = max((*marks, most))
    if measured and 0 < least < most / LOGARITHMIC:
        axes.set_xscale("log")
        axes.set_xlim(least / 1.5, most * 1.8)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 100 * least else (1,)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(min(0.0, 1.1 * least), 1.12 * most)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: show(x)))
    height, labels = 0.0, []
    for group, members in groupby(rows, lambda row: row.group):
        if group:
            height += TITLE / LINE
            place = axes.get_yaxis_transform()
            axes.text(
                0, height - 0.85, group, transform=place, color=theme.faint, size=9.5, va="center", style="italic"
            )
        for row in members:
            bar(axes, row, height, theme)
            labels.append((height, row))
            height += 1
    if unit == "x":
        axes.axvline(1, color=theme.ink, lw=0.9, zorder=1)
    axes.set_ylim(height - 0.4, -0.6)
    axes.set_yticks([y for y, _ in labels], [textwrap.fill(row.what, 42) for _, row in labels])
    for label in axes.get_yticklabels():
        if "\n" in label.get_text():
            label.set(size=8.5, linespacing=0.95)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    axes.set_xlabel("times" if unit == "x" else unit)
    if not measured:
        axes.set_xticks([])


def bar(axes: Axes, row: Row, height: float, theme: Theme) -> None:
    """One row; what could not be measured says why."""
    if math.isnan(row.median):
        text = row.note or "not measured"
        axes.text(
            0.01,
            height,
            text if len(text) < 88 else text[:85] + "...",
            transform=axes.get_yaxis_transform(),
            color=theme.faint,
            size=8.5,
            va="center",
        )
        return
    axes.plot(
        [row.low, row.high], [height] * 2, color=colour(row, theme), alpha=0.35, lw=7, solid_capstyle="round", zorder=2
    )
    axes.plot(row.median, height, "o", color=colour(row, theme), ms=6.5, mec=theme.paper, mew=1, zorder=4)
    if marked(row):
        axes.plot(row.aim, height, "|", color=theme.colours[2], ms=11, mew=2, zorder=3)
    box = {"facecolor": theme.paper, "edgecolor": "none", "pad": 0.8}  # over lines of the grid
    style = {"color": colour(row, theme), "size": 9, "va": "center", "bbox": box}
    axes.annotate(show(row.median), (row.high, height), (8, 0), textcoords="offset points", **style)
