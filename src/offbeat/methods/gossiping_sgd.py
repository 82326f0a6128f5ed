"""Gossiping SGD: peers average with random others, pulling or pushing, in rounds or without ever waiting.

pull:  i draws j;      x_i <- (x_i + x_j) / 2
push:  i sends to j;   x_j <- (x_j + x_i) / 2
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from ..core.gossip import AveragingGossipMethod, PairGossipMethod, PushGossipMethod
from ..core.method import Descending
from ..core.topology import RandomPeer, RandomPull, Topology


@dataclass(frozen=True)
class PullGossip(PairGossipMethod):
    """Asynchronous pull gossip: with each step a peer fetches a random other's model as it is and goes half way.

    Jin, Yuan, Iandola, Keutzer. How to scale distributed deep learning? arXiv:1611.04581.
    Differences from the paper: its text was not at hand; the equations follow two public programs, in which the other's
    model is fetched while the gradient is computed (in a real run: when it is there), and the step is taken after that.
    Momentum stays at the peer. The mean over peers is evaluated.
    Weight decay is the rule's. The mean is conserved in expectation only. A peer that dies takes its own progress along;
    one that joins copies the model of one that lives.
    """

    def offer(self, w: Descending) -> tuple[()]:
        return ()

    def meet(self, w: Descending, msg: tuple[()]) -> tuple[Descending, Tensor]:
        return w, w.x

    def settle(self, w: Descending, reply: Tensor) -> Descending:
        return w._replace(x=0.5 * (w.x + reply))


@dataclass(frozen=True)
class PushGossip(PushGossipMethod):
    """Asynchronous push gossip: after a step a peer sends its model to a random other, which goes half way to it.

    Jin, Yuan, Iandola, Keutzer. How to scale distributed deep learning? arXiv:1611.04581.
    Differences from the paper: its text was not at hand. What has come in is merged, in order of arrival, before the next
    gradient. Momentum stays at the peer.
    Weight decay is the rule's, the mean over peers is evaluated. The mean is conserved in expectation only.
    """

    def send(self, w: Descending) -> tuple[Descending, Tensor]:
        return w, w.x

    def receive(self, w: Descending, msg: Tensor) -> Descending:
        return w._replace(x=0.5 * (w.x + msg))


@dataclass(frozen=True)
class SyncPullGossip(AveragingGossipMethod):
    """Pull gossip in rounds: all take a step, then each averages with the same round's model of one random other.

    Jin, Yuan, Iandola, Keutzer. How to scale distributed deep learning? arXiv:1611.04581.
    Differences from the paper: its text was not at hand; models are exchanged after the local step.
    Weight decay is the rule's, the mean over peers is evaluated and is conserved in expectation only.
    """

    _: KW_ONLY
    topology: Topology = RandomPull()
    """Who hears from whom in which round."""


@dataclass(frozen=True)
class SyncPushGossip(AveragingGossipMethod):
    """Push gossip in rounds: all take a step, then each sends its model to one random other and averages what it got.

    Jin, Yuan, Iandola, Keutzer. How to scale distributed deep learning? arXiv:1611.04581.
    Differences from the paper: its text was not at hand; models are exchanged after the local step, and one that gets
    several takes the plain mean of them and its own.
    Weight decay is the rule's, the mean over peers is evaluated and is conserved in expectation only.
    """

    _: KW_ONLY
    topology: Topology = RandomPeer()
    """Who sends to whom in which round."""
