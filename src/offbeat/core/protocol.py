"""When handlers run: one loop for each kind of method, written once, as a generator that yields requests.

An engine (a simulator, a replay, a real cluster) answers requests and knows no method. A node is a monitor: no two
handlers of one node run at once, and a node's state is read only after the answer that it depends on has come.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from functools import singledispatch
from typing import Any, NamedTuple

from torch import Tensor

from .method import Local, Message, Method, ServerMethod

SERVER = -1
"""The server's name among the nodes; workers are 0, 1, 2, ..."""


class Gradient(NamedTuple):
    """Take a minibatch gradient at ``x``. Answer: the gradient [d]. A run ends only here."""

    x: Tensor


class Ask(NamedTuple):
    """Send ``msg`` to node ``to``, which reacts atomically. Answer: its reply."""

    to: int
    msg: Message


class Send(NamedTuple):
    """Send ``msg`` to node ``to`` and go on. Answer: None."""

    to: int
    msg: Message


class Recv(NamedTuple):
    """Wait for one message from each of ``sources``. Answer: ``{source: message}``."""

    sources: tuple[int, ...]


class Inbox(NamedTuple):
    """Take whatever has arrived, never waiting. Answer: a list of ``(source, message)`` in order of arrival."""


class AllReduce(NamedTuple):
    """Wait for every living node's ``x``. Answer: their mean [d]."""

    x: Tensor


Request = Gradient | Ask | Send | Recv | Inbox | AllReduce
Loop = Generator[Request, Any, None]


@dataclass
class Node:
    """One worker as its loop and the engine share it."""

    id: int
    method: Method
    state: Any = None


@singledispatch
def loop(method: Method, node: Node) -> Loop:
    """The endless life of one worker of this kind of method; ``node.state`` is set before it starts."""
    raise TypeError(f"{type(method).__name__} is of no kind that has a loop: derive it from ServerMethod or Local")


@loop.register
def _local(method: Local, node: Node) -> Loop:
    while True:
        g = yield Gradient(method.params(node.state))
        node.state = method.local(node.state, g)


@loop.register
def _server(method: ServerMethod, node: Node) -> Loop:
    while True:
        for _ in range(method.period):
            g = yield Gradient(method.params(node.state))
            node.state = method.local(node.state, g)
        reply = yield Ask(SERVER, method.push(node.state))
        node.state = method.pull(node.state, reply)


@dataclass
class Server:
    """The server of a `ServerMethod`, without any transport: who is seated, the shared state, and a version.

    The version counts visits served; ``seen`` is the version that each worker last received, so the lag of a message is
    ``version - seen[worker]``. Not thread-safe: an engine calls it under its own lock.
    """

    method: ServerMethod
    state: Any
    version: int = 0
    own: dict[int, Any] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)

    @classmethod
    def start(cls, method: ServerMethod, x: Tensor) -> Server:
        return cls(method, method.init_server(x))

    def join(self, worker: int) -> Message:
        """Seat ``worker`` and return its first reply."""
        if worker in self.own:
            raise ValueError(f"worker {worker} is already seated: a worker leaves before it joins again")
        self.state, self.own[worker], reply = self.method.admit(self.state)
        self.seen[worker] = self.version
        return reply

    def leave(self, worker: int) -> None:
        self.state = self.method.leave(self.state, self.own.pop(worker))
        del self.seen[worker]

    def serve(self, worker: int, msg: Message) -> Message:
        """One visit of ``worker``: the states move together, and the reply is returned."""
        self.state, self.own[worker], reply = self.method.serve(self.state, self.own[worker], msg)
        self.version += 1
        self.seen[worker] = self.version
        return reply

    def lag(self, worker: int) -> int:
        """Visits served since ``worker`` last received parameters."""
        return self.version - self.seen[worker]

    def x(self) -> Tensor:
        """The model that would be shipped. [d]"""
        return self.method.master(self.state)
