"""AD-PSGD: a peer averages with one neighbour while its gradient is being computed; pairs are atomic.

g = gradient at x_i;   meanwhile i visits j:  d = (x_j - x_i) / 2;   x_j <- x_j - d;   x_i <- x_i + d
x_i <- x_i - eta g
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.gossip import PairGossipMethod
from ..core.method import Descending


@dataclass(frozen=True)
class ADPSGD(PairGossipMethod, name="ad-psgd"):
    """Asynchronous decentralised parallel SGD: nobody waits for a round, and the mean is conserved exactly.

    Lian, Zhang, Zhang, Liu. Asynchronous Decentralized Parallel Stochastic Gradient Descent. ICML 2018. arXiv:1710.06952.
    Differences from the paper: a visit moves both by the same difference, so the sum of the two stays the same also
    when one of them has moved while the answer was under way. No bipartite graph is needed, as a peer answers visits at
    any time. Its own visit and those of others during a gradient change the point to which it is then applied, as in the
    paper. In the simulator the visit costs no time while the gradient takes longer; in a real run a peer visits when its
    gradient is there, with the same arithmetic, and the time of the visit is added to the gradient's.
    Weight decay is the rule's, at the point of application (a user's own optimizer decays where the gradient was taken); the mean over peers is evaluated. A peer that dies takes its own
    progress along, and never half a visit; one that leaves in good order visits once more; one that joins copies the model
    of one that lives, which moves the mean.
    """

    def offer(self, w: Descending) -> Tensor:
        return w.x

    def meet(self, w: Descending, msg: Tensor) -> tuple[Descending, Tensor]:
        d = 0.5 * (w.x - msg)
        return w._replace(x=w.x - d), d

    def settle(self, w: Descending, reply: Tensor) -> Descending:
        return w._replace(x=w.x + reply)
