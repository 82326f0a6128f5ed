"""A server's handler as one compiled kernel that writes into spare buffers, which then change places with the state's.

Eager, a handler makes a dozen passes over the vectors and as many new ones; fused it makes one. Nothing is written over
what it reads, so a visit that fails leaves everything as it was, and an output that is an input (a server that keeps the
old point as the worker's copy) is right.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.method import Message, ServerMethod
from .message import leaves, rebuild

SMALLEST = 500_000
"""Parameters from which a fused handler gains more than its launch costs."""


class Kernel:
    """``serve`` of a method for one size of model. Call it with states and a message; give back what is not needed."""

    def __init__(self, method: ServerMethod, x: Tensor) -> None:
        """Compiles, which takes seconds, for models like ``x`` [d]; raises where there is no compiler that works."""
        if x.is_cpu and not any(map(shutil.which, ("g++", "clang++", "c++"))):
            raise RuntimeError("no C++ compiler was found")

        s, own, reply = method.admit(method.init_server(torch.zeros_like(x)))
        push = method.push(method.local(method.init(reply), torch.zeros_like(x)))
        like = s, own, push

        def kernel(into: list[Tensor], out: list[Tensor]) -> list[Tensor]:
            results = leaves(method.serve(*rebuild(like, into)))
            for buffer, t in zip(out, [t for t in results if t.dim()], strict=True):
                buffer.copy_(t)
            return [t.clone() for t in results if not t.dim()]  # a fused copy into a 0-dim buffer is lost (torch 2.13)

        self.method, self.zero, self.device = method, torch.zeros_like(x), x.device
        self.fused = torch.compile(kernel, fullgraph=True, dynamic=False)
        self.like = method.serve(s, own, push)
        self.spares: dict[int, deque[list[Tensor]]] = {part: deque() for part in range(3)}
        self(s, own, push)  # compiles
        self.like = rebuild(self.like, [torch.empty_like(t, device="meta") for t in leaves(self.like)])

    def __call__(self, s: Any, own: Any, msg: Message) -> tuple[Any, Any, Message]:
        """What ``serve`` gives, in spare buffers."""
        out = [self.spares[k].pop() if self.spares[k] else self._new(part) for k, part in enumerate(self.like)]
        vectors = [t for part in out for t in part]
        into = [
            t.detach() for t in leaves((s, own, msg))
        ]  # all distinct: else each way to be the same is compiled apart
        scalars, rest = iter(self.fused(into, vectors)), iter(vectors)
        whole = [next(rest) if t.dim() else next(scalars) for t in leaves(self.like)]
        state, mine, reply = rebuild(self.like, whole)
        return state, mine, reply

    def spare(self, part: int, value: Any) -> None:
        """``value`` is needed no more: a shared state (``part`` 0), a worker's (1) or a reply (2).

        Its buffers are taken back if they are the kernel's own; what came from elsewhere may have other owners.
        """
        vectors = [t for t in leaves(value) if t.dim()]
        if all(getattr(t, "kernel", None) is self for t in vectors):
            self.spares[part].append(vectors)

    def race(self, repeats: int = 3) -> tuple[float, float]:
        """Seconds of a visit, eager and fused, the best of some."""
        s, own, reply = self.method.admit(self.method.init_server(self.zero))
        push = self.method.push(self.method.local(self.method.init(reply), self.zero))
        best = [math.inf, math.inf]
        for _ in range(repeats):
            handlers: tuple[Callable[..., Any], ...] = (self.method.serve, self)
            for k, handler in enumerate(handlers):
                start = time.perf_counter()
                new = handler(s, own, push)
                best[k] = min(best[k], time.perf_counter() - start)
                for part, value in enumerate(new):
                    self.spare(part, value)
        del self.zero
        return best[0], best[1]

    def _new(self, part: Any) -> list[Tensor]:
        buffers = [torch.empty_like(t, device=self.device) for t in leaves(part) if t.dim()]
        for t in buffers:
            t.kernel = self  # type: ignore[attr-defined]
        return buffers
