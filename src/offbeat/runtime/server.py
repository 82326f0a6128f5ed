"""The server of a real run: workers come and go over links, each served by a thread of its own, one visit at a time.

A visit is a transaction: the message is checked, the handler makes new states, they are checked, and only then take the
place of the old ones. Nobody waits for anybody but for the lock: what a worker sends is received outside of it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import queue
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .. import __version__
from ..core.method import GradientServer, Message, ServerMethod
from ..core.problem import Problem
from ..core.protocol import Server
from ..core.values import require, require_count
from ..trace import Evaluation, Event, Incident, line
from . import snapshot
from .kernel import SMALLEST, Kernel
from .link import Frame, Link, LinkLost, SharedLink, accept, listen, machine
from .message import DTYPES, Corrupt, Form, Header, Kind, finite, leaves, rebuild, tame

Parse = Callable[[str], Any]


TRANSPORTS = ("auto", "shared", "gloo", "tcp")


class Refused(ValueError):
    """A message or a worker that is not taken: the reason, and how the run stays."""


class Diverging(Refused):
    """What a message holds, or would make of the model, is not finite."""


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


@dataclass(frozen=True)
class Terms:
    """What a run is, as its server knows it."""

    method: ServerMethod | None = None
    """The method; None: the first worker says."""
    gradients: int | None = None
    """Minibatches that are handed out, all workers together; None: until the workers' own loops end."""
    workers: int = 1
    """How many workers were launched; more may come."""
    seed: int = 0
    """What the order of the data follows from."""
    transport: str = "auto"
    """How payloads travel: shared, gloo, tcp, or auto: shared within a machine and gloo between two."""
    timeout: float = 30.0
    """Seconds of silence after which the other end of a link is taken for dead."""
    beat: float = 1.0
    """Seconds between two signs of life."""
    every: float = 30.0
    """Seconds between two snapshots."""
    shard: tuple[int, int] = (0, 1)
    """Which part of the model this server has, of how many."""

    def __post_init__(self) -> None:
        if self.gradients is not None:
            require_count(self, "gradients")
        require_count(self, "workers")
        require(self, "transport", self.transport in TRANSPORTS, f"choose one of {', '.join(TRANSPORTS)}")
        for name in ("timeout", "every"):
            require(self, name, 0 < getattr(self, name) < math.inf, "must be finite and above 0 seconds")
        require(
            self, "beat", 0 < self.beat < self.timeout, f"must be above 0 and below the timeout, {self.timeout:g} s"
        )
        require(self, "shard", 0 <= self.shard[0] < self.shard[1], "must be a number from 0 on, and how many there are")


class Tickets:
    """Numbers of minibatches, each handed out once; those of a worker that died come back."""

    def __init__(self, total: int | None) -> None:
        self.total, self.next, self.done = total, 0, 0
        self.returned: deque[int] = deque()

    def take(self, count: int) -> list[int]:
        """Up to ``count`` numbers; none where all are handed out."""
        taken: list[int] = []
        while len(taken) < count and self.returned:
            taken.append(self.returned.popleft())
        while len(taken) < count and (self.total is None or self.next < self.total):
            taken.append(self.next)
            self.next += 1
        return taken


@dataclass(eq=False)
class Session:
    """One life of one worker."""

    worker: int
    incarnation: int
    process: Any  # what tells the worker's process from all others
    link: Link
    head: Header
    push: Form
    reply: Form
    outbox: queue.SimpleQueue[tuple[int, Message]] = field(default_factory=queue.SimpleQueue)  # with their versions
    held: deque[int] = field(default_factory=deque)  # tickets that it has and has not used
    point: Tensor | None = None  # where its next gradient is taken, if the server knows [d]
    sent: Message | None = None  # the last reply, whose buffers are free when the next one goes out
    length: int | None = None  # how many gradients its next message must have, if the server knows
    visits: int = 0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    moments: deque[float] = field(default_factory=lambda: deque(maxlen=50))  # of its last gradients
    lag: int = 0
    gap: float = math.nan


