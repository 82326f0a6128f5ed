"""SGP: gossip on directed graphs; each peer's share of mass is tracked, and the model is mass over weight.

x_i <- x_i - step at z_i;   send (p_ji x_i, p_ji w_i) to the out-neighbours
x_i <- sum_j p_ij x_j;   w_i <- sum_j p_ij w_j;   z_i = x_i / w_i
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..core.descent import count
from ..core.gossip import RoundGossipMethod
from ..core.topology import OnePeerExponential, Topology

Parcel = tuple[Tensor, Tensor]


class Mass(NamedTuple):
    x: Tensor  # numerator (x_i) [d]
    weight: Tensor  # push-sum weight (w_i), 0-dim
    rule: Any  # the rule's own state


@dataclass(frozen=True)
class SGP(RoundGossipMethod):
    """Stochastic gradient push: push-sum, so that any column-stochastic, time-varying, directed graph averages exactly.

    Assran, Loizou, Ballas, Rabbat. Stochastic Gradient Push for Distributed Deep Learning. ICML 2019. arXiv:1811.10792.
    Differences from the paper: any rule takes the local step, at z_i, and its move is taken off x_i; its buffers are not
    communicated. The weight is always sent, also on regular graphs where it stays 1.
    Weight decay is the rule's, at z_i: a penalty is part of the loss whose gradient is taken there. (The authors' program
    decays the numerator x_i, which is the same while w_i is 1, and less than the penalty where w_i is below.) The mean of the z_i is evaluated. The sums of x and w are conserved by mixing, mass under way
    counted. A message to a dead peer comes back to its sender; a peer that dies takes its mass along, and one that leaves in
    good order hands it to another. One that joins has weight 1 at another's z_i, out of what that one has above 1, and
    new where it has less: a step moves z_i by 1 / w_i of itself, so were the weights only divided, each crash and return
    would leave the living with less weight and larger steps. So who comes when all have gone goes on from the last one's
    z_i with weight 1, whatever was lost. A network that loses messages takes their mass for good: weights shrink, steps
    grow, and in the end it diverges; real links acknowledge, and lose none.
    """

    _: KW_ONLY
    topology: Topology = OnePeerExponential()
    """Who sends to whom in which round."""

    def init(self, start: Tensor) -> Mass:
        return Mass(start, count(start) + 1, self.rule.init(start))

    def params(self, w: Mass) -> Tensor:
        return w.x / w.weight

    def local(self, w: Mass, g: Tensor) -> Mass:
        z = self.params(w)
        rule, moved = self.rule.step(w.rule, z, g)
        return w._replace(x=w.x + (moved - z), rule=rule)

    def send(self, w: Mass, out: Mapping[int, float], keep: float) -> tuple[Mass, dict[int, Parcel]]:
        parcels = {share: (share * w.x, share * w.weight) for share in {keep, *out.values()}}  # mostly one
        x, weight = parcels[keep]
        return w._replace(x=x, weight=weight), {peer: parcels[share] for peer, share in out.items()}

    def merge(self, w: Mass, inbox: Mapping[int, Parcel], into: Mapping[int, float], own: float) -> Mass:
        for parcel in inbox.values():
            w = self.returned(w, parcel)
        return w

    def returned(self, w: Mass, msg: Parcel) -> Mass:
        x, weight = msg
        return w._replace(x=w.x + x, weight=w.weight + weight)

    def welcome(self, w: Mass) -> tuple[Mass, Mass]:
        keep = 1 - (w.weight - 1).clamp(0.0, 1.0) / w.weight
        new = self.restart(self.load(w, self.params(w)))
        return w._replace(x=keep * w.x, weight=keep * w.weight), new

    def inherit(self, w: Mass, gone: Mass) -> Mass:
        return self.returned(w, (gone.x, gone.weight))

    def share(self, w: Mass) -> Parcel:
        return w.x, w.weight

    def average(self, mean: Parcel) -> Tensor:
        x, weight = mean
        return x / weight

    def load(self, w: Mass, x: Tensor) -> Mass:
        return w._replace(x=x, weight=w.weight * 0 + 1)

    def shift(self, w: Mass, x: Tensor) -> Mass:
        return w._replace(x=w.weight * x)


@dataclass(frozen=True)
class OSGP(SGP):
    """Overlap SGP: a round's messages are taken one step late, so that sending them costs no waiting.

    Assran, Loizou, Ballas, Rabbat. Stochastic Gradient Push for Distributed Deep Learning. ICML 2019. arXiv:1811.10792.
    Differences from the paper: as for SGP; messages are exactly one step late, never more. While half of its mass is
    under way a peer's weight is below 1, so its own steps move z_i further; the mean is not affected. Before an exact
    average (SlowMo) what is under way is taken in.
    Weight decay is the rule's, at z_i as for SGP; it matters here, as w_i is about 1 / 2 while messages are under way. The mean of the z_i is evaluated.
    """

    overlaps = True
