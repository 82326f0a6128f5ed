"""Gossip: peers that talk to a few others, no server. Three kinds, told apart by who waits for whom.

A peer descends by its own `Rule` and mixes its model with others' over a `Topology`. Momentum and other buffers stay at
the peer. Elastic membership: a peer that dies leaves the topology from the next round on; one that joins starts from a
living peer's model (`welcome`), with fresh buffers; one that leaves may hand over what must not be lost (`inherit`).
When all have gone, those who come start from the last one's model by `welcome` too, and what else it had may be lost.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from torch import Tensor

from .descent import axpy
from .method import Descending, Message, RuleMethod
from .topology import RandomPeer, Topology
from .values import require_count, require_kind


@dataclass(frozen=True)
class GossipMethod(RuleMethod):
    """A peer that descends by ``rule`` and talks every ``period`` steps to its neighbours in ``topology``."""

    _: KW_ONLY
    topology: Topology = RandomPeer()
    """Who talks to whom in which round."""
    period: int = 1
    """Local steps between two rounds of talk, at least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_kind(self, "topology", Topology, "Ring()")
        require_count(self, "period")

    def check(self, n: int) -> None:
        self.topology.check(n)

    def talks(self, step: int, draw: float) -> bool:
        """Whether the peer talks in its step number ``step``; ``draw`` is a fresh even draw from [0, 1)."""
        return (step + 1) % self.period == 0

    def welcome(self, w: Any) -> tuple[Any, Any]:
        """A peer joins at the peer with state ``w``: that one's state afterwards, and the newcomer's."""
        return w, self.restart(w)

    def inherit(self, w: Any, gone: Any) -> Any:
        """The peer with state ``w`` takes over from one that has left in good order, with state ``gone``."""
        return w

    def returned(self, w: Any, msg: Message) -> Any:
        """A message could not be delivered, its receiver being dead: the state with what must not be lost."""
        return w


@dataclass(frozen=True)
class RoundGossipMethod(GossipMethod):
    """All peers go in rounds: each sends to its neighbours of the round, and waits for those who send to it.

    A round's weights come from both sides: ``out`` and ``keep`` are the shares of this peer's mass (they sum to 1),
    ``into`` and ``own`` the weights of what it averages (they sum to 1). A method uses the one or the other; where the
    topology is doubly stochastic they agree. A neighbour that died in the middle of a round is missing in ``inbox``.
    """

    overlaps: ClassVar[bool] = False
    """Whether a round's messages are taken one step late, so that nobody waits for a transfer."""

    @abstractmethod
    def send(self, w: Any, out: Mapping[int, float], keep: float) -> tuple[Any, dict[int, Message]]:
        """What stays with the peer, and the message for each neighbour."""

    @abstractmethod
    def merge(self, w: Any, inbox: Mapping[int, Message], into: Mapping[int, float], own: float) -> Any:
        """The peer's state with the messages of one round mixed in."""


@dataclass(frozen=True)
class AveragingGossipMethod(RoundGossipMethod):
    """Rounds in which a peer takes the weighted mean of its own and the received models."""

    def send(self, w: Descending, out: Mapping[int, float], keep: float) -> tuple[Descending, dict[int, Tensor]]:
        return w, dict.fromkeys(out, w.x)

    def merge(self, w: Descending, inbox: Mapping[int, Tensor], into: Mapping[int, float], own: float) -> Descending:
        if not inbox:
            return w
        total = own + sum(into[peer] for peer in inbox)  # below 1 where a neighbour has died in this round
        x = own / total * w.x
        for peer, theirs in inbox.items():
            x = axpy(into[peer] / total, theirs, x)
        return w._replace(x=x)


@dataclass(frozen=True)
class PushGossipMethod(GossipMethod):
    """Peers push to each other and never wait. In each step: what has come in is merged, a gradient moves, a push goes out."""

    @abstractmethod
    def send(self, w: Any) -> tuple[Any, Message]:
        """What stays with the peer, and the message for one neighbour."""

    @abstractmethod
    def receive(self, w: Any, msg: Message) -> Any:
        """The peer's state with one message merged in."""


@dataclass(frozen=True)
class PairGossipMethod(GossipMethod):
    """A peer visits one other while its own gradient is computed, which is then applied where the visit has led it.

    The visit is atomic at the visited, who goes on with its own gradient. One that leaves in good order visits once more,
    so that others have a part in what it did since its last visit.
    """

    @abstractmethod
    def offer(self, w: Any) -> Message:
        """What the visitor brings."""

    @abstractmethod
    def meet(self, w: Any, msg: Message) -> tuple[Any, Message]:
        """The visited peer's state afterwards, and what the visitor takes home."""

    @abstractmethod
    def settle(self, w: Any, reply: Message) -> Any:
        """The visitor's state once it is back; it may itself have been visited meanwhile."""

    def inherit(self, w: Any, gone: Any) -> Any:
        return self.meet(w, self.offer(gone))[0]
