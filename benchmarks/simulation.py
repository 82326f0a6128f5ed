"""What does simulating a cluster cost? A simulated run against a plain PyTorch loop with as many gradients.

The plain loop is what anybody would write for one machine: sampled minibatches, forward, backward, ``optimizer.step()``
with Nesterov momentum. The simulated run does the same gradients under DANA-Zero, with its trace and its metrics.
"""

from __future__ import annotations

import os

import torch

import offbeat as ob
from benchmarks.measure import Row, ratio
from offbeat.tasks import DataMissing, Supervised

WORKERS = (1, 8, 32, 128)


def plain(problem: Supervised, gradients: int) -> None:
    """The loop without offbeat, on the same model, data and batch."""
    module = problem.model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    inputs, targets = problem.train
    inputs = inputs.to(problem.dtype) if inputs.is_floating_point() else inputs
    order = torch.randperm(len(targets))
    batches = len(targets) // problem.batch
    for step in range(gradients):
        chosen = order[(step % batches) * problem.batch :][: problem.batch]
        optimizer.zero_grad()
        loss = problem.loss(module(inputs[chosen]), targets[chosen])
        loss.backward()
        optimizer.step()


def run() -> list[Row]:
    torch.set_num_threads(1)
    rows = []
    for name, task, gradients in (("digits", ob.tasks.Digits(), 1000), ("mnist", ob.tasks.Mnist(), 100)):
        try:
            problem = task.build()
        except DataMissing as missing:
            print(f"{name} is left out: {missing}")
            continue
        for workers in WORKERS:
            method = ob.methods.DanaZero(lr=0.05 / workers)

            def simulated(method=method, task=task, workers=workers, gradients=gradients):
                ob.simulate(method, task, ob.Cluster(workers), gradients=gradients)

            def loop(problem=problem, gradients=gradients):
                plain(problem, gradients)

            what = f"{name}, {workers} workers: simulated run / plain loop"
            rows.append(ratio(what, simulated, loop, repeats=int(os.environ.get("REPEATS", "5"))))
    return rows
