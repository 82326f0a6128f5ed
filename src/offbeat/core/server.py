"""The parameter server: one state that workers visit, without any transport, thread or clock.

It is the same object in a simulation, in a real server, inside a lone script and in a replay. An engine calls it under its own
lock.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from .method import Message, ServerMethod
from .rates import Dial, dial_of, with_rate
from .tree import finite, tame

Handler = Callable[[Any, Any, Message], tuple[Any, Any, Message]]
"""From the shared state, the state kept for the visitor and its message to both states after the visit, and the reply."""

BLOCK = 1 << 17
"""Elements of the blocks in which a gap is summed up."""


class NotFinite(ArithmeticError):
    """A message is not finite, or would make the model so: the text says which. Nothing has changed."""


def transaction(method: ServerMethod) -> Handler:
    """The method's ``serve`` as a transaction: what is not finite never takes the place of what is. Raises `NotFinite`."""

    def serve(s: Any, own: Any, msg: Message) -> tuple[Any, Any, Message]:
        new = method.serve(s, own, msg)
        return checked(msg, new, tame(msg) and finite(new[2]))

    return serve


def checked(msg: Message, new: tuple[Any, Any, Message], sound: bool) -> tuple[Any, Any, Message]:
    """The ``new`` states and the reply that ``msg`` has led to; `NotFinite` unless all are finite, which is looked at where they are
    not known to be ``sound``."""
    if not sound and not finite((msg, new)):
        raise NotFinite("the model would not be finite any more" if finite(msg) else "the message is not finite")
    return new


@dataclass
class ParameterServer:
    """The server of a `ServerMethod`: its state, its visits, how late and how far off they are, and the rate that scripts set.

    A visit is a transaction: it takes place as a whole or not at all. Not thread-safe.
    """

    method: ServerMethod
    state: Any
    version: int = 0
    """Visits served."""
    handler: Callable[[ServerMethod], Handler] = transaction
    """From a method to what serves its messages: called at the start, and once more when a script sets the first rate. What a
    handler raises leaves everything as it was."""
    own: dict[int, Any] = field(default_factory=dict)
    """The state kept for each worker that is seated."""
    seen: dict[int, int] = field(default_factory=dict)
    """The version from which each worker's next message will be made."""
    sent: dict[int, int] = field(default_factory=dict)
    """The version that each worker last received: for a method that is `late`, which uses it next."""
    clock: dict[int, int] = field(default_factory=dict)
    """Visits of each worker, for methods that make replies wait."""
    waiting: dict[int, tuple[int, Message]] = field(default_factory=dict)
    """Replies that wait, and the versions that they were made at."""
    dial: Dial | None = None
    """The rate of the next visit; None: the method's own, as no script has set any."""
    base: float | Tensor = math.nan
    """The method's own rate, once there is a dial."""

    def __post_init__(self) -> None:
        self.handle = self.handler(self.method)

    @classmethod
    def start(cls, method: ServerMethod, x: Tensor, handler: Callable[[ServerMethod], Handler] = transaction) -> Self:
        """A server whose model begins at ``x`` [d]."""
        return cls(method, method.init_server(x), handler=handler)

    def join(self, worker: int) -> Message:
        """Seat ``worker`` and return its first reply."""
        if worker in self.own:
            raise ValueError(f"worker {worker} is already seated: a worker leaves before it joins again")
        self.state, self.own[worker], reply = self.method.admit(self.state)
        self.seen[worker] = self.sent[worker] = self.version
        self.clock[worker] = min(self.clock.values(), default=0) if self.method.gated else 0
        return reply

    def leave(self, worker: int) -> dict[int, Message]:
        """Unseat ``worker``; returns the replies that its going lets out, as `visit` does."""
        self.state = self.method.leave(self.state, self.own.pop(worker))
        del self.seen[worker], self.sent[worker], self.clock[worker]
        self.waiting.pop(worker, None)
        self.waiting = {
            other: (-1, reply) for other, (_, reply) in self.waiting.items()
        }  # made before the state changed
        return self.release()

    def tell(self, lr: Any) -> None:
        """The next visit is of a worker whose script has set the rate ``lr``: a number, or one for each of its gradients, by the last
        of which the server steps. None: it has set none, so that the rate is the method's own.

        `method` is another one from the first rate on. ``ValueError`` where it is no number, or the method's own is a schedule.
        """
        lr = lr[-1] if isinstance(lr, list) and lr else lr
        if lr is not None and (isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 <= lr < math.inf):
            raise ValueError(f"the rate {str(lr)[:40]}: must be a number, at least 0")
        if lr is not None and self.dial is None:
            dial = dial_of(self.method)
            if dial is None:
                raise ValueError(f"the rate {lr:g}: the rate of {self.method!r} is a schedule of its own")
            method = with_rate(self.method, dial)
            self.handle = self.handler(method)
            self.dial, self.base, self.method = dial, dial.value, method
        if self.dial is not None:
            self.dial.value = self.base if lr is None else lr

    def serve(self, worker: int, msg: Message) -> Message:
        """Apply what ``worker`` brings: the states move together, or stay as they were where the handler raises, as for what is not
        finite (`NotFinite`). Returns its reply, which may have to wait."""
        self.state, self.own[worker], reply = self.handle(self.state, self.own[worker], msg)
        self.version += 1
        if self.method.late:
            self.seen[worker], self.sent[worker] = self.sent[worker], self.version
        else:
            self.seen[worker] = self.version
        self.clock[worker] += 1
        return reply

    def visit(self, worker: int, msg: Message) -> dict[int, Message]:
        """Serve ``worker`` and return the replies that may go out now, by worker: usually its own. Raises what `serve` raises."""
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

    def gap(self, point: Tensor) -> float:
        """The RMSE between the model and ``point`` [d], at which a gradient was taken."""
        x = self.x()
        blocks = zip(torch.split(x, BLOCK), torch.split(point, BLOCK), strict=True)
        squares = math.fsum(float((a - b).double().square().sum()) for a, b in blocks)
        return math.sqrt(squares / x.numel())

    def figures(self, worker: int, msg: Message) -> dict[str, float]:
        """The method's own figures about the visit that is about to happen."""
        measured = self.method.measure(self.state, self.own[worker], msg)
        return {name: float(value) for name, value in measured.items()}

    def x(self) -> Tensor:
        """The model that would be shipped. [d]"""
        return self.method.master(self.state)
