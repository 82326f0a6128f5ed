"""GEM's first experiment (Hermans & Louppe, arXiv:1805.08469, figures 1 and 3): does it survive more workers?

MNIST, LeNet-like net, lr 0.05, momentum 0.9, batch 64, every worker contributes one epoch (937 gradients), 5 to 30
workers, GEM beside Downpour (plain asynchronous SGD). About 122,000 gradients: half an hour on two cores.

    python experiments/gem_mnist.py --out runs/gem_mnist
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import offbeat as ob
from offbeat.cpus import cpus
from offbeat.tasks import Mnist

STEPS = 60_000 // 64
WORKERS = (5, 10, 20, 30)
METHODS = {"GEM": ob.methods.GEM(lr=0.05), "Downpour": ob.methods.Downpour(lr=0.05)}
# Final training loss in the paper: figure 1d, digitised, and the mean of steps 885 to 940 in figures 1a to 1c.
PAPER = {
    "GEM": {5: (0.0737, 0.072), 10: (0.0538, 0.054), 20: (0.0408, 0.042), 30: (0.0352, 0.036)},
    "Downpour": {5: (0.0844, 0.078), 10: (0.1310, 0.098), 20: (1.3184, 0.346), 30: (2.3019, 1.179)},
}
TAIL = 885  # the paper's plots end with steps 885 to 940 of each worker


def cell(name: str, workers: int, seed: int, steps: int) -> dict[str, object]:
    """One run: the loss over worker steps in bins of 20, and the mean from step 885 on."""
    torch.set_num_threads(1)
    try:
        run = ob.simulate(METHODS[name], Mnist(seed=seed), ob.Cluster(workers), gradients=workers * steps, seed=seed)
        trace, accuracy, failure = run.trace, run.figures["accuracy"], ""
    except ob.Diverged as diverged:
        trace, accuracy, failure = diverged.trace, float("nan"), str(diverged)
    step, loss = trace.column("step"), trace.column("loss")
    bins = [float(loss[(step >= b) & (step < b + 20)].mean()) for b in range(0, steps, 20)]
    final = float(loss[step >= min(TAIL, steps - 1)].mean())
    clamped = float(trace.column("clamped")[step >= min(100, steps - 1)].mean()) if "clamped" in trace.columns else None
    return {
        "method": name,
        "workers": workers,
        "seed": seed,
        "final": final,
        "accuracy": accuracy,
        "curve": bins,
        "clamped": clamped,
        "lag": float(trace.column("lag").double().mean()),
        "failure": failure,
    }


def table(cells: list[dict[str, object]]) -> Table:
    """Our final training losses beside the paper's."""
    view = Table(title="Final training loss, MNIST, one epoch per worker (lr 0.05, momentum 0.9, batch 64)")
    for column in (
        "method",
        "workers",
        "seed",
        "ours",
        "paper, fig. 1d",
        "ours / paper",
        "paper, fig. 1a-c",
        "accuracy",
    ):
        view.add_column(column, justify="left" if column == "method" else "right")
    for c in sorted(cells, key=lambda c: (str(c["method"]) != "GEM", c["workers"], c["seed"])):
        end, tail = PAPER[str(c["method"])][int(str(c["workers"]))]
        final = float(str(c["final"]))
        ratio = f"{final / end:.2f}"
        view.add_row(
            str(c["method"]),
            str(c["workers"]),
            str(c["seed"]),
            f"{final:.4f}",
            f"{end:.4f}",
            ratio,
            f"{tail:.3f}",
            f"{100 * float(str(c['accuracy'])):.2f} %",
        )
    return view


def picture(cells: list[dict[str, object]], path: Path) -> None:
    """Training loss over worker steps, and the final loss over workers beside the paper's."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    shades = {"GEM": plt.get_cmap("Blues"), "Downpour": plt.get_cmap("Oranges")}
    figure, (curves, ends) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for c in sorted(cells, key=lambda c: (str(c["method"]) != "GEM", c["workers"])):
        name, workers = str(c["method"]), int(str(c["workers"]))
        shade = shades[name](0.35 + 0.6 * WORKERS.index(workers) / (len(WORKERS) - 1))
        label = f"{name}, {workers}"
        curves.plot([b * 20 + 10 for b in range(len(c["curve"]))], c["curve"], color=shade, label=label)  # type: ignore[arg-type]
    curves.set(yscale="log", xlabel="gradients of each worker", ylabel="training loss")
    curves.legend(frameon=False, ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    for name, colour in (("GEM", "#2171b5"), ("Downpour", "#d94801")):
        ours = [(c["workers"], c["final"]) for c in sorted(cells, key=lambda c: c["workers"]) if c["method"] == name]  # type: ignore[arg-type, return-value]
        ends.plot(*zip(*ours, strict=True), "o-", color=colour, label=f"{name}, offbeat")
        ends.plot(WORKERS, [PAPER[name][n][0] for n in WORKERS], "s:", color=colour, alpha=0.6, label=f"{name}, paper")
    ends.set(yscale="log", xlabel="workers", ylabel="final training loss", xticks=WORKERS)
    ends.legend(frameon=False)
    for axes in (curves, ends):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("GEM gains from more workers, plain asynchronous SGD loses (MNIST, one epoch per worker)")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gem_mnist"), help="folder for results.json and the picture"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="gradients of each worker; the default is one epoch")
    parser.add_argument("--workers", type=int, nargs="+", default=WORKERS, choices=WORKERS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of each cell per seed")
    parser.add_argument("--jobs", type=int, default=cpus(), help="processes")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    Mnist().x0()  # a missing or corrupt data file is told now
    grid = [
        (name, n, seed, args.steps)
        for n in sorted(args.workers, reverse=True)
        for name in METHODS
        for seed in args.seeds
    ]
    cells: list[dict[str, object]] = []
    console = Console()
    pool: Executor = ThreadPoolExecutor(1)
    if args.jobs > 1:
        pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"))
    with pool, Progress(console=console) as bar:
        task = bar.add_task("gradients", total=sum(n * args.steps for _, n, *_ in grid))
        for future in as_completed(pool.submit(cell, *key) for key in grid):
            done = future.result()
            cells.append(done)
            bar.advance(task, int(str(done["workers"])) * args.steps)
            console.print(f"{done['method']}, {done['workers']} workers: {done['final']:.4f} {done['failure']}")
    plain = json.loads(json.dumps(cells), parse_constant=lambda name: None)  # JSON has no word for what is no number
    (args.out / "results.json").write_text(json.dumps({"command": " ".join(sys.argv), "cells": plain}, indent=1))
    picture(cells, args.out / "gem_mnist.png")
    console.print(table(cells))
    console.print(f"written to {args.out}")


if __name__ == "__main__":
    main()
