"""Learning-rate schedules: frozen values that are pure functions of a step, which may be a tensor.

A step is what the state that holds the rate counts: for a server method, gradients of the whole run (all workers
together); for a rule that runs at a worker, that worker's own steps. `Method.horizon` tells how many steps a run has.
A schedule is evaluated with tensor operations only, so that a compiled handler never recompiles as the step moves on.

    0.1 * Warmup(500) * MultiStep((8000, 12000), factor=0.1)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .values import plain, require, require_count


@dataclass(frozen=True)
class Schedule(ABC):
    """A rate as a function of the step; schedules multiply with each other and with numbers."""

    __array_ufunc__ = None  # a number of numpy, too, leaves the product to `__rmul__`

    def __call__(self, step: int | float | Tensor) -> Tensor:
        """The rate at ``step`` (counted from 0), a 0-dim float64 tensor."""
        return self.at(torch.as_tensor(step, dtype=torch.float64))

    @abstractmethod
    def at(self, step: Tensor) -> Tensor:
        """The rate at ``step``, a 0-dim float64 tensor."""

    def __mul__(self, other: float | Schedule) -> Product:
        return Product(self, other if isinstance(other, Schedule) else Constant(other))

    __rmul__ = __mul__


Rate = float | Schedule
"""A learning rate: a number, or a schedule of the step."""


def rate(lr: Rate, step: Tensor) -> float | Tensor:
    """The number that ``lr`` is at ``step``; a 0-dim tensor where ``lr`` is a schedule."""
    return lr.at(step) if isinstance(lr, Schedule) else lr


def require_rate(owner: object, field: str) -> None:
    """Refuse a rate that is neither a schedule nor a finite number above 0."""
    lr = plain(owner, field)
    ok = isinstance(lr, Schedule) or (isinstance(lr, float | int) and 0 < lr < math.inf)
    require(owner, field, ok, "must be a finite number above 0, or a schedule such as 0.1 * Warmup(500)")


@dataclass(frozen=True)
class Constant(Schedule):
    """The same rate at every step."""

    value: float
    """The rate; finite."""

    def __post_init__(self) -> None:
        require(self, "value", math.isfinite(self.value), "must be finite")

    def at(self, step: Tensor) -> Tensor:
        return torch.full_like(step, self.value)


@dataclass(frozen=True)
class Warmup(Schedule):
    """A factor that rises in a straight line to 1 over the first ``steps`` steps and stays there (Goyal et al. 2017).

    At step t it is ``start + (1 - start) * min(1, (t + 1) / steps)``: never 0, and 1 from step ``steps - 1`` on.
    """

    steps: int
    """Length in steps, at least 1."""
    start: float = 0.0
    """The factor just before the first step, in [0, 1]."""

    def __post_init__(self) -> None:
        require_count(self, "steps")
        require(self, "start", 0 <= self.start <= 1, "must be in [0, 1]")

    def at(self, step: Tensor) -> Tensor:
        return self.start + (1 - self.start) * ((step + 1) / self.steps).clamp(max=1.0)


@dataclass(frozen=True)
class MultiStep(Schedule):
    """A factor that is multiplied by ``factor`` at each milestone; ``torch.optim.lr_scheduler.MultiStepLR``."""

    milestones: tuple[int, ...]
    """Steps at which the rate changes, rising."""
    factor: float = 0.1
    """What the rate is multiplied by, above 0."""

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        require(self, "milestones", rising and all(m >= 0 for m in self.milestones), "must be steps >= 0 that rise")
        require(self, "factor", 0 < self.factor < math.inf, "must be a finite number above 0")

    def at(self, step: Tensor) -> Tensor:
        passed = sum(((step >= m).to(step.dtype) for m in self.milestones), torch.zeros_like(step))
        return self.factor**passed


@dataclass(frozen=True)
class Cosine(Schedule):
    """A factor that falls from 1 to ``floor`` along half a cosine over ``steps`` steps, then stays there.

    ``torch.optim.lr_scheduler.CosineAnnealingLR`` with ``T_max = steps``, up to the step where that one rises again.
    """

    steps: int
    """Length in steps, at least 1."""
    floor: float = 0.0
    """The factor at the end, in [0, 1]."""

    def __post_init__(self) -> None:
        require_count(self, "steps")
        require(self, "floor", 0 <= self.floor <= 1, "must be in [0, 1]")

    def at(self, step: Tensor) -> Tensor:
        done = (step / self.steps).clamp(max=1.0)
        return self.floor + (1 - self.floor) * 0.5 * (1 + torch.cos(math.pi * done))


@dataclass(frozen=True)
class Product(Schedule):
    """Two schedules multiplied at every step."""

    left: Schedule
    right: Schedule

    def at(self, step: Tensor) -> Tensor:
        return self.left.at(step) * self.right.at(step)


@dataclass(frozen=True)
class Sequence(Schedule):
    """``first`` for ``steps`` steps, then ``then``, which counts its own steps from there."""

    first: Schedule
    steps: int
    """Length of ``first`` in steps, at least 1."""
    then: Schedule

    def __post_init__(self) -> None:
        require_count(self, "steps")

    def at(self, step: Tensor) -> Tensor:
        later = (step - self.steps).clamp(min=0.0)
        return torch.where(step < self.steps, self.first.at(step), self.then.at(later))
