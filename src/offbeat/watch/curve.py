"""What many gradients come to: in a few numbers, and over the time of a run in a few hundred, however long it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

BINS = 240
"""Points of a curve, at most; at least half of them as soon as a run has lasted for some milliseconds."""
FINEST = 2.0**-10
"""Seconds of a bin at first; they double whenever the run is longer than all bins."""


@dataclass(slots=True)
class Sums:
    """Of some gradients: how many there were, and the sums of what is known of them."""

    gradients: int = 0
    loss: float = 0.0
    losses: int = 0  # that are known
    lag: int = 0
    most: int = 0  # the largest lag
    gap: float = 0.0
    gaps: int = 0  # that are known

    def add(self, loss: float | None, lag: int, gap: float | None) -> None:
        """One more gradient."""
        self.gradients += 1
        self.lag += lag
        if lag > self.most:
            self.most = lag
        if loss is not None:
            self.loss += loss
            self.losses += 1
        if gap is not None:
            self.gap += gap
            self.gaps += 1

    def merge(self, other: Sums) -> None:
        """All those of ``other``, too."""
        self.gradients += other.gradients
        self.lag += other.lag
        self.most = max(self.most, other.most)
        self.loss += other.loss
        self.losses += other.losses
        self.gap += other.gap
        self.gaps += other.gaps

    def means(self) -> dict[str, float]:
        """Mean loss, lag and gap, nan where nothing is known, and the largest lag."""
        return {
            "loss": _mean(self.loss, self.losses),
            "lag": _mean(self.lag, self.gradients),
            "lag_max": self.most if self.gradients else math.nan,
            "gap": _mean(self.gap, self.gaps),
        }


class Curve:
    """Gradients of a run, or of one of its workers, by the time at which they took effect."""

    def __init__(self) -> None:
        self.width = FINEST
        self._bins: list[Sums] = []

    def at(self, seconds: float) -> Sums:
        """The bin of a gradient at ``seconds``."""
        k = int(seconds / self.width)
        if k >= BINS:
            self._widen(seconds)
            k = int(seconds / self.width)
        while k >= len(self._bins):
            self._bins.append(Sums())
        return self._bins[k]

    def until(self, seconds: float) -> list[Sums]:
        """All bins up to ``seconds``: as many, and as wide, for all curves of a run."""
        self._widen(seconds)
        count = int(seconds / self.width) + 1
        return (self._bins + [Sums() for _ in range(count - len(self._bins))])[:count]

    def _widen(self, seconds: float) -> None:
        while seconds / self.width >= BINS:
            self.width *= 2
            for one, other in zip(self._bins[::2], self._bins[1::2], strict=False):
                one.merge(other)
            self._bins = self._bins[::2]


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan
