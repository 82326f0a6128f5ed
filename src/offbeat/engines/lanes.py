"""Gradients of workers in flight depend on nothing that is still to come: several are taken in one call, as lanes.

Where that is faster is measured on the first gradients of a run, and kept for all runs like it in this process.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from ..core.problem import Batched, Point, Problem

GAIN = 1.1
"""How many times faster lanes must be to be taken."""
TRIAL, TIMES = 1 / 50, 3
"""The part of a run that finding out may take, and its least in seconds; and how often lanes are tried."""
T = TypeVar("T")

_known: dict[tuple[str, int, int], int] = {}  # problem, workers in flight, threads -> lanes


class Taken(NamedTuple):
    """A gradient and what is known of it."""

    g: Tensor  # [d]
    loss: float
    wrong: str = ""  # what is wrong with it, if anything is


def _looked_at(g: Tensor, loss: float, size: float) -> Taken:
    """A gradient of this length (or its square), which tells fast whether all of it is finite."""
    finite = math.isfinite(loss) and (math.isfinite(size) or bool(torch.isfinite(g).all()))
    return Taken(g, loss, "" if finite else f"gradient or loss is not finite (loss {loss})")


class Lanes:
    """Takes gradients for runs on ``problem`` and its kin, up to ``most`` (None: to be measured) in one call.

    ``gradients`` is how many the runs take in all: what finding out costs must be small beside it.
    """

    def __init__(self, problem: Problem, most: int | None, gradients: int) -> None:
        self.problem, self.gradients = problem, gradients
        self.most = most if isinstance(problem, Batched) else 1
        self.done: tuple[Point, Taken] | None = None  # what was taken to find out

    def __call__(self, points: Sequence[Point]) -> list[Taken]:
        """The gradients at the first of ``points``, one at least: those of the rest are for a later call."""
        if self.most is None:
            self.most = self.decide(points)
        if self.most > 1:
            return self._together(points[: self.most])
        done, self.done = self.done, None
        return [done[1] if done and done[0] is points[0] else self._alone(points[0])]

    def _alone(self, point: Point) -> Taken:
        x = point.x
        g, loss = point.problem.grad(x, point.worker, point.step)
        if not isinstance(g, Tensor) or g.shape != x.shape or g.dtype != x.dtype:
            kind = f"{tuple(g.shape)} {g.dtype}" if isinstance(g, Tensor) else type(g).__name__
            return Taken(g, 0.0, f"the gradient is {kind}, the parameters are {tuple(x.shape)} {x.dtype}")
        return _looked_at(g, float(loss), float(torch.dot(g, g)))

    def _together(self, points: Sequence[Point]) -> list[Taken]:
        grads, losses = cast(Batched, self.problem).grads(points)
        sizes, values = torch.linalg.vector_norm(grads, dim=1).tolist(), losses.tolist()
        return [_looked_at(*row) for row in zip(grads.unbind(), values, sizes, strict=True)]

    def decide(self, points: Sequence[Point]) -> int:
        """How many lanes to take where gradients at so many ``points`` are in flight: 1, or as many as there is room for."""
        if not isinstance(self.problem, Batched):
            return 1
        like = replace(self.problem, seed=0) if is_dataclass(self.problem) else self.problem
        key = repr(like), len(points), torch.get_num_threads()
        if key not in _known:
            _known[key] = self._tried(self.problem, points) if len(points) > 1 else 1
        return _known[key]

    def _tried(self, problem: Batched, points: Sequence[Point]) -> int:
        alone, seconds = _timed(lambda: self._alone(points[0]))
        self.done = points[0], alone
        affordable = int(max(TRIAL, TRIAL * self.gradients * seconds) / ((TIMES + 2) * seconds))
        if affordable < 2 or (room := problem.room(points[0])) < 2:
            return 1
        lanes = min(len(points), room, affordable)
        try:
            with warnings.catch_warnings(action="ignore"):  # of what would be slow: that is measured
                first = self._together(points[:lanes])[0]
        except Exception:  # what a module does may be impossible in lanes
            return 1
        if not torch.allclose(first.g, alone.g, rtol=1e-2, atol=1e-2 * float(alone.g.abs().max())):
            return 1  # random numbers in another order, or examples that are not as independent as they look
        for _ in range(TIMES):  # in turn, the best of each, as other processes come between
            seconds = min(seconds, _timed(lambda: self._alone(points[0]))[1])
            if _timed(lambda: self._together(points[:lanes]))[1] / lanes * GAIN < seconds:
                return room
        return 1


def _timed(act: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    return act(), time.perf_counter() - start
