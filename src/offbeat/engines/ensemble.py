"""The run as a whole: what model it has, who belongs to it, and how far a worker's point is from it.

`Centre` is a run with a server, `Peers` one without. Both are exact about membership: who is in, from which round on,
and what a newcomer starts from.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..core.gossip import GossipMethod
from ..core.membership import Membership, membership
from ..core.method import Message, Method, ServerMethod
from ..core.protocol import SERVER, Node
from ..core.server import Handler, ParameterServer
from .kernel import LARGE, Visits

SAMPLE = 4096
"""About how many parameters, evenly spaced, the normalised gap is a mean over; of models up to four times as large all."""


class Travel:
    """How far parameters move in one update of the model: root of a running mean of squares.

    In the mean an update weighs ``decay`` times what the next one does: here the next one's weight grows, as to let all
    those before fade would be one more pass. The root is taken anew once 5 % of all weights are new.
    """

    decay, heavy, news = 0.99, 1e6, 1.05

    def __init__(self, x: Tensor) -> None:
        self.stride = _stride(x.numel())
        self.root = x.numel() ** 0.5
        self.last, self.sampled = x, x[:: self.stride]
        self.least = torch.finfo(x.dtype).tiny  # so that 0 / 0 is 0
        self.squares = torch.full_like(self.sampled, self.least)  # weighted sum
        self.difference, self.step = torch.empty_like(x), torch.empty_like(self.squares)  # memory for the last ones
        self.inverse = self.squares.rsqrt()  # of its root
        self.next, self.weights = 1.0, 0.0
        self.scale, self.due = 0.0, 0.0  # root of the weights that the inverse is of; at which it is taken anew

    def gaps(self, x: Tensor, point: Tensor) -> tuple[float, float]:
        """The gap between the model ``x`` and ``point``: RMSE, and mean in units of each parameter's usual update."""
        if x is point:
            return 0.0, 0.0
        difference = torch.sub(x, point, out=self.difference)
        rmse = float(torch.linalg.vector_norm(difference)) / self.root
        if not self.weights or not rmse:
            return rmse, 0.0
        sampled = difference if self.stride == 1 else difference[:: self.stride]
        total = float((sampled * self.inverse).abs_().sum())  # a dot product would wake a thread
        return rmse, total / len(sampled) * self.scale

    def moved(self, x: Tensor) -> None:
        """The model is now at ``x``."""
        if x is not self.last:
            sampled = x if self.stride == 1 else x[:: self.stride].clone()
            step = torch.sub(sampled, self.sampled, out=self.step)
            self.squares.addcmul_(step, step, value=self.next)
            self.weights += self.next
            if self.weights > self.due:
                torch.rsqrt(self.squares, out=self.inverse)
                self.scale, self.due = self.weights**0.5, self.weights * self.news
            self.next /= self.decay
            self.last, self.sampled = x, sampled
            if self.next > self.heavy:
                self.squares.div_(self.next).clamp_(min=self.least)
                self.weights, self.due, self.next = self.weights / self.next, self.due / self.next, 1.0


def _stride(d: int) -> int:
    """How far sampled parameters are apart: an odd prime, so that they are of all rows and columns of a layer.

    Where few would be left out it is 1: what is in one piece is read four times as fast.
    """
    stride = max(3, math.ceil(d / SAMPLE))
    while any(stride % k == 0 for k in range(2, math.isqrt(stride) + 1)):
        stride += 1
    return stride if d > 4 * SAMPLE else 1


class Ensemble(ABC):
    """The model that a run as a whole has, and its members."""

    def __init__(self, x0: Tensor) -> None:
        self.travel = Travel(x0)

    @abstractmethod
    def x(self) -> Tensor:
        """The model that would be shipped now. [d]"""

    def mean(self) -> Tensor:
        """`x`, cheaply and to rounding: what gaps are measured to. [d]"""
        return self.x()

    def begin(self, nodes: list[Node]) -> None:
        """The first members, at the start."""
        for node in nodes:
            self.enter(node)

    @abstractmethod
    def enter(self, node: Node) -> int | None:
        """A node comes: the node that it has its start from (itself: from nobody), or None where it waits for a round."""

    @abstractmethod
    def leave(self, node: Node, orderly: bool) -> dict[int, Message]:
        """A node has gone; in good order it hands over what it can. Returns replies that this lets out, by node."""

    def arrivals(self, node: Node | None) -> list[Node]:
        """Newcomers ready to start: who waited for the round that ``node`` begins; None: who waited for the dead."""
        return []

    def changed(self, node: Node) -> None:
        """The node's state may have changed."""

    def lag(self, node: Node) -> int:
        """Updates of the server since the node's last reply; 0 where there is no server."""
        return 0

    def measure(self, node: Node, push: Message | None) -> dict[str, float]:
        """Further figures for the trace; ``push`` is what the node is about to bring to the server, if it is."""
        return {}


