"""Gradients of workers in flight depend on nothing that is still to come: several are taken at once.

As lanes they are taken in one call; abreast, each by a thread of its own. The first suits small nets, whose operations cost
more to call than to do; the second those that are too large for that, and too small to keep all cores busy by themselves.
What is faster is measured on the first gradients of a run, and kept for all runs like it in this process.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import is_dataclass, replace
from functools import partial
from queue import SimpleQueue
from threading import Barrier
from typing import NamedTuple, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from ..core.problem import Batched, Point, Problem

GAIN = 1.1
"""How many times faster lanes must be to be taken, and how many times slower threads may look when they are tried."""
TRIAL, TIMES, WARM = 1 / 40, 3, 5
"""The part of a run that finding out may take, and its least in seconds; how often lanes are tried; how often a gradient is
taken until it takes no less time."""
WAITING = 1 << 30
"""Bytes of gradients taken abreast that may wait until their time comes."""
T = TypeVar("T")

_known: dict[tuple[str, int, int], tuple[int, int]] = {}  # problem, workers in flight, threads -> lanes, abreast


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


def _alone(point: Point) -> Taken:
    x = point.x
    g, loss = point.problem.grad(x, point.worker, point.step)
    if not isinstance(g, Tensor) or g.shape != x.shape or g.dtype != x.dtype:
        kind = f"{tuple(g.shape)} {g.dtype}" if isinstance(g, Tensor) else type(g).__name__
        return Taken(g, 0.0, f"the gradient is {kind}, the parameters are {tuple(x.shape)} {x.dtype}")
    return _looked_at(g, float(loss), float(torch.dot(g, g)))


class Threads:
    """Takes gradients on copies of their problems, so many at once, each with one thread for all that it does."""

    def __init__(self, count: int) -> None:
        self.count, self.state = count, torch.get_rng_state()
        self.copies: dict[int, tuple[Batched, SimpleQueue[Batched]]] = {}  # of each problem; free ones
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

    def take(self, point: Point) -> Coming:
        """Begin with the gradient at ``point``."""
        problem = cast(Batched, point.problem)
        if id(problem) not in self.copies:
            self.copies[id(problem)] = problem, SimpleQueue()
            for _ in range(self.count):
                self.copies[id(problem)][1].put(problem.apart())
        future = self.pool.submit(self._take, point, self.copies[id(problem)][1])
        self.begun.append(future)
        return partial(self._come, future)

    def _come(self, future: Future[Taken]) -> Taken:
        """Who must wait waits until few are left: woken for each, it would take the others' place in the cache each time."""
        while self.begun and self.begun[0].done():
            self.begun.popleft()
        if not future.done() and len(self.begun) > 2 * self.count:
            wait([self.begun[-1 - 2 * self.count]])
        return future.result()

    @staticmethod
    def _take(point: Point, free: SimpleQueue[Batched]) -> Taken:
        copy = free.get()
        try:
            return _alone(point._replace(problem=copy))
        finally:
            free.put(copy)

    def close(self) -> None:
        """Take no more. ``RuntimeError`` where somebody has drawn from torch's generator, which all threads share."""
        self.pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.threads)
        if not torch.equal(torch.get_rng_state(), self.state):
            raise RuntimeError(
                "random numbers were drawn from torch's own generator while gradients were taken abreast, so that they "
                "do not follow from the seed: pass abreast=1"
            )


