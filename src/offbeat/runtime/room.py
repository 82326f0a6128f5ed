"""Who is there, and in which round, of a run without a server: pure bookkeeping, called under one lock.

Peers that go in rounds must agree who takes part in each, so a change of membership counts from the first round that
nobody has asked about yet, and a newcomer begins with the state of the first peer to reach that round. Peers that never
wait see changes at once, and a newcomer counts once it has a state.

Members of an average take it in the process group that they have from the last one, without a word to anybody. Only those
who cannot, as somebody has come, gone or died in the middle, ask here: they take it together as soon as all who live have
asked, or get it from one of those who have it already and are past it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..core.gossip import PairGossipMethod, PushGossipMethod
from ..core.members import Views
from ..core.method import Method
from ..core.periodic import PeriodicMethod
from ..core.topology import Members

Turn = tuple[int, int]
"""An average: its round, and how many of that round came before it."""


@dataclass(eq=False)
class Seat:
    """A peer as the others know it."""

    worker: int
    life: int
    address: str
    machine: str
    since: int = 0  # the round in which it came
    step: int = 0  # the round that it has begun
    turn: Turn = (0, 0)  # averages before this one it has taken, for all that is known

    def about(self, place: str) -> dict[str, Any]:
        """What another peer must know to talk to it; ``place`` says whether it is in, coming or done."""
        about = {"worker": self.worker, "life": self.life, "address": self.address, "machine": self.machine}
        return about | {"since": self.since, "place": place}


@dataclass(eq=False)
class Average:
    """An average that some of its members could not take, or not in the group that they had."""

    group: str
    members: Members
    turn: Turn
    asked: set[int] = field(default_factory=set)
    ranks: tuple[int, ...] = ()  # who takes it together, once all who live have asked
    holder: int | None = None  # who has it already


class Room:
    """The peers of a run with a method of a kind without a server."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.rounds = not isinstance(method, PushGossipMethod | PairGossipMethod)
        self.seats: dict[int, Seat] = {}
        self.coming: dict[int, Seat] = {}  # newcomers, who wait for their round (`since`) or for a state
        self.views = Views(self.rounds)
        self.averages: dict[tuple[Members, Turn], Average] = {}
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
        self.seats[worker].step, self.seats[worker].turn = step, (step + 1, 0)
        self._settle()
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
        for average in self.averages.values():
            average.asked.discard(worker)  # should it come back before the others ask, it has not asked
        self._settle()
        if self.seats:
            return []
        lost, self.coming = list(self.coming.values()), {}
        return lost

    def reduce(self, worker: int, members: Members, turn: Turn) -> Average:
        """A peer asks for an average: settled, at once or later, when it has ``ranks`` or a ``holder``."""
        self.seats[worker].turn = turn
        self.attempts += (members, turn) not in self.averages
        average = self.averages.setdefault((members, turn), Average(f"{self.attempts}", members, turn))
        average.asked.add(worker)
        self._settle()
        return average

    def _settle(self) -> None:
        for key, average in list(self.averages.items()):
            there = {m for m in average.members if m in self.seats and self.seats[m].since < average.turn[0]}
            past = {m for m in there if self.seats[m].turn > average.turn}
            if average.asked and there - past <= average.asked:
                if past:
                    average.holder = min(past)
                else:
                    average.ranks = tuple(sorted(average.asked))
                del self.averages[key]
            elif not average.asked:
                del self.averages[key]
