"""Gap-Aware: a gradient counts less by how far the parameters have moved since they were sent, in average steps.

R <- G R + (1 - G) v^2;   k <- k + 1
C  = eta_max (sqrt(R / (1 - G^k)) + eps)          how far a parameter travels in one step
P  = 1 + |theta - w_i| / C                        elementwise, or one number: norms for |.|, and C = eta_max E|v|
d  = (g + wd theta) / P                           then the mover goes on with d
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.descent import count
from ..core.master import Correction, Number, Stale
from ..core.values import require
from .asgd import ASGD
from .async_adam import AsyncAdam
from .dana import DanaZero


class Travel(NamedTuple):
    square: Tensor  # running mean of squared steps (R) [d]
    updates: Tensor  # how many entered it (k), 0-dim
    largest: Tensor  # largest rate seen so far (eta_max), 0-dim


def enters(decay: float, visits: Tensor, stale: Stale) -> tuple[Number, Number]:
    """What a running mean keeps at this visit, and how many steps enter it: 1 and 0 where a worker with a velocity of its
    own comes for the first time, as that is 0 and no step that was taken; else ``decay`` and 1."""
    if not stale.apart:
        return decay, 1.0
    return torch.where(visits > 0, torch.full_like(visits, decay), 1.0), visits.clamp(max=1.0)


@dataclass(frozen=True)
class GapPenalty(Correction):
    """Divide gradient and weight decay by 1 + gap / C, elementwise, C in steps *without* rate, times the largest rate.

    Barkai, Hakimi, Schuster. Gap-Aware Mitigation of Gradient Staleness. ICLR 2020. arXiv:1909.10802.
    R is one vector for all workers, fed at each visit with the velocity of the visitor before the visit (its own
    momentum where it has one, the gradient where the mover keeps no momentum). P is 1 wherever nothing has moved yet.
    A worker's own momentum enters from its second visit on: before that it is no step, and zeros of all workers in the
    mean would make a usual step too short, and P too large, by sqrt(workers + 1) at the start.
    """

    compares = True
    decay: float | None = 0.999
    """Decay of the running mean of squared steps (G), in [0, 1); None: the mover's own (beta2 of Adam), else 0.999."""
    eps: float = 1e-8
    """Added to the root, above 0."""

    def __post_init__(self) -> None:
        require(self, "decay", self.decay is None or 0 <= self.decay < 1, "must be in [0, 1), or None")
        require(self, "eps", self.eps > 0, "must be above 0")

    def begin(self, x: Tensor) -> Travel:
        return Travel(torch.zeros_like(x), count(x), count(x))

    def seat(self, memory: Travel, x: Tensor) -> Tensor:
        return count(x)

    def travel(self, t: Travel, mine: Tensor, stale: Stale) -> tuple[Travel, Tensor]:
        """The memory after this visit, and how far each parameter is expected to move in one update (C). [d]"""
        decay, v = stale.fading if self.decay is None else self.decay, stale.velocity()
        kept, entered = enters(decay, mine, stale)
        t = Travel(kept * t.square + (1 - decay) * v * v, t.updates + entered, t.largest.clamp(min=stale.lr))
        return t, t.largest * ((t.square / (1 - decay ** t.updates.clamp(min=1.0))).sqrt() + self.eps)

    def correct(self, memory: Travel, mine: Tensor, stale: Stale) -> tuple[Tensor, Travel, Tensor]:
        memory, step = self.travel(memory, mine, stale)
        gap = (stale.x - stale.sent).abs()
        penalty = torch.where(memory.square > 0, 1 + gap / step, 1.0)  # at the first steps C is 0 and means nothing
        return (stale.g + stale.decay) / penalty, memory, mine + 1


@dataclass(frozen=True)
class AppliedGapPenalty(GapPenalty):
    """The Adam form: C is the root of the running mean of squared *applied* steps, rate included, no bias correction.

    Barkai, Hakimi, Schuster. ICLR 2020. arXiv:1909.10802; as their group's later pipeline code does it for Adam, where the
    mean fades as Adam's second moment does. The step of visit t enters at visit t + 1.
    """

    decay: float | None = None
    """Decay of the running mean of squared steps (G), in [0, 1); None: the mover's own (beta2 of Adam), else 0.999."""

    def travel(self, t: Travel, mine: Tensor, stale: Stale) -> tuple[Travel, Tensor]:
        decay = stale.fading if self.decay is None else self.decay
        applied = t.largest * stale.velocity()  # `largest` holds the rate of the visit before, which made this step
        square = decay * t.square + (1 - decay) * applied * applied
        return Travel(square, t.updates + 1, torch.zeros_like(t.largest) + stale.lr), square.sqrt() + self.eps


