"""Gradients of workers in flight depend on nothing that is still to come: several are taken in one call, as lanes.

Where that is faster is measured on the first gradients of a run, and kept for all runs like it in this process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..core.problem import Batched, Point, Problem

GAIN = 1.1
"""How many times faster lanes must be to be taken."""
TRIAL = 1 / 50
"""The part of a run that finding out may take; and its least, in seconds."""

_known: dict[tuple[object, int, int], int] = {}  # kin, workers in flight, threads -> lanes


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
        self.problem, self.most, self.gradients = problem, most, gradients
        if not isinstance(problem, Batched):
            self.most = 1

    def __call__(self, points: Sequence[Point]) -> list[Taken]:
        """The gradients at the first of ``points``, one at least: those of the rest are for a later call."""
        if self.most is None:
            self.most = self._measured(points)
        if self.most == 1:
            return [self._alone(points[0])]
        return self._together(points[: self.most])

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

    def _measured(self, points: Sequence[Point]) -> int:
        """How many lanes to take where so many are in flight."""
        problem = cast(Batched, self.problem)
        key = problem.kin(), len(points), torch.get_num_threads()
        if key not in _known:
            _known[key] = self._tried(problem, points) if len(points) > 1 else 1
        return _known[key]

    def _tried(self, problem: Batched, points: Sequence[Point]) -> int:
        room = problem.room(points[0])  # and so everything is warm
        start = time.perf_counter()
        alone = self._alone(points[0])
        seconds = time.perf_counter() - start
        affordable = int(max(TRIAL, TRIAL * self.gradients * seconds) / (3 * seconds))
        lanes = min(len(points), room, affordable)
        if lanes < 2:
            return 1
        try:
            first = self._together(points[:lanes])[0]
        except Exception:  # what a module does may be impossible in lanes
            return 1
        if not torch.allclose(first.g, alone.g, rtol=1e-2, atol=1e-3 * float(alone.g.abs().max())):
            return 1  # its examples are not as independent as they look
        start = time.perf_counter()
        self._together(points[:lanes])
        each = (time.perf_counter() - start) / lanes
        return room if each * GAIN < seconds else 1
