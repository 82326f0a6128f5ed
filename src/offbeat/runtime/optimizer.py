"""The user's own optimizer as a descent rule: it takes the local steps, and the method does the rest."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.descent import Rule, count
from ..core.method import GradientServer, Method
from ..tasks.flat import Flat, Sharded, local


class Borrowed(NamedTuple):
    step: Tensor  # steps taken, 0-dim
    rates: Tensor  # sum of their rates, 0-dim
    resets: Tensor  # how often the buffers were emptied, 0-dim
    loaded: tuple[Tensor, ...]  # buffers to go on with, where an average has changed them; (): the optimizer's own [d]


@dataclass(frozen=True, eq=False)
class UserRule(Rule):
    """Steps by a ``torch.optim`` optimizer over the parameters of a `Flat`; its rate is that of its first group.

    Buffers are those of its state that are shaped like the parameters (momentum, moments); other entries, such as Adam's
    step, stay when buffers are averaged, and go when they are emptied. ``skip`` says that the step is not to be taken, as
    a `GradScaler` asks: it counts, and averages are not skipped.
    """

    lr: Any = 1.0
    """Not used: the optimizer has its own."""
    optimizer: Any = None
    """A ``torch.optim.Optimizer`` over the parameters of ``flat``."""
    flat: Any = None
    """The `Flat` of the model."""
    live: dict[str, int] = field(default_factory=lambda: {"skip": 0, "resets": 0})
    """Whether to skip the next step, and how often the optimizer's state was emptied."""

    def init(self, x: Tensor) -> Borrowed:
        return Borrowed(count(x), count(x), count(x), ())

    def step(self, state: Borrowed, x: Tensor, g: Tensor) -> tuple[Borrowed, Tensor]:
        live, flat, optimizer = self.live, self.flat, self.optimizer
        if int(state.resets) != live["resets"]:
            optimizer.state.clear()
            live["resets"] = int(state.resets)
        self._load(state.loaded)
        flat.write(x)
        flat.put_gradient(g)
        rate = float(optimizer.param_groups[0]["lr"])
        if not live["skip"]:
            optimizer.step()
        return state._replace(step=state.step + 1, rates=state.rates + rate, loaded=()), flat.read()

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
    rule = UserRule(optimizer=optimizer, flat=flat)
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
