"""One worker of a real run: it drives its method's loop, exchanges with the server, and dials again when a link breaks."""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..core.method import GradientServer, Message, Method, ServerMethod
from ..core.problem import Problem
from ..core.protocol import Ask, Begin, Gradient, Loop, Node, loop
from ..core.server import NotFinite, ParameterServer
from ..core.tree import finite, leaves, rebuild
from ..engines.faults import Fault
from ..engines.speed import Speed
from ..failure import Diverged
from ..log import WORKER
from ..trace import Trace
from .exit import WorkerThread
from .host import OtherKind
from .leases import TASK, Key, Lease, Leases, Opening, leases_in, remedy
from .link import Frame, Link, LinkLost, dial, machine
from .meter import Meter
from .place import Place
from .protocol.wire import DTYPES, Corrupt, Form, Header, Kind
from .server import forms
from .shared_state import Shared, greeted
from .way import taken

Parse = Callable[[str], Any]


class Terms(NamedTuple):
    """What a worker is told when it joins."""

    worker: int
    method: Method
    seed: int
    workers: int
    step: int  # gradients of this worker's earlier lives
    reply: Message


class Spoilt(LinkLost):
    """What this worker brought was not taken, as it is not finite or would make the model so. ``step``: the worker's, then."""

    def __init__(self, why: str, step: int) -> None:
        super().__init__(why)
        self.step = step


class Exchange(Protocol):
    """The server as a worker sees it."""

    def join(self) -> Terms:
        """Join, or join again."""
        ...

    def push(self, msg: Message, gradients: int, note: dict[str, Any]) -> None:
        """Bring a message. Raises `LinkLost` where the link is dead."""
        ...

    def reply(self) -> tuple[Message, list[Lease]]:
        """The reply to it, and minibatches for what comes next. Raises `LinkLost` where the link is dead, and `Spoilt`."""
        ...

    def more(self, note: dict[str, Any]) -> dict[str, Any]:
        """A word about minibatches, and the answer: see `Leases.hear`."""
        ...

    def master(self) -> Tensor:
        """The model that would be shipped now. [d]"""
        ...

    def start(self, x: Tensor) -> Message | None:
        """Begin the run at ``x`` [d], unless a gradient was taken in it; the first reply, or None where that cannot be."""
        return None

    def room(self) -> Tensor | None:
        """Where a gradient may be made so that it need not be copied: see `Driver.room`."""
        return None

    def leave(self, note: dict[str, Any]) -> None:
        """Go in good order."""
        ...


class Alone(Exchange):
    """A server inside the only worker: what a script does when nobody has launched it."""

    def __init__(self, method: ServerMethod, x0: Tensor) -> None:
        self.server, self.method, self.leases = ParameterServer.start(method, x0), method, Leases()
        self.answer: Message = ()
        self.given: list[Lease] = []

    def join(self) -> Terms:
        if 0 in self.server.own:
            self.server.leave(0)
        self.leases.join(0)
        return Terms(0, self.method, 0, 1, self.server.version, self.server.join(0))

    def start(self, x: Tensor) -> Message:
        self.server = ParameterServer.start(self.method, x)
        return self.server.join(0)

    def push(self, msg: Message, gradients: int, note: dict[str, Any]) -> None:
        version, used = self.server.version, leases_in(note["used"])
        self.server.tell(note.get("lr"))
        try:
            self.answer = self.server.visit(0, msg)[0]
        except NotFinite:
            self.leases.fail(0, used)
            what = "is finite and would make the model not so" if finite(msg) else "is not finite"
            raise Spoilt(f"visit {version}: the gradient {what}; {remedy(used)}", version) from None
        self.leases.use(0, used)
        self.leases.fail(0, leases_in(note["failed"]))
        self.given = leases_in(self.leases.hear(0, note)["leases"])

    def reply(self) -> tuple[Message, list[Lease]]:
        return self.answer, self.given

    def more(self, note: dict[str, Any]) -> dict[str, Any]:
        return self.leases.hear(0, note)

    def master(self) -> Tensor:
        return self.server.x()

    def leave(self, note: dict[str, Any]) -> None:
        pass


class NumberTaken(LinkLost):
    """The number of this worker belongs to another one; ``timeout`` is after how many seconds of silence that would be dead."""

    def __init__(self, why: str, timeout: float) -> None:
        super().__init__(why)
        self.timeout = timeout


