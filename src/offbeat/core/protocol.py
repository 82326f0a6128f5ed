"""When handlers run: one loop for each kind of method, written once, as a generator that yields requests.

An engine (a simulator, a replay, a real cluster) answers requests and knows no method. A node is a monitor: no two
handlers of one node run at once, and a node's state is read only after the answer that it depends on has come.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .gossip import GossipMethod, PairGossipMethod, PushGossipMethod, RoundGossipMethod
from .method import Local, Message, Method, ServerMethod
from .periodic import OuterMethod, PeriodicMethod
from .rates import Dial, dial_of, with_rate
from .seeds import derive
from .topology import Members

SERVER = -1
"""The server's name among the nodes; workers are 0, 1, 2, ..."""


class Gradient(NamedTuple):
    """Take a minibatch gradient at ``x``. Answer: the gradient [d]. A run ends only here."""

    x: Tensor
    free: bool = True
    """Whether the worker has delivered all that it has worked for, so that it may leave here and nothing is lost."""


class Begin(NamedTuple):
    """Begin a minibatch gradient at ``x`` and go on: the next `Gradient`, at the same ``x``, waits for it. Answer: None.

    What is asked in between takes place while the gradient is computed. A run ends here too, and a worker leaves here.
    """

    x: Tensor
    free: bool = True
    """As for `Gradient`."""


class Ask(NamedTuple):
    """Send ``msg`` to node ``to``, which reacts atomically. Answer: its reply; None if ``to`` is dead."""

    to: int
    msg: Message


class Send(NamedTuple):
    """Send ``msg`` to node ``to`` and go on. Answer: False if ``to`` is known to be dead, else True."""

    to: int
    msg: Message
    round: int | None = None
    """The round that it belongs to, for methods that go in rounds."""


class Recv(NamedTuple):
    """Wait for a message of ``round`` (None: the next one) from each of ``sources``. Answer: ``{source: message}``.

    Missing are those who will not send one any more: the dead, and whoever came back in a later round.
    """

    sources: tuple[int, ...]
    round: int | None = None


class Inbox(NamedTuple):
    """Take whatever has arrived, never waiting. Answer: a list of ``(source, message)`` in order of arrival."""


class AllReduce(NamedTuple):
    """Wait for all living nodes of ``members`` to ask the same in the same round. Answer: the mean of their messages."""

    msg: Message
    members: Members
    round: int | None = None


Request = Gradient | Begin | Ask | Send | Recv | Inbox | AllReduce
Loop = Generator[Request, Any, None]


@dataclass
class Node:
    """One worker as its loop and the engine share it."""

    id: int
    method: Method
    state: Any = None
    step: int = 0
    """Steps of the worker that are complete, their messages included: the number of the round it is in."""
    since: int = 0
    """The round in which it came."""
    seed: int = 0
    """What random peers are drawn from, the same for all nodes of a run."""
    view: Callable[[int], Members] = lambda step: (0,)
    """The members that take part in round ``step``, in rising order; the engine answers, the same to all who ask."""
    due: tuple[int, Mapping[int, float]] | None = None
    """A round whose messages are still under way to this node, and their weights."""


@singledispatch
def loop(method: Method, node: Node) -> Loop:
    """The endless life of one worker of this kind of method; ``node.state`` is set before it starts."""
    raise TypeError(f"{type(method).__name__} is of no kind that has a loop: derive it from ServerMethod or Local")


@loop.register
def _local(method: Local, node: Node) -> Loop:
    while True:
        yield from _step(method, node)
        node.step += 1


@loop.register
def _server(method: ServerMethod, node: Node) -> Loop:
    while True:
        for k in range(method.length(node.state)):
            g = yield Gradient(method.params(node.state), k == 0)
            node.state = method.local(node.state, g)
            node.step += 1
        reply = yield Ask(SERVER, method.push(node.state))
        node.state = method.pull(node.state, reply)


@loop.register
def _push(method: PushGossipMethod, node: Node) -> Loop:
    while True:
        for _, msg in (yield Inbox()):
            node.state = method.receive(node.state, msg)
        yield from _step(method, node)
        peer = _partner(method, node)
        if peer is not None:
            node.state, msg = method.send(node.state)
            if not (yield Send(peer, msg)):
                node.state = method.returned(node.state, msg)
        node.step += 1


