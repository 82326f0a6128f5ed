"""SlowMo beside its bases (Wang et al., arXiv:1910.00643, table 1), at a scale that two cores can afford.

The paper trains ResNet-18 on CIFAR-10 for 200 epochs on 32 GPUs. Here a LeNet-like net learns MNIST on 8 and 32 simulated
workers, 8,000 gradients in all (batch 64: 8.5 epochs), Nesterov momentum 0.9, an average every 12 steps, alpha 1, three
seeds. The rate has the paper's shape: a warm-up over the first 1/40 of the steps, a tenth of it from 1/2, 3/4 and 7/8
on. Bases without SlowMo: Local SGD averages every 12 steps; SGP and OSGP only gossip. 288,000 gradients: 25 minutes on
two cores.

    python experiments/slowmo_mnist.py --out runs/slowmo_mnist
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import offbeat as ob
from offbeat.cpus import cpus
from offbeat.experiment import Comparison, Grid, compare
from offbeat.report import page
from offbeat.tasks import Mnist

# Best training loss and validation accuracy in the paper's table 1, CIFAR-10: base, base + SlowMo.
PAPER = {
    "Local SGD": ((0.122, 91.73), (0.006, 93.20)),
    "OSGP": ((0.011, 93.17), (0.001, 93.74)),
    "SGP": ((0.002, 93.90), (0.001, 94.32)),
}


def lineup(beta: float, steps: int) -> dict[str, tuple[ob.Method, ob.Method]]:
    """For each base what runs without and with SlowMo; a worker takes ``steps`` steps in all."""
    decay = ob.MultiStep((steps // 2, 3 * steps // 4, 7 * steps // 8))
    sgd = ob.SGD(0.05 * (ob.Warmup(max(1, steps // 40)) * decay), momentum=0.9, nesterov=True)
    local, osgp, sgp = ob.Local(sgd), ob.methods.OSGP(sgd), ob.methods.SGP(sgd)
    return {
        "Local SGD": (ob.methods.LocalSGD(local), ob.methods.SlowMo(local, beta=beta)),
        "OSGP": (osgp, ob.methods.SlowMo(osgp, beta=beta)),
        "SGP": (sgp, ob.methods.SlowMo(sgp, beta=beta)),
    }


def table(comparisons: dict[int, Comparison]) -> Table:
    """Without and with SlowMo, ours under the paper's."""
    view = Table(title="Training loss and accuracy without -> with SlowMo")
    for column in ("base", "where", "training loss", "accuracy, %"):
        view.add_column(column)
    for base, ((loss, accuracy), (slow_loss, slow_accuracy)) in PAPER.items():
        view.add_row(base, "paper: CIFAR-10, 32", f"{loss} -> {slow_loss}", f"{accuracy} -> {slow_accuracy}")
        for n, comparison in comparisons.items():
            rows = {row.label: row for row in comparison.rows()}
            ours = [rows[label] for label in labels(base)]
            losses, accuracies = (
                [(row.mean[f], row.spread.get(f, 0.0)) for row in ours] for f in ("train_loss", "accuracy")
            )
            view.add_row(
                base,
                f"here: MNIST, {n}",
                " -> ".join(f"{mean:.4f} ± {spread:.4f}" for mean, spread in losses),
                " -> ".join(f"{100 * mean:.2f} ± {100 * spread:.2f}" for mean, spread in accuracies),
            )
        view.add_section()
    return view


def labels(base: str) -> tuple[str, str]:
    """Names of the runs without and with SlowMo."""
    return base.lower(), f"{base.lower()} + slowmo"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/slowmo_mnist"), help="folder for results and the pages")
    parser.add_argument("--beta", type=float, default=0.5, help="slow momentum")
    parser.add_argument("--gradients", type=int, default=8000, help="gradients of each run, all workers together")
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=cpus(), help="processes")
    args = parser.parse_args()
    grids = {}
    for n in args.workers:
        pairs = lineup(args.beta, args.gradients // n)
        entries = tuple(entry for base in pairs for entry in zip(labels(base), pairs[base], strict=True))
        grids[n] = Grid(entries, Mnist(), (n,), tuple(args.seeds), args.gradients, lr=None, momentum=None, warmup=0.0)
    comparisons = {}
    with Progress() as bar:
        task = bar.add_task("runs", total=sum(len(grid.keys) for grid in grids.values()))
        for n, grid in grids.items():
            comparisons[n] = compare(grid, jobs=args.jobs, watch=lambda cell: bar.advance(task))
            comparisons[n].write(args.out / f"{n}-workers")
    Console().print(table(comparisons))
    for n, comparison in comparisons.items():
        print(page(comparison, args.out / f"{n}-workers"))


if __name__ == "__main__":
    main()
