"""Overlap: the next gradient is taken while the last one is on its way, one exchange late.

at the worker, with x_k the reply to its gradient g_k:
    g_{k+1} is taken at x_{k-1}, while g_k goes out and x_k comes in
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..core.around import Around
from ..core.method import GradientServer, Message
from ..core.values import require_kind
from .asgd import ASGD


class Early(NamedTuple):
    w: Any  # the inner method's state, with the point of the next gradient
    reply: Any  # the reply that the gradient after it will use; None while it has not come


@dataclass(frozen=True)
class Overlap(Around):
    """A worker that never waits for the exchange, for one exchange of lag more, around any method of gradients.

    Li, Yu, Li, Avestimehr, Kim, Schwing. Pipe-SGD: A Decentralized Pipelined SGD Framework for Distributed Deep Net
    Training. NeurIPS 2018. arXiv:1811.03619.
    Differences from the paper: it pipelines an all-reduce, this a visit to the server; one exchange is under way at a time.
    The first two gradients of a worker are both taken at the point that it is given when it comes. In a real run the
    worker hands its gradient over and goes on at once; the simulator has the lag, and still lets it wait for the
    reply. The trace's lag counts from the reply that was used; a correction inside, by lag or by gap, counts from the last
    one that was sent, one exchange later.
    Weight decay, evaluation and what is kept for a worker are the inner method's.
    """

    late = True
    method: GradientServer = ASGD()
    """The method whose workers do not wait."""

    def __post_init__(self) -> None:
        require_kind(self, "method", GradientServer, "DanaZero()")

    def init(self, start: Any) -> Early:
        return Early(self.method.init(start), start)

    def params(self, w: Early) -> Tensor:
        return self.method.params(w.w)

    def local(self, w: Early, g: Tensor) -> Early:
        return w._replace(w=self.method.local(w.w, g))

    def length(self, w: Early) -> int:
        return self.method.length(w.w)

    def push(self, w: Early) -> Message:
        return self.method.push(w.w)

    def pull(self, w: Early, reply: Message) -> Early:
        return Early(self.method.pull(w.w, w.reply), reply)

    def arrived(self, w: Early, reply: Message) -> Early:
        return w._replace(reply=reply)
