"""Descent rules on one flat vector: what a worker does with a gradient when nobody else is involved.

Each equals the ``torch.optim`` class of its name to rounding, with ``maximize=False`` and ``dampening=0``. A rule is
pure: it returns the new state and the new parameters and changes nothing that it was given. Rates are functions of the
steps that this state has taken, counted from 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schedule import Rate, rate, require_rate
from .values import require, require_nonnegative


def count(x: Tensor) -> Tensor:
    """A step counter at 0 beside ``x``: 0-dim and float64, exact up to 2**53, so that rates keep double precision."""
    return torch.zeros((), dtype=torch.float64, device=x.device)


def axpy(a: float | Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``a x + y`` in one pass over the vectors [d]; ``a`` is a float, or 0-dim."""
    return torch.addcmul(y, x, a) if isinstance(a, Tensor) else torch.add(y, x, alpha=a)


@dataclass(frozen=True)
class Rule(ABC):
    """``init(x)`` makes the state of a run that starts at ``x``; ``step`` moves state and parameters by one gradient.

    A state is a NamedTuple with the fields ``step`` and ``rates`` (how many steps were taken, and the sum of their
    learning rates), other 0-dim scalars, and vectors [d] that are its buffers.
    """

    lr: Rate
    """Learning rate, above 0, or a schedule of the steps taken."""

    @abstractmethod
    def init(self, x: Tensor) -> Any:
        """The state before the first gradient, for parameters ``x`` of shape [d]."""

    @abstractmethod
    def step(self, state: Any, x: Tensor, g: Tensor) -> tuple[Any, Tensor]:
        """State and parameters ``[d]`` after the gradient ``g`` ``[d]`` taken at ``x``."""

    def buffers(self, state: Any) -> tuple[Tensor, ...]:
        """The state's vectors, [d] each: what averaging buffers averages."""
        return tuple(t for t in state if t.dim() == 1)

    def with_buffers(self, state: Any, buffers: tuple[Tensor, ...]) -> Any:
        """The state with these vectors in place of its own."""
        rest = iter(buffers)
        return state._make(next(rest) if t.dim() == 1 else t for t in state)

    def restart(self, state: Any) -> Any:
        """The state with its buffers emptied; the step, and so the schedule, goes on."""
        return self.with_buffers(state, tuple(torch.zeros_like(b) for b in self.buffers(state)))


class SGDState(NamedTuple):
    step: Tensor  # steps taken, 0-dim
    rates: Tensor  # sum of their rates, 0-dim
    v: Tensor  # momentum buffer, rate outside [d]


@dataclass(frozen=True)
class SGD(Rule):
    """Stochastic gradient descent with momentum; ``torch.optim.SGD``.

    v <- momentum v + g + weight_decay x;   x <- x - lr v, or x - lr (g + momentum v) with ``nesterov``
    """

    lr: Rate = 0.05
    """Learning rate (eta), above 0, or a schedule of the steps taken."""
    _: KW_ONLY
    momentum: float = 0.0
    """Momentum (mu), in [0, 1)."""
    nesterov: bool = False
    """Step along the look-ahead direction; needs momentum above 0."""
    weight_decay: float = 0.0
    """L2 penalty added to the gradient, at least 0."""

    def __post_init__(self) -> None:
        require_rate(self, "lr")
        require(self, "momentum", 0 <= self.momentum < 1, "must be in [0, 1)")
        require(self, "nesterov", self.momentum > 0 or not self.nesterov, "needs momentum above 0")
        require_nonnegative(self, "weight_decay")

    def init(self, x: Tensor) -> SGDState:
        return SGDState(count(x), count(x), torch.zeros_like(x))

    def step(self, state: SGDState, x: Tensor, g: Tensor) -> tuple[SGDState, Tensor]:
        lr = rate(self.lr, state.step)
        if self.weight_decay:
            g = axpy(self.weight_decay, x, g)
        v = axpy(self.momentum, state.v, g)
        x = axpy(-lr, axpy(self.momentum, v, g) if self.nesterov else v, x)
        return SGDState(state.step + 1, state.rates + lr, v), x


class AdamState(NamedTuple):
    step: Tensor  # steps taken, 0-dim
    rates: Tensor  # sum of their rates, 0-dim
    age: Tensor  # gradients in the moments, 0-dim: step, unless the buffers were emptied meanwhile
    m: Tensor  # first moment [d]
    v: Tensor  # second moment [d]


@dataclass(frozen=True)
class Adam(Rule):
    """Adam (Kingma & Ba 2015) with the L2 penalty inside the gradient; ``torch.optim.Adam``."""

    lr: Rate = 0.001
    """Learning rate (alpha), above 0, or a schedule of the steps taken."""
    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments, each in [0, 1)."""
    eps: float = 1e-8
    """Added to the denominator, above 0."""
    weight_decay: float = 0.0
    """L2 penalty, at least 0."""

    def __post_init__(self) -> None:
        require_rate(self, "lr")
        require(self, "betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "must be two in [0, 1)")
        require(self, "eps", self.eps > 0, "must be above 0")
        require_nonnegative(self, "weight_decay")

    def init(self, x: Tensor) -> AdamState:
        return AdamState(count(x), count(x), count(x), torch.zeros_like(x), torch.zeros_like(x))

    def step(self, state: AdamState, x: Tensor, g: Tensor) -> tuple[AdamState, Tensor]:
        lr = rate(self.lr, state.step)
        state = self.moments(state, axpy(self.weight_decay, x, g) if self.weight_decay else g)
        return state._replace(rates=state.rates + lr), axpy(-lr, self.direction(state), x)

    def restart(self, state: AdamState) -> AdamState:
        return super().restart(state)._replace(age=torch.zeros_like(state.age))  # type: ignore[no-any-return]

    def moments(self, state: AdamState, g: Tensor) -> AdamState:
        """The state after ``g`` has entered both moments."""
        b1, b2 = self.betas
        m, v = b1 * state.m + (1 - b1) * g, b2 * state.v + (1 - b2) * g * g
        return state._replace(step=state.step + 1, age=state.age + 1, m=m, v=v)

    def direction(self, state: AdamState) -> Tensor:
        """What the last step moved along, before the rate; 0 before the first step. [d]"""
        b1, b2 = self.betas
        k = state.age.clamp(min=1.0)
        return state.m / (1 - b1**k) / ((state.v / (1 - b2**k)).sqrt() + self.eps)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019); ``torch.optim.AdamW``."""

    weight_decay: float = 0.01
    """Decoupled decay: x <- x - lr weight_decay x before the step; at least 0."""

    def step(self, state: AdamState, x: Tensor, g: Tensor) -> tuple[AdamState, Tensor]:
        lr = rate(self.lr, state.step)
        state = self.moments(state, g)
        return state._replace(rates=state.rates + lr), axpy(
            -lr, self.direction(state), x * (1 - lr * self.weight_decay)
        )
