"""What a module keeps from one forward pass to the next besides its parameters: counters, lists, buffers that learn.

A simulation has one module for all workers, starts each gradient from the buffers that the module was built with, and plays
recordings; so whatever else a pass leaves behind must be known.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Generator, Tensor, nn

from .tape import alike

Pair: TypeAlias = tuple[Tensor, Tensor]

CURE = "let a forward pass depend on its inputs, parameters, constant buffers and random numbers alone"
DEEP, LONG, LARGE = 4, 1000, 1 << 20
"""How deep, in containers of how many entries, and in arrays of how many bytes state is looked for."""
_INNER = set(vars(nn.Module()))  # attributes that all modules have


class Watch:
    """Looks at what a gradient changes in its module, now and then, and says once what no other gradient should know.

    ``buffers`` are those of the module with their values before a gradient; those of ``expected`` modules may change.
    ``stop`` is called where a gradient is no function of parameters, minibatch and random numbers, or where hooks must run.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: object,
        buffers: Sequence[tuple[nn.Module, str, Tensor, Tensor]],
        expected: Sequence[nn.Module],
        generators: Sequence[Generator],
        stop: Callable[[], None],
    ) -> None:
        self.module, self.loss, self.buffers, self.expected = module, loss, buffers, expected
        self.generators, self.stop = generators, stop
        self.calls: Counter[str] = Counter()
        self.told: set[str] = set()

    def due(self, way: str) -> bool:
        """Whether to look at the next gradient that is taken this way: at the second, as the first may fill caches, and now
        and then.
        """
        self.calls[way] += 1
        return self.calls[way] > 1 and not self.calls[way] & (self.calls[way] - 1)

    def over(self, gradient: Callable[[], Pair]) -> Pair:
        """What ``gradient`` gives, which is called under watch."""
        before, states = Attributes.by(self.module, self.loss), [g.get_state() for g in self.generators]
        result = gradient()
        after, kind = Attributes.by(self.module, self.loss), type(self.module).__name__
        if any(map(_hooked, self.module.modules())):
            self.stop()
        if learnt := self._learnt():
            self._tell(
                f"a forward pass of {kind} changes its buffers {', '.join(learnt)}. Each simulated gradient, and each "
                "evaluation, starts from the values that the module was built with (the statistics of batch normalisation "
                "alone are taken anew), so a model is simulated whose buffers do not learn: in a real run they do"
            )
        changed = before.changed(after)
        if not changed and (rewritten := before.rewritten(after)):  # it may only have been left there to be looked at
            for g, state in zip(self.generators, states, strict=True):
                g.set_state(state)
            changed = [] if all(map(alike, gradient(), result)) else rewritten
        if changed:
            self.stop()
            self._tell(
                f"a forward pass of {kind} changes {', '.join(changed)}. A simulation has one module for all workers, their "
                "evaluations and all runs in a process, so what is simulated is no cluster whose workers have a module each, "
                f"and it may depend on what ran before: {CURE}"
            )
        return result

    def outdated(self, call: int) -> None:
        """A gradient, the ``call``-th of its kind, is no longer what was recorded."""
        self.stop()
        self._tell(
            f"{type(self.module).__name__} did something else in gradient {call} than in the first ones, from a recording of "
            f"which those since gradient {call // 2} were taken: it keeps a state where nobody sees it, such as in a global "
            f"variable. What is simulated since then is another model; {CURE}"
        )

    def _learnt(self) -> list[str]:
        """The buffers that have changed."""
        where = {m: f"{name}." if name else "" for name, m in self.module.named_modules()}
        return [
            where[module] + name
            for module, name, _, built in self.buffers
            if module not in self.expected and not torch.equal(getattr(module, name), built)
        ]

    def _tell(self, text: str) -> None:
        if text not in self.told:
            self.told.add(text)
            warnings.warn(text, UserWarning, stacklevel=2)