class Lanes:
    """Takes gradients for runs on ``problem`` and its kin: up to ``most`` in one call, ``abreast`` by as many threads.

    Of the two at least one is 1; both None: to be measured. ``gradients`` is how many the runs take in all: what finding out
    costs must be small beside it.
    """

    def __init__(self, problem: Problem, most: int | None, abreast: int | None, gradients: int) -> None:
        self.problem, self.gradients = problem, gradients
        if not isinstance(problem, Batched):
            most = abreast = 1
        elif most or abreast:
            most, abreast = most or 1, abreast or 1
        self.most, self.abreast = most, abreast
        self.done: tuple[Point, Taken] | None = None  # what was taken to find out
        self.threads: Threads | None = None

    @property
    def single(self) -> bool:
        """Whether one gradient is taken at a time."""
        return self.most == self.abreast == 1

    def __call__(self, points: Sequence[Point]) -> list[Taken | Coming]:
        """The gradients at the first of ``points``, one at least: those of the rest are for a later call."""
        if self.most is None or self.abreast is None:
            self.most, self.abreast = self.decide(points)
        if self.abreast > 1:
            self.threads = self.threads or Threads(self.abreast)
            return [self.threads.take(p) for p in points[: max(self.abreast, WAITING // points[0].x.nbytes)]]
        if self.most > 1:
            return [*self._together(points[: self.most if len(points) >= self.most else _round(len(points))])]
        done, self.done = self.done, None
        return [done[1] if done and done[0] is points[0] else _alone(points[0])]

    def start(self, point: Point, flying: int) -> Coming | None:
        """Begin with the gradient at ``point`` where that is done abreast and there is room for so many."""
        return self.threads.take(point) if self.threads and flying * point.x.nbytes <= WAITING else None

    def close(self) -> None:
        """Take no more. Raises what `Threads.close` raises, once."""
        threads, self.threads = self.threads, None
        if threads:
            threads.close()

    def _together(self, points: Sequence[Point]) -> list[Taken]:
        grads, losses = cast(Batched, self.problem).grads(points)
        sizes, values = torch.linalg.vector_norm(grads, dim=1).tolist(), losses.tolist()
        return [_looked_at(*row) for row in zip(grads.unbind(), values, sizes, strict=True)]

    def decide(self, points: Sequence[Point]) -> tuple[int, int]:
        """How many lanes, and how many abreast, where gradients at so many ``points`` are in flight."""
        if not isinstance(self.problem, Batched):
            return 1, 1
        like = replace(self.problem, seed=0) if is_dataclass(self.problem) else self.problem
        key = repr(like), len(points), torch.get_num_threads()
        if key not in _known:
            _known[key] = self._tried(self.problem, points) if len(points) > 1 else (1, 1)
        return _known[key]

    def _tried(self, problem: Batched, points: Sequence[Point]) -> tuple[int, int]:
        alone, seconds = _timed(lambda: _alone(points[0]))
        self.done = points[0], alone
        affordable = int(max(TRIAL, TRIAL * self.gradients * seconds) / seconds)
        room = problem.room(points[0]) if affordable >= 2 * (TIMES + 2) else 1
        if (lanes := min(len(points), room, affordable // (TIMES + 2))) > 1:
            try:
                with warnings.catch_warnings(action="ignore"):  # of what would be slow: that is measured
                    first = self._together(points[:lanes])[0]
            except Exception:  # what a module does may be impossible in lanes
                lanes = 1
            else:  # random numbers in another order, or examples that are not as independent as they look
                same = torch.allclose(first.g, alone.g, rtol=1e-2, atol=1e-2 * float(alone.g.abs().max()))
                lanes = lanes if same else 1
        for _ in range(TIMES if lanes > 1 else 0):  # in turn, the best of each, as other processes come between
            seconds = min(seconds, _timed(lambda: _alone(points[0]))[1])
            if _timed(lambda: self._together(points[:lanes]))[1] / lanes * GAIN < seconds:
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
    alone = _timed(lambda: [_alone(point) for point in many])[1]
    state = torch.get_rng_state()
    try:
        copy = problem.apart()
    except ValueError:
        return 1
    for _ in range(2):  # the first is guarded
        _alone(points[0]._replace(problem=copy))
    if not torch.equal(torch.get_rng_state(), state):
        torch.set_rng_state(state)
        return 1  # it draws where nothing guards it
    threads = Threads(count)
    try:
        rounds = [_timed(lambda: [come() for come in [threads.take(point) for point in many]])[1] for _ in range(2)]
    finally:
        threads.close()
    return count if min(rounds) < alone * GAIN else 1  # in a run they wait neither for each other nor for visits


def _round(n: int) -> int:
    """``n`` or a little less, so that few different numbers of lanes are taken: each is recorded apart (tasks/tape.py)."""
    return n - n % (1 << max(0, n.bit_length() - 3))


def _timed(act: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    return act(), time.perf_counter() - start
