"""Averages that members cannot take in the group that they have from the last one.

Members of an average take it in the process group that they have, without a word to anybody. Only those who cannot, as
somebody has come, gone or died in the middle, ask here: they take it together as soon as all who live have asked, or get it
from one of those who have it already and are past it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...core.membership import Membership
from ...core.topology import Members

Turn = tuple[int, int]
"""An average: its round, and how many of that round came before it."""


@dataclass(eq=False)
class Seat:
    """A peer as the others know it: a `Participant`."""

    id: int  # the worker's number
    life: int
    address: str
    machine: str
    since: int = 0  # the round in which it came
    step: int = 0  # the round that it has begun
    turn: Turn = (0, 0)  # averages before this one it has taken, for all that is known

    def about(self, place: str) -> dict[str, Any]:
        """What another peer must know to talk to it; ``place`` says whether it is in, coming or done."""
        about = {"worker": self.id, "life": self.life, "address": self.address, "machine": self.machine}
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

    @property
    def settled(self) -> bool:
        """Whether those who have asked can be told how to get it."""
        return bool(self.ranks) or self.holder is not None


class Averages:
    """The averages that somebody has asked for, among the peers that take part by ``membership``."""

    def __init__(self, membership: Membership[Seat]) -> None:
        self.membership = membership
        self.open: dict[tuple[Members, Turn], Average] = {}  # those that are not settled
        self.attempts = 0

    def ask(self, worker: int, members: Members, turn: Turn) -> Average:
        """A peer asks for an average, and has those before: settled at once, or by another's `ask`, `begun` or `gone`."""
        self.membership.here[worker].turn = turn
        self.attempts += (members, turn) not in self.open
        average = self.open.setdefault((members, turn), Average(f"{self.attempts}", members, turn))
        average.asked.add(worker)
        self._settle()
        return average

    def begun(self, worker: int, step: int) -> None:
        """A peer has begun round ``step``, so that it has all averages up to that one."""
        self.membership.here[worker].turn = (step + 1, 0)
        self._settle()

    def gone(self, worker: int) -> None:
        """A peer takes part no more."""
        for average in self.open.values():
            average.asked.discard(worker)  # should it come back before the others ask, it has not asked
        self._settle()

    def _settle(self) -> None:
        here = self.membership.here
        for key, average in list(self.open.items()):
            there = {m for m in average.members if m in here and here[m].since < average.turn[0]}
            past = {m for m in there if here[m].turn > average.turn}
            if average.asked and there - past <= average.asked:
                if past:
                    average.holder = min(past)
                else:
                    average.ranks = tuple(sorted(average.asked))
                del self.open[key]
            elif not average.asked:
                del self.open[key]
