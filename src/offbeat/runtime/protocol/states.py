"""The states of a peer as its coordinator knows it, and what it may say in each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from .averages import Average, Seat
from .wire import Corrupt, Kind


class State(Enum):
    """Where a peer is in its life; the value says it in words."""

    ENTERING = "has not asked in"
    FOUNDING = "waits for the others of the first round"
    WAITING = "waits for a state to begin with"
    COMPUTING = "computes"
    AVERAGING = "waits for an average"
    DONE = "has ended its loop"
    GONE = "is gone"


TURNS: dict[State, set[Kind]] = {
    State.ENTERING: {Kind.ENTER, Kind.STEP, Kind.LEAVE},
    State.FOUNDING: {Kind.BEGIN, Kind.ORPHAN, Kind.STEP, Kind.LEAVE},
    State.WAITING: {Kind.BEGIN, Kind.ORPHAN, Kind.STEP, Kind.LEAVE},
    State.COMPUTING: {Kind.BEGIN, Kind.REDUCE, Kind.MEET, Kind.MODEL, Kind.STEP, Kind.LEAVE},
    State.AVERAGING: set(),
    State.DONE: {Kind.MODEL, Kind.STEP, Kind.LEAVE},
    State.GONE: set(),
}
"""What a peer may say in each state."""


@dataclass(eq=False)
class PeerSession:
    """One life of one peer."""

    seat: Seat
    state: State = State.ENTERING
    donor: tuple[int, int] | None = None  # who gives it a state, for all that it was told: the worker, and its life
    welcomed: bool = False  # whether it may have got one
    step: int | None = None  # the step that it takes next; None: it has not begun
    end: int = 0  # the step at which its block ends
    show: bool = False  # whether it is to show its model when it next goes on
    average: Average | None = None  # the one that it has asked for last
    round: int = 0  # with which it wants to begin
    asked: tuple[float, int] = (-math.inf, 0)  # when it last went on, and at which round
    over: bool = False  # whether it was told that all have ended
    waits: tuple[float, float] = (0.0, math.inf)  # since when it waits, and when it is said next for whom

    @property
    def worker(self) -> int:
        return self.seat.id

    @property
    def begun(self) -> int:
        """How many gradients it may have begun and not told of."""
        return max(1, self.end - (self.step or 0))

    def mind(self, well: bool, what: str) -> None:
        """`Corrupt` where what the peer does is not its turn."""
        if not well:
            where = "has not begun" if self.step is None else f"is at step {self.step} of a block until {self.end}"
            if self.state in (State.AVERAGING, State.DONE, State.GONE):
                where += f" and {self.state.value}"
            raise Corrupt(f"worker {self.worker} {what}, and {where}: its link is refused, and it may join anew")