class RunServer:
    """The server of one run, in folder ``folder``; ``parse`` reads a method's ``repr``, ``say`` logs a line."""

    def __init__(
        self,
        terms: Terms,
        token: str,
        folder: Path,
        parse: Parse,
        say: Callable[[str], None],
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        if not token and not _loopback(host):
            raise ValueError(f"host {host!r} can be reached from other machines: set OFFBEAT_TOKEN to a secret first")
        self.terms, self.token, self.folder, self.parse, self.say = terms, token, folder, parse, say
        self.method = terms.method
        self.problem = ""
        self.layout: list[Any] = []
        self.dtype = torch.float32
        self.parameters = 0
        self.server: Server | None = None
        self.sessions: dict[int, Session] = {}
        self.steps: dict[int, int] = {}  # gradients of each worker so far, all its lives together
        self.tickets = Tickets(terms.gradients)
        self.incarnation = 0
        self.refused = 0
        self.finished = 0  # workers whose own loop has ended
        self.coming: list[int] = []  # numbers of workers that are being welcomed
        self.calm = True  # whether the message that is served is far from what overflows
        self.lock = threading.RLock()
        self.opening = threading.Lock()  # held by the worker that brings the first model
        self.began = time.monotonic()
        self.last = 0.0  # seconds at the last gradient
        self.stopping = threading.Event()
        self.snapshots = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.kernel: Kernel | None = None
        self.journal: Any = None
        self.listener = listen(host, port)
        self.port = self.listener.getsockname()[1]

    # the run's life

    def run(self, watch: Callable[[], None] = lambda: None, end: Callable[[], None] = lambda: None) -> None:
        """Accept workers until the run is over or `stop` is called; then write what has become of it.

        ``watch`` is called some times a second, while training goes on, and ``end`` when everybody has gone.
        """
        if self.server is None and snapshot.put_aside(self.folder / "snapshots"):
            self.say(f"a new run begins: the snapshots of the one before are in {self.folder / 'snapshots.before'}")
        threading.Thread(target=self._accept, daemon=True).start()
        due = time.monotonic() + self.terms.every
        while not self.stopping.wait(0.2):
            with self.lock:
                if self.over():
                    break
            watch()
            if time.monotonic() >= due:
                self.save()
                due = time.monotonic() + self.terms.every
        self.close(end)

    def over(self) -> bool:
        """Whether all minibatches are done, or all workers have ended their loops, and everybody has left."""
        if self.sessions or self.server is None:
            return False
        if self.terms.gradients is not None and self.tickets.done >= self.terms.gradients:
            return True
        return self.finished >= self.terms.workers

    def stop(self) -> None:
        """End as soon as possible, with a snapshot."""
        self.stopping.set()

    def close(self, end: Callable[[], None] = lambda: None) -> None:
        """Hang up, write a last snapshot and the model; ``end`` is called before the trace is closed."""
        self.stopping.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # else who waits for the next worker would still take one
        self.listener.close()
        with self.lock:
            for session in list(self.sessions.values()):
                session.link.hang_up()
                self._gone(session, False)
            if self.server is None:
                return
            self.save()
            torch.save(self.state_dict(), self.folder / "model.part")
            os.replace(self.folder / "model.part", self.folder / "model.pt")
        end()
        with self.lock:
            self.journal.close()

    def state_dict(self) -> dict[str, Tensor]:
        """The model that would be shipped, by the names of the module's parameters; ``{"x": ...}`` where it has none."""
        assert self.server is not None
        x = self.server.x().detach()
        if not self.layout or sum(math.prod(shape) for _, shape in self.layout) != x.numel():
            return {"x": x}
        parts = torch.split(x, [math.prod(shape) for _, shape in self.layout])
        return {name: part.view(shape).clone() for (name, shape), part in zip(self.layout, parts, strict=True)}

    @property
    def seconds(self) -> float:
        """Seconds that the run has lasted."""
        return time.monotonic() - self.began

    def status(self) -> dict[str, Any]:
        """What there is to watch, now."""
        with self.lock:
            now = time.monotonic()
            workers = [
                {
                    "worker": s.worker,
                    "gradients": self.steps.get(s.worker, 0),
                    "rate": _rate(s.moments),
                    "lag": s.lag,
                    "gap": s.gap,
                    "loss": sum(s.losses) / len(s.losses) if s.losses else math.nan,
                    "seen": now - s.link.heard,
                    "life": s.incarnation,
                }
                for _, s in sorted(self.sessions.items())
            ]
            done = sum(self.steps.values())
            return {
                "seconds": self.seconds,
                "gradients": done,
                "total": self.terms.gradients,
                "refused": self.refused,
                "workers": workers,
            }

    # workers

    def _accept(self) -> None:
        while not self.stopping.is_set():
            try:
                sock, address = self.listener.accept()
            except OSError as error:
                if not self.stopping.wait(0.1):  # what is refused to one worker, such as too many files, passes
                    self.say(f"a worker could not be accepted ({error.strerror or error})")
                continue
            threading.Thread(target=self._session, args=(sock, address), daemon=True).start()

    def _session(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        name = f"the worker at {address[0]}:{address[1]}"
        link: Link | None = None
        session: Session | None = None
        orderly = False
        links = contextlib.ExitStack()
        links.callback(sock.close)
        try:
            link = links.enter_context(contextlib.closing(accept(sock, self.token, name, self.terms.timeout)))
            session = self._welcome(link, links)
            orderly = self._serve(session)
        except PermissionError as error:
            self._refuse(f"{error}: no link is made")
        except Corrupt as corrupt:
            self._refuse(str(corrupt))
            self._tell(link, str(corrupt), "corrupt")
        except Refused as refused:
            self._refuse(str(refused))
            self._tell(link, str(refused), "diverged" if isinstance(refused, Diverging) else "refused")
        except LinkLost as lost:
            if not self.stopping.is_set():
                self.say(str(lost))
        except Exception as error:  # ours; one worker's link is no reason to lose the run
            self._refuse(f"{link.name if link else name}: {error!r}\n{traceback.format_exc()}")
            self._tell(link, f"the server failed ({error!r}): see its log", "corrupt")
        finally:
            if session is not None:
                with self.lock:
                    self._gone(session, orderly)
                    finished = self.finished
                if orderly and finished and not self.over():
                    self.save()  # who has finished does not come again, should the server have to
            links.close()

    def _welcome(self, link: Link, links: contextlib.ExitStack) -> Session:
        """Agree with a worker on the run, and seat it; its first reply is in its outbox. ``links`` are closed at its end."""
        hello = link.recv({Kind.HELLO: 0}, "its hello")
        note = hello.note if isinstance(hello.note, dict) else {}
        worker = -1
        try:
            with self.opening if self.server is None else contextlib.nullcontext():  # the first one brings the model
                first = self.server is None
                try:
                    with self.lock:
                        self._agree(hello.header, note)
                        worker = self._number(note)
                        self.coming.append(worker)
                        self.incarnation += 1
                        head = Header(Kind.REPLY, DTYPES.index(self.dtype), worker, self.incarnation)
                    link.name = f"worker {worker}"
                    assert self.method is not None
                    push, reply = forms(self.method, self.parameters, self.dtype)
                    model = self._model.bytes
                    better, way = self._way(link, note, (max(reply.bytes, model), max(push.bytes, model)))
                    links.callback(better.close)
                    terms = {
                        "worker": worker,
                        "incarnation": head.incarnation,
                        "method": repr(self.method),
                        "seed": self.terms.seed,
                        "workers": self.terms.workers,
                        "beat": self.terms.beat,
                        "timeout": self.terms.timeout,
                        **way,
                    }
                    link.send(head._replace(kind=Kind.WELCOME), None, {**terms, "model": first})
                    better.meet()
                    if first:
                        frame = better.recv({Kind.MODEL: self._model.bytes}, "the model")
                        self._start(self._model.unpack(frame.payload))
                finally:
                    if self.server is None:  # whoever comes next is the first
                        self.method, self.parameters, self.problem, self.layout = self.terms.method, 0, "", []
            return self._seat(Session(worker, head.incarnation, note.get("process"), better, head, push, reply), note)
        finally:
            if worker >= 0:
                with self.lock:
                    self.coming.remove(worker)

    def _seat(self, session: Session, note: dict[str, Any]) -> Session:
        """A worker's life begins."""
        worker = session.worker
        with self.lock:
            if self.stopping.is_set():
                raise LinkLost("the server ends")
            old = self.sessions.get(worker)
            if old is not None:
                self.say(f"worker {worker} is back: its link before is dead")
                old.link.hang_up()
                self._gone(old, False)
            assert self.server is not None
            self.sessions[worker] = session
            message, version = self._kept(self.server.join(worker)), self.server.version
            self.server.own[worker] = self._kept(self.server.own[worker])
            self._note(Incident(self.seconds, worker, "joined"))
            self._hand(session, note)
            session.outbox.put((version, message))
        self.say(f"worker {worker} has joined over {session.link.transport}")
        return session

    @property
    def _model(self) -> Form:
        return Form(torch.empty(self.parameters, dtype=self.dtype, device="meta"))

    def _agree(self, header: Header, note: dict[str, Any]) -> None:
        """Refuse a worker that is at another run; the first one says what the terms leave open."""
        if note.get("shard", [0, 1]) != list(self.terms.shard):
            raise Refused(
                f"this server has shard {self.terms.shard}, and the worker wants {str(note.get('shard'))[:100]}"
            )
        said = str(note.get("method") or "")
        if self.method is None:
            if not said:
                raise Refused("neither the worker nor the launcher names a method: give --method, or one to Replica")
            try:
                method = self.parse(said)
            except ValueError as error:
                raise Refused(str(error)) from None
            if not isinstance(method, ServerMethod):
                raise Refused(f"{said[:200]} has no server: take a server method such as DanaZero()")
            self.method = method
        elif said and said != repr(self.method):
            raise Refused(
                f"the worker's method is {said[:300]}, the run's is {self.method!r}: name it in one place only"
            )
        parameters, dtype = note.get("parameters"), DTYPES[header.dtype]
        if not _whole(parameters) or not 1 <= parameters < 1 << 48:
            raise Refused(f"a model of {str(parameters)[:100]} parameters")
        if self.parameters and (parameters, dtype) != (self.parameters, self.dtype):
            raise Refused(
                f"the worker's model has {parameters:,} parameters of {dtype}, the run's has {self.parameters:,} of "
                f"{self.dtype}: start the same script everywhere"
            )
        if not self.parameters:
            self.parameters, self.dtype = parameters, dtype
            self.layout = _layout(note.get("layout"), parameters)
            self.problem = str(note.get("problem") or "")

    def _number(self, note: dict[str, Any]) -> int:
        """The number that a worker gets: the one that the launcher has named or that it had before, if it is still free."""
        asked = note.get("worker")
        if asked is not None:
            if not _whole(asked) or not 0 <= asked < 1 << 31:
                raise Refused(f"worker {str(asked)[:100]}: its number must be a whole one from 0 to {(1 << 31) - 1}")
            before = self.sessions.get(asked)
            mine = asked not in self.coming if before is None else before.process == note.get("process")
            if note.get("named", True) or mine:
                return int(asked)
        taken = {*self.sessions, *self.coming}
        return next(i for i in range(len(taken) + 1) if i not in taken)

    def _way(self, link: Link, note: dict[str, Any], sizes: tuple[int, int]) -> tuple[Link, dict[str, Any]]:
        """The link with the way for payloads that suits both ends, and what the other one must know of it."""
        near = note.get("machine") == machine()
        transport = self.terms.transport
        if transport == "auto":
            transport = "shared" if near else "gloo"
        if transport == "shared":
            if not near:
                raise Refused("a worker on another machine cannot share memory: take the transport gloo, tcp or auto")
            try:
                link = SharedLink(link.sock, link.name, link.timeout, sizes)
            except OSError as error:
                raise Refused(str(error)) from None
            return link, {"transport": "shared", "sizes": sizes, **link.offer()}
        if transport == "gloo":
            from .gloo import GlooLink

            return GlooLink(link.sock, link.name, link.timeout, True), {"transport": "gloo"}
        return link, {"transport": "tcp"}

    def _start(self, x: Tensor) -> None:
        """The run begins at ``x``."""
        if not finite(x):
            raise Refused("the model that the worker brings is not finite: look at how it is initialised or loaded")
        with self.lock:
            assert self.method is not None
            self.server = Server.start(self.method, x)
            self.server.handle = self._handle
            self.began = time.monotonic()
            self._open("w", 0)
            header = {
                "engine": "runtime",
                "method": repr(self.method),
                "problem": self.problem,
                "gradients": self.terms.gradients,
                "seed": self.terms.seed,
                "messages": "server",
                "parameters": self.parameters,
                "dtype": str(self.dtype),
                "shard": list(self.terms.shard),
                "transport": self.terms.transport,
                "versions": {"offbeat": __version__, "torch": torch.__version__, "python": platform.python_version()},
            }
            self._write(line(header))
        threading.Thread(target=self._fuse, daemon=True).start()

    def _hand(self, session: Session, note: dict[str, Any]) -> list[int]:
        want = note.get("want", 1)
        taken = self.tickets.take(want if isinstance(want, int) and 0 <= want <= 10_000 else 1)
        session.held.extend(taken)
        return taken

    def _serve(self, session: Session) -> bool:
        """Serve a worker until it leaves; True where it says so itself."""
        self._answer(session, *session.outbox.get(), list(session.held))
        due = {Kind.PUSH: session.push.bytes, Kind.LEAVE: 0, Kind.MASTER: 0, Kind.HELLO: 0}
        while True:
            frame = session.link.recv(due, "its next message")
            self._check(session, frame.header)
            note = frame.note if isinstance(frame.note, dict) else {}
            if frame.header.kind == Kind.LEAVE:
                with self.lock:
                    self.finished += bool(note.get("done"))
                    self._used(session, note.get("used"))
                return True
            if frame.header.kind == Kind.MASTER:
                with self.lock:
                    assert self.server is not None
                    x = self._kept(self.server.x())
                session.link.send(session.head._replace(kind=Kind.MASTER), self._model.pack(x))
                continue
            if frame.header.kind == Kind.HELLO:  # it needs more minibatches
                with self.lock:
                    tickets = self._hand(session, note)
                session.link.send(session.head._replace(kind=Kind.WELCOME), None, {"tickets": tickets})
                continue
            message = session.push.unpack(frame.payload)
            calm = tame(message)
            if not calm and not finite(message):
                raise Diverging(self._diverged(session, frame.header.step, "the message is not finite"))
            with self.lock:
                self.calm = calm
                self._visit(session, frame, message, note)
                tickets = self._hand(session, note)
            reply = self._await(session)
            if reply is None:
                return False
            self._answer(session, *reply, tickets)

    def _check(self, session: Session, header: Header) -> None:
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

    def _handle(self, s: Any, own: Any, msg: Message) -> tuple[Any, Any, Message]:
        """The method's handler as a transaction: what is not finite never takes the place of what is."""
        assert self.method is not None
        kernel = self.kernel
        try:
            new = (kernel or self.method.serve)(s, own, msg)
        except Exception as error:
            if kernel is None:
                raise
            self.say(f"the kernel has failed, and visits are eager again ({str(error).splitlines()[0][:200]})")
            self.kernel = kernel = None
            new = self.method.serve(s, own, msg)
        good = finite(new[2]) and (self.calm or finite(new[:2]))
        if kernel:  # the buffers of what is not kept are the next visit's
            kernel.spare(0, s if good else new[0])
            kernel.spare(1, own if good else new[1])
        if not good:
            raise FloatingPointError
        return new

    def _fuse(self) -> None:
        """Compile the handler of a large model while training goes on, and use it from then on where it is faster."""
        assert self.method is not None
        if self.parameters < SMALLEST or self.method.gated:
            return
        try:
            kernel = Kernel(self.method, torch.zeros(self.parameters, dtype=self.dtype))
            eager, fused = kernel.race()
        except Exception as error:  # whatever a compiler may raise: eager is right, only slower
            self.say(f"visits stay eager, as no kernel could be compiled ({str(error).splitlines()[0][:200]})")
            return
        self.say(f"a visit takes {1e3 * eager:.1f} ms eager and {1e3 * fused:.1f} ms fused")
        if fused < eager:
            with self.lock:
                self.kernel = kernel

    def _visit(self, session: Session, frame: Frame, message: Message, note: dict[str, Any]) -> None:
        """Serve one message, under the lock, and record it."""
        server, header, worker = self.server, frame.header, session.worker
        assert server is not None
        if self.sessions.get(worker) is not session:
            raise Corrupt(f"a late message of a life of worker {worker} that is over: refused")
        lag = server.lag(worker)
        gap, extra = self._measure(session, message)
        try:
            replies = server.visit(worker, message)
        except FloatingPointError:
            raise Diverging(self._diverged(session, header.step, "the model would not be finite any more")) from None
        for other, reply in replies.items():
            self.sessions[other].outbox.put((server.version, reply))
        now, count = self.seconds, header.gradients
        self.last = now
        losses, compute = _floats(note.get("losses"), count), _floats(note.get("compute"), count)
        for k in range(count):
            last = k == count - 1
            event = Event(
                now,
                worker,
                header.step + k,
                lag,
                gap,
                math.nan,
                losses[k],
                extra if last else {},
                compute[k],
                _float(note.get("waited")) if k == 0 else 0.0,
                float(header.length) if last else 0.0,
            )
            self._write(line(event))
        self.steps[worker] = header.step + count
        self._used(session, note.get("used"))
        session.visits += 1
        session.lag, session.gap = lag, gap
        session.losses.extend(loss for loss in losses if math.isfinite(loss))
        session.moments.extend([now] * count)

    def _used(self, session: Session, count: Any) -> None:
        """The worker has used so many of the minibatches that it was given first."""
        for _ in range(min(count if isinstance(count, int) else 0, len(session.held))):
            session.held.popleft()
            self.tickets.done += 1

    def _measure(self, session: Session, message: Message) -> tuple[float, dict[str, float]]:
        """The gap and the method's own figures: always for a small model, for a large one at every tenth visit."""
        server = self.server
        assert server is not None
        if self.parameters > 100_000 and session.visits % 10:
            return math.nan, {}
        figures = server.method.measure(server.state, server.own[session.worker], message)
        gap = math.nan
        if session.point is not None:
            gap = float((server.x() - session.point).norm()) / self.parameters**0.5
        return gap, {name: float(value) for name, value in figures.items()}

    def _await(self, session: Session) -> tuple[int, Message] | None:
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

    def _answer(self, session: Session, version: int, reply: Message, tickets: list[int]) -> None:
        """Send a reply: outside of the lock, for a worker may be slow to take it."""
        if isinstance(self.method, GradientServer):
            session.point = self.method.params(self.method.init(reply))
        if self.kernel and session.sent is not None:
            self.kernel.spare(2, session.sent)
        session.sent = reply if self.kernel else None
        if self.terms.shard[1] == 1:  # else the first server's word counts
            assert self.method is not None
            session.length = self.method.length(self.method.init(_first(reply)))
        head = session.head._replace(step=self.steps.get(session.worker, 0), version=version)
        session.link.send(head, session.reply.pack(reply), {"tickets": tickets})

    def _gone(self, session: Session, orderly: bool) -> None:
        """A worker's life is over: under the lock."""
        if self.sessions.get(session.worker) is not session:
            return
        del self.sessions[session.worker]
        self.tickets.returned.extend(session.held)
        lost = 0 if orderly else len(session.held)
        session.held.clear()
        assert self.server is not None
        self._note(Incident(self.seconds, session.worker, "left" if orderly else "crashed", lost))
        for other, reply in self.server.leave(session.worker).items():
            self.sessions[other].outbox.put((self.server.version, reply))
        self.say(f"worker {session.worker} has left" if orderly else f"worker {session.worker} is lost")

    # what is kept

    def _kept(self, value: Any) -> Any:
        """``value``, which stays as it is when the next visits write into spare buffers; under the lock."""
        return _copy(value) if self.kernel else value

    def save(self) -> Path | None:
        """Write a snapshot; the run goes on meanwhile, for states are never changed in place."""
        with self.lock:
            server = self.server
            if server is None:
                return None
            self.journal.flush()
            self.snapshots += 1
            content = {
                "method": repr(self.method),
                "problem": self.problem,
                "layout": self.layout,
                "parameters": self.parameters,
                "dtype": DTYPES.index(self.dtype),
                "shard": list(self.terms.shard),
                "seconds": self.seconds,
                "version": server.version,
                "incarnation": self.incarnation,
                "steps": dict(self.steps),
                "finished": self.finished,
                "tickets": [self.tickets.next, self.tickets.done],
                "returned": [*self.tickets.returned, *(t for s in self.sessions.values() for t in s.held)],
                "trace": self.journal.tell(),
                "state": leaves(self._kept(server.state)),
                "own": {worker: leaves(self._kept(own)) for worker, own in server.own.items()},
                "clock": dict(server.clock),
            }
            number = self.snapshots
        return snapshot.write(self.folder / "snapshots", number, content)

    def resume(self) -> bool:
        """Go on from the newest whole snapshot of the folder; False where there is none.

        Whoever was there then is taken for dead, and joins anew. What was done since the snapshot is lost: said in the log.
        """
        found = snapshot.newest(self.folder / "snapshots", self.say)
        if found is None:
            return False
        path, content = found
        said = content["method"]
        if self.method is not None and repr(self.method) != said:
            raise ValueError(f"{path} is of {said}, and the run of {self.method!r}: resume with the same method")
        if tuple(content["shard"]) != self.terms.shard:
            raise ValueError(f"{path} is of shard {content['shard']}, not of {list(self.terms.shard)}")
        method = self.parse(said)
        assert isinstance(method, ServerMethod)
        self.method, self.problem, self.layout = method, content["problem"], content["layout"]
        self.parameters, self.dtype = content["parameters"], DTYPES[content["dtype"]]
        like = method.init_server(torch.zeros(self.parameters, dtype=self.dtype))
        _, own, _ = method.admit(like)
        server = Server(method, rebuild(like, content["state"]), content["version"])
        server.handle = self._handle
        server.own = {worker: rebuild(own, parts) for worker, parts in content["own"].items()}
        server.clock = dict(content["clock"])
        server.seen = dict.fromkeys(server.own, server.version)
        self.server = server
        self.incarnation, self.steps = content["incarnation"] + 1_000_000, dict(content["steps"])
        self.finished = content["finished"]
        self.tickets.next, self.tickets.done = content["tickets"]
        self.tickets.returned.extend(content["returned"])
        self.began = time.monotonic() - content["seconds"]
        self.snapshots = int(path.stem)
        lost, seconds = self._open("r+", content["trace"])
        for worker in list(server.own):
            self._note(Incident(self.seconds, worker, "crashed"))
            server.leave(worker)
        threading.Thread(target=self._fuse, daemon=True).start()
        self.say(
            f"resumed from {path.name} at {sum(self.steps.values()):,} gradients; lost since then: {lost:,} gradients, "
            f"{max(0.0, seconds - content['seconds']):.1f} s"
        )
        return True

    def _open(self, mode: str, place: int) -> tuple[int, float]:
        """Open the trace to go on after ``place`` bytes; how many gradients were recorded beyond it, and until when."""
        path = self.folder / "trace.jsonl"
        lost, seconds = 0, 0.0
        if mode == "r+" and path.exists():
            with open(path, encoding="utf-8") as file:
                file.seek(place)
                for text in file:
                    with contextlib.suppress(ValueError):  # a line that was cut
                        entry = json.loads(text)
                        if "step" in entry:
                            lost, seconds = lost + 1, entry["seconds"]
        mode = mode if path.exists() else "w"
        self.journal = open(path, mode, buffering=1, encoding="utf-8")  # noqa: SIM115  (a kill loses no line)
        self.journal.seek(place)
        self.journal.truncate()
        return lost, seconds

    def _write(self, text: str) -> None:
        if not self.journal.closed:  # what happens after the end is no part of the run
            self.journal.write(text + "\n")

    def _note(self, note: Incident | Evaluation) -> None:
        self._write(line(note))

    def evaluate(self, problem: Problem) -> None:
        """Record how good the model is that would be shipped now; training goes on meanwhile."""
        with self.lock:
            assert self.server is not None
            x, done = self._kept(self.server.x()), sum(self.steps.values())
            seconds = self.seconds if self.sessions else self.last
        figures = {name: float(value) for name, value in problem.evaluate(x).items()}
        with self.lock:
            self._note(Evaluation(seconds, done, figures))
            self.journal.flush()

    # refusals

    def _refuse(self, why: str) -> None:
        with self.lock:
            self.refused += 1
        self.say(f"refused: {why}")

    def _tell(self, link: Link | None, why: str, what: str) -> None:
        if link is not None:
            with contextlib.suppress(LinkLost):
                link.send(Header(Kind.REFUSED), None, {"why": why, "what": what})

    def _diverged(self, session: Session, step: int, what: str) -> str:
        with self.lock:
            self._note(Incident(self.seconds, session.worker, "diverged"))
        return f"worker {session.worker}, step {step}: {what}; lower the learning rate or lengthen the warm-up"


def _first(message: Message) -> Message:
    """The message for a model of one parameter."""
    return rebuild(message, [t[:1] if t.dim() else t for t in leaves(message)])


def _copy(value: Any) -> Any:
    return rebuild(value, [t.clone() for t in leaves(value)])


def _loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _rate(moments: deque[float]) -> float:
    span = moments[-1] - moments[0] if len(moments) > 1 else 0.0
    return (len(moments) - 1) / span if span > 0 else math.nan


def _float(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _layout(given: Any, parameters: int) -> list[Any]:
    """Names and shapes of a module's parameters as a worker has told them; none unless they fit."""
    try:
        layout = [(str(name), [int(n) for n in shape]) for name, shape in given]
    except (TypeError, ValueError, OverflowError):
        return []
    fits = sum(math.prod(shape) for _, shape in layout) == parameters
    return list(layout) if fits and all(n >= 0 for _, shape in layout for n in shape) else []


def _floats(values: Any, count: int) -> list[float]:
    """``count`` numbers of a note, nan for what is none."""
    given = values if isinstance(values, list) else []
    return [_float(value) for value in given[:count]] + [math.nan] * max(0, count - len(given))
