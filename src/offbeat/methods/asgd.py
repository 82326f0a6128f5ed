"""ASGD: every gradient moves the master as it arrives.

on gradient g from worker i:
    v     <- momentum v + g
    theta <- theta - eta v
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
class ASGD(Master):
    """Asynchronous SGD at a parameter server: a gradient is applied as it arrives, however stale.

    Dean et al. Large Scale Distributed Deep Networks. NIPS 2012.
    Differences from the paper: no Adagrad at the server; one gradient per visit (`Downpour` has longer periods); an
    optional heavy-ball momentum shared by all workers, which `GapAware` builds on.
    Weight decay acts at the master's point, evaluation uses theta. Nothing is kept for a worker, so workers come and go without a trace.
    """

    momentum: float = 0.0
    """Heavy-ball momentum (gamma) at the master, in [0, 1)."""

    def begin(self, x: Tensor) -> Any:
        return torch.zeros_like(x) if self.momentum else ()  # v [d]

    def move(self, x: Tensor, shared: Any, mine: Any, d: Tensor, lr: Number) -> tuple[Tensor, Any, Any]:
        v = axpy(self.momentum, shared, d) if self.momentum else d
        return axpy(-lr, v, x), v if self.momentum else (), mine

    def velocity(self, shared: Any, mine: Any, g: Tensor) -> Tensor:
        return shared if self.momentum else g
