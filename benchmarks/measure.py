"""Timing two things against each other within one run: in turn, repeated, as ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measured figure: what it is, its unit, and its value in each repeat."""

    what: str
    unit: str
    values: tuple[float, ...]

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def high(self) -> float:
        return max(self.values)


def seconds(act: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def ratio(what: str, ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> Row:
    """Our seconds over theirs, measured in turn after one call of each that does not count."""
    ours(), theirs()
    return Row(what, "x", tuple(seconds(ours) / seconds(theirs) for _ in range(repeats)))
