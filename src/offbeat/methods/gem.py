"""GEM: each update is scaled so that what the others did plus what it does is what one momentum SGD step would do.

on gradient g from worker i:
    d     = -eta g
    m_i   <- mu m_i + d                                   the proxy: this worker's own momentum SGD
    pi    = clamp((kappa |m_i| - |theta - s_i|) / (|d| + eps), 0, pi_max)        elementwise
    s_i   <- theta;   theta <- theta + pi d
    send theta to i
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.descent import axpy, count
from ..core.method import GradientServer
from ..core.schedule import Rate, rate, require_rate
from ..core.values import require, require_nonnegative


class GEMState(NamedTuple):
    x: Tensor  # central variable (theta) [d]
    step: Tensor  # gradients applied so far, 0-dim


class GEMSeat(NamedTuple):
    m: Tensor  # first moment of this worker's updates, rate inside (m_i) [d]
    s: Tensor  # central variable just before this worker's last visit (s_i) [d]
    lr: Tensor  # rate of the last visit, 0-dim


class Visit(NamedTuple):
    m: Tensor  # the proxy's step (m_i) [d]
    moved: Tensor  # what the centre moved since the last visit, |theta - s_i| [d]
    pi: Tensor  # the scale before the clamp [d]
    u: Tensor  # what is added to theta [d]


@dataclass(frozen=True)
class GEM(GradientServer):
    """Gradient Energy Matching: asynchronous updates whose energy stays below that of momentum SGD, for any number of
    workers, which enters only through how far the centre moved between two visits of a worker.

    Hermans, Louppe. Gradient Energy Matching for Distributed Asynchronous Gradient Descent. arXiv:1805.08469 (alg. 1).
    Differences from the paper: the form of the authors' released code: pi is clamped to [0, pi_max] (without the lower
    clamp the method diverges), and the proxy bound is kappa |m|. Ours: eps is added to |d| and not to d, so that the
    bound max(kappa |m|, |theta - s|) holds to rounding; the moment, kept at the server, is rescaled when the rate
    changes (momentum correction); the visit is atomic.
    Weight decay, absent from the paper, acts at the central variable, inside the gradient. The central variable is
    evaluated. A worker that goes takes its moment with it; one that comes has none, and its first update is kappa
    times plain SGD.
    """

    lr: Rate = 0.01
    """Learning rate (eta), above 0, or a schedule of the gradients applied by all workers together."""
    _: KW_ONLY
    momentum: float = 0.9
    """Momentum of the proxy (mu), in [0, 1)."""
    kappa: float = 1.0
    """Energy granted, in units of the proxy's step, above 0; the authors report 2 to work well."""
    pi_max: float = 5.0
    """Upper clamp of the scale, above 0. With momentum 0.9 a constant gradient asks for 10, so 5 is a real limit."""
    eps: float = 1e-12
    """Added to |d|, above 0."""
    weight_decay: float = 0.0
    """L2 penalty, at least 0."""

    def __post_init__(self) -> None:
        require_rate(self, "lr")
        require(self, "momentum", 0 <= self.momentum < 1, "must be in [0, 1)")
        require(self, "kappa", 0 < self.kappa < math.inf, "must be a finite number above 0")
        require(self, "pi_max", self.pi_max > 0, "must be above 0")
        require(self, "eps", self.eps > 0, "must be above 0")
        require_nonnegative(self, "weight_decay")

    def init_server(self, x: Tensor) -> GEMState:
        return GEMState(x, count(x))

    def admit(self, s: GEMState) -> tuple[GEMState, GEMSeat, Tensor]:
        return s, GEMSeat(torch.zeros_like(s.x), s.x, torch.zeros_like(s.step)), s.x

    def leave(self, s: GEMState, own: GEMSeat) -> GEMState:
        return s

    def visit(self, s: GEMState, own: GEMSeat, g: Tensor) -> Visit:
        """What the worker's gradient ``g`` [d] does at the present centre."""
        lr = rate(self.lr, s.step)
        if self.weight_decay:
            g = axpy(self.weight_decay, s.x, g)
        d = -lr * g
        m = self.momentum * torch.where(own.lr > 0, lr / own.lr, 1.0) * own.m + d
        moved = (s.x - own.s).abs()
        pi = (self.kappa * m.abs() - moved) / (d.abs() + self.eps)
        return Visit(m, moved, pi, pi.clamp(0.0, self.pi_max) * d)

    def serve(self, s: GEMState, own: GEMSeat, msg: Tensor) -> tuple[GEMState, GEMSeat, Tensor]:
        v = self.visit(s, own, msg)
        x = s.x + v.u
        return GEMState(x, s.step + 1), GEMSeat(v.m, s.x, torch.zeros_like(own.lr) + rate(self.lr, s.step)), x

    def refresh(self, s: GEMState, own: GEMSeat, reply: Tensor) -> tuple[GEMSeat, Tensor]:
        return own, s.x

    def master(self, s: GEMState) -> Tensor:
        return s.x

    def measure(self, s: GEMState, own: GEMSeat, msg: Tensor) -> dict[str, Tensor]:
        """Kinetic energies per parameter, and the share of parameters at either clamp.

        ``energy`` is the mean of (theta + u - s)^2 / 2, what the worker sees the centre do; ``proxy`` the mean of
        (kappa m)^2 / 2, what momentum SGD would do (eqs. 8 to 18).
        """
        v = self.visit(s, own, msg)
        return {
            "energy": ((s.x + v.u - own.s) ** 2).mean() / 2,
            "proxy": ((self.kappa * v.m) ** 2).mean() / 2,
            "clamped": ((v.pi <= 0) | (v.pi >= self.pi_max)).to(v.pi.dtype).mean(),
        }
