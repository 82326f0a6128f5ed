"""DANA: Nesterov momentum kept for each worker, and a look-ahead over everybody's momentum sent to each.

DANA-Zero, on gradient g from worker i:             DANA-Slim, the same points with the momentum at the workers:
    v_i   <- gamma v_i + g                              worker:  v <- gamma v + g,  send u = g + gamma v
    theta <- theta - eta v_i                            master:  Theta <- Theta - eta u,  send Theta
    send theta - eta gamma sum_j v_j to i
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.descent import axpy
from ..core.master import Correction, Master, MasterState, Number, Seat
from ..core.schedule import rate
from .dc_asgd import DelayCompensation


@dataclass(frozen=True)
class DanaZero(Master):
    """DANA-Zero: the look-ahead makes each worker's gradient be taken where the others' momentum will have led.

    Hakimi, Barkai, Gabel, Schuster. Taming Momentum in a Distributed Asynchronous Environment. arXiv:1907.11612.
    Differences from the paper: the sum of all momenta is kept up to date in O(d), not summed anew in O(n d); it drifts
    by rounding only. At a rate change no momentum correction is needed, as the rate is outside the buffers; the
    look-ahead uses the present rate for all.
    Weight decay acts at the master's point, evaluation uses theta. A worker that goes takes its momentum out of the sum;
    a worker that comes starts with none, at the present look-ahead.
    """

    apart = True
    momentum: float = 0.9
    """Nesterov momentum (gamma) of each worker, in [0, 1)."""

    def begin(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)  # S = sum_j v_j [d]

    def seat(self, x: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        return shared, torch.zeros_like(x)  # v_i [d]

    def unseat(self, shared: Tensor, mine: Tensor) -> Tensor:
        return shared - mine

    def move(self, x: Tensor, shared: Tensor, mine: Tensor, d: Tensor, lr: Number) -> tuple[Tensor, Tensor, Tensor]:
        v = axpy(self.momentum, mine, d)
        return axpy(-lr, v, x), shared + (v - mine), v

    def sends(self, x: Tensor, shared: Tensor, lr: Number) -> Tensor:
        return axpy(-lr * self.momentum, shared, x)

    def velocity(self, shared: Tensor, mine: Tensor, g: Tensor) -> Tensor:
        return mine


@dataclass(frozen=True)
class DanaDC(DanaZero):
    """DANA-Zero with delay compensation of each gradient before it enters the worker's momentum.

    Hakimi, Barkai, Gabel, Schuster. Taming Momentum in a Distributed Asynchronous Environment. arXiv:1907.11612.
    Differences from the paper: as for DANA-Zero. The distance is from theta to the look-ahead that was sent, as in the
    reference program, so even one worker is compensated and is not NAG. lambda is constant, 2 as in that program. The
    term grows with the square of the gradient: on the `Digits` task at rate 0.05, 2 converges with 8 workers on each of 5
    seeds, with and without warm-up, and with 16 where the warm-up has 200 gradients but not always where it has 100;
    where it does not, a smaller one or ``AdaptiveDelayCompensation()``, which divides by the gradient's size, is safer.
    Weight decay acts at the master's point, outside the squared gradient; evaluation uses theta.
    """

    correction: Correction = DelayCompensation(2.0)
    """How a stale gradient is corrected before the master moves."""


class SlimWorker(NamedTuple):
    x: Tensor  # parameters last received (Theta then) [d]
    step: Tensor  # the master's step when they were sent, 0-dim
    v: Tensor  # momentum (v_i) [d]
    last: Tensor  # rate of the message before, 0-dim
    u: Tensor  # the message [d]


@dataclass(frozen=True)
class DanaSlim(Master):
    """DANA-Slim: momentum at the workers, a master as cheap as plain ASGD; at a constant rate it sends DANA-Zero's points.

    Hakimi, Barkai, Gabel, Schuster. Taming Momentum in a Distributed Asynchronous Environment. arXiv:1907.11612.
    Differences from the paper: the message is u = v' + gamma (v' - (eta_last / eta) v), which is g + gamma v' while the
    rate is constant and takes back the old rate's look-ahead when it changes; so Slim equals a DANA-Zero whose look-ahead
    uses, for each worker, the rate of its own last message. (A rate of exactly 0 leaves the look-ahead uncorrected.)
    A rate is the one in force when the worker was sent its parameters, so that both ends know it.
    Weight decay acts at the worker's point, inside its gradient. Theta is itself the look-ahead and the true master point
    is nowhere known, so Theta is what is evaluated and shipped. A `Correction` acts on the message, as no gradient
    reaches the master. When a worker goes, the look-ahead of its momentum stays in Theta as a step taken.
    """

    momentum: float = 0.9
    """Nesterov momentum (gamma) of each worker, in [0, 1)."""

    # worker

    def init(self, start: tuple[Tensor, Tensor]) -> SlimWorker:  # type: ignore[override]
        x, step = start
        return SlimWorker(x, step, torch.zeros_like(x), torch.zeros_like(step), x)

    def params(self, w: SlimWorker) -> Tensor:  # type: ignore[override]
        return w.x

    def local(self, w: SlimWorker, g: Tensor) -> SlimWorker:  # type: ignore[override]
        lr = torch.zeros_like(w.last) + rate(self.lr, w.step)
        if self.weight_decay:
            g = axpy(self.weight_decay, w.x, g)
        v = axpy(self.momentum, w.v, g)
        then = torch.where(lr > 0, w.last / lr, 1.0)
        return w._replace(v=v, last=lr, u=axpy(self.momentum, v - then * w.v, v))

    def push(self, w: SlimWorker) -> Tensor:  # type: ignore[override]
        return w.u

    def pull(self, w: SlimWorker, reply: tuple[Tensor, Tensor]) -> SlimWorker:  # type: ignore[override]
        x, step = reply
        return w._replace(x=x, step=step)

    # master

    def rate_for(self, s: MasterState, own: Seat) -> Number:
        return rate(self.lr, own.at)

    def decay(self, s: MasterState) -> Number:
        return 0.0

    def reply(self, s: MasterState, sent: Tensor) -> tuple[Tensor, Tensor]:
        return sent, s.step

    def move(self, x: Tensor, shared: Any, mine: Any, d: Tensor, lr: Number) -> tuple[Tensor, Any, Any]:
        return axpy(-lr, d, x), shared, mine
