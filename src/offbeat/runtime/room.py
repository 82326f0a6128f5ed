"""Who is there, and in which round, of a run without a server: pure bookkeeping, called under one lock.

Peers that go in rounds must agree who takes part in each, so a change of membership counts from the first round that
nobody has asked about yet, and a newcomer begins with the state of the first peer to reach that round. Peers that never
wait see changes at once. An average is taken by those of its members who live, and counts when all of them have voted for
it: one that a death has broken is taken again without the dead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..core.gossip import PairGossipMethod, PushGossipMethod
from ..core.members import Views
from ..core.method import Method
from ..core.periodic import PeriodicMethod
from ..core.topology import Members


@dataclass(eq=False)
class Seat:
    """A peer as the others know it."""

    worker: int
    life: int
    address: str
    machine: str
    since: int = 0  # the round in which it came
    step: int = 0  # the round that it has begun

    def about(self) -> dict[str, Any]:
        """What another peer must know to talk to it."""
        return {
            "worker": self.worker,
            "life": self.life,
            "address": self.address,
            "machine": self.machine,
            "since": self.since,
        }


@dataclass(eq=False)
class Average:
    """One attempt at an average."""

    group: str
    asked: set[int] = field(default_factory=set)
    missing: set[int] = field(default_factory=set)
    ranks: tuple[int, ...] = ()  # who takes part, once all have asked
    votes: dict[int, bool] = field(default_factory=dict)
    good: bool | None = None


class Room:
    """The peers of a run with a method of a kind without a server."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.rounds = not isinstance(method, PushGossipMethod | PairGossipMethod)
        self.seats: dict[int, Seat] = {}
        self.waiting: list[tuple[int, Seat]] = []  # newcomers, and the round that each waits for
        self.views = Views(self.rounds)
        self.averages: dict[tuple[Members, int], Average] = {}
        self.attempts = 0
        self.promised: dict[int, int] = {}  # newcomers, and the peers that are to give them their states

    def found(self, seats: list[Seat], step: int = 0) -> None:
        """The run begins with these, at ``step``."""
        self.seats = {seat.worker: seat for seat in seats}
        for seat in seats:
            seat.since = seat.step = step
        self.views = Views(self.rounds, tuple(sorted(self.seats)), step)
        self.waiting = []

    def enter(self, seat: Seat) -> Seat | None:
        """A newcomer while others run: the peer whose state it gets at once, or None where it waits for its round."""
        if not self.rounds:
            donor = min(self.seats.values(), key=lambda s: s.worker)
            seat.since = seat.step = donor.step
            self.views.change(0, {seat.worker}, set())
            self.seats[seat.worker] = seat
            self.promised[seat.worker] = donor.worker
            return donor
        start = max(self.views.asked + 1, max(s.step for s in self.seats.values()) + 1)
        if isinstance(self.method, PeriodicMethod):
            start = self.method.boundary(start)
        self.views.change(start, {seat.worker}, set())
        seat.since = start
        self.waiting.append((start, seat))
        return None

    def begin(self, worker: int, step: int) -> list[Seat]:
        """A peer begins round ``step``: the newcomers who begin with its state."""
        self.seats[worker].step = step
        self.promised.pop(worker, None)
        ready = [seat for start, seat in self.waiting if start <= step]
        self.waiting = [(start, seat) for start, seat in self.waiting if start > step]
        for seat in ready:
            seat.since = seat.step = step
            self.seats[seat.worker] = seat
            self.promised[seat.worker] = worker
        return ready

    def leave(self, worker: int) -> list[Seat]:
        """A peer has gone: the newcomers who still wait for a state, from it or, if it was the last, from anybody."""
        lost = [seat for name, seat in self.seats.items() if self.promised.get(name) == worker]
        self._remove(worker)
        for seat in lost:
            self._remove(seat.worker)
        if all(name in self.promised for name in self.seats):  # nobody is left who has a state
            lost += [*self.seats.values(), *(seat for _, seat in self.waiting)]
            self.seats, self.waiting, self.promised = {}, [], {}
        return lost

    def _remove(self, worker: int) -> None:
        self.promised.pop(worker, None)
        self.views.change(self.views.asked + 1 if self.rounds else 0, set(), {worker})
        self.waiting = [(start, seat) for start, seat in self.waiting if seat.worker != worker]
        self.seats.pop(worker, None)
        for average in list(self.averages.values()):
            average.missing.discard(worker)
            if average.ranks and worker in average.ranks and worker not in average.votes:
                average.votes[worker] = False
            self._settle(average)

    def reduce(self, worker: int, members: Members, round: int) -> Average:
        """A peer asks for an average: the attempt that it takes part in, ready when it has ``ranks``."""
        key = (members, round)
        average = self.averages.get(key)
        if average is None or average.good is False:
            self.attempts += 1
            living = {m for m in members if m in self.seats}
            average = self.averages[key] = Average(f"{self.attempts}", missing=living)
        average.asked.add(worker)
        average.missing.discard(worker)
        self._settle(average)
        return average

    def vote(self, worker: int, average: Average, good: bool) -> None:
        """A peer says whether it has the average."""
        average.votes[worker] = good
        self._settle(average)

    def _settle(self, average: Average) -> None:
        if not average.ranks and not average.missing and average.asked:
            average.ranks = tuple(sorted(m for m in average.asked if m in self.seats))
        if average.ranks and average.good is None and all(m in average.votes for m in average.ranks):
            average.good = all(average.votes[m] for m in average.ranks)
            if average.good:
                self.averages = {k: a for k, a in self.averages.items() if a is not average}
