"""Reports: a page with pictures of a run or of a comparison, complete in one file, and the pictures beside it.

Each picture is drawn twice, for light and for dark surroundings; the files are the light ones. Nothing else in the
library imports this module at its top, as matplotlib is an extra.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch

from .experiment import Cell, Comparison, Row
from .figures import counts_lag, entries, learns
from .plain import numbers
from .trace import Trace

try:
    import matplotlib
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
except ImportError as error:
    raise ImportError("pictures need matplotlib: pip install 'offbeat[report]'") from error

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"


@dataclass(frozen=True)
class Theme:
    """The colours of a picture."""

    paper: str
    ink: str
    faint: str
    line: str
    colours: tuple[str, ...]


# Okabe and Ito's colours, which the colour-blind tell apart, yellow darkened and black made grey; then two more.
LIGHT = Theme(
    paper="#ffffff",
    ink="#1f2328",
    faint="#6e7781",
    line="#e4e7ea",
    colours=(
        "#0072b2",
        "#d55e00",
        "#009e73",
        "#cc79a7",
        "#e69f00",
        "#56b4e9",
        "#a08a00",
        "#57606a",
        "#6a3fb5",
        "#a3123a",
    ),
)
DARK = Theme(
    paper="#12161c",
    ink="#e6edf3",
    faint="#8d96a0",
    line="#2a313a",
    colours=(
        "#3d9be0",
        "#f07f3c",
        "#2bbd94",
        "#e094c1",
        "#f2b33d",
        "#8fd0f7",
        "#cdbb3d",
        "#aab4be",
        "#a98be8",
        "#f0647f",
    ),
)
DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.4)))
MARKERS = "osD^vP"
POINTS = 200
"""How many points a curve has."""
HUGE = 1e100
CROSS = 0.025
"""How high above the bottom of a picture the cross of a failed run is."""


class Single(NamedTuple):
    """What `offbeat simulate` leaves of a run."""

    trace: Trace
    summary: dict[str, Any]
    """``figures``; ``failure`` and ``message``, empty where it did not fail; ``command``."""


def load(folder: str | Path) -> Comparison | Single:
    """What ``folder`` holds; ``ValueError`` where it is nothing that can be shown, or where a file in it is damaged."""
    folder = Path(folder)
    if (folder / "comparison.json").is_file():
        return Comparison.read(folder)
    path = folder / "summary.json"
    if not path.is_file():
        raise ValueError(
            f"{folder} has neither comparison.json nor summary.json: give a folder that `offbeat compare` or "
            "`offbeat simulate` has written"
        )
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        kept: dict[str, Any] = {name: str(summary[name]) for name in ("failure", "message", "command")}
        kept["figures"] = {name: float(value) for name, value in numbers(summary["figures"]).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what `offbeat simulate` has written: {error!r}; run it again") from None
    return Single(Trace.read(folder / "trace.jsonl"), kept)


def page(result: Comparison | Single, folder: str | Path) -> Path:
    """Write ``index.html`` and its pictures into ``folder``; the path of the page."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    return _of_comparison(result, folder) if isinstance(result, Comparison) else _of_run(*result, folder)


