"""One peer of a real run without a server: a monitor whose loop talks to other peers, and a thread that answers each.

A coordinator knows who is there and which round they are in; models go between peers only. A send is done when the other
end has acknowledged it; one that is not is sent again under the same number, which the other end takes once, until the
coordinator says that the receiver is dead: then it comes back. So nothing is lost or doubled among the living. Who pushes
does not wait for all that: a thread brings the message, and the next one to the same peer comes back at once meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..core.gossip import GossipMethod, PairGossipMethod, PushGossipMethod, RoundGossipMethod
from ..core.method import Message, Method
from ..core.periodic import OuterMethod, PeriodicMethod
from ..core.protocol import AllReduce, Ask, Begin, Gradient, Inbox, Loop, Node, Recv, Request, Send, give_back, loop
from ..core.tree import apart, leaves, rebuild
from ..failure import Diverged
from ..trace import Trace
from .circle import Circle, joint
from .exit import WorkerThread
from .leases import Lease, Leases, leases_in, remedy
from .link import Frame, Link, LinkLost, accept, dial, listen, look_out, machine
from .place import Place
from .protocol.wire import DTYPES, Corrupt, Form, Header, Kind, finite
from .shared_state import Shared, greeted
from .team import Team
from .way import offered, taken
from .worker import Driver, NumberTaken, Parse, Terms, TurnedAway

if TYPE_CHECKING:
    from .gloo import Group

PAUSE = 0.005
"""Seconds for which a thread leaves a peer's messages to the loop, which has taken the last one."""

DEEDS = 10_000
"""How many deeds go in one note: a peer that is visited while it is busy has many to tell."""


def talk(method: Method, x: Tensor) -> tuple[Form, Form, Form]:
    """The forms of a peer's message, of the answer to it where it is visited, and of its whole state."""
    inner, state = method, method.init(x)
    w = state
    while isinstance(inner, OuterMethod):
        inner, w = inner.inner, w.inner
    message: Message = ()
    answer: Message = ()
    if isinstance(inner, RoundGossipMethod):
        message = inner.send(w, {1: 0.5}, 0.5)[1][1]
    elif isinstance(inner, PushGossipMethod):
        message = inner.send(w)[1]
    elif isinstance(inner, PairGossipMethod):
        message = inner.offer(w)
        answer = inner.meet(w, message)[1]
    return Form.of(message), Form.of(answer), Form.of(state)


class Entry(NamedTuple):
    """A message that has come and is not yet taken."""

    which: tuple[int, int, int]  # its source, which life of it, and its number there
    round: int | None
    message: Message


@dataclass(eq=False)
class Standing:
    """A circle or a process group for averages, which stands until somebody comes or goes."""

    name: str
    ranks: tuple[int, ...]
    living: tuple[tuple[int, int], ...]  # the workers, and their lives
    group: Group | Circle | None = None

    def close(self) -> None:
        """Whoever still relies on it sees that it is gone."""
        if self.group is not None:
            self.group.close()
            self.group = None


class Posted(NamedTuple):
    """A message that was sent to a peer and is not acknowledged yet."""

    head: Header
    to: int
    life: int
    msg: Message
    note: Any
    link: Link | None  # over which it was sent; None where that has failed


@dataclass(eq=False)
class Caller:
    """A peer that has dialled: a thread reads what it says, but where the loop is there first, as it may be when it waits."""

    link: Link
    hello: Header
    life: int  # of this worker, when it was dialled
    due: dict[Kind, int]  # what it may say
    reading: threading.Lock = field(default_factory=threading.Lock)  # who has it, reads
    met: int = 0  # messages that the loop has read
    left: threading.Event = field(default_factory=threading.Event)  # set where the loop sleeps, and looks no more
    error: Exception | None = None  # what the loop has met


class Mean(NamedTuple):
    """An average that was taken: by whom, and what came out."""

    name: str
    ranks: tuple[int, ...]
    turn: tuple[int, int]
    message: Message


