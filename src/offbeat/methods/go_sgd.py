"""GoSGD: push gossip with weights; a peer gives away half of its weight with its model.

each that has come:  x_j <- (w_j x_j + w_i x_i) / (w_j + w_i);   w_j <- w_j + w_i
a local step;        then with probability p:  w_i <- w_i / 2;  send (x_i, w_i) to a random j
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..core.descent import count
from ..core.gossip import PushGossipMethod
from ..core.values import require

Parcel = tuple[Tensor, Tensor]


class Weighed(NamedTuple):
    x: Tensor  # model (x_i) [d]
    weight: Tensor  # gossip weight (w_i), 0-dim
    rule: Any  # the rule's own state


def half(weight: Tensor) -> Tensor:
    """Half of a weight, far from where it would be rounded to 0."""
    return (0.5 * weight).clamp(min=2.0**-500)


@dataclass(frozen=True)
class GoSGD(PushGossipMethod, name="go-sgd"):
    """Gossip SGD with sum-weights: asynchronous push-sum, exchanging with probability p after each step.

    Blot, Picard, Cord, Thome. Gossip training for deep learning. arXiv:1611.09726.
    Differences from the paper: weights start at 1 and not at 1/n, which changes no average; any rule takes the local step.
    Weight decay is the rule's, the plain mean over peers is evaluated. The weighted sum of models and the sum of weights are
    conserved by exchanges, mass under way counted; a message to a dead peer comes back, one that leaves in good order
    hands its weight on, and one that joins gets half of another's weight. Who comes when all have gone goes on from the
    last one's model with half, a quarter, ... of its weight: only ratios of weights count, the local steps know none.
    No halving goes below 2**-500, so that however many have crashed all weights stay above 0.
    """

    _: KW_ONLY
    probability: float = 0.5
    """Probability of a push after a step (p), in (0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "probability", 0 < self.probability <= 1, "must be in (0, 1]")

    def talks(self, step: int, draw: float) -> bool:
        return super().talks(step, draw) and draw < self.probability

    def init(self, start: Tensor) -> Weighed:
        return Weighed(start, count(start) + 1, self.rule.init(start))

    def send(self, w: Weighed) -> tuple[Weighed, Parcel]:
        w = w._replace(weight=half(w.weight))
        return w, (w.x, w.weight)

    def receive(self, w: Weighed, msg: Parcel) -> Weighed:
        x, weight = msg
        total = w.weight + weight
        return w._replace(x=w.weight / total * w.x + weight / total * x, weight=total)

    def returned(self, w: Weighed, msg: Parcel) -> Weighed:
        return self.receive(w, msg)

    def welcome(self, w: Weighed) -> tuple[Weighed, Weighed]:
        w = w._replace(weight=half(w.weight))
        return w, w._replace(rule=self.rule.restart(w.rule))

    def inherit(self, w: Weighed, gone: Weighed) -> Weighed:
        return self.receive(w, (gone.x, gone.weight))
