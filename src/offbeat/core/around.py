"""Server methods around another one: all that they do not write is the inner method's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .method import Message, ServerMethod
from .values import require_kind


@dataclass(frozen=True)
class Around(ServerMethod):
    """A server method that changes one thing of ``method``."""

    method: ServerMethod
    """The method inside."""

    def __post_init__(self) -> None:
        require_kind(self, "method", ServerMethod, "ASGD()")

    @property
    def period(self) -> int:  # type: ignore[override]
        return self.method.period

    @property
    def late(self) -> bool:  # type: ignore[override]
        return self.method.late

    def arrived(self, w: Any, reply: Message) -> Any:
        return self.method.arrived(w, reply)

    @property
    def gated(self) -> bool:  # type: ignore[override]
        return self.method.gated

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

    def moved(self, w: Any, x: Tensor, begins: bool) -> Any | None:
        return self.method.moved(w, x, begins)

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

    def ready(self, s: Any, own: Any, clock: int, slowest: int) -> bool:
        return self.method.ready(s, own, clock, slowest)

    def refresh(self, s: Any, own: Any, reply: Message) -> tuple[Any, Message]:
        return self.method.refresh(s, own, reply)

    def master(self, s: Any) -> Tensor:
        return self.method.master(s)

    def measure(self, s: Any, own: Any, msg: Message) -> dict[str, Tensor]:
        return self.method.measure(s, own, msg)
