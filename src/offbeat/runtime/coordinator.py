"""The coordinator of a run without a server: it knows who is there and which round they are in. Models go between peers.

Peers ask it where to go on (`BEGIN`), who is in a round (`VIEW`), and for averages (`REDUCE`, `VOTE`); it tells all of them
who has come and gone (`NEWS`). From time to time each shows its model, so that there is a mean to evaluate, to keep and
to start from again.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.gossip import GossipMethod
from ..core.membership import Membership, RoundMembership, membership
from ..core.method import Method
from ..core.periodic import PeriodicMethod
from ..trace import Deeds
from . import snapshot
from .host import Diverging, Host, OtherKind, Parse, Refused, Session, Terms
from .leases import leases_in
from .link import Frame, Link, LinkLost, machine
from .protocol.averages import Average, Averages, Seat
from .protocol.wire import Corrupt, Header, Kind, finite
from .server import RunServer

FAR = 10_000
"""How many rounds ahead a newcomer may ask in."""
MOMENT, MOST = 0.05, 100
"""Seconds for which a peer that needs no minibatches goes on without asking, where that is longer than its block, and rounds
that it goes on at most."""


@dataclass(eq=False)
class Attendance(Session):
    """One life of one peer."""

    seat: Seat | None = None
    donor: tuple[int, int] | None = None  # who gives it a state, for all that it was told: the worker, and its life
    welcomed: bool = False  # whether it may have got one
    step: int | None = None  # the step that it takes next; None: it has not begun
    end: int = 0  # the step at which its block ends
    done: bool = False  # whether its loop has ended
    show: bool = False  # whether it is to show its model when it next goes on
    average: Average | None = None  # the one that it has asked for
    round: int = 0  # with which it wants to begin
    asked: tuple[float, int] = (-math.inf, 0)  # when it last went on, and at which round
    entered: bool = False  # whether it has asked in

    @property
    def begun(self) -> int:
        return max(1, self.end - (self.step or 0))

    def mind(self, well: bool, what: str) -> None:
        """`Corrupt` where what the peer does is not its turn."""
        if not well:
            where = "has not begun" if self.step is None else f"is at step {self.step} of a block until {self.end}"
            raise Corrupt(f"worker {self.worker} {what}, and {where}: its link is refused, and it may join anew")

    def at(self, note: dict[str, Any], back: int = 0) -> int:
        """The round that the peer names, which must be the one that it is at, or so many ``back``."""
        round = _round(note)
        self.mind(self.step is not None and 0 <= round == self.step - back, f"names round {_said(note)}")
        return round


class Coordinator(Host):
    """The coordinator of a run with a gossip or periodic method."""

    kind = Method

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.membership: Membership[Seat]
        self.averages: Averages
        self.start: Tensor | None = None  # where newcomers begin when nobody is there
        self.step = 0  # the round that they begin with then
        self.shown: dict[int, Tensor] = {}  # the models that peers have shown last
        self.founders: list[Attendance] = []
        self.changed = threading.Condition(self.lock)
        self.gathered = 0.0

    @property
    def running(self) -> bool:
        return self.start is not None

    @property
    def rounds(self) -> bool:
        """Whether peers go in rounds, so that a newcomer waits for one."""
        return isinstance(self.membership, RoundMembership)

    def x(self) -> Tensor:
        if not self.shown:
            assert self.start is not None
            return self.start
        first, *others = self.shown.values()
        total = first.to(torch.promote_types(first.dtype, torch.float32), copy=True)
        for x in others:  # one by one: all of them together would be so many models more
            total += x
        return total.div_(len(self.shown)).to(first.dtype)

    def _begin(self, x: Tensor) -> None:
        assert self.method is not None
        self.membership = membership(self.method)
        self.averages = Averages(self.membership)
        self.start = x
        self.gathered = time.monotonic()
        self.spawn("who tells peers that the coordinator is alive", self._beats)

    def _beats(self) -> None:
        """Let peers know that this end is alive: most of the time they only listen."""
        while not self.stopping.wait(self.terms.beat):
            with self.lock:
                sessions = list(self.sessions.values())
            for session in sessions:
                with contextlib.suppress(LinkLost, ValueError):
                    session.link.beat(session.head)

    def _meet(self, link: Link, note: dict[str, Any], head: Header) -> tuple[Attendance, dict[str, Any]]:
        assert self.method is not None
        if not note.get("peer"):
            raise OtherKind(self.method)
        try:
            self.method.check(max(self.terms.workers, 1))
        except ValueError as error:
            raise Refused(str(error)) from None
        if self.terms.transport == "shared" and note.get("machine") != machine():
            raise Refused("a peer on another machine cannot share memory: take the transport gloo, tcp or auto")
        seat = Seat(head.worker, head.incarnation, _address(note), str(note.get("machine")))
        running = self.running and bool(self.membership.here)
        begin = self.membership.open() if running else self.step
        way = {"transport": self.terms.transport, "round": begin, "running": running}
        return Attendance(head.worker, head.incarnation, note.get("process"), link, head, seat=seat), way

    def _join(self, session: Attendance, note: dict[str, Any]) -> None:
        pass  # until it asks in

    def _enter(self, session: Attendance) -> int:
        """A peer is to take part, from some round on: which."""
        assert session.seat is not None
        if self.membership.here:
            donor = self.membership.enter(session.seat, session.round, session.seat.life)
            if donor is not None:
                self._bring([session.seat], donor)
            return session.seat.since
        session.donor = None
        self.founders.append(session)
        self.spawn("the beginning of the first round", self._found, len(self.founders) == 1)
        return session.round

    def _bring(self, newcomers: list[Seat], donor: Seat) -> None:
        """Tell newcomers who gives them a state, and that one, where it does not know yet."""
        self._news()
        for seat in newcomers:
            newcomer = self.sessions[seat.id]
            newcomer.donor, newcomer.welcomed = (donor.id, donor.life), True
            self._send(newcomer, Kind.NEWS, {"donor": newcomer.donor})
        if not self.rounds:
            self._send(self.sessions[donor.id], Kind.NEWS, {"welcome": _lives(newcomers)})

    def _found(self, first: bool) -> None:
        """The run begins when all who were launched are there, or when they have had time enough to come."""
        with self.changed:
            end = time.monotonic() + self.terms.timeout
            while first and len(self.founders) < self.terms.workers - len(self.finished) and time.monotonic() < end:
                if self.stopping.is_set():
                    return
                self.changed.wait(0.2)
            if not first or not self.founders:
                self.changed.notify_all()
                return
            founders, self.founders = self.founders, []
            start, step = self.x(), max(self.step, *(session.round for session in founders))
            step = self.membership.found([s.seat for s in founders if s.seat is not None], step)
            self.start, self.shown = start, {}
            self._news()
            payload = self._model.pack(start)
        for session in founders:
            try:
                session.link.send(session.head._replace(kind=Kind.MODEL, step=step), payload)
            except LinkLost:
                session.link.hang_up()

    def _finish(self, session: Attendance) -> None:
        """A peer's loop has ended: it takes part in nothing more, but others may still talk to it, until all have ended."""
        session.done = True
        self.leases.part(session.worker)
        self.finished.add(session.worker)
        self._without(session)
        self._news()
        self.changed.notify_all()

    def _without(self, session: Attendance) -> None:
        """A peer takes part no more. When nobody does, those who linger may go."""
        lost = self.membership.leave(session.worker)
        self.averages.gone(session.worker)
        if not self.membership.here and self.shown:
            self.start = self.x()
        for seat in lost:
            self._enter(self.sessions[seat.id])
        if not self.membership.here and not self.founders:
            for other in self.sessions.values():
                if other.done:
                    self._send(other, Kind.ANSWER, {"over": True})

    def _alive(self) -> list[dict[str, Any]]:
        """Who can be talked to: those who take part, those who come, and those who are done, of whom nothing more comes."""
        done = [s.seat.about("done") for s in self.sessions.values() if s.done and s.seat is not None]
        coming = [seat.about("coming") for seat in self.membership.coming.values()]
        return [*done, *coming, *(seat.about("in") for seat in self.membership.here.values())]

    def _news(self) -> None:
        """Tell all who is there; under the lock."""
        for session in list(self.sessions.values()):
            self._send(session, Kind.NEWS, {"alive": self._alive()})

    def _send(self, session: Attendance, kind: Kind, note: Any) -> None:
        try:
            session.link.send(session.head._replace(kind=kind), None, note)
        except LinkLost:
            session.link.hang_up()  # whose thread sees it

    def _serve(self, session: Attendance) -> bool:
        kinds = Kind.BEGIN, Kind.REDUCE, Kind.STEP, Kind.MEET, Kind.ORPHAN, Kind.ENTER, Kind.LEAVE, Kind.SHARED
        due = dict.fromkeys(kinds, 0)
        due[Kind.MODEL] = self._model.bytes
        while True:
            frame = session.link.recv(due, "its next word")
            header, note = frame.header, frame.note if isinstance(frame.note, dict) else {}
            if (header.worker, header.incarnation) != (session.worker, session.incarnation):
                raise Corrupt(
                    f"life {header.incarnation} of worker {header.worker} speaks on another one's link: refused"
                )
            if header.kind == Kind.SHARED:
                self.kept.take(session.link, note)
                continue
            if header.kind == Kind.LEAVE:
                with self.lock:
                    if "diverged" in note:
                        brought = leases_in(note.get("brought"))
                        self._failed(session, brought)
                        self.log.warning(self._diverged(session, header.step, str(note["diverged"])[:200], brought))
                        return False
                    self._report(session, note)
                    if session.done or not note.get("done"):
                        return True
                    self._finish(session)
                self.save()  # who has finished does not come again, should the coordinator have to
                due = {kind: due[kind] for kind in (Kind.MODEL, Kind.LEAVE, Kind.SHARED)}
                continue
            answer = self._hear(session, frame, note)
            if answer is not None:
                session.link.send(session.head._replace(kind=Kind.ANSWER), None, answer)

    def _hear(self, session: Attendance, frame: Frame, note: dict[str, Any]) -> dict[str, Any] | None:
        """What a peer says, and the answer, if there is one to give."""
        header = frame.header
        with self.changed:
            if self.sessions.get(session.worker) is not session:
                raise LinkLost(f"worker {session.worker} speaks on the link of a life that is over")
            self._report(session, note)
            if header.kind == Kind.REDUCE:
                return self._average(session, note)
            if header.kind == Kind.MODEL:
                session.mind(session.step is not None or session.done, "shows a model")
                x = self._model.unpack(frame.payload)
                if not finite(x):
                    raise Diverging(self._diverged(session, header.step, "its model is not finite", []))
                self.shown[session.worker] = x
            elif header.kind == Kind.MEET:
                average = session.average
                for other in average.ranks if average is not None and average.group == note.get("group") else ():
                    if other != session.worker and other in self.sessions:
                        self._send(self.sessions[other], Kind.MEET, note)
            elif header.kind == Kind.ORPHAN:
                session.mind(session.step is None, "wants a state to begin with")
                donor = note.get("donor")
                if session.donor is not None and donor == list(session.donor):  # else it has another start by now
                    session.welcomed = False
                    self._without(session)
                    self._enter(session)
                    self._news()
                    self.changed.notify_all()
            elif header.kind == Kind.ENTER:
                round, first = _round(note), max(self.step, self.membership.open())
                session.mind(session.step is None and not session.entered, "asks in")
                session.mind(round <= first + FAR, f"asks in from round {_said(note)} on, where {first} is the first")
                session.round, session.entered = round, True
                return {"round": self._enter(session)}
            elif header.kind == Kind.BEGIN:
                return self._go_on(session, note)
            return None

    def _go_on(self, session: Attendance, note: dict[str, Any]) -> dict[str, Any]:
        """A peer wants minibatches, and but for those in the middle of a block, to begin a round."""
        assert session.seat is not None
        if note.get("more"):
            session.mind(session.step is not None, "wants minibatches")
            return self._hand(session, note)
        new, step = session.worker not in self.membership.here, _round(note)
        if session.step is not None:
            turn = range(session.end, session.step + 1)
        elif session.welcomed and (new or not self.rounds):  # with the state of a peer that has begun
            turn = range(self.step + 1)
        elif new:
            turn = range(0)
        else:
            turn = range(session.seat.step, session.seat.step + 1)
        session.mind(step in turn, f"begins round {_said(note)}")
        moment = MOMENT if note.get("want") == 0 and self.terms.shard[1] == 1 else 0.0  # else it asks anyway
        session.step, session.end = step, self._end(session, step, moment)
        self.step = max(self.step, step)
        leases = self._hand(session, note)
        if session in self.founders:  # it was to begin anew, and has got a state from one who has gone since
            self.founders.remove(session)
            self.membership.found([session.seat], step)
            founders, self.founders = self.founders, []
            for other in founders:
                self._enter(other)
        newcomers = self.membership.begin(session.worker, step)
        self.averages.begun(session.worker, step)
        self.changed.notify_all()  # who waits for an average that this one has
        if newcomers:
            self._bring(newcomers, session.seat)
        elif new:
            self._news()
        if time.monotonic() - self.gathered > min(1.0, self.terms.every / 4):
            self.gathered = time.monotonic()
            for other in self.sessions.values():
                other.show = True
        show, session.show = session.show, False
        members = self.membership.at(session.end - 1)  # which closes all rounds of the block to newcomers
        news = {"welcome": _lives(newcomers), "show": show}
        return {**leases, "members": members, "end": session.end, **news}

    def _end(self, session: Attendance, step: int, moment: float) -> int:
        """Up to which round a peer that begins round ``step`` goes on without asking: its block, and as many more as fit into
        a ``moment`` and have the same members.
        """
        (then, before), session.asked = session.asked, (time.monotonic(), step)
        rounds = int(moment * (step - before) / (session.asked[0] - then))
        limit, end = self.membership.same(step, min(rounds, MOST)), step
        while end == step or end + self._span(end) <= limit:
            end += self._span(end)
        return end

    def _span(self, step: int) -> int:
        """The length of the block that begins with ``step``."""
        return self.method.span(step) if isinstance(self.method, PeriodicMethod) else 1

    def _report(self, session: Attendance, note: dict[str, Any]) -> None:
        """Record what a peer has done since it last said so; under the lock."""
        deeds, losses = note.get("deeds", []), note.get("losses", [])
        well = isinstance(deeds, list) and all(isinstance(d, list) and d and isinstance(d[0], str) for d in deeds)
        session.mind(well, "tells what is no deed")
        if deeds:
            self._note(Deeds(session.worker, session.incarnation, deeds))
        if losses:
            well = isinstance(losses, list) and session.step is not None and len(losses) <= session.end - session.step
            session.mind(well, f"takes {len(losses) if isinstance(losses, list) else 'no'} steps")
            assert session.step is not None
            session.step += len(losses)
            self._record(session, self.steps.get(session.worker, 0), len(losses), note, _bytes(note), {})
        else:
            self._used(session, note)

    def _average(self, session: Attendance, note: dict[str, Any]) -> dict[str, Any]:
        """Wait for all who live to ask for an average, and not for those who have it; under the lock."""
        members = _members(note)
        assert session.seat is not None
        round, index = session.at(note), note.get("index")
        known = session.worker in members and set(members) <= set(self.membership.at(round - 1)) and type(index) is int
        session.mind(
            known and session.worker in self.membership.here, f"wants an average of workers {str(members)[:100]}"
        )
        average = session.average = self.averages.ask(session.worker, members, (round, int(index or 0)))
        self.changed.notify_all()
        while not average.settled:
            if self.stopping.is_set() or self.sessions.get(session.worker) is not session:
                raise LinkLost(f"worker {session.worker} is gone while an average waited")
            self.changed.wait(self.terms.beat)
            session.link.drain()
            if time.monotonic() - session.link.heard > self.terms.timeout:
                raise LinkLost(
                    f"worker {session.worker} was silent for {self.terms.timeout:g} s while an average waited"
                )
        return {"group": average.group, "ranks": list(average.ranks), "holder": average.holder}

    def _part(self, session: Attendance, orderly: bool) -> None:
        if session in self.founders:
            self.founders.remove(session)
        if not session.done:
            if self.shown.keys() == {session.worker}:
                self.start = self.x()  # until others show theirs
            self.shown.pop(session.worker, None)
            self._without(session)
        self._news()
        self.changed.notify_all()

    def _content(self) -> Callable[[], dict[str, Any]]:
        content = {"version": 0, "x": self.x(), "round": self.step}
        return lambda: content

    def _restore(self, method: Any, content: dict[str, Any]) -> list[int]:
        self._begin(content["x"])
        self.step = content["round"]
        return []


