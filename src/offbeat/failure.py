"""Failures have names. Each keeps the trace up to the moment it happened."""

from __future__ import annotations

from .trace import Trace


class Failure(RuntimeError):
    """A run that could not go on. ``trace`` is what was recorded until then."""

    def __init__(self, message: str, trace: Trace) -> None:
        super().__init__(message)
        self.trace = trace


class Diverged(Failure):
    """A worker's gradient or loss is not finite, or is not shaped like the parameters: ``worker`` and ``step`` say whose."""

    def __init__(self, message: str, trace: Trace, worker: int, step: int) -> None:
        super().__init__(message, trace)
        self.worker = worker
        self.step = step


class Deadlock(Failure):
    """Nodes wait for each other and nothing can happen any more; the message says who waits for whom."""


class WorkerLost(Failure):
    """No worker is left to take the gradients that remain."""