class Peer(Driver):
    """Drives the loop of a method without a server, as `Worker` does that of one with."""

    def __init__(
        self,
        place: Place,
        x0: Tensor,
        hello: dict[str, Any],
        parse: Parse,
        log: logging.Logger,
        lend: Callable[[Method], Method] = lambda method: method,
        stopped: Callable[[], bool] = lambda: False,
        team: Team | None = None,
        shared: Shared | None = None,
    ) -> None:
        """``shared`` is what the model has beside its parameters. ``lend`` puts this worker's own optimizer into the run's method."""
        super().__init__(log)
        self.lend, self.team, self.shared = lend, team or Team(), shared
        self.fresh: list[Lease] = []  # minibatches that the coordinator has given, and other ranks do not know of
        self.ahead = 1  # how many rounds ahead all ranks ask to begin, as others go on meanwhile
        self.place, self.x0, self.hello, self.parse = place, x0, hello, parse
        self.worker, self.named = place.worker, place.worker is not None
        self.process = secrets.token_hex(8)
        self.stopped: Callable[[], bool] = stopped  # whether to give up dialling
        self.monitor = threading.RLock()  # the node's state, and what has come for it
        self.changed = threading.Condition(self.monitor)
        self.incarnation, self.lost = 0, ""
        self.failure: BaseException | None = None  # of a thread or a handler: another life would not cure it
        self.over = threading.Event()
        self.link: Any = None  # to the coordinator
        self.listener: socket.socket | None = None
        self.incoming: set[Caller] = set()
        self.links: dict[int, Link] = {}
        self.groups: dict[tuple[Any, ...], Standing] = {}  # for averages, by their members and bytes
        self.comers: dict[tuple[str, int], Link] = {}  # who has dialled to join a circle, by its name and theirs
        self._join()

    # joining

    def _join(self) -> None:
        """Begin a life: agree with the coordinator, and get a state from it or from a peer."""
        end = time.monotonic() + self.place.patience
        pause = 0.05
        turned_away = TurnedAway(self.log)
        while True:
            try:
                self._enter_together()
                return
            except (LinkLost, Corrupt) as lost:
                self._hang_up()
                self._raise_failure()
                taken = turned_away.look(lost)
                if self.team.any(turned_away.over):
                    raise ValueError(str(lost)) from None
                if self.team.any(self.stopped()):
                    raise LinkLost(f"{lost}; this worker is asked to stop, and dials no more") from None
                if self.team.any(not taken and time.monotonic() + pause > end):
                    raise LinkLost(f"{lost}; nobody came back within {self.place.patience:g} s") from None
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
            except BaseException:
                self._hang_up()
                raise

    def _enter_together(self) -> None:
        """All ranks begin with the same round: the first one that is open to all of them."""
        for rank in range(self.team.size):  # the first coordinator says which worker this is
            with self.team:
                if rank == self.team.rank:
                    self._greet()
            self.worker = self.team.first(self.worker)
        several = self.team.size > 1 and self.rounds
        running = several and self.team.any(self.running)
        wanted = self.team.highest(self.open + (self.ahead if running else 0))
        if running and isinstance(self.method, PeriodicMethod):
            wanted = self.method.boundary(wanted)
        with self.team:
            given = self._call(Kind.ENTER, {"round": wanted}, "the coordinator's word to come in")["round"]
        if several and self.team.any(given != wanted):  # one was too late for it
            self.ahead *= 2
            raise LinkLost(f"round {wanted} is no longer open to all ranks of this worker")
        with self.team:
            self._begin_life()
        if several and self.team.any(self.node.step != self.team.first(self.node.step)):
            raise LinkLost("the ranks of this worker were given different rounds to begin with")

    def _share(self) -> None:
        """All ranks get the minibatches that the first one was given."""
        fresh, self.fresh = self.team.first(self.fresh), []
        self._given(fresh)

    def _greet(self) -> None:
        """Agree with the coordinator on the run."""
        address = self.place.servers[0]
        with contextlib.ExitStack() as unused:
            link = self.link = dial(address, self.place.token, "the coordinator", self.place.timeout)
            unused.callback(link.close)
            self.host = link.sock.getsockname()[0]  # where others can reach this one, as the coordinator can
            listener = self.listener = listen(self.host)
            unused.callback(listener.close)
            self._agree(address, link, listener)
            unused.pop_all()  # threads close them

    def _agree(self, address: str, link: Link, listener: socket.socket) -> None:
        """Say hello to the coordinator, and start the threads of this life with what it answers."""
        with self.monitor:
            self.lost = ""
            self.over = threading.Event()  # whether this life is
            self.alive: dict[int, dict[str, Any]] = {}  # the others: see `Seat.about`
            self.donor: tuple[int, int] | None = None  # who gives this one a state: the worker, and its life
            self.state: tuple[Any, int] | None = None  # the state to begin with, and the round
            self.inbox: deque[Entry] = deque()
            self.meets: deque[dict[str, Any]] = deque()  # where members of a group listen
            self.deeds: list[list[Any]] = []  # since they were last told
            self.links = {}
            self.lives: dict[int, int] = {}  # whose links those are
            self.taken: dict[
                tuple[int, int], tuple[int, Message | None]
            ] = {}  # last number of each life, and the answer
            self.numbers = 0
            self.away: set[int] = set()  # to whom a push is on its way
            self.replies: deque[Any] = deque()
            self.members: tuple[int, ...] = ()  # who takes part in this block
            self.turn = (-1, 0)  # the last average: its round, and how many of that round came before it
            self.mean: Mean | None = None  # the last average, for members who could not take it
            self.newcomers: list[tuple[int, int]] = []  # who begins with this one's state: the worker, and its life
            self.born = self.closing = self.done = self.told = False  # told: the coordinator, that this one is done
            self.begun = False  # whether the coordinator was told of a round, and its word to go on was not taken yet
            self.posted: deque[Posted] = deque()  # what was sent and is not acknowledged yet
        self.since = 0  # minibatches used since the coordinator was last asked to go on
        self.end = 0  # up to which round it need not be asked again
        self.losses: list[float] = []  # of gradients that it has not been told of
        self.computes: list[float] = []
        self.waits: list[float] = []
        self.rates: list[float | None] = []
        self.sent, self.said = 0, time.monotonic()  # sent: bytes of payload
        head = Header(Kind.HELLO, DTYPES.index(self.x0.dtype))
        host, port = listener.getsockname()[:2]
        about: dict[str, Any] = {
            "worker": self.worker,
            "named": self.named or self.team.rank > 0,
            "process": self.process,
            "peer": True,
        }
        about |= {"parameters": self.x0.numel(), "address": f"{host}:{port}", "machine": machine()}
        about["shard"] = (self.team.rank, self.team.size)
        frame = greeted(link, head, self.hello | about, self.shared)
        if frame.header.kind == Kind.REFUSED:
            why = f"the coordinator at {address} refuses this worker: {frame.note['why']}"
            raise NumberTaken(why, frame.note["timeout"]) if frame.note["what"] == "taken" else ValueError(why)
        note = frame.note
        link.timeout = self.timeout = float(note["timeout"])
        link.sock.settimeout(link.timeout)
        self.transport, self.worker = note["transport"], int(note["worker"])
        self.open, self.running = int(note["round"]), bool(note["running"])
        self.seed, self.workers = int(note["seed"]), int(note["workers"])
        head = self.head = head._replace(worker=self.worker, incarnation=note["incarnation"])
        self.method = self.lend(self.parse(note["method"]))
        self.rounds = not isinstance(self.method, PushGossipMethod | PairGossipMethod)
        self.message, self.answer, self.form = talk(self.method, self.x0.cpu())
        with self.monitor:
            self.incarnation = head.incarnation
        if note["model"]:
            link.send(head._replace(kind=Kind.MODEL), Form.of(self.x0).pack(self.x0))
        self._spawn(self._accept, listener, head.incarnation)
        self._spawn(self._read, link, head)
        self._spawn(self._beats, link, head, float(note["beat"]), self.over)

    def _begin_life(self) -> None:
        """Get a state, and go on to the first gradient."""
        state, step = self._await_state()
        self.node = Node(self.head.worker, self.method, state, step, since=step, seed=self.seed, view=self._view)
        with self.monitor:
            self._keep(step)
            self.loop: Loop = loop(self.method, self.node)
            request = next(self.loop)
            self.born = True
            self.changed.notify_all()
        self._forget()
        self.fresh = []
        self.terms = Terms(self.head.worker, self.method, self.seed, self.workers, step, None)
        self.life += 1
        self._drive(request)
        self._since = time.perf_counter()

    def _await_state(self) -> tuple[Any, int]:
        """The state to begin with: from a peer's welcome, or at the model that the coordinator sends."""
        with self.changed:
            while self.state is None:
                self._wait("the other workers of the first round, or a peer's welcome")
            return self.state

    def _keep(self, step: int) -> None:
        """What was sent to this life for rounds before its first one is not lost."""
        early = [entry for entry in self.inbox if entry.round is not None and entry.round < step]
        if early:
            self.inbox = deque(entry for entry in self.inbox if entry not in early)
            for entry in early:
                give_back(self.node, entry.message)
            self.deeds.append(["kept", [entry.which for entry in early]])

    # threads: what comes from the coordinator and from peers

    def _spawn(self, run: Callable[..., None], *about: Any) -> None:
        """Run in a thread of its own, which ends with this life. What it raises, the loop raises."""
        head = self.head

        def guarded() -> None:
            try:
                run(*about)
            except BaseException as error:
                self._fail(error, head)

        WorkerThread(self.over, guarded).start()

    def _fail(self, error: BaseException, head: Header) -> None:
        """End this worker, if the life of ``head`` is not over: its loop raises ``error`` as soon as it waits or sends."""
        with self.changed:
            if head is not self.head or not self.incarnation:
                return
            error.add_note(f"raised in a thread of worker {head.worker}, which cannot go on")
            self.failure = self.failure or error
            self.lost = self.lost or f"worker {head.worker} has failed ({error!r})"
            self.changed.notify_all()
        self.link.hang_up()

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _read(self, link: Link, head: Header) -> None:
        """Take what the coordinator sends: news at once, answers for whoever has asked."""
        model = Form.of(self.x0)
        due = {Kind.NEWS: 0, Kind.ANSWER: 0, Kind.MEET: 0, Kind.MODEL: model.bytes, Kind.REFUSED: 0}
        try:
            while True:
                frame = link.recv(due, "the coordinator's next word")
                with self.changed:
                    if frame.header.kind == Kind.NEWS:
                        self._hear(frame.note)
                    elif frame.header.kind == Kind.MEET:
                        self.meets.append(frame.note)
                    elif frame.header.kind == Kind.ANSWER:
                        self.replies.append(frame.note)
                    elif frame.header.kind == Kind.REFUSED:
                        raise LinkLost(f"the coordinator refused the last message: {frame.note['why']}")
                    elif self.state is None:
                        start = model.unpack(frame.payload, self.x0.device)
                        self.state = self.method.init(start), int(frame.header.step)
                        self.deeds.append(["begin", self.state[1]])
                    self.changed.notify_all()
        except (LinkLost, Corrupt) as lost:
            with self.changed:
                if head.incarnation == self.incarnation:
                    self.lost = str(lost)
                self.changed.notify_all()
        except (
            Exception
        ) as error:  # told before the link is closed, by which the loop would see no more than that this life is lost
            self._fail(error, head)
        finally:
            link.close()

    def _hear(self, news: dict[str, Any]) -> None:
        """Who is there now, whose state this one gets, and who gets this one's."""
        if "alive" in news:
            self.alive = {about["worker"]: about for about in news["alive"] if about["worker"] != self.worker}
            for to, link in list(self.links.items()):
                if self.alive.get(to, {}).get("life") != self.lives.get(to):
                    link.hang_up()  # nobody waits for an answer of the dead
        if "donor" in news:
            self.donor = tuple(news["donor"])
        self.newcomers += [(worker, life) for worker, life in news.get("welcome", ())]
        if self.state is None and self.donor is not None:
            about = self.alive.get(self.donor[0], {})
            if (about.get("life"), about.get("place")) != (self.donor[1], "in"):
                donor, self.donor = self.donor, None
                self.link.send(self.head._replace(kind=Kind.ORPHAN), None, {"donor": donor})

    def _beats(self, link: Link, head: Header, pause: float, over: threading.Event) -> None:
        with contextlib.suppress(LinkLost, ValueError):
            while not over.wait(pause):
                link.beat(head)

    def _accept(self, listener: socket.socket, life: int) -> None:
        while life == self.incarnation:
            try:
                sock, address = listener.accept()
            except OSError:
                time.sleep(0.05)  # what is refused to one peer, such as too many files, passes
                continue
            try:
                self._spawn(self._react, sock, f"the peer at {address[0]}:{address[1]}", life)
            except RuntimeError as error:
                sock.close()
                self.log.warning(
                    f"refused: no thread for the peer at {address[0]}:{address[1]} ({error}); it dials again"
                )
        listener.close()

    def _react(self, sock: socket.socket, name: str, life: int) -> None:
        """Answer one other peer."""
        with contextlib.ExitStack() as links:
            links.callback(sock.close)
            try:
                link = links.enter_context(contextlib.closing(accept(sock, self.place.token, name, self.timeout)))
                hello = link.recv({Kind.HELLO: 0}, "its hello")
                link.name = f"worker {hello.header.worker}"
                if isinstance(hello.note, dict) and "circle" in hello.note:
                    self._come(link, str(hello.note["circle"]), hello.header, life)
                    links.pop_all()
                    return
                other = hello.note.get("machine") if isinstance(hello.note, dict) else None
                sizes = max(self.answer.bytes, self.form.bytes, 8), max(self.message.bytes, self.form.bytes, 8)
                better, way = offered(link, other, self.transport, sizes)
                links.callback(better.close)
                caller = Caller(better, hello.header, life, self._due())
                with self.monitor:
                    self.incoming.add(caller)
                    links.callback(self.incoming.discard, caller)
                with caller.reading:
                    link.send(self.head._replace(kind=Kind.WELCOME), None, way)
                    better.meet()
                self._listen(caller)
            except LinkLost:
                pass  # whoever it was comes again, or is dead, which the coordinator says
            except Exception as error:  # of what the other end has sent, or for want of memory
                what = str(error) if isinstance(error, ValueError | OSError) else repr(error)
                self.log.warning(f"refused: {what}: no link is made")

    def _listen(self, caller: Caller) -> NoReturn:
        """Take all that a peer says, but for what the loop takes."""
        while not self.rounds:  # whose loop waits for nobody in particular
            self._hear_out(caller)
        met = 0
        while True:
            if caller.met != met:  # it comes for the next one as well, and need not wake this thread for it
                met = caller.met
                caller.left.wait(PAUSE)
            elif caller.link.waiting(60.0):
                with caller.reading:
                    if caller.error is not None:
                        raise caller.error
                    if caller.met == met:
                        self._hear_out(caller)

    def _look_in(self, caller: Caller) -> None:
        """Take what a peer has said, if nobody is at it: for the loop, while it waits."""
        if not caller.reading.acquire(blocking=False):
            return
        try:
            if caller.error is None and caller.link.waiting(0):
                self._hear_out(caller)
                caller.met += 1
        except (LinkLost, Corrupt, ValueError) as error:
            caller.error = error  # for the thread
            caller.link.hang_up()
        finally:
            caller.reading.release()

    def _hear_out(self, caller: Caller) -> None:
        """Take one message of a peer."""
        link, hello = caller.link, caller.hello
        frame = link.recv(caller.due, "its next message", patient=not self.rounds, lent={Kind.ASK})
        if frame.header[2:4] != hello[2:4]:
            raise Corrupt(
                f"life {frame.header.incarnation} of worker {frame.header.worker} speaks on the link of life "
                f"{hello.incarnation} of worker {hello.worker}: refused"
            )
        try:
            if frame.header.kind == Kind.MEAN:
                self._give(link, frame)
            else:
                self._take(link, frame, caller.life)
        except (LinkLost, Corrupt):
            raise
        except Exception as error:  # of a handler: it would come again however often the message does
            with contextlib.suppress(LinkLost):
                link.send(self.head._replace(kind=Kind.REFUSED), None, {"why": repr(error)[:1000]})
            self._fail(error, self.head)
            raise LinkLost(f"this worker has failed ({error!r})") from error

    def _come(self, link: Link, name: str, header: Header, life: int) -> None:
        """A peer wants to join this one's circle, which the loop's thread sees to."""
        with self.changed:
            if life != self.incarnation:
                raise LinkLost("this life is over")
            for key, before in list(self.comers.items()):
                if before.waiting(0):  # who has to wait for a welcome says nothing, unless it hangs up
                    self.comers.pop(key).close()
            self.comers[name, header.worker] = link
            self.changed.notify_all()

    def _due(self) -> dict[Kind, int]:
        """What peers may send, and how many bytes each has."""
        due = {Kind.STATE: self.form.bytes, Kind.MEAN: 0}
        if isinstance(self.method, GossipMethod):
            due[Kind.HEIR] = self.form.bytes
        if isinstance(self.method, PairGossipMethod):
            due[Kind.ASK] = self.message.bytes
        elif leaves(self.message.like):
            due[Kind.SEND] = self.message.bytes
        return due

    def _take(self, link: Link, frame: Frame, life: int) -> None:
        """One message of a peer: once, however often it is sent."""
        header = frame.header
        key = header.worker, header.incarnation
        which = (*key, header.version)
        form = self.form if header.kind in (Kind.STATE, Kind.HEIR) else self.message
        message, round = form.unpack(frame.payload, self.x0.device), self._round(link, frame)
        if not finite(message):
            raise Corrupt(f"{link.name} sent numbers that are not finite, in step {header.step}")
        answer: Message | None = None
        with self.changed:
            end = time.monotonic() + self.timeout
            while life == self.incarnation and not self._ready(header) and time.monotonic() < end:
                self.changed.wait(0.2)
            if life != self.incarnation or (self.closing and header.kind != Kind.HEIR):
                raise LinkLost("this life is over")
            if not self._ready(header) or self.alive[header.worker]["life"] != header.incarnation:
                raise LinkLost(f"life {header.incarnation} of {link.name} is over, or not known")
            number, before = self.taken.get(key, (0, None))
            if header.version <= number:
                answer = before
            elif header.kind == Kind.STATE:
                if self.state is not None:  # another one's, or the coordinator's model, was there first
                    link.send(self.head._replace(kind=Kind.REFUSED))
                    return
                if key != self.donor:
                    raise LinkLost("a state that nobody waits for")
                self.state = message, header.step
                self.deeds.append(["born", which])
            elif header.kind == Kind.HEIR:
                if self.closing:  # what this one has is on its way to somebody else
                    link.send(self.head._replace(kind=Kind.REFUSED))
                    return
                assert isinstance(self.method, GossipMethod)
                self.node.state = self.method.inherit(self.node.state, message)
                self.deeds.append(["heir", which])
            elif header.kind == Kind.SEND:
                if self.done and self.rounds:  # nobody takes it any more
                    link.send(self.head._replace(kind=Kind.REFUSED))
                    return
                self.inbox.append(Entry(which, round, message))
            else:
                assert isinstance(self.method, PairGossipMethod)
                self.node.state, answer = apart(self.method.meet(self.node.state, message), message)
                self.deeds.append(["met", which])
            self.taken[key] = max(number, header.version), answer
            self.changed.notify_all()
        if header.kind != Kind.ASK:
            link.send(self.head._replace(kind=Kind.ANSWER))
        elif answer is None:
            raise Corrupt(f"{link.name} asks under the number {header.version}, which another message had")
        else:
            link.send(self.head._replace(kind=Kind.REPLY), self.answer.pack(answer, link.room(self.answer.bytes)))

    def _give(self, link: Link, frame: Frame) -> None:
        """Give a peer the average that it could not take."""
        with self.monitor:
            mean = self.mean
        if mean is None or not isinstance(frame.note, dict) or frame.note.get("turn") != list(mean.turn):
            link.send(self.head._replace(kind=Kind.REFUSED))
            return
        note = {"name": mean.name, "ranks": mean.ranks}
        link.send(self.head._replace(kind=Kind.REPLY), Form.of(mean.message).pack(mean.message), note)

    def _round(self, link: Link, frame: Frame) -> int | None:
        """The round that a message is of, where the method goes in rounds."""
        if frame.header.kind != Kind.SEND or not self.rounds:
            return None
        round = frame.note.get("round") if isinstance(frame.note, dict) else None
        if type(round) is not int or round < 0:
            raise Corrupt(f"{link.name} sent a message of round {str(round)[:100]}: rounds are whole numbers from 0 on")
        return round

    def _ready(self, header: Header) -> bool:
        """Whether the news that a message may have overtaken is there: of its sender, and of this one's own beginning."""
        if self.alive.get(header.worker, {}).get("life", -1) < header.incarnation:
            return False
        if header.kind == Kind.STATE:
            return self.state is not None or self.donor is not None
        return self.born or header.kind == Kind.SEND

    # asking

    def _wait(self, what: str, seconds: float = 1.0) -> None:
        """Wait for a change; raises `LinkLost` where the coordinator is gone. Under the monitor."""
        if self.lost:
            raise LinkLost(f"{self.lost}; {what} was waited for")
        self.changed.wait(seconds)

    def _call(self, kind: Kind, note: dict[str, Any], what: str) -> Any:
        """The coordinator's answer to a question, with which goes all that there is to tell."""
        self._tell(kind, note)
        return self._answered(what)

    def _answered(self, what: str) -> Any:
        """The coordinator's next answer."""
        with self.changed:
            while not self.replies:
                self._wait(what)
            return self.replies.popleft()

    def _tell(self, kind: Kind, note: dict[str, Any]) -> None:
        """Tell the coordinator something, and what was done since it was last told."""
        with self.monitor:
            deeds, self.deeds = self.deeds, []
        while len(deeds) > DEEDS:
            self.link.send(self.head._replace(kind=Kind.STEP), None, {"deeds": deeds[:DEEDS]})
            deeds = deeds[DEEDS:]
        if deeds:
            note["deeds"] = deeds
        if self.losses:
            with self.monitor:  # pushes are counted by threads of their own
                sent, self.sent = self.sent, 0
            note |= {"losses": self.losses, "compute": self.computes, "waited": self.waits, "sent": sent}
            note |= {} if self.rate is None else {"lr": self.rates}
            load = self.meter.read(self.node.step)
            note |= {} if load is None else {"load": load}
            note |= {} if self.team.rank else {"used": self.began, "failed": self.failed}  # they are the first rank's
            self.began, self.failed = [], []
            self.losses, self.computes, self.waits, self.rates = [], [], [], []
        self.said = time.monotonic()
        self.link.send(self.head._replace(kind=kind), None, note)

    def _view(self, step: int) -> tuple[int, ...]:
        """Who takes part in round ``step``, which is one of this block."""
        if not self.rounds:
            with self.monitor:
                there = {name for name, about in self.alive.items() if about["place"] == "in"}
                self._met(tuple(sorted({*there, self.head.worker})))
        return self.members

    def _met(self, members: tuple[int, ...]) -> None:
        if members != self.members:
            self.members = members
            self._did("view", -1, list(members))

    def _drive(self, request: Request) -> None:
        """Answer requests until a gradient is asked for."""
        while not isinstance(request, Gradient | Begin):
            answer: Any
            if isinstance(request, Send) and isinstance(self.method, PushGossipMethod):
                answer = self._push(request.to, request.msg)
            elif isinstance(request, Send):
                answer = self._post(request.to, request.msg, {"round": request.round})
                self._did("sent", self.numbers, answer)
            elif isinstance(request, Ask):
                frame = self._exchange(Kind.ASK, request.to, request.msg, None)
                answer = None if frame is None else self.answer.unpack(frame.payload, self.x0.device)
            elif isinstance(request, Recv):
                answer = self._receive(request)
            elif isinstance(request, Inbox):
                with self.monitor:
                    answer = [(entry.which[0], entry.message) for entry in self.inbox]
                    self._did("took", [entry.which for entry in self.inbox])
                    self.inbox.clear()
            else:
                self._delivered()
                answer = self._reduce(request)
            with self.monitor:
                if isinstance(request, Ask):  # here, as it may have been visited meanwhile
                    self._did("asked", self.numbers, answer is not None)
                request = self.loop.send(answer)
        self.request = request
        if request.free and not self.begun and self.node.step >= self.end:
            self._delivered()
            self._begin()

    def _did(self, *deed: Any) -> None:
        """Remember what it did, for a replay."""
        with self.monitor:
            self.deeds.append(list(deed))

    def _begin(self) -> None:
        """Everything is delivered: tell the coordinator. Its word to go on comes while the next gradient is computed."""
        want = 0
        if self.opened is not None and not self.team.rank:
            want = max(self.since, self.node.step == self.node.since) - len(self.leases.get(self.opened.key, ()))
        self.since = 0
        self._tell(Kind.BEGIN, {"round": self.node.step, "want": max(0, want), "own": True, "back": self._back()})
        self.begun = True

    def _go_on(self) -> None:
        """Take the coordinator's word, if it was asked for, and welcome who begins with this one's state."""
        if not self.begun:
            if self.lost:  # in the middle of a block, where nothing is asked
                raise LinkLost(self.lost)
            return
        note = self._answered("the coordinator's word to go on")
        self.begun, self.end, self.vain = False, note["end"], 0
        if self.rounds:
            self._met(tuple(note["members"]))
        self.fresh += leases_in(note["leases"])
        with self.monitor:
            newcomers, self.newcomers = [*self.newcomers, *note["welcome"]], []
        for worker, life in newcomers:
            self._welcome(worker, life)
        if note["show"]:
            self._show()

    def _welcome(self, worker: int, life: int) -> None:
        """Give a newcomer a state. What it does not take, as it is gone or has another one already, is this one's again."""
        with self.monitor:
            if self.alive.get(worker, {}).get("life") != life:
                return  # it has gone, and nothing of this one's goes with it
            before = self.node.state
            self.node.state, state = self.method.welcome(before)
            shares = not self.rounds and self.node.state is not before  # else nothing is lost with the newcomer's
            number = self.numbers + 1
            self._did("welcomed", number)
        if self._exchange(Kind.STATE, worker, state, None, self.form, life) is None and shares:
            with self.monitor:
                if isinstance(self.method, GossipMethod):
                    self.node.state = self.method.inherit(self.node.state, state)
                    self._did("heir", [self.head.worker, self.head.incarnation, number])

    def _push(self, to: int, msg: Message) -> bool:
        """Bring a push while the loop goes on. False, so that it comes back, where the one before is still on its way."""
        self._sound(to, msg)
        with self.monitor:
            self.numbers += 1
            free = to not in self.away
            self._did("sent", self.numbers, free)
            if free:
                self.away.add(to)
                self._spawn(self._carry, self.head, self.numbers, to, msg)
        return free

    def _carry(self, head: Header, number: int, to: int, msg: Message) -> None:
        """Bring a push; it comes back where its receiver is dead."""
        try:
            came = self._bring(head, number, Kind.SEND, to, msg, None) is not None
        except LinkLost:
            return  # this life is over
        with self.changed:
            if head is self.head and self.incarnation:
                if not came:
                    give_back(self.node, msg)
                    self._did("kept", [(head.worker, head.incarnation, number)])
                self.away.discard(to)
                self.changed.notify_all()

    def _post(self, to: int, msg: Message, note: Any) -> bool:
        """Send ``msg`` to a peer, and go on; `_delivered` sees to it that it has come. False where that one is dead.

        By the next round the acknowledgement has come, and nobody has waited for it.
        """
        self._delivered(self.node.step)
        self._sound(to, msg)
        self.numbers += 1
        head = self.head._replace(kind=Kind.SEND, version=self.numbers, step=self.node.step)
        with self.monitor:
            about = self.alive.get(to)
        if about is None or about["place"] == "done":  # nobody takes it
            if about is None:
                self._drop(to)
            return False
        link: Link | None = None
        with contextlib.suppress(LinkLost, Corrupt, PermissionError):  # said, if it lasts, when it is sent again
            link = self._dial(to, about)
            link.send(head, self.message.pack(msg, link.room(self.message.bytes)), note)
            self.sent += self.message.bytes
        self.posted.append(Posted(head, to, about["life"], msg, note, link))
        return True

    def _delivered(self, before: float = math.inf) -> None:
        """What was posted in rounds below ``before`` is there; what cannot be, as its receiver has died, has come back."""
        while self.posted and self.posted[0].head.step < before:
            posted = self.posted.popleft()
            if not self._confirmed(posted):
                head = posted.head
                with self.monitor:
                    give_back(self.node, posted.msg)
                    self._did("kept", [(head.worker, head.incarnation, head.version)])

    def _confirmed(self, posted: Posted) -> bool:
        """Whether a message was taken; it is sent again where it must be. False where its receiver is dead or done."""
        head, to, life, msg, note, link = posted
        frame: Frame | None = None
        if link is not None:
            with contextlib.suppress(LinkLost, Corrupt):
                frame = link.recv({Kind.ANSWER: 0, Kind.REFUSED: 0}, f"worker {to}'s answer")
        if frame is None:
            frame = self._bring(head, head.version, Kind.SEND, to, msg, note, None, life)
        return frame is not None and frame.header.kind == Kind.ANSWER

    def _exchange(
        self, kind: Kind, to: int, msg: Message, note: Any, form: Form | None = None, life: int | None = None
    ) -> Frame | None:
        """Bring ``msg`` to a peer in its present ``life``; its acknowledgement or answer, None where that is over or takes no
        message."""
        self._delivered()
        self._sound(to, msg)
        with self.changed:
            while to in self.away:
                self._wait(f"the end of a push to worker {to}")
        self.numbers += 1
        return self._bring(self.head, self.numbers, kind, to, msg, note, form, life)

    def _sound(self, to: int, msg: Message) -> None:
        if not finite(msg):
            self._diverged(f"what it would send to worker {to} is not finite")

    def _bring(
        self,
        head: Header,
        number: int,
        kind: Kind,
        to: int,
        msg: Message,
        note: Any,
        form: Form | None = None,
        life: int | None = None,
    ) -> Frame | None:
        late = time.monotonic() + self.timeout
        head = head._replace(kind=kind, version=number, step=self.node.step)
        due = {Kind.REPLY: self.answer.bytes} if kind == Kind.ASK else {Kind.ANSWER: 0}
        due[Kind.REFUSED] = 0  # it leaves, or its loop has ended, or it has failed
        while True:
            with self.monitor:
                about = self.alive.get(to)
                if self.lost or head.incarnation != self.incarnation:
                    raise LinkLost(f"{self.lost}; worker {to} was talked to")
            if about is None or (life is not None and about["life"] != life):
                self._drop(to)
                return None
            life = about["life"]
            try:
                link = self._dial(to, about)
                form = form or self.message
                link.send(head, form.pack(msg, link.room(form.bytes)), note)
                with self.monitor:
                    self.sent += form.bytes
                frame = link.recv(due, f"worker {to}'s answer")
                if frame.header.kind != Kind.REFUSED:
                    return frame
                if isinstance(frame.note, dict):
                    self.log.warning(
                        f"worker {to} has failed, and takes no message: {str(frame.note.get('why'))[:1000]}"
                    )
                return None
            except (LinkLost, Corrupt, PermissionError) as error:  # who is gone may have left its port to a stranger
                if time.monotonic() > late:
                    late = math.inf
                    self.log.warning(
                        f"{error}; tried again for as long as the coordinator says that worker {to} is there"
                    )
                self._drop(to)
                with self.changed:
                    self.changed.wait(0.05)

    def _dial(self, to: int, about: dict[str, Any]) -> Link:
        """The link to a peer, as it is in its present life."""
        link: Link | None = self.links.get(to)
        if link is not None and self.lives[to] == about["life"]:
            return link
        self._drop(to)
        head = self.head
        link = dial(about["address"], self.place.token, f"worker {to}", self.timeout)
        try:
            link.send(head._replace(kind=Kind.HELLO), None, {"machine": machine()})
            welcome = link.recv({Kind.WELCOME: 0}, "its welcome")
            if welcome.header[2:4] != (to, about["life"]):
                raise LinkLost(f"somebody else answers at {about['address']}, where worker {to} was")
            link = taken(link, welcome.note)
            with self.monitor:  # a thread may have dialled for a life that is over by now, whose links are closed
                if head is not self.head or not self.incarnation:
                    raise LinkLost(f"{self.lost or 'this life is over'}; worker {to} was dialled")
                self.links[to], self.lives[to] = link, about["life"]
        except BaseException:
            link.close()
            raise
        return link

    def _drop(self, to: int) -> None:
        link = self.links.pop(to, None)  # at once, as several threads may
        if link is not None:
            link.close()

    def _receive(self, request: Recv) -> dict[int, Message]:
        """A message of the round from each source, but for those who will not send one any more."""
        with self.monitor:
            callers = [caller for caller in self.incoming if caller.hello.worker in request.sources]

        def there() -> bool:
            for caller in callers:
                self._look_in(caller)
            return len(self.inbox) >= len(request.sources)

        for caller in callers:
            caller.left.clear()
        if not look_out(there):
            for caller in callers:
                caller.left.set()
        while True:
            with self.changed:
                here = [
                    entry for entry in self.inbox if entry.which[0] in request.sources and entry.round == request.round
                ]
                found = {entry.which[0]: entry.message for entry in here}
                missing = [s for s in request.sources if s not in found and self._comes(s, request.round)]
                if not missing:
                    break
                what = f"a message of round {request.round} from workers {', '.join(map(str, missing))}"
                self._wait(what, 0.05 if self.posted else 1.0)
            self._delivered()  # who is waited for may wait for what was lost on the way
        with self.monitor:
            self.inbox = deque(entry for entry in self.inbox if entry not in here)
            self._did("took", [entry.which for entry in here])
            return {s: found[s] for s in request.sources if s in found}

    def _comes(self, source: int, round: int | None) -> bool:
        """Whether a message of this round may still come from there."""
        about = self.alive.get(source)
        return about is not None and about["place"] == "in" and (round is None or about["since"] <= round)

    def _reduce(self, request: AllReduce) -> Message:
        """The mean over the members who live, by a process group among them; again without who dies meanwhile."""
        with self.team:
            part = self._mean(request._replace(msg=self.team.cut(request.msg)))
        return self.team.join(part, self.x0.numel())

    def _mean(self, request: AllReduce) -> Message:
        if not finite(request.msg):
            self._diverged("what it would average is not finite")
        round, members = request.round or 0, request.members
        self.turn = round, self.turn[1] + 1 if self.turn[0] == round else 0
        living = tuple((m, life) for m in members if (life := self._life(m, round)))
        key = members, sum(t.nbytes for t in leaves(request.msg))
        standing = self.groups.get(key)
        if standing is not None and standing.living != living:
            standing = None
        while True:
            if standing is None:
                if key in self.groups:
                    self.groups.pop(key).close()
                note = {"round": round, "index": self.turn[1], "members": list(members)}
                told = self._call(Kind.REDUCE, note, f"the average of round {round} with workers {members}")
                if told["holder"] is not None:
                    mean = self._fetch(told["holder"], request.msg)
                    if mean is None:
                        continue
                    self.mean = mean
                    break
                ranks = tuple(told["ranks"])
                standing = Standing(told["group"], ranks, tuple((m, self._life(m, round)) for m in ranks))
            try:
                self.mean = self._sum(request.msg, standing)
            except (LinkLost, Corrupt) as error:
                if self.lost:
                    raise LinkLost(self.lost) from None
                self.log.warning(f"an average with workers {standing.ranks} broke ({error}); again")
                standing.close()
                standing = None
            else:
                self.groups[key] = standing
                break
        assert self.mean is not None
        self._did("averaged", self.mean.name, self.mean.ranks)
        return self.mean.message

    def _life(self, worker: int, round: int) -> int:
        """The life in which a worker takes part in an average after ``round``; 0 where it does not."""
        if worker == self.head.worker:
            return self.head.incarnation
        about = self.alive.get(worker)
        there = about is not None and about["place"] == "in" and about["since"] < round
        return int(about["life"]) if about is not None and there else 0

    def _sum(self, message: Message, standing: Standing) -> Mean:
        """The mean over the members of a group, which is made at its first average."""
        ranks, name = standing.ranks, standing.name
        kinds: dict[torch.dtype, list[Tensor]] = {}  # in one order at all members
        for t in leaves(message):
            kinds.setdefault(t.dtype, []).append(t)
        flats = {dtype: torch.cat([t.reshape(-1) for t in parts]).cpu() for dtype, parts in kinds.items()}
        if len(ranks) > 1 and standing.group is None:
            make = self._circle if self._near(ranks) else self._group
            standing.group = make(name, ranks, max(flat.nbytes for flat in flats.values()))
        pieces: dict[torch.dtype, Iterator[Tensor]] = {}
        for dtype, flat in flats.items():
            if standing.group is not None:
                standing.group.sum(flat)
                self.sent += 2 * flat.nbytes * (len(ranks) - 1) // len(ranks)  # as a ring does
                flat /= len(ranks)
            sizes = [t.numel() for t in kinds[dtype]]
            flat = flat.to(self.x0.device)
            pieces[dtype] = iter(torch.split(flat, sizes) if len(sizes) > 1 else (flat,))
        means = [next(pieces[t.dtype]).view(t.shape) for t in leaves(message)]
        return Mean(f"{name} at {self.turn}", ranks, self.turn, rebuild(message, means))

    def _near(self, ranks: tuple[int, ...]) -> bool:
        """Whether all of these can share memory, and are to."""
        with self.monitor:
            others = {self.alive.get(r, {}).get("machine") for r in ranks if r != self.head.worker}
        return others == {machine()} and self.transport in ("auto", "shared")

    def _group(self, name: str, ranks: tuple[int, ...], length: int) -> Group:
        """A process group of these workers, for vectors of any ``length``."""
        from .gloo import Group

        rank = ranks.index(self.head.worker)
        tell, hear = (lambda entry: self._call_out(name, entry)), (lambda: self._called(name, ranks))
        return Group(tell, hear, rank, len(ranks), self.host, self.timeout)

    def _circle(self, name: str, ranks: tuple[int, ...], length: int) -> Circle:
        """A circle of these workers, all on this machine, for vectors of up to ``length`` bytes: each dials those before it."""
        links: dict[int, Link] = {}
        with contextlib.ExitStack() as made:
            for rank, to in enumerate(ranks[: ranks.index(self.head.worker)]):
                with self.monitor:
                    about = self.alive.get(to)
                if about is None:
                    raise LinkLost(f"worker {to} is gone")
                link: Link = dial(about["address"], self.place.token, f"worker {to}", self.timeout)
                made.callback(link.close)
                link.send(self.head._replace(kind=Kind.HELLO), None, {"circle": name})
                welcome = link.recv({Kind.WELCOME: 0}, "its welcome to a circle")
                links[rank] = joint(link, length, welcome.note["path"])
            for rank, by in enumerate(ranks[len(links) + 1 :], len(links) + 1):
                with self.changed:
                    end = time.monotonic() + self.timeout
                    while (name, by) not in self.comers:
                        if self.alive.get(by, {}).get("place") != "in":
                            raise LinkLost(f"worker {by} is gone")
                        if time.monotonic() > end:
                            raise LinkLost(f"worker {by} did not join the circle within {self.timeout:g} s")
                        self._wait(f"worker {by}, who is to join a circle,")
                    link = self.comers.pop((name, by))
                made.callback(link.close)
                links[rank] = joint(link, length)
                link.send(self.head._replace(kind=Kind.WELCOME), None, links[rank].offer())
            made.pop_all()
        return Circle(links, ranks.index(self.head.worker), self.head)

    def _fetch(self, holder: int, message: Message) -> Mean | None:
        """The average like ``message`` that a peer has taken; None where that one is gone."""
        form = Form.of(message)
        while True:
            with self.monitor:
                about = self.alive.get(holder)
                if self.lost:
                    raise LinkLost(f"{self.lost}; an average of worker {holder} was waited for")
            if about is None:
                return None
            try:
                link = self._dial(holder, about)
                link.send(self.head._replace(kind=Kind.MEAN), None, {"turn": self.turn})
                frame = link.recv({Kind.REPLY: form.bytes, Kind.REFUSED: 0}, f"worker {holder}'s average")
            except (LinkLost, Corrupt, PermissionError):
                self._drop(holder)
                with self.changed:
                    self.changed.wait(0.05)
                continue
            if frame.header.kind == Kind.REFUSED:
                raise LinkLost(f"worker {holder} has no average {self.turn} with this one")
            mean = form.unpack(frame.payload, self.x0.device)
            return Mean(frame.note["name"], tuple(frame.note["ranks"]), self.turn, mean)

    def _call_out(self, name: str, entry: tuple[str, bytes]) -> None:
        """Tell the other members of a group where this one listens."""
        self.link.send(
            self.head._replace(kind=Kind.MEET), None, {"group": name, "key": entry[0], "value": entry[1].hex()}
        )

    def _called(self, name: str, ranks: tuple[int, ...]) -> tuple[str, bytes]:
        """Where another member listens."""
        end = time.monotonic() + self.timeout
        with self.changed:
            while True:
                for note in self.meets:
                    if note["group"] == name:
                        self.meets.remove(note)
                        try:
                            return str(note["key"]), bytes.fromhex(note["value"])
                        except (KeyError, TypeError, ValueError):
                            raise Corrupt(f"one of workers {ranks} does not say where it listens") from None
                gone = [r for r in ranks if r != self.head.worker and self.alive.get(r, {}).get("place") != "in"]
                if gone:
                    raise LinkLost(f"worker {gone[0]} is gone")
                if time.monotonic() > end:
                    raise LinkLost(f"not all of workers {ranks} said within {self.timeout:g} s where they listen")
                self._wait(f"the other members of a group, {ranks},")

    # what a training loop sees

    def step(self, g: Tensor, loss: float) -> None:
        now = time.perf_counter()
        self.meter.stop()
        self.losses.append(loss)
        self.rates.append(self.rate)
        self.waits.append(self._waited)
        self.computes.append(now - self._since)
        self.since += len(self.unstepped)
        self.brought, self.unstepped = self.unstepped, []
        g = self._finite(g)
        try:
            with self.team:
                self._go_on()
                if time.monotonic() - self.said > 1.0:  # in the middle of a long block
                    self._tell(Kind.STEP, {})
                if isinstance(
                    self.request, Begin
                ):  # the visit that belongs to it is made now that the gradient is there
                    with self.monitor:
                        self._did("went")
                        request = self.loop.send(None)
                    self._drive(request)
                with self.monitor:
                    self._did("step", self.node.step)
                    request = self.loop.send(g)
                self._drive(request)
            self._share()
        except LinkLost as lost:
            self._mend(lost)
        self.meter.go()
        self._since = time.perf_counter()
        self._waited = self._since - now

    def moved(self, x: Tensor, before: Tensor | None) -> bool:
        with self.monitor:
            could = super().moved(x, before)
            if could:
                self._did("moved")
            return could

    def _skip(self, why: str, step: int) -> None:
        if self.spoilt >= self.skips:
            self._diverged("its gradient is not finite")
        super()._skip(why, step)

    def _diverged(self, what: str) -> NoReturn:
        """Nobody else gets what is not finite: this worker goes."""
        step, brought = self.node.step, [*self.began, *self.failed]
        with contextlib.suppress(LinkLost):
            note = {"diverged": what, "brought": [] if self.team.rank else brought}
            self.link.send(self.head._replace(kind=Kind.LEAVE, step=step), None, note)
        self._hang_up()
        why = f"worker {self.head.worker}, step {step}: {what}; {remedy(brought)}"
        raise Diverged(why, Trace(), self.head.worker, step)

    def more(self, note: dict[str, Any]) -> dict[str, Any]:
        while True:
            try:
                with self.team:
                    self._go_on()
                self._share()
                if note.get("want") and self.opened is not None and self.leases.get(self.opened.key):
                    return {"leases": []}
                with self.team:
                    word = {**note, "back": self._back(), "more": True}
                    answer = self._call(Kind.BEGIN, word, "minibatches") if not self.team.rank else {}
                return dict(self.team.first(answer))
            except LinkLost as lost:
                self._mend(lost)

    @property
    def free_to_wait(self) -> bool:
        return not self.rounds

    def begin_at(self, x: Tensor) -> bool:
        return (
            self.node.step > 0
        )  # it has the run's model, which has gone on; else each begins where its script has set it

    def master(self) -> Tensor:
        with self.monitor:
            x: Tensor = self.method.params(self.node.state)
            return x

    def _leave(self, done: bool) -> None:
        """Go in good order. One that is done can still be talked to until all are; one that goes before hands over what
        others need of it. One that has lost the coordinator before it could say that it is done joins again to say so."""
        while True:
            try:
                self._part(done)
            except LinkLost as lost:
                if done and not self.told:
                    try:
                        self._mend(lost)
                        continue
                    except (LinkLost, ValueError) as gone:
                        lost = LinkLost(str(gone))
                self.log.warning(f"{lost}, while this worker was leaving")
            self._hang_up()
            self._raise_failure()
            return

    def _part(self, done: bool) -> None:
        self._go_on()
        self._delivered()
        with self.changed:
            while self.away:
                self._wait("the end of pushes that are on their way")
        with self.monitor:
            self.done = done
        if done:
            self._show()
            self._disband()
            self._last(done)
            self.told = True
            with self.changed:
                while not self.replies:
                    self._wait("the end of the run")
        with self.monitor:
            self.closing = True
            if not done:
                for entry in self.inbox:
                    give_back(self.node, entry.message)
                self._did("left", [entry.which for entry in self.inbox], self.numbers + 1)
                self.inbox.clear()
        if not done:
            self._bequeath()
        self._show()
        self._last(done)

    def _bequeath(self) -> None:
        """Hand over what others need, to the first of them who does not leave as well."""
        if not isinstance(self.method, GossipMethod) or type(self.method).inherit is GossipMethod.inherit:
            return
        asked, number = set[int](), self.numbers
        while heirs := {name for name, about in self.alive.items() if about["place"] == "in"} - asked:
            self.numbers = number  # whoever takes it
            frame = self._exchange(Kind.HEIR, min(heirs), self.node.state, None, self.form)
            if frame is not None:
                return
            asked.add(min(heirs))

    def _last(self, done: bool) -> None:
        """Say that this one goes, with all that it has done."""
        if self.shared is not None:
            self.shared.leave(self.link, self.head)
        note: dict[str, Any] = {"done": done}
        if done:  # else somebody will use what this one has begun
            self.began += self.unstepped
        self.unstepped = []
        if not self.losses:
            note |= {} if self.rate is None else {"lr": self.rates}
            note |= {} if self.team.rank else {"used": self.began, "failed": self.failed}
        self._tell(Kind.LEAVE, note)

    def _show(self) -> None:
        """Let the coordinator have the model."""
        with self.monitor:
            x = self.method.params(self.node.state)
        self.link.send(self.head._replace(kind=Kind.MODEL, step=self.node.step), Form.of(x).pack(x))

    def _mend(self, lost: LinkLost) -> None:
        """The coordinator is gone: join again, as a new life."""
        self._hang_up()
        self._raise_failure()
        self._dies(lost, "dialling again, as a new life")
        self._join()

    def _disband(self) -> None:
        """Leave all groups for averages."""
        for standing in self.groups.values():
            standing.close()
        self.groups = {}

    def _hang_up(self) -> None:
        """End this life; its threads see it."""
        with self.changed:
            self.incarnation = 0
            self.over.set()
            self.lost = self.lost or "this life is over"
            self._disband()
            for link in self.comers.values():
                link.close()
            self.comers = {}
            for to in list(self.links):
                self._drop(to)
            for link in (*(caller.link for caller in self.incoming), *([self.link] if self.link is not None else [])):
                link.hang_up()
            if self.listener is not None:
                with contextlib.suppress(OSError):
                    self.listener.shutdown(socket.SHUT_RDWR)  # else it would wait for one more peer
            self.changed.notify_all()