class Attributes(NamedTuple):
    """What the parts of a module have in their attributes: values that can be compared, by name."""

    values: dict[str, Any]
    """Python's own: numbers, texts, containers and objects of them, generators' states."""
    tensors: dict[str, tuple[Tensor, int]]
    """Tensors that are neither parameters nor buffers, and how often each has been written to."""

    @classmethod
    def by(cls, module: nn.Module, loss: object = None) -> Attributes:
        kept = cls({}, {})
        kept._parts("", module)
        if isinstance(loss, nn.Module):
            kept._parts("loss", loss)
            for name, buffer in loss.named_buffers():  # which nobody puts back
                kept._add(f"loss.{name}", buffer)
        else:
            kept._add("loss", loss)
        return kept

    def changed(self, later: Attributes) -> list[str]:
        """What is another value ``later``."""
        return _different(self.values, later.values)

    def rewritten(self, later: Attributes) -> list[str]:
        """Which tensors are others ``later``, or have been written to."""
        names = [*self.tensors, *(later.tensors.keys() - self.tensors.keys())]
        return [name for name in names if not _same_tensor(self.tensors.get(name), later.tensors.get(name))]

    def _parts(self, root: str, module: nn.Module) -> None:
        for where, part in module.named_modules(prefix=root):
            for name, value in vars(part).items():
                if name not in _INNER:
                    self._add(f"{where}.{name}" if where else name, value)
            for owner in _own_classes(type(part)):
                for name, value in vars(owner).items():
                    if not name.startswith("_"):
                        self._add(f"{owner.__name__}.{name}", value)

    def _add(self, name: str, value: Any) -> None:
        self.values[name] = self._seen(name, value, DEEP, set())

    def _seen(self, name: str, value: Any, deep: int, inside: set[int]) -> Any:
        """``value`` as it is now, in a form that can be compared."""
        if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype | torch.device):
            return repr(value)
        if isinstance(
            value, nn.Parameter | nn.Module | type | FunctionType | BuiltinFunctionType | MethodType | ModuleType
        ):
            return type(value).__name__
        if isinstance(value, Tensor):
            self.tensors[name] = value, value._version
            return "Tensor"
        if isinstance(value, random.Random):
            return value.getstate()
        if isinstance(value, Generator):
            return value.get_state().tolist()
        if not deep or id(value) in inside:
            return type(value).__name__
        inside, kind = inside | {id(value)}, type(value).__name__
        if isinstance(value, Set):
            return kind, len(value), sorted(map(repr, value)) if len(value) <= LONG else ()
        if isinstance(value, Mapping):
            parts = value
        elif isinstance(value, list | tuple | deque):
            parts = dict(enumerate(value)) if len(value) <= LONG else {"length": len(value)}
        elif hasattr(value, "bit_generator"):  # a generator of numpy's new kind
            return repr(value.bit_generator.state)
        elif hasattr(value, "tobytes") and hasattr(value, "nbytes"):  # an array
            return kind, value.tobytes() if value.nbytes <= LARGE else b""
        elif hasattr(value, "__dict__"):
            parts = vars(value)
        else:
            text = repr(value)
            return kind if " at 0x" in text else text
        if len(parts) > LONG:
            return kind, len(parts)
        return kind, {repr(k): self._seen(f"{name}[{k!r}]", part, deep - 1, inside) for k, part in parts.items()}


def _hooked(module: nn.Module) -> bool:
    """Whether something of the user's is called when the module is, which a recording would leave out."""
    kinds = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    hooks = [hook for kind in kinds for hook in kind.values()]
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks)


def _own_classes(cls: type) -> Iterator[type]:
    """The classes of a module that are not torch's."""
    return (c for c in cls.__mro__ if issubclass(c, nn.Module) and not c.__module__.startswith("torch."))


def _different(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    names = [*before, *(after.keys() - before.keys())]
    return [name for name in names if before.get(name) != after.get(name)]


def _same_tensor(before: tuple[Tensor, int] | None, after: tuple[Tensor, int] | None) -> bool:
    return before is not None and after is not None and before[0] is after[0] and before[1] == after[1]
