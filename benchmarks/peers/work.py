"""The work that all systems do: an MLP of 5.8 k parameters, batches of 32, plain SGD with momentum, one thread.

Run in the environment of each system, so it needs nothing but torch.
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


def model() -> nn.Module:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 77), nn.ReLU(), nn.Linear(77, 10))


def optimizer(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)


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


def timed(step: Callable[[], object], rank: int, version: str) -> None:
    """Write how many steps this worker made per second, once it is warm."""
    for _ in range(WARM):
        step()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    rate = STEPS / (time.perf_counter() - start)
    Path(os.environ["BENCH_OUT"], f"{rank}.json").write_text(json.dumps({"rate": rate, "version": version}))


def said() -> list[str]:
    """What the command line says."""
    return sys.argv[1:]
