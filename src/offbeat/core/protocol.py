"""When handlers run: one loop for each kind of method, written once, as a generator that yields requests.

An engine (a simulator, a replay, a real cluster) answers requests and knows no method. A node is a monitor: no two
handlers of one node run at once, and a node's state is read only after the answer that it depends on has come.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .gossip import GossipMethod, PairGossipMethod, PushGossipMethod, RoundGossipMethod
from .method import Local, Message, Method, ServerMethod
from .periodic import OuterMethod, PeriodicMethod
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
