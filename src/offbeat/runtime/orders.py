"""The order of a pass over data: listed from a seed, the same at all workers, and told from another by a digest."""

from __future__ import annotations

import hashlib
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

AHEAD = 64
"""Minibatches that are listed at once, and whose order workers compare."""
COMPARED = 4096
"""Examples that they compare at most."""
WINDOW = 1024
"""Minibatches that stay listed after others; for older ones an order is listed anew."""


class GeneratorStates:
    """Random numbers of its own for a block of code, in the place of the process's: those of torch on the CPU, of Python and of
    numpy, and of generators that ``owners`` have as attributes. They begin at ``seed`` and go on from block to block.
    """

    def __init__(self, seed: int, owners: Iterable[Any] = ()) -> None:
        self.seed, self.states = seed, list[Any]()
        self.sources: list[tuple[Callable[[], Any], Callable[[Any], Any], Callable[[int], Any]]] = []
        torch_, python = torch.default_generator, random
        self.sources.append((torch_.get_state, torch_.set_state, torch_.manual_seed))
        self.sources.append((python.getstate, python.setstate, python.seed))
        if numpy := sys.modules.get("numpy"):
            self.sources.append((numpy.random.get_state, numpy.random.set_state, _narrow(numpy.random.seed)))
        for value in (value for owner in owners for value in getattr(owner, "__dict__", {}).values()):
            if isinstance(value, torch.Generator):
                self.sources.append((value.get_state, value.set_state, value.manual_seed))
            elif isinstance(value, random.Random):
                self.sources.append((value.getstate, value.setstate, value.seed))
            elif numpy and isinstance(value, numpy.random.RandomState):
                self.sources.append((value.get_state, value.set_state, _narrow(value.seed)))
            elif numpy and isinstance(value, numpy.random.Generator):
                self.sources.append(_bits(value.bit_generator))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        before = [get() for get, _, _ in self.sources]
        for i, (_, put, seed) in enumerate(self.sources):
            if self.states:
                put(self.states[i])
            else:
                seed(self.seed)
        try:
            yield
        finally:
            self.states = [get() for get, _, _ in self.sources]
            for (_, put, _), state in zip(self.sources, before, strict=True):
                put(state)


def _narrow(seed: Callable[[int], Any]) -> Callable[[int], Any]:
    return lambda value: seed(value % 2**32)


def _bits(bits: Any) -> tuple[Callable[[], Any], Callable[[Any], Any], Callable[[int], Any]]:
    def put(state: Any) -> None:
        bits.state = state

    return lambda: bits.state, put, lambda seed: put(type(bits)(seed).state)


class Order:
    """The minibatches of one pass, each as its list of indices, listed as far as they are needed. ``begin`` lists them anew."""

    def __init__(self, begin: Callable[[], Iterable[list[Any]]], seed: int, owners: list[Any]) -> None:
        self.begin, self.seed, self.owners = begin, seed, owners
        self.length: int | None = None  # once the end was found
        self._again()

    def _again(self) -> None:
        self.streams, self.listed = GeneratorStates(self.seed, self.owners), None
        self.window: deque[list[Any]] = deque()
        self.first = 0  # the number of the window's first one

    listed: Iterator[list[Any]] | None

    def _more(self) -> None:
        with self.streams():
            if self.listed is None:
                self.listed = iter(self.begin())
            more = list(islice(self.listed, AHEAD))
        self.window.extend(more)
        if len(more) < AHEAD:
            self.length = self.first + len(self.window)
        while len(self.window) > WINDOW:
            self.window.popleft()
            self.first += 1

    def __getitem__(self, index: int) -> list[Any]:
        """A minibatch's indices; ``IndexError`` beyond the end."""
        if index < self.first:
            with kept(self.owners):
                self._again()
                while index >= self.first + len(self.window):
                    self._more()
        while index >= self.first + len(self.window):
            if self.length is not None:
                raise IndexError(index)
            self._more()
        return self.window[index - self.first]

    def digest(self) -> str:
        """What tells this order from others: how it begins."""
        if not self.window:
            self._more()
        found, left = hashlib.blake2b(digest_size=12), COMPARED
        for batch in islice(self.window, AHEAD):
            found.update(repr([int(i) if hasattr(i, "__index__") else i for i in batch[:left]]).encode())
            left -= len(batch)
            if left <= 0:
                break
        return found.hexdigest()


@contextmanager
def kept(owners: list[Any]) -> Iterator[None]:
    """Lists and arrays of samplers are put back afterwards: some shuffle their own in place whenever they are listed."""
    before = [(owner, {name: _copied(value) for name, value in vars(owner).items()}) for owner in owners]
    try:
        yield
    finally:
        for owner, values in before:
            vars(owner).update(values)


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return list(value)
    return value.copy() if type(value).__module__ == "numpy" and hasattr(value, "copy") else value


def digest(item: Any) -> str:
    """What tells an item, of tensors, arrays and numbers in any structure, from another."""
    found = hashlib.blake2b(digest_size=12)
    for part in _parts(item):
        found.update(part)
    return found.hexdigest()


def _parts(item: Any) -> Iterator[bytes]:
    """What an item consists of; of what is not known only its type."""
    if isinstance(item, Tensor):
        yield repr((item.dtype, item.shape)).encode()
        if item.layout == torch.strided and not item.is_meta:
            yield (
                item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if item.numel() else b""
            )
    elif isinstance(item, str | bytes | int | float | complex | bool | type(None)):
        yield repr(item).encode()
    elif isinstance(item, Mapping):
        for key, value in item.items():
            yield repr(key).encode()
            yield from _parts(value)
    elif isinstance(item, list | tuple | set | frozenset):
        yield str(len(item)).encode()
        for value in item if isinstance(item, list | tuple) else ():
            yield from _parts(value)
    elif type(item).__module__ == "numpy" and hasattr(item, "tobytes"):
        yield repr((str(item.dtype), item.shape)).encode()
        yield item.tobytes()
    else:
        yield type(item).__qualname__.encode()
        for value in getattr(item, "__dict__", {}).values():
            if isinstance(value, Tensor | str | int | float):
                yield from _parts(value)