class TurnedAway:
    """What a worker does whose number belongs to another one: that one may have died just now, so it asks for a while."""

    def __init__(self, log: logging.Logger) -> None:
        self.log = log
        self.until = math.inf
        self.over = False

    def look(self, lost: Exception) -> bool:
        """Whether that is why nothing came of dialling; it is said once. `over` says whether it has gone on for long enough."""
        taken = lost if isinstance(lost, NumberTaken) else lost.__cause__  # as the ranks of a worker tell each other
        if not isinstance(taken, NumberTaken):
            self.over = False
            return False
        if self.until == math.inf:
            self.log.warning(f"{taken}; if that one has just died, this one joins within {taken.timeout:g} s")
            self.until = time.monotonic() + taken.timeout
        self.over = time.monotonic() > self.until
        return True


@dataclass(eq=False)
class _Shard:
    """A link to one server, and the part of the model that it has."""

    link: Link
    part: slice
    head: Header
    push: Form
    reply: Form
    step: int = 0


class Remote(Exchange):
    """The server over links: one for each of its shards. Dials until somebody answers, or patience ends."""

    def __init__(
        self,
        place: Place,
        x0: Tensor,
        hello: dict[str, Any],
        parse: Parse,
        shard: tuple[int, int] | None = None,
        shared: Shared | None = None,
    ) -> None:
        """``shard`` is set where ``x0`` is itself one part of the model, of how many, for one server; ``shared`` is what the model has
        beside, for the first server to compare."""
        if x0.dtype not in DTYPES:
            raise ValueError(f"the model is of {x0.dtype}: a real run takes {', '.join(map(str, DTYPES))}")
        self.place, self.x0, self.hello, self.parse = place, x0, hello, parse
        self.worker, self.named, self.shard = place.worker, place.worker is not None, shard
        self.process = secrets.token_hex(8)
        self.shards: list[_Shard] = []
        self.stopped: Callable[[], bool] = lambda: False  # whether to give up dialling
        self.log = WORKER
        self.pushed, self.shared = 0, shared
        self.oracle = False  # whether the worker keeps nothing of a reply when the next one comes
        self.beat = 1.0
        self.silent = threading.Event()  # whether no thread says that this worker lives
        self.silent.set()

    def join(self) -> Terms:
        """Dial all servers, agree with them, and take the first reply of each."""
        end = time.monotonic() + self.place.patience
        pause = 0.05
        turned_away = TurnedAway(self.log)
        while True:
            try:
                return self._join()
            except (LinkLost, Corrupt) as lost:
                self._hang_up()
                taken = turned_away.look(lost)
                if turned_away.over:
                    raise ValueError(str(lost)) from None
                if self.stopped():
                    raise LinkLost(f"{lost}; this worker is asked to stop, and dials no more") from None
                if not taken and time.monotonic() + pause > end:
                    raise LinkLost(f"{lost}; nobody came back within {self.place.patience:g} s") from None
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
            except BaseException:
                self._hang_up()
                raise

    def _join(self) -> Terms:
        self._hang_up()  # links of an earlier life
        d, k = self.x0.numel(), len(self.place.servers)
        if k > d:
            raise ValueError(f"{k} servers for a model of {d} parameters: one each at most")
        edges = [round(i * d / k) for i in range(k + 1)]
        welcomes, replies, method = [], [], None
        for i, address in enumerate(self.place.servers):
            part = slice(edges[i], edges[i + 1])
            note, shard = self._greet(address, part, self.shard or (i, k))
            self.shards.append(shard)
            method = self.parse(note["method"])
            if not isinstance(method, ServerMethod):
                raise ValueError(f"the server at {address} serves {note['method'][:100]}, which has no server")
            if self.worker is None or (not self.named and i == 0):
                self.worker = note["worker"]
            self.oracle = isinstance(method, GradientServer)
            shard.push, shard.reply = forms(method, part.stop - part.start, self.x0.dtype)
            if note["model"]:
                form = Form.of(self.x0[part])
                shard.link.send(shard.head._replace(kind=Kind.MODEL), form.pack(self.x0[part]))
            frame = self._hear(shard, {Kind.REPLY: shard.reply.bytes}, "its first reply")
            shard.step = frame.header.step
            shard.head = shard.head._replace(version=frame.header.version)
            welcomes.append(note)
            replies.append(shard.reply.unpack(frame.payload, self.x0.device))
        first = welcomes[0]
        self.beat = first["beat"]
        if self.silent.is_set():
            self.silent.clear()
            WorkerThread(self.silent, self._beats).start()
        assert method is not None
        step = self.shards[0].step
        return Terms(first["worker"], method, first["seed"], first["workers"], step, self._whole(replies))

    def _greet(self, address: str, part: slice, shard: tuple[int, int]) -> tuple[dict[str, Any], _Shard]:
        link = dial(address, self.place.token, "the server", self.place.timeout)
        head = Header(Kind.HELLO, DTYPES.index(self.x0.dtype))
        about = {"worker": self.worker, "parameters": part.stop - part.start, "shard": shard}
        about |= {"named": self.named or shard[0] > 0, "process": self.process}  # the first server's number is for all
        try:
            shared = self.shared if shard[0] == 0 or self.shard else None
            frame = greeted(link, head, self.hello | about | {"machine": machine()}, shared)
            if frame.header.kind == Kind.REFUSED:
                why = frame.note["why"]
                if frame.note["what"] == "kind":
                    raise OtherKind(self.parse(why))
                if frame.note["what"] == "taken":
                    raise NumberTaken(f"the server at {address} refuses this worker: {why}", frame.note["timeout"])
                raise ValueError(f"the server at {address} refuses this worker: {why}")
            note = frame.note
            link.timeout = note["timeout"]
            link.sock.settimeout(link.timeout)
            link = taken(link, note)
        except BaseException:
            link.close()
            raise
        head = head._replace(worker=note["worker"], incarnation=note["incarnation"])
        nothing = Form(torch.empty(0, device="meta"))
        return note, _Shard(link, part, head, nothing, nothing)

    def _hear(self, shard: _Shard, due: dict[Kind, int], what: str, lent: Collection[Kind] = ()) -> Frame:
        """A frame that is due, or the refusal in its place as an exception."""
        frame = shard.link.recv({**due, Kind.REFUSED: 0}, what, lent=lent)
        if frame.header.kind == Kind.REFUSED:
            why = frame.note["why"]
            if frame.note["what"] == "diverged":
                raise Spoilt(why, shard.step)
            if frame.note["what"] == "refused":
                raise ValueError(f"the server refuses this worker: {why}")
            raise LinkLost(f"the server refused the last message: {why}")
        return frame

    def push(self, msg: Message, gradients: int, note: dict[str, Any]) -> None:
        self.pushed = gradients
        parts = leaves(msg)
        with self._mending():
            for shard in self.shards:
                mine = rebuild(msg, [t[shard.part] if t.dim() else t for t in parts])
                head = shard.head._replace(kind=Kind.PUSH, step=shard.step, gradients=gradients)
                shard.link.send(head, shard.push.pack(mine, shard.link.room(shard.push.bytes)), note)

    def reply(self) -> tuple[Message, list[Lease]]:
        replies, leases = [], []
        with self._mending():
            for shard in self.shards:
                frame = self._hear(
                    shard, {Kind.REPLY: shard.reply.bytes}, "its reply", lent={Kind.REPLY} if self.oracle else ()
                )
                shard.step += self.pushed
                shard.head = shard.head._replace(version=frame.header.version)
                replies.append(shard.reply.unpack(frame.payload, self.x0.device))
                leases.append(frame.note["leases"])
            return self._whole(replies), leases_in(leases[0])

    def more(self, note: dict[str, Any]) -> dict[str, Any]:
        shard = self.shards[0]
        with self._mending():
            shard.link.send(shard.head._replace(kind=Kind.HELLO), None, note)
            answer: dict[str, Any] = self._hear(shard, {Kind.WELCOME: 0}, "more minibatches").note
            return answer

    def master(self) -> Tensor:
        parts = []
        with self._mending():
            for shard in self.shards:
                form = Form(torch.empty(shard.part.stop - shard.part.start, dtype=self.x0.dtype, device="meta"))
                shard.link.send(shard.head._replace(kind=Kind.MASTER))
                frame = self._hear(shard, {Kind.MASTER: form.bytes}, "the model")
                parts.append(form.unpack(frame.payload, self.x0.device))
        return torch.cat(parts)

    def start(self, x: Tensor) -> Message | None:
        shard, *others = self.shards
        if others:  # which may not have begun, or have, each by itself
            return None
        with self._mending():
            form = Form.of(x)
            shard.link.send(shard.head._replace(kind=Kind.MODEL), form.pack(x))
            frame = self._hear(shard, {Kind.REPLY: shard.reply.bytes}, "the first reply")
            shard.head = shard.head._replace(version=frame.header.version)
            return shard.reply.unpack(frame.payload, self.x0.device)

    def room(self) -> Tensor | None:
        shard, *others = self.shards
        like, room = shard.push.like, shard.link.room(shard.push.bytes)
        if others or room is None or not isinstance(like, Tensor):
            return None
        fits = (like.shape, like.dtype) == (self.x0.shape, self.x0.dtype) and self.x0.is_cpu
        return shard.push.unpack(room) if fits else None

    def leave(self, note: dict[str, Any]) -> None:
        for k, shard in enumerate(self.shards):
            with contextlib.suppress(LinkLost):
                if self.shared is not None and not k:
                    self.shared.leave(shard.link, shard.head)
                shard.link.send(shard.head._replace(kind=Kind.LEAVE), None, note)
        self._hang_up()
        self.silent.set()

    @contextlib.contextmanager
    def _mending(self) -> Any:
        """Frames that make no sense are as good as a broken link: a new one mends both."""
        try:
            yield
        except Corrupt as corrupt:
            raise LinkLost(str(corrupt)) from None

    def _whole(self, replies: list[Message]) -> Message:
        """One reply of those of all shards."""
        parts = zip(*map(leaves, replies), strict=True)
        whole = [torch.cat(part) if len(part) > 1 and part[0].dim() else part[0] for part in parts]
        return rebuild(replies[0], whole)

    def _hang_up(self) -> None:
        for shard in self.shards:
            shard.link.close()
        self.shards = []

    def _beats(self) -> None:
        while not self.silent.wait(self.beat):
            for shard in list(self.shards):
                with contextlib.suppress(LinkLost, ValueError):
                    shard.link.beat(shard.head)


