"""What computing and handling messages cost the processors: cores that are shared, and a server that serves one visit at a time.

A machine shares its cores fairly: of ``n`` threads that are at work on ``c`` cores, each goes at ``min(1, c / n)`` of its speed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, NamedTuple

from ..core.protocol import SERVER
from ..core.values import require
from ..trace import Load
from .clock import Clock


@dataclass(frozen=True)
class Machines:
    """The machines that workers and server run on. Without one, each has a processor of its own, and messages cost it nothing."""

    cores: float = 2
    """Cores of each machine, above 0."""
    workers: int | None = None
    """Workers on each machine, at least 1, beside a machine of the server's own; None: all workers and the server are on one."""
    load: float = 1.0
    """Processor seconds of a second of computing, above 0: below 1 where a worker waits for a disk or a GPU meanwhile, above 1
    where several of its threads are at work."""
    handling: float = 0.0
    """Processor seconds of a worker for each message that it sends, or average that it takes part in, at least 0."""
    service: float = 0.0
    """Processor seconds of the server for each visit, at least 0. It serves one visit at a time."""
    shards: int = 1
    """Processes of the server that are at work on each visit, at least 1."""
    others: float = 0.0
    """Threads of other processes that are always at work on each machine, at least 0."""

    def __post_init__(self) -> None:
        require(self, "cores", 0 < self.cores < math.inf, "must be finite and above 0")
        require(self, "workers", self.workers is None or self.workers >= 1, "must be at least 1, or None: all on one")
        require(self, "load", 0 < self.load < math.inf, "must be finite and above 0")
        for name in ("handling", "service"):
            require(self, name, 0 <= getattr(self, name) < math.inf, "must be finite and at least 0 seconds")
        require(self, "shards", self.shards >= 1, "must be at least 1")
        require(self, "others", 0 <= self.others < math.inf, "must be finite and at least 0")


class _Job(NamedTuple):
    end: float  # at which progress of the machine it is done
    serial: int
    threads: float
    act: Callable[..., None]
    args: tuple[Any, ...]


class Machine:
    """One machine in the simulator: what is at work on its cores."""

    def __init__(self, clock: Clock, cores: float, others: float) -> None:
        self.clock, self.cores, self.others = clock, cores, others
        self.jobs: list[_Job] = []
        self.threads = 0.0  # of the jobs
        self.progress = 0.0  # seconds that a job which was always there would have got done
        self.used = 0.0  # processor seconds of jobs
        self.busy = 0.0  # and of the others
        self._at = 0.0  # when that was so
        self._serial = 0

    def run(self, seconds: float, threads: float, act: Callable[..., None], *args: Any) -> None:
        """Call ``act(*args)`` when a job is done that takes ``seconds`` where nobody else is at work."""
        self._go_on()
        heappush(self.jobs, _Job(self.progress + seconds, self._serial, threads, act, args))
        self.threads += threads
        self._await()

    @property
    def rate(self) -> float:
        """How fast a job goes now, at most 1."""
        wanted = self.threads + self.others
        return min(1.0, self.cores / wanted) if wanted else 1.0

    def _go_on(self) -> None:
        """Bring the progress up to date."""
        passed = (self.clock.now - self._at) * self.rate
        self.progress += passed
        self.used += passed * self.threads
        self.busy += passed * (self.threads + self.others)
        self._at = self.clock.now

    def _await(self) -> None:
        """Schedule the end of the job that ends first, in place of what was scheduled."""
        self._serial += 1
        if self.jobs:
            seconds = max(0.0, self.jobs[0].end - self.progress) / self.rate
            self.clock.at(self.clock.now + seconds, 2, self._ends, self._serial)

    def _ends(self, serial: int) -> None:
        if serial != self._serial:
            return  # another job has come meanwhile
        self._go_on()
        job = heappop(self.jobs)
        self.progress = max(self.progress, job.end)
        self.threads = self.threads - job.threads if self.jobs else 0.0
        self._await()
        job.act(*job.args)


@dataclass(eq=False)
class _Used:
    """What one node has had."""

    processor: float = 0.0
    exchange: float = 0.0
    queued: float = 0.0


class Processors:
    """The machines of a run."""

    def __init__(self, machines: Machines, clock: Clock) -> None:
        self.machines, self.clock = machines, clock
        self.each: dict[int, Machine] = {}
        self.nodes: dict[int, _Used] = {}
        self.visits: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self.serving = 0.0  # seconds for which the server was at a visit

    def machine(self, node: int) -> Machine:
        """The one that a node is on."""
        name = self._name(node)
        if name not in self.each:
            self.each[name] = Machine(self.clock, self.machines.cores, self.machines.others)
        return self.each[name]

    def compute(self, worker: int, seconds: float, act: Callable[..., None], *args: Any) -> None:
        """Call ``act(*args)`` when a worker has computed for ``seconds``, of which it may sleep a part."""
        load = self.machines.load
        if load >= 1:
            self._run(worker, seconds, load, 0.0, act, *args)
        else:
            asleep = self.clock.now + (1 - load) * seconds
            self.clock.at(asleep, 2, self._run, worker, load * seconds, 1.0, 0.0, act, *args)

    def handle(self, worker: int, act: Callable[..., None], *args: Any) -> None:
        """Call ``act(*args)`` when a worker has made a message ready."""
        self._run(worker, self.machines.handling, 1.0, 1.0, act, *args)

    def serve(self, act: Callable[..., None], *args: Any) -> None:
        """Call ``act(*args)`` when the server has served a visit, after those that came before."""
        self.visits.append((act, args))
        if len(self.visits) == 1:
            self._next()

    def _next(self) -> None:
        machines = self.machines
        self._run(SERVER, machines.service, float(machines.shards), 0.0, self._served, self.clock.now)

    def _served(self, began: float) -> None:
        self.serving += self.clock.now - began
        act, args = self.visits.popleft()
        if self.visits:
            self._next()
        act(*args)

    def _run(
        self, node: int, seconds: float, threads: float, exchange: float, act: Callable[..., None], *args: Any
    ) -> None:
        if not seconds:
            act(*args)
            return
        self.machine(node).run(
            seconds, threads, self._done, node, seconds, threads, exchange, self.clock.now, act, args
        )

    def _done(
        self,
        node: int,
        seconds: float,
        threads: float,
        exchange: float,
        began: float,
        act: Callable[..., None],
        args: tuple[Any, ...],
    ) -> None:
        used = self.nodes.setdefault(node, _Used())
        used.processor += seconds * threads
        used.exchange += seconds * threads * exchange
        used.queued += max(0.0, self.clock.now - began - seconds) * threads
        act(*args)

    def loads(self, gradients: Mapping[int, int]) -> list[Load]:
        """What nodes have had so far, which have taken so many ``gradients``."""
        now = self.clock.now
        return [
            Load(
                now,
                node,
                gradients.get(node, 0),
                now,
                used.processor,
                used.exchange,
                used.queued,
                self.machine(node).busy,
                math.ceil(self.machines.cores),
                f"machine {self._name(node)}",
            )
            for node, used in sorted(self.nodes.items())
        ]

    def _name(self, node: int) -> int:
        per = self.machines.workers
        return 0 if per is None else SERVER if node == SERVER else node // per