def _lives(seats: list[Seat]) -> list[tuple[int, int]]:
    return [(seat.id, seat.life) for seat in seats]


def _said(note: dict[str, Any]) -> str:
    return str(note.get("round"))[:100]


def _round(note: dict[str, Any]) -> int:
    """The round in a note; -1 where it makes no sense."""
    value = note.get("round")
    return value if type(value) is int else -1


def _bytes(note: dict[str, Any]) -> int:
    """What a peer says that it has sent."""
    value = note.get("sent")
    return value if type(value) is int and 0 <= value < 1 << 60 else 0


def _members(note: dict[str, Any]) -> tuple[int, ...]:
    """The members of an average in a note, in rising order; none where they make no sense."""
    value = note.get("members")
    if not isinstance(value, list) or not all(type(m) is int for m in value) or value != sorted(set(value)):
        return ()
    return tuple(value)


def _address(note: dict[str, Any]) -> str:
    """Where a peer says that it listens; `Refused` unless it can be dialled."""
    said = str(note.get("address"))
    host, _, port = said.rpartition(":")
    try:
        ipaddress.ip_address(host)
        if port.isdecimal() and 0 < int(port) < 65536:
            return f"{host}:{int(port)}"
    except ValueError:
        pass
    raise Refused(f"a peer that listens at {said[:100]}: it must be a numeric address and a port, as in 10.0.0.1:29500")


def resumed(terms: Terms, folder: Path, parse: Parse, log: logging.Logger) -> Terms:
    """``terms`` with the method of the newest whole snapshot in ``folder``, where they name none: the run's first worker had
    named it, and it decides what hosts the run.
    """
    found = None if terms.method is not None else snapshot.newest(folder / "snapshots", log)
    return terms if found is None else replace(terms, method=parse(found[1]["method"]))


def host_for(terms: Terms) -> type[Host]:
    """What hosts a run on these terms; a server, where the method is still to be named."""
    return Coordinator if isinstance(terms.method, GossipMethod | PeriodicMethod) else RunServer
