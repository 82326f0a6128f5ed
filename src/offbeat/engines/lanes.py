"""Gradients of workers in flight depend on nothing that is still to come, so several can be taken at once.

In lanes they are taken in one call; abreast, each by a thread of its own. The first suits small nets, whose operations cost
more to call than to do; the second those that are too large for that, and too small to keep all cores busy by themselves.
Both give the results of one gradient at a time to rounding and not to the bit, so both must be asked for: by a number, or by
`AUTO`, which measures what is faster on the first gradients of a run.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from threading import Barrier
from typing import Literal, NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from ..core.problem import Batched, Point, Problem

AUTO: Literal["auto"] = "auto"
"""As many lanes, or threads, as are measured to be the fastest."""
Count: TypeAlias = int | Literal["auto"]

GAIN = 1.1
"""How many times faster lanes must be to be taken, and how many times slower threads may look when they are tried."""
TRIAL, TIMES, WARM = 1 / 40, 3, 5
"""The part of a run that a trial may take, and its least in seconds; how often lanes are tried; how often a gradient is
taken until it takes no less time."""
WAITING = 1 << 30
"""Bytes of gradients taken abreast that may wait until their time comes."""
T = TypeVar("T")


class Taken(NamedTuple):
    """A gradient and what is known of it."""

    g: Tensor  # [d]
    loss: float
    wrong: str = ""  # what is wrong with it, if anything is


Coming: TypeAlias = Callable[[], Taken]
"""Waits for a gradient that a thread takes."""


def _looked_at(g: Tensor, loss: float, size: float) -> Taken:
    """A gradient of this length (or its square), which tells fast whether all of it is finite."""
    finite = math.isfinite(loss) and (math.isfinite(size) or bool(torch.isfinite(g).all()))
    return Taken(g, loss, "" if finite else f"gradient or loss is not finite (loss {loss})")


def _taken(x: Tensor, gradient: Callable[[], tuple[Tensor, Tensor]]) -> Taken:
    g, loss = gradient()
    if not isinstance(g, Tensor) or g.shape != x.shape or g.dtype != x.dtype:
        kind = f"{tuple(g.shape)} {g.dtype}" if isinstance(g, Tensor) else type(g).__name__
        return Taken(g, 0.0, f"the gradient is {kind}, the parameters are {tuple(x.shape)} {x.dtype}")
    return _looked_at(g, float(loss), float(torch.dot(g, g)))


def _alone(point: Point) -> Taken:
    return _taken(point.x, partial(point.problem.grad, point.x, point.worker, point.step))


class Threads:
    """Takes so many gradients at once, each with one thread for all that it does."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.begun: deque[Future[Taken]] = deque()  # in their order, some of them done
        self.pool = ThreadPoolExecutor(count, "gradients")
        every, self.threads = Barrier(count + 1, timeout=60), torch.get_num_threads()

        def begin() -> None:
            torch.get_num_threads()  # torch sets a thread's number when it is first asked
            torch.set_num_threads(1)
            every.wait()

        for _ in range(count):
            self.pool.submit(begin)
        every.wait()
        torch.set_num_threads(1)  # in this thread as well, for all cores are busy

    def take(self, point: Point) -> Coming | None:
        """Begin with the gradient at ``point``; None where no other thread can take it (see `Batched.prepare`)."""
        gradient = cast(Batched, point.problem).prepare(point)
        if gradient is None:
            return None
        future = self.pool.submit(_taken, point.x, gradient)
        self.begun.append(future)
        return partial(self._come, future)

    def _come(self, future: Future[Taken]) -> Taken:
        """Wait until few are left: a thread woken for each would take the others' place in the cache each time."""
        while self.begun and self.begun[0].done():
            self.begun.popleft()
        if not future.done() and len(self.begun) > 2 * self.count:
            wait([self.begun[-1 - 2 * self.count]])
        return future.result()

    def close(self) -> None:
        """Take no more."""
        self.pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.threads)


def check_lanes(lanes: object) -> None:
    """Raise ``ValueError`` for what is no `Count`."""
    if lanes != AUTO and (not isinstance(lanes, int) or lanes < 1):
        raise ValueError(f"lanes = {lanes!r}: must be a whole number, at least 1, or {AUTO!r}")


