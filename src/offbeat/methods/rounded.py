"""Rounded messages: both directions in half precision, at half the bytes; states stay as precise as they were."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..core.around import Around
from ..core.method import Message, ServerMethod
from ..core.values import require
from .asgd import ASGD


class Marked(NamedTuple):
    state: Any  # the inner method's state
    mark: Tensor  # an empty number of the model's dtype, 0-dim


@dataclass(frozen=True)
class Rounded(Around):
    """Messages of half as many bytes, around any server method; what the server and the workers keep is not rounded.

    Micikevicius et al. Mixed Precision Training. ICLR 2018. arXiv:1710.03740.
    Differences from the paper: only what is sent is rounded, to the nearest, with no scale. The relative error of each
    number is at most 2^-8 in bfloat16, which has float32's range, and 2^-11 in float16 for sizes from 6e-5 to 65504;
    smaller ones lose digits, and a larger one becomes infinite, which the server refuses as it does all that is not
    finite. A worker's point is so far from the one that was sent, and a correction that compares the two does not see
    that. What is sent along as a number of its own (a step, a length) is not rounded.
    Weight decay, evaluation and what is kept for a worker are the inner method's.
    """

    method: ServerMethod = ASGD()
    """The method whose messages are rounded."""
    _: KW_ONLY
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """What vectors are sent as."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "dtype", self.dtype in ("bfloat16", "float16"), "must be 'bfloat16' or 'float16'")

    def init(self, start: tuple[Message, Tensor]) -> Marked:
        reply, mark = start
        return Marked(self.method.init(_cast(reply, mark.dtype)), mark)

    def params(self, w: Marked) -> Tensor:
        return self.method.params(w.state)

    def local(self, w: Marked, g: Tensor) -> Marked:
        return w._replace(state=self.method.local(w.state, g))

    def moved(self, w: Marked, x: Tensor, begins: bool) -> Marked | None:
        state = self.method.moved(w.state, x, begins)
        return None if state is None else w._replace(state=state)

    def length(self, w: Marked) -> int:
        return self.method.length(w.state)

    def push(self, w: Marked) -> Message:
        return self._rounded(self.method.push(w.state))

    def pull(self, w: Marked, reply: tuple[Message, Tensor] | None) -> Marked:
        return w._replace(state=self.method.pull(w.state, None if reply is None else _widened(*reply)))

    def arrived(self, w: Marked, reply: tuple[Message, Tensor]) -> Marked:
        return w._replace(state=self.method.arrived(w.state, _widened(*reply)))

    def init_server(self, x: Tensor) -> Marked:
        return Marked(self.method.init_server(x), torch.zeros_like(x[0]))

    def admit(self, s: Marked) -> tuple[Marked, Any, tuple[Message, Tensor]]:
        state, own, reply = self.method.admit(s.state)
        return s._replace(state=state), own, (self._rounded(reply), s.mark)

    def leave(self, s: Marked, own: Any) -> Marked:
        return s._replace(state=self.method.leave(s.state, own))

    def sums(self, s: Marked, own: Any, msg: Message) -> tuple[Tensor, ...]:
        return self.method.sums(s.state, own, _cast(msg, s.mark.dtype))

    def serve(self, s: Marked, own: Any, msg: Message, *sums: Tensor) -> tuple[Marked, Any, tuple[Message, Tensor]]:
        state, own, reply = self.method.serve(s.state, own, _cast(msg, s.mark.dtype), *sums)
        return s._replace(state=state), own, (self._rounded(reply), s.mark)

    def ready(self, s: Marked, own: Any, clock: int, slowest: int) -> bool:
        return self.method.ready(s.state, own, clock, slowest)

    def refresh(self, s: Marked, own: Any, reply: tuple[Message, Tensor]) -> tuple[Any, Message]:
        own, new = self.method.refresh(s.state, own, _widened(*reply))
        return own, (self._rounded(new), s.mark)

    def master(self, s: Marked) -> Tensor:
        return self.method.master(s.state)

    def measure(self, s: Marked, own: Any, msg: Message) -> dict[str, Tensor]:
        return self.method.measure(s.state, own, _cast(msg, s.mark.dtype))

    def _rounded(self, message: Message) -> Message:
        return _cast(message, getattr(torch, self.dtype))


def _cast(message: Message, dtype: torch.dtype) -> Message:
    """``message`` with its vectors in ``dtype``."""
    if isinstance(message, Tensor):
        return message.to(dtype) if message.dim() else message
    parts = [_cast(part, dtype) for part in message]
    return message._make(parts) if hasattr(message, "_make") else tuple(parts)


def _widened(message: Message, mark: Tensor) -> Message:
    """A reply as the model has it."""
    return _cast(message, mark.dtype)
