"""SlowMo: after every block of local or gossip steps and an exact average, a step of slow momentum.

x_tau <- mean_i x_i                                   after tau steps from x_0 at the block's rate gamma
u     <- beta u + (x_0 - x_tau) / gamma
x_0   <- x_0 - alpha gamma u;   all go on from x_0
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..core.method import Message
from ..core.periodic import Nested, OuterMethod
from ..core.values import require


class Slow(NamedTuple):
    x: Tensor  # where the block began (x_0) [d]
    u: Tensor  # slow momentum, in units of a gradient [d]
    lr: Tensor  # the inner rate when the block began (gamma), 0-dim


@dataclass(frozen=True)
class SlowMo(OuterMethod, name="slowmo"):
    """Slow momentum over any sound base: Local (SGD, Adam), SGP, OSGP, D-PSGD, all-reduce, or another periodic method.

    Wang, Tantia, Ballas, Rabbat. SlowMo: Improving Communication-Efficient Distributed SGD with Slow Momentum. ICLR
    2020. arXiv:1910.00643 (alg. 1). With alpha = 1, beta = 0 it is the base plus averaging, with one worker, beta = 0 and
    alpha < 1 it is Lookahead (arXiv:1907.08610), with alpha = 1 and base SGD it is `BMUF` while the rate is constant.
    Differences from the paper: gamma is the inner rate at the block's first step, in both places, also where a schedule
    changes it inside the block. A block whose rate is 0 adds nothing to u. Buffers are emptied at each average, as the
    paper does for SGD bases; it maintains them for Adam.
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
        return Slow(x, torch.zeros_like(x), self.gamma(x, inner))

    def gamma(self, x: Tensor, inner: Any) -> Tensor:
        """The inner rate of the block that begins now, 0-dim float64."""
        return torch.zeros((), dtype=torch.float64, device=x.device) + self.inner.rate(inner)

    def outer(self, slow: Slow, inner: Any, x: Tensor) -> tuple[Slow, Tensor]:
        u = self.beta * slow.u + torch.where(slow.lr > 0, 1 / slow.lr, 0.0) * (slow.x - x)
        x = slow.x - self.alpha * slow.lr * u
        return Slow(x, u, self.gamma(x, inner)), x

    def reseat(self, slow: Slow, x: Tensor) -> Slow:
        return slow._replace(x=x)


@dataclass(frozen=True)
class SlowMoNoAverage(SlowMo, name="slowmo-no-average"):
    """SlowMo without the exact average: every peer takes the slow step on its own, only the base's gossip mixes.

    Wang, Tantia, Ballas, Rabbat. SlowMo. ICLR 2020. arXiv:1910.00643 (SGP-SlowMo-noaverage: line 6 of alg. 1 is left
    out). Meant for a gossip base; over `Local` the peers never talk.
    Differences from the paper: as for SlowMo; u and x_0 now differ from peer to peer, and mass under way to a peer of an
    overlapping base is taken in before the slow step.
    Weight decay is the base's, the mean over peers is evaluated.
    """

    def contribute(self, w: Nested) -> Message | None:
        return None
