"""The server of a real run: it has the model, and workers visit it one at a time.

A visit is a transaction: the message is checked, the handler makes new states, they are checked, and only then take the
place of the old ones. Nobody waits for anybody but for the lock: what a worker sends is received outside of it.
"""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.method import GradientServer, Message, ServerMethod
from ..core.server import Handler, NotFinite, ParameterServer
from ..core.tree import finite, leaves, rebuild
from ..engines.kernel import ALIGNED, Visits
from .host import Diverging, Host, Refused, Session
from .leases import leases_in
from .link import Frame, Link, LinkLost
from .protocol.wire import DTYPES, Corrupt, Form, Header, Kind
from .way import offered

LARGE = 500_000
"""Parameters from which a compiled visit gains more than its compilation costs."""


def forms(method: ServerMethod, parameters: int, dtype: torch.dtype) -> tuple[Form, Form]:
    """The forms of a worker's messages and of the server's replies, for a model of so many parameters."""
    x = torch.zeros(3, dtype=dtype)  # a small model tells the structure, and which tensors are as long as it
    _, _, reply = method.admit(method.init_server(x))
    w = method.init(reply)
    push = method.push(method.local(w, torch.zeros_like(method.params(w))))

    def grown(message: Message) -> Form:
        sizes = [torch.empty(parameters if t.dim() else (), dtype=t.dtype, device="meta") for t in leaves(message)]
        return Form(rebuild(message, sizes))

    return grown(push), grown(reply)


@dataclass(eq=False)
class Visitor(Session):
    """One life of one worker of a server."""

    push: Form = Form(torch.empty(0))
    reply: Form = Form(torch.empty(0))
    outbox: queue.SimpleQueue[tuple[int, Message]] = field(default_factory=queue.SimpleQueue)  # with their versions
    point: Tensor | None = None  # where its next gradient is taken, if the server knows [d]
    length: int | None = None  # how many gradients its next message must have, if the server knows
    visits: int = 0

    @property
    def begun(self) -> int:
        return self.length or 1


