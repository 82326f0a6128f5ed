"""Stale-synchronous parallel: a worker may be at most so many clocks ahead of the slowest."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

from ..core.around import Around
from ..core.method import ServerMethod
from ..core.values import require
from .asgd import ASGD


@dataclass(frozen=True)
class SSP(Around):
    """A bound on staleness around any server method: replies wait until the slowest has caught up.

    Ho et al. More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server. NIPS 2013.
    Differences from the paper: a clock is a visit. A reply that has waited is made anew when it goes out, so a worker at
    clock c reads all updates of clock c - bound - 1 and before, and maybe later ones. Bound 0 is bulk-synchronous,
    infinity the method itself.
    Weight decay, evaluation and what is kept for a worker are the inner method's. A worker that goes holds nobody up; one
    that comes starts at the slowest clock.
    """

    gated = True
    method: ServerMethod = ASGD()
    """The method whose workers are bound."""
    _: KW_ONLY
    bound: float = 3.0
    """Clocks that a worker may be ahead of the slowest (s), at least 0; inf: no bound."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "bound", 0 <= self.bound <= math.inf, "must be at least 0, or inf")

    def ready(self, s: Any, own: Any, clock: int, slowest: int) -> bool:
        return clock - slowest <= self.bound and self.method.ready(s, own, clock, slowest)
