"""Asynchronous local SGD: a worker takes H steps on its own, the server one outer step with what it moved.

worker:  H steps of the inner rule from theta;   g = theta at the start - theta at the end
server:  plain:              theta <- theta - eps g
         delayed Nesterov:   Delta <- Delta + g;   each N-th:  m <- beta m + Delta / N;  Delta <- 0
                             theta <- theta - eps (c beta m + g / N),   each N-th with 1 - c N + c in place of c
         buffered (FedBuff): each K-th:  theta <- theta - eps mean of the last K
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.descent import SGD, Rule, axpy, count
from ..core.method import ServerMethod
from ..core.schedule import Rate, rate, require_rate
from ..core.values import require, require_count, require_kind


class Sprinter(NamedTuple):
    start: Tensor  # parameters last received [d]
    x: Tensor  # local parameters [d]
    rule: Any  # the inner rule's own state
    steps: Tensor  # local steps until the next push, 0-dim


class OuterState(NamedTuple):
    x: Tensor  # the server's point (theta) [d]
    step: Tensor  # gradients taken by all workers so far, 0-dim
    visits: Tensor  # pseudo-gradients applied so far (t), 0-dim
    m: Tensor  # outer momentum [d]
    sum: Tensor  # pseudo-gradients that wait (Delta) [d]
    lead: Tensor  # gradients that the fastest worker has taken so far, 0-dim


class Pace(NamedTuple):
    steps: Tensor  # local steps that the worker was told to take, 0-dim
    lead: Tensor  # the fastest worker's gradients when it was told, 0-dim
    took: Tensor  # its own gradients, fading by a fifth at each visit, 0-dim
    passed: Tensor  # the fastest worker's in the same time, fading alike, 0-dim


Reply = tuple[Tensor, Tensor, Tensor]  # parameters, the server's step, local steps to take


@dataclass(frozen=True)
class AsyncLocalSGD(ServerMethod, name="async-local-sgd"):
    """Asynchronous local updates with plain outer SGD: robust without outer momentum.

    Liu, Chhaparia, Douillard, Kale, Rusu, Shen, Szlam, Ranzato. Asynchronous Local-SGD Training for Language Modeling.
    arXiv:2401.09135.
    Differences from the paper: no grace period and no choice of data shards. Inner buffers are kept from push to push.
    Inner schedules count gradients of the whole run: the server's at the last pull plus the worker's own since.
    Weight decay is the inner rule's, the server's point is evaluated. Nothing is kept for a worker but its pace; the steps
    of one that dies since its last push are lost.
    """

    rule: Rule = SGD(0.05)
    """How one gradient moves a worker's local parameters."""
    _: KW_ONLY
    period: int = 8  # type: ignore[misc]
    """Local steps between two pushes (H), at least 1."""
    outer_lr: Rate = 0.25
    """Outer learning rate (eps), above 0, or a schedule of the pseudo-gradients applied."""

    def __post_init__(self) -> None:
        require_kind(self, "rule", Rule, "SGD(0.05)")
        require_count(self, "period")
        require_rate(self, "outer_lr")

    # worker

    def init(self, start: Reply) -> Sprinter:
        x, step, steps = start
        return Sprinter(x, x, self.rule.init(x)._replace(step=step), steps)

    def params(self, w: Sprinter) -> Tensor:
        return w.x

    def length(self, w: Sprinter) -> int:
        return int(w.steps)

    def local(self, w: Sprinter, g: Tensor) -> Sprinter:
        rule, x = self.rule.step(w.rule, w.x, g)
        return w._replace(x=x, rule=rule)

    def moved(self, w: Sprinter, x: Tensor, begins: bool) -> Sprinter:
        return w._replace(x=x)  # part of what the next push brings, as the worker's steps are

    def push(self, w: Sprinter) -> Tensor:
        return w.start - w.x

    def pull(self, w: Sprinter, reply: Reply) -> Sprinter:
        x, step, steps = reply
        return Sprinter(x, x, w.rule._replace(step=step), steps)

    # server

    def init_server(self, x: Tensor) -> OuterState:
        return OuterState(x, count(x), count(x), torch.zeros_like(x), torch.zeros_like(x), count(x))

    def admit(self, s: OuterState) -> tuple[OuterState, Pace, Reply]:
        steps = count(s.x) + self.period
        return s, Pace(steps, s.lead, count(s.x), count(s.x)), (s.x, s.step, steps)

    def leave(self, s: OuterState, own: Pace) -> OuterState:
        return s

    def serve(self, s: OuterState, own: Pace, msg: Tensor) -> tuple[OuterState, Pace, Reply]:
        x, m, total = self.outer(s, msg, rate(self.outer_lr, s.visits))
        step = s.step + own.steps
        lead, own = self.pace(s, own)
        return OuterState(x, step, s.visits + 1, m, total, lead), own, (x, step, own.steps)

    def outer(self, s: OuterState, g: Tensor, lr: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The server's point, momentum and waiting sum after the pseudo-gradient ``g``. [d] each"""
        return axpy(-lr, g, s.x), s.m, s.sum

    def pace(self, s: OuterState, own: Pace) -> tuple[Tensor, Pace]:
        """The fastest worker's gradients after this visit, and the visitor's pace."""
        return s.lead, own

    def refresh(self, s: OuterState, own: Pace, reply: Reply) -> tuple[Pace, Reply]:
        return own, (s.x, s.step, own.steps)

    def master(self, s: OuterState) -> Tensor:
        return s.x


@dataclass(frozen=True)
class DelayedNesterov(AsyncLocalSGD):
    """Asynchronous local updates with delayed Nesterov momentum: the momentum moves only every ``buffer`` visits.

    Liu et al. Asynchronous Local-SGD Training for Language Modeling. arXiv:2401.09135 (DN).
    Differences from the paper: as for AsyncLocalSGD; the equations follow a public program that cites it. With buffer 1
    and c 0 it is Nesterov momentum on every pseudo-gradient. The division by N means that the outer rate counts N times.
    Weight decay is the inner rule's, the server's point is evaluated.
    """

    outer_lr: Rate = 0.8
    """Outer learning rate (eps), above 0, or a schedule of the pseudo-gradients applied; applied to g / buffer."""
    outer_momentum: float = 0.5
    """Outer momentum (beta), in [0, 1)."""
    buffer: int = 8
    """Visits between two moves of the momentum (N), at least 1; about the number of workers."""
    c: float = 0.0
    """Share of the momentum that each visit in between applies (c), in [0, 1 / buffer]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "outer_momentum", 0 <= self.outer_momentum < 1, "must be in [0, 1)")
        require_count(self, "buffer")
        require(self, "c", 0 <= self.c * self.buffer <= 1, f"must be in [0, 1 / {self.buffer}]")

    def outer(self, s: OuterState, g: Tensor, lr: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = s.sum + g
        due = (s.visits + 1) % self.buffer == 0
        m = torch.where(due, self.outer_momentum * s.m + total / self.buffer, s.m)
        applied = self.outer_momentum * (self.c + due.to(s.visits.dtype) * (1 - self.c * self.buffer))
        return axpy(-lr, applied * m + g / self.buffer, s.x), m, torch.where(due, 0.0, total)


@dataclass(frozen=True)
class DyLU(DelayedNesterov, name="dylu"):
    """Delayed Nesterov with dynamic local updates: a worker's H follows its speed, so that all push at one pace.

    Liu et al. Asynchronous Local-SGD Training for Language Modeling. arXiv:2401.09135 (DN + DyLU): H_i = floor(v_i /
    max v * H).
    Differences from the paper: a method knows no seconds, so its clock is the fastest worker's gradients: v_i / max v is
    what a worker took between two of its visits over what the fastest did, older visits fading by a fifth each.
    Weight decay is the inner rule's, the server's point is evaluated. When the fastest worker goes, the next takes its place.
    """

    def pace(self, s: OuterState, own: Pace) -> tuple[Tensor, Pace]:
        lead = torch.maximum(s.lead, own.lead + own.steps)
        took, passed = 0.8 * own.took + own.steps, 0.8 * own.passed + (lead - own.lead)
        steps = (took / passed * self.period + 1e-9).floor().clamp(min=1.0)
        return lead, Pace(steps, lead, took, passed)


@dataclass(frozen=True)
class FedBuff(AsyncLocalSGD, name="fedbuff"):
    """Buffered asynchronous averaging: an outer step with the mean of every ``buffer`` pseudo-gradients.

    Nguyen et al. Federated Learning with Buffered Asynchronous Aggregation. AISTATS 2022. arXiv:2106.06639.
    Differences from the paper: no secure aggregation and no weights by staleness; workers are always the same ones. The
    step is along the mean of the K pseudo-gradients, so that a rate means the same for any K; the authors' program adds
    them up: its rate eta is ``outer_lr = buffer * eta`` here.
    Weight decay is the inner rule's, the server's point is evaluated.
    """

    outer_lr: Rate = 1.0
    """Outer learning rate, above 0, or a schedule of the pseudo-gradients received."""
    buffer: int = 4
    """Pseudo-gradients in an outer step (K), at least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self, "buffer")

    def outer(self, s: OuterState, g: Tensor, lr: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = s.sum + g
        due = (s.visits + 1) % self.buffer == 0
        return torch.where(due, axpy(-lr / self.buffer, total, s.x), s.x), s.m, torch.where(due, 0.0, total)
