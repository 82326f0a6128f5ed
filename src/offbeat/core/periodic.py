"""Rounds with an exact average: peers work apart for a while, then all of them reduce.

The kind of synchronous SGD (reduce every gradient), local SGD, SlowMo, BMUF and DiLoCo. `PeriodicMethod` is the kind;
`OuterMethod` is its composition: an inner method that moves each peer between two averages, and a slow state that moves
at them. The inner one may be a `Local`, a `RoundGossipMethod`, or again a `PeriodicMethod`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from .gossip import PairGossipMethod, PushGossipMethod, RoundGossipMethod
from .method import Averageable, Local, Message
from .topology import Members
from .values import require, require_count


@dataclass(frozen=True)
class PeriodicMethod(Averageable):
    """Peers that take `length` steps apart and then wait for each other's contribution.

    Elastic membership: a peer that dies leaves the averages from the one on that is under way; one that joins comes in
    at the next average, with the state that all have then (`welcome`).
    """

    def length(self, done: int) -> int:
        """How many steps the block has that begins after ``done`` steps of this peer."""
        return 1

    def boundary(self, step: int) -> int:
        """The first step, from ``step`` on, at which a block of the outermost method begins."""
        begin = 0
        while begin < min(step, self.steady):
            begin += self.span(begin)
        if begin >= step:
            return begin
        span = self.span(begin)
        return begin - (begin - step) // span * span

    @property
    def settled(self) -> float:
        """The step of a peer from which on `length` is one number. A method with a `length` of its own may say it here: if it
        does not, that is infinity, and `boundary` counts blocks."""
        return 0 if type(self).length in (PeriodicMethod.length, OuterMethod.length) else math.inf

    @property
    def steady(self) -> float:
        """The same of `span`."""
        return self.settled

    def span(self, done: int) -> int:
        """How many gradients of this peer the block has that begins after ``done`` of them."""
        return self.length(done)

    def group(self, node: int, members: Members) -> Members:
        """With whom ``node`` averages: everybody, unless the method has groups."""
        return members

    @abstractmethod
    def contribute(self, w: Any) -> Message | None:
        """What is averaged; None: nothing, and nobody waits."""

    @abstractmethod
    def absorb(self, w: Any, mean: Message | None) -> Any:
        """The peer's state after the average."""

    def welcome(self, w: Any) -> tuple[Any, Any]:
        """A peer joins at an average where all have states like ``w``: that state afterwards, and the newcomer's."""
        return w, w


class Nested(NamedTuple):
    inner: Any  # the inner method's state
    slow: Any  # the slow state


Sound = Local | RoundGossipMethod | PeriodicMethod
"""Inner methods of which an exact average can be taken: no message of theirs is under way then."""


