"""The work that all systems do, told by what they are timed at. Needs nothing but torch, in whatever environment.

Steps: an MLP of 5.8 k parameters, batches of 32, SGD with momentum, one thread. Exchanges: 10 M float32 numbers go to a
server, which takes ``x - LR g`` and returns it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PERIOD = 8
"""Local steps between two averages."""
WARM, STEPS = 64, 640
PATIENCE = 600.0
"""Seconds that a process waits for its next turn."""
LOOK = 0.25
"""Seconds between two looks for one's turn: those of all who wait must cost whoever has it next to nothing."""
SIZE = 10_000_000
"""Numbers that are exchanged."""
LR = 1e-6


def model() -> nn.Module:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 77), nn.ReLU(), nn.Linear(77, 10))


def optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)


def flat(net: nn.Module) -> tuple[Tensor, Tensor]:
    """Two vectors of which all parameters of ``net`` and their gradients are parts from now on."""
    parameters = list(net.parameters())
    x = torch.cat([p.detach().flatten() for p in parameters])
    g = torch.zeros_like(x)
    sizes = [p.numel() for p in parameters]
    for p, data, grad in zip(parameters, x.split(sizes), g.split(sizes), strict=True):
        p.data, p.grad = data.view_as(p), grad.view_as(p)
    return x, g


class Server:
    """A parameter server as one writes it: the model as one vector, and torch's own optimizer."""

    def __init__(self) -> None:
        self.x, _ = flat(model())
        self.x.grad = torch.zeros_like(self.x)
        self.optimizer = torch.optim.SGD([self.x], lr=0.01, momentum=0.9)

    def exchange(self, g: Tensor) -> Tensor:
        """Take the gradient; the new parameters."""
        self.x.grad = g
        self.optimizer.step()
        return self.x


def batches(rank: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Draws a minibatch; the data are in memory."""
    draw = torch.Generator().manual_seed(rank)
    x, y = torch.rand(1024, 64, generator=draw), torch.randint(10, (1024,), generator=draw)

    def batch() -> tuple[Tensor, Tensor]:
        chosen = torch.randint(1024, (32,), generator=draw)
        return x[chosen], y[chosen]

    return batch


def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


class Watch:
    """Measures a loop that calls `tick` after each round of ``steps``: it gets warm, then waits for its turns."""

    def __init__(self, rank: int, version: str, warm: int = WARM, count: int = STEPS, steps: int = 1) -> None:
        self.rank, self.version, self.warm, self.count, self.steps = rank, version, warm, count, steps
        self.folder, self.repeats = Path(os.environ["BENCH_OUT"]), int(os.environ["BENCH_REPEATS"])
        self.rounds = warm + self.repeats * count
        """How many rounds there are in all."""
        self.done, self.began = 0, 0.0

    def tick(self) -> None:
        """A round is done."""
        self.done += 1
        if self.done < self.warm:
            return
        turn, rest = divmod(self.done - self.warm, self.count)
        if rest:
            return
        rate = self.count * self.steps / (time.perf_counter() - self.began)
        if turn:
            self._say(f"{turn - 1}.rate", json.dumps({"rate": rate, "version": self.version}))
        else:
            self._say("ready", "")
        self._wait(self.folder / (f"{turn}.go" if turn < self.repeats else "end.go"))  # to end would disturb the others
        self.began = time.perf_counter()

    def _say(self, what: str, text: str) -> None:
        whole = self.folder / f"{self.rank}.part"
        whole.write_text(text)
        whole.rename(self.folder / f"{self.rank}.{what}")

    @staticmethod
    def _wait(go: Path) -> None:
        limit = time.monotonic() + PATIENCE
        while not go.exists():
            if time.monotonic() > limit:
                raise TimeoutError(f"no {go.name} within {PATIENCE:g} s: the benchmark is dead")
            time.sleep(LOOK)
        time.sleep(max(0.0, float(go.read_text()) - time.time()))  # so that all of a system begin at once


def timed(act: Callable[[], object], rank: int, version: str, warm: int = WARM, count: int = STEPS) -> None:
    """Measure how often this worker can ``act`` in a second."""
    watch = Watch(rank, version, warm, count)
    for _ in range(watch.rounds):
        act()
        watch.tick()


def said() -> str:
    """What the command line says."""
    return sys.argv[1]
