"""The event core: a virtual clock and a heap of what happens next."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Clock:
    """Calls what was scheduled, in the order of (time, priority, time of scheduling)."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = 0

    def at(self, time: float, priority: int, act: Callable[..., None], *args: Any) -> None:
        """Call ``act(*args)`` at ``time``; among equal times a lower ``priority`` goes first."""
        heapq.heappush(self._heap, (time, priority, self._serial, act, args))
        self._serial += 1

    def busy(self, priority: int) -> bool:
        """Whether anything of this ``priority`` or a lower one is due at this very time."""
        return bool(self._heap) and self._heap[0][0] == self.now and self._heap[0][1] <= priority

    def clear(self) -> None:
        """Let nothing of what was scheduled happen."""
        self._heap.clear()

    def step(self) -> bool:
        """Let the next thing happen; False when there is nothing left."""
        if not self._heap:
            return False
        self.now, _, _, act, args = heapq.heappop(self._heap)
        act(*args)
        return True
