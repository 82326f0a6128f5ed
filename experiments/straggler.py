"""One slow worker: eight workers, one of which takes four times as long for a gradient. Who waits for it?

scikit-learn's digits, 64-128-10 network, batch 32, learning rate 0.05 after a warm-up over 5 % of the run, momentum 0.9
(plain ASGD: none), 2,000 gradients in all, gamma times of mean 1 s and coefficient of variation 0.1, three seeds. The net
is so small that its 38 kB would cost nothing on any network, so the network is scaled to it: a message takes a
fiftieth of a gradient's time, 0.02 s, and a millisecond on the way, as 6 MB would on 10 Gb/s beside 0.25 s. Two minutes on
two cores. With ``--task mnist`` the same with MNIST and its convolutional net, at some forty times the cost.

    python experiments/straggler.py --out runs/straggler
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import offbeat as ob
from offbeat.cpus import cpus
from offbeat.experiment import Cell, Comparison, Grid, compare
from offbeat.report import LIGHT, Theme, page, png
from offbeat.tasks import Digits, Mnist

METHODS = (
    "all-reduce",
    "local-sgd(period=12)",
    "slowmo(period=12)",
    "backup-workers(backups=1)",
    "asgd",
    "dana-zero",
    "dana-ga",
    "eamsgd(period=4)",
    "push-gossip",
    "ad-psgd",
)
TASKS = {"digits": Digits(), "mnist": Mnist()}
WORKERS, FACTOR = 8, 4.0
Figures = dict[str, dict[str, list[float]]]
"""For each method, over the seeds: gradients per second, seconds to the target (inf: not reached), final accuracy."""


def until(cell: Cell, target: float) -> float:
    """Virtual seconds until the shipped model has the accuracy ``target``, on straight lines between evaluations."""
    before, low = 0.0, 0.1  # ten classes
    for seconds, _, figures in cell.trace.evaluations:
        high = figures["accuracy"]
        if high >= target:
            return before + (seconds - before) * (target - low) / (high - low)
        before, low = seconds, high
    return math.inf


def summary(comparison: Comparison, target: float) -> Figures:
    """The figures of all methods; a seed that failed has rate 0 and accuracy 0, and does not reach the target."""
    return {
        row.label: {
            "rate": [cell.figures.get("gradients_per_second", 0.0) for cell in row.cells],
            "until": [until(cell, target) for cell in row.cells],
            "accuracy": [cell.figures.get("accuracy", 0.0) for cell in row.cells],
        }
        for row in comparison.rows()
    }


def show(values: list[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    if max(values) == math.inf:
        return "not reached"
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def ratio(one: list[float], other: list[float]) -> str:
    """How many times the mean of ``other`` the mean of ``one`` is."""
    means = fmean(one), fmean(other)
    return f"{means[0] / means[1]:.2f}" if means[1] and max(means) < math.inf else "-"


def table(even: Figures, slow: Figures, target: float) -> Table:
    """Without and with the straggler."""
    title = f"{WORKERS} equal workers, and below when one of them is {FACTOR:g} times slower"
    view = Table(title=title, box=SIMPLE, pad_edge=False)
    for column in (
        "method",
        "gradients/s",
        "slower\nby",
        f"seconds\nto {100 * target:g} %",
        "longer\nby",
        "accuracy, %",
    ):
        view.add_column(column, justify="left" if column == "method" else "right")
    for label, a in even.items():
        b = slow[label]
        percent = [[100 * accuracy for accuracy in each["accuracy"]] for each in (a, b)]
        view.add_row(
            label,
            f"{show(a['rate'], 2)}\n{show(b['rate'], 2)}",
            ratio(a["rate"], b["rate"]),
            f"{show(a['until'], 0)}\n{show(b['until'], 0)}",
            ratio(b["until"], a["until"]),
            f"{show(percent[0], 1)}\n{show(percent[1], 1)}",
        )
    return view


def picture(even: Figures, slow: Figures, target: float, theme: Theme) -> Figure:
    """Seconds to the target, without (hollow) and with the straggler (full); bars are the standard deviation."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    axes = figure.subplots()
    for y, label in enumerate(even):
        ends = []
        for figures, hollow in ((slow, False), (even, True)):
            seconds = figures[label]["until"]
            if max(seconds) < math.inf:
                ends.append(fmean(seconds))
                style = {"mfc": theme.paper if hollow else None, "ms": 8, "mew": 1.6, "elinewidth": 1.2, "zorder": 3}
                spread = stdev(seconds) if len(seconds) > 1 else 0.0
                axes.errorbar(ends[-1], y, xerr=spread, fmt="o", color=theme.colours[0 if hollow else 1], **style)
        axes.plot(ends, [y] * len(ends), color=theme.faint, lw=1.2, zorder=1)
        text = f"x {ends[0] / ends[1]:.1f}" if len(ends) > 1 else "not reached"
        axes.annotate(text, (1.01, y), xycoords=("axes fraction", "data"), va="center", color=theme.faint)
    handles = [
        axes.plot([], [], "o", color=theme.colours[0], mfc=theme.paper, ms=8, mew=1.6, label="eight equal workers")[0],
        axes.plot([], [], "o", color=theme.colours[1], ms=8, label=f"one of them {FACTOR:g} times slower")[0],
    ]
    axes.set_yticks(range(len(even)), list(even))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"virtual seconds to {100 * target:g} % test accuracy")
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/straggler"), help="folder for results and the pages")
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--gradients", type=int, default=2000, help="gradients of each run, all workers together")
    parser.add_argument("--evaluations", type=int, default=100, help="how often a run is evaluated")
    parser.add_argument("--target", type=float, default=0.95, help="the accuracy to reach")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=cpus(), help="processes")
    args = parser.parse_args()
    task = TASKS[args.task]
    network = ob.Network(latency=0.001, bandwidth=4 * task.x0().numel() / 0.02)
    settings = {"gradients": args.gradients, "evaluations": args.evaluations, "network": network}
    even = Grid(METHODS, task, (WORKERS,), tuple(args.seeds), **settings)
    grids = {"even": even, "straggler": replace(even, faults=(ob.Straggler(0, FACTOR),))}
    figures = {}
    with Progress() as bar:
        runs = bar.add_task("runs", total=sum(len(grid.keys) for grid in grids.values()))
        for name, grid in grids.items():
            comparison = compare(grid, jobs=args.jobs, watch=lambda cell: bar.advance(runs))
            comparison.write(args.out / name)
            print(page(comparison, args.out / name))
            figures[name] = summary(comparison, args.target)
    kept = {
        name: {
            label: row | {"until": [s if s < math.inf else None for s in row["until"]]} for label, row in rows.items()
        }
        for name, rows in figures.items()
    }
    results = {"command": " ".join(sys.argv), "target": args.target, **kept}
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    draw = partial(picture, figures["even"], figures["straggler"], args.target)
    (args.out / "straggler.png").write_bytes(png(draw, LIGHT))
    Console().print(table(figures["even"], figures["straggler"], args.target))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
