"""All-reduce: synchronous SGD, the baseline of everything.

every step:  g <- mean_i g_i by all-reduce;   all take the same step of the rule with g
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor

from ..core.method import Message, RuleMethod
from ..core.periodic import PeriodicMethod


class Replica(NamedTuple):
    x: Tensor  # parameters, the same at all peers [d]
    rule: Any  # the rule's own state, the same at all peers
    g: Tensor  # gradient of the step [d]


@dataclass(frozen=True)
class AllReduce(RuleMethod, PeriodicMethod):
    """Synchronous data parallelism: the mean of all gradients, then one step of any rule; n peers are one with n times
    the batch.

    Jin, Yuan, Iandola, Keutzer. How to scale distributed deep learning? arXiv:1611.04581.
    Differences from the paper: gradients are averaged, and then any rule is applied; the paper averages momentum steps,
    which for SGD is the same. The mean model is evaluated (all are equal).
    Weight decay is the rule's. A peer that dies is left out of the mean from then on and takes nothing along; one that
    joins gets a peer's whole state at the next step, buffers included. Batch normalisation, if any, is per peer.
    """

    def init(self, start: Tensor) -> Replica:
        return Replica(start, self.rule.init(start), start)

    def local(self, w: Replica, g: Tensor) -> Replica:
        return w._replace(g=g)

    def moved(self, w: Replica, x: Tensor, begins: bool) -> None:
        return None  # nothing would bring the peers together again: only gradients are averaged

    def contribute(self, w: Replica) -> Tensor:
        return w.g

    def absorb(self, w: Replica, mean: Message | None) -> Replica:
        rule, x = self.rule.step(w.rule, w.x, cast(Tensor, mean))
        return Replica(x, rule, w.g)
