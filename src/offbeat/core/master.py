"""Asynchronous SGD in two orthogonal choices: how a stale gradient is corrected, and how the master then moves.

The parameter-server papers that correct a gradient (Staleness-Aware, Gap-Aware, delay compensation) and those that move
a master and decide what to send back (ASGD, NAG-ASGD, LWP, DANA, Adam) factor into a `Correction` and a `Master`. Any
of the first works with any of the second; the papers' own pairs have the papers' names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from .descent import count
from .method import GradientServer, Message
from .schedule import Rate, rate, require_rate
from .values import require, require_nonnegative

Number = float | Tensor
"""A float, or a 0-dim tensor."""


class Stale(NamedTuple):
    """A gradient that has arrived, with all that a correction may look at."""

    g: Tensor  # the gradient, taken at `sent` [d]
    decay: Number  # weight decay at the master's point, weight_decay * x [d]
    x: Tensor  # the master's point now (theta) [d]
    sent: Any  # the point that the worker was sent (w_i) [d]; () unless the correction `compares`
    step: Tensor  # updates of the master before now, 0-dim
    at: Tensor  # and before the point was sent, 0-dim
    lr: Number  # the rate now (eta)
    velocity: Callable[[], Tensor]  # what the master last moved along for this worker, before the rate (v_i) [d]
    sums: tuple[Tensor, ...] = ()  # what the correction's `sums` come to over the whole model, 0-dim each
    apart: bool = False  # the mover's `apart`: the velocity is the worker's own, and 0 at its first visit
    fading: float = 0.999  # the mover's `fading`

    @property
    def lag(self) -> Tensor:
        """Updates of the master between sending and now (tau), 0-dim."""
        return self.step - self.at


@dataclass(frozen=True)
class Correction(ABC):
    """How a stale gradient is corrected before the master moves. Elementwise, but for `sums`."""

    compares: ClassVar[bool] = False
    """Whether it needs the point that was sent; the server then keeps a copy for each worker (d numbers each)."""

    def begin(self, x: Tensor) -> Any:
        """What it remembers for all workers, for a run that starts at ``x`` [d]."""
        return ()

    def seat(self, memory: Any, x: Tensor) -> Any:
        """What it remembers for one worker that comes now, the master being at ``x`` [d]."""
        return ()

    def sums(self, memory: Any, mine: Any, stale: Stale) -> tuple[Tensor, ...]:
        """Sums over all parameters that `correct` needs, which finds them in ``stale.sums``; 0-dim, float64 at best."""
        return ()

    @abstractmethod
    def correct(self, memory: Any, mine: Any, stale: Stale) -> tuple[Tensor, Any, Any]:
        """The direction [d] that replaces ``g + decay``, and both memories afterwards."""


@dataclass(frozen=True)
class Uncorrected(Correction):
    """The gradient as it came."""

    def correct(self, memory: Any, mine: Any, stale: Stale) -> tuple[Tensor, Any, Any]:
        return stale.g + stale.decay if isinstance(stale.decay, Tensor) else stale.g, memory, mine


class MasterState(NamedTuple):
    x: Tensor  # the master's point (theta) [d]
    step: Tensor  # gradients applied so far, 0-dim
    mover: Any  # what the mover keeps for all workers
    memory: Any  # what the correction keeps for all workers


class Seat(NamedTuple):
    at: Tensor  # the step at which the worker was last sent parameters, 0-dim
    sent: Any  # those parameters (w_i) [d]; () unless the correction compares
    mover: Any  # what the mover keeps for this worker
    memory: Any  # what the correction keeps for this worker


@dataclass(frozen=True)
class Master(GradientServer):
    """A master point that moves by corrected gradients. A mover writes `move`, and the rest where it keeps a state.

    Weight decay is ``weight_decay * x`` at the master's point, added to the gradient before momentum, and corrected
    together with it where the correction scales. Evaluation uses the master's point, never a look-ahead.
    """

    lr: Rate = 0.05
    """Learning rate (eta), above 0, or a schedule of the gradients applied by all workers together."""
    _: KW_ONLY
    weight_decay: float = 0.0
    """L2 penalty (wd), at least 0."""
    correction: Correction = Uncorrected()
    """How a stale gradient is corrected before the master moves."""

    def __post_init__(self) -> None:
        require_rate(self, "lr")
        require_nonnegative(self, "weight_decay")
        require(
            self, "correction", isinstance(self.correction, Correction), "must be a Correction such as GapPenalty()"
        )
        if hasattr(self, "momentum"):
            require(self, "momentum", 0 <= self.momentum < 1, "must be in [0, 1)")

    apart: ClassVar[bool] = False
    """Whether the mover keeps a velocity for each worker, which is 0 until that worker's first gradient."""

    # what a mover writes

    def begin(self, x: Tensor) -> Any:
        """What the mover keeps for all workers, for a run that starts at ``x`` [d]."""
        return ()

    def seat(self, x: Tensor, shared: Any) -> tuple[Any, Any]:
        """A worker comes: the shared part afterwards, and what is kept for the worker."""
        return shared, ()

    def unseat(self, shared: Any, mine: Any) -> Any:
        """A worker has gone: the shared part without what it put in."""
        return shared

    @abstractmethod
    def move(self, x: Tensor, shared: Any, mine: Any, d: Tensor, lr: Number) -> tuple[Tensor, Any, Any]:
        """The master's point and both parts after the corrected direction ``d`` [d]."""

    def sends(self, x: Tensor, shared: Any, lr: Number) -> Tensor:
        """The parameters to send when the master is at ``x``: a look-ahead, or ``x`` itself. [d]"""
        return x

    def velocity(self, shared: Any, mine: Any, g: Tensor) -> Tensor:
        """What the master last moved along for this worker, before the rate; the gradient where it keeps none. [d]"""
        return g

    @property
    def fading(self) -> float:
        """Decay of the mean square that the mover keeps of its directions (beta2 of Adam); 0.999 where it keeps none."""
        return 0.999

    # the server's handlers

    def reply(self, s: MasterState, sent: Tensor) -> Message:
        """What goes to the worker along with the parameters; the parameters alone unless overridden."""
        return sent

    def rate_for(self, s: MasterState, own: Seat) -> Number:
        """The rate of this visit: the present one."""
        return rate(self.lr, s.step)

    def decay(self, s: MasterState) -> Number:
        """The weight decay that enters the gradient at the master; 0 where the worker has put it in already."""
        return self.weight_decay * s.x if self.weight_decay else 0.0

    def init_server(self, x: Tensor) -> MasterState:
        return MasterState(x, count(x), self.begin(x), self.correction.begin(x))

    def admit(self, s: MasterState) -> tuple[MasterState, Seat, Message]:
        shared, mine = self.seat(s.x, s.mover)
        s = s._replace(mover=shared)
        sent = self.sends(s.x, shared, rate(self.lr, s.step))
        memory = self.correction.seat(s.memory, s.x)
        return s, Seat(s.step, sent if self.correction.compares else (), mine, memory), self.reply(s, sent)

    def leave(self, s: MasterState, own: Seat) -> MasterState:
        return s._replace(mover=self.unseat(s.mover, own.mover))

    def stale(self, s: MasterState, own: Seat, msg: Tensor) -> Stale:
        """The gradient that has arrived, as a correction sees it."""
        lr = self.rate_for(s, own)
        velocity = partial(self.velocity, s.mover, own.mover, msg)
        return Stale(
            msg,
            self.decay(s),
            s.x,
            own.sent,
            s.step,
            own.at,
            lr,
            velocity,
            apart=self.apart,
            fading=self.fading,
        )

    def sums(self, s: MasterState, own: Seat, msg: Tensor) -> tuple[Tensor, ...]:
        return self.correction.sums(s.memory, own.memory, self.stale(s, own, msg))

    def serve(self, s: MasterState, own: Seat, msg: Tensor, *sums: Tensor) -> tuple[MasterState, Seat, Message]:
        stale = self.stale(s, own, msg)
        if sums := sums or self.correction.sums(s.memory, own.memory, stale):
            stale = stale._replace(sums=sums)
        lr = stale.lr
        d, memory, mine_memory = self.correction.correct(s.memory, own.memory, stale)
        x, shared, mine = self.move(s.x, s.mover, own.mover, d, lr)
        s = MasterState(x, s.step + 1, shared, memory)
        sent = self.sends(x, shared, lr)
        return s, Seat(s.step, sent if self.correction.compares else (), mine, mine_memory), self.reply(s, sent)

    def refresh(self, s: MasterState, own: Seat, reply: Message) -> tuple[Seat, Message]:
        sent = self.sends(s.x, s.mover, rate(self.lr, s.step))
        return own._replace(at=s.step, sent=sent if self.correction.compares else ()), self.reply(s, sent)

    def master(self, s: MasterState) -> Tensor:
        return s.x