LIVES = 8
"""How many lives in a row may end before what they bring is taken, until a worker gives up."""
SKIPS = 8
"""How many gradients in a row that are not finite a training loop may skip, until its worker raises `Diverged`."""
SHOWN = 32
"""How many examples of a minibatch are named."""


class Driver(ABC):
    """Drives the loop of a method: `x` is where the next gradient is to be taken, `step` takes it."""

    terms: Terms
    node: Node
    request: Gradient | Begin
    keeps = True
    """Whether it may keep a gradient when `step` has returned; else the caller may use its memory again."""

    def __init__(self, log: logging.Logger) -> None:
        self.log = log
        self.using = threading.RLock()  # held by whoever uses it: a thread may have it leave
        self.left = False
        self.opened: Opening | None = None  # the pass that it draws from
        self.leases: dict[
            Key, deque[Lease]
        ] = {}  # of each pass that is open, those that it was given and has not drawn
        self.back: list[Lease] = []  # that it was given and will not use, since that was last said
        self.unstepped: list[Lease] = []  # of minibatches that it has begun since its last step
        self.began: list[Lease] = []  # of those that came to a step, since that was last said
        self.failed: list[Lease] = []  # of others, whose gradients were not finite
        self.brought: list[Lease] = []  # of the last step
        self.examples: dict[Lease, list[Any]] = {}  # of minibatches that it has begun lately
        self.order, self.wait = "", False  # see `Grant`, as the last answer said
        self.rate: float | None = None  # that its script has set, other than the method's own
        self.skips = 0  # how many gradients in a row that are not finite it skips
        self.spoilt = 0  # how many there were
        self.life = 0  # how often it has joined
        self.vain = 0  # how many lives in a row have ended before what they brought was taken
        self._since, self._waited = time.perf_counter(), 0.0
        self.meter = Meter()

    @property
    def x(self) -> Tensor:
        """Where the next gradient is to be taken. [d]"""
        return self.request.x

    def room(self) -> Tensor | None:
        """Where the next gradient may be made so that nobody has to copy it, ``Tensor[d]``; None where there is no such memory.
        It is the same for all gradients of a life, and is not read when `step` has returned."""
        return None

    @property
    def free_to_wait(self) -> bool:
        """Whether no other worker ever waits for this one."""
        return True

    @property
    def free(self) -> bool:
        """Whether all gradients are delivered, so that nothing is lost by leaving now."""
        return self.request.free

    def draw(self, opening: Opening = TASK, fed: bool = True, own: bool = False) -> Lease | None:
        """A minibatch that no other worker has, of a pass, or of another one unless it must be its ``own``: see `Leases.take`.
        None where there is none, or it has left; `wait` says whether to ask again. ``ValueError`` where other workers' pass is another one.
        """
        with self.using:
            self.opened, queue = opening, self.leases.setdefault(opening.key, deque())
            self.order, self.wait = opening.order, False
            if not queue and not self.left:
                answer = self.more({"open": opening, "want": 1, "fed": fed, "own": own})
                if "refused" in answer:
                    raise ValueError(answer["refused"])
                queue.extend(leases_in(answer["leases"]))
                self.order, self.wait = answer.get("order") or opening.order, bool(answer.get("wait"))
            return queue.popleft() if queue and not self.left else None

    def close(self, opening: Opening, whole: bool = True) -> None:
        """Draw no more from a pass. What is left of it goes back with the next message: this one sends none, as it may be called
        at any time, by the garbage collector too. Unless it was gone through as a ``whole``, so does what has come to no step.
        """
        self.back.extend(self.leases.pop(opening.key, ()))
        if not whole:
            self.back.extend(lease for lease in self.unstepped if lease.key == opening.key)
            self.unstepped = [lease for lease in self.unstepped if lease.key != opening.key]
        self.opened = None if self.opened == opening else self.opened

    def use(self, lease: Lease, examples: list[Any] | None = None) -> None:
        """A minibatch, of these examples, is being used."""
        self.unstepped.append(lease)
        if examples is not None:
            self.examples[lease] = examples
            if len(self.examples) > 2 * SHOWN:
                del self.examples[next(iter(self.examples))]

    def _given(self, leases: list[Lease]) -> None:
        """Minibatches have come with a reply."""
        for lease in leases:
            self.leases.get(lease.key, self.back).append(lease)

    def _forget(self) -> None:
        """A new life has none of the minibatches that the one before was given."""
        for queue in self.leases.values():
            queue.clear()
        self.back, self.unstepped, self.began, self.failed = [], [], [], []

    def _back(self) -> list[Lease]:
        back, self.back = self.back, []
        return back

    def _skip(self, why: str, step: int) -> None:
        """A gradient that is not finite is skipped, and said, unless there were too many in a row: then it is `Diverged`."""
        self.spoilt += 1
        named = [(lease, self.examples[lease]) for lease in self.brought if lease in self.examples]
        for lease, examples in named[:8]:
            more = ", ..." if len(examples) > SHOWN else ""
            why += f"; {lease} has the examples {', '.join(map(str, examples[:SHOWN]))}{more}"
        if self.spoilt > self.skips:
            several = f"; {self.spoilt} gradients in a row were not finite" if self.skips else ""
            raise Diverged(why + several, Trace(), self.terms.worker, step)
        self.log.warning(f"{why}; this gradient is skipped")

    def _finite(self, g: Tensor) -> Tensor:
        """``g`` [d] where it is finite, else 0, as where `GradScaler` skips a step: nobody waits for what does not come."""
        well = finite(g)
        self._settle(self.brought, well)
        if well:
            self.spoilt = 0
            return g
        why = f"worker {self.terms.worker}, step {self.node.step}: its gradient is not finite; {remedy(self.brought)}"
        self._skip(why, self.node.step)
        return torch.zeros_like(g)

    def _settle(self, leases: list[Lease], well: bool) -> None:
        """The gradient of minibatches was finite, or not."""
        (self.began if well else self.failed).extend(leases)

    def _dies(self, lost: LinkLost, what: str) -> None:
        """Say that a life ends, and ``what`` comes of that; raises where lives end in vain, so that others would as well."""
        if isinstance(lost, Spoilt):
            self._skip(str(lost), lost.step)
            return
        self.vain += 1
        if self.vain > LIVES:
            why = f"{LIVES} lives in a row have ended before anything that they brought was taken: see the other end's log"
            raise LinkLost(f"{lost}; {why}") from None
        self.log.warning(f"{lost}; {what}")
        if self.vain > 1:
            time.sleep(min(0.05 * 2**self.vain, 1.0))

    @abstractmethod
    def step(self, g: Tensor, loss: float) -> None:
        """Take the gradient ``g`` [d] that was computed at `x`, and exchange if it is time to."""

    def moved(self, x: Tensor, before: Tensor | None) -> bool:
        """The script has set the model, which held ``before`` [d], to ``x`` [d]: go on from there; False where the method cannot.

        Where others have moved this worker meanwhile, as visits do, it goes as far as the script has. ``before`` is None where
        the model held something else than this worker's parameters: it goes to ``x`` then.
        """
        method, w = self.node.method, self.node.state
        now = method.params(w)
        if before is not None and now is not before and not torch.equal(now, before):
            x = now + (x - before)
        state = method.moved(w, x, self.request.free)
        if state is None:
            return False
        self.node.state = state
        self.request = self.request._replace(x=method.params(state))
        return True

    def begin_at(self, x: Tensor) -> bool:
        """The script has set the model to ``x`` [d] before its first step: the run begins there, or where it has begun this worker
        goes on from the run's model. False where weights are each worker's own, or cannot be set."""
        return False

    @abstractmethod
    def more(self, note: dict[str, Any]) -> dict[str, Any]:
        """A word about minibatches, and the answer: see `Leases.hear`."""

    @abstractmethod
    def master(self) -> Tensor:
        """The model that would be shipped now, as far as this worker can know. [d]"""

    def leave(self, done: bool) -> None:
        """Go in good order, once; ``done`` says that the worker has nothing more to do."""
        with self.using:
            if not self.left:
                self.left = True
                self._leave(done)

    @abstractmethod
    def _leave(self, done: bool) -> None:
        """Go in good order."""


