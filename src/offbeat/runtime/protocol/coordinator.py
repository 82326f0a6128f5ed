"""The coordinator of a run without a server, as a machine: who may say what in which state, and what follows from it.

`Coordination.handle` takes an event (a peer came, said something, went; or time has passed) and the time, and returns effects
in the order in which they are to be carried out. It knows no socket, thread or clock.

States of a peer, and the words that are its turn there (`TURNS`):

    ENTERING    has said hello, and has not asked in
    FOUNDING    waits for the others of the first round, until a deadline
    WAITING     waits for a state: the first model, a round that it begins with, or what its donor gives it
    COMPUTING   goes on up to the end of its block
    AVERAGING   waits for those who take an average with it
    DONE        its loop has ended; others may still talk to it, until all have ended
    GONE        takes part no more

All waiting has a deadline. At that of founders they begin; at any other it is said who waits for whom, as those who are waited
for live: their links have time-outs of their own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core.membership import Membership, RoundMembership, membership
from ...core.method import Method
from ...core.periodic import PeriodicMethod
from ..leases import Lease, Leases, leases_in
from .averages import Averages, Seat
from .events import (
    Came,
    Decline,
    Effect,
    Event,
    HangUp,
    Log,
    RecordDeeds,
    RecordDiverged,
    RecordSetAside,
    RecordSteps,
    Refuse,
    Said,
    Save,
    SendFrame,
    Unsound,
    Wake,
    Went,
)
from .states import TURNS, PeerSession, State
from .wire import Corrupt, Kind

FAR = 10_000
"""How many rounds ahead a newcomer may ask in."""
MOMENT, MOST = 0.05, 100
"""Seconds for which a peer that needs no minibatches goes on without asking, where that is longer than its block, and rounds
that it goes on at most."""


class Coordination:
    """The run of a gossip or periodic method as its coordinator knows it."""

    def __init__(
        self,
        method: Method,
        start: Tensor,
        leases: Leases,
        now: float,
        workers: int = 1,
        timeout: float = 30.0,
        every: float = 30.0,
        shard: tuple[int, int] = (0, 1),
        step: int = 0,
    ) -> None:
        """The run begins at ``start`` [d] and round ``step``; ``workers`` are expected. ``timeout`` and ``every`` are seconds: that
        founders are waited for, and between two snapshots. ``shard`` is which part of the model this is of, of how many."""
        self.method, self.leases = method, leases
        self.workers, self.timeout, self.every, self.shard = workers, timeout, every, shard
        self.finished: set[int] = set()
        """Workers whose loop has ended."""
        self.start = start  # where newcomers begin when nobody is there
        self.step = step  # the round that they begin with then
        self.shown: dict[int, Tensor] = {}  # the models that peers have shown last
        self.peers: dict[int, PeerSession] = {}
        self.membership: Membership[Seat] = membership(method)
        self.averages = Averages(self.membership)
        self.rounds = isinstance(self.membership, RoundMembership)
        self.founders: list[PeerSession] = []
        self.founding = math.inf  # when they begin, whoever is there
        self.gathered = now  # when the models were last asked for
        self.wake = math.inf  # the time that was last asked for
        self.now = now
        self._effects: list[Effect] = []

    def x(self) -> Tensor:
        """The mean of the models that peers have shown, the caller's own; the start where they have not. [d]"""
        if not self.shown:
            return self.start
        first, *others = self.shown.values()
        total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
        for x in others:  # one by one: all of them together would be so many models more
            total += x
        return total.div_(len(self.shown)).to(first.dtype)

    @property
    def running(self) -> bool:
        """Whether somebody takes part, so that newcomers come to them."""
        return bool(self.membership.here)

    def open(self) -> int:
        """The first round that somebody who comes now could begin with."""
        return self.membership.open() if self.running else self.step

    def handle(self, event: Event, now: float) -> list[Effect]:
        """What follows from an event: effects, to be carried out in this order. What comes from a life that is over is dropped."""
        self.now, self._effects = now, []
        match event:
            case Came(seat):
                self.peers[seat.id] = PeerSession(seat)
            case Said():
                peer = self.peers.get(event.worker)
                if peer is not None and peer.seat.life == event.life:
                    try:
                        self._hear(peer, event)
                    except Corrupt as corrupt:
                        self._effects.append(Refuse(event.worker, str(corrupt)))
            case Went(worker, life):
                peer = self.peers.get(worker)
                if peer is not None and peer.seat.life == life:
                    self._go(peer)
        if len(self.founders) >= self.workers - len(self.finished) or now >= self.founding:
            self._found()
        self._answer_averages()
        self._remind()
        return self._effects

    # who comes and goes

    def _enter(self, peer: PeerSession) -> int:
        """A peer is to take part, from some round on: which."""
        if self.membership.here:
            self._wait(peer, State.WAITING)
            donor = self.membership.enter(peer.seat, peer.round, peer.seat.life)
            if donor is not None:
                self._bring([peer.seat], donor)
            return peer.seat.since
        peer.donor = None
        if not self.founders:
            self.founding = self.now + self.timeout
        self._wait(peer, State.FOUNDING)
        self.founders.append(peer)
        return peer.round

    def _bring(self, newcomers: list[Seat], donor: Seat) -> None:
        """Tell newcomers who gives them a state, and that one, where it does not know yet."""
        self._news()
        for seat in newcomers:
            newcomer = self.peers[seat.id]
            newcomer.donor, newcomer.welcomed = (donor.id, donor.life), True
            self._wait(newcomer, State.WAITING)
            self._send(newcomer, Kind.NEWS, {"donor": newcomer.donor})
        if not self.rounds:
            self._send(self.peers[donor.id], Kind.NEWS, {"welcome": _lives(newcomers)})

    def _found(self) -> None:
        """The run begins with the founders: all who were launched are there, or had time enough to come."""
        self.founding = math.inf
        if not self.founders:
            return
        founders, self.founders = self.founders, []
        start, step = self.x(), max(self.step, *(peer.round for peer in founders))
        step = self.membership.found([peer.seat for peer in founders], step)
        self.start, self.shown = start, {}
        self._news()
        for peer in founders:
            self._wait(peer, State.WAITING)
            self._effects.append(SendFrame(peer.worker, Kind.MODEL, None, start, step))

    def _finish(self, peer: PeerSession) -> None:
        """A peer's loop has ended: it takes part in nothing more, but others may still talk to it, until all have ended."""
        peer.state = State.DONE
        self.leases.part(peer.worker)
        self.finished.add(peer.worker)
        self._without(peer)
        self._news()
        self._effects.append(Save())  # who has finished does not come again, should the coordinator have to

    def _without(self, peer: PeerSession) -> None:
        """A peer takes part no more. When nobody does, those who linger may go."""
        if peer in self.founders:
            self.founders.remove(peer)
        left = self.membership.leave(peer.worker)
        self.averages.gone(peer.worker)
        if not self.membership.here and self.shown:
            self.start = self.x()
        for seat in left:
            self._enter(self.peers[seat.id])
        if not self.membership.here and not self.founders:
            for other in self.peers.values():
                if other.state == State.DONE and not other.over:
                    other.over = True
                    self._send(other, Kind.ANSWER, {"over": True})

    def _go(self, peer: PeerSession) -> None:
        """A peer has gone, in whatever way."""
        done, peer.state = peer.state == State.DONE, State.GONE
        del self.peers[peer.worker]
        if not done:
            if self.shown.keys() == {peer.worker}:
                self.start = self.x()  # until others show theirs
            self.shown.pop(peer.worker, None)
            self._without(peer)
        self._news()

    def _news(self) -> None:
        """Tell everybody who can be talked to: those who take part, those who come, and those who are done, of whom nothing more
        comes."""
        done = [peer.seat.about("done") for peer in self.peers.values() if peer.state == State.DONE]
        coming = [seat.about("coming") for seat in self.membership.coming.values()]
        alive = [*done, *coming, *(seat.about("in") for seat in self.membership.here.values())]
        for peer in self.peers.values():
            self._send(peer, Kind.NEWS, {"alive": alive})

    def _send(self, peer: PeerSession, kind: Kind, note: dict[str, Any]) -> None:
        self._effects.append(SendFrame(peer.worker, kind, note))

    # what peers say

    def _hear(self, peer: PeerSession, said: Said) -> None:
        note, kind = said.note, said.kind
        if kind == Kind.LEAVE and "diverged" in note:
            brought = leases_in(note.get("brought"))
            self._failed(peer, brought)
            self._effects += [
                RecordDiverged(peer.worker, said.step, str(note["diverged"])[:200], brought),
                HangUp(peer.worker, False),
            ]
            return
        peer.mind(kind in TURNS[peer.state], _verb(kind, note))
        self._report(peer, note)
        match kind:
            case Kind.ENTER:
                round, first = _round(note), max(self.step, self.membership.open())
                peer.mind(round <= first + FAR, f"asks in from round {_said(note)} on, where {first} is the first")
                peer.round = round
                self._send(peer, Kind.ANSWER, {"round": self._enter(peer)})
            case Kind.ORPHAN:
                donor = note.get("donor")
                if peer.donor is not None and donor == list(peer.donor):  # else it has another start by now
                    peer.welcomed = False
                    self._without(peer)
                    self._enter(peer)
                    self._news()
            case Kind.BEGIN:
                self._go_on(peer, note)
            case Kind.REDUCE:
                self._average(peer, note)
            case Kind.MEET:
                average = peer.average
                for other in average.ranks if average is not None and average.group == note.get("group") else ():
                    if other != peer.worker and other in self.peers:
                        self._send(self.peers[other], Kind.MEET, note)
            case Kind.MODEL:
                if said.model is None:
                    self._effects.append(Unsound(peer.worker, said.step, "its model is not finite"))
                else:
                    self.shown[peer.worker] = said.model
            case Kind.LEAVE:
                if peer.state == State.DONE or not note.get("done"):
                    self._effects.append(HangUp(peer.worker, True))
                else:
                    self._finish(peer)

    def _go_on(self, peer: PeerSession, note: dict[str, Any]) -> None:
        """A peer wants minibatches, and but for those in the middle of a block, to begin a round."""
        if note.get("more"):
            peer.mind(peer.step is not None, "wants minibatches")
            self._send(peer, Kind.ANSWER, self._hand(peer, note))
            return
        new, step, seat = peer.worker not in self.membership.here, _round(note), peer.seat
        if peer.step is not None:
            turn = range(peer.end, peer.step + 1)
        elif peer.welcomed and (new or not self.rounds):  # with the state of a peer that has begun
            turn = range(self.step + 1)
        elif new:
            turn = range(0)
        else:
            turn = range(seat.step, seat.step + 1)
        peer.mind(step in turn, f"begins round {_said(note)}")
        peer.state, peer.waits = State.COMPUTING, (0.0, math.inf)
        moment = MOMENT if note.get("want") == 0 and self.shard[1] == 1 else 0.0  # else it asks anyway
        peer.step, peer.end = step, self._end(peer, step, moment)
        self.step = max(self.step, step)
        leases = self._hand(peer, note)
        if peer in self.founders:  # it was to begin anew, and has got a state from one who has gone since
            self.founders.remove(peer)
            self.membership.found([seat], step)
            founders, self.founders, self.founding = self.founders, [], math.inf
            for other in founders:
                self._enter(other)
        newcomers = self.membership.begin(peer.worker, step)
        self.averages.begun(peer.worker, step)
        if newcomers:
            self._bring(newcomers, seat)
        elif new:
            self._news()
        if self.now - self.gathered > min(1.0, self.every / 4):
            self.gathered = self.now
            for other in self.peers.values():
                other.show = True
        show, peer.show = peer.show, False
        members = self.membership.at(peer.end - 1)  # which closes all rounds of the block to newcomers
        news = {"welcome": _lives(newcomers), "show": show}
        self._send(peer, Kind.ANSWER, {**leases, "members": members, "end": peer.end, **news})

    def _end(self, peer: PeerSession, step: int, moment: float) -> int:
        """Up to which round a peer that begins round ``step`` goes on without asking: its block, and as many more as fit into
        a ``moment`` and have the same members.
        """
        (then, before), peer.asked = peer.asked, (self.now, step)
        rounds = int(moment * (step - before) / (self.now - then)) if self.now > then else 0
        limit, end = self.membership.same(step, min(rounds, MOST)), step
        while end == step or end + self._span(end) <= limit:
            end += self._span(end)
        return end

    def _span(self, step: int) -> int:
        """The length of the block that begins with ``step``."""
        return self.method.span(step) if isinstance(self.method, PeriodicMethod) else 1

    def _report(self, peer: PeerSession, note: dict[str, Any]) -> None:
        """What a peer has done since it last said so."""
        deeds, losses = note.get("deeds", []), note.get("losses", [])
        well = isinstance(deeds, list) and all(isinstance(d, list) and d and isinstance(d[0], str) for d in deeds)
        peer.mind(well, "tells what is no deed")
        if deeds:
            self._effects.append(RecordDeeds(peer.worker, peer.seat.life, deeds))
        if losses:
            well = isinstance(losses, list) and peer.step is not None and len(losses) <= peer.end - peer.step
            peer.mind(well, f"takes {len(losses) if isinstance(losses, list) else 'no'} steps")
            assert peer.step is not None
            peer.step += len(losses)
            about = {name: value for name, value in note.items() if name not in ("used", "failed")}
            self._effects.append(RecordSteps(peer.worker, len(losses), about))
        used = leases_in(note.get("used"))
        if self.shard[0]:  # minibatches are the first shard's
            self.leases.done += len(used)
        else:
            self.leases.use(peer.worker, used)
            self._failed(peer, leases_in(note.get("failed")))

    def _failed(self, peer: PeerSession, leases: list[Lease]) -> None:
        """A gradient of minibatches was not finite: those for which it is the second time are set aside."""
        if aside := self.leases.fail(peer.worker, leases):
            self._effects.append(RecordSetAside(peer.worker, aside))

    def _hand(self, peer: PeerSession, note: dict[str, Any]) -> dict[str, Any]:
        """What a peer says of its minibatches, and the answer."""
        if self.shard[0]:
            return {"leases": []}
        try:
            answer = self.leases.hear(peer.worker, note)
        except ValueError as error:
            raise Corrupt(f"worker {peer.worker} speaks of {error}") from None
        if "refused" in answer:
            self._effects.append(Decline(peer.worker, f"worker {peer.worker}: {answer['refused']}"))
        return answer

    # averages

    def _average(self, peer: PeerSession, note: dict[str, Any]) -> None:
        """A peer cannot take an average in the group that it has: it waits for all who live to ask for it, and not for those
        who have it."""
        members, round, index = _members(note), _round(note), note.get("index")
        peer.mind(0 <= round == peer.step, f"names round {_said(note)}")
        known = peer.worker in members and set(members) <= set(self.membership.at(round - 1)) and type(index) is int
        peer.mind(known and peer.worker in self.membership.here, f"wants an average of workers {str(members)[:100]}")
        peer.average = self.averages.ask(peer.worker, members, (round, int(index or 0)))
        self._wait(peer, State.AVERAGING)

    def _answer_averages(self) -> None:
        """Tell those who wait for an average how they get it, where that is settled."""
        for peer in self.peers.values():
            average = peer.average
            if peer.state == State.AVERAGING and average is not None and average.settled:
                peer.state, peer.waits = State.COMPUTING, (0.0, math.inf)
                note = {"group": average.group, "ranks": list(average.ranks), "holder": average.holder}
                self._send(peer, Kind.ANSWER, note)

    # waiting

    def _wait(self, peer: PeerSession, state: State) -> None:
        """A peer waits from now on; of what, is said if it takes as long as a time-out, and again after twice that."""
        peer.state, peer.waits = state, (self.now, self.now + self.timeout)

    def _remind(self) -> None:
        """Say who waits for whom, and ask to be woken at the next deadline."""
        for peer in self.peers.values():
            since, until = peer.waits
            if self.now >= until:
                peer.waits = since, self.now + (self.now - since)
                what = f"worker {peer.worker} {peer.state.value} for {self.now - since:.0f} s: {self._awaited(peer)}"
                self._effects.append(Log(what))
        deadline = min([self.founding, *(peer.waits[1] for peer in self.peers.values())])
        if deadline != self.wake:
            self.wake = deadline
            if deadline < math.inf:
                self._effects.append(Wake(deadline))

    def _awaited(self, peer: PeerSession) -> str:
        """For whom a peer waits."""
        if peer.state == State.AVERAGING and peer.average is not None:
            average, here = peer.average, self.membership.here
            missing = sorted(m for m in average.members if m in here and m not in average.asked)
            return f"of round {average.turn[0]} workers {', '.join(map(str, missing))} have not asked for it"
        if peer.state == State.FOUNDING:
            return f"{len(self.founders)} of {self.workers - len(self.finished)} are there"
        if peer.donor is not None:
            return f"worker {peer.donor[0]} gives it one when its gradient is done"
        if peer.worker in self.membership.coming:
            peers = ", ".join(map(str, sorted(self.membership.here)))
            return f"the first of workers {peers} to begin round {peer.seat.since} gives it one"
        return "it was sent the first model, and has not begun"


