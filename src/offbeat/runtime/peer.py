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
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

from torch import Tensor

from ..core.gossip import GossipMethod, PairGossipMethod, PushGossipMethod, RoundGossipMethod
from ..core.method import Message, Method
from ..core.periodic import OuterMethod, PeriodicMethod
from ..core.protocol import AllReduce, Ask, Begin, Gradient, Inbox, Loop, Node, Recv, Request, Send, give_back, loop
from ..core.tree import apart, finite, leaves
from ..failure import Diverged
from ..trace import Trace
from .averages import Averages
from .callers import Callers
from .incarnation import Incarnation
from .leases import Lease, leases_in, remedy
from .link import Frame, Link, LinkLost, dial, listen, machine
from .links import Links
from .place import Place
from .protocol.wire import DTYPES, Corrupt, Form, Header, Kind
from .shared_state import Shared, greeted
from .team import Team
from .worker import Driver, NumberTaken, Parse, Terms, TurnedAway

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


class Posted(NamedTuple):
    """A message that was sent to a peer and is not acknowledged yet."""

    head: Header
    to: int
    life: int
    msg: Message
    note: Any
    link: Link | None  # over which it was sent; None where that has failed


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
        self.incarnation = Incarnation(self.monitor, log)
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
        self.incarnation = Incarnation(self.monitor, self.log)
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
            link = self.incarnation.link = dial(address, self.place.token, "the coordinator", self.place.timeout)
            unused.callback(link.close)
            self.incarnation.at_end(link.hang_up)
            host = self.incarnation.host = link.sock.getsockname()[0]  # where others can reach this one as well
            listener = listen(host)
            unused.callback(listener.close)
            self._agree(address, link, listener)
            unused.pop_all()  # threads close them

    def _agree(self, address: str, link: Link, listener: socket.socket) -> None:
        """Say hello to the coordinator, and start the threads of this life with what it answers."""
        own = self.incarnation
        self.donor: tuple[int, int] | None = None  # who gives this one a state: the worker, and its life
        self.state: tuple[Any, int] | None = None  # the state to begin with, and the round
        self.inbox: deque[Entry] = deque()
        self.taken: dict[tuple[int, int], tuple[int, Message | None]] = {}  # last number of each life, and the answer
        self.numbers = 0
        self.away: set[int] = set()  # to whom a push is on its way
        self.members: tuple[int, ...] = ()  # who takes part in this block
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
        self.said = time.monotonic()
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
        link.timeout = own.timeout = float(note["timeout"])
        link.sock.settimeout(link.timeout)
        own.transport, self.worker = note["transport"], int(note["worker"])
        self.open, self.running = int(note["round"]), bool(note["running"])
        self.seed, self.workers = int(note["seed"]), int(note["workers"])
        head = own.head = head._replace(worker=self.worker, incarnation=note["incarnation"])
        self.method = self.lend(self.parse(note["method"]))
        self.rounds = not isinstance(self.method, PushGossipMethod | PairGossipMethod)
        self.message, self.answer, self.form = talk(self.method, self.x0.cpu())
        if note["model"]:
            link.send(head._replace(kind=Kind.MODEL), Form.of(self.x0).pack(self.x0))
        self.links = Links(own, self.place.token)
        self.averages = Averages(own, self.links, self.x0.device, partial(self._call, Kind.REDUCE))
        sizes = max(self.answer.bytes, self.form.bytes, 8), max(self.message.bytes, self.form.bytes, 8)
        hear = partial(self._hear_peer, own)
        callers = Callers(own, listener, self.place.token, self._due(), sizes, self.rounds, hear, self.averages.join)
        self.callers = callers
        for end in (self.callers.hang_up, self.links.close, self.averages.close):
            own.at_end(end)
        own.spawn(self.callers.accept)
        own.spawn(self._read)
        own.spawn(own.beat, float(note["beat"]))

    def _begin_life(self) -> None:
        """Get a state, and go on to the first gradient."""
        state, step = self._await_state()
        self.node = Node(
            self.incarnation.head.worker, self.method, state, step, since=step, seed=self.seed, view=self._view
        )
        with self.monitor:
            self._keep(step)
            self.loop: Loop = loop(self.method, self.node)
            request = next(self.loop)
            self.born = True
            self.incarnation.changed.notify_all()
        self._forget()
        self.fresh = []
        self.terms = Terms(self.incarnation.head.worker, self.method, self.seed, self.workers, step, None)
        self.life += 1
        self._drive(request)
        self._since = time.perf_counter()

    def _await_state(self) -> tuple[Any, int]:
        """The state to begin with: from a peer's welcome, or at the model that the coordinator sends."""
        with self.incarnation.changed:
            while self.state is None:
                self.incarnation.wait("the other workers of the first round, or a peer's welcome")
            return self.state

    def _keep(self, step: int) -> None:
        """What was sent to this life for rounds before its first one is not lost."""
        early = [entry for entry in self.inbox if entry.round is not None and entry.round < step]
        if early:
            self.inbox = deque(entry for entry in self.inbox if entry not in early)
            for entry in early:
                give_back(self.node, entry.message)
            self.incarnation.did("kept", [entry.which for entry in early])

    # threads: what comes from the coordinator and from peers

    def _raise_failure(self) -> None:
        if self.incarnation.failure is not None:
            raise self.incarnation.failure

    def _read(self) -> None:
        """Take what the coordinator sends: news at once, answers for whoever has asked."""
        own, model = self.incarnation, Form.of(self.x0)
        due = {Kind.NEWS: 0, Kind.ANSWER: 0, Kind.MEET: 0, Kind.MODEL: model.bytes, Kind.REFUSED: 0}
        try:
            while True:
                frame = own.link.recv(due, "the coordinator's next word")
                with own.changed:
                    if own.over.is_set():
                        return
                    if frame.header.kind == Kind.NEWS:
                        self._hear(frame.note)
                    elif frame.header.kind == Kind.MEET:
                        self.averages.meets.append(frame.note)
                    elif frame.header.kind == Kind.ANSWER:
                        own.replies.append(frame.note)
                    elif frame.header.kind == Kind.REFUSED:
                        raise LinkLost(f"the coordinator refused the last message: {frame.note['why']}")
                    elif self.state is None:
                        start = model.unpack(frame.payload, self.x0.device)
                        self.state = self.method.init(start), int(frame.header.step)
                        own.did("begin", self.state[1])
                    own.changed.notify_all()
        except (LinkLost, Corrupt) as lost:
            with own.changed:
                if not own.over.is_set():
                    own.lost = str(lost)
                own.changed.notify_all()
        except Exception as error:  # told before the link is closed, else the loop saw only that this life is lost
            own.fail(error)
        finally:
            own.link.close()

    def _hear(self, news: dict[str, Any]) -> None:
        """Who is there now, whose state this one gets, and who gets this one's."""
        own = self.incarnation
        if "alive" in news:
            own.alive = {about["worker"]: about for about in news["alive"] if about["worker"] != self.worker}
            self.links.leave_the_dead()
        if "donor" in news:
            self.donor = tuple(news["donor"])
        self.newcomers += [(worker, life) for worker, life in news.get("welcome", ())]
        if self.state is None and self.donor is not None:
            about = own.alive.get(self.donor[0], {})
            if (about.get("life"), about.get("place")) != (self.donor[1], "in"):
                donor, self.donor = self.donor, None
                own.link.send(own.head._replace(kind=Kind.ORPHAN), None, {"donor": donor})

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

    def _hear_peer(self, own: Incarnation, link: Link, frame: Frame) -> None:
        """Whatever another peer says to the life ``own``."""
        if frame.header.kind == Kind.MEAN:
            self.averages.give(link, frame)
        else:
            self._take(own, link, frame)

    def _take(self, own: Incarnation, link: Link, frame: Frame) -> None:
        """One message of a peer: once, however often it is sent."""
        header = frame.header
        key = header.worker, header.incarnation
        which = (*key, header.version)
        form = self.form if header.kind in (Kind.STATE, Kind.HEIR) else self.message
        message, round = form.unpack(frame.payload, self.x0.device), self._round(link, frame)
        if not finite(message):
            raise Corrupt(f"{link.name} sent numbers that are not finite, in step {header.step}")
        answer: Message | None = None
        with own.changed:
            end = time.monotonic() + own.timeout
            while not own.over.is_set() and not self._ready(header) and time.monotonic() < end:
                own.changed.wait(0.2)
            if own.over.is_set() or (self.closing and header.kind != Kind.HEIR):
                raise LinkLost("this life is over")
            if not self._ready(header) or own.alive[header.worker]["life"] != header.incarnation:
                raise LinkLost(f"life {header.incarnation} of {link.name} is over, or not known")
            number, before = self.taken.get(key, (0, None))
            if header.version <= number:
                answer = before
            elif header.kind == Kind.STATE:
                if self.state is not None:  # another one's, or the coordinator's model, was there first
                    link.send(own.head._replace(kind=Kind.REFUSED))
                    return
                if key != self.donor:
                    raise LinkLost("a state that nobody waits for")
                self.state = message, header.step
                own.did("born", which)
            elif header.kind == Kind.HEIR:
                if self.closing:  # what this one has is on its way to somebody else
                    link.send(own.head._replace(kind=Kind.REFUSED))
                    return
                assert isinstance(self.method, GossipMethod)
                self.node.state = self.method.inherit(self.node.state, message)
                own.did("heir", which)
            elif header.kind == Kind.SEND:
                if self.done and self.rounds:  # nobody takes it any more
                    link.send(own.head._replace(kind=Kind.REFUSED))
                    return
                self.inbox.append(Entry(which, round, message))
            else:
                assert isinstance(self.method, PairGossipMethod)
                self.node.state, answer = apart(self.method.meet(self.node.state, message), message)
                own.did("met", which)
            self.taken[key] = max(number, header.version), answer
            own.changed.notify_all()
        if header.kind != Kind.ASK:
            link.send(own.head._replace(kind=Kind.ANSWER))
        elif answer is None:
            raise Corrupt(f"{link.name} asks under the number {header.version}, which another message had")
        else:
            link.send(own.head._replace(kind=Kind.REPLY), self.answer.pack(answer, link.room(self.answer.bytes)))

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
        if self.incarnation.alive.get(header.worker, {}).get("life", -1) < header.incarnation:
            return False
        if header.kind == Kind.STATE:
            return self.state is not None or self.donor is not None
        return self.born or header.kind == Kind.SEND

    # asking

    def _call(self, kind: Kind, note: dict[str, Any], what: str) -> Any:
        """The coordinator's answer to a question, with which goes all that there is to tell."""
        self._tell(kind, note)
        return self.incarnation.answered(what)

    def _tell(self, kind: Kind, note: dict[str, Any]) -> None:
        """Tell the coordinator something, and what was done since it was last told."""
        with self.monitor:
            deeds, self.incarnation.deeds = self.incarnation.deeds, []
        while len(deeds) > DEEDS:
            self.incarnation.link.send(self.incarnation.head._replace(kind=Kind.STEP), None, {"deeds": deeds[:DEEDS]})
            deeds = deeds[DEEDS:]
        if deeds:
            note["deeds"] = deeds
        if self.losses:
            with self.monitor:  # pushes are counted by threads of their own
                sent, self.incarnation.sent = self.incarnation.sent, 0
            note |= {"losses": self.losses, "compute": self.computes, "waited": self.waits, "sent": sent}
            note |= {} if self.rate is None else {"lr": self.rates}
            load = self.meter.read(self.node.step)
            note |= {} if load is None else {"load": load}
            note |= {} if self.team.rank else {"used": self.began, "failed": self.failed}  # they are the first rank's
            self.began, self.failed = [], []
            self.losses, self.computes, self.waits, self.rates = [], [], [], []
        self.said = time.monotonic()
        self.incarnation.link.send(self.incarnation.head._replace(kind=kind), None, note)

    def _view(self, step: int) -> tuple[int, ...]:
        """Who takes part in round ``step``, which is one of this block."""
        if not self.rounds:
            with self.monitor:
                there = {name for name, about in self.incarnation.alive.items() if about["place"] == "in"}
                self._met(tuple(sorted({*there, self.incarnation.head.worker})))
        return self.members

    def _met(self, members: tuple[int, ...]) -> None:
        if members != self.members:
            self.members = members
            self.incarnation.did("view", -1, list(members))

    def _drive(self, request: Request) -> None:
        """Answer requests until a gradient is asked for."""
        while not isinstance(request, Gradient | Begin):
            answer: Any
            if isinstance(request, Send) and isinstance(self.method, PushGossipMethod):
                answer = self._push(request.to, request.msg)
            elif isinstance(request, Send):
                answer = self._post(request.to, request.msg, {"round": request.round})
                self.incarnation.did("sent", self.numbers, answer)
            elif isinstance(request, Ask):
                frame = self._exchange(Kind.ASK, request.to, request.msg, None)
                answer = None if frame is None else self.answer.unpack(frame.payload, self.x0.device)
            elif isinstance(request, Recv):
                answer = self._receive(request)
            elif isinstance(request, Inbox):
                with self.monitor:
                    answer = [(entry.which[0], entry.message) for entry in self.inbox]
                    self.incarnation.did("took", [entry.which for entry in self.inbox])
                    self.inbox.clear()
            else:
                self._delivered()
                answer = self._reduce(request)
            with self.monitor:
                if isinstance(request, Ask):  # here, as it may have been visited meanwhile
                    self.incarnation.did("asked", self.numbers, answer is not None)
                request = self.loop.send(answer)
        self.request = request
        if request.free and not self.begun and self.node.step >= self.end:
            self._delivered()
            self._begin()

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
            if self.incarnation.lost:  # in the middle of a block, where nothing is asked
                raise LinkLost(self.incarnation.lost)
            return
        note = self.incarnation.answered("the coordinator's word to go on")
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
            if self.incarnation.alive.get(worker, {}).get("life") != life:
                return  # it has gone, and nothing of this one's goes with it
            before = self.node.state
            self.node.state, state = self.method.welcome(before)
            shares = not self.rounds and self.node.state is not before  # else nothing is lost with the newcomer's
            number = self.numbers + 1
            self.incarnation.did("welcomed", number)
        if self._exchange(Kind.STATE, worker, state, None, self.form, life) is None and shares:
            with self.monitor:
                if isinstance(self.method, GossipMethod):
                    self.node.state = self.method.inherit(self.node.state, state)
                    self.incarnation.did(
                        "heir", [self.incarnation.head.worker, self.incarnation.head.incarnation, number]
                    )

    def _push(self, to: int, msg: Message) -> bool:
        """Bring a push while the loop goes on. False, so that it comes back, where the one before is still on its way."""
        self._sound(to, msg)
        with self.monitor:
            self.numbers += 1
            free = to not in self.away
            self.incarnation.did("sent", self.numbers, free)
            if free:
                self.away.add(to)
                self.incarnation.spawn(self._carry, self.incarnation, self.links, self.numbers, to, msg)
        return free

    def _carry(self, own: Incarnation, links: Links, number: int, to: int, msg: Message) -> None:
        """Bring a push; it comes back where its receiver is dead."""
        try:
            came = self._bring(own, links, number, Kind.SEND, to, msg, None) is not None
        except LinkLost:
            return  # this life is over
        with own.changed:
            if not own.over.is_set():
                if not came:
                    give_back(self.node, msg)
                    own.did("kept", [(*own.head[2:4], number)])
                self.away.discard(to)
                own.changed.notify_all()

    def _post(self, to: int, msg: Message, note: Any) -> bool:
        """Send ``msg`` to a peer, and go on; `_delivered` sees to it that it has come. False where that one is dead.

        By the next round the acknowledgement has come, and nobody has waited for it.
        """
        self._delivered(self.node.step)
        self._sound(to, msg)
        self.numbers += 1
        head = self.incarnation.head._replace(kind=Kind.SEND, version=self.numbers, step=self.node.step)
        with self.monitor:
            about = self.incarnation.alive.get(to)
        if about is None or about["place"] == "done":  # nobody takes it
            if about is None:
                self.links.drop(to)
            return False
        link: Link | None = None
        with contextlib.suppress(LinkLost, Corrupt, PermissionError):  # said, if it lasts, when it is sent again
            link = self.links.to(to, about)
            link.send(head, self.message.pack(msg, link.room(self.message.bytes)), note)
            self.incarnation.sent += self.message.bytes
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
                    self.incarnation.did("kept", [(head.worker, head.incarnation, head.version)])

    def _confirmed(self, posted: Posted) -> bool:
        """Whether a message was taken; it is sent again where it must be. False where its receiver is dead or done."""
        head, to, life, msg, note, link = posted
        frame: Frame | None = None
        if link is not None:
            with contextlib.suppress(LinkLost, Corrupt):
                frame = link.recv({Kind.ANSWER: 0, Kind.REFUSED: 0}, f"worker {to}'s answer")
        if frame is None:
            frame = self._bring(self.incarnation, self.links, head.version, Kind.SEND, to, msg, note, None, life)
        return frame is not None and frame.header.kind == Kind.ANSWER

    def _exchange(
        self, kind: Kind, to: int, msg: Message, note: Any, form: Form | None = None, life: int | None = None
    ) -> Frame | None:
        """Bring ``msg`` to a peer in its present ``life``; its acknowledgement or answer, None where that is over or takes no
        message."""
        self._delivered()
        self._sound(to, msg)
        with self.incarnation.changed:
            while to in self.away:
                self.incarnation.wait(f"the end of a push to worker {to}")
        self.numbers += 1
        return self._bring(self.incarnation, self.links, self.numbers, kind, to, msg, note, form, life)

    def _sound(self, to: int, msg: Message) -> None:
        if not finite(msg):
            self._diverged(f"what it would send to worker {to} is not finite")

    def _bring(
        self,
        own: Incarnation,
        links: Links,
        number: int,
        kind: Kind,
        to: int,
        msg: Message,
        note: Any,
        form: Form | None = None,
        life: int | None = None,
    ) -> Frame | None:
        late = time.monotonic() + own.timeout
        head = own.head._replace(kind=kind, version=number, step=self.node.step)
        due = {Kind.REPLY: self.answer.bytes} if kind == Kind.ASK else {Kind.ANSWER: 0}
        due[Kind.REFUSED] = 0  # it leaves, or its loop has ended, or it has failed
        while True:
            with self.monitor:
                about = own.alive.get(to)
                own.check(f"worker {to} was talked to")
            if about is None or (life is not None and about["life"] != life):
                links.drop(to)
                return None
            life = about["life"]
            try:
                link = links.to(to, about)
                form = form or self.message
                link.send(head, form.pack(msg, link.room(form.bytes)), note)
                with self.monitor:
                    own.sent += form.bytes
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
                links.drop(to)
                with own.changed:
                    own.changed.wait(0.05)

    def _receive(self, request: Recv) -> dict[int, Message]:
        """A message of the round from each source, but for those who will not send one any more."""
        self.callers.look_out(request.sources, lambda: len(self.inbox) >= len(request.sources))
        while True:
            with self.incarnation.changed:
                here = [
                    entry for entry in self.inbox if entry.which[0] in request.sources and entry.round == request.round
                ]
                found = {entry.which[0]: entry.message for entry in here}
                missing = [s for s in request.sources if s not in found and self._comes(s, request.round)]
                if not missing:
                    break
                what = f"a message of round {request.round} from workers {', '.join(map(str, missing))}"
                self.incarnation.wait(what, 0.05 if self.posted else 1.0)
            self._delivered()  # who is waited for may wait for what was lost on the way
        with self.monitor:
            self.inbox = deque(entry for entry in self.inbox if entry not in here)
            self.incarnation.did("took", [entry.which for entry in here])
            return {s: found[s] for s in request.sources if s in found}

    def _comes(self, source: int, round: int | None) -> bool:
        """Whether a message of this round may still come from there."""
        about = self.incarnation.alive.get(source)
        return about is not None and about["place"] == "in" and (round is None or about["since"] <= round)

    def _reduce(self, request: AllReduce) -> Message:
        """The mean over the members who live, by a process group among them; again without who dies meanwhile."""
        with self.team:
            part = request._replace(msg=self.team.cut(request.msg))
            if not finite(part.msg):
                self._diverged("what it would average is not finite")
            mean = self.averages.mean(part)
            self.incarnation.did("averaged", mean.name, mean.ranks)
        return self.team.join(mean.message, self.x0.numel())

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
                        self.incarnation.did("went")
                        request = self.loop.send(None)
                    self._drive(request)
                with self.monitor:
                    self.incarnation.did("step", self.node.step)
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
                self.incarnation.did("moved")
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
            self.incarnation.link.send(self.incarnation.head._replace(kind=Kind.LEAVE, step=step), None, note)
        self._hang_up()
        why = f"worker {self.incarnation.head.worker}, step {step}: {what}; {remedy(brought)}"
        raise Diverged(why, Trace(), self.incarnation.head.worker, step)

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
        with self.incarnation.changed:
            while self.away:
                self.incarnation.wait("the end of pushes that are on their way")
        with self.monitor:
            self.done = done
        if done:
            self._show()
            self.averages.disband()
            self._last(done)
            self.told = True
            with self.incarnation.changed:
                while not self.incarnation.replies:
                    self.incarnation.wait("the end of the run")
        with self.monitor:
            self.closing = True
            if not done:
                for entry in self.inbox:
                    give_back(self.node, entry.message)
                self.incarnation.did("left", [entry.which for entry in self.inbox], self.numbers + 1)
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
        while heirs := {name for name, about in self.incarnation.alive.items() if about["place"] == "in"} - asked:
            self.numbers = number  # whoever takes it
            frame = self._exchange(Kind.HEIR, min(heirs), self.node.state, None, self.form)
            if frame is not None:
                return
            asked.add(min(heirs))

    def _last(self, done: bool) -> None:
        """Say that this one goes, with all that it has done."""
        if self.shared is not None:
            self.shared.leave(self.incarnation.link, self.incarnation.head)
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
        self.incarnation.link.send(
            self.incarnation.head._replace(kind=Kind.MODEL, step=self.node.step), Form.of(x).pack(x)
        )

    def _mend(self, lost: LinkLost) -> None:
        """The coordinator is gone: join again, as a new life."""
        self._hang_up()
        self._raise_failure()
        self._dies(lost, "dialling again, as a new life")
        self._join()

    def _hang_up(self) -> None:
        """End this life; its threads see it."""
        self.incarnation.end()
