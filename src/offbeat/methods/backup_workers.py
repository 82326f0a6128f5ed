"""Backup workers: a synchronous step takes the first gradients of the step to come, and refuses the late ones."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.descent import SGD, Rule, count
from ..core.method import GradientServer
from ..core.values import require, require_count, require_kind


class Synchronous(NamedTuple):
    x: Tensor  # parameters [d]
    rule: Any  # the rule's own state; its step is the number of the round
    sum: Tensor  # gradients of this round [d]
    came: Tensor  # how many, 0-dim
    workers: Tensor  # workers present, 0-dim


class Place(NamedTuple):
    sent: Tensor  # the round whose parameters the worker was last sent, 0-dim
    until: Tensor  # the round that must be over before it gets new ones, 0-dim


@dataclass(frozen=True)
class BackupWorkers(GradientServer):
    """Synchronous SGD at a server with ``backups`` workers more than gradients in a step; 0 is plain synchronous SGD.

    Chen, Pan, Monga, Bengio, Jozefowicz. Revisiting Distributed Synchronous SGD. ICLR 2016 workshop. arXiv:1604.00981.
    Differences from the paper: any rule takes the step. A late gradient is refused by the number of its round, and its
    worker gets the new parameters at once. Schedules count rounds.
    Weight decay is the rule's, at the server's point, which is evaluated. A worker that goes leaves in the sum what it has
    given; the round then needs one gradient less, at least one.
    """

    gated = True
    rule: Rule = SGD(0.05, momentum=0.9, nesterov=True)
    """How the mean gradient of a round moves the parameters."""
    _: KW_ONLY
    backups: int = 0
    """Workers whose gradient a round does not wait for (b), at least 0."""

    def __post_init__(self) -> None:
        require_kind(self, "rule", Rule, "SGD(0.05)")
        require_count(self, "backups", least=0)

    def check(self, n: int) -> None:
        require(self, "backups", self.backups < n, f"must be below the number of workers, {n}")

    def horizon(self, gradients: int, workers: int) -> int:
        return max(1, gradients // workers)

    def init_server(self, x: Tensor) -> Synchronous:
        return Synchronous(x, self.rule.init(x), torch.zeros_like(x), count(x), count(x))

    def admit(self, s: Synchronous) -> tuple[Synchronous, Place, Tensor]:
        return s._replace(workers=s.workers + 1), Place(s.rule.step, s.rule.step - 1), s.x

    def leave(self, s: Synchronous, own: Place) -> Synchronous:
        return self.close(s._replace(workers=s.workers - 1))

    def serve(self, s: Synchronous, own: Place, msg: Tensor) -> tuple[Synchronous, Place, Tensor]:
        timely = own.sent == s.rule.step
        until = torch.where(timely, s.rule.step, s.rule.step - 1)
        s = self.close(s._replace(sum=torch.where(timely, s.sum + msg, s.sum), came=s.came + timely))
        return s, Place(s.rule.step, until), s.x

    def close(self, s: Synchronous) -> Synchronous:
        """The state with the round's step taken, if all the gradients that it waits for have come."""
        full = s.came >= (s.workers - self.backups).clamp(min=1.0)
        rule, x = self.rule.step(s.rule, s.x, s.sum / s.came.clamp(min=1.0))
        x, total = torch.where(full, x, s.x), torch.where(full, 0.0, s.sum)
        kept = rule._make(torch.where(full, new, old) for new, old in zip(rule, s.rule, strict=True))
        return Synchronous(x, kept, total, torch.where(full, 0.0, s.came), s.workers)

    def ready(self, s: Synchronous, own: Place, clock: int, slowest: int) -> bool:
        return bool(own.until < s.rule.step)

    def refresh(self, s: Synchronous, own: Place, reply: Tensor) -> tuple[Place, Tensor]:
        return own._replace(sent=s.rule.step), s.x

    def master(self, s: Synchronous) -> Tensor:
        return s.x
