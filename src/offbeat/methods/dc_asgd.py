"""DC-ASGD: a stale gradient is moved to the present point by a diagonal guess of the Hessian, lambda g^2.

-c:  g <- g + lambda g^2 (theta - w_i)
-a:  MS_i <- m MS_i + (1 - m) g^2
     g <- g + lambda0 / sqrt(MS_i + eps) g^2 (theta - w_i)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.master import Correction, Stale
from ..core.values import require, require_nonnegative
from .asgd import ASGD


@dataclass(frozen=True)
class DelayCompensation(Correction):
    """g + lambda g^2 (theta - w_i), lambda constant; weight decay is added afterwards.

    Zheng et al. Asynchronous Stochastic Gradient Descent with Delay Compensation. ICML 2017. arXiv:1609.08326.
    """

    compares = True
    strength: float = 0.04
    """How much of the guessed curvature is used (lambda), at least 0."""

    def __post_init__(self) -> None:
        require_nonnegative(self, "strength")

    def correct(self, memory: Any, mine: Any, stale: Stale) -> tuple[Tensor, Any, Any]:
        g = stale.g
        return g + self.strength * g * g * (stale.x - stale.sent) + stale.decay, memory, mine


@dataclass(frozen=True)
class AdaptiveDelayCompensation(Correction):
    """g + lambda0 / sqrt(MS_i + eps) g^2 (theta - w_i), MS_i a running mean of g^2 for each worker.

    Zheng et al. Asynchronous Stochastic Gradient Descent with Delay Compensation. ICML 2017. arXiv:1609.08326.
    """

    compares = True
    strength: float = 2.0
    """How much of the guessed curvature is used (lambda0), at least 0."""
    decay: float = 0.95
    """Decay of the running mean of squared gradients (m), in [0, 1)."""
    eps: float = 1e-7
    """Added under the root, above 0."""

    def __post_init__(self) -> None:
        require_nonnegative(self, "strength")
        require(self, "decay", 0 <= self.decay < 1, "must be in [0, 1)")
        require(self, "eps", self.eps > 0, "must be above 0")

    def seat(self, memory: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)  # MS_i [d]

    def correct(self, memory: Any, mine: Tensor, stale: Stale) -> tuple[Tensor, Any, Tensor]:
        g = stale.g
        square = self.decay * mine + (1 - self.decay) * g * g
        strength = self.strength / (square + self.eps).sqrt()
        return g + strength * g * g * (stale.x - stale.sent) + stale.decay, memory, square


@dataclass(frozen=True)
class DCASGD(ASGD, name="dc-asgd"):
    """Delay-compensated ASGD, with the adaptive strength (DC-ASGD-a) unless another correction is given.

    Zheng et al. Asynchronous Stochastic Gradient Descent with Delay Compensation. ICML 2017. arXiv:1609.08326.
    Differences from the paper: the copy of what was sent starts at the initial parameters, where the authors' program
    starts it at 0; ``correction=DelayCompensation(0.04)`` is DC-ASGD-c. Momentum is 0 as in the paper, and may be set.
    Weight decay acts at the master's point and stays out of the squared gradient; evaluation uses theta. A copy of what
    was sent, and MS_i, are kept for each worker and go with it.
    """

    correction: Correction = AdaptiveDelayCompensation()
    """How a stale gradient is corrected before the master moves."""
