"""What a server can serve: gradients per second over workers, beside what arithmetic says.

Time only, nothing is learnt: a model of 1,000,000 float32 parameters (messages of S = 4 MB), c = 0.1 s per gradient,
10 Gb/s (B) at every card, l = 50 us latency, 1 to 1,024 workers. A parameter server with a full duplex card, with a half
duplex one (the plain model of contention: a visit costs the card 2S/B) and on four machines, beside all-reduce, SGP and
push gossip on a one-peer exponential graph. Rates are measured over the last quarter of a run. A minute and
a half on one core.

    python experiments/contention.py --out runs/contention
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import offbeat as ob
from offbeat.report import LIGHT, Theme, label_ends, png, styles
from offbeat.tasks import TimeOnly

TASK = TimeOnly(1_000_000)
C, L, S, B = 0.1, 50e-6, 4e6, 10e9 / 8  # seconds per gradient, seconds one way, bytes of a message, bytes per second
NET = ob.Network(L, B)
GRAPH = ob.OnePeerExponential()


class Setup(NamedTuple):
    """A method on a network, and the gradients per second that n workers should have."""

    method: ob.Method
    network: ob.Network
    says: str
    """The formula as text."""
    formula: Callable[[float], float]


def served(n: float, cap: float) -> float:
    """Visits per second at a server that serves ``cap``: below it, each worker waits for its own messages only."""
    return min(n / (C + 2 * L + 2 * S / B), cap)


ASGD = ob.methods.ASGD()
HALF, SHARDED = ob.Network(L, B, duplex="half"), ob.Network(L, B, shards=4)
SETUPS = {
    "push gossip": Setup(ob.methods.PushGossip(topology=GRAPH), NET, "n / c", lambda n: n / C),
    "SGP": Setup(ob.methods.SGP(topology=GRAPH), NET, "n / (c + l + S/B)", lambda n: n / (C + (n > 1) * (L + S / B))),
    "all-reduce": Setup(
        ob.methods.AllReduce(),
        NET,
        "n / (c + 2 (n-1)/n S/B + 2 (n-1) l)",
        lambda n: n / (C + 2 * (n - 1) / n * S / B + 2 * (n - 1) * L),
    ),
    "server, 4 shards": Setup(ASGD, SHARDED, "min(n / (c + 2l + 2S/B), 4 B/S)", lambda n: served(n, 4 * B / S)),
    "server": Setup(ASGD, NET, "min(n / (c + 2l + 2S/B), B/S)", lambda n: served(n, B / S)),
    "server, half duplex": Setup(ASGD, HALF, "min(n / (c + 2l + 2S/B), B/2S)", lambda n: served(n, B / (2 * S))),
}


def rate(name: str, n: int, cv: float = 0.0) -> float:
    """Gradients per second of all ``n`` workers together, over the last quarter of a run, when queues have settled."""
    method, network, *_ = SETUPS[name]
    part = max(10, 64 // n) * n  # the same number from each, as some methods go in rounds
    trace = ob.simulate(method, TASK, ob.Cluster(n, ob.Gamma(C, cv), network=network), gradients=4 * part).trace
    return part / (trace[-1].seconds - trace[-1 - part].seconds)


def deviation(name: str, n: int, measured: float) -> float:
    """How far a measured rate is from the formula's, in per cent of it."""
    return 100 * (measured / SETUPS[name].formula(n) - 1)


def table(rates: dict[str, dict[int, float]]) -> Table:
    """Gradients per second, simulated; last the deviation from the formula that is largest."""
    title = "Gradients per second (1 M parameters, 0.1 s per gradient, 10 Gb/s, 50 us)"
    view = Table("workers", title=title, box=SIMPLE)
    for name in rates:
        view.add_column(name.replace(", ", ",\n"), justify="right")
    for n in next(iter(rates.values())):
        view.add_row(f"{n:,}", *(f"{row[n]:,.1f}" for row in rates.values()), end_section=n == max(rates["server"]))
    worst = [max((deviation(name, n, row[n]) for n in row), key=abs) for name, row in rates.items()]
    view.add_row("off by", *(f"{off:+.2f} %" for off in worst))
    return view


def picture(rates: dict[str, dict[int, float]], theme: Theme) -> Figure:
    """Points on the curves of the formulas."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    axes = figure.subplots()
    looks, ends = styles(rates, theme), {}
    for name, row in rates.items():
        workers, look = list(row), looks[name]
        fine = [workers[0] * (workers[-1] / workers[0]) ** (k / 200) for k in range(201)]
        axes.plot(fine, [SETUPS[name].formula(n) for n in fine], color=look.color, lw=1.6, alpha=0.75)
        axes.plot(
            workers, list(row.values()), look.marker, color=look.color, ms=5.5, mec=theme.paper, mew=0.6, zorder=3
        )
        ends[name] = workers[-1], row[workers[-1]]
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="gradients per second, all workers together")
    axes.set_xticks(workers, [f"{n:,}" for n in workers])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.grid(axis="y")
    axes.set_title("Lines: arithmetic. Points: simulated", loc="left")
    label_ends(axes, ends, looks)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/contention"), help="folder for results and the picture")
    parser.add_argument("--workers", type=int, nargs="+", default=[2**k for k in range(11)])
    parser.add_argument("--cv", type=float, default=0.0, help="coefficient of variation of the gradients' times")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rates: dict[str, dict[int, float]] = {name: {} for name in SETUPS}
    with Progress() as bar:
        task = bar.add_task("workers", total=len(SETUPS) * sum(args.workers))
        for n in args.workers:
            for name in SETUPS:
                rates[name][n] = rate(name, n, args.cv)
                bar.advance(task, n)
    results = {
        "command": " ".join(sys.argv),
        "c": C,
        "l": L,
        "S": S,
        "B": B,
        "cv": args.cv,
        "gradients_per_second": rates,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1))
    (args.out / "contention.png").write_bytes(png(partial(picture, rates), LIGHT))
    Console().print(table(rates))
    print(*(f"{name}: {SETUPS[name].says}" for name in rates), sep="\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
