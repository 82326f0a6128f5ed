"""NAG-ASGD: one Nesterov optimiser at the master, shared by all workers.

on gradient g from worker i:
    v     <- gamma v + g
    theta <- theta - eta v
    send theta - eta gamma v to i
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.descent import axpy
from ..core.master import Master, Number


@dataclass(frozen=True)
class NAGASGD(Master, name="nag-asgd"):
    """Nesterov momentum at the master, fed by everybody: the plain way to add momentum, which fails as workers grow.

    The baseline of Hakimi, Barkai, Gabel, Schuster. Taming Momentum in a Distributed Asynchronous Environment.
    arXiv:1907.11612.
    Differences from the paper: none known; its text was not at hand, the equations are the standard ones. One worker at
    a constant rate and without weight decay is ``torch.optim.SGD(nesterov=True)``, whose parameters are what is sent.
    Weight decay acts at the master's point, evaluation uses theta. Nothing is kept for a worker.
    """

    momentum: float = 0.9
    """Nesterov momentum (gamma), in [0, 1)."""

    def begin(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)  # v [d]

    def move(self, x: Tensor, shared: Tensor, mine: Any, d: Tensor, lr: Number) -> tuple[Tensor, Tensor, Any]:
        v = axpy(self.momentum, shared, d)
        return axpy(-lr, v, x), v, mine

    def sends(self, x: Tensor, shared: Tensor, lr: Number) -> Tensor:
        return axpy(-lr * self.momentum, shared, x)

    def velocity(self, shared: Tensor, mine: Any, g: Tensor) -> Tensor:
        return shared
