"""LWP: linear weight prediction; the worker is sent where the master is expected to be when its gradient arrives.

on gradient g from worker i:
    v     <- gamma v + g
    theta <- theta - eta v
    send theta - T eta v to i        T = expected lag
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.descent import axpy
from ..core.master import Master, Number
from ..core.values import require


class LWPState(NamedTuple):
    v: Tensor  # momentum [d]
    workers: Tensor  # workers present, 0-dim


@dataclass(frozen=True)
class LWP(Master):
    """Linear weight prediction as an asynchronous baseline: the whole expected drift is extrapolated, undamped.

    Kosson, Chiley, Venigalla, Hestness, Koster. Pipelined Backpropagation at Scale. arXiv:2003.11666 (LWP-v).
    Differences from the paper: a parameter server instead of a pipeline, so the delay is an expectation; by default the
    number of workers present, as in DANA's comparison. No spike compensation.
    Weight decay acts at the master's point, evaluation uses theta. Workers that come or go change the default T only.
    """

    momentum: float = 0.9
    """Heavy-ball momentum (gamma) at the master, in [0, 1)."""
    delay: float | None = None
    """Expected lag (T) in updates, at least 0; None: the number of workers present."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "delay", self.delay is None or self.delay >= 0, "must be at least 0, or None")

    def begin(self, x: Tensor) -> LWPState:
        return LWPState(torch.zeros_like(x), torch.zeros((), dtype=torch.float64, device=x.device))

    def seat(self, x: Tensor, shared: LWPState) -> tuple[LWPState, tuple[()]]:
        return shared._replace(workers=shared.workers + 1), ()

    def unseat(self, shared: LWPState, mine: tuple[()]) -> LWPState:
        return shared._replace(workers=shared.workers - 1)

    def move(
        self, x: Tensor, shared: LWPState, mine: tuple[()], d: Tensor, lr: Number
    ) -> tuple[Tensor, LWPState, tuple[()]]:
        v = axpy(self.momentum, shared.v, d)
        return axpy(-lr, v, x), shared._replace(v=v), mine

    def sends(self, x: Tensor, shared: LWPState, lr: Number) -> Tensor:
        delay = shared.workers if self.delay is None else self.delay
        return axpy(-lr * delay, shared.v, x)

    def velocity(self, shared: LWPState, mine: tuple[()], g: Tensor) -> Tensor:
        return shared.v