def _lives(seats: list[Seat]) -> list[tuple[int, int]]:
    return [(seat.id, seat.life) for seat in seats]


def _verb(kind: Kind, note: dict[str, Any]) -> str:
    """What a peer does with a word."""
    verbs = {
        Kind.ENTER: "asks in",
        Kind.ORPHAN: "wants a state to begin with",
        Kind.BEGIN: "wants minibatches" if note.get("more") else f"begins round {_said(note)}",
        Kind.REDUCE: f"names round {_said(note)}",
        Kind.MEET: "tells a group where it listens",
        Kind.MODEL: "shows a model",
        Kind.STEP: "tells what it has done",
        Kind.LEAVE: "leaves",
    }
    return verbs.get(kind, f"says {kind.name}")


def _said(note: dict[str, Any]) -> str:
    return str(note.get("round"))[:100]


def _round(note: dict[str, Any]) -> int:
    """The round in a note; -1 where it makes no sense."""
    value = note.get("round")
    return value if type(value) is int else -1


def _members(note: dict[str, Any]) -> tuple[int, ...]:
    """The members of an average in a note, in rising order; none where they make no sense."""
    value = note.get("members")
    if not isinstance(value, list) or not all(type(m) is int for m in value) or value != sorted(set(value)):
        return ()
    return tuple(value)