class Centre(Ensemble):
    """A run with a server: the model is the server's point.

    A visit's results are not checked: a simulation checks each gradient that is taken at them, and shows how a run diverges.
    """

    def __init__(self, method: ServerMethod, x0: Tensor) -> None:
        super().__init__(x0)

        def handler(method: ServerMethod) -> Handler:
            return (
                Visits(method, x0).exact if len(x0) >= LARGE else method.serve
            )  # blocks gain nothing for a small model

        self.server = ParameterServer.start(method, x0, handler)

    def x(self) -> Tensor:
        return self.server.x()

    def enter(self, node: Node) -> int | None:
        node.state = node.method.init(self.server.join(node.id))
        return SERVER

    def leave(self, node: Node, orderly: bool) -> dict[int, Message]:
        return self.server.leave(node.id)

    def lag(self, node: Node) -> int:
        return self.server.lag(node.id)

    def measure(self, node: Node, push: Message | None) -> dict[str, float]:
        return {} if push is None else self.server.figures(node.id, push)


class Peers(Ensemble):
    """A run without a server: the model is the mean of the peers' models.

    Who takes part in which round is `Membership`'s; a member that has died is answered for by the engine in rounds that were
    asked about before. A newcomer has its state at once: from its donor, from the first peer to begin the round that it has
    waited for, or from the last one to go, where nobody is left.
    """

    def __init__(self, method: Method, x0: Tensor, seed: int) -> None:
        super().__init__(x0)
        self.method = method
        self.x0 = x0
        self.seed = seed
        self.membership: Membership[Node] = membership(method)
        self.last: Node | None = None  # the last to go, when nobody was left
        self.revived: list[Node] = []  # newcomers that took over then
        self.models: dict[int, Tensor] = {}
        self.squares: dict[int, float] = {}  # squared lengths of the models, and their sum
        self.squared = 0.0
        self.total = torch.zeros_like(x0, dtype=torch.float64)
        self.middle: Tensor | None = None  # their mean, once it has been asked for

    @property
    def nodes(self) -> dict[int, Node]:
        """Who takes part now."""
        return self.membership.here

    def x(self) -> Tensor:
        nodes = self.nodes.values() or [n for n in (self.last,) if n]
        return torch.stack([self.method.params(node.state) for node in nodes]).mean(0)

    def begin(self, nodes: list[Node]) -> None:
        self.membership.found(nodes)
        for node in nodes:
            self._seat(node, self.method.init(self.x0))

    def enter(self, node: Node) -> int | None:
        if not self.nodes:
            self._revive([node])
            return node.id
        donor = self.membership.enter(node)
        if donor is None:
            return None
        self.membership.begin(node.id, donor.step)
        self._join(node, donor)
        return donor.id

    def arrivals(self, node: Node | None) -> list[Node]:
        if node is None:
            ready, self.revived = self.revived, []
            return ready
        ready = self.membership.begin(node.id, node.step)
        for new in ready:
            self._join(new, node)
        return ready

    def leave(self, node: Node, orderly: bool) -> dict[int, Message]:
        was = node.id in self.nodes
        left = self.membership.leave(node.id)
        if was:
            self._count(node, None)
            heir = self.membership.heir()
            if heir is None:
                self.last, self.revived = node, left
                self._revive(left)
            elif orderly and isinstance(self.method, GossipMethod):
                heir.state = self.method.inherit(heir.state, node.state)
                self.changed(heir)
        return {}

    def changed(self, node: Node) -> None:
        new = self.method.params(node.state)
        if new is not self.models[node.id]:
            self._count(node, new)

    def measure(self, node: Node, push: Message | None) -> dict[str, float]:
        """``consensus``: the RMSE of the peers' parameters to their mean."""
        mean = self._middle()
        variance = self.squared / len(self.nodes) - float(mean.dot(mean))
        return {"consensus": max(0.0, variance / mean.numel()) ** 0.5}

    def mean(self) -> Tensor:
        """The mean of the peers' models, kept up to date at the cost of a few vectors per change. [d]"""
        return self._middle().to(self.x0.dtype)

    def _middle(self) -> Tensor:
        """The same in double precision. [d]"""
        if self.middle is None:
            self.middle = self.total / len(self.nodes)
        return self.middle

    def _count(self, node: Node, x: Tensor | None) -> None:
        """The node's model is ``x`` now; None: it is none of ours any more."""
        old = self.models.pop(node.id, None)
        self.middle = None
        if old is not None:
            self.total -= old
            self.squared -= self.squares.pop(node.id)
        if x is not None:
            self.models[node.id] = x
            self.total += x
            wide = x.double()
            self.squares[node.id] = square = float(wide.dot(wide))
            self.squared += square

    def _join(self, node: Node, donor: Node) -> None:
        donor.state, state = self.method.welcome(donor.state)
        self._seat(node, state)

    def _revive(self, nodes: list[Node]) -> None:
        """Nobody is left to wait for: these take up where the last one stopped, or with the block after, if it was inside one."""
        assert self.last is not None
        self.membership.found(nodes, self.last.step)
        for node in nodes:
            self._join(node, self.last)

    def _seat(self, node: Node, state: Any) -> None:
        node.view, node.seed, node.state = self.membership.at, self.seed, state
        self._count(node, self.method.params(state))


def ensemble(method: Method, x0: Tensor, seed: int) -> Ensemble:
    """The ensemble of this kind of method, for a run that starts at ``x0``."""
    return Centre(method, x0) if isinstance(method, ServerMethod) else Peers(method, x0, seed)


def average(messages: list[Message]) -> Message:
    """The mean of messages of one shape, in their order: tensors, or tuples of them part by part."""
    if isinstance(messages[0], Tensor):
        return torch.stack(messages).mean(0)
    return tuple(average(list(part)) for part in zip(*messages, strict=True))
