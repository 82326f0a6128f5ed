"""What is trained, as every engine sees it: a start, a stochastic gradient, an evaluation, on one flat vector."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

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
