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
    given: Tensor  # how many of them by workers who are still there, 0-dim
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
    Weight decay is the rule's, at the server's point, which is evaluated.
    A round ends when all workers but ``backups`` that are present, at least one, have given to it; its step is along the
    mean of all gradients that were given. One that crashes while it waits leaves its gradient in that mean, which then
    has one more: nobody is waited for in its place and nobody present is passed over for it. One that goes before it has
    given is waited for no more. One that comes takes part in the round that is under way, at that round's parameters. A
    round that everybody has gone from ends with those who come next.
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
        return Synchronous(x, self.rule.init(x), torch.zeros_like(x), count(x), count(x), count(x))

    def admit(self, s: Synchronous) -> tuple[Synchronous, Place, Tensor]:
        return s._replace(workers=s.workers + 1), Place(s.rule.step, s.rule.step - 1), s.x

    def leave(self, s: Synchronous, own: Place) -> Synchronous:
        given = torch.where(own.until == s.rule.step, s.given - 1, s.given)  # it waits, as it has given to this round
        return self.close(s._replace(given=given, workers=s.workers - 1))

    def serve(self, s: Synchronous, own: Place, msg: Tensor) -> tuple[Synchronous, Place, Tensor]:
        timely = own.sent == s.rule.step
        until = torch.where(timely, s.rule.step, s.rule.step - 1)
        total = torch.where(timely, s.sum + msg, s.sum)
        s = self.close(s._replace(sum=total, came=s.came + timely, given=s.given + timely))
        return s, Place(s.rule.step, until), s.x

    def close(self, s: Synchronous) -> Synchronous:
        """The state with the round's step taken, if all the gradients that it waits for have come.

        Whoever waits has given, so it is full at the latest when all who are present wait: nobody waits for ever. And a
        worker that gave and goes takes one off both sides, so that its going ends no round."""
        full = s.given >= (s.workers - self.backups).clamp(min=1.0)
        rule, x = self.rule.step(s.rule, s.x, s.sum / s.came.clamp(min=1.0))
        x, total = torch.where(full, x, s.x), torch.where(full, 0.0, s.sum)
        kept = rule._make(torch.where(full, new, old) for new, old in zip(rule, s.rule, strict=True))
        came, given = torch.where(full, 0.0, s.came), torch.where(full, 0.0, s.given)
        return Synchronous(x, kept, total, came, given, s.workers)

    def ready(self, s: Synchronous, own: Place, clock: int, slowest: int) -> bool:
        return bool(own.until < s.rule.step)

    def refresh(self, s: Synchronous, own: Place, reply: Tensor) -> tuple[Place, Tensor]:
        return own._replace(sent=s.rule.step), s.x

    def master(self, s: Synchronous) -> Tensor:
        return s.x
