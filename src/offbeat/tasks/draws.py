"""Random numbers of one call: all generators of the process start from its seed, and are afterwards as they were."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


def generators(device: torch.device) -> tuple[Generator, ...]:
    """Every default generator of torch that a module on this device may draw from."""
    if device.type == "cpu":
        return (torch.default_generator,)
    if device.type == "cuda":
        return (torch.default_generator, torch.cuda.default_generators[device.index])
    raise ValueError(f"a model on {device}: gradients are repeatable on cpu and cuda only, move it there")


def drawn(generators: tuple[Generator, ...], states: list[Tensor]) -> bool:
    """Whether any of them has drawn since it was in its state."""
    return any(not torch.equal(g.get_state(), state) for g, state in zip(generators, states, strict=True))


class Seeded:
    """Inside, torch's generators start from ``seed``; afterwards they are as they were.

    Always done, for it takes microseconds, and whether a module draws (``functional.dropout``) cannot be known for
    certain. ``torch.manual_seed`` would take a hundred: it visits every device.
    """

    def __init__(self, generators: tuple[Generator, ...], seed: int) -> None:
        self.generators, self.seed = generators, seed

    def __enter__(self) -> None:
        self.states = [g.get_state() for g in self.generators]
        for g in self.generators:
            g.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        for g, state in zip(self.generators, self.states, strict=True):
            g.set_state(state)


class PythonSeeded:
    """Inside, Python's ``random`` and numpy's global generator start from ``seed``; afterwards they are as they were.

    It takes a tenth of a millisecond, so it is done around what a user has written, and not where a recording is played.
    """

    drawn: bool
    """Whether anything was drawn inside."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> PythonSeeded:
        self.numpy: Any = getattr(sys.modules.get("numpy"), "random", None)  # who draws from it has loaded it
        self.before = self._states()
        random.seed(self.seed)
        if self.numpy:
            self.numpy.seed(self.seed % (1 << 32))
        self.start = self._states()
        return self

    def __exit__(self, *error: object) -> None:
        self.drawn = _key(self._states()) != _key(self.start)
        python, numpy = self.before
        random.setstate(python)
        if self.numpy:
            self.numpy.set_state(numpy)

    def _states(self) -> tuple[Any, Any]:
        return random.getstate(), self.numpy.get_state() if self.numpy else ()


@contextmanager
def all_seeded(generators: tuple[Generator, ...], seed: int) -> Iterator[None]:
    """Inside, every generator of the process starts from ``seed``: torch's, Python's and numpy's."""
    with Seeded(generators, seed), PythonSeeded(seed):
        yield


def _key(states: tuple[Any, Any]) -> tuple[Any, Any]:
    """Generators' states, to be compared."""
    return states[0], [part.tobytes() if hasattr(part, "tobytes") else part for part in states[1]]


class LaneDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, what draws random numbers for stacked lanes draws them lane by lane, as each lane alone would.

    Each lane has a state of the generators of its own, from a seed of its own on. Sees operations after `vmap` has given
    them their stacked form, with the lanes first.
    """

    def __init__(self, generators: tuple[Generator, ...], seeds: Sequence[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.generators = generators
        self.states = []
        for seed in seeds:
            for g in generators:
                g.manual_seed(seed)
            self.states.append([g.get_state() for g in generators])

    @contextmanager
    def lane(self, k: int) -> Iterator[None]:
        """Inside, the generators are those of lane ``k``."""
        for g, state in zip(self.generators, self.states[k], strict=True):
            g.set_state(state)
        yield
        self.states[k] = [g.get_state() for g in self.generators]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        n = len(self.states)

        def part(value: Any, k: int) -> Any:
            if not isinstance(value, Tensor) or not value.dim():
                return value
            if len(value) % n:
                raise RuntimeError(f"{func} draws for {n} lanes in a tensor of {list(value.shape)}")
            return value.chunk(n)[k]

        results = []
        for k in range(n):
            if isinstance(args[0], Tensor):
                mine = tree_map(lambda value, k=k: part(value, k), args)
            else:  # it makes a tensor from nothing, and is told its size first
                mine = ([args[0][0] // n, *args[0][1:]], *args[1:])
            with self.lane(k):
                results.append(func(*mine, **kwargs))
        if func._schema.is_mutable:
            return args[0]
        if isinstance(results[0], tuple):
            return tuple(torch.cat(each) for each in zip(*results, strict=True))
        return torch.cat(results)
