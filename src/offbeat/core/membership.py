"""Who takes part in which round of a run without a server: newcomers, who gives them a state, and who takes over.

Pure bookkeeping: the simulator and the coordinator of a real run have the same. Its laws:

- All who ask for the members of a round get one answer. A change counts from the first round that has not been asked about.
- A newcomer is either given a donor, or waits for a round that those who take part come to, or is given back when the last
  of them leaves. It never waits for somebody who has gone.
- When nobody takes part any more, that history is over. Those who `found` the next one begin with a list of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, TypeVar

from .gossip import PairGossipMethod, PushGossipMethod
from .method import Method
from .periodic import PeriodicMethod
from .topology import Members


class Participant(Protocol):
    """What membership knows of a peer, and keeps up to date there."""

    id: int
    """Its name: a number that no other has at the time."""
    since: int
    """The round in which it came; while it waits, the one that it waits for."""
    step: int
    """The round that it is in."""


P = TypeVar("P", bound=Participant)


class Membership(ABC, Generic[P]):
    """The peers that take part, and those that come. Use `membership` to make the one for a method."""

    def __init__(self) -> None:
        self.here: dict[int, P] = {}
        """Who takes part, in the order in which they came."""
        self.coming: dict[int, P] = {}
        """Newcomers, who wait for their round (`since`) or for the state that their donor gives them."""

    @abstractmethod
    def at(self, step: int) -> Members:
        """Who takes part in round ``step``, in rising order."""

    @abstractmethod
    def same(self, step: int, rounds: int) -> int:
        """Up to which round the members are those of round ``step``: so many ``rounds`` after it at most."""

    @abstractmethod
    def open(self) -> int:
        """The first round that a newcomer could begin with now."""

    def found(self, founders: Sequence[P], step: int = 0) -> int:
        """These begin a history of their own, with round ``step`` or the next one that can be begun with: which.

        ``ValueError`` where somebody takes part or comes, as that history is not over.
        """
        if self.here or self.coming:
            raise ValueError(f"workers {(*self.here, *self.coming)} are there: nobody founds beside them")
        self.here = {peer.id: peer for peer in founders}
        for peer in founders:
            peer.since = peer.step = step
        return step

    def enter(self, newcomer: P, round: int = 0, turn: int = 0) -> P | None:
        """A newcomer to those who take part, who wants to begin with ``round`` or later.

        Returns its donor, who gives it a state now; it takes part once it has got that and begins. None where it waits for
        the round `Participant.since`, and begins with the state of the first peer that begins it. Donors take turns by ``turn``.
        ``ValueError`` where nobody takes part, so that it is to `found`, and where it is there already.
        """
        if not self.here:
            raise ValueError(f"worker {newcomer.id} enters where nobody takes part: it founds")
        if newcomer.id in self.here or newcomer.id in self.coming:
            raise ValueError(f"worker {newcomer.id} enters and is there: it leaves before it comes again")
        self.coming[newcomer.id] = newcomer
        return None

    @abstractmethod
    def begin(self, peer: int, step: int) -> list[P]:
        """``peer`` begins round ``step``: the newcomers who take part from now on, with its state. ``KeyError``
        where it neither takes part nor comes with a state of its own."""

    def leave(self, peer: int) -> list[P]:
        """``peer`` has gone, or does not come any more. If it was the last who took part, the newcomers, who begin anew: they
        come no more, and are to `found`."""
        self.coming.pop(peer, None)
        self.here.pop(peer, None)
        if self.here:
            return []
        left, self.coming = list(self.coming.values()), {}
        return left

    def heir(self) -> P | None:
        """Who takes over what one that has left hands on; None where nobody takes part."""
        return self.here[min(self.here)] if self.here else None


class FreeMembership(Membership[P]):
    """Of peers that never wait for each other: who is there now is there in every round."""

    def __init__(self) -> None:
        super().__init__()
        self._members: Members = ()

    def at(self, step: int) -> Members:
        return self._members

    def same(self, step: int, rounds: int) -> int:
        return step + rounds

    def open(self) -> int:
        return 0

    def found(self, founders: Sequence[P], step: int = 0) -> int:
        step = super().found(founders, step)
        self._members = tuple(sorted(self.here))
        return step

    def enter(self, newcomer: P, round: int = 0, turn: int = 0) -> P | None:
        super().enter(newcomer)
        donors = sorted(self.here)
        return self.here[donors[turn % len(donors)]]

    def begin(self, peer: int, step: int) -> list[P]:
        newcomer = self.coming.pop(peer, None)
        if newcomer is not None:
            self.here[peer] = newcomer
            newcomer.since = step
            self._members = tuple(sorted(self.here))
        self.here[peer].step = step
        return []

    def leave(self, peer: int) -> list[P]:
        left = super().leave(peer)
        self._members = tuple(sorted(self.here))
        return left


class RoundMembership(Membership[P]):
    """Of peers that go in rounds: they agree who takes part in each, as far as anybody has asked (`asked`)."""

    def __init__(self, boundary: Callable[[int], int] = lambda step: step) -> None:
        """``boundary`` gives the first round from a given one on that a newcomer can begin with."""
        super().__init__()
        self.boundary = boundary
        self.asked = -1
        self._views: list[tuple[int, Members]] = [(0, ())]  # who takes part from which round on

    def at(self, step: int) -> Members:
        self.asked = max(self.asked, step)
        return next((members for start, members in reversed(self._views) if start <= step), self._views[0][1])

    def same(self, step: int, rounds: int) -> int:
        return min([step + rounds, *(start for start, _ in self._views if start > step)])

    def open(self) -> int:
        begun = max((peer.step for peer in self.here.values()), default=-1)
        return self.boundary(max(self.asked, begun) + 1)

    def found(self, founders: Sequence[P], step: int = 0) -> int:
        step = super().found(founders, self.boundary(step))
        self.asked = step - 1
        self._views = [(step, tuple(sorted(self.here)))]
        return step

    def enter(self, newcomer: P, round: int = 0, turn: int = 0) -> P | None:
        super().enter(newcomer)
        newcomer.since = self.boundary(max(round, self.open()))
        self._change(newcomer.since, {newcomer.id}, set())
        return None

    def begin(self, peer: int, step: int) -> list[P]:
        self.here[peer].step = step
        if not self.coming:
            return []
        ready = [newcomer for newcomer in self.coming.values() if newcomer.since <= step]
        for newcomer in ready:
            newcomer.since = newcomer.step = step
            self.here[newcomer.id] = self.coming.pop(newcomer.id)
        return ready

    def leave(self, peer: int) -> list[P]:
        if peer in self.here or peer in self.coming:
            self._change(self.asked + 1, set(), {peer})
        return super().leave(peer)

    def _change(self, start: int, come: set[int], gone: set[int]) -> None:
        """From round ``start`` on these have come and those have gone."""

        def changed(members: Members) -> Members:
            return tuple(sorted(set(members) - gone | come))

        earlier = [view for view in self._views if view[0] < start]
        at = next((members for begin, members in reversed(self._views) if begin <= start), self._views[0][1])
        later = [(begin, changed(members)) for begin, members in self._views if begin > start]
        self._views = [*earlier, (start, changed(at)), *later]


def membership(method: Method) -> Membership[P]:
    """The membership of a run with this method: of rounds, unless its peers never wait for each other."""
    if isinstance(method, PushGossipMethod | PairGossipMethod):
        return FreeMembership()
    return RoundMembership(method.boundary) if isinstance(method, PeriodicMethod) else RoundMembership()
