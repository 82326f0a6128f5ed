"""One peer of a real run without a server: a monitor whose loop talks to other peers, and a thread that answers each.

A coordinator knows who is there and which round they are in; models go between peers only. A send is done when the other
end has acknowledged it; one that is not is sent again under the same number, which the other end takes once, until the
coordinator says that the receiver is dead: then it comes back. So nothing is lost or doubled among the living.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.gossip import GossipMethod, PairGossipMethod, PushGossipMethod, RoundGossipMethod
from ..core.method import Message, Method
from ..core.periodic import OuterMethod
from ..core.protocol import AllReduce, Ask, Gradient, Inbox, Loop, Node, Recv, Request, Send, give_back, loop
from .link import Frame, Link, LinkLost, accept, dial, listen, machine
from .message import DTYPES, Corrupt, Form, Header, Kind, leaves, rebuild
from .place import Place
from .way import Stores, offered, taken
from .worker import Driver, Parse, Terms


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


class Peer(Driver):
    """Drives the loop of a method without a server, as `Worker` does that of one with."""

    link: Link

    def __init__(
        self,
        place: Place,
        x0: Tensor,
        hello: dict[str, Any],
        parse: Parse,
        say: Callable[[str], None],
        lend: Callable[[Method], Method] = lambda method: method,
    ) -> None:
        """``lend`` puts this worker's own optimizer into the run's method."""
        super().__init__(say)
        self.lend = lend
        self.place, self.x0, self.hello, self.parse = place, x0, hello, parse
        self.worker = place.worker
        self.monitor = threading.RLock()  # the node's state, and what has come for it
        self.changed = threading.Condition(self.monitor)
        self.stores = Stores()
        self.incarnation, self.lost = 0, ""
        self.links: dict[int, Link] = {}
        self._join()

    # joining

    def _join(self) -> None:
        """Begin a life: agree with the coordinator, and get a state from it or from a peer."""
        end = time.monotonic() + self.place.patience
        pause = 0.05
        while True:
            try:
                self._enter()
                return
            except LinkLost as lost:
                self._hang_up()
                if time.monotonic() + pause > end:
                    raise LinkLost(f"{lost}; nobody came back within {self.place.patience:g} s") from None
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
            except BaseException:
                self._hang_up()
                raise

    def _enter(self) -> None:
        address = self.place.servers[0]
        link = dial(address, self.place.token, "the coordinator", self.place.timeout)
        self.link, self.lost = link, ""
        self.listener = listen(link.sock.getsockname()[0])
        self.alive: dict[int, dict[str, Any]] = {}  # the others: address, machine, life, and the round they came in
        self.inbox: deque[tuple[list[int], int | None, Message]] = deque()  # with (source, its life, number)
        self.deeds: list[list[Any]] = []  # since they were last told
        self.links = {}
        self.heads: dict[int, Header] = {}
        self.taken: dict[tuple[int, int], tuple[int, Message | None]] = {}  # last number of each life, and the answer
        self.numbers = 0
        self.replies: deque[Frame] = deque()
        self.views: dict[int, tuple[int, ...]] = {}
        self.group: tuple[str, Any] = ("", None)
        self.newcomers: list[dict[str, Any]] = []
        self.closing = False
        self.since = 0  # gradients since the coordinator was last asked to go on
        self.state: tuple[Any, int] | None = None
        self.last_view: tuple[int, ...] = ()
        head = Header(Kind.HELLO, DTYPES.index(self.x0.dtype))
        host, port = self.listener.getsockname()[:2]
        about = {"worker": self.worker, "parameters": self.x0.numel(), "address": f"{host}:{port}"}
        link.send(head, None, self.hello | about | {"machine": machine(), "peer": True})
        frame = link.recv({Kind.WELCOME: 0, Kind.REFUSED: 0}, "its welcome")
        if frame.header.kind == Kind.REFUSED:
            raise ValueError(f"the coordinator at {address} refuses this worker: {frame.note['why']}")
        note = frame.note
        link.timeout = note["timeout"]
        link.sock.settimeout(link.timeout)
        self.terms_note, self.timeout = note, float(note["timeout"])
        self.worker, self.incarnation = note["worker"], note["incarnation"]
        self.head = head._replace(worker=self.worker, incarnation=self.incarnation)
        self.method = self.lend(self.parse(note["method"]))
        self.message, self.answer, self.form = talk(self.method, self.x0.cpu())
        if note["model"]:
            model = Form.of(self.x0.cpu())
            link.send(self.head._replace(kind=Kind.MODEL), model.pack(self.x0.cpu()))
        life = self.incarnation
        threading.Thread(target=self._accept, args=(self.listener, life), daemon=True).start()
        threading.Thread(target=self._read, args=(link, life), daemon=True).start()
        threading.Thread(target=self._beats, args=(link, life, float(note["beat"])), daemon=True).start()
        state, step = self._await_state()
        self.node = Node(self.worker, self.method, state, step, since=step, seed=note["seed"], view=self._view)
        self.rounds = not isinstance(self.method, PushGossipMethod | PairGossipMethod)
        with self.monitor:
            self.loop: Loop = loop(self.method, self.node)
            request = next(self.loop)
        self.tickets.clear()
        self._used = 0
        self.terms = Terms(self.worker, self.method, note["seed"], note["workers"], step, None, [])
        self.life += 1
        self._drive(request)
        self._since = time.perf_counter()

    def _await_state(self) -> tuple[Any, int]:
        """The state to begin with: from a peer's welcome, or at the model that the coordinator sends."""
        with self.changed:
            while self.state is None:
                self._wait("the other workers of the first round, or a peer's welcome")
            return self.state

    # threads: what comes from the coordinator and from peers

    def _read(self, link: Link, life: int) -> None:
        """Take what the coordinator sends: news at once, answers for whoever has asked."""
        model = Form.of(self.x0.cpu())
        due = {Kind.NEWS: 0, Kind.ANSWER: 0, Kind.MODEL: model.bytes, Kind.REFUSED: 0, Kind.OVER: 0}
        try:
            while True:
                frame = link.recv(due, "the coordinator's next word")
                with self.changed:
                    if frame.header.kind == Kind.NEWS:
                        self._hear(frame.note)
                    elif frame.header.kind == Kind.MODEL:
                        start = model.unpack(frame.payload).to(self.x0.device)
                        self.state = self.method.init(start), int(frame.header.step)
                        self.deeds.append(["begin", self.state[1]])
                    elif frame.header.kind == Kind.REFUSED:
                        raise LinkLost(f"the coordinator refused: {frame.note['why']}")
                    else:
                        self.replies.append(frame)
                    self.changed.notify_all()
        except (LinkLost, Corrupt) as lost:
            with self.changed:
                if life == self.incarnation:
                    self.lost = str(lost)
                self.changed.notify_all()

    def _hear(self, news: dict[str, Any]) -> None:
        """Who is there now, and who is to be given a state."""
        self.alive = {int(name): about for name, about in news["alive"].items() if int(name) != self.worker}
        self.newcomers += news.get("welcome", ())

    def _beats(self, link: Link, life: int, pause: float) -> None:
        while life == self.incarnation and not self.lost:
            time.sleep(pause)
            try:
                link.beat(self.head)
            except (LinkLost, ValueError):
                return

    def _accept(self, listener: socket.socket, life: int) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._react, args=(sock, life), daemon=True).start()

    def _react(self, sock: socket.socket, life: int) -> None:
        """Answer one other peer."""
        link: Link | None = None
        try:
            link = accept(sock, self.place.token, "a peer", self.timeout)
            hello = link.recv({Kind.HELLO: 0}, "its hello")
            link.name = f"worker {hello.header.worker}"
            sizes = max(self.answer.bytes, 8), max(self.message.bytes, self.form.bytes, 8)
            host = sock.getsockname()[0]
            better, way = offered(link, hello.note["machine"], self.terms_note["transport"], sizes, self.stores, host)
            link.send(self.head._replace(kind=Kind.WELCOME), None, way)
            link = better
            due = {Kind.SEND: self.message.bytes, Kind.ASK: self.message.bytes, Kind.STATE: self.form.bytes}
            due[Kind.HEIR] = self.form.bytes
            while True:
                frame = link.recv(due, "its next message", patient=True)
                self._take(link, frame, life)
        except (LinkLost, Corrupt, PermissionError, KeyError, TypeError) as error:
            if not isinstance(error, LinkLost):
                self.say(f"refused: {error}")
        finally:
            if link is not None:
                link.close()
            sock.close()

    def _take(self, link: Link, frame: Frame, life: int) -> None:
        """One message of a peer: once, however often it is sent."""
        header = frame.header
        key = header.worker, header.incarnation
        which = [*key, header.version]
        answer: Message | None = None
        with self.changed:
            if life != self.incarnation or self.closing:
                raise LinkLost("this life is over")
            number, before = self.taken.get(key, (0, None))
            if header.version <= number:
                answer = before
            elif header.kind == Kind.STATE and self.state is not None:
                pass  # it has begun, with the state of one who has died since
            elif header.kind == Kind.STATE:
                self.state = self.form.unpack(frame.payload), header.step
                self.deeds.append(["born", which])
            elif header.kind == Kind.HEIR:
                assert isinstance(self.method, GossipMethod)
                self.node.state = self.method.inherit(self.node.state, self.form.unpack(frame.payload))
                self.deeds.append(["heir", which])
            elif header.kind == Kind.SEND:
                round = None if frame.note is None else frame.note["round"]
                self.inbox.append((which, round, self.message.unpack(frame.payload)))
            else:
                assert isinstance(self.method, PairGossipMethod)
                self.node.state, answer = self.method.meet(self.node.state, self.message.unpack(frame.payload))
                self.deeds.append(["met", which])
            self.taken[key] = max(number, header.version), answer
            self.changed.notify_all()
        if header.kind == Kind.ASK:
            assert answer is not None
            link.send(self.head._replace(kind=Kind.REPLY), self.answer.pack(answer))
        else:
            link.send(self.head._replace(kind=Kind.ANSWER))

    # asking

    def _wait(self, what: str, seconds: float = 1.0) -> None:
        """Wait for a change; raises `LinkLost` where the coordinator is gone. Under the monitor."""
        if self.lost:
            raise LinkLost(f"{self.lost}; {what} was waited for")
        self.changed.wait(seconds)

    def _call(self, kind: Kind, note: Any, what: str) -> Any:
        """The coordinator's answer to a question."""
        self.link.send(self.head._replace(kind=kind), None, note)
        with self.changed:
            while not self.replies:
                self._wait(what)
            return self.replies.popleft().note

    def _view(self, step: int) -> tuple[int, ...]:
        """Who takes part in round ``step``."""
        if not self.rounds:
            there = {name for name, about in self.alive.items() if not about.get("done")}
            members = tuple(sorted({*there, self.worker or 0}))
            if members != self.last_view:
                self.last_view = members
                self.deeds.append(["view", -1, list(members)])
            return members
        if step not in self.views:
            self.views = {k: v for k, v in self.views.items() if k > step - 100}
            self.views[step] = tuple(self._call(Kind.VIEW, {"step": step}, f"the members of round {step}")["members"])
            self.deeds.append(["view", step, self.views[step]])
        return self.views[step]

    def _drive(self, request: Request) -> None:
        """Answer requests until a gradient is asked for."""
        while not isinstance(request, Gradient):
            answer: Any
            if isinstance(request, Send):
                answer = self._exchange(Kind.SEND, request.to, request.msg, {"round": request.round}) is not None
                self.deeds.append(["sent", self.numbers, answer])
            elif isinstance(request, Ask):
                frame = self._exchange(Kind.ASK, request.to, request.msg, None)
                answer = None if frame is None else self.answer.unpack(frame.payload)
                settled = ["asked", self.numbers, frame is not None]
            elif isinstance(request, Recv):
                answer = self._receive(request)
            elif isinstance(request, Inbox):
                with self.monitor:
                    answer = [(which[0], msg) for which, _, msg in self.inbox]
                    self.deeds.append(["took", [which for which, _, _ in self.inbox]])
                    self.inbox.clear()
            else:
                answer = self._reduce(request)
            with self.monitor:
                if isinstance(request, Ask):
                    self.deeds.append(settled)  # here, as it may have been visited meanwhile
                request = self.loop.send(answer)
        self.request = request
        if request.free:
            self._begin()

    def _begin(self) -> None:
        """Everything is delivered: tell the coordinator, and welcome who begins here."""
        want = max(1, self.since) - len(self.tickets)
        self.since = 0
        note = self._call(Kind.BEGIN, {"step": self.node.step, "want": max(0, want)}, "the coordinator's word to go on")
        if "again" in note:
            raise LinkLost("the peer that this one began with has gone")
        self.tickets.extend(note["tickets"])
        with self.monitor:
            newcomers, self.newcomers = self.newcomers + note["welcome"], []
        for newcomer in newcomers:
            with self.monitor:
                self.alive[newcomer["worker"]] = newcomer
                self.node.state, state = self.method.welcome(self.node.state)
                self.deeds.append(["welcomed", self.numbers + 1])
            self._exchange(Kind.STATE, newcomer["worker"], state, None, self.form)
        if note["show"]:
            self._show()

    def _exchange(self, kind: Kind, to: int, msg: Message, note: Any, form: Form | None = None) -> Frame | None:
        """Bring ``msg`` to a peer; its acknowledgement or answer, None where it is dead."""
        self.numbers += 1
        step = self.node.step
        life = None
        while True:
            with self.monitor:
                about = self.alive.get(to)
                if self.lost:
                    raise LinkLost(f"{self.lost}; worker {to} was talked to")
            if about is None or (life is not None and about["life"] != life):
                self._drop(to)
                return None
            life = about["life"]
            try:
                link = self._dial(to, about)
                head = self.head._replace(kind=kind, version=self.numbers, step=step)
                link.send(head, (form or self.message).pack(msg), note)
                due = {Kind.REPLY: self.answer.bytes} if kind == Kind.ASK else {Kind.ANSWER: 0}
                return link.recv(due, f"worker {to}'s answer")
            except (LinkLost, Corrupt):
                self._drop(to)
                with self.changed:
                    self.changed.wait(0.05)

    def _dial(self, to: int, about: dict[str, Any]) -> Link:
        """The link to a peer, as it is in its present life."""
        if to in self.links and self.heads[to].incarnation == about["life"]:
            return self.links[to]
        self._drop(to)
        link = dial(about["address"], self.place.token, f"worker {to}", self.timeout)
        link.send(self.head._replace(kind=Kind.HELLO), None, {"machine": machine()})
        note = link.recv({Kind.WELCOME: 0}, "its welcome").note
        self.links[to] = taken(link, note, about["address"])
        self.heads[to] = Header(Kind.HELLO, incarnation=about["life"])
        return self.links[to]

    def _drop(self, to: int) -> None:
        if to in self.links:
            self.links.pop(to).close()

    def _receive(self, request: Recv) -> dict[int, Message]:
        """A message of the round from each source, but for those who will not send one any more."""
        with self.changed:
            while True:
                here = [entry for entry in self.inbox if entry[0][0] in request.sources and entry[1] == request.round]
                found = {which[0]: msg for which, _, msg in here}
                missing = [s for s in request.sources if s not in found and self._comes(s, request.round)]
                if not missing:
                    break
                self._wait(f"a message of round {request.round} from workers {', '.join(map(str, missing))}")
            self.inbox = deque(entry for entry in self.inbox if entry not in here)
            self.deeds.append(["took", [which for which, _, _ in here]])
            return {s: found[s] for s in request.sources if s in found}

    def _comes(self, source: int, round: int | None) -> bool:
        """Whether a message of this round may still come from there."""
        about = self.alive.get(source)
        return about is not None and not about.get("done") and (round is None or about["since"] <= round)

    def _reduce(self, request: AllReduce) -> Message:
        """The mean over the members who live, by a process group among them; again without who dies meanwhile."""
        parts = leaves(request.msg)
        while True:
            note = {"round": request.round, "members": list(request.members)}
            told = self._call(Kind.REDUCE, note, f"the average of round {request.round} with {request.members}")
            sums, good = [t.clone() for t in parts], True
            if len(told["ranks"]) > 1:
                try:
                    self._sum(sums, told)
                except (RuntimeError, LinkLost) as error:
                    self.say(
                        f"an average with workers {told['ranks']} broke ({str(error).splitlines()[0][:120]}); again"
                    )
                    self.group, good = ("", None), False
            if self._call(Kind.VOTE, {"group": told["group"], "good": good}, "the votes on an average")["good"]:
                self.deeds.append(["averaged", told["group"], told["ranks"]])
                return rebuild(request.msg, [t / len(told["ranks"]) for t in sums])
            self.group = "", None

    def _sum(self, tensors: list[Tensor], told: dict[str, Any]) -> None:
        """Sum over the group, in place."""
        from .gloo import group, join_store

        if self.group[0] != told["group"]:
            store = join_store(
                self.place.servers[0].rpartition(":")[0].strip("[]"), self.terms_note["store"], self.timeout
            )
            ranks = told["ranks"]
            host = self.link.sock.getsockname()[0]
            self.group = (
                told["group"],
                group(store, told["group"], ranks.index(self.worker), len(ranks), host, self.timeout),
            )
        for dtype in {t.dtype for t in tensors}:
            same = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in same]).cpu()
            self.group[1].allreduce([flat]).wait()
            for t, part in zip(same, torch.split(flat, [t.numel() for t in same]), strict=True):
                t.copy_(part.view(t.shape))

    # what a training loop sees

    def step(self, g: Tensor, loss: float) -> None:
        now = time.perf_counter()
        compute, used, self._used = now - self._since, self._used, 0
        note = {"losses": [loss], "compute": [compute], "waited": self._waited, "used": used, "deeds": self._told()}
        self.since += max(1, used)
        try:
            self.link.send(self.head._replace(kind=Kind.STEP, step=self.node.step, gradients=1), None, note)
            with self.monitor:
                self.deeds.append(["step", self.node.step])
                request = self.loop.send(g)
            self._drive(request)
        except LinkLost as lost:
            self._mend(lost)
        self._since = time.perf_counter()
        self._waited = self._since - now

    def _told(self) -> list[list[Any]]:
        """What it has done since it last said so."""
        with self.monitor:
            deeds, self.deeds = self.deeds, []
            return deeds

    def more(self) -> list[int]:
        note = {"step": self.node.step, "want": 1, "more": True}
        try:
            return list(self._call(Kind.BEGIN, note, "minibatches")["tickets"])
        except LinkLost as lost:
            self._mend(lost)
            return []  # those of the new life have come with it

    def master(self) -> Tensor:
        with self.monitor:
            x: Tensor = self.method.params(self.node.state)
            return x

    def leave(self, done: bool) -> None:
        """Go in good order. One that is done can still be talked to until all are; one that goes before hands over what
        others need of it."""
        try:
            if done:
                self._show()
                self.link.send(self.head._replace(kind=Kind.LEAVE), None, self._last(done))
                with self.changed:
                    while not self.replies:
                        self._wait("the end of the run")
            with self.monitor:
                self.closing = True
                if not done:
                    for _, _, message in self.inbox:
                        give_back(self.node, message)
                    self.deeds.append(["left", [which for which, _, _ in self.inbox], self.numbers + 1])
            heir = min((name for name, about in self.alive.items() if not about.get("done")), default=None)
            hands_over = isinstance(self.method, GossipMethod) and type(self.method).inherit is not GossipMethod.inherit
            if not done and heir is not None and hands_over:
                self._exchange(Kind.HEIR, heir, self.node.state, None, self.form)
            self._show()
            self.link.send(self.head._replace(kind=Kind.LEAVE), None, self._last(done))
        except LinkLost as lost:
            self.say(f"{lost}, while this worker was leaving")
        self._hang_up()

    def _last(self, done: bool) -> dict[str, Any]:
        used, self._used = self._used, 0
        return {"done": done, "used": used, "deeds": self._told()}

    def _show(self) -> None:
        """Let the coordinator have the model."""
        with self.monitor:
            x = self.method.params(self.node.state).detach().cpu()
        self.link.send(self.head._replace(kind=Kind.MODEL, step=self.node.step), Form.of(x).pack(x))

    def _mend(self, lost: LinkLost) -> None:
        """The coordinator is gone: join again, as a new life."""
        self.say(f"{lost}; dialling again, as a new life")
        self._hang_up()
        self._join()

    def _hang_up(self) -> None:
        self.incarnation = 0
        self.lost = self.lost or "this life is over"
        for link in (*self.links.values(), *([self.link] if hasattr(self, "link") else [])):
            link.close()
        if hasattr(self, "listener"):
            self.listener.close()


class Solitary(Driver):
    """A peer that nobody joins: what a script does when nobody has launched it."""

    def __init__(self, method: Method, x0: Tensor, say: Callable[[str], None]) -> None:
        super().__init__(say)
        method.check(1)
        self.method, self.next = method, 0
        self.node = Node(0, method, method.init(x0))
        self.terms = Terms(0, method, 0, 1, 0, None, [])
        self.loop: Loop = loop(method, self.node)
        self._drive(next(self.loop))

    def step(self, g: Tensor, loss: float) -> None:
        self._drive(self.loop.send(g))

    def _drive(self, request: Request) -> None:
        while not isinstance(request, Gradient):
            if isinstance(request, AllReduce):
                answer = request.msg
            else:
                answer = {} if isinstance(request, Recv) else [] if isinstance(request, Inbox) else None
            request = self.loop.send(answer)
        self.request = request

    def more(self) -> list[int]:
        self.next += 1
        return [self.next - 1]

    def master(self) -> Tensor:
        x: Tensor = self.method.params(self.node.state)
        return x

    def leave(self, done: bool) -> None:
        pass
