"""The kinds of method: what a method is, told by its base class.

A method is a frozen dataclass of hyper-parameters with a few pure handlers: state in, state out, nothing they were given
changed. It knows no clock, process, file, device or random number. A state is a NamedTuple of tensors (and of more such
tuples); a message is a tensor or a tuple of tensors. `protocol` holds the one loop that runs each kind.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor

from .descent import SGD, Rule
from .values import require_kind

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

    def check(self, n: int) -> None:
        """Refuse, with a ``ValueError``, a number of workers that the method cannot have."""

    def moved(self, w: Any, x: Tensor, begins: bool) -> Any | None:
        """The state of a worker whose script has set its parameters to ``x`` [d]: a state was loaded, weights were clipped.

        ``begins`` says that the next gradient begins a block, so that all workers may have set the same. None: the state
        cannot follow, as the model is not the worker's own.
        """
        return None

    def welcome(self, w: Any) -> tuple[Any, Any]:
        """A worker joins others that have no server, at one with state ``w``: that state afterwards, and the newcomer's."""
        return w, w

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
class Averageable(Method):
    """A worker whose model can be averaged with others' exactly and put back: what a slow outer step needs of it."""

    @abstractmethod
    def pace(self, w: Any) -> tuple[Tensor, Tensor]:
        """How many steps the worker has taken, and the sum of their learning rates; 0-dim."""

    @abstractmethod
    def buffers(self, w: Any) -> tuple[Tensor, ...]:
        """The rule's vectors, such as momentum, [d] each."""

    @abstractmethod
    def with_buffers(self, w: Any, buffers: tuple[Tensor, ...]) -> Any:
        """The state with these vectors in place of the rule's own."""

    @abstractmethod
    def restart(self, w: Any) -> Any:
        """The state with the rule's buffers emptied; schedules go on."""

    @abstractmethod
    def share(self, w: Any) -> Message:
        """What an exact average over workers is taken of."""

    @abstractmethod
    def average(self, mean: Message) -> Tensor:
        """The parameters that the mean of all shares stands for. [d]"""

    @abstractmethod
    def load(self, w: Any, x: Tensor) -> Any:
        """The state, put at ``x`` [d], where all others are put too."""

    def shift(self, w: Any, x: Tensor) -> Any:
        """The state, put at ``x`` [d] on its own: what it holds of a sum over all peers keeps its size."""
        return self.load(w, x)


@dataclass(frozen=True)
class RuleMethod(Averageable):
    """A worker that descends by a `Rule` of its own. Its state has the fields ``x`` and ``rule``, as `Descending` has."""

    rule: Rule = SGD(0.05, momentum=0.9, nesterov=True)
    """How one gradient moves the parameters; its schedules count this worker's steps."""

    def __post_init__(self) -> None:
        require_kind(self, "rule", Rule, "SGD(0.05)")

    def init(self, start: Tensor) -> Any:
        return Descending(start, self.rule.init(start))

    def params(self, w: Any) -> Tensor:
        return cast(Tensor, w.x)

    def local(self, w: Any, g: Tensor) -> Any:
        rule, x = self.rule.step(w.rule, self.params(w), g)
        return w._replace(x=x, rule=rule)

    def pace(self, w: Any) -> tuple[Tensor, Tensor]:
        return w.rule.step, w.rule.rates

    def buffers(self, w: Any) -> tuple[Tensor, ...]:
        return self.rule.buffers(w.rule)

    def with_buffers(self, w: Any, buffers: tuple[Tensor, ...]) -> Any:
        return w._replace(rule=self.rule.with_buffers(w.rule, buffers))

    def restart(self, w: Any) -> Any:
        return w._replace(rule=self.rule.restart(w.rule))

    def share(self, w: Any) -> Message:
        return w.x

    def average(self, mean: Message) -> Tensor:
        return cast(Tensor, mean)

    def load(self, w: Any, x: Tensor) -> Any:
        return w._replace(x=x)

    def moved(self, w: Any, x: Tensor, begins: bool) -> Any | None:
        return self.shift(w, x)


@dataclass(frozen=True)
class Local(RuleMethod):
    """A descent rule on its own, no messages: what one machine does. The baseline, and what others build on."""

    def check(self, n: int) -> None:
        if n != 1:
            raise ValueError(
                f"{type(self).__name__} on {n} workers: it sends no messages; give it one, or take LocalSGD"
            )


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

    def length(self, w: Any) -> int:
        """How many gradients the worker takes before its next push: ``period``, unless the server has told it another."""
        return self.period

    @abstractmethod
    def push(self, w: Any) -> Message:
        """What the worker sends when its gradients are done."""

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

    def sums(self, s: Any, own: Any, msg: Message) -> tuple[Tensor, ...]:
        """Sums over the parameters that ``serve`` needs of the whole model, such as a squared norm: 0-dim, float64 at best.

        An engine that has the model in parts adds them up and hands them on: a method that gives some writes ``serve(self,
        s, own, msg, *sums)`` and takes its own of the whole where it gets none. See `Master`.
        """
        return ()

    late: ClassVar[bool] = False
    """Whether a reply is used one exchange late, so that a worker may go on before it is there: `pull` then gets None."""

    def arrived(self, w: Any, reply: Message) -> Any:
        """The state of a worker that went on, once the reply is there for which `pull` got None."""
        return w

    gated: ClassVar[bool] = False
    """Whether a reply may have to wait (`ready`)."""

    def ready(self, s: Any, own: Any, clock: int, slowest: int) -> bool:
        """Whether the worker may have its reply now; asked after every visit while it waits.

        ``clock`` counts this worker's visits and ``slowest`` is the least clock of all (a newcomer starts there).
        """
        return True

    def refresh(self, s: Any, own: Any, reply: Message) -> tuple[Any, Message]:
        """A reply that has waited: the state kept for the worker and what it is sent now."""
        return own, reply

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
        return Oracle(reply, reply)  # as `init`: the gradient is used up, and need not be held on to
