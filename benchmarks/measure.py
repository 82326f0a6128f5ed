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
    """At least one; not a number: it could not be measured, and ``note`` says why."""
    group: str = ""
    """What it stands together with, in the table and the picture."""
    note: str = ""
    """What one must know of it, such as a version."""
    aim: float | None = None
    """The value that it should reach."""
    less: bool = False
    """Whether less is better."""
    peer: bool = False
    """Whether it is a figure of somebody else's software."""

    @property
    def missed(self) -> bool:
        """Whether the median is short of the aim."""
        if self.aim is None:
            return False
        return self.median > self.aim if self.less else self.median < self.aim

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def high(self) -> float:
        return max(self.values)


def over(ours: Row, theirs: Row, what: str, group: str = "", aim: float | None = None) -> Row:
    """Two rows of as many repeats as a ratio; not a number where one of them is not."""
    return Row(what, "x", tuple(a / b for a, b in zip(ours.values, theirs.values, strict=False)), group, aim=aim)


def seconds(act: Callable[[], object]) -> float:
    """How long one call takes."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def ratio(what: str, ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> Row:
    """Our seconds over theirs, measured in turn after one call of each that does not count."""
    ours(), theirs()
    return Row(what, "x", tuple(seconds(ours) / seconds(theirs) for _ in range(repeats)))
