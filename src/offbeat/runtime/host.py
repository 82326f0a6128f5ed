"""What keeps a real run together: workers come and go over links, each served by a thread of its own.

A `Host` knows who is there, hands out minibatches, records what happens, and keeps snapshots. What it says to a worker
depends on the kind of method: `server.RunServer` has the model, `coordinator.Coordinator` only knows where it is.
"""

from __future__ import annotations

import contextlib
import logging
import math
import platform
import socket
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor

from .. import __version__
from ..core.method import Method
from ..core.problem import Problem
from ..core.tree import finite
from ..core.values import require, require_count
from ..engines.simulator import messages
from ..trace import Evaluation, Event, Incident, Load, Note
from . import layout, snapshot
from .buffers import Meeting
from .evaluation import Evaluator
from .journal import Journal, Unwritten, beyond, whole
from .leases import Lease, Leases, leases_in, remedy
from .link import Frame, Link, LinkLost, accept, listen
from .meter import Meter, load
from .protocol.wire import DTYPES, Corrupt, Form, Header, Kind
from .shared_state import Kept, Told
from .streams import IN_A_ROW, Twins, sample
from .supervisor import ONCE

Parse = Callable[[str], Any]


SECRET = 16
"""Bytes that a token has at least where other machines can try it."""
TRANSPORTS = ("auto", "shared", "gloo", "tcp")
AGAIN = 5.0
"""Seconds until a snapshot that could not be written is tried again, at most."""
LAST, SOON = 120.0, 60.0
"""Seconds for which the model is tried to be written when the run is over, and when the host was told to stop (twice: no more)."""
EVALUATED = 600.0
"""Seconds that the last evaluation may take."""
STRANGERS = 128
"""Connections that have not yet proven that they know the token, at most; each has ten seconds for it."""


class Refused(ValueError):
    """A message or a worker that is not taken: the reason, and how the run stays."""


class NumberInUse(Refused):
    """The number of a worker that wants to join belongs to another one, which is alive. The worker asks again for a while; ``said``:
    that it has asked before is in the log."""

    said = False


class Diverging(Refused):
    """What a message holds, or would make of the model, is not finite."""


@dataclass(frozen=True)
class Terms:
    """What a run is, as its server knows it."""

    method: Method | None = None
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


class OtherKind(Exception):
    """The first worker names a method of another kind than this host's: ``method``."""

    def __init__(self, method: Method) -> None:
        super().__init__(f"{method!r} is of another kind")
        self.method = method


@dataclass(eq=False)
class Session:
    """One life of one worker."""

    worker: int
    incarnation: int
    process: Any  # what tells the worker's process from all others
    link: Link
    head: Header
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=20))
    moments: deque[tuple[float, int]] = field(
        default_factory=lambda: deque(maxlen=50)
    )  # when it had how many gradients
    lag: int = 0
    gap: float = math.nan
    life: int = 1  # how many lives of this worker there were, with this one

    @property
    def begun(self) -> int:
        """How many gradients it may have begun and not delivered; others of its minibatches are only loaded ahead."""
        return 1