class Stride(NamedTuple):
    length: Tensor  # running mean of the norm of a step, before the rate, 0-dim
    updates: Tensor  # how many entered it (k), 0-dim
    largest: Tensor  # largest rate seen so far (eta_max), 0-dim


@dataclass(frozen=True)
class GlobalGapPenalty(Correction):
    """Divide gradient and weight decay by one number for the whole model: 1 + |theta - w_i| / (eta_max E|v|), Euclidean norms.

    Barkai, Hakimi, Schuster. Gap-Aware Mitigation of Gradient Staleness. ICLR 2020. arXiv:1909.10802: the form in which
    the gap is introduced, RMSE over average RMSE of a step; the number of parameters cancels. No vector is kept but what
    was sent. v is as for `GapPenalty`, its mean is a running one, bias corrected, and P is 1 until a step was seen.
    """

    compares = True
    decay: float = 0.999
    """Decay of the running mean of step lengths (G), in [0, 1)."""

    def __post_init__(self) -> None:
        require(self, "decay", 0 <= self.decay < 1, "must be in [0, 1)")

    def begin(self, x: Tensor) -> Stride:
        return Stride(count(x), count(x), count(x))

    def seat(self, memory: Stride, x: Tensor) -> Tensor:
        return count(x)

    def sums(self, memory: Stride, mine: Tensor, stale: Stale) -> tuple[Tensor, Tensor]:
        gap, v = (stale.x - stale.sent).double(), stale.velocity().double()
        return (gap * gap).sum(), (v * v).sum()

    def correct(self, memory: Stride, mine: Tensor, stale: Stale) -> tuple[Tensor, Stride, Tensor]:
        gap, length = (total.sqrt() for total in stale.sums)
        kept, entered = enters(self.decay, mine, stale)
        length = kept * memory.length + (1 - self.decay) * length
        t = Stride(length, memory.updates + entered, memory.largest.clamp(min=stale.lr))
        step = t.largest * t.length / (1 - self.decay ** t.updates.clamp(min=1.0))
        penalty = torch.where(step > 0, 1 + gap / step, 1.0)
        return (stale.g + stale.decay) / penalty, t, mine + 1


@dataclass(frozen=True)
class GapAware(ASGD):
    """Gap-Aware on ASGD with momentum at the master.

    Barkai, Hakimi, Schuster. Gap-Aware Mitigation of Gradient Staleness. ICLR 2020. arXiv:1909.10802.
    Differences from the paper: its text was not at hand; the form follows the authors' later public code (parameter-wise
    penalty, largest rate so far, weight decay penalised too), and its skipped first update is generalised to P = 1
    wherever no step has been seen yet. With a warm-up the largest rate still grows, so P is larger early.
    Evaluation uses theta. A copy of what was sent is kept for each worker; a worker that goes takes only that with it.
    """

    momentum: float = 0.9
    """Heavy-ball momentum (gamma) at the master, in [0, 1)."""
    correction: Correction = GapPenalty()
    """How a stale gradient is corrected before the master moves."""


@dataclass(frozen=True)
class GapAwareAdam(AsyncAdam):
    """Gap-Aware before Adam at the master, the penalty in units of Adam's applied steps.

    Barkai, Hakimi, Schuster. Gap-Aware Mitigation of Gradient Staleness. ICLR 2020. arXiv:1909.10802.
    Differences from the paper: its Adam variant was not at hand; the form follows the authors' later public code, where
    R fades with Adam's beta2 and gets the step of each visit at the next one. The penalty comes before Adam's
    normalisation and shrinks the second moment too, so part of its effect cancels.
    Weight decay is penalised too, evaluation uses theta. A copy of what was sent is kept for each worker.
    """

    correction: Correction = AppliedGapPenalty()
    """How a stale gradient is corrected before the master moves."""


@dataclass(frozen=True)
class DanaGA(DanaZero):
    """DANA-Zero with the Gap-Aware penalty on each gradient: the most robust of its family.

    Barkai, Hakimi, Schuster. Gap-Aware Mitigation of Gradient Staleness. ICLR 2020. arXiv:1909.10802.
    Differences from the paper: the combination's equations were not at hand. The gap is measured from the master theta
    to the look-ahead that was sent, so with one worker it is eta gamma |v| and not 0: DANA-GA with one worker is not NAG.
    R is fed with the momentum v_i of the visitor, from its second visit on: what is fed at the first ones are zeros, which
    are no steps. Weight decay acts at theta and is penalised, evaluation uses theta.
    """

    correction: Correction = GapPenalty()
    """How a stale gradient is corrected before the master moves."""
