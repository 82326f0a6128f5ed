"""What a script does to the parameters of its replica between two steps, beside the replica: seen, and said."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..core.method import Method


class OtherSteps:
    """Sees the ``torch.optim`` optimizers that step some of ``tensors``, but for steps `ours`.

    Only a step on a gradient counts: without one an optimizer changes nothing.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._ids = {id(p) for p in tensors}
        self._ours = False
        self._seen: Optimizer | None = None
        _watch(self)

    @contextlib.contextmanager
    def ours(self) -> Iterator[None]:
        """Steps inside are the replica's own."""
        self._ours = True
        try:
            yield
        finally:
            self._ours = False

    def take(self) -> Optimizer | None:
        """An optimizer that has stepped since this was last asked."""
        seen, self._seen = self._seen, None
        return seen

    def look(self, optimizer: Optimizer) -> None:
        """This optimizer has stepped."""
        if not self._ours and self._seen is None:
            params = (p for group in optimizer.param_groups for p in group["params"])
            if any(id(p) in self._ids and p.grad is not None for p in params):
                self._seen = optimizer


_watches: weakref.WeakSet[OtherSteps] | None = None  # None until the first replica
_alone = threading.Lock()


def _watch(watch: OtherSteps) -> None:
    global _watches
    with _alone:
        if _watches is None:
            _watches = weakref.WeakSet()
            register_optimizer_step_post_hook(_stepped)
        _watches.add(watch)


def _stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    with _alone:
        watches = tuple(_watches or ())
    for watch in watches:
        watch.look(optimizer)


class Roster:
    """The parameters of ``module`` as they were when its `Parameters` were chosen: what is added, put in the place of
    another or unfrozen later would not be trained, and nothing else would tell."""

    def __init__(self, module: nn.Module, chosen: Sequence[Tensor]) -> None:
        self._module, self._chosen = module, {id(p) for p in chosen}
        self._note()

    def _note(self) -> None:
        tables: list[dict[str, Any]] = [t for m in self._module.modules() for t in (m._parameters, m._modules)]
        self._lengths = [(table, len(table)) for table in tables]
        self._entries = [(table, name, value) for table in tables for name, value in table.items()]
        self._frozen = [p for p in self._module.parameters() if id(p) not in self._chosen]

    def check(self) -> None:
        """Raise ``RuntimeError`` for a trainable parameter that was not chosen, and for a chosen one that has gone."""
        if not (
            any(p.requires_grad for p in self._frozen)
            or any(len(table) != length for table, length in self._lengths)
            or any(table.get(name) is not value for table, name, value in self._entries)
        ):
            return  # at each step, so without a walk over the module
        named = dict(self._module.named_parameters())
        kind = type(self._module).__name__
        if strange := [name for name, p in named.items() if p.requires_grad and id(p) not in self._chosen]:
            raise RuntimeError(
                f"{kind} has parameters to train that it had not, or had frozen, when its Replica was made "
                f"({', '.join(strange)}): nothing would move them. Add, unfreeze or replace parameters first, then make the "
                "Replica; to load a state into those that there are, leave out assign=True"
            )
        if gone := len(self._chosen - {id(p) for p in named.values()}):
            raise RuntimeError(
                f"{gone} parameters that {kind} had when its Replica was made are no longer in it: change the module first, "
                "then make the Replica"
            )
        self._note()


def cannot_follow(names: list[str], method: Method) -> str:
    """What to say of parameters that the script has written into, where the method cannot go on from there."""
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return (
        f"parameter {names[0]}{more} was written into since this replica last did, and {type(method).__name__} cannot take that "
        "over: the model is the run's. If a state was loaded or weights were initialised: do that before the Replica is made. If "
        "another optimizer stepped: leave its step out. To clip, prune or project weights after each step: take a method whose "
        "workers step themselves, such as LocalSGD(period=1)"
    )
