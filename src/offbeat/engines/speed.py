"""How long a worker takes for a gradient, in virtual seconds: values that give each worker an endless stream of times.

The k-th time of a worker is a pure function of (seed, worker, k).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle, repeat
from random import Random

from ..core.seeds import derive
from ..core.values import require


@dataclass(frozen=True)
class Speed(ABC):
    """A distribution of seconds per gradient."""

    @abstractmethod
    def stream(self, seed: int, worker: int) -> Iterator[float]:
        """The times of ``worker``'s gradients, in seconds, endless."""


@dataclass(frozen=True)
class Fixed(Speed):
    """The same time for every gradient; one number for all workers, or one for each."""

    seconds: float | tuple[float, ...] = 1.0
    """Seconds per gradient, above 0; of a tuple, worker i takes entry i modulo its length."""

    def __post_init__(self) -> None:
        each = self.seconds if isinstance(self.seconds, tuple) else (self.seconds,)
        require(self, "seconds", len(each) > 0 and all(0 < t < math.inf for t in each), "must be finite and above 0")

    def stream(self, seed: int, worker: int) -> Iterator[float]:
        return repeat(self.seconds[worker % len(self.seconds)] if isinstance(self.seconds, tuple) else self.seconds)


@dataclass(frozen=True)
class _Spread(Speed):
    """A mean for each machine drawn once, then times drawn around it."""

    mean: float = 1.0
    """Mean over machines and gradients, in seconds, above 0."""
    cv: float = 0.1
    """Coefficient of variation of one machine's times, at least 0."""
    machine_cv: float = 0.0
    """Coefficient of variation of the machines' means, at least 0."""

    def __post_init__(self) -> None:
        require(self, "mean", 0 < self.mean < math.inf, "must be finite and above 0 seconds")
        require(self, "cv", 0 <= self.cv < math.inf, "must be finite and at least 0")
        require(self, "machine_cv", 0 <= self.machine_cv < math.inf, "must be finite and at least 0")

    @staticmethod
    @abstractmethod
    def draw(rng: Random, mean: float, cv: float) -> Iterator[float]:
        """Endless draws of the distribution with this mean and coefficient of variation above 0."""

    def stream(self, seed: int, worker: int) -> Iterator[float]:
        rng = Random(derive(seed, worker))
        mean = next(self.draw(rng, self.mean, self.machine_cv)) if self.machine_cv else self.mean
        return self.draw(rng, mean, self.cv) if self.cv else repeat(mean)


@dataclass(frozen=True)
class Gamma(_Spread):
    """Gamma times by the CVB method: a machine's mean is gamma, and its times are gamma around that mean.

    Ali, Siegel, Maheswaran, Hensgen, Ali. Task execution time modeling for heterogeneous computing systems. HCW 2000.
    ``Gamma(cv=0.1)`` is a homogeneous cluster, ``Gamma(cv=0.1, machine_cv=0.6)`` a heterogeneous one.
    """

    @staticmethod
    def draw(rng: Random, mean: float, cv: float) -> Iterator[float]:
        shape, scale = 1 / cv**2, mean * cv**2
        while True:
            yield rng.gammavariate(shape, scale)


@dataclass(frozen=True)
class LogNormal(_Spread):
    """Log-normal times around a log-normal mean for each machine: a heavier tail than `Gamma` at the same cv."""

    @staticmethod
    def draw(rng: Random, mean: float, cv: float) -> Iterator[float]:
        variance = math.log1p(cv**2)
        location, sigma = math.log(mean) - variance / 2, math.sqrt(variance)
        while True:
            yield rng.lognormvariate(location, sigma)


@dataclass(frozen=True)
class Recorded(Speed):
    """Times that were measured: each worker repeats its own record from the start when it is used up.

    Of more workers than records, worker i takes record i modulo their number, from a place on that differs for each.
    """

    seconds: tuple[tuple[float, ...], ...]
    """For each worker its seconds per gradient, in order, above 0."""

    def __post_init__(self) -> None:
        ok = len(self.seconds) > 0 and all(r and all(0 < t < math.inf for t in r) for r in self.seconds)
        require(self, "seconds", ok, "must be records of finite times above 0, none of them empty")

    def stream(self, seed: int, worker: int) -> Iterator[float]:
        record = self.seconds[worker % len(self.seconds)]
        first = derive(seed, worker) % len(record) if worker >= len(self.seconds) else 0
        return cycle((*record[first:], *record[:first]))
