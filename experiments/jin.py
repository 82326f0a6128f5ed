"""Time to a loss as nodes grow: what Jin, Yuan, Iandola and Keutzer asked (How to scale distributed deep learning?
arXiv:1611.04581), of all-reduce, a parameter server, elastic averaging, and gossip that pulls or pushes.

scikit-learn's digits, 64-128-10 network, plain SGD without momentum, 2 images per gradient, 4 to 128 workers. The figure
is the virtual time until the model that would be shipped first has a test loss of 0.12 (it starts near 2.3), looked at
after each round of gradients, on a straight line in its logarithm between two looks. A run that has not got there after
30,000 gradients of all workers together has not reached it.

A gradient takes gamma times of mean 0.25 s and coefficient of variation 0.1. The network is scaled so that the net's 38 kB
cost what ResNet-18's 46.8 MB do on 10 Gb/s: 37 ms at each card, and 30 us on the way. All-reduce and gossip talk every
step, elastic averaging every fourth with beta 0.9. Each method has, for each number of workers, the learning rate that was
fastest of ten on seed 100, a factor 2 apart; the runs that count have seeds 0 to 2. A quarter of an hour on two cores.

    python experiments/jin.py --out runs/jin
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import offbeat as ob
from offbeat.cpus import cpus
from offbeat.engines.simulator import Simulation
from offbeat.report import LIGHT, Theme, label_ends, png, styles
from offbeat.tasks import Digits

METHODS: dict[str, Callable[[float], ob.Method]] = {
    "all-reduce": lambda lr: ob.methods.AllReduce(ob.SGD(lr)),
    "parameter server": ob.methods.ASGD,
    "EASGD": ob.methods.EASGD,
    "pull gossip": lambda lr: ob.methods.PullGossip(ob.SGD(lr)),
    "push gossip": lambda lr: ob.methods.PushGossip(ob.SGD(lr)),
}
RATES = tuple(1.6 / 2**k for k in range(10))
BATCH, TUNING = 2, 100  # images per gradient; the seed that rates are chosen on
SPEED = ob.Gamma(0.25, 0.1)
NETWORK = ob.Network(30e-6, 1.25e9 * 9_610 / 11_689_512)  # parameters of the net and of ResNet-18


class Goal(NamedTuple):
    """When a run is over."""

    loss: float
    gradients: int


class Row(NamedTuple):
    """A method on a number of workers."""

    method: str
    workers: int
    lr: float
    seconds: list[float]
    """Virtual time to the goal, for each seed; inf: not reached."""

    @property
    def mean(self) -> float:
        return fmean(self.seconds)

    @property
    def spread(self) -> float:
        """Sample standard deviation."""
        return stdev(self.seconds) if len(self.seconds) > 1 and self.mean < math.inf else 0.0


class Over(Exception):
    """A run need not go on."""


def reach(name: str, n: int, lr: float, seed: int, goal: Goal, limit: float = math.inf) -> tuple[float, float]:
    """Virtual seconds until the goal, and the last test loss; inf where it is not reached in time, or not by ``limit``."""
    task, cluster = Digits(batch=BATCH, seed=seed), ob.Cluster(n, SPEED, network=NETWORK)
    before = now = 0.0, math.inf

    def watch(event: ob.Event) -> None:
        nonlocal before, now
        if len(simulation.trace) % n == 1 % n:  # the first after an evaluation
            for seconds, _, figures in simulation.trace.evaluations[-1:]:
                before, now = now, (seconds, figures["loss"])
            if now[1] <= goal.loss or now[0] > limit:
                raise Over

    simulation = Simulation(METHODS[name](lr), task, cluster, goal.gradients, seed, n, watch=watch)
    try:
        simulation.run()
    except ob.Diverged:
        return math.inf, math.inf
    except Over:
        pass
    if now[1] > goal.loss:
        return math.inf, now[1]
    return crossing(before, now, goal.loss), now[1]


def crossing(before: tuple[float, float], now: tuple[float, float], loss: float) -> float:
    """When the loss was ``loss``, between two (seconds, loss), on a straight line in the logarithm of the loss."""
    part = math.log(before[1] / loss) / math.log(before[1] / now[1]) if before[1] < math.inf else 1.0
    return before[0] + part * (now[0] - before[0])


def tune(name: str, n: int, goal: Goal) -> dict[float, tuple[float, float]]:
    """What `reach` says for each learning rate, on the seed for tuning; not reached means beaten by another, too."""
    found: dict[float, tuple[float, float]] = {}
    guess = 1 / n if name == "parameter server" else 0.2  # what is tried later is cut short when it cannot win any more
    for lr in sorted(RATES, key=lambda lr: abs(math.log(lr / guess))):
        best = min((seconds for seconds, _ in found.values()), default=math.inf)
        found[lr] = reach(name, n, lr, TUNING, goal, best)
    return dict(sorted(found.items()))


def words(rows: list[Row]) -> list[str]:
    """Who is fastest where; and which lines cross, and how each of the others lies to the first."""
    of = {(row.method, row.workers): row for row in rows}
    names = list(dict.fromkeys(row.method for row in rows))
    sizes = sorted({row.workers for row in rows})
    wins: dict[str, list[str]] = {}
    for n in sizes:
        best = min((of[name, n] for name in names), key=lambda row: row.mean)
        wins.setdefault(best.method if best.mean < math.inf else "nobody", []).append(str(n))
    said = ["fastest: " + "; ".join(f"{name} at {', '.join(places)}" for name, places in wins.items())]
    for one, other in combinations(names, 2):
        pairs = {n: (of[one, n], of[other, n]) for n in sizes}
        ahead = {n: p.mean < q.mean for n, (p, q) in pairs.items()}
        crosses = []
        for a, b in pairwise(sizes):
            if ahead[a] != ahead[b]:
                ratios = [math.log(p.mean) - math.log(q.mean) for p, q in (pairs[a], pairs[b])]
                finite = all(map(math.isfinite, ratios))
                place = f", at about {a * (b / a) ** (ratios[0] / (ratios[0] - ratios[1])):.0f}" if finite else ""
                crosses.append(f"{one if ahead[b] else other} overtakes between {a} and {b}{place}")
        if crosses or one == names[0]:
            text = "; ".join(crosses) or f"{one if ahead[sizes[0]] else other} is ahead everywhere"
            close = [str(n) for n, (p, q) in pairs.items() if abs(p.mean - q.mean) <= max(p.spread, q.spread)]
            said.append(f"{one} and {other}: {text}" + (f" (within a spread at {', '.join(close)})" if close else ""))
    return said


def table(rows: list[Row], goal: Goal) -> Table:
    """Mean and spread over the seeds, and the learning rate."""
    sizes = sorted({row.workers for row in rows})
    view = Table("workers", title=f"Virtual seconds to a test loss of {goal.loss:g}, and the learning rate", box=SIMPLE)
    for n in sizes:
        view.add_column(str(n), justify="right")
    for name in dict.fromkeys(row.method for row in rows):
        cells = {row.workers: show(row) for row in rows if row.method == name}
        view.add_row(name, *(cells[n] for n in sizes))
    return view


def show(row: Row) -> str:
    reached = sum(s < math.inf for s in row.seconds)
    if reached < len(row.seconds):
        return f"{reached} of {len(row.seconds)}\nreached\nlr {row.lr:g}"
    return f"{row.mean:.1f}\n± {row.spread:.1f}\nlr {row.lr:g}"


def picture(rows: list[Row], goal: Goal, theme: Theme) -> Figure:
    """Seconds over workers, both logarithmic; bands are one standard deviation each way, crosses: not reached by all."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    axes = figure.subplots()
    looks = styles(dict.fromkeys(row.method for row in rows), theme)
    sizes = sorted({row.workers for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel=f"virtual seconds to a test loss of {goal.loss:g}")
    ends = {}
    for name, look in looks.items():
        reached = [row for row in rows if row.method == name and row.mean < math.inf]
        x, y, spread = ([getattr(row, f) for row in reached] for f in ("workers", "mean", "spread"))
        low = [max(m - s, m / 10) for m, s in zip(y, spread, strict=True)]
        axes.fill_between(x, low, [m + s for m, s in zip(y, spread, strict=True)], color=look.color, alpha=0.18, lw=0)
        axes.plot(x, y, color=look.color, marker=look.marker, ms=5.5, lw=1.8)
        if reached:
            ends[name] = x[-1], y[-1]
        for row in rows:
            if row.method == name and row not in reached:
                axes.plot(row.workers, 0.97, "x", color=look.color, ms=8, mew=2, transform=axes.get_xaxis_transform())
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.margins(y=0.1)
    axes.grid(axis="y")
    label_ends(axes, ends, looks)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/jin"), help="folder for results and the picture")
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--loss", type=float, default=0.12, help="the test loss to reach")
    parser.add_argument("--gradients", type=int, default=30_000, help="after which it is not reached")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=cpus(), help="processes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    goal = Goal(args.loss, args.gradients)
    keys = [(name, n) for n in sorted(args.workers, reverse=True) for name in METHODS]
    start = {"initializer": torch.set_num_threads, "initargs": (1,)}
    pool: Executor = ThreadPoolExecutor(1, **start)
    if args.jobs > 1:
        pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), **start)
    tuned, rows = {}, []
    with pool, Progress() as bar:
        task = bar.add_task("learning rates, then runs", total=len(keys) * (1 + len(args.seeds)))
        tuning = {pool.submit(tune, *key, goal): key for key in keys}
        runs = {}
        for done in as_completed(tuning):
            key, found = tuning[done], done.result()
            lr = min(found, key=found.__getitem__)
            tuned[key] = lr, found
            runs[key] = [pool.submit(reach, *key, lr, seed, goal) for seed in args.seeds]
            bar.advance(task)
        for name in METHODS:
            for n in sorted(args.workers):
                rows.append(Row(name, n, tuned[name, n][0], [run.result()[0] for run in runs[name, n]]))
                bar.advance(task, len(args.seeds))
    said = words(rows)
    results = {
        "command": " ".join(sys.argv),
        "goal": goal._asdict(),
        "batch": BATCH,
        "speed": repr(SPEED),
        "network": repr(NETWORK),
        "seeds": args.seeds,
        "rows": [row._asdict() | {"seconds": [s if s < math.inf else None for s in row.seconds]} for row in rows],
        "tuning": [
            {"method": name, "workers": n, "seed": TUNING, "lr": lr, "seconds": s if s < math.inf else None}
            for (name, n), (_, found) in tuned.items()
            for lr, (s, _) in found.items()
        ],
        "words": said,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    (args.out / "jin.png").write_bytes(png(partial(picture, rows, goal), LIGHT))
    Console().print(table(rows, goal))
    print(*said, f"written to {args.out}", sep="\n")


if __name__ == "__main__":
    main()
