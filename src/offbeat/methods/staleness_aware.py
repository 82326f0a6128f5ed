"""Staleness-Aware: a gradient that is tau updates late counts 1 / tau.

g <- g / max(1, tau)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.master import Correction, Stale
from .asgd import ASGD


@dataclass(frozen=True)
class StalenessPenalty(Correction):
    """Divide gradient and weight decay by the lag tau, if that is above 1: the rate of eq. (6), alpha0 / tau.

    Zhang, Gupta, Lian, Liu. Staleness-aware Async-SGD for Distributed Deep Learning. IJCAI 2016. arXiv:1511.05950.
    """

    def correct(self, memory: Any, mine: Any, stale: Stale) -> tuple[Tensor, Any, Any]:
        return (stale.g + stale.decay) / stale.lag.clamp(min=1.0), memory, mine


@dataclass(frozen=True)
class StalenessAware(ASGD):
    """ASGD with momentum whose rate is divided by the staleness of each gradient.

    Zhang, Gupta, Lian, Liu. Staleness-aware Async-SGD for Distributed Deep Learning. IJCAI 2016. arXiv:1511.05950.
    Differences from the paper: an update for every gradient (n-softsync with n = number of workers) and no collecting
    of several; the penalty comes before the momentum. A lag of 1 is not penalised (GEM's baseline divides by tau + 1).
    Weight decay acts at the master's point and is divided too, evaluation uses theta. Nothing is kept for a worker but
    the step it was last sent.
    """

    momentum: float = 0.9
    """Heavy-ball momentum (gamma) at the master, in [0, 1)."""
    correction: Correction = StalenessPenalty()
    """How a stale gradient is corrected before the master moves."""
