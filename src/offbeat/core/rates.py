"""The rate of a method's gradients, and one that is set while the run goes on."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

from torch import Tensor

from .descent import Rule
from .method import Method
from .schedule import Rate, Schedule

M = TypeVar("M", bound=Method)


class Dial(Schedule):
    """A rate that is what it was set to last, whatever the step: what a script's own scheduler sets.

    It is the one schedule that is no value: two are equal where they are the same. As long as nobody turns it, a method with a
    dial has the bits of one with the number.
    """

    value: float | Tensor
    """The rate, at least 0; a tensor is 0-dim."""

    def __init__(self, value: float | Tensor) -> None:
        self.value = value

    def at(self, step: Tensor) -> Tensor:
        return self.value  # type: ignore[return-value]  # a number where it is one: see `rate`

    def __repr__(self) -> str:
        return repr(self.value)  # a method shows the number that it has now

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def rate_of(method: Method) -> Rate | None:
    """The rate with which gradients are taken: the method's ``lr``, its rule's, or that of the method inside. None: it has none."""
    for f in fields(method):
        part = getattr(method, f.name)
        if f.name == "lr":
            return part  # type: ignore[no-any-return]
        if isinstance(part, Rule):
            return part.lr
        if isinstance(part, Method):
            return rate_of(part)
    return None


def dial_of(method: Method) -> Dial | None:
    """A dial at the rate of a method; None where that is a schedule, or there is none."""
    lr = rate_of(method)
    return None if lr is None or isinstance(lr, Schedule) else Dial(lr)


def with_rate(method: M, lr: Rate) -> M:
    """``method`` with ``lr`` in the place of `rate_of` it."""
    for f in fields(method):
        part = getattr(method, f.name)
        if f.name == "lr":
            return replace(method, lr=lr)  # type: ignore[call-arg]
        if isinstance(part, Rule):
            return replace(method, **{f.name: replace(part, lr=lr)})
        if isinstance(part, Method):
            return replace(method, **{f.name: with_rate(part, lr)})
    return method