class Lanes:
    """Takes gradients for runs on ``problem`` and its kin: up to ``most`` in one call, or ``abreast`` by as many threads.

    Of the two at least one is 1. ``gradients`` is how many the runs take in all: the trial of `AUTO` must be small beside it.
    """

    def __init__(self, problem: Problem, most: Count, abreast: int, gradients: int) -> None:
        self.problem, self.gradients = problem, gradients
        self.most, self.abreast = (most, abreast) if isinstance(problem, Batched) else (1, 1)
        self.taken = 1
        """The most that have been taken in one call: with as many lanes the same run takes the same calls."""
        self.threads: Threads | None = None

    @property
    def single(self) -> bool:
        """Whether one gradient is taken at a time."""
        return self.most == self.abreast == 1

    def __call__(self, points: Sequence[Point]) -> list[Taken | Coming]:
        """The gradients at the first of ``points``, one at least: those of the rest are for a later call."""
        if self.most == AUTO:
            self.most, self.abreast = measured(self.problem, points, self.gradients)
        if self.abreast > 1:
            return self._abreast(points[: max(self.abreast, WAITING // points[0].x.nbytes)])
        if self.most > 1:
            count = self.most if len(points) >= self.most else _round(len(points))
            self.taken = max(self.taken, count)
            return [*_together(self.problem, points[:count])]
        return [_alone(points[0])]

    def start(self, point: Point, flying: int) -> Coming | None:
        """Begin with the gradient at ``point`` where that is done abreast and there is room for so many."""
        return self.threads.take(point) if self.threads and flying * point.x.nbytes <= WAITING else None

    def close(self) -> None:
        """Take no more."""
        threads, self.threads = self.threads, None
        if threads:
            threads.close()

    def _abreast(self, points: Sequence[Point]) -> list[Taken | Coming]:
        self.threads = self.threads or Threads(self.abreast)
        begun = list[Taken | Coming]()
        for point in points:
            coming = self.threads.take(point)
            if coming is None:
                return begun or [_alone(point)]
            begun.append(coming)
        return begun


def measured(problem: Problem, points: Sequence[Point], gradients: int) -> tuple[int, int]:
    """How many lanes and how many threads are the fastest where gradients at so many ``points`` are in flight.

    What is tried takes a fortieth of the time of ``gradients`` gradients at the most, and its warnings are dropped.
    """
    if not isinstance(problem, Batched) or len(points) < 2:
        return 1, 1
    for _ in range(2):  # these say what a run would warn of anyway
        alone, seconds = _timed(lambda: _alone(points[0]))
    affordable = int(max(TRIAL / seconds, TRIAL * gradients))
    room = problem.room(points[0]) if affordable >= 2 * (TIMES + 2) else 1
    if (lanes := min(len(points), room, affordable // (TIMES + 2))) > 1:
        try:
            first = _quietly(problem, points[:lanes])[0]
        except Exception:  # what a module does may be impossible in lanes
            lanes = 1
        else:  # random numbers in another order, or examples that are not as independent as they look
            same = torch.allclose(first.g, alone.g, rtol=1e-2, atol=1e-2 * float(alone.g.abs().max()))
            lanes = lanes if same else 1
    for _ in range(TIMES if lanes > 1 else 0):  # in turn, the best of each, as other processes come between
        seconds = min(seconds, _timed(lambda: _alone(points[0]))[1])
        if _timed(lambda: _quietly(problem, points[:lanes]))[1] / lanes * GAIN < seconds:
            return room, 1
    return 1, _tried_abreast(problem, points, affordable)


def _tried_abreast(problem: Batched, points: Sequence[Point], affordable: int) -> int:
    """How many threads to use, where so many gradients may be taken to find out."""
    count = min(torch.get_num_threads(), len(points))
    many = [*points, *points, *points][: 3 * count]  # as one thread waits for another now and then
    if count < 2 or WARM + 3 * len(many) + 2 > affordable:
        return 1
    for _ in range(WARM):
        _alone(points[0])
    if not (problem.prepare(points[0]) or (_alone(points[0]) and problem.prepare(points[0]))):  # now and then not
        return 1
    alone = _timed(lambda: [_alone(point) for point in many])[1]
    threads = Threads(count)
    try:
        rounds = [
            _timed(lambda: [come() for come in [threads.take(p) or partial(_alone, p) for p in many]])[1]
            for _ in range(2)
        ]
    finally:
        threads.close()
    return count if min(rounds) < alone * GAIN else 1  # in a run they wait neither for each other nor for visits


def _quietly(problem: Batched, points: Sequence[Point]) -> list[Taken]:
    """`_together`, without warnings: a run may not come to it."""
    with warnings.catch_warnings(action="ignore"):
        return _together(problem, points)


def _together(problem: Problem, points: Sequence[Point]) -> list[Taken]:
    grads, losses = cast(Batched, problem).grads(points)
    sizes, values = torch.linalg.vector_norm(grads, dim=1).tolist(), losses.tolist()
    return [_looked_at(*row) for row in zip(grads.unbind(), values, sizes, strict=True)]


def _round(n: int) -> int:
    """``n`` or a little less, so that few different numbers of lanes are taken: each is recorded apart (tasks/tape.py)."""
    return n - n % (1 << max(0, n.bit_length() - 3))


def _timed(act: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    return act(), time.perf_counter() - start
