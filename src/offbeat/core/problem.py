"""What is trained, as every engine sees it: a start, a stochastic gradient, an evaluation, on one flat vector."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, Self, runtime_checkable

from torch import Tensor


@runtime_checkable
class Problem(Protocol):
    """A stochastic optimisation problem over one flat parameter vector of ``d`` entries.

    Every method is a pure function of its arguments (and of the seed that the problem was built with): the same
    ``(x, worker, step)`` gives the same bits, in any order and in any process. Engines rely on it for reproducibility
    and for replay.
    """

    def x0(self) -> Tensor:
        """The starting parameters, ``Tensor[d]``, the same at every call; the caller may keep but not change it."""
        ...

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        """The minibatch gradient ``Tensor[d]`` and loss ``Tensor[]`` at ``x`` for this worker's ``step``-th minibatch.

        ``step`` counts this worker's gradients from 0. ``x`` is not changed; the gradient is a new tensor.
        """
        ...

    def evaluate(self, x: Tensor) -> dict[str, float]:
        """Figures of merit at ``x``, for instance ``{"loss": ..., "accuracy": ...}`` on held-out data."""
        ...


class Point(NamedTuple):
    """Where a gradient is to be taken, and which: what `Problem.grad` is asked."""

    problem: Problem
    x: Tensor  # parameters [d]
    worker: int
    step: int  # the worker's gradients before this one


@runtime_checkable
class Batched(Problem, Protocol):
    """A problem that can take several gradients at once: in one call, or by several threads."""

    def kin(self) -> object:
        """What it shares with the problems that may be in one call with it: those `reseeded` from it."""
        ...

    def reseeded(self, seed: int) -> Self:
        """The same problem with another seed."""
        ...

    def prepare(self, point: Point) -> Callable[[], tuple[Tensor, Tensor]] | None:
        """What gives the bits of `grad` at ``point``, called once, from any thread, while others are; None: call `grad`.

        Whatever belongs to the process, as torch's generators do, is left alone by it.
        """
        ...

    def room(self, point: Point) -> int:
        """How many gradients like the one at ``point`` fit into memory at once, at least 1."""
        ...

    def grads(self, points: Sequence[Point]) -> tuple[Tensor, Tensor]:
        """The gradients ``Tensor[n, d]`` and losses ``Tensor[n]`` at ``points``, each as `grad` gives it, to rounding."""
        ...