class RunServer(Host):
    """The server of a run with a `ServerMethod`."""

    kind = ServerMethod
    server: ParameterServer | None = None
    visits: Visits
    into: Sequence[Tensor] = ()
    """Where the vectors of the reply to what is served may be written."""

    @property
    def running(self) -> bool:
        return self.server is not None

    def x(self) -> Tensor:
        assert self.server is not None
        return self.server.x()

    def _begin(self, x: Tensor) -> None:
        assert isinstance(self.method, ServerMethod)
        self.server = ParameterServer.start(self.method, x, self._handler)

    def _handler(self, method: ServerMethod) -> Handler:
        """What serves messages from now on: see `ParameterServer.handler`."""
        self.visits = visits = Visits(method, torch.empty(self.parameters, dtype=self.dtype))
        part, of = self.terms.shard
        if visits.sums and of > 1:
            raise Refused(
                f"{method!r} needs sums over the whole model, and this server has part {part} of {of}: run one "
                "server, with workers of one rank"
            )
        if self.parameters >= LARGE:
            self.spawn("the search for the fastest way of a visit", self._warm)
        return lambda s, own, msg: visits.transaction(s, own, msg, self.into)

    def _meet(self, link: Link, note: dict[str, Any], head: Header) -> tuple[Visitor, dict[str, Any]]:
        assert isinstance(self.method, ServerMethod)
        push, reply = forms(self.method, self.parameters, self.dtype)
        model = self._model.bytes
        sizes = max(reply.bytes, model), max(push.bytes, model)
        link, way = offered(link, note.get("machine"), self.terms.transport, sizes)
        return Visitor(head.worker, head.incarnation, note.get("process"), link, head, push=push, reply=reply), way

    def _join(self, session: Visitor, note: dict[str, Any]) -> None:
        assert self.server is not None
        message, version = self.server.join(session.worker), self.server.version
        session.outbox.put((version, message))

    def _part(self, session: Visitor, orderly: bool) -> None:
        assert self.server is not None
        for other, reply in self.server.leave(session.worker).items():
            self.sessions[other].outbox.put((self.server.version, reply))

    def _serve(self, session: Visitor) -> bool:
        """Serve a worker until it leaves; True where it says so itself."""
        self._answer(session, *session.outbox.get(), {"leases": []})
        due = {Kind.PUSH: session.push.bytes, Kind.MODEL: self._model.bytes}
        due |= {Kind.LEAVE: 0, Kind.MASTER: 0, Kind.HELLO: 0, Kind.SHARED: 0}
        while True:
            frame = session.link.recv(due, "its next message", lent=due)
            self._check(session, frame.header)
            note = frame.note if isinstance(frame.note, dict) else {}
            if frame.header.kind == Kind.LEAVE:
                with self.lock:
                    if note.get("done"):
                        self.finished.add(session.worker)
                    self._used(session, note)
                return True
            if frame.header.kind == Kind.SHARED:
                self.kept.take(session.link, note)
                continue
            if frame.header.kind == Kind.MODEL:
                self._begin_at(session, self._model.unpack(frame.payload))
                self._answer(session, *session.outbox.get(), {"leases": []})
                continue
            if frame.header.kind == Kind.MASTER:
                if session.point is not None:
                    session.point = session.point.clone()  # which may lie where the answer comes
                with self.lock:
                    x = self.x()
                session.link.send(session.head._replace(kind=Kind.MASTER), self._model.pack(x))
                continue
            if frame.header.kind == Kind.HELLO:  # it needs more minibatches
                with self.lock:
                    answer = self._hand(session, note)
                session.link.send(session.head._replace(kind=Kind.WELCOME), None, answer)
                continue
            message = session.push.unpack(frame.payload)
            with self.lock:
                self._visit(session, frame, message, note)
                leases = self._hand(session, note)
            reply = self._await(session)
            if reply is None:
                return False
            self._answer(session, *reply, leases)
            del message, reply  # whose memory would else be kept until the next ones are there

    def _begin_at(self, session: Visitor, x: Tensor) -> None:
        """A worker's script has set weights ``x`` [d] before its first step. They are where the run begins if no gradient was taken
        in it: workers that have begun elsewhere join again. Either way the worker gets a first reply."""
        with self.lock:
            server, worker = self.server, session.worker
            assert server is not None
            if self.steps.get(worker, 0) == server.version == 0 and not torch.equal(x, server.x()):
                if not finite(x):
                    raise Refused("the weights that the worker's script has set are not finite: look at what it loads")
                self.log.info(
                    f"worker {worker} has loaded weights before the run's first gradient; the run begins there"
                )
                for other in list(self.sessions.values()):
                    if other is not session:
                        other.link.hang_up()
                        self._gone(other, False)
                self._begin(x.clone())
            else:
                self._part(session, True)
            assert self.server is not None
            session.outbox.put((self.server.version, self.server.join(worker)))

    def _check(self, session: Visitor, header: Header) -> None:
        """`Corrupt` unless the header is of this life of this worker, and next in order."""
        if (header.worker, header.incarnation) != (session.worker, session.incarnation):
            raise Corrupt(
                f"life {header.incarnation} of worker {header.worker} speaks on the link of life {session.incarnation} "
                f"of worker {session.worker}: refused"
            )
        if header.kind != Kind.PUSH:
            return
        due, length = self.steps.get(session.worker, 0), session.length
        ok = 1 <= header.gradients <= 1_000_000 if length is None else header.gradients == length
        if header.step != due or not ok or header.dtype != session.head.dtype:
            raise Corrupt(
                f"worker {session.worker} brings {header.gradients} gradients from its step {header.step} on, of dtype "
                f"{DTYPES[header.dtype]}; due are {length or 'some'} from step {due} on, of {self.dtype}"
            )

    def _warm(self) -> None:
        """Find the fastest way to serve a large model, while training goes on."""
        try:
            seconds = self.visits.race()
        except Exception as error:  # whatever a compiler may raise: all ways are right, some slower
            self.log.info(f"visits stay uncompiled, as no kernel could be made ({str(error).splitlines()[0][:200]})")
        else:
            took = ", ".join(f"{1e3 * s:.1f} ms {way}" for way, s in seconds.items())
            self.log.info(f"a visit takes {took}")

    def _visit(self, session: Visitor, frame: Frame, message: Message, note: dict[str, Any]) -> None:
        """Serve one message, under the lock, and record it."""
        server, header, worker = self.server, frame.header, session.worker
        assert server is not None
        if self.sessions.get(worker) is not session:
            raise Corrupt(f"a late message of a life of worker {worker} that is over: refused")
        try:
            server.tell(note.get("lr"))
        except ValueError as error:
            raise Corrupt(f"worker {worker} brings a gradient with {error}") from None
        brought = leases_in(note.get("used"))
        lag = server.lag(worker)
        gap, extra = self._measure(session, message)
        self.into = self._places(session) if self.visits.raced else ()
        try:
            replies = server.visit(worker, message)
        except NotFinite as wrong:
            self._failed(session, brought)
            raise Diverging(self._diverged(session, header.step, str(wrong), brought)) from None
        for other, reply in replies.items():
            self.sessions[other].outbox.put((server.version, reply))
        session.visits += 1
        session.lag, session.gap = lag, gap
        self._record(
            session, header.step, header.gradients, note, header.length, extra, next(iter(leaves(message)), None)
        )

    def _places(self, session: Visitor) -> Sequence[Tensor]:
        """Where a kernel may write the vectors of the worker's next reply; none where they would have to be brought to it."""
        room = session.link.room(session.reply.bytes)
        places = () if room is None else [t for t in leaves(session.reply.unpack(room)) if t.dim()]
        return () if any(t.data_ptr() % ALIGNED for t in places) else places

    def _measures(self, session: Visitor) -> bool:
        """Whether the next visit is measured: always for a small model, for a large one every tenth."""
        return self.parameters <= 100_000 or not session.visits % 10

    def _measure(self, session: Visitor, message: Message) -> tuple[float, dict[str, float]]:
        """The gap and the method's own figures, at a visit that is measured."""
        server = self.server
        assert server is not None
        if not self._measures(session):
            return math.nan, {}
        gap = math.nan if session.point is None else server.gap(session.point)
        return gap, server.figures(session.worker, message)

    def _await(self, session: Visitor) -> tuple[int, Message] | None:
        """The reply for a worker and its version; it may have to wait for others. None where the worker is gone by then."""
        while True:
            try:
                return session.outbox.get(timeout=self.terms.beat)
            except queue.Empty:
                pass
            if self.stopping.is_set() or self.sessions.get(session.worker) is not session:
                return None
            session.link.beat(session.head)
            session.link.drain()
            if time.monotonic() - session.link.heard > self.terms.timeout:
                raise LinkLost(
                    f"worker {session.worker} was silent for {self.terms.timeout:g} s while its reply waited"
                )

    def _answer(self, session: Visitor, version: int, reply: Message, leases: dict[str, Any]) -> None:
        """Send a reply: outside of the lock, for a worker may be slow to take it."""
        payload = session.reply.pack(reply, session.link.room(session.reply.bytes))
        if isinstance(self.method, GradientServer):  # as it lies in the payload, so that the reply's own memory is free
            measured = self._measures(session)
            session.point = self.method.params(self.method.init(session.reply.unpack(payload))) if measured else None
        assert isinstance(self.method, ServerMethod)
        if type(self.method).length is ServerMethod.length:
            session.length = self.method.period
        elif self.terms.shard[1] == 1:  # else the first server's word counts
            session.length = self.method.length(self.method.init(_first(reply)))
        head = session.head._replace(step=self.steps.get(session.worker, 0), version=version)
        session.link.send(head, payload, leases)

    def _content(self) -> Callable[[], dict[str, Any]]:
        assert self.server is not None
        method, version, state, there = (
            self.server.method,
            self.server.version,
            self.server.state,
            dict(self.server.own),
        )

        def content() -> dict[str, Any]:
            """The state without the workers, whom a resume takes for dead: so it is as large as with none of them."""
            rest = state
            for own in there.values():
                rest = method.leave(rest, own)
            return {"version": version, "state": leaves(rest), "there": list(there)}

        return content

    def _restore(self, method: ServerMethod, content: dict[str, Any]) -> list[int]:
        like = method.init_server(torch.zeros(3, dtype=self.dtype))  # its structure
        self.server = ParameterServer(method, rebuild(like, content["state"]), content["version"], self._handler)
        return list(content["there"])


def _first(message: Message) -> Message:
    """The message for a model of one parameter."""
    return rebuild(message, [t[:1] if t.dim() else t for t in leaves(message)])
