"""SlowMo beside its bases (Wang et al., arXiv:1910.00643, table 1), at a scale that two cores can afford.

The paper trains ResNet-18 on CIFAR-10 for 200 epochs on 32 GPUs. Here a LeNet-like net learns MNIST on 8 and 32 simulated
workers, 8,000 gradients in all (batch 64: 8.5 epochs), Nesterov momentum 0.9, an average every 12 steps, alpha 1, three
seeds. Bases without SlowMo: Local SGD averages every 12 steps; SGP and OSGP only gossip. About 288,000 gradients: 20
minutes on two cores.

    python experiments/slowmo_mnist.py --out runs/slowmo_mnist
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import offbeat as ob
from offbeat.experiment import Comparison, Grid, compare
from offbeat.report import page
from offbeat.tasks import Mnist

SGD = ob.SGD(0.05, momentum=0.9, nesterov=True)
BASES = {"Local SGD": ob.Local(SGD), "OSGP": ob.methods.OSGP(SGD), "SGP": ob.methods.SGP(SGD)}
# Best training loss and validation accuracy in the paper's table 1, CIFAR-10: base, base + SlowMo.
PAPER = {
    "Local SGD": ((0.122, 91.73), (0.006, 93.20)),
    "OSGP": ((0.011, 93.17), (0.001, 93.74)),
    "SGP": ((0.002, 93.90), (0.001, 94.32)),
}


def lineup(beta: float) -> dict[str, tuple[ob.Method, ob.Method]]:
    """For each base what runs without and with SlowMo."""
    plain = {"Local SGD": ob.methods.LocalSGD(BASES["Local SGD"]), "OSGP": BASES["OSGP"], "SGP": BASES["SGP"]}
    return {name: (plain[name], ob.methods.SlowMo(base, beta=beta)) for name, base in BASES.items()}


def table(comparison: Comparison, labels: dict[str, tuple[str, str]], workers: tuple[int, ...]) -> Table:
    """Without and with SlowMo, ours under the paper's."""
    view = Table(title="Training loss and accuracy without -> with SlowMo")
    for column in ("base", "where", "training loss", "accuracy, %"):
        view.add_column(column)
    rows = {(row.label, row.workers): row for row in comparison.rows()}
    for base, pair in labels.items():
        (loss, accuracy), (slow_loss, slow_accuracy) = PAPER[base]
        view.add_row(base, "paper: CIFAR-10, 32", f"{loss} -> {slow_loss}", f"{accuracy} -> {slow_accuracy}")
        for n in workers:
            ours = [rows[label, n] for label in pair]
            losses, accuracies = (
                [(row.mean[f], row.spread.get(f, 0.0)) for row in ours] for f in ("train_loss", "accuracy")
            )
            view.add_row(
                base,
                f"here: MNIST, {n}",
                " -> ".join(f"{mean:.4f} ± {spread:.4f}" for mean, spread in losses),
                " -> ".join(f"{100 * mean:.2f} ± {100 * spread:.2f}" for mean, spread in accuracies),
                end_section=n == workers[-1],
            )
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/slowmo_mnist"), help="folder for results and the page")
    parser.add_argument("--beta", type=float, default=0.5, help="slow momentum")
    parser.add_argument("--gradients", type=int, default=8000, help="gradients of each run, all workers together")
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args()
    pairs = lineup(args.beta)
    labels = {base: (base.lower(), f"{base.lower()} + slowmo") for base in pairs}
    grid = Grid(
        tuple((label, method) for base in pairs for label, method in zip(labels[base], pairs[base], strict=True)),
        Mnist(),
        tuple(args.workers),
        tuple(args.seeds),
        args.gradients,
        lr=None,
        momentum=None,
    )
    with Progress() as bar:
        task = bar.add_task("runs", total=len(grid.keys))
        comparison = compare(grid, jobs=args.jobs, watch=lambda cell: bar.advance(task))
    comparison.write(args.out)
    Console().print(table(comparison, labels, grid.workers))
    print(page(comparison, args.out))


if __name__ == "__main__":
    main()
