"""What does simulating a cluster cost? A simulated run against a plain PyTorch loop with as many gradients.

The plain loop is what anybody would write for one machine: minibatches from tensors in memory, forward, backward,
``optimizer.step()`` with Nesterov momentum, an evaluation at the end. The simulated run does as many gradients under
DANA-Zero, with its trace and its metrics, and the same evaluation; how it takes its gradients is measured
(``lanes="auto"``). ResNet-20 has minibatches of 128, cropped and flipped in both; its evaluation is of 1,000 images.
"""

from __future__ import annotations

import torch

import offbeat as ob
from benchmarks.measure import Row, seconds
from offbeat.engines.simulator import Simulation, together
from offbeat.tasks import DataMissing, Supervised
from offbeat.tasks.supervised import Recipe

REPEATS = 5
TASKS: list[tuple[str, Recipe, int, tuple[int, ...], float]] = [
    # name, task, gradients, workers, aim
    ("digits", ob.tasks.Digits(), 2000, (1, 8, 32, 128), 0.5),
    ("MNIST", ob.tasks.Mnist(), 1000, (1, 8, 32, 128), 1.0),
    ("ResNet-20", ob.tasks.Cifar10(batch=128, eval_images=1000), 40, (32,), 1.1),
]
SEEDS = 4


def plain(problem: Supervised, gradients: int) -> None:
    """The loop without offbeat, on the same model, data and batch."""
    module = problem.model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    inputs, targets = problem.train
    inputs = inputs.to(problem.dtype) if inputs.is_floating_point() else inputs
    draw, order = torch.Generator(), torch.randperm(len(targets))
    batches = len(targets) // problem.batch
    for step in range(gradients):
        chosen = order[(step % batches) * problem.batch :][: problem.batch]
        x = inputs[chosen] if problem.augment is None else problem.augment(inputs[chosen], draw)
        optimizer.zero_grad()
        loss = problem.loss(module(x), targets[chosen])
        loss.backward()
        optimizer.step()
    problem.evaluate(torch.nn.utils.parameters_to_vector(module.parameters()).detach())


def simulated(task: Recipe, workers: int, gradients: int) -> None:
    method, cluster = ob.methods.DanaZero(lr=0.05 / workers), ob.Cluster(workers)
    ob.simulate(method, task, cluster, gradients=gradients, lanes="auto")


def seeds(task: Recipe, beside: bool) -> None:
    tasks = [task, *(task.reseeded(seed) for seed in range(1, SEEDS))]
    runs = [Simulation(ob.methods.DanaZero(lr=0.01), t, ob.Cluster(8), 500, lanes="auto") for t in tasks]
    for part in [runs] if beside else [[run] for run in runs]:
        together(part)


def run() -> list[Row]:
    rows = []
    for name, task, gradients, crowds, aim in TASKS:
        try:
            problem = task.build()
        except DataMissing as missing:
            print(f"{name} is left out: {missing}")
            continue
        times: dict[int, list[float]] = {workers: [] for workers in (0, *crowds)}
        for repeat in range(-1, REPEATS):  # the first does not count
            for workers in times:
                if workers:
                    took = seconds(lambda: simulated(task, workers, gradients))  # noqa: B023
                else:
                    took = seconds(lambda: plain(problem, gradients))  # noqa: B023
                times[workers] += [took] if repeat >= 0 else []
        base = times.pop(0)
        for workers, each in times.items():
            what = f"{workers} worker{'s' * (workers > 1)}"
            group, due = f"{name}: simulated run / plain loop", aim if workers == 32 else None
            rows.append(
                Row(what, "x", tuple(a / b for a, b in zip(each, base, strict=True)), group, aim=due, less=True)
            )
        if len(crowds) > 1:
            growth = tuple(a / b for a, b in zip(times[128], times[8], strict=True))
            rows.append(Row("128 workers / 8 workers", "x", growth, name, aim=1.1, less=True))
    task = ob.tasks.Digits()
    beside = [seconds(lambda: seeds(task, True)) / seconds(lambda: seeds(task, False)) for _ in range(REPEATS + 1)]
    what = f"{SEEDS} seeds of 8 workers: side by side / one after the other"
    return [*rows, Row(what, "x", tuple(beside[1:]), "digits", less=True)]