class Host(ABC):
    """The host of one run, in folder ``folder``; ``parse`` reads a method's ``repr``, ``log`` is told what happens."""

    kind: ClassVar[type[Method]]
    """Methods of which it hosts runs."""

    def __init__(
        self,
        terms: Terms,
        token: str,
        folder: Path,
        parse: Parse,
        log: logging.Logger,
        host: str = "127.0.0.1",
        port: int = 0,
    ) -> None:
        if len(token.encode()) < SECRET and not _loopback(host):
            what = f"of {SECRET} bytes or more (openssl rand -hex 32 makes one)"
            raise ValueError(
                f"host {host!r} can be reached from other machines: set OFFBEAT_TOKEN to a secret {what} first"
            )
        self.terms, self.token, self.folder, self.parse = terms, token, folder, parse

        self.log = log
        self.method = terms.method
        self.problem = ""
        self.layout: layout.Layout = []
        self.kept = Kept()
        self.buffers = Meeting()
        self.dtype = torch.float32
        self.parameters = 0
        self.sessions: dict[int, Any] = {}
        self.other: OtherKind | None = None
        self.steps: dict[int, int] = {}  # gradients of each worker so far, all its lives together
        self.leases = Leases(terms.gradients)
        self.incarnation = 0
        self.refused = 0
        self.twins = Twins()
        self.finished: set[int] = set()  # workers whose own loop has ended
        self.lives: dict[int, int] = {}  # how many lives each worker has had
        self.coming: dict[int, Any] = {}  # numbers of workers that are being welcomed, and their processes
        self.lock = threading.RLock()
        self.opening = threading.Lock()  # held by the worker that brings the first model
        self.began = time.monotonic()
        self.last = 0.0  # seconds at the last gradient
        self.stopping = threading.Event()
        self.told = self.hurried = False  # to stop, and once more
        self.asked = math.inf  # when
        self.failure = ""  # what has gone wrong in this process, so that the run cannot go on here
        self.ending = ""  # what is waited for when the run is over
        self.threads: list[threading.Thread] = []  # one for each worker, and others
        self.strangers: dict[socket.socket, None] = {}  # who has not proven that it knows the token, the oldest first
        self.turned_away: set[tuple[int, str]] = set()  # numbers and processes of workers whose number is another one's
        self.snapshots = 0
        self.saving = threading.Lock()  # held by who writes a snapshot
        self.trouble = Unwritten("a snapshot", folder, self.log)
        folder.mkdir(parents=True, exist_ok=True)
        self.journal: Any = None
        self.listener = listen(host, port)
        self.port = self.listener.getsockname()[1]

    # what a kind of host writes

    @property
    @abstractmethod
    def running(self) -> bool:
        """Whether the run has a model."""

    @abstractmethod
    def x(self) -> Tensor:
        """The model that would be shipped now, the caller's own; under the lock. [d]"""

    @abstractmethod
    def _begin(self, x: Tensor) -> None:
        """The run begins at ``x`` [d]; under the lock."""

    @abstractmethod
    def _meet(self, link: Link, note: dict[str, Any], head: Header) -> tuple[Session, dict[str, Any]]:
        """The session of a worker that has said hello, with the link that it will use, and what the worker is told of it."""

    @abstractmethod
    def _join(self, session: Any, note: dict[str, Any]) -> None:
        """A worker is seated; under the lock."""

    @abstractmethod
    def _serve(self, session: Any) -> bool:
        """Serve a worker until it leaves; True where it says so itself."""

    @abstractmethod
    def _part(self, session: Any, orderly: bool) -> None:
        """A worker is no longer seated; under the lock."""

    @abstractmethod
    def _content(self) -> Callable[[], dict[str, Any]]:
        """What makes what a snapshot holds of the model as it is now; found under the lock, called outside of it."""

    @abstractmethod
    def _restore(self, method: Any, content: dict[str, Any]) -> list[int]:
        """Take the model from a snapshot's content; the workers that were there then."""

    # the run's life

    def run(self, watch: Callable[[], None] = lambda: None, evaluations: int = 0) -> bool:
        """Accept workers until the run is over or `stop` is called; then write what has become of it.

        ``watch`` is called some times a second. A task's model is evaluated beside the training, so many times and at the end.
        False where the host has failed, or what has become of the run could not be written; the log says why.
        Raises ``FileExistsError`` where the folder has snapshots that this run has not resumed from.
        """
        if not self.running and snapshot.found(self.folder / "snapshots"):
            self.listener.close()
            raise FileExistsError(
                f"{self.folder / 'snapshots'} is of an earlier run: resume it, or choose another folder"
            )
        self.spawn("who accepts workers", self._accept)
        evaluator = Evaluator(self, evaluations)
        try:
            self._attend(watch, evaluator)
        except Exception as error:
            self.fail("the host", error)
        return self.close(watch, evaluator) and not self.failure

    def _attend(self, watch: Callable[[], None], evaluator: Evaluator) -> None:
        """Write and look at what happens until the run is over."""
        due, meter = time.monotonic() + self.terms.every, Meter()
        while not (self.told or self.stopping.wait(0.2)) and self.other is None:
            with self.lock:
                if self.over():
                    return
            watch()
            evaluator.look()
            self._weigh(meter)
            self._flush()
            if time.monotonic() >= due:
                pause = self.terms.every if self.save() else min(self.terms.every, AGAIN)
                due = time.monotonic() + pause

    def spawn(self, what: str, run: Callable[..., None], *args: Any) -> threading.Thread:
        """Run in a thread of its own. Where it fails, the run ends: nobody would miss it otherwise."""

        def guarded() -> None:
            try:
                run(*args)
            except BaseException as error:
                self.fail(what, error)

        thread = threading.Thread(target=guarded, name=what, daemon=True)
        thread.start()
        self.threads.append(thread)
        return thread

    def fail(self, what: str, error: BaseException) -> None:
        """The run cannot go on in this process: it ends with a snapshot, from which it may be resumed."""
        self.log.error(
            f"{what} failed ({error!r}): the run ends with a snapshot\n{''.join(traceback.format_exception(error))}"
        )
        self.failure = self.failure or f"{what} failed ({error!r})"
        self.told = True

    @property
    def busy(self) -> list[str]:
        """Threads that have not ended. Python's own end would abort the process in one that is inside of torch."""
        return [thread.name for thread in self.threads if thread.is_alive()]

    def over(self) -> bool:
        """Whether all minibatches are done, or all workers have ended their loops, and everybody has left."""
        if self.sessions or not self.running:
            return False
        if self.terms.gradients is not None and self.leases.done >= self.terms.gradients:
            return True
        return len(self.finished) >= self.terms.workers

    def stop(self) -> None:
        """End as soon as possible, with a snapshot; called again later, without one that cannot be written. A signal's handler may
        call it: it takes no lock, as an event would."""
        now = time.monotonic()
        if not self.told:
            self.asked = now
        self.told, self.hurried = True, self.hurried or now - self.asked > ONCE

    def close(self, watch: Callable[[], None] = lambda: None, evaluator: Evaluator | None = None) -> bool:
        """Hang up, write a last snapshot and the model, and evaluate it; whether all is written."""
        self.stopping.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # else who waits for the next worker would still take one
        self.listener.close()
        for stranger in list(self.strangers):
            _hang_up(stranger)
        with self.lock:
            for session in list(self.sessions.values()):
                session.link.hang_up()
                self._gone(session, False)
            if not self.running:
                return True
        kept = self._keep(watch)
        if evaluator is not None:
            self._evaluated(evaluator, watch)
        with self.lock:
            kept = self.journal.close() and kept
        until = time.monotonic() + 2.0
        for thread in self.threads:
            thread.join(max(0.0, until - time.monotonic()))
        return kept

    def _keep(self, watch: Callable[[], None]) -> bool:
        """Write the last snapshot and the model, and try again for a while where that cannot be; whether they are written."""
        saved, trouble = False, Unwritten("the model", self.folder, self.log)
        if self.kept.large:
            self.log.warning(
                "the model is written without its frozen parameters and buffers, which are too large to be sent"
            )
        self.ending = "the model is written"
        began = time.monotonic()
        while True:
            saved = saved or self.save()
            try:
                snapshot.write_whole(self.folder / "model.pt", self.state_dict())
                trouble.written()
                if saved:
                    return True
            except OSError as error:
                trouble.failed(error)
            patience = SOON if self.told else LAST
            if self.hurried or time.monotonic() - began > patience:
                what = "a last snapshot" if trouble.why is None else "the model"
                late = time.monotonic() - began
                self.log.warning(f"{what} could not be written for {late:.1f} s: make room, and resume the run")
                return False
            watch()
            time.sleep(min(1.0, patience / 10))

    def _evaluated(self, evaluator: Evaluator, watch: Callable[[], None]) -> None:
        """Evaluate the model once more, and wait for it; one that was told to stop does not."""
        self.ending = "the model is evaluated"
        end, last = time.monotonic() + EVALUATED, False
        while not self.told and time.monotonic() < end:
            if not evaluator.busy:
                if last:
                    return
                evaluator.begin()
                last = True
            watch()
            time.sleep(0.02)
        if evaluator.busy:
            self.log.warning("an evaluation is broken off, as the run ends")

    def state_dict(self) -> dict[str, Tensor]:
        """The model that would be shipped, by the names of the module's parameters; ``{"x": ...}`` where it has none."""
        x = self.x().detach()
        sizes = [math.prod(shape) for _, shape in self.layout]
        if not sizes or sum(sizes) != x.numel():  # no module's, or one of several parts
            return {"x": x}
        parts = zip(self.layout, torch.split(x, sizes), strict=True)
        return self.kept.state_dict({name: part.view(shape).clone() for (name, shape), part in parts})

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
                    "life": s.life,
                }
                for _, s in sorted(self.sessions.items())
            ]
            done = sum(self.steps.values())
            return {
                "seconds": self.seconds,
                "gradients": done,
                "minibatches": self.leases.done,
                "total": self.leases.expected,
                "launched": self.terms.workers,
                "refused": self.refused,
                "workers": workers,
                "lives": dict(self.lives),
                "steps": dict(self.steps),
                "finished": sorted(self.finished),
                "ending": self.ending,
            }

    # workers

    def _accept(self) -> None:
        while not self.stopping.is_set():
            try:
                sock, address = self.listener.accept()
            except OSError as error:
                if not self.stopping.wait(0.1):  # what is refused to one worker, such as too many files, passes
                    self.log.warning(f"a worker could not be accepted ({error.strerror or error})")
                continue
            for thread in [thread for thread in self.threads if not thread.is_alive()]:
                self.threads.remove(thread)
            self.strangers[sock] = None
            try:
                if len(self.strangers) > STRANGERS:
                    oldest = next(iter(self.strangers))
                    self._known(oldest)
                    _hang_up(oldest)
                self.spawn(f"the session of {address[0]}:{address[1]}", self._session, sock, address)
            except RuntimeError as error:  # too many threads: that passes as well
                self._known(sock)
                sock.close()
                self.log.warning(f"a worker could not be accepted ({error})")

    def _known(self, sock: socket.socket) -> None:
        """A connection is no stranger's any more."""
        self.strangers.pop(sock, None)

    def _session(self, sock: socket.socket, address: tuple[Any, ...]) -> None:
        name = f"the worker at {address[0]}:{address[1]}"
        link: Link | None = None
        session: Session | None = None
        orderly = False
        links = contextlib.ExitStack()
        links.callback(sock.close)
        links.callback(self._known, sock)
        try:
            link = links.enter_context(contextlib.closing(accept(sock, self.token, name, self.terms.timeout)))
            self._known(sock)
            hello = link.recv({Kind.HELLO: 0, Kind.SHARED: 0}, "its hello")
            if hello.header.kind == Kind.SHARED:
                self.buffers.answer(link, hello.note, self.kept.told.entries if self.kept.told else [])
                return
            session = self._welcome(link, hello, links)
            orderly = self._serve(session)
        except PermissionError as error:
            self._refuse(f"{error}: no link is made")
        except OtherKind as other:
            self._tell(link, repr(other.method), "kind")
        except Corrupt as corrupt:
            self._refuse(str(corrupt))
            self._tell(link, str(corrupt), "corrupt")
        except Refused as refused:
            if not (isinstance(refused, NumberInUse) and refused.said):
                self._refuse(str(refused))
            kinds = {Diverging: "diverged", NumberInUse: "taken"}
            self._tell(link, str(refused), kinds.get(type(refused), "refused"))
        except LinkLost as lost:
            if not self.stopping.is_set():
                self.log.warning(str(lost))
        except Exception as error:  # ours; one worker's link is no reason to lose the run
            self._refuse(f"{link.name if link else name}: {error!r}\n{traceback.format_exc()}")
            self._tell(link, f"the server failed ({error!r}): see its log", "corrupt")
        finally:
            with links:
                if session is not None:
                    with self.lock:
                        self._gone(session, orderly)
                        finished = session.worker in self.finished
                    if orderly and finished and not self.over():
                        self.save()  # who has finished does not come again, should the server have to

    def _welcome(self, link: Link, hello: Frame, links: contextlib.ExitStack) -> Session:
        """Agree with a worker on the run, and seat it. ``links`` are closed at its end."""
        note = hello.note if isinstance(hello.note, dict) else {}
        worker = -1
        try:
            with self.opening if not self.running else contextlib.nullcontext():  # the first one brings the model
                first = not self.running
                try:
                    with self.lock:
                        self._agree(hello.header, note)
                        worker = self._number(note)
                        brings = self._share(note)
                        self.coming[worker] = note.get("process")
                        self.incarnation += 1
                        head = Header(Kind.REPLY, DTYPES.index(self.dtype), worker, self.incarnation)
                    link.name = f"worker {worker}"
                    assert self.method is not None
                    session, way = self._meet(link, note, head)
                    links.callback(session.link.close)
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
                    self._exchange(link, head, note, brings)
                    link.send(head._replace(kind=Kind.WELCOME), None, {**terms, "model": first})
                    session.link.meet()
                    if first:
                        frame = session.link.recv({Kind.MODEL: self._model.bytes}, "the model")
                        self._start(self._model.unpack(frame.payload))
                finally:
                    if not self.running:  # whoever comes next is the first
                        self.method, self.parameters, self.problem, self.layout = self.terms.method, 0, "", []
                        self.kept = Kept()
            return self._seat(session, note)
        finally:
            if worker >= 0:
                with self.lock:
                    self.coming.pop(worker, None)

    def _seat(self, session: Session, note: dict[str, Any]) -> Session:
        """A worker's life begins."""
        worker = session.worker
        with self.lock:
            if self.stopping.is_set():
                raise LinkLost("the server ends")
            old = self.sessions.get(worker)
            if old is not None:
                self.log.warning(f"worker {worker} is back: its link before is dead")
                old.link.hang_up()
                self._gone(old, False)
            self.sessions[worker] = session
            session.life = self.lives[worker] = self.lives.get(worker, 0) + 1
            self.leases.join(worker)
            self._join(session, note)
            self._note(Incident(self.seconds, worker, "joined"))
        self.log.info(f"worker {worker} has joined over {session.link.transport}")
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
            said = said or str(note.get("default") or "")
            if not said:
                raise Refused("neither the worker nor the launcher names a method: give --method, or one to Replica")
            try:
                method = self.parse(said)
            except ValueError as error:
                raise Refused(str(error)) from None
            if not isinstance(method, self.kind):
                if not isinstance(method, Method):
                    raise Refused(f"{said[:200]} is no method")
                self.other = OtherKind(method)
                raise LinkLost("the host changes, as the first worker's method is of another kind")
            self.method = method
        elif said and said != repr(self.method):
            raise Refused(
                f"the worker's method is {said[:300]}, the run's is {self.method!r}: name it in one place only"
            )
        parameters, dtype = note.get("parameters"), DTYPES[header.dtype]
        if not _whole(parameters) or not 1 <= parameters < 1 << 48:
            raise Refused(f"a model of {str(parameters)[:100]} parameters: it must be a whole number from 1 on")
        if self.parameters and (parameters, dtype) != (self.parameters, self.dtype):
            raise Refused(
                f"the worker's model has {parameters:,} parameters of {dtype}, the run's has {self.parameters:,} of "
                f"{self.dtype}: start the same script everywhere"
            )
        theirs = layout.read(note.get("layout"))
        if self.parameters and (different := layout.difference(theirs, self.layout)):
            raise Refused(
                f"{different}: names, shapes and order must be the same everywhere, so start the same script, and make no "
                "modules in the order of a set, which differs between processes"
            )
        if not self.parameters:
            self.parameters, self.dtype, self.layout = parameters, dtype, theirs
            self.problem = str(note.get("problem") or "")

    def _share(self, note: dict[str, Any]) -> bool:
        """Whether the worker is the first to tell of frozen parameters and buffers, which must be the same everywhere."""
        try:
            return self.kept.agree(Told.read(note.get("state")))
        except ValueError as error:
            raise Refused(str(error)) from None

    def _exchange(self, link: Link, head: Header, note: dict[str, Any], first: bool) -> None:
        """Take frozen parameters and buffers from the first worker, and bring another one what it has otherwise."""
        try:
            self.kept.meet(link, head, Told.read(note.get("state")), first)
        except Corrupt:
            raise
        except ValueError as error:
            raise Refused(str(error)) from None

    def _number(self, note: dict[str, Any]) -> int:
        """The number that a worker gets: the one that the launcher has named or that it had before, if it is still free."""
        asked = note.get("worker")
        if asked is not None:
            if not _whole(asked) or not 0 <= asked < 1 << 31:
                raise Refused(f"worker {str(asked)[:100]}: its number must be a whole one from 0 to {(1 << 31) - 1}")
            before, process = self.sessions.get(asked), note.get("process")
            if before is not None:
                mine = before.process == process
                there = not mine and before.link.living(3 * self.terms.beat)
            else:
                mine = asked not in self.coming or self.coming[asked] == process
                there = not mine
            if mine or (note.get("named", True) and not there):
                return int(asked)
            if note.get("named", True):
                refused = NumberInUse(
                    f"worker {asked} is another process, which is alive: unset OFFBEAT_WORKER, or give each worker a number of "
                    "its own"
                )
                refused.said = (asked, str(process)) in self.turned_away
                self.turned_away.add((asked, str(process)))
                raise refused
        taken = {*self.sessions, *self.coming, *self.finished}
        return next(i for i in range(len(taken) + 1) if i not in taken)

    def _start(self, x: Tensor) -> None:
        """The run begins at ``x``."""
        if not finite(x):
            raise Refused("the model that the worker brings is not finite: look at how it is initialised or loaded")
        with self.lock:
            assert self.method is not None
            self._begin(x)
            self.began = time.monotonic()
            self._open(0)

    def _header(self) -> dict[str, Any]:
        """What the trace begins with."""
        assert self.method is not None
        return {
            "engine": "runtime",
            "method": repr(self.method),
            "problem": self.problem,
            "gradients": self.terms.gradients,
            "seed": self.terms.seed,
            "messages": messages(self.method),
            "parameters": self.parameters,
            "dtype": str(self.dtype),
            "shard": list(self.terms.shard),
            "transport": self.terms.transport,
            "versions": {"offbeat": __version__, "torch": torch.__version__, "python": platform.python_version()},
        }

    def _hand(self, session: Session, note: dict[str, Any]) -> dict[str, Any]:
        """What a worker says of its minibatches, and the answer; they are the first server's. Under the lock."""
        if self.terms.shard[0]:
            return {"leases": []}
        try:
            answer = self.leases.hear(session.worker, note)
        except ValueError as error:
            raise Corrupt(f"worker {session.worker} speaks of {error}") from None
        if "refused" in answer:
            self._refuse(f"worker {session.worker}: {answer['refused']}")
        return answer

    def _used(self, session: Session, note: dict[str, Any]) -> None:
        """The worker has used minibatches, and others had a gradient that is not finite; under the lock."""
        used = leases_in(note.get("used"))
        if self.terms.shard[0]:
            self.leases.done += len(used)
        else:
            self.leases.use(session.worker, used)
            self._failed(session, leases_in(note.get("failed")))

    def _failed(self, session: Session, leases: list[Lease]) -> None:
        """A gradient of minibatches was not finite: those for which it is the second time are set aside; under the lock."""
        if aside := self.leases.fail(session.worker, leases):
            self._note(Incident(self.seconds, session.worker, "set aside", len(aside)))
            self.log.warning(f"set aside, as twice its gradient was not finite: {', '.join(map(str, aside))}")

    def _record(
        self,
        session: Session,
        step: int,
        count: int,
        note: dict[str, Any],
        length: int,
        extra: dict[str, float],
        first: Tensor | None = None,
    ) -> None:
        """Record ``count`` gradients of a worker from its ``step`` on, which took effect now, and of whose message ``first`` is a
        tensor; under the lock."""
        now = self.last = self.seconds
        losses, compute, waited = (_floats(note.get(name), count) for name in ("losses", "compute", "waited"))
        rates = _floats(note.get("lr"), count)
        self._compare(session.worker, step, losses, first)
        for k in range(count):
            last = k == count - 1
            figures = extra if last else {}
            if math.isfinite(rates[k]):
                figures = {**figures, "lr": rates[k]}
            event = Event(
                now,
                session.worker,
                step + k,
                session.lag,
                session.gap,
                math.nan,
                losses[k],
                compute[k],
                waited[k],
                float(length) if last else 0.0,
                extra=figures,
            )
            self.journal.add(event)
        if "load" in note and (said := load(now, session.worker, note["load"])):
            self._note(said)
        self.steps[session.worker] = step + count
        self._used(session, note)
        session.losses.extend(loss for loss in losses if math.isfinite(loss))
        session.moments.append((now, self.steps[session.worker]))

    def _compare(self, worker: int, step: int, losses: list[float], first: Tensor | None) -> None:
        """See whether the worker computes the same as another one: by its losses, or by a tensor of its message where it tells none."""
        last = len(losses) - 1
        for k, loss in enumerate(losses):
            mark = loss if math.isfinite(loss) else sample(first) if k == last and first is not None else None
            two = None if mark is None else self.twins.see(worker, step + k, mark)
            if two is not None and not self.terms.shard[0]:
                self.log.warning(
                    f"workers {two[0]} and {two[1]} compute the very same: {IN_A_ROW} losses or gradients in a row were equal, so the "
                    "work is done twice; the script sets a seed after its Replica is made, or draws from a generator with one seed "
                    "for all: set the seed before, add replica.id to it, or take minibatches from replica.shard(loader)"
                )

    def _gone(self, session: Session, orderly: bool) -> None:
        """A worker's life is over: under the lock."""
        if self.sessions.get(session.worker) is not session:
            return
        del self.sessions[session.worker]
        returned = self.leases.part(session.worker)
        lost = 0 if orderly else min(returned, session.begun)
        self._note(Incident(self.seconds, session.worker, "left" if orderly else "crashed", lost))
        self._part(session, orderly)
        if not orderly:
            self.buffers.forget(session.worker)
        if orderly:
            self.log.info(f"worker {session.worker} has left")
        else:
            self.log.warning(f"worker {session.worker} is lost")

    # what is kept

    def save(self) -> bool:
        """Write a snapshot, which names the place in the trace that it goes with; the run goes on meanwhile, for states are never
        changed in place. Whether it is written; what is wrong is said."""
        with self.saving:
            with self.lock:
                if not self.running or not self.journal.flush():
                    return False
                content, model = self._snapshot(), self._content()
                number = self.snapshots + 1
            content |= model()
            del model  # and the states that are not in it
            try:
                self.kept.write(self.folder / "snapshots")
                self.journal.sync()  # else a power cut could leave a trace that ends before that place
                snapshot.write(self.folder / "snapshots", number, content)
            except OSError as error:
                self.trouble.failed(error)
                return False
            self.trouble.written()
            self.snapshots = number
            return True

    def _snapshot(self) -> dict[str, Any]:
        """What a snapshot holds beside the model; under the lock."""
        return {
            "method": repr(self.method),
            "problem": self.problem,
            "layout": [tuple(entry) for entry in self.layout],
            "buffers": dict(self.kept.changed),
            "parameters": self.parameters,
            "dtype": DTYPES.index(self.dtype),
            "shard": list(self.terms.shard),
            "seconds": self.seconds,
            "incarnation": self.incarnation,
            "steps": dict(self.steps),
            "lives": dict(self.lives),
            "finished": sorted(self.finished),
            "leases": self.leases.state(),
            "trace": self.journal.place,
        }

    def resume(self, anew: bool = False) -> bool:
        """Go on from the newest whole snapshot of the folder; False where there is none.

        Whoever was there then is taken for dead, and joins anew. What was done since the snapshot is lost: said in the log.
        ``anew``: all workers are started anew, so that none has ended its loop; else those that had do not come again.
        """
        found = snapshot.newest(self.folder / "snapshots", self.log)
        if found is None:
            return False
        path, content = found
        said = content["method"]
        if self.method is not None and repr(self.method) != said:
            raise ValueError(f"{path} is of {said}, and the run of {self.method!r}: resume with the same method")
        if tuple(content["shard"]) != self.terms.shard:
            raise ValueError(f"{path} is of shard {content['shard']}, not of {list(self.terms.shard)}")
        method = self.parse(said)
        assert isinstance(method, Method)
        if not isinstance(method, self.kind):
            raise ValueError(f"{path} is of {said}, a method of another kind: name it with --method")
        self.method, self.problem, self.layout = method, content["problem"], layout.read(content["layout"])
        self.parameters, self.dtype = content["parameters"], DTYPES[content["dtype"]]
        self.kept = Kept.read(self.folder / "snapshots", self.log)
        self.kept.changed = dict(content["buffers"])
        there = self._restore(method, content)
        self.incarnation, self.steps = content["incarnation"] + 1_000_000, dict(content["steps"])
        self.lives = dict(content["lives"])
        self.finished = set() if anew else set(content["finished"])
        self.leases.load(content["leases"])
        self.began = time.monotonic() - content["seconds"]
        self.snapshots = int(path.stem)
        lost, seconds = self._open(content["trace"])
        for worker in there:
            self._note(Incident(self.seconds, worker, "crashed"))
        self.log.warning(
            f"resumed from {path.name} at {sum(self.steps.values()):,} gradients; lost since then: {lost:,} gradients, "
            f"{max(0.0, seconds - content['seconds']):.1f} s"
        )
        return True

    def _open(self, place: int) -> tuple[int, float]:
        """Open the trace to go on after ``place`` bytes; how many gradients were recorded beyond it, and until when."""
        path = self.folder / "trace.jsonl"
        lost = beyond(path, place) if place else (0, 0.0)
        there = whole(path, place)
        if there < place:
            self.log.warning(
                f"the last {place - there:,} of {place:,} bytes of the trace are missing, as after a power cut: it goes on "
                "after its last whole line, and cannot be replayed"
            )
        self.journal = Journal(path, there, self.log)
        if not there:
            self.journal.add(self._header())
        return lost

    def _note(self, note: Note) -> None:
        self.journal.add(note)

    def _weigh(self, meter: Meter) -> None:
        """Record what this process has had of its processors, about once a second."""
        with self.lock:
            if self.running and (said := meter.read(sum(self.steps.values()))):
                self._note(Load(self.seconds, -1, **said))

    def _flush(self) -> None:
        with self.lock:
            if self.running:
                self.journal.flush()

    def evaluate(self, problem: Problem) -> None:
        """Record how good the model is that would be shipped now; training goes on meanwhile."""
        with self.lock:
            x, done = self.x(), sum(self.steps.values())
            seconds = self.seconds if self.sessions else self.last
        figures = {name: float(value) for name, value in problem.evaluate(x).items()}
        with self.lock:
            self._note(Evaluation(seconds, done, figures))
            self.journal.flush()

    # refusals

    def _refuse(self, why: str) -> None:
        with self.lock:
            self.refused += 1
        self.log.warning(f"refused: {why}")

    def _tell(self, link: Link | None, why: str, what: str) -> None:
        if link is not None:
            with contextlib.suppress(LinkLost):
                note = {"why": why, "what": what, "timeout": self.terms.timeout}
                link.send(Header(Kind.REFUSED), None, note)

    def _diverged(self, session: Session, step: int, what: str, leases: list[Lease]) -> str:
        with self.lock:
            self._note(Incident(self.seconds, session.worker, "diverged"))
        return f"worker {session.worker}, step {step}: {what}; {remedy(leases)}"


def _hang_up(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _rate(moments: deque[tuple[float, int]]) -> float:
    if len(moments) < 2:
        return math.nan
    (began, before), (now, count) = moments[0], moments[-1]
    return (count - before) / (now - began) if now > began else math.nan


def _float(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return math.nan


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _floats(values: Any, count: int) -> list[float]:
    """``count`` numbers of a note, nan for what is none."""
    given = values if isinstance(values, list) else []
    return [_float(value) for value in given[:count]] + [math.nan] * max(0, count - len(given))