@dataclass(frozen=True)
class OuterMethod(PeriodicMethod):
    """``period`` steps of ``inner``, an exact average of the peers, and one step of the slow state. A method of this kind
    writes `outer`, and `begin` where it keeps a slow state."""

    inner: Sound = Local()
    """What moves a peer between two averages."""
    _: KW_ONLY
    period: int = 12
    """Steps of ``inner`` between two averages (tau, H), at least 1."""
    buffering: Literal["maintain", "reset", "average"] = "maintain"
    """What an average does to the inner rule's buffers (momentum): keep them, empty them, or average them too."""

    def __post_init__(self) -> None:
        if isinstance(self.inner, PushGossipMethod | PairGossipMethod):
            raise TypeError(
                f"{type(self).__name__}.inner = {self.inner!r}: its messages may be under way, or its peers be visited, "
                "while the mean is taken, so the mean would not be exact; take a Local or a round gossip method (SGP, OSGP, DPSGD)"
            )
        if not isinstance(self.inner, Sound):
            raise TypeError(
                f"{type(self).__name__}.inner = {self.inner!r}: must be a Local, round gossip or periodic method"
            )
        require_count(self, "period")
        known = ("maintain", "reset", "average")
        require(self, "buffering", self.buffering in known, f"must be one of {', '.join(known)}")

    # what a method writes

    def begin(self, x: Tensor, inner: Any) -> Any:
        """The slow state at the start of the first block, at ``x`` [d] with the inner state ``inner``."""
        return ()

    def outer(self, slow: Any, inner: Any, x: Tensor) -> tuple[Any, Tensor]:
        """The slow state after a block that ended at the average ``x`` [d], and where all go on: ``x`` unless overridden."""
        return slow, x

    def reseat(self, slow: Any, x: Tensor) -> Any:
        """The slow state when a method around this one puts it at ``x`` [d]."""
        return slow

    # the handlers

    def check(self, n: int) -> None:
        if not isinstance(self.inner, Local):  # which alone would refuse company
            self.inner.check(n)

    def length(self, done: int) -> int:
        return self.period

    def span(self, done: int) -> int:
        if not isinstance(self.inner, PeriodicMethod):
            return self.length(done)
        if done >= self.inner.steady:
            return self.length(done) * self.inner.span(done)
        total = 0
        for _ in range(self.length(done)):
            total += self.inner.span(done + total)
        return total

    @property
    def steady(self) -> float:
        return max(self.settled, self.inner.steady) if isinstance(self.inner, PeriodicMethod) else self.settled

    def init(self, start: Tensor) -> Nested:
        inner = self.inner.init(start)
        return Nested(inner, self.begin(start, inner))

    def params(self, w: Nested) -> Tensor:
        return self.inner.params(w.inner)

    def local(self, w: Nested, g: Tensor) -> Nested:
        return w._replace(inner=self.inner.local(w.inner, g))

    def contribute(self, w: Nested) -> Message | None:
        share = self.inner.share(w.inner)
        return (share, *self.inner.buffers(w.inner)) if self.buffering == "average" else (share,)

    def absorb(self, w: Nested, mean: Message | None) -> Nested:
        share, *buffers = (self.inner.share(w.inner),) if mean is None else mean
        slow, x = self.outer(w.slow, w.inner, self.inner.average(share))
        inner = self.inner.shift(w.inner, x) if mean is None else self.inner.load(w.inner, x)
        if buffers:
            inner = self.inner.with_buffers(inner, tuple(buffers))
        elif self.buffering == "reset":
            inner = self.inner.restart(inner)
        return Nested(inner, slow)

    def welcome(self, w: Nested) -> tuple[Nested, Nested]:
        return w, w._replace(inner=self.inner.restart(w.inner))

    def moved(self, w: Nested, x: Tensor, begins: bool) -> Nested | None:
        """In the middle of a block it is part of what the worker moves in it; at its beginning the block begins at ``x``."""
        inner = self.inner.moved(w.inner, x, begins)
        return None if inner is None else Nested(inner, self.reseat(w.slow, x) if begins else w.slow)

    # what a method around this one needs

    def pace(self, w: Nested) -> tuple[Tensor, Tensor]:
        return self.inner.pace(w.inner)

    def buffers(self, w: Nested) -> tuple[Tensor, ...]:
        return self.inner.buffers(w.inner)

    def with_buffers(self, w: Nested, buffers: tuple[Tensor, ...]) -> Nested:
        return w._replace(inner=self.inner.with_buffers(w.inner, buffers))

    def restart(self, w: Nested) -> Nested:
        return w._replace(inner=self.inner.restart(w.inner))

    def share(self, w: Nested) -> Message:
        return self.inner.share(w.inner)

    def average(self, mean: Message) -> Tensor:
        return self.inner.average(mean)

    def load(self, w: Nested, x: Tensor) -> Nested:
        return Nested(self.inner.load(w.inner, x), self.reseat(w.slow, x))

    def shift(self, w: Nested, x: Tensor) -> Nested:
        return Nested(self.inner.shift(w.inner, x), self.reseat(w.slow, x))