def _of_comparison(comparison: Comparison, folder: str | Path) -> Path:
    header = comparison.header
    learnt = any(learns(cell.trace) for cell in comparison.cells)
    chief = next(iter(comparison.figures), "train_loss" if learnt else "gradients_per_second")
    over = {"accuracy": "accuracy", "gradients_per_second": "speed"}.get(chief, "loss")
    pictures = {
        f"{over}-over-workers": (
            f"{_final(chief)} over the number of workers: mean over the seeds, bars as long as the sample standard "
            "deviation. A cross at the bottom is a run that failed.",
            lambda theme: _over_workers(comparison, chief, theme),
        ),
        f"{over}-over-time": (
            f"{chief.capitalize()} of the model that would be shipped, over {_clock(header)}: mean over the seeds.",
            lambda theme: _over_time(comparison, chief, theme),
        ),
        "loss": (
            f"Training loss, a running mean over the minibatches and the seeds, over {_clock(header)} and over gradients. "
            "A thin line that ends in a cross is a run that failed.",
            lambda theme: _losses(comparison, theme),
        ),
        "staleness": (
            "How stale the gradients were: updates of the master between reading and applying (lag), and the distance "
            "that the master moved meanwhile, per parameter (gap). Darker is more workers.",
            lambda theme: _staleness(comparison, theme),
        ),
    }
    if not comparison.figures:
        del pictures[f"{over}-over-time"]
    if not learnt:
        del pictures["loss"]
    facts = {
        "task": header["task"],
        "parameters": f"{header['parameters']:,}",
        "gradients": f"{header['gradients']:,} in each run, all workers together",
        "seconds per gradient": header["speed"],
        "network": header["network"],
        **({"faults": header["faults"]} if header["faults"] != "()" else {}),
        **({"warm-up": f"the first {100 * header['warmup']:g} % of a run"} if header["warmup"] else {}),
        "seeds": ", ".join(map(str, header["seeds"])),
    }
    count = len(header["methods"])
    title = f"{count} method{'s' if count > 1 else ''} on {header['task'].partition('(')[0]}"
    failed = Counter(cell.message for cell in comparison.cells if cell.failure)
    missing = len(header["methods"]) * len(header["workers"]) * len(header["seeds"]) - len(comparison.cells)
    notes = [f"{missing} cells are missing: the comparison was interrupted."] if missing else []
    body = [
        _facts(facts),
        _notes([*notes, *_provenance(header)]),
        *(_picture(folder, name, caption, draw) for name, (caption, draw) in pictures.items()),
        "<h2>All figures</h2>",
        _table(comparison.table(), _best(comparison.rows(), chief)),
        "<p>Means over the seeds that finished, ± the sample standard deviation. Speed-up: "
        "gradients per second, relative to one worker. Bold: the best mean of its number of workers.</p>",
        _list("Failures", failed),
        _list("Settings", header["methods"].values()),
    ]
    return _write(folder, title, body, header)


def _of_run(trace: Trace, summary: dict[str, Any], folder: str | Path) -> Path:
    header = trace.header
    workers = len(set(trace.column("worker").tolist()))
    incidents = Counter(incident.what for incident in trace.incidents)
    facts = {
        "method": header.get("method"),
        "task": header.get("problem"),
        "cluster": header.get("cluster"),
        "workers": "" if header.get("cluster") else workers or "",
        "parameters": f"{header['parameters']:,}" if header.get("parameters") else "",
        "gradients": f"{len(trace):,} by all workers together",
        "seed": header.get("seed"),
        "incidents": ", ".join(f"{n} {what}" for what, n in incidents.items()),
    }
    notes = [note for note in (summary["message"], trace.cut) if note]
    body = [
        _facts({name: str(fact) for name, fact in facts.items() if fact not in (None, "")}),
        _notes([*notes, *_provenance(header)]),
    ]
    if len(trace):
        if learns(trace) or any(e.figures for e in trace.evaluations):
            caption = "Loss and figures over time." + " Dotted lines: a worker joined, left or crashed." * bool(
                incidents
            )
            body.append(_picture(folder, "loss", caption, lambda t: _progress(trace, t)))
        stale = [
            column
            for column in ("lag", "gap")
            if len(_measured(trace, column)) and (column == "gap" or counts_lag(trace))
        ]
        caption = (
            "How stale the gradients were, and how many each worker took."
            if stale
            else "Gradients that each worker took."
        )
        body.append(_picture(folder, "staleness", caption, lambda t: _stale(trace, stale, t)))
        if own := sorted(trace[0].extra):
            caption = "The method's own figures at each visit, a running mean."
            body.append(_picture(folder, "method", caption, lambda t: _own(trace, own, t)))
    if summary["figures"]:
        figures = [["figure", "value"], *entries(summary["figures"], trace)]
        body += ["<h2>All figures</h2>", _table(figures, set())]
    method, task = (str(header.get(name) or "").partition("(")[0] for name in ("method", "problem"))
    title = (method or "A run") + (f" on {task or _workers(workers)}" if task or workers else "")
    return _write(folder, title, body, {**header, "command": summary["command"]})


