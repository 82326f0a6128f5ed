"""Multi-ASGD: a momentum vector for each worker at the master, no look-ahead.

on gradient g from worker i:
    v_i   <- gamma v_i + g
    theta <- theta - eta v_i
    send theta to i
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.descent import axpy
from ..core.master import Master, Number


@dataclass(frozen=True)
class MultiASGD(Master):
    """Momentum per worker without DANA's look-ahead: shows what each half of DANA does.

    The baseline of Hakimi, Barkai, Gabel, Schuster. Taming Momentum in a Distributed Asynchronous Environment.
    arXiv:1907.11612.
    Differences from the paper: none known; its text was not at hand. One worker is heavy-ball SGD.
    Weight decay acts at the master's point, evaluation uses theta. A worker that goes takes its momentum with it; a
    worker that comes starts with none.
    """

    apart = True
    momentum: float = 0.9
    """Heavy-ball momentum (gamma) of each worker, in [0, 1)."""

    def seat(self, x: Tensor, shared: Any) -> tuple[Any, Tensor]:
        return shared, torch.zeros_like(x)  # v_i [d]

    def move(self, x: Tensor, shared: Any, mine: Tensor, d: Tensor, lr: Number) -> tuple[Tensor, Any, Tensor]:
        v = axpy(self.momentum, mine, d)
        return axpy(-lr, v, x), shared, v

    def velocity(self, shared: Any, mine: Tensor, g: Tensor) -> Tensor:
        return mine
