"""Stale-synchronous parallel: a worker may be at most so many clocks ahead of the slowest."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import Tensor

from ..core.method import Message, ServerMethod
from ..core.values import require, require_kind
from .asgd import ASGD


@dataclass(frozen=True)
class SSP(ServerMethod):
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
        require_kind(self, "method", ServerMethod, "ASGD()")
        require(self, "bound", 0 <= self.bound <= math.inf, "must be at least 0, or inf")

    @property
    def period(self) -> int:  # type: ignore[override]
        return self.method.period

    def ready(self, s: Any, own: Any, clock: int, slowest: int) -> bool:
        return clock - slowest <= self.bound and self.method.ready(s, own, clock, slowest)

    # all else is the inner method's

    def check(self, n: int) -> None:
        self.method.check(n)

    def horizon(self, gradients: int, workers: int) -> int:
        return self.method.horizon(gradients, workers)

    def init(self, start: Any) -> Any:
        return self.method.init(start)

    def params(self, w: Any) -> Tensor:
        return self.method.params(w)

    def local(self, w: Any, g: Tensor) -> Any:
        return self.method.local(w, g)

    def length(self, w: Any) -> int:
        return self.method.length(w)

    def push(self, w: Any) -> Message:
        return self.method.push(w)

    def pull(self, w: Any, reply: Message) -> Any:
        return self.method.pull(w, reply)

    def init_server(self, x: Tensor) -> Any:
        return self.method.init_server(x)

    def admit(self, s: Any) -> tuple[Any, Any, Message]:
        return self.method.admit(s)

    def leave(self, s: Any, own: Any) -> Any:
        return self.method.leave(s, own)

    def sums(self, s: Any, own: Any, msg: Message) -> tuple[Tensor, ...]:
        return self.method.sums(s, own, msg)

    def serve(self, s: Any, own: Any, msg: Message, *sums: Tensor) -> tuple[Any, Any, Message]:
        return self.method.serve(s, own, msg, *sums)

    def refresh(self, s: Any, own: Any, reply: Message) -> tuple[Any, Message]:
        return self.method.refresh(s, own, reply)

    def master(self, s: Any) -> Tensor:
        return self.method.master(s)

    def measure(self, s: Any, own: Any, msg: Message) -> dict[str, Tensor]:
        return self.method.measure(s, own, msg)
