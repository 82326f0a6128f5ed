"""What goes wrong on a cluster, as values: each a pure function of (seed, who, step) or of the time."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from ..core.protocol import SERVER
from ..core.seeds import derive
from ..core.values import refuse, require
from .network import span


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong. What a fault does not say goes well."""

    def check(self, nodes: Collection[int]) -> None:
        """Refuse a fault of a worker that is not in ``nodes``."""

    def slowdown(self, worker: int, now: float) -> float:
        """By what factor a gradient takes longer that ``worker`` begins at ``now``."""
        return 1.0

    def crash(self, seed: int, worker: int, step: int) -> tuple[float, float] | None:
        """Whether ``worker`` dies during its gradient number ``step``: after which part of it, in [0, 1), and for how
        many seconds it is away."""
        return None

    def loses(self, seed: int, source: int, to: int, step: int) -> bool:
        """Whether a one-way message from ``source`` to ``to`` is lost that belongs to ``source``'s gradient ``step``."""
        return False

    def healed(self, a: int, b: int, now: float) -> float:
        """When the nodes ``a`` and ``b`` can next talk: ``now`` unless the fault parts them."""
        return now


def _draw(*parts: int) -> float:
    return derive(*parts) / (1 << 63)


@dataclass(frozen=True)
class _Window(Fault):
    _: KW_ONLY
    start: float = 0.0
    """When it begins, in virtual seconds, at least 0."""
    end: float = math.inf
    """When it is over, later than ``start``."""

    def __post_init__(self) -> None:
        require(self, "start", 0 <= self.start < math.inf, "must be finite and at least 0 seconds")
        require(self, "end", self.end > self.start, f"must be later than start = {self.start!r}")

    def meets(self, other: _Window) -> bool:
        return self.start < other.end and other.start < self.end


@dataclass(frozen=True)
class Straggler(_Window):
    """A worker that is slower for a while: what it begins between ``start`` and ``end`` takes ``factor`` times as long."""

    worker: int = 0
    """Which worker."""
    factor: float = 4.0
    """How many times as long its gradients take, above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "factor", 0 < self.factor < math.inf, "must be finite and above 0")

    def check(self, nodes: Collection[int]) -> None:
        require(self, "worker", self.worker in nodes, f"there is no such worker: workers are {span(nodes)}")

    def slowdown(self, worker: int, now: float) -> float:
        return self.factor if worker == self.worker and self.start <= now < self.end else 1.0


@dataclass(frozen=True)
class Partition(_Window):
    """The nodes fall into two parts that cannot talk to each other until it heals: what they send waits till then, and
    what would arrive meanwhile, though it was sent before."""

    nodes: tuple[int, ...] = (0,)
    """One of the parts: workers, or -1 for the server; the other part is everybody else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "end", self.end < math.inf, "must be finite: a partition heals, or all would wait for ever")
        listed = isinstance(self.nodes, tuple) and len(self.nodes) > 0
        require(self, "nodes", listed, "must be a tuple of at least one node, such as (0, 1)")

    def check(self, nodes: Collection[int]) -> None:
        known = {SERVER, *nodes}
        for node in self.nodes:
            if node not in known:
                known_are = f"workers are {span(nodes)}, the server is -1"
                refuse(self, "nodes", self.nodes, f"there is no node {node}: {known_are}")

    def healed(self, a: int, b: int, now: float) -> float:
        apart = (a in self.nodes) != (b in self.nodes) and self.start <= now < self.end
        return self.end if apart else now


@dataclass(frozen=True)
class Crashes(Fault):
    """Workers die at random, each in the middle of a gradient, and come back with no memory of before."""

    rate: float = 1 / 200
    """Probability that a worker dies during a gradient, in [0, 1)."""
    downtime: float = 10.0
    """Seconds until it is back, above 0."""

    def __post_init__(self) -> None:
        require(self, "rate", 0 <= self.rate < 1, "must be in [0, 1)")
        require(self, "downtime", 0 < self.downtime < math.inf, "must be finite and above 0 seconds")

    def crash(self, seed: int, worker: int, step: int) -> tuple[float, float] | None:
        if _draw(seed, 2, worker, step) >= self.rate:
            return None
        return _draw(seed, 3, worker, step), self.downtime


@dataclass(frozen=True)
class Loss(Fault):
    """One-way messages get lost: those of gossip, which nobody answers. A request to a server or peer is sent until it is
    answered, and an all-reduce until it is done, so those lose nothing."""

    rate: float = 0.01
    """Probability that a message is lost, in [0, 1)."""

    def __post_init__(self) -> None:
        require(self, "rate", 0 <= self.rate < 1, "must be in [0, 1)")

    def loses(self, seed: int, source: int, to: int, step: int) -> bool:
        return _draw(seed, 4, source, to, step) < self.rate


def check(owner: Any, faults: Sequence[Fault], nodes: Collection[int]) -> None:
    """Refuse faults of unknown nodes, and those of one kind that meet: what they come to together is not said."""
    if not isinstance(faults, tuple | list):
        refuse(owner, "faults", faults, "must be a tuple of faults such as (Crashes(1 / 200),)")
    for i, fault in enumerate(faults):
        if not isinstance(fault, Fault):
            refuse(owner, "faults", fault, "must be faults such as Crashes(1 / 200) or Straggler(worker=3, factor=4)")
        fault.check(nodes)
        for other in faults[:i]:
            if type(other) is not type(fault):
                continue
            if not isinstance(fault, _Window):
                refuse(owner, "faults", fault, f"there is {other!r} too: leave one out")
            same = not isinstance(fault, Straggler) or fault.worker == getattr(other, "worker", None)
            if same and isinstance(other, _Window) and fault.meets(other):
                refuse(owner, "faults", fault, f"it overlaps with {other!r}: give windows one after the other")
