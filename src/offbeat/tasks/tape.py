"""What a function does to tensors, recorded operation by operation, and played back without autograd and without `vmap`.

What a call of many small operations takes is mostly Python: of modules, of transforms, of autograd's bookkeeping. The
operations that are left at the bottom are the same at each call with tensors of the same shapes, and so are their bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

Function: TypeAlias = Callable[..., tuple[Tensor, ...]]
Play: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""``play(generator, *inputs)``."""

aten = torch.ops.aten
ALL = {aten.detach.default, aten.view.default, aten._unsafe_view.default, aten.expand.default}
"""Views that are often of all of a tensor, as it is: nothing needs to be done for them."""
CALM = {aten._scaled_dot_product_flash_attention_for_cpu.default}
"""What is said to draw, and does not."""
UNFIT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""What is not the same operation at each call."""
OFTEN, MOST = 4, 32
"""How often a function has been called with tensors of some shapes when it is recorded: it costs as much as a few calls.
And for how many shapes that is done."""


class Tapes:
    """Recordings of one function, one for each shape that its arguments have had a few times.

    It must be pure: nothing but the values of its arguments, and what is drawn from ``generators``, changes from call to
    call. Where it cannot be recorded, or gives other bits at the next call than its recording, it is called as ever. A
    recording is compared again at every call whose number is a power of two. What differs there by more than rounding was
    no pure function: ``changed(number)`` is called.
    """

    def __init__(
        self, generators: tuple[Generator, ...] = (), changed: Callable[[int], None] = lambda call: None
    ) -> None:
        self.generators, self.changed = generators, changed
        self.calls: Counter[Any] = Counter()
        self.tapes: dict[Any, Play] = {}
        self.most = MOST

    def play(self, *inputs: Tensor) -> Play | None:
        """What answers this call with such ``inputs`` in the function's place; None where the function itself must."""
        kind = _kind(inputs)
        call = self.calls[kind] + 1
        if kind not in self.tapes or call <= OFTEN + 1 or not call & (call - 1):
            return None
        self.calls[kind] = call
        return self.tapes[kind]

    def stop(self) -> None:
        """Record and play nothing any more: the function is not pure."""
        self.tapes.clear()
        self.most = 0

    def __call__(self, function: Function, *inputs: Tensor, form: Function | None = None) -> tuple[Tensor, ...]:
        """What ``function(*inputs)`` is: new tensors, detached.

        ``form`` is recorded in its place, where a function has a form that can be.
        """
        if play := self.play(*inputs):
            with torch.no_grad():
                return play(None, *inputs)
        kind = _kind(inputs)
        self.calls[kind] += 1
        states = [g.get_state() for g in self.generators]
        result = function(*inputs)
        if self.calls[kind] == OFTEN and len(self.tapes) < self.most:
            self._record(kind, form or function, inputs)
        elif play := self.tapes.get(kind):
            played = self._played(play, states, inputs)
            if played is None or not all(map(torch.equal, played, result)):
                self.tapes.pop(kind)
                if self.calls[kind] > OFTEN + 1 and not (played and all(map(alike, played, result))):
                    self.changed(self.calls[kind])
        return result

    def _record(self, kind: Any, function: Function, inputs: tuple[Tensor, ...]) -> None:
        tape = _Tape(inputs)
        try:
            with tape:
                result = function(*inputs)
        except Exception:  # there are operations that no such mode can look at
            return
        if tape.fit:
            self.tapes[kind] = tape.played(result)

    def _played(self, play: Play, states: list[Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """What is played from the same random numbers; None where it cannot be."""
        for g, state in zip(self.generators, states, strict=True):
            if not torch.equal(g.get_state(), state):
                g.set_state(state)
        try:
            with torch.no_grad():
                return play(None, *inputs)
        except Exception:  # such as a view that what it is of has no longer the strides for
            return None


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether they are the same to rounding (to which some operations of a GPU differ from call to call)."""
    if a.shape != b.shape or not b.is_floating_point():
        return False
    close = 100 * torch.finfo(b.dtype).eps
    return torch.allclose(a, b, rtol=close, atol=close * float(b.abs().max()) if b.numel() else 0.0, equal_nan=True)


def _kind(inputs: tuple[Tensor, ...]) -> Any:
    return tuple(map(_layout, inputs))


class _Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, operations are written down, as the lines of a Python function."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fit, self.count = True, 0
        self.names = WeakTensorKeyDictionary()  # of the tensors that are alive
        self.known: dict[str, Any] = {}  # what else the lines refer to
        self.lines: list[_Line] = []
        self.inputs = [self._new(t) for t in inputs]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch loads its compiler, which takes seconds, only to tell it to keep out of here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.fit:
            self.fit = not UNFIT & set(func.tags) and self._note(func, args, kwargs or {}, result)
        return result

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> bool:
        """Write one line; whether that could be done."""
        if func in ALL and isinstance(result, Tensor) and _layout(result) == _layout(args[0]):
            self.names[result] = self._word(args[0], set())
            return True
        if func is aten.lift_fresh.default:  # a constant that the function makes, and may write to
            func, args = aten.clone.default, (args[0].clone(),)
        read: set[str] = set()
        words = [self._word(a, read) for a in args] + [f"{k}={self._word(a, read)}" for k, a in kwargs.items()]
        if torch.Tag.nondeterministic_seeded in func.tags and func not in CALM:
            func = _seeded(func)
            if func is None or kwargs.get("generator"):
                return False
            words = [word for word in words if not word.startswith("generator=")] + ["generator=generator"]
        parts = [result] if isinstance(result, Tensor) else result
        if not isinstance(parts, list | tuple) or not all(isinstance(t, Tensor | None) for t in parts):
            return False
        made = ["_" if t is None or t in self.names else self._new(t) for t in parts]
        left = made[0] if isinstance(result, Tensor) else f"[{', '.join(made)}]"
        call = f"{left} = {self._bind(func)}({', '.join(words)})"
        self.lines.append(_Line(call, read, set(made) - {"_"}, func._schema.is_mutable))
        return True

    def _new(self, t: Tensor) -> str:
        self.count += 1
        self.names[t] = name = f"t{self.count}"
        return name

    def _bind(self, value: Any) -> str:
        name = f"k{len(self.known)}"
        self.known[name] = value
        return name

    def _word(self, value: Any, read: set[str]) -> str:
        """How an argument is written; ``read`` gets the tensors in it."""
        if isinstance(value, Tensor) and value in self.names:
            name: str = self.names[value]
            read.add(name)
            return name
        if isinstance(value, list | tuple):
            return f"[{', '.join(self._word(v, read) for v in value)}]"
        return repr(value) if value is None or type(value) in (bool, int) else self._bind(value)

    def played(self, result: tuple[Tensor, ...]) -> Play:
        """The function that does the same."""
        needed: set[str] = set()
        answer = ", ".join(self._word(t, needed) for t in result)
        text = [f"    return ({answer},)"]
        for line in reversed(self.lines):
            if line.writes or line.made & needed:
                if last := (line.read | line.made) - needed - set(self.inputs):
                    text.append(f"    del {', '.join(sorted(last))}")
                text.append(f"    {line.call}")
                needed |= line.read | line.made
        head = f"def play({', '.join(['generator', *self.inputs])}):"
        exec("\n".join([head, *reversed(text)]), self.known)
        play: Play = self.known.pop("play")
        return play


def _seeded(func: Any) -> Any:
    """The form of ``func``, which draws, that takes a generator; None if it has none."""
    if any(a.name == "generator" for a in func._schema.arguments):
        return func
    name = func._overloadname
    return getattr(func.overloadpacket, "generator" if name == "default" else f"{name}_generator", None)


class _Line(NamedTuple):
    call: str
    read: set[str]
    made: set[str]
    writes: bool  # whether it changes what it reads


def _layout(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.dtype
