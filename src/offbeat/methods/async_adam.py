"""Adam at the master: every gradient feeds one pair of moments.

on gradient g from worker i:
    m     <- beta1 m + (1 - beta1) g
    n     <- beta2 n + (1 - beta2) g^2
    theta <- theta - eta m_hat / (sqrt(n_hat) + eps)
    send theta to i
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.descent import Adam, AdamState, axpy
from ..core.master import Master, Number
from ..core.schedule import Rate
from ..core.values import require


@dataclass(frozen=True)
class AsyncAdam(Master):
    """Adam at the parameter server, one pair of moments for all workers; one worker is ``torch.optim.Adam``.

    Kingma, Ba. Adam: A Method for Stochastic Optimization. ICLR 2015. arXiv:1412.6980.
    Differences from the paper: gradients are stale; a `Correction` may come first.
    Weight decay is the L2 penalty at the master's point, evaluation uses theta. Nothing is kept for a worker.
    """

    lr: Rate = 0.001
    """Learning rate (alpha), above 0, or a schedule of the gradients applied by all workers together."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments, each in [0, 1)."""
    eps: float = 1e-8
    """Added to the denominator, above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "must be two in [0, 1)")
        require(self, "eps", self.eps > 0, "must be above 0")

    @property
    def fading(self) -> float:
        return self.betas[1]

    def _adam(self) -> Adam:
        return Adam(self.lr, betas=self.betas, eps=self.eps)

    def begin(self, x: Tensor) -> AdamState:
        return self._adam().init(x)

    def move(self, x: Tensor, shared: AdamState, mine: Any, d: Tensor, lr: Number) -> tuple[Tensor, AdamState, Any]:
        adam = self._adam()
        shared = adam.moments(shared, d)
        return axpy(-lr, adam.direction(shared), x), shared, mine

    def velocity(self, shared: AdamState, mine: Any, g: Tensor) -> Tensor:
        return self._adam().direction(shared)
