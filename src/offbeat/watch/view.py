"""A run as it is to be seen: what its trace has told so far, added up. No input or output, and no clock.

Its size does not depend on how long the run is: curves have a bounded number of points, and of what has happened the last is kept.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .curve import Curve

DRAWN = 8
"""Workers that have curves of their own, at most; of a larger run, all workers together have."""
HAPPENED = 200
"""Things that happened to workers which are kept, at most."""
LIVES = 50
"""Lives of one worker that are kept, at most."""
EVALUATIONS = 400
"""Evaluations that are kept, at most: beyond that every second one is dropped, but for the last."""
RECENT = 50
"""Gradients of a worker by which its rate is told, and its loss."""


@dataclass
class Life:
    """From when to when a worker was there, in seconds of the run; ``how`` it ended: left or crashed."""

    since: float
    until: float | None = None
    how: str = ""


@dataclass
class WorkerView:
    """One worker, all its lives together."""

    gradients: int = 0
    lag: int = 0
    gap: float = math.nan
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    moments: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    """When its last gradients took effect, of this life."""
    joined: int = 0
    crashed: int = 0
    sent: float = 0.0
    """Bytes."""
    lives: deque[Life] = field(default_factory=lambda: deque(maxlen=LIVES))
    curve: Curve | None = None

    @property
    def alive(self) -> bool:
        return bool(self.lives) and self.lives[-1].until is None

    @property
    def loss(self) -> float:
        """Mean of its last losses."""
        return sum(self.losses) / len(self.losses) if self.losses else math.nan

    def rate(self, now: float) -> float:
        """Gradients per second of late; one that has brought none for longer than usual is counted as if it brought one now."""
        if not self.alive or len(self.moments) < 2:
            return 0.0
        first, last, count = self.moments[0], self.moments[-1], len(self.moments)
        usual = (last - first) / (count - 1)
        if now - last > 2 * usual:
            last, count = now, count + 1
        return (count - 1) / (last - first) if last > first else 0.0


class View:
    """A run, as far as its trace was `take`n."""

    def __init__(self) -> None:
        self.header: dict[str, Any] = {}
        self.seconds = 0.0
        """The time of what came last, in seconds of the run."""
        self.gradients = 0
        self.workers: dict[int, WorkerView] = {}
        self.curve = Curve()
        self.happened: deque[dict[str, Any]] = deque(maxlen=HAPPENED)
        self.evaluations: list[tuple[float, int, dict[str, float]]] = []
        """Seconds, gradients and figures."""
        self.extra: dict[str, float] = {}
        """The method's own figures, and the learning rate that a script has set, of the last gradient that had them."""

    def take(self, entry: Mapping[str, Any]) -> None:
        """The next line of the trace."""
        if "step" in entry:
            self._gradient(entry)
        elif "incident" in entry:
            self._incident(entry["incident"])
        elif "evaluation" in entry:
            self._evaluation(entry["evaluation"])
        elif "format" in entry:
            self.header = dict(entry)

    @property
    def alive(self) -> list[int]:
        """Numbers of the workers that are there."""
        return [number for number, worker in sorted(self.workers.items()) if worker.alive]

    @property
    def crashes(self) -> int:
        return sum(worker.crashed for worker in self.workers.values())

    def rate(self, now: float) -> float:
        """Gradients per second of all workers, of late."""
        return sum(worker.rate(now) for worker in self.workers.values())

    @property
    def loss(self) -> float:
        """Mean of the last losses of all workers; nan where none is known."""
        losses = [loss for worker in self.workers.values() for loss in worker.losses]
        return sum(losses) / len(losses) if losses else math.nan

    def _worker(self, number: int) -> WorkerView:
        if number not in self.workers:
            worker = self.workers[number] = WorkerView()
            if len(self.workers) <= DRAWN:
                worker.curve = Curve()
            else:
                for other in self.workers.values():
                    other.curve = None
        return self.workers[number]

    def _gradient(self, entry: Mapping[str, Any]) -> None:
        number, seconds = entry["worker"], entry["seconds"]
        loss, lag, gap = entry["loss"], entry["lag"], entry["gap"]
        worker = self.workers.get(number) or self._worker(number)
        self.seconds = max(self.seconds, seconds)
        self.gradients += 1
        worker.gradients += 1
        if not worker.alive:  # of a simulation, whose trace does not say that workers have joined
            worker.lives.append(Life(seconds if worker.lives else 0.0))
        worker.moments.append(seconds)
        worker.lag = lag
        worker.sent += entry.get("sent") or 0.0
        if gap is not None:
            worker.gap = gap
        if loss is not None:
            worker.losses.append(loss)
        if len(entry) >= len(COLUMNS):  # else it has no figures of its own
            self.extra |= {name: value for name, value in entry.items() if name not in COLUMNS and value is not None}
        if worker.curve is not None:
            worker.curve.at(seconds).add(loss, lag, gap)
        self.curve.at(seconds).add(loss, lag, gap)

    def _incident(self, incident: Mapping[str, Any]) -> None:
        number, seconds, what = incident["worker"], incident["seconds"], incident["what"]
        worker = self._worker(number)
        self.seconds = max(self.seconds, seconds)
        self.happened.append(dict(incident))
        if what == "joined":
            worker.joined += 1
            if not worker.alive:
                worker.lives.append(Life(seconds))
                worker.moments.clear()
        elif what in ("left", "crashed"):
            worker.crashed += what == "crashed"
            if worker.alive:
                worker.lives[-1].until, worker.lives[-1].how = seconds, what

    def _evaluation(self, evaluation: Mapping[str, Any]) -> None:
        figures = {name: math.nan if value is None else value for name, value in evaluation["figures"].items()}
        self.seconds = max(self.seconds, evaluation["seconds"])
        self.evaluations.append((evaluation["seconds"], evaluation["gradients"], figures))
        if len(self.evaluations) > EVALUATIONS:
            self.evaluations[:-1] = self.evaluations[:-1:2]


COLUMNS = {
    "seconds",
    "worker",
    "step",
    "lag",
    "gap",
    "normalised_gap",
    "loss",
    "compute",
    "waited",
    "sent",
    "transit",
    "extra",
}
"""What a gradient's line has for every method; ``extra`` has figures that are named alike."""