class Worker(Driver):
    """A worker of a method with a server."""

    def __init__(
        self,
        exchange: Exchange,
        log: logging.Logger,
        lend: Callable[[Method], Method] = lambda method: method,
    ) -> None:
        """``lend`` puts this worker's own optimizer into the run's method."""
        super().__init__(log)
        self.exchange, self.lend = exchange, lend
        self._losses: list[float] = []
        self._computes: list[float] = []
        self._rates: list[float | None] = []
        self._owed = 0  # gradients that were pushed, and to which no reply was taken yet
        self._begin(exchange.join())
        self._since = time.perf_counter()

    def _begin(self, terms: Terms) -> None:
        """A life begins with the first reply."""
        self.life += 1
        self.terms = terms
        method = self.lend(terms.method)
        assert isinstance(method, ServerMethod)
        self.method = method
        self.keeps = not isinstance(method, GradientServer) or isinstance(self.exchange, Alone)
        self._set_out(terms.reply)
        self._forget()
        self._losses, self._computes, self._rates, self._owed = [], [], [], 0

    @property
    def free_to_wait(self) -> bool:
        return not self.method.gated

    def _set_out(self, reply: Message) -> None:
        """Go to the first gradient after ``reply``."""
        terms = self.terms
        self.node = Node(terms.worker, self.method, self.method.init(reply), terms.step, seed=terms.seed)
        self.loop: Loop = loop(self.method, self.node)
        self.request = self._gradient(next(self.loop))

    def moved(self, x: Tensor, before: Tensor | None) -> bool:
        if self.node.step:
            return super().moved(x, before)
        if not isinstance(self.exchange, Alone):
            return False  # weights to start with are the run's, and others have got the server's already
        self._set_out(self.exchange.start(x))
        return True

    def begin_at(self, x: Tensor) -> bool:
        reply = self._again(lambda: self.exchange.start(x))
        if reply is not None:
            self._set_out(reply)
        return reply is not None

    @staticmethod
    def _gradient(request: Any) -> Gradient:
        assert isinstance(request, Gradient)
        return request

    def more(self, note: dict[str, Any]) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            self._catch_up()
            come = note.get("want") and self.opened is not None and self.leases.get(self.opened.key)
            return {"leases": []} if come else self.exchange.more({**note, "back": self._back()})

        answer: dict[str, Any] = self._again(ask)
        return answer

    def room(self) -> Tensor | None:
        return None if self.keeps else self.exchange.room()

    def _catch_up(self) -> None:
        """Take the reply to what was pushed, if the worker has gone on without."""
        if self._owed:
            reply = self._reply()
            self.node.state = self.method.arrived(self.node.state, reply)

    def _reply(self) -> Message:
        """The reply to what was pushed."""
        reply, leases = self.exchange.reply()
        self._owed = self.vain = 0
        if isinstance(self.method, GradientServer):
            self.spoilt = 0
        self._given(leases)
        return reply

    def step(self, g: Tensor, loss: float) -> None:
        now = time.perf_counter()
        self.meter.stop()
        self.brought, self.unstepped = self.unstepped, []
        if isinstance(self.method, GradientServer):  # whose messages are gradients, which the server looks at
            self._settle(self.brought, True)
        else:
            g = self._finite(g)
        self._losses.append(loss)
        self._computes.append(now - self._since)
        self._rates.append(self.rate)
        request = self.loop.send(g)
        if isinstance(request, Ask):
            try:
                self._catch_up()
                self._push(request.msg)
                reply = None if self.method.late else self._reply()
            except LinkLost as lost:
                self._mend(lost)
            else:
                self.request = self._gradient(self.loop.send(reply))
        else:
            self.request = self._gradient(request)
        self.meter.go()
        self._since = time.perf_counter()
        self._waited = self._since - now

    def _push(self, msg: Message) -> None:
        """Bring a message, with what there is to tell of its gradients."""
        want, used = 0, self.began
        if self.opened is not None:  # a late reply comes after the next gradient, which needs a minibatch, too
            want = max(1, len(used)) + (self.method.late and not self.leases.get(self.opened.key))
        note = {
            "losses": self._losses,
            "compute": self._computes,
            "waited": [self._waited, *(0.0 for _ in self._losses[1:])],
            "used": used,
            "failed": self.failed,
            "back": self._back(),
            "want": want,
            "own": True,
        }
        if self.rate is not None:
            note["lr"] = self._rates
        if load := self.meter.read(self.node.step):
            note["load"] = load
        self.began, self.failed = [], []
        count = len(self._losses)
        self.exchange.push(msg, count, note)
        self._losses, self._computes, self._rates, self._owed = [], [], [], count

    def master(self) -> Tensor:
        def ask() -> Tensor:
            self._catch_up()
            self.request = self.request._replace(x=self.request.x.clone())  # which may be where the answer comes
            return self.exchange.master()

        x: Tensor = self._again(ask)
        return x

    def _leave(self, done: bool) -> None:
        try:
            self._catch_up()
        except LinkLost as lost:
            self.log.warning(f"{lost}, while this worker was leaving")
        used = self.began + self.unstepped if done else []  # else somebody will use what this one has begun
        self.exchange.leave({"done": done, "used": used, "failed": self.failed})

    def _again(self, what: Callable[[], Any]) -> Any:
        while True:
            try:
                return what()
            except LinkLost as lost:
                self._mend(lost)

    def _mend(self, lost: LinkLost) -> None:
        """The link is dead: join again, as a new life that starts from the server's model."""
        count = len(self._losses) + self._owed
        try:
            self._dies(lost, f"dialling again ({count} gradients of this worker are lost)")
        except LinkLost:
            self.exchange.leave({"done": False, "used": []})
            raise
        self._begin(self.exchange.join())


def train(
    worker: Driver,
    problem: Problem,
    speed: Speed | None = None,
    faults: Sequence[Fault] = (),
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Take gradients of ``problem`` until all minibatches are handed out, or ``stopped`` says so; then leave.

    With ``speed`` a gradient takes at least as long as on that simulated machine, and ``faults`` slow it further: the
    rest of the time is slept.
    """
    name, began = worker.terms.worker, time.monotonic()
    times = speed.stream(worker.terms.seed, name) if speed else None
    while not (stopped() and worker.free) and (lease := worker.draw()) is not None:
        worker.use(lease)
        start = time.monotonic()
        g, loss = problem.grad(worker.x, name, worker.node.step)
        took = max(time.monotonic() - start, next(times) if times else 0.0)
        for fault in faults:
            took *= fault.slowdown(name, start - began)
        time.sleep(max(0.0, took - (time.monotonic() - start)))
        with worker.using:
            if worker.left:  # a thread has had it leave meanwhile
                return
            worker.step(g, float(loss))
    worker.leave(done=not stopped())
