"""Random numbers of a run's workers: each has streams of its own, and what is the same all the same is found out.

A script that sets a seed sets the same at all workers. One that then draws its minibatches, rather than sharing a loader, would have
all of them compute the very same gradients.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor

from ..core.seeds import derive

IN_A_ROW = 5
"""Steps at which two workers must have the same before they are told apart from chance."""
KEPT = 1000
"""Steps that are remembered, for workers that are so far apart."""


def seed_streams(*who: int) -> None:
    """Seed torch (all devices), ``random``, and numpy if it was imported, by the numbers in ``who`` and what each of them would
    have drawn next: so streams differ with ``who``, and follow from the script's own seed where it has set one.
    """
    torch.manual_seed(derive(int(torch.randint(1 << 62, ())), *who))
    random.seed(derive(random.getrandbits(62), *who))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(derive(int(numpy.random.randint(1 << 31)), *who) % (1 << 32))


def sample(t: Tensor) -> Hashable:
    """Some elements of ``t``, by which it can be told from another: they are spread over all of it."""
    flat = t.reshape(-1)
    return tuple(flat[:: max(1, len(flat) // 32)].tolist())


class Twins:
    """Finds workers that compute the same: of each step of each it is told something that others would not have by chance."""

    def __init__(self) -> None:
        self._seen: OrderedDict[int, dict[Hashable, int]] = OrderedDict()  # at each step, and by whom
        self._alike: dict[
            tuple[int, int], tuple[int, int, Hashable]
        ] = {}  # of two: the last step, how many in a row, what
        self._told: set[tuple[int, int]] = set()

    def see(self, worker: int, step: int, mark: Hashable) -> tuple[int, int] | None:
        """A worker has ``mark`` at its ``step``. Two workers that had the same at `IN_A_ROW` steps one after another, once: not where
        one step was like the one before, as a loss that stays at 0 is."""
        seen = self._seen.setdefault(step, {})
        other = seen.setdefault(mark, worker)
        while len(self._seen) > KEPT:
            self._seen.popitem(last=False)
        two = min(worker, other), max(worker, other)
        if other == worker or two in self._told:
            return None
        last, count, before = self._alike.get(two, (-1, 0, None))
        count = count + 1 if last == step - 1 and before != mark else 1
        self._alike[two] = step, count, mark
        if count < IN_A_ROW:
            return None
        self._told.add(two)
        return two
