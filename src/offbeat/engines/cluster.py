"""A cluster as a value: how many workers, how fast, and who comes and goes when."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..core.values import refuse, require
from .faults import Crashes, Fault, check
from .network import Network
from .speed import Gamma, Speed


@dataclass(frozen=True)
class Membership:
    """Something that happens to the set of workers at a given time."""

    worker: int
    """Which worker: 0, 1, 2, ..."""
    at: float
    """When, in virtual seconds from the start, at least 0."""

    def __post_init__(self) -> None:
        require(self, "worker", self.worker >= 0, "workers are 0, 1, 2, ...")
        require(self, "at", 0 <= self.at < math.inf, "must be a finite time in seconds, at least 0")


class Join(Membership):
    """A new worker comes, or one that left or crashed comes back with no memory of before."""


class Leave(Membership):
    """A worker finishes what it is at, delivers it, and goes: the gradient, or the period that the method exchanges after."""


class Crash(Membership):
    """A worker is gone at once; the gradient it was at is lost."""


@dataclass(frozen=True)
class Cluster:
    """What runs the method: workers, how fast they compute, what their messages cost, and what goes wrong."""

    workers: int = 8
    """Workers at the start, at least 1; their names are 0 to workers - 1."""
    speed: Speed = Gamma()
    """Seconds per gradient."""
    events: tuple[Membership, ...] = ()
    """Who joins, leaves or crashes when."""
    network: Network = Network()
    """What messages cost; nothing unless told."""
    faults: tuple[Fault, ...] = ()
    """What goes wrong: stragglers, partitions, crashes and lost messages at a rate."""

    def __post_init__(self) -> None:
        whole = isinstance(self.workers, int) and not isinstance(self.workers, bool)
        require(self, "workers", whole and self.workers >= 1, "must be a whole number, at least 1")
        require(self, "speed", isinstance(self.speed, Speed), "must be a Speed such as Gamma(mean=1.0, cv=0.1)")
        present = set(range(self.workers))
        for event in sorted(self.events, key=lambda e: e.at):
            if isinstance(event, Join) == (event.worker in present):
                state = "is there already" if event.worker in present else "is not there"
                refuse(self, "events", event, f"worker {event.worker} {state} then; correct the worker or the time")
            present ^= {event.worker}
        nodes = {*range(self.workers), *(event.worker for event in self.events)}
        require(self, "network", isinstance(self.network, Network), "must be a Network such as Network(latency=1e-3)")
        self.network.check(nodes)
        check(self, self.faults, nodes)
        if self.events and any(isinstance(fault, Crashes) for fault in self.faults):
            refuse(self, "events", self.events, "there are crashes at a rate too: give either times or a rate")