@loop.register
def _pair(method: PairGossipMethod, node: Node) -> Loop:
    while True:
        x = method.params(node.state)
        yield Begin(x)
        peer = _partner(method, node)
        if peer is not None:
            reply = yield Ask(peer, method.offer(node.state))
            if reply is not None:
                node.state = method.settle(node.state, reply)
        g = yield Gradient(x, free=False)
        node.state = method.local(node.state, g)  # at the point that visits, its own and others', have led to
        node.step += 1


@loop.register(RoundGossipMethod)
@loop.register(PeriodicMethod)
def _rounds(method: RoundGossipMethod | PeriodicMethod, node: Node) -> Loop:
    while True:
        yield from _turn(method, node, node)


class Cell(Protocol):
    """Where the state of a method is kept: a node, or a part of the state around it."""

    state: Any


class _Inner:
    """The cell of an inner method: the part ``inner`` of the state around it, always up to date there."""

    def __init__(self, around: Cell) -> None:
        self._around = around

    @property
    def state(self) -> Any:
        return self._around.state.inner

    @state.setter
    def state(self, value: Any) -> None:
        self._around.state = self._around.state._replace(inner=value)


def _step(method: Method, cell: Cell, free: bool = True) -> Loop:
    """One gradient and what the worker does with it."""
    g = yield Gradient(method.params(cell.state), free)
    cell.state = method.local(cell.state, g)


def _turn(method: Method, cell: Cell, node: Node, free: bool = True) -> Loop:
    """One step of a method that goes in rounds, with the messages that belong to it; of an outer method, one block."""
    if isinstance(method, OuterMethod):
        below = _Inner(cell)
        for k in range(method.length(node.step)):
            yield from _turn(method.inner, below, node, free and k == 0)
        if isinstance(method.inner, RoundGossipMethod):
            yield from _collect(method.inner, below, node)
    else:
        yield from _step(method, cell, free)
        if isinstance(method, RoundGossipMethod) and method.talks(node.step, 0.0):
            yield from _gossip(method, cell, node)
        node.step += 1
    if isinstance(method, PeriodicMethod):
        mean = method.contribute(cell.state)
        if mean is not None:
            mean = yield AllReduce(mean, method.group(node.id, node.view(node.step - 1)), node.step)
        cell.state = method.absorb(cell.state, mean)


