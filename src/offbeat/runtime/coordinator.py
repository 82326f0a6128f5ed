"""The coordinator of a run without a server: it knows who is there and which round they are in. Models go between peers.

What it decides is `protocol.coordinator`'s. Here it is driven: frames, losses and time go in, and what comes out is sent and
recorded.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.gossip import GossipMethod
from ..core.method import Method
from ..core.periodic import PeriodicMethod
from ..core.tree import finite
from ..trace import Deeds, Incident
from . import snapshot
from .host import Diverging, Host, OtherKind, Parse, Refused, Session, Terms
from .link import Link, LinkLost, machine
from .protocol.averages import Seat
from .protocol.coordinator import Coordination
from .protocol.events import (
    Came,
    Decline,
    Event,
    HangUp,
    Log,
    Passed,
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
from .protocol.states import PeerSession
from .protocol.wire import Corrupt, Header, Kind
from .server import RunServer

WORDS = (
    Kind.BEGIN,
    Kind.REDUCE,
    Kind.STEP,
    Kind.MEET,
    Kind.ORPHAN,
    Kind.ENTER,
    Kind.LEAVE,
    Kind.SHARED,
)
"""What a peer may say without a payload."""


@dataclass(eq=False)
class Attendance(Session):
    """One life of one peer, and what is to be sent to it."""

    seat: Seat | None = None
    peer: PeerSession | None = None
    outbox: deque[SendFrame] = field(default_factory=deque)
    posting: threading.Lock = field(default_factory=threading.Lock)  # held by the thread that sends what is in it

    @property
    def begun(self) -> int:
        return 1 if self.peer is None else self.peer.begun


class Coordinator(Host):
    """The coordinator of a run with a gossip or periodic method."""

    kind = Method

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._coordination: Coordination | None = None  # once the run has a model
        self.wake = math.inf  # when it wants to be told of the time

    @property
    def running(self) -> bool:
        return self._coordination is not None

    @property
    def coordination(self) -> Coordination:
        """The run, which has begun."""
        assert self._coordination is not None
        return self._coordination

    def x(self) -> Tensor:
        return self.coordination.x()

    def _begin(self, x: Tensor) -> None:
        assert self.method is not None
        terms = self.terms
        self._coordination = Coordination(
            self.method, x, self.leases, time.monotonic(), terms.workers, terms.timeout, terms.every, terms.shard
        )
        self._coordination.finished = self.finished
        self.spawn("the coordinator's clock", self._clock)

    def resume(self, anew: bool = False) -> bool:
        found = super().resume(anew)
        if self._coordination is not None:
            self._coordination.finished = self.finished
        return found

    def _clock(self) -> None:
        """Tell the time, and let peers know that this end is alive: most of the time they only listen."""
        beat = time.monotonic()
        while not self.stopping.wait(max(0.0, min(beat, self.wake) - time.monotonic())):
            now = time.monotonic()
            if now >= self.wake:
                with self.lock:
                    self.wake = math.inf
                    self._handle(Passed())
                self._post()
            if now >= beat:
                beat = now + self.terms.beat
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
        with self.lock:
            there = self._coordination
            round, running = (0, False) if there is None else (there.open(), there.running)
        way = {"transport": self.terms.transport, "round": round, "running": running}
        return Attendance(head.worker, head.incarnation, note.get("process"), link, head, seat=seat), way

    def _join(self, session: Attendance, note: dict[str, Any]) -> None:
        assert session.seat is not None
        self._handle(Came(session.seat))
        session.peer = self.coordination.peers[session.worker]
        self._post()

    def _part(self, session: Attendance, orderly: bool) -> None:
        self._handle(Went(session.worker, session.incarnation))
        self._post()

    def _serve(self, session: Attendance) -> bool:
        due = {**dict.fromkeys(WORDS, 0), Kind.MODEL: self._model.bytes}
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
            x = self._model.unpack(frame.payload) if header.kind == Kind.MODEL else None
            model = x if x is not None and finite(x) else None
            said = Said(session.worker, session.incarnation, header.kind, note, header.step, model)
            with self.lock:
                if self.sessions.get(session.worker) is not session:
                    raise LinkLost(f"worker {session.worker} speaks on the link of a life that is over")
                own = self._handle(said)
            self._post()
            for effect in own:
                match effect:
                    case Save():
                        self.save()
                    case Refuse(_, why):
                        raise Corrupt(why)
                    case Unsound(_, step, what):
                        raise Diverging(self._diverged(session, step, what, []))
                    case HangUp(_, orderly):
                        return orderly

    def _handle(self, event: Event) -> list[Save | Refuse | Unsound | HangUp]:
        """Give the run an event, and record what follows; what is to be sent waits for `_post`. Under the lock. Returns what
        the thread of the session has to do that the event is of."""
        own: list[Save | Refuse | Unsound | HangUp] = []
        for effect in self.coordination.handle(event, time.monotonic()):
            match effect:
                case SendFrame(worker):
                    self.sessions[worker].outbox.append(effect)
                case RecordSteps(worker, count, note):
                    done = self.steps.get(worker, 0)
                    self._record(self.sessions[worker], done, count, note, _bytes(note), {})
                case RecordDeeds(worker, life, deeds):
                    self._note(Deeds(worker, life, deeds))
                case RecordSetAside(worker, leases):
                    self._note(Incident(self.seconds, worker, "set aside", len(leases)))
                    named = ", ".join(map(str, leases))
                    self.log.warning(f"set aside, as twice its gradient was not finite: {named}")
                case RecordDiverged(worker, step, what, leases):
                    self.log.warning(self._diverged(self.sessions[worker], step, what, leases))
                case Decline(_, why):
                    self._refuse(why)
                case Log(what):
                    self.log.warning(what)
                case Wake(at):
                    self.wake = at
                case Save() | Refuse() | Unsound() | HangUp():
                    own.append(effect)
        return own

    def _post(self) -> None:
        """Send what is to be sent. A peer that takes nothing holds up one thread, and only what goes to it."""
        with self.lock:
            sessions = [session for session in self.sessions.values() if session.outbox]
        for session in sessions:
            while session.outbox and session.posting.acquire(blocking=False):  # else its holder sends this as well
                try:
                    while session.outbox:
                        self._send(session, session.outbox.popleft())
                finally:
                    session.posting.release()

    def _send(self, session: Attendance, send: SendFrame) -> None:
        payload = None if send.model is None else self._model.pack(send.model)
        try:
            session.link.send(session.head._replace(kind=send.kind, step=send.step), payload, send.note)
        except LinkLost:
            session.link.hang_up()  # whose thread sees it

    def _content(self) -> Callable[[], dict[str, Any]]:
        content = {"version": 0, "x": self.x(), "round": self.coordination.step}
        return lambda: content

    def _restore(self, method: Any, content: dict[str, Any]) -> list[int]:
        self._begin(content["x"])
        self.coordination.step = content["round"]
        return []


def _bytes(note: dict[str, Any]) -> int:
    """What a peer says that it has sent."""
    value = note.get("sent")
    return value if type(value) is int and 0 <= value < 1 << 60 else 0


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
