"""The kinds of method: what a method is, told by its base class.

A method is a frozen dataclass of hyper-parameters with a few pure handlers: state in, state out, nothing they were given
changed. It knows no clock, process, file, device or random number. A state is a NamedTuple of tensors (and of more such
tuples); a message is a tensor or a tuple of tensors. `protocol` holds the one loop that runs each kind.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from .descent import SGD, Rule

Message = Any
"""A tensor, or a tuple of tensors; its size is the sum of ``numel * element_size``."""


@dataclass(frozen=True)
class Method(ABC):
    """What a worker does between messages. Every method of every kind has these three handlers."""

    name: ClassVar[str]
    """The name on the command line: ``DanaZero`` is ``dana-zero``; ``class NAGASGD(Master, name="nag-asgd")`` says its own."""

    def __init_subclass__(cls, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = name or re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", cls.__name__).lower()

    def horizon(self, gradients: int, workers: int) -> int:
        """How many steps of its schedules a run of ``gradients`` (all workers together) on ``workers`` workers has."""
        return max(1, gradients // workers)

    @abstractmethod
    def init(self, start: Any) -> Any:
        """The worker's state for a start at ``start``: parameters [d] (for a server method: the first reply)."""

    @abstractmethod
    def params(self, w: Any) -> Tensor:
        """The point at which the worker takes its next gradient. [d]"""

    @abstractmethod
    def local(self, w: Any, g: Tensor) -> Any:
        """The worker's state after the gradient ``g`` [d], taken at ``params(w)``."""


class Descending(NamedTuple):
    x: Tensor  # parameters [d]
    rule: Any  # the rule's own state


@dataclass(frozen=True)
class Local(Method):
    """A descent rule on its own, no messages: what one machine does. The baseline, and what others build on."""

    rule: Rule = SGD(0.05, momentum=0.9, nesterov=True)
    """How one gradient moves the parameters."""

    def init(self, start: Tensor) -> Descending:
        return Descending(start, self.rule.init(start))

    def params(self, w: Descending) -> Tensor:
        return w.x

    def local(self, w: Descending, g: Tensor) -> Descending:
        rule, x = self.rule.step(w.rule, w.x, g)
        return Descending(x, rule)


@dataclass(frozen=True)
class ServerMethod(Method):
    """Workers that talk to one server (the parameter server), each at its own pace.

    A worker takes ``period`` gradients, pushes a message, and pulls the reply. The server's visit is atomic. It keeps a
    state ``s`` for all and a state ``own`` for each worker; a handler sees the shared one and the visitor's. Schedules
    count gradients of the whole run, whoever holds the rate, so that slow workers and late joiners are in step.
    """

    period: ClassVar[int] = 1
    """Gradients between two exchanges; a method where it can be more makes it a field."""

    def horizon(self, gradients: int, workers: int) -> int:
        return gradients

    @abstractmethod
    def push(self, w: Any) -> Message:
        """What the worker sends when its ``period`` gradients are done."""

    @abstractmethod
    def pull(self, w: Any, reply: Message) -> Any:
        """The worker's state once the reply is there."""

    @abstractmethod
    def init_server(self, x: Tensor) -> Any:
        """The shared state for a run that starts at ``x`` [d], with no worker yet."""

    @abstractmethod
    def admit(self, s: Any) -> tuple[Any, Any, Message]:
        """A worker comes, at the start or later: the shared state, the state kept for it, and its first reply."""

    @abstractmethod
    def leave(self, s: Any, own: Any) -> Any:
        """A worker has gone, for good or to come back as a new one: the shared state without what ``own`` put in."""

    @abstractmethod
    def serve(self, s: Any, own: Any, msg: Message) -> tuple[Any, Any, Message]:
        """One visit: both states after it, and the reply."""

    @abstractmethod
    def master(self, s: Any) -> Tensor:
        """The model that would be shipped: the server's own point, no look-ahead. [d]"""

    def measure(self, s: Any, own: Any, msg: Message) -> dict[str, Tensor]:
        """Figures of this method about the visit that is about to happen, for the trace; 0-dim tensors."""
        return {}


class Oracle(NamedTuple):
    x: Tensor  # parameters last received [d]
    g: Tensor  # gradient taken there [d]


@dataclass(frozen=True)
class GradientServer(ServerMethod):
    """A server method whose workers only compute gradients: just the server's handlers are left to write."""

    def init(self, start: Tensor) -> Oracle:
        return Oracle(start, start)

    def params(self, w: Oracle) -> Tensor:
        return w.x

    def local(self, w: Oracle, g: Tensor) -> Oracle:
        return Oracle(w.x, g)

    def push(self, w: Oracle) -> Tensor:
        return w.g

    def pull(self, w: Oracle, reply: Tensor) -> Oracle:
        return Oracle(reply, w.g)
