"""A cluster as a value: how many workers, how fast, and who comes and goes when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ..core.values import refuse, require
from ..trace import Trace
from .faults import Crashes, Fault, Loss, check
from .network import Network
from .processors import Machines
from .speed import Gamma, Recorded, Speed


@dataclass(frozen=True)
class MemberEvent:
    """Something that happens to the set of workers at a given time."""

    worker: int
    """Which worker: 0, 1, 2, ..."""
    at: float
    """When, in virtual seconds from the start, at least 0."""

    def __post_init__(self) -> None:
        require(self, "worker", self.worker >= 0, "workers are 0, 1, 2, ...")
        require(self, "at", 0 <= self.at < math.inf, "must be a finite time in seconds, at least 0")


class Join(MemberEvent):
    """A new worker comes, or one that left or crashed comes back with no memory of before."""


class Leave(MemberEvent):
    """A worker finishes what it is at, delivers it, and goes: the gradient, or the period that the method exchanges after."""


class Crash(MemberEvent):
    """A worker is gone at once; the gradient it was at is lost."""


@dataclass(frozen=True)
class Cluster:
    """What runs the method: workers, how fast they compute, what their messages cost, and what goes wrong."""

    workers: int = 8
    """Workers at the start, at least 1; their names are 0 to workers - 1."""
    speed: Speed = Gamma()
    """Seconds per gradient."""
    events: tuple[MemberEvent, ...] = ()
    """Who joins, leaves or crashes when."""
    network: Network = Network()
    """What messages cost; nothing unless told."""
    faults: tuple[Fault, ...] = ()
    """What goes wrong: stragglers, partitions, crashes and lost messages at a rate."""
    machines: Machines | None = None
    """Whose cores workers share; None: each has a processor of its own, and messages cost it nothing."""

    def __post_init__(self) -> None:
        whole = isinstance(self.workers, int) and not isinstance(self.workers, bool)
        require(self, "workers", whole and self.workers >= 1, "must be a whole number, at least 1")
        require(self, "speed", isinstance(self.speed, Speed), "must be a Speed such as Gamma(mean=1.0, cv=0.1)")
        for event in self.events:
            if not isinstance(event, MemberEvent):
                refuse(self, "events", event, "must be a Join, Leave or Crash such as Crash(worker=1, at=3.0)")
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

    @classmethod
    def from_trace(cls, trace: Trace | str | Path, workers: int | None = None) -> Cluster:
        """The cluster that a recorded run shows, for ``workers`` (None: as many as it had): its file, or the `Trace`.

        Step times, stalls among them, are the recorded ones; a worker beyond those recorded is the copy of one. Latency
        is that of an empty message, and bandwidth what the fastest message comes to, or at a server what the two that
        followed each other most closely do. Crashes and lost messages give rates. What a trace does not show is not
        there: links that differ, half duplex, partitions.

        Raises ``ValueError`` for a file that is no trace, and for a trace that has no step times.
        """
        trace = trace if isinstance(trace, Trace) else Trace.read(trace)
        seconds: dict[int, list[float]] = {}
        for event in trace:
            seconds.setdefault(event.worker, []).append(event.compute)
        if not seconds or min(map(min, seconds.values())) <= 0:
            raise ValueError(
                "the trace has no seconds per gradient (column `compute`): record the run again with this version"
            )
        speed = Recorded(tuple(tuple(seconds[worker]) for worker in sorted(seconds)))
        return cls(len(seconds) if workers is None else workers, speed, network=_network(trace), faults=_faults(trace))


def _network(trace: Trace) -> Network:
    """Latency and bandwidth that explain the messages of a trace."""
    messages = [event for event in trace if event.sent]
    transits = [event.transit for event in trace if event.transit > 0]
    latency = trace.header.get("ping", 0.0)
    if not messages or not transits:
        return Network(latency)
    size = sorted(event.sent for event in messages)[len(messages) // 2]
    kind = trace.header.get("messages")
    if kind == "gossip":  # of which a worker may send several between two gradients
        size = trace.header.get("message", size)
    hops = 2 * (len({event.worker for event in trace}) - 1) if kind == "reduce" else 1
    passing = min(transits) - hops * latency  # of one that queued behind no other
    if kind == "server":
        ends = [event.seconds for event in messages]
        passing = min([passing, *(b - a for a, b in pairwise(ends) if b > a)])  # of two that came at once
    return Network(latency, size / passing if passing > 0 else math.inf)


def _faults(trace: Trace) -> tuple[Fault, ...]:
    """The rates of crashes and of lost messages in a trace."""
    faults: list[Fault] = []
    away, crashes, downtimes = dict[int, float](), 0, []
    for incident in trace.incidents:
        if incident.what == "crashed":
            crashes += 1
            away[incident.worker] = incident.seconds
        elif incident.what == "joined" and incident.worker in away:
            downtimes.append(incident.seconds - away.pop(incident.worker))
    if downtimes:
        faults.append(Crashes(crashes / (len(trace) + crashes), sum(downtimes) / len(downtimes)))
    lost = sum(incident.what == "lost message" for incident in trace.incidents)
    if lost:
        size = trace.header.get("message", 0)
        sent = sum(event.sent / size if size else event.sent > 0 for event in trace)
        faults.append(Loss(lost / (max(lost, sent) + 1)))  # not all were sent by who lived to have another event
    return tuple(faults)
