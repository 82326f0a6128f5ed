"""Downpour: a worker takes a few steps on its own, then sends their sum and fetches the master.

worker:  period times  a <- a - eta (g + wd x),  x <- x - eta (g + wd x);   send a;   a <- 0
master:  theta <- theta + a;   send theta
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.descent import axpy, count
from ..core.method import ServerMethod
from ..core.schedule import Rate, rate, require_rate
from ..core.values import require_count, require_nonnegative


class Walker(NamedTuple):
    x: Tensor  # local parameters [d]
    a: Tensor  # steps taken since the last exchange, summed [d]
    step: Tensor  # step of the whole run: the server's at the last exchange plus own steps since, 0-dim


class Sum(NamedTuple):
    x: Tensor  # master (theta) [d]
    step: Tensor  # gradients applied so far, 0-dim


@dataclass(frozen=True)
class Downpour(ServerMethod):
    """Downpour SGD: accumulated local steps, one exchange every ``period`` gradients; period 1 is plain ASGD.

    Dean et al. Large Scale Distributed Deep Networks. NIPS 2012.
    Differences from the paper: plain SGD where the original has Adagrad at the server; pushing and fetching share one
    period and one visit; the first exchange is after ``period`` gradients, not after one.
    The step of a schedule is the whole run's: the server's at the last exchange plus the worker's own since.
    Weight decay acts at the worker's point. The master is evaluated. Nothing is kept for a worker; the unsent part of one
    that dies is lost.
    """

    lr: Rate = 0.05
    """Learning rate (eta), above 0, or a schedule of the gradients taken by all workers together."""
    _: KW_ONLY
    period: int = 1  # type: ignore[misc]
    """Local gradients between two exchanges, at least 1."""
    weight_decay: float = 0.0
    """L2 penalty, at least 0."""

    def __post_init__(self) -> None:
        require_rate(self, "lr")
        require_count(self, "period")
        require_nonnegative(self, "weight_decay")

    def init(self, start: tuple[Tensor, Tensor]) -> Walker:
        x, step = start
        return Walker(x, torch.zeros_like(x), step)

    def params(self, w: Walker) -> Tensor:
        return w.x

    def local(self, w: Walker, g: Tensor) -> Walker:
        if self.weight_decay:
            g = axpy(self.weight_decay, w.x, g)
        d = rate(self.lr, w.step) * g
        return Walker(w.x - d, w.a - d, w.step + 1)

    def push(self, w: Walker) -> Tensor:
        return w.a

    def pull(self, w: Walker, reply: tuple[Tensor, Tensor]) -> Walker:
        return self.init(reply)

    def init_server(self, x: Tensor) -> Sum:
        return Sum(x, count(x))

    def admit(self, s: Sum) -> tuple[Sum, tuple[()], tuple[Tensor, Tensor]]:
        return s, (), (s.x, s.step)

    def leave(self, s: Sum, own: tuple[()]) -> Sum:
        return s

    def serve(self, s: Sum, own: tuple[()], msg: Tensor) -> tuple[Sum, tuple[()], tuple[Tensor, Tensor]]:
        s = Sum(s.x + msg, s.step + self.period)
        return s, own, (s.x, s.step)

    def refresh(self, s: Sum, own: tuple[()], reply: tuple[Tensor, Tensor]) -> tuple[tuple[()], tuple[Tensor, Tensor]]:
        return own, (s.x, s.step)

    def master(self, s: Sum) -> Tensor:
        return s.x
