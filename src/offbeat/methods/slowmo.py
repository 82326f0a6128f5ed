"""SlowMo: after every block of local or gossip steps and an exact average, a step of slow momentum.

x_tau <- mean_i x_i                                   after tau steps from x_0 at the rate gamma
u     <- beta u + (x_0 - x_tau) / gamma
x_0   <- x_0 - alpha gamma u;   all go on from x_0

The last line is x_0 - alpha (gamma beta u + x_0 - x_tau) with the old u, and that is how it is computed: what the block
has moved is never divided by gamma and multiplied with it again, and a block at gamma = 0 needs no exception there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..core.descent import axpy
from ..core.method import Message
from ..core.periodic import Nested, OuterMethod
from ..core.values import require


class Slow(NamedTuple):
    x: Tensor  # where the block began (x_0) [d]
    u: Tensor  # slow momentum, in units of a gradient [d]
    steps: Tensor  # inner steps taken by then, 0-dim
    rates: Tensor  # sum of their rates, 0-dim


@dataclass(frozen=True)
class SlowMo(OuterMethod, name="slowmo"):
    """Slow momentum over any sound base: Local (SGD, Adam), SGP, OSGP, D-PSGD, all-reduce, or another periodic method.

    Wang, Tantia, Ballas, Rabbat. SlowMo: Improving Communication-Efficient Distributed SGD with Slow Momentum. ICLR
    2020. arXiv:1910.00643 (alg. 1). With alpha = 1, beta = 0 it is the base plus averaging, with one worker, beta = 0 and
    alpha < 1 it is Lookahead (arXiv:1907.08610), with base SGD it is `BMUF` while the rate is constant: both with
    ``buffering="maintain"``, as public programs of those two keep the momentum over a block's end by default.
    Differences from the paper: gamma is the mean of the inner rates of the block's steps, which is the paper's gamma
    where the rate is constant. A schedule may so change it inside a block, and a warm-up that starts near 0 is safe: with
    the first step's rate u would be the block's move over next to nothing, and the next block, at a proper rate, would
    throw everybody far off. A block whose rates are all 0 moves nobody and adds nothing to u. Buffers are emptied at each
    average unless ``buffering`` says otherwise, as the paper does for SGD bases; for Adam it keeps them: say
    ``SlowMo(Local(Adam()), buffering="maintain")``, as an emptied second moment makes the first steps of a block as
    long as the rate in each coordinate.
    Weight decay is the base's, the mean over peers is evaluated. u and x_0 are the same at all peers; one that joins gets
    them, and empty buffers; one that dies takes its steps since the last average along.
    """

    alpha: float = 1.0
    """Slow learning rate, above 0."""
    beta: float = 0.6
    """Slow momentum, in [0, 1); the paper's best are mostly 0.4 to 0.8, rising with the number of nodes."""
    buffering: Literal["maintain", "reset", "average"] = "reset"
    """What an average does to the inner rule's buffers (momentum): keep them, empty them, or average them too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "alpha", 0 < self.alpha < math.inf, "must be a finite number above 0")
        require(self, "beta", 0 <= self.beta < 1, "must be in [0, 1)")

    def begin(self, x: Tensor, inner: Any) -> Slow:
        return Slow(x, torch.zeros_like(x), *self.inner.pace(inner))

    def outer(self, slow: Slow, inner: Any, x: Tensor) -> tuple[Slow, Tensor]:
        steps, rates = self.inner.pace(inner)
        gamma, moved = (rates - slow.rates) / (steps - slow.steps).clamp(min=1.0), slow.x - x
        x = axpy(-self.alpha, axpy(gamma * self.beta, slow.u, moved), slow.x)
        u = axpy(torch.where(gamma > 0, 1 / gamma, 0.0), moved, self.beta * slow.u)
        return Slow(x, u, steps, rates), x

    def reseat(self, slow: Slow, x: Tensor) -> Slow:
        return slow._replace(x=x)


@dataclass(frozen=True)
class SlowMoNoAverage(SlowMo, name="slowmo-no-average"):
    """SlowMo without the exact average: every peer takes the slow step on its own, only the base's gossip mixes.

    Wang, Tantia, Ballas, Rabbat. SlowMo. ICLR 2020. arXiv:1910.00643 (SGP-SlowMo-noaverage: line 6 of alg. 1 is left
    out). Meant for a gossip base; over `Local` the peers never talk.
    Differences from the paper: as for SlowMo; u and x_0 now differ from peer to peer, and mass under way to a peer of an
    overlapping base is taken in before the slow step. Over push-sum (SGP, OSGP) x_tau is z_i, the mass is put where the
    slow step ends, and the weight w_i stays as it is: on a graph that is not doubly stochastic too, alpha = 1 and beta = 0
    is the base itself, but for its buffers and, where messages overlap, for those taken in early. (After an exact average
    all weights are 1 again; without one that would make mass out of nothing.) In a block at rate 0 the base mixes on.
    Weight decay is the base's, the mean over peers is evaluated. One that joins starts as the base's newcomers do, with
    another's u and x_0; one that leaves takes its mass along.
    """

    def contribute(self, w: Nested) -> Message | None:
        return None

    def welcome(self, w: Nested) -> tuple[Nested, Nested]:
        mine, theirs = self.inner.welcome(w.inner)
        return w._replace(inner=mine), w._replace(inner=self.inner.restart(theirs))