def _gossip(method: RoundGossipMethod, cell: Cell, node: Node) -> Loop:
    """One round: send to the neighbours, take what they sent in this round, or in the one before where it overlaps."""
    if method.overlaps:
        yield from _collect(method, cell, node)
    round = method.topology.round(node.view(node.step), node.step // method.period, node.seed)
    out = dict(round.out[node.id])
    keep = out.pop(node.id)
    cell.state, messages = method.send(cell.state, out, keep)
    for peer, msg in messages.items():
        if not (yield Send(peer, msg, node.step)):
            cell.state = method.returned(cell.state, msg)
    node.due = node.step, round.into[node.id]
    if not method.overlaps:
        yield from _collect(method, cell, node)


def _collect(method: RoundGossipMethod, cell: Cell, node: Node) -> Loop:
    """Take what is under way to this node, so that nothing is."""
    if node.due is None:
        return
    round, into = node.due[0], dict(node.due[1])
    own, node.due = into.pop(node.id), None
    inbox = yield Recv(tuple(into), round)
    cell.state = method.merge(cell.state, inbox, into, own)


def give_back(node: Node, msg: Message) -> None:
    """A message that ``node`` has sent was not delivered, its receiver being dead: nothing of it is lost that must not be."""
    cell: Cell = node
    method = node.method
    while isinstance(method, OuterMethod):
        cell, method = _Inner(cell), method.inner
    if isinstance(method, GossipMethod):
        cell.state = method.returned(cell.state, msg)


def _partner(method: PushGossipMethod | PairGossipMethod, node: Node) -> int | None:
    """With whom the node talks in this step, if it does."""
    draw = derive(node.seed, node.id, node.step, 1) / (1 << 63)
    if not method.talks(node.step, draw):
        return None
    return method.topology.peer(node.id, node.view(node.step), node.step, node.seed)


@dataclass
class Server:
    """The server of a `ServerMethod`, without any transport: who is seated, the shared state, and a version.

    The version counts visits served; ``seen`` is the version from which each worker's next message will be made, so its lag
    is ``version - seen[worker]``; ``sent`` the one that it last received, kept for a method that is `late` and uses it
    next. ``clock`` counts each worker's visits, for methods that make replies wait. Not thread-safe: an engine calls it
    under its own lock.
    """

    method: ServerMethod
    state: Any
    version: int = 0
    own: dict[int, Any] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    clock: dict[int, int] = field(default_factory=dict)
    waiting: dict[int, tuple[int, Message]] = field(default_factory=dict)
    dial: Dial | None = None
    """The rate of the next visit; None: the method's own, as no script has set any."""
    base: float | Tensor = math.nan
    """The method's own rate, once there is a dial."""
    handle: Callable[[Any, Any, Message], tuple[Any, Any, Message]] | None = None
    """What takes the place of the method's ``serve``: the same as a compiled kernel, or with checks. What it raises
    leaves everything as it was."""

    @classmethod
    def start(cls, method: ServerMethod, x: Tensor) -> Server:
        return cls(method, method.init_server(x))

    def join(self, worker: int) -> Message:
        """Seat ``worker`` and return its first reply."""
        if worker in self.own:
            raise ValueError(f"worker {worker} is already seated: a worker leaves before it joins again")
        self.state, self.own[worker], reply = self.method.admit(self.state)
        self.seen[worker] = self.sent[worker] = self.version
        self.clock[worker] = min(self.clock.values(), default=0) if self.method.gated else 0
        return reply

    def tell(self, lr: float | None) -> None:
        """The next visit is of a worker whose script has set the rate ``lr``, or none (None), so that it is the method's own.
        `method` is another one from the first rate on. ``ValueError`` where the method's own is a schedule."""
        if lr is not None and self.dial is None:
            self.dial = dial_of(self.method)
            if self.dial is None:
                raise ValueError(f"lr = {lr:g}: the rate of {self.method!r} is a schedule of its own")
            self.base, self.method = self.dial.value, with_rate(self.method, self.dial)
        if self.dial is not None:
            self.dial.value = self.base if lr is None else lr

    def leave(self, worker: int) -> dict[int, Message]:
        """Unseat ``worker``; returns the replies that its going lets out, as `visit` does."""
        self.state = self.method.leave(self.state, self.own.pop(worker))
        del self.seen[worker], self.sent[worker], self.clock[worker]
        self.waiting.pop(worker, None)
        self.waiting = {
            other: (-1, reply) for other, (_, reply) in self.waiting.items()
        }  # made before the state changed
        return self.release()

    def serve(self, worker: int, msg: Message) -> Message:
        """Apply what ``worker`` brings: the states move together. Returns its reply, which may have to wait."""
        self.state, self.own[worker], reply = (self.handle or self.method.serve)(self.state, self.own[worker], msg)
        self.version += 1
        if self.method.late:
            self.seen[worker], self.sent[worker] = self.sent[worker], self.version
        else:
            self.seen[worker] = self.version
        self.clock[worker] += 1
        return reply

    def visit(self, worker: int, msg: Message) -> dict[int, Message]:
        """Serve ``worker`` and return the replies that may go out now, by worker: usually its own."""
        reply = self.serve(worker, msg)
        if not self.method.gated:
            return {worker: reply}
        self.waiting[worker] = (self.version, reply)
        return self.release()

    def release(self) -> dict[int, Message]:
        """The replies that have waited and may go out now, by worker, first come first served."""
        if not self.waiting:
            return {}
        free, slowest = {}, min(self.clock.values())
        for worker, (version, reply) in list(self.waiting.items()):
            if self.method.ready(self.state, self.own[worker], self.clock[worker], slowest):
                if version != self.version:
                    self.own[worker], reply = self.method.refresh(self.state, self.own[worker], reply)
                    (self.sent if self.method.late else self.seen)[worker] = self.version
                free[worker] = reply
                del self.waiting[worker]
        return free

    def lag(self, worker: int) -> int:
        """Visits served since ``worker`` last received parameters."""
        return self.version - self.seen[worker]

    def x(self) -> Tensor:
        """The model that would be shipped. [d]"""
        return self.method.master(self.state)
