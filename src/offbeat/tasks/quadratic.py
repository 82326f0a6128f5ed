"""A noisy quadratic bowl, whose optimum is known: for laws, tests and first experiments."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from ..core.seeds import derive
from ..core.values import require
from .supervised import Dtype

_OPTIMUM, _NOISE = range(2)  # what a seed is for


@dataclass(frozen=True)
class Quadratic:
    """f(x) = 1/2 (x - x*)^T A (x - x*), with A diagonal and eigenvalues spaced evenly in the logarithm.

    They go from 1 down to 1/``condition``, so gradient descent is stable for lr < 2. A gradient is A (x - x*) plus
    independent Gaussian noise in each coordinate, drawn for (seed, worker, step); the loss beside it is f(x), without
    noise. Starts at 0; the optimum x* is drawn from a standard normal distribution, so that the distance to it per
    coordinate is about 1 at the start. Raises ``ValueError`` for bad fields.
    """

    d: int = 20
    """Number of parameters, at least 1."""
    condition: float = 10.0
    """Condition number of A, its largest over its smallest eigenvalue: at least 1, finite."""
    noise: float = 0.1
    """Standard deviation of the gradient noise per coordinate: at least 0, finite."""
    seed: int = 0
    """Any integer: optimum and noise follow from it."""
    dtype: Dtype = "float64"
    """Floating-point type: float32 or float64."""

    def __post_init__(self) -> None:
        require(self, "d", isinstance(self.d, int) and self.d >= 1, "choose 1 or more")
        require(self, "condition", 1 <= self.condition < math.inf, "choose a finite number, 1 or more")
        require(self, "noise", 0 <= self.noise < math.inf, "choose a finite number, 0 or more")
        require(self, "seed", isinstance(self.seed, int), "choose an integer")
        require(self, "dtype", self.dtype in ("float32", "float64"), "choose float32 or float64")

    @cached_property
    def eigenvalues(self) -> Tensor:
        """The diagonal of A, ``Tensor[d]``, descending."""
        return torch.logspace(0, -math.log10(self.condition), self.d, dtype=torch.float64).to(self._dtype)

    @cached_property
    def optimum(self) -> Tensor:
        """x*, ``Tensor[d]``: the gradient's mean is 0 there."""
        return self._normal(_OPTIMUM, self.seed)

    def x0(self) -> Tensor:
        """Zeros, ``Tensor[d]``."""
        return torch.zeros(self.d, dtype=self._dtype)

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        """The noisy gradient ``Tensor[d]`` and f(x) ``Tensor[]``."""
        off = x - self.optimum
        exact = self.eigenvalues * off
        return exact + self.noise * self._normal(_NOISE, self.seed, worker, step), 0.5 * (off @ exact)

    def evaluate(self, x: Tensor) -> dict[str, float]:
        """``{"loss": f(x), "distance": |x - x*| / sqrt(d)}``."""
        off = x - self.optimum
        loss = 0.5 * float(off @ (self.eigenvalues * off))
        return {"loss": loss, "distance": float(off.norm()) / math.sqrt(self.d)}

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "float32" else torch.float64

    def _normal(self, *seed: int) -> Tensor:
        return torch.randn(self.d, dtype=self._dtype, generator=Generator().manual_seed(derive(*seed)))

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}
