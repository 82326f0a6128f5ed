"""EASGD: workers run on their own and are tied to a centre by a spring.

every period gradients:  d = alpha (x - centre);   x <- x - d;   centre <- centre + d
EASGD  local step:       x <- x - eta (g(x) + wd x)
EAMSGD local step:       v <- delta v - eta (g(x + delta v) + wd (x + delta v));   x <- x + v
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.descent import axpy, count
from ..core.method import ServerMethod
from ..core.schedule import Rate, rate, require_rate
from ..core.values import require, require_count, require_nonnegative


class Elastic(NamedTuple):
    x: Tensor  # parameters (x_i) [d]
    v: Tensor  # velocity, rate inside (v_i) [d]
    before: Tensor  # parameters before the last local step [d]
    step: Tensor  # step of the whole run: the server's at the last exchange plus own steps since, 0-dim


class Centre(NamedTuple):
    x: Tensor  # centre (x~) [d]
    step: Tensor  # gradients taken by all workers so far, 0-dim
    workers: Tensor  # workers present (p), 0-dim


@dataclass(frozen=True)
class EASGD(ServerMethod):
    """Elastic averaging SGD, asynchronous: the spring's moving rate is alpha = beta / workers.

    Zhang, Choromanska, LeCun. Deep learning with Elastic Averaging SGD. NIPS 2015. arXiv:1412.6651.
    Differences from the paper: the visit is atomic, so d is computed from the present centre and x + centre is conserved
    exactly. As in the author's program, d uses the parameters before the last local step and is taken off after it.
    The first exchange is after ``period`` gradients, not after one. The step of a schedule is the whole run's: the
    server's at the last exchange plus the worker's own since.
    Weight decay acts at the point of the gradient. The centre is evaluated. A worker that goes leaves in the centre what
    it has given, and what it had of its own is lost; one that comes starts at the centre, and alpha follows the count.
    """

    lr: Rate = 0.05
    """Learning rate (eta), above 0, or a schedule of the gradients taken by all workers together."""
    _: KW_ONLY
    beta: float = 0.9
    """Elastic rate of all workers together (beta = alpha p), in [0, 1]."""
    period: int = 4  # type: ignore[misc]
    """Local gradients between two exchanges (tau), at least 1."""
    weight_decay: float = 0.0
    """L2 penalty, at least 0."""

    def __post_init__(self) -> None:
        require_rate(self, "lr")
        require(self, "beta", 0 <= self.beta <= 1, "must be in [0, 1]: above 1 the spring overshoots")
        require_count(self, "period")
        require_nonnegative(self, "weight_decay")

    def init(self, start: tuple[Tensor, Tensor]) -> Elastic:
        x, step = start
        return Elastic(x, torch.zeros_like(x), x, step)

    def params(self, w: Elastic) -> Tensor:
        return w.x

    def local(self, w: Elastic, g: Tensor) -> Elastic:
        if self.weight_decay:
            g = axpy(self.weight_decay, w.x, g)
        return Elastic(axpy(-rate(self.lr, w.step), g, w.x), w.v, w.x, w.step + 1)

    def moved(self, w: Elastic, x: Tensor, begins: bool) -> Elastic:
        return w._replace(x=x)

    def push(self, w: Elastic) -> Tensor:
        return w.before

    def pull(self, w: Elastic, reply: tuple[Tensor, Tensor]) -> Elastic:
        d, step = reply
        return w._replace(x=w.x - d, step=step)

    def init_server(self, x: Tensor) -> Centre:
        return Centre(x, count(x), count(x))

    def admit(self, s: Centre) -> tuple[Centre, tuple[()], tuple[Tensor, Tensor]]:
        return s._replace(workers=s.workers + 1), (), (s.x, s.step)

    def leave(self, s: Centre, own: tuple[()]) -> Centre:
        return s._replace(workers=s.workers - 1)

    def serve(self, s: Centre, own: tuple[()], msg: Tensor) -> tuple[Centre, tuple[()], tuple[Tensor, Tensor]]:
        d = self.beta / s.workers * (msg - s.x)
        step = s.step + self.period
        return s._replace(x=s.x + d, step=step), own, (d, step)

    def master(self, s: Centre) -> Tensor:
        return s.x


@dataclass(frozen=True)
class EAMSGD(EASGD):
    """Elastic averaging with Nesterov momentum at each worker, kept there and never averaged.

    Zhang, Choromanska, LeCun. Deep learning with Elastic Averaging SGD. NIPS 2015. arXiv:1412.6651.
    Differences from the paper: as for EASGD. The velocity has the rate inside and is not rescaled when the rate changes.
    Weight decay acts at the look-ahead, the point of the gradient. The centre is evaluated.
    """

    momentum: float = 0.9
    """Nesterov momentum (delta) of each worker, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "momentum", 0 <= self.momentum < 1, "must be in [0, 1)")

    def params(self, w: Elastic) -> Tensor:
        return axpy(self.momentum, w.v, w.x)

    def local(self, w: Elastic, g: Tensor) -> Elastic:
        if self.weight_decay:
            g = axpy(self.weight_decay, self.params(w), g)
        v = axpy(-rate(self.lr, w.step), g, self.momentum * w.v)
        return Elastic(w.x + v, v, w.x, w.step + 1)

    def moved(self, w: Elastic, x: Tensor, begins: bool) -> Elastic:
        return w._replace(x=axpy(-self.momentum, w.v, x))
