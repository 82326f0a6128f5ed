"""The user's own optimizer as a descent rule: it takes the local steps, and the method does the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.descent import Rule, count
from ..core.method import GradientServer, Method, RuleMethod
from ..core.periodic import OuterMethod
from ..tasks.flat import Flat, Sharded, local


class Borrowed(NamedTuple):
    step: Tensor  # steps taken, 0-dim
    rates: Tensor  # sum of their rates, 0-dim
    resets: Tensor  # how often the buffers were emptied, 0-dim
    loaded: tuple[Tensor, ...]  # buffers to go on with, where an average has changed them; (): the optimizer's own [d]


@dataclass
class Live:
    """What goes with an optimizer and is no state of a worker: neither is pure."""

    skip: bool = False
    """Whether the next step is not to be taken."""
    resets: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Those of the last state, which the optimizer has followed."""
    rate: float = math.nan
    """Of the last step."""
    pace: tuple[Tensor, ...] = ()
    """What that has added to a state's ``step`` and ``rates``: tensors, as numbers would be made such each time."""


@dataclass(frozen=True, eq=False)
class UserRule(Rule):
    """Steps by a ``torch.optim`` optimizer over the parameters of a `Flat`; its rate is that of its first group.

    Buffers are those of its state that are shaped like the parameters (momentum, moments); other entries, such as Adam's
    step, stay when buffers are averaged, and go when they are emptied. `Live.skip` says that the step is not to be taken, as
    a `GradScaler` asks: it counts, and averages are not skipped.
    """

    lr: Any = 1.0
    """Not used: the optimizer has its own."""
    optimizer: Any = None
    """A ``torch.optim.Optimizer`` over the parameters of ``flat``."""
    flat: Any = None
    """The `Flat` of the model."""
    direct: bool = False
    """Whether gradients come to it as the model has them, whatever else the method does: they need not be put together then,
    and stand for themselves as a gradient of no elements."""
    live: Live = field(default_factory=Live)
    """What it remembers from step to step."""

    def init(self, x: Tensor) -> Borrowed:
        return Borrowed(count(x), count(x), count(x), ())

    def step(self, state: Borrowed, x: Tensor, g: Tensor) -> tuple[Borrowed, Tensor]:
        live, flat, optimizer = self.live, self.flat, self.optimizer
        if state.resets is not live.resets:  # else nobody has emptied it, and a GPU need not be waited for
            if int(state.resets) != int(live.resets):
                optimizer.state.clear()
            live.resets = state.resets
        self._load(state.loaded)
        flat.hold(x)
        if g.numel():
            flat.put_gradient(g)
        rate = float(optimizer.param_groups[0]["lr"])
        if rate != live.rate:
            live.rate, live.pace = rate, (count(x) + 1, count(x) + rate)
        if not live.skip:
            optimizer.step()
        one, more = live.pace
        return Borrowed(state.step + one, state.rates + more, state.resets, ()), flat.read()

    def buffers(self, state: Borrowed) -> tuple[Tensor, ...]:
        if state.loaded:
            return state.loaded
        parts = [self.optimizer.state[p] for p in self._parameters()] if self._names() else []
        return tuple(torch.cat([local(part[name]).reshape(-1) for part in parts]) for name in self._names())

    def with_buffers(self, state: Borrowed, buffers: tuple[Tensor, ...]) -> Borrowed:
        return state._replace(loaded=tuple(buffers))

    def restart(self, state: Borrowed) -> Borrowed:
        return state._replace(resets=state.resets + 1, loaded=())

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _load(self, buffers: tuple[Tensor, ...]) -> None:
        """Put averaged buffers into the optimizer's state."""
        if not buffers:
            return
        parameters = self._parameters()
        for whole, name in zip(buffers, self._names(), strict=True):
            sizes = [local(p).numel() for p in parameters]
            for p, part in zip(parameters, torch.split(whole, sizes), strict=True):
                local(self.optimizer.state[p][name]).copy_(part.view(local(p).shape))

    def _names(self) -> list[str]:
        """The entries of the optimizer's state that are shaped like the parameters."""
        p = self._parameters()[0]
        return [
            name
            for name, value in self.optimizer.state.get(p, {}).items()
            if isinstance(value, Tensor) and value.shape == p.shape and value.dim()
        ]


def lent(method: Method, optimizer: torch.optim.Optimizer, flat: Flat | Sharded) -> tuple[Method, UserRule]:
    """``method`` with ``optimizer`` in the place of its rule. Raises ``ValueError`` where it has none."""
    inside: Method = method
    while isinstance(inside, OuterMethod) and type(inside).local is OuterMethod.local:
        inside = inside.inner
    rule = UserRule(optimizer=optimizer, flat=flat, direct=type(inside).local is RuleMethod.local)
    ours = set(flat.parameters)
    theirs = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if ours != theirs:
        raise ValueError(
            f"the optimizer has {len(theirs)} trainable parameters, of which {len(ours & theirs)} are the model's "
            f"{len(ours)}: make it of model.parameters()"
        )

    def put(value: Method) -> Method:
        for f in fields(value) if not isinstance(value, GradientServer) else ():  # whose rule would be the server's
            part = getattr(value, f.name)
            if isinstance(part, Rule):
                return replace(value, **{f.name: rule})
            if isinstance(part, Method):
                return replace(value, **{f.name: put(part)})
        raise ValueError(
            f"{type(method).__name__} has no local rule for an optimizer to take the place of: leave the optimizer out, "
            "or take a method such as LocalSGD, DiLoCo, SlowMo or SGP"
        )

    return put(method), rule


class Lending:
    """Puts ``optimizer``, where there is one, into the method of each life of a worker."""

    def __init__(self, optimizer: torch.optim.Optimizer | None, flat: Flat | Sharded) -> None:
        self.optimizer, self.flat = optimizer, flat
        self.rule: UserRule | None = None
        """The optimizer as the rule of this life."""

    def __call__(self, method: Method) -> Method:
        if self.optimizer is not None:
            method, self.rule = lent(method, self.optimizer, self.flat)
        return method
