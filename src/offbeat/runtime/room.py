"""Who is there, and in which round, of a run without a server: pure bookkeeping, called under one lock.

Peers that go in rounds must agree who takes part in each, so a change of membership counts from the first round that
nobody has asked about yet, and a newcomer begins with the state of the first peer to reach that round. Peers that never
wait see changes at once, and a newcomer counts once it has a state. An average is taken by those of its members who live,
and counts when all of them have voted for it: one that a death has broken is taken again without the dead.
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

    def about(self, place: str) -> dict[str, Any]:
        """What another peer must know to talk to it; ``place`` says whether it is in, coming or done."""
        about = {"worker": self.worker, "life": self.life, "address": self.address, "machine": self.machine}
        return about | {"since": self.since, "place": place}


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
        self.coming: dict[int, Seat] = {}  # newcomers, who wait for their round (`since`) or for a state
        self.views = Views(self.rounds)
        self.averages: dict[tuple[Members, int], Average] = {}
        self.attempts = 0

    def found(self, seats: list[Seat], step: int = 0) -> None:
        """The run begins with these, at ``step``."""
        self.seats = {seat.worker: seat for seat in seats}
        for seat in seats:
            seat.since = seat.step = step
        self.views = Views(self.rounds, tuple(sorted(self.seats)), step)

    def open(self) -> int:
        """The first round that a newcomer could begin with."""
        if not self.rounds or not self.seats:
            return 0
        round = max(self.views.asked, *(s.step for s in self.seats.values())) + 1
        return self.method.boundary(round) if isinstance(self.method, PeriodicMethod) else round

    def enter(self, seat: Seat, round: int = 0) -> Seat | None:
        """A newcomer while others run, who wants to begin with ``round`` or later: the peer that gives it a state now, or
        None where it waits for that round."""
        self.coming[seat.worker] = seat
        if not self.rounds:
            donors = sorted(self.seats)
            return self.seats[donors[seat.life % len(donors)]]
        seat.since = max(round, self.open())
        self.views.change(seat.since, {seat.worker}, set())
        return None

    def begin(self, worker: int, step: int) -> list[Seat]:
        """A peer begins round ``step``: the newcomers who begin with its state."""
        if worker in self.coming:
            self.seats[worker] = seat = self.coming.pop(worker)
            seat.since = step
            self.views.change(0, {worker}, set())
        self.seats[worker].step = step
        if not self.rounds:
            return []
        ready = [seat for seat in self.coming.values() if seat.since <= step]
        for seat in ready:
            seat.since = seat.step = step
            self.seats[seat.worker] = self.coming.pop(seat.worker)
        return ready

    def leave(self, worker: int) -> list[Seat]:
        """A peer has gone: the newcomers who have nobody left to wait for, if it was the last."""
        self.views.change(self.views.asked + 1 if self.rounds else 0, set(), {worker})
        self.coming.pop(worker, None)
        self.seats.pop(worker, None)
        for average in list(self.averages.values()):
            average.missing.discard(worker)
            if worker in average.ranks and worker not in average.votes:
                average.votes[worker] = False
            self._settle(average)
        if self.seats:
            return []
        lost, self.coming = list(self.coming.values()), {}
        return lost

    def reduce(self, worker: int, members: Members, round: int) -> Average:
        """A peer asks for an average: the attempt that it takes part in, ready when it has ``ranks``."""
        key = (members, round)
        average = self.averages.get(key)
        if average is None or average.good is False:
            self.attempts += 1
            there = {m for m in members if m in self.seats and self.seats[m].since < round}
            average = self.averages[key] = Average(f"{self.attempts}", missing=there)
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