# pictures of a comparison


@dataclass(frozen=True)
class Look:
    """How a method looks, the same in every picture."""

    color: str
    linestyle: Any
    marker: str


def styles(labels: Iterable[str], theme: Theme) -> dict[str, Look]:
    """A look for each label, by its place."""
    n = len(theme.colours)
    return {
        label: Look(theme.colours[i % n], DASHES[i // n % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, label in enumerate(labels)
    }


def _over_workers(comparison: Comparison, name: str, theme: Theme) -> Figure:
    figure = canvas(9, 5)
    axes = figure.subplots()
    workers, looks = comparison.header["workers"], styles(comparison.header["methods"], theme)
    ceiling = _ceiling(comparison, name)
    ends: dict[str, tuple[float, float]] = {}
    for i, (label, look) in enumerate(looks.items()):
        rows = [row for row in comparison.rows() if row.label == label]
        shift = 0.4 * ((i + 0.5) / len(looks) - 0.5)
        for row in rows:
            if row.failed:
                x = workers.index(row.workers) + shift
                axes.plot(x, CROSS, "x", color=look.color, ms=8, mew=2, transform=axes.get_xaxis_transform(), zorder=4)
                ends[label] = x, -math.inf
        points = [
            (workers.index(row.workers) + shift, row.mean[name], row.spread.get(name, 0.0)) for row in rows if row.mean
        ]
        if points:
            x, y, spread = np.array(points).T
            spread[(y > ceiling) | ~np.isfinite(spread)] = 0
            y = _shown(name, np.minimum(y, ceiling))
            low = np.where(
                (y > 0) & (name != "accuracy"), np.minimum(spread, 0.8 * y), spread
            )  # above 0 for a logarithm
            style = {"color": look.color, "ls": look.linestyle, "marker": look.marker}
            axes.errorbar(x, y, (low, spread), ms=6, lw=1.8, elinewidth=1.2, **style)
            if ends.get(label, (-1.0, 0.0))[0] < x[-1]:
                ends[label] = x[-1], y[-1]
    axes.set_xticks(range(len(workers)), [str(n) for n in workers])
    axes.set(xlabel="workers", ylabel=_plain(_final(name).lower()), xlim=(-0.35, len(workers) - 0.65))
    axes.grid(axis="y")
    _scale(axes, name)
    label_ends(axes, ends, looks)
    return figure


def _over_time(comparison: Comparison, name: str, theme: Theme) -> Figure:
    workers, looks = comparison.header["workers"], styles(comparison.header["methods"], theme)
    columns = min(len(workers), 3)
    lines = math.ceil(len(workers) / columns)
    figure = canvas(max(4 * columns, 7), 3.4 * lines + 0.7)
    panels = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for axes, n in zip(panels, workers, strict=False):
        for row in comparison.rows():
            if row.workers == n and (cells := [c for c in row.cells if not c.failure and c.trace.evaluations]):
                x, y = _mean([_evaluations(cell, name) for cell in cells])
                look = looks[row.label]
                axes.plot(x, y, color=look.color, ls=look.linestyle, lw=1.8)
        axes.set_title(_workers(n))
        axes.grid(axis="y")
        axes.set_xlim(left=0)
        axes.set_xlabel(_clock(comparison.header))
    _scale(panels[0], name, _ceiling(comparison, name))
    for axes in panels[len(workers) :]:
        axes.remove()
    panels[0].set_ylabel(_plain(name))
    _legend(figure, looks)
    return figure


def _losses(comparison: Comparison, theme: Theme) -> Figure:
    workers, looks = comparison.header["workers"], styles(comparison.header["methods"], theme)
    figure = canvas(max(4.0 * len(workers), 7), 7.2)
    grid = figure.subplots(2, len(workers), sharex="row", sharey=True, squeeze=False)
    lowest = math.inf
    for row in comparison.rows():
        look = looks[row.label]
        for line, column in enumerate(("seconds", "gradients")):
            axes = grid[line][workers.index(row.workers)]
            curves = {cell.key: _smooth(cell.trace, column) for cell in row.cells if len(cell.trace)}
            for cell in row.failed:
                if cell.key in curves:
                    x, y = curves.pop(cell.key)
                    axes.plot(x, y, color=look.color, ls=look.linestyle, lw=0.8, alpha=0.8)
                    axes.plot(x[-1], y[-1], "x", color=look.color, ms=7, mew=1.8)
            if curves:
                x, y = _mean(list(curves.values()))
                axes.plot(x, y, color=look.color, ls=look.linestyle, lw=1.6)
                lowest = min(lowest, float(y.min()))
    for line, what in enumerate((_clock(comparison.header), "gradients, all workers together")):
        for n, axes in zip(workers, grid[line], strict=True):
            axes.set_title(_workers(n) if line == 0 else "")
            axes.set(yscale="log" if lowest > 0 else "linear", xscale="log" if line == 0 else "linear")
            axes.set_xlabel(what)
            axes.grid(axis="y")
            if line == 0:
                shortest = min((cell.trace[-1].seconds for cell in comparison.cells if len(cell.trace)), default=1.0)
                axes.set_xlim(left=shortest / 100)
        grid[line][0].set_ylabel("training loss")
    if 0 < lowest < (top := _ceiling(comparison, "loss")):
        grid[0][0].set_ylim(0.7 * lowest, top)
    _legend(figure, looks)
    return figure


def _staleness(comparison: Comparison, theme: Theme) -> Figure:
    looks = styles(comparison.header["methods"], theme)
    workers = [n for n in comparison.header["workers"] if n > 1] or comparison.header["workers"]
    figure = canvas(10, 1.6 + 0.55 * len(looks))
    lag, gap = figure.subplots(1, 2, sharey=True)
    for axes, column in ((lag, "lag"), (gap, "gap")):
        values = {
            (row.label, row.workers): np.concatenate([_measured(cell.trace, column) for cell in row.cells])
            for row in comparison.rows()
            if row.workers in workers
        }
        bins = _bins(values.values(), whole=column == "lag")
        for i, (label, look) in enumerate(looks.items()):
            axes.axhline(-i, color=theme.line, lw=0.8, zorder=0)
            for j, n in enumerate(workers):
                counts, edges = np.histogram(values.get((label, n), []), bins)
                if counts.any():
                    axes.stairs(
                        0.85 * counts / counts.max() - i,
                        edges,
                        baseline=-i,
                        fill=True,
                        color=look.color,
                        alpha=0.25 + 0.7 * (j + 1) / (len(workers) + 1),
                        zorder=1,
                    )
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(bins[0], bins[-1])
        _even(axes, whole=column == "lag")
    lag.set_yticks([0.15 - i for i in range(len(looks))], [_plain(label) for label in looks])
    for text, look in zip(lag.get_yticklabels(), looks.values(), strict=True):
        text.set_color(look.color)
    lag.set_xlabel("lag, in updates")
    gap.set_xlabel("gap, root mean square over the parameters")
    lag.set_ylim(-len(looks) + 0.95, 0.95)
    several = f"{', '.join(map(str, workers))} workers, from light to dark"
    figure.suptitle(several if len(workers) > 1 else _workers(workers[0]), size=11)
    return figure


# pictures of one run


def _progress(trace: Trace, theme: Theme) -> Figure:
    names = sorted({name for e in trace.evaluations for name in e.figures} - {"loss"}, key=lambda n: n != "accuracy")
    tests = [(e.seconds, _shown("loss", e.figures["loss"])) for e in trace.evaluations if "loss" in e.figures]
    has_loss = bool(tests) or learns(trace)
    figure = canvas(6.5 if not (names and has_loss) else 10, 3.9)
    panels = np.atleast_1d(figure.subplots(1, has_loss + len(names[:1]))).tolist()
    if has_loss:
        _loss(panels[0], trace, tests, theme)
    for name, other in zip(names, panels[has_loss:], strict=False):
        points = [(e.seconds, _shown(name, e.figures[name])) for e in trace.evaluations if name in e.figures]
        other.plot(*zip(*points, strict=True), "o-", ms=4, lw=1.6, color=theme.colours[2])
        other.set(xlabel=_clock(trace.header), ylabel=_plain(name), xlim=panels[0].get_xlim() if has_loss else None)
        _scale(other, name)
    for each in panels:
        each.grid(axis="y")
        for incident in trace.incidents:
            each.axvline(incident.seconds, color=theme.faint, lw=0.9, ls=":", zorder=0)
    return figure


def _loss(axes: Axes, trace: Trace, tests: list[tuple[float, Array]], theme: Theme) -> None:
    if learns(trace):
        seconds, loss = _column(trace, "seconds"), _column(trace, "loss")
        every = max(1, len(loss) // 4000)
        axes.plot(seconds[::every], loss[::every], ".", ms=2, alpha=0.25, color=theme.colours[0], mew=0)
        axes.plot(*_smooth(trace, "seconds"), color=theme.colours[0], lw=2, label="minibatches, running mean")
        loss = _measured(trace, "loss")
    else:
        loss = np.array([y for _, y in tests])
    if tests:
        axes.plot(*zip(*tests, strict=True), "o", ms=4, mfc="none", color=theme.colours[1], label="evaluation")
    positive = bool((loss > 0).all())
    axes.set(xlabel=_clock(trace.header), ylabel="loss", yscale="log" if positive else "linear")
    if positive and (top := 1000 * loss[0]) < loss.max():
        axes.set_ylim(0.7 * loss.min(), top)
    axes.legend(frameon=False)


def _stale(trace: Trace, columns: Sequence[str], theme: Theme) -> Figure:
    figure = canvas(10 / 3 * (1 + len(columns)), 3.4)
    *panels, share = np.atleast_1d(figure.subplots(1, 1 + len(columns))).tolist()
    for axes, column in zip(panels, columns, strict=True):
        values = _measured(trace, column)
        bins = _bins([values], whole=column == "lag")
        axes.hist(values, bins, color=theme.colours[0], alpha=0.85)
        axes.set(xlabel=column, yticks=[])
        _even(axes, whole=column == "lag")
        axes.spines["left"].set_visible(False)
        axes.axvline(values.mean(), color=theme.ink, lw=1)
        axes.set_title(f"{column}, mean {values.mean():.3g}")
    counts = torch.bincount(trace.column("worker")).numpy()
    share.bar(range(len(counts)), counts, color=theme.colours[2], width=0.85)
    share.set(xlabel="worker", ylabel="gradients")
    share.xaxis.set_major_locator(MaxNLocator(integer=True))
    share.set_title("gradients by worker")
    share.grid(axis="y")
    share.set_axisbelow(True)
    return figure


def _own(trace: Trace, names: Sequence[str], theme: Theme) -> Figure:
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = canvas(max(10 / 3 * columns, 5), 2.9 * lines)
    for i, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, i + 1)
        x, y = _smooth(trace, "seconds", name)
        axes.plot(x, y, color=theme.colours[i % len(theme.colours)], lw=1.8)
        wide = y.min(initial=1) > 0 and y.max(initial=0) > 1000 * y.min(initial=math.inf)
        axes.set(xlabel=_clock(trace.header), yscale="log" if wide else "linear")
        axes.set_title(_plain(name))
        axes.grid(axis="y")
    return figure


# what the pictures share


def canvas(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _plain(text: str) -> str:
    """A name from outside, of which matplotlib is to make no formula."""
    return text.replace("$", r"\$")


def _final(name: str) -> str:
    return "Gradients per second" if name == "gradients_per_second" else f"Final {name}"


def _even(axes: Axes, whole: bool) -> None:
    """The axis across: whole numbers, or a logarithmic one with a few round numbers however little it spans."""
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        return
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    tens = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    powers, between = (
        [m * 10.0**k for k in tens for m in ms if low <= m * 10.0**k <= high] for ms in ((1,), (1, 2, 5))
    )
    ticks = between if len(between) <= 5 or len(powers) < 2 else powers
    ticks = ticks or [float(f"{math.sqrt(low * high):.2g}")]  # where no round number is in between
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 5)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _clock(header: dict[str, Any]) -> str:
    """What seconds are: real ones where processes ran, else the simulator's."""
    return "virtual seconds" if header.get("engine", "simulator") == "simulator" else "seconds"


def _column(trace: Trace, name: str) -> Array:
    return _shown(name, trace.column(name).double().numpy())


def _measured(trace: Trace, name: str) -> Array:
    """A column without what is no finite number: a real run measures the gap now and then, or not at all."""
    values = _column(trace, name)
    return values[np.isfinite(values)]


def _shown(name: str, values: Any) -> Array:
    """Figures as they are drawn: an accuracy inside its scale, what has blown up where there is room above. What is no finite
    number is nan, as in a file, and not drawn."""
    values = np.asarray(values, dtype=np.float64)
    limits = (0.001, 0.9995) if name == "accuracy" else (-HUGE, HUGE)
    return np.where(np.isfinite(values), np.clip(values, *limits), np.nan)


def _smooth(trace: Trace, over: str, name: str = "loss") -> tuple[Array, Array]:
    """A column as a mean of the events before, a fortieth of all and fewer early on; over a column, or over gradients."""
    values = _column(trace, name)
    x = np.arange(1.0, len(values) + 1) if over == "gradients" else _column(trace, over)
    x, values = x[np.isfinite(values)], values[np.isfinite(values)]
    if not len(values):
        return x, values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = last - np.clip(last // 5, 1, max(1, len(values) // 40))
    even = np.linspace(0, len(values) - 1, POINTS).astype(int)
    late = np.geomspace(1, len(values), POINTS).astype(int) - 1  # even on a logarithmic axis
    shown = np.union1d(even, late).clip(0, len(values) - 1)
    return x[shown], ((sums[last] - sums[first]) / (last - first))[shown]


def _evaluations(cell: Cell, name: str) -> tuple[Array, Array]:
    points = {e.gradients: (e.seconds, e.figures[name]) for e in cell.trace.evaluations}
    points[len(cell.trace)] = (cell.figures["seconds"], cell.figures[name])
    x, y = zip(*(points[n] for n in sorted(points)), strict=True)
    return np.asarray(x), _shown(name, y)


def _mean(curves: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The mean of curves, at the places of the first, as far as all of them go."""
    end = min(x[-1] for x, _ in curves)
    at = curves[0][0]
    at = np.append(at[at < end], end)
    return at, np.mean([np.interp(at, x, y) for x, y in curves], axis=0)


def _bins(samples: Iterable[Array], whole: bool) -> Array:
    """Edges for histograms of all samples: of whole numbers from 0, or evenly spaced in the logarithm."""
    values = np.concatenate([np.empty(0), *samples])
    if whole:
        top = max(1.0, float(np.quantile(values, 0.999)) if len(values) else 1.0)
        return np.arange(-0.5, 1.15 * top + 1, max(1, round(top / 60)))
    values = values[values > 0]
    if not len(values):
        return np.geomspace(0.1, 1.0, 80)
    low, middle, high = np.quantile(values, (0.002, 0.5, 0.998))
    low, high = max(low, 1e-5 * middle), min(high, 1e5 * middle)  # what has blown up would squeeze the rest
    return np.geomspace(low / 1.2, high * 1.2, 80)


def _workers(n: int) -> str:
    return f"{n} worker{'s' if n > 1 else ''}"


def _ceiling(comparison: Comparison, name: str) -> float:
    """Where the pictures end: a loss that has grown to some times what it was at the start is as good as infinite."""
    if name == "accuracy":
        return 1.0
    if name == "loss":
        return 4 * float(np.median([cell.trace[0].loss for cell in comparison.cells if len(cell.trace)] or [1.0]))
    return 1000 * float(np.median([row.mean[name] for row in comparison.rows() if row.mean] or [1.0]))


def _scale(axes: Axes, name: str, ceiling: float = math.inf) -> None:
    """An accuracy is shown on a scale that opens up near 0 and 1, anything else on a logarithmic one."""
    limits = np.array([each.dataLim.intervaly for each in axes.get_shared_y_axes().get_siblings(axes)])
    low, high = limits[:, 0].min(), limits[:, 1].max()
    if not low <= high:
        return  # nothing is drawn
    if name != "accuracy":
        axes.set_yscale("log" if low > 0 else "linear")
        if high > ceiling and low > 0:
            axes.set_ylim(0.7 * low, ceiling)
        return
    axes.set_yscale("logit", nonpositive="clip")
    axes.set_ylim(max(0.001, 0.8 * low), min(0.9995, 1 - 0.6 * (1 - high)))
    ticks = (0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g} %"))


def label_ends(axes: Axes, ends: dict[str, tuple[float, float]], looks: dict[str, Look]) -> None:
    """Write each label to the right of the end of its curve, moved up or down so that none covers another."""
    place = axes.transData + axes.transAxes.inverted()
    low = axes.get_ylim()[0]
    at = {}
    for label, (x, y) in ends.items():
        across, up = place.transform((x, max(y, low)))
        at[label] = across, max(up, CROSS)
    height = {label: up for label, (_, up) in at.items()}
    order = sorted(ends, key=lambda label: (height[label], label))
    space = min(0.062, 1.0 / max(1, len(order)))
    places: list[float] = []
    for label in order:
        places.append(max(height[label], places[-1] + space if places else 0.0))
    top = 1.0
    for i in reversed(range(len(places))):
        places[i] = min(places[i], top)
        top = places[i] - space
    for label, y in zip(order, places, strict=True):
        look = looks[label]
        axes.annotate(
            _plain(label),
            at[label],
            (1.03, y),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=look.color,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": look.color, "lw": 0.7, "alpha": 0.6, "shrinkA": 2, "shrinkB": 5},
        )


def _legend(figure: Figure, looks: dict[str, Look]) -> None:
    handles = [
        Line2D([], [], color=look.color, ls=look.linestyle, lw=2.2, label=_plain(label))
        for label, look in looks.items()
    ]
    across = max(2, int(figure.get_figwidth() / (0.45 + 0.085 * max(map(len, looks)) + 0.35)))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(across, len(handles)), frameon=False)


def png(draw: Callable[[Theme], Figure], theme: Theme) -> bytes:
    """The picture that ``draw`` makes, in the colours of ``theme``."""
    style: dict[Any, Any] = {
        "axes.edgecolor": theme.faint,
        "axes.facecolor": theme.paper,
        "axes.labelcolor": theme.ink,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 11,
        "figure.facecolor": theme.paper,
        "font.size": 10.5,
        "grid.color": theme.line,
        "legend.labelcolor": theme.ink,
        "savefig.facecolor": theme.paper,
        "text.color": theme.ink,
        "xtick.color": theme.faint,
        "xtick.labelcolor": theme.ink,
        "ytick.color": theme.faint,
        "ytick.labelcolor": theme.ink,
    }
    with matplotlib.rc_context(style):
        target = io.BytesIO()
        draw(theme).savefig(target, format="png", dpi=150)
    return target.getvalue()


# the page

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1f2328; --faint: #59636e; --line: #d9dee3; --wash: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #12161c; --ink: #e6edf3; --faint: #9aa4ae; --line: #2a313a; --wash: #1a2028; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.5rem 1rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; margin: 0; }
dt, figcaption, footer, p { color: var(--faint); }
dd { margin: 0; }
code, dd, li { font: .92em/1.5 ui-monospace, monospace; }
figure { margin: 2.2rem 0 0; }
.wide { overflow-x: auto; }
.wide img { display: block; width: 100%; min-width: 38rem; height: auto; }
figcaption { font-size: .92rem; margin-top: .4rem; max-width: 46rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; white-space: nowrap; width: 100%; }
th, td { padding: .28rem .8rem .28rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
.note { border-left: 4px solid #d55e00; background: var(--wash); padding: .6rem 1rem; margin: 1.2rem 0 0; color: var(--ink); }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; font-size: .9rem; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; } dt { margin-top: .4rem; } }
"""


def _write(folder: str | Path, title: str, body: list[str], header: dict[str, Any]) -> Path:
    versions = ", ".join(f"{name} {version}" for name, version in header.get("versions", {}).items())
    command = header.get("command", "")
    text = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}, offbeat</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{"".join(body)}
<footer>
{f"<p>Made by <code>{html.escape(command)}</code></p>" if command else ""}
<p>{html.escape(versions)}</p>
</footer>
</body>
</html>
"""
    path = Path(folder) / "index.html"
    path.write_text(text, encoding="utf-8")
    return path


def _picture(folder: str | Path, name: str, caption: str, draw: Callable[[Theme], Figure]) -> str:
    light, dark = png(draw, LIGHT), png(draw, DARK)
    (Path(folder) / f"{name}.png").write_bytes(light)
    link = {
        theme: "data:image/png;base64," + base64.b64encode(png).decode() for theme, png in (("l", light), ("d", dark))
    }
    return (
        f'<figure><div class="wide"><picture><source media="(prefers-color-scheme: dark)" srcset="{link["d"]}">'
        f'<img src="{link["l"]}" alt="{html.escape(caption)}"></picture></div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>\n"
    )


def _facts(facts: dict[str, str]) -> str:
    lines = (f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items())
    return f"<dl>{''.join(lines)}</dl>\n"


def _provenance(header: dict[str, Any]) -> list[str]:
    notes = header.get("provenance", {}).items()
    return [f"Not the official data: {name} {note}." for name, note in notes if note != "official"]


def _notes(notes: Sequence[str]) -> str:
    return "".join(f'<p class="note">{html.escape(note)}</p>\n' for note in notes)


def _list(title: str, items: Iterable[str]) -> str:
    lines = "".join(f"<li>{html.escape(item)}</li>" for item in items)
    return f"<h2>{title}</h2><ul>{lines}</ul>\n" if lines else ""


def _best(rows: Sequence[Row], name: str) -> set[int]:
    """The rows that have the best mean of their number of workers; as lines of the table, the titles being line 0."""
    best: dict[int, int] = {}
    sign = 1 if name in ("accuracy", "gradients_per_second") else -1
    for line, row in enumerate(rows, start=1):
        holder = best.get(row.workers)
        if name in row.mean and (holder is None or sign * row.mean[name] > sign * rows[holder - 1].mean[name]):
            best[row.workers] = line
    return set(best.values())


def _table(lines: list[list[str]], bold: set[int]) -> str:
    parts = []
    for i, line in enumerate(lines):
        tag = "td" if i else "th"
        cells = "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in line)
        parts.append(f'<tr style="font-weight:600">{cells}</tr>' if i in bold else f"<tr>{cells}</tr>")
    return f'<div class="wide"><table>{"".join(parts)}</table></div>\n'
