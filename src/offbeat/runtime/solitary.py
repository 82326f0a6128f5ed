"""A peer without a run: what a script does when nobody has launched it."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from ..core.method import Method
from ..core.protocol import AllReduce, Begin, Gradient, Inbox, Loop, Node, Recv, Request, loop
from .leases import Lease, Leases
from .worker import Driver, Terms


class Solitary(Driver):
    """A peer that nobody joins: what a script does when nobody has launched it."""

    def __init__(self, method: Method, x0: Tensor, log: logging.Logger) -> None:
        super().__init__(log)
        method.check(1)
        self.method, self.table = method, Leases()
        self.table.join(0)
        self.terms = Terms(0, method, 0, 1, 0, None)
        self._set_out(x0)

    def _set_out(self, x: Tensor) -> None:
        self.node = Node(0, self.method, self.method.init(x))
        self.loop: Loop = loop(self.method, self.node)
        self._drive(next(self.loop))

    def moved(self, x: Tensor, before: Tensor | None) -> bool:
        if self.node.step:
            return super().moved(x, before)
        self._set_out(x)  # nothing has happened yet: the run begins there
        return True

    def step(self, g: Tensor, loss: float) -> None:
        self.brought, self.unstepped = self.unstepped, []
        g = self._finite(g)
        if isinstance(self.request, Begin):
            self._drive(self.loop.send(None))
        self._drive(self.loop.send(g))

    def _settle(self, leases: list[Lease], well: bool) -> None:
        if well:
            self.table.use(0, leases)
        elif aside := self.table.fail(0, leases):
            self.log.warning(f"set aside, as twice its gradient was not finite: {', '.join(map(str, aside))}")

    def _drive(self, request: Request) -> None:
        while not isinstance(request, Gradient | Begin):
            if isinstance(request, AllReduce):
                answer = request.msg
            else:
                answer = {} if isinstance(request, Recv) else [] if isinstance(request, Inbox) else None
            request = self.loop.send(answer)
        self.request = request

    def more(self, note: dict[str, Any]) -> dict[str, Any]:
        return self.table.hear(0, {**note, "back": self._back()})

    def master(self) -> Tensor:
        x: Tensor = self.method.params(self.node.state)
        return x

    def _leave(self, done: bool) -> None:
        pass