class Solitary(Driver):
    """A peer that nobody joins: what a script does when nobody has launched it."""

    def __init__(self, method: Method, x0: Tensor, log: logging.Logger) -> None:
        super().__init__(log)
        method.check(1)
        self.method, self.table = method, Leases()
        self.table.join(0)
        self.terms = Terms(0, method, 0, 1, 0, None)
        self._set_out(x0)

    def _set_out(self, x: Tensor) -> None:
        self.node = Node(0, self.method, self.method.init(x))
        self.loop: Loop = loop(self.method, self.node)
        self._drive(next(self.loop))

    def moved(self, x: Tensor, before: Tensor | None) -> bool:
        if self.node.step:
            return super().moved(x, before)
        self._set_out(x)  # nothing has happened yet: the run begins there
        return True

    def step(self, g: Tensor, loss: float) -> None:
        self.brought, self.unstepped = self.unstepped, []
        g = self._finite(g)
        if isinstance(self.request, Begin):
            self._drive(self.loop.send(None))
        self._drive(self.loop.send(g))

    def _settle(self, leases: list[Lease], well: bool) -> None:
        if well:
            self.table.use(0, leases)
        elif aside := self.table.fail(0, leases):
            self.log.warning(f"set aside, as twice its gradient was not finite: {', '.join(map(str, aside))}")

    def _drive(self, request: Request) -> None:
        while not isinstance(request, Gradient | Begin):
            if isinstance(request, AllReduce):
                answer = request.msg
            else:
                answer = {} if isinstance(request, Recv) else [] if isinstance(request, Inbox) else None
            request = self.loop.send(answer)
        self.request = request

    def more(self, note: dict[str, Any]) -> dict[str, Any]:
        return self.table.hear(0, {**note, "back": self._back()})

    def master(self) -> Tensor:
        x: Tensor = self.method.params(self.node.state)
        return x

    def _leave(self, done: bool) -> None:
        pass
