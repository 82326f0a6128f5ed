"""The simulator: runs a method on a cluster of many workers in one process, deterministically, on a virtual clock.

Discrete events in a heap ordered by (time, priority, serial). A worker's loop is advanced until it asks for something
that takes time; the engine answers and never knows which method it runs. The same arguments give the same bits.
"""

from __future__ import annotations

import platform
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..core.gossip import GossipMethod, PairGossipMethod
from ..core.method import Local, Message, Method, ServerMethod
from ..core.periodic import OuterMethod
from ..core.problem import Batched, Point, Problem
from ..core.protocol import SERVER, AllReduce, Ask, Begin, Gradient, Loop, Node, Recv, Request, Send, give_back, loop
from ..core.topology import Members
from ..core.values import refuse
from ..failure import Deadlock, Diverged, Failure, WorkerLost
from ..trace import Evaluation, Event, Incident, Trace
from .clock import Clock
from .cluster import Cluster, Crash, Join, Leave, MemberEvent
from .ensemble import Centre, Peers, average, ensemble
from .faults import Crashes, Fault
from .lanes import Coming, Count, Lanes, Taken, check_lanes
from .network import Traffic
from .processors import Processors
from .still import still


@dataclass
class Run:
    """What a run came to."""

    x: Tensor
    """The model that would be shipped: a server's master point, no look-ahead. [d]"""
    trace: Trace
    """Header, events, incidents, evaluations."""
    seconds: float
    """Virtual seconds that the cluster took."""
    figures: dict[str, float]
    """The problem's evaluation of ``x``."""

    def summary(self) -> dict[str, float]:
        """The run in a few floats: the problem's figures, and what the cluster did.

        ``train_loss`` is the mean minibatch loss over the last tenth of the gradients (at least one); ``mean_consensus``
        the mean RMSE of peers to their mean, 0 with a server. ``megabytes`` is what workers have sent. ``crashes`` says
        how many workers died; ``lost_gradients`` what they were at or bringing then, which others took; ``undone_gradients``
        what they had taken and delivered to nobody; ``lost_messages`` how many messages did not arrive for good.
        """
        loss, lag, gap = (self.trace.column(name).double() for name in ("loss", "lag", "gap"))
        last = max(1, len(loss) // 10)
        happened = Counter(i.what for i in self.trace.incidents)
        consensus = self.trace.column("consensus") if "consensus" in self.trace.columns else torch.zeros(1)
        return self.figures | {
            "train_loss": float(loss[-last:].mean()),
            "mean_lag": float(lag.mean()),
            "mean_gap": float(gap.nanmean()),
            "mean_consensus": float(consensus.mean()),
            "seconds": self.seconds,
            "gradients": float(len(loss)),
            "gradients_per_second": len(loss) / self.seconds,
            "megabytes": float(self.trace.column("sent").sum()) / 1e6,
            "crashes": float(happened["crashed"]),
            "lost_gradients": float(sum(i.lost for i in self.trace.incidents)),
            "undone_gradients": float(sum(i.undone for i in self.trace.incidents)),
            "lost_messages": float(happened["lost message"]),
        }


def simulate(
    method: Method,
    problem: Problem,
    cluster: Cluster | None = None,
    *,
    gradients: int,
    seed: int = 0,
    evaluate_every: int | None = None,
    lanes: Count = 1,
    abreast: int = 1,
    watch: Callable[[Event], None] | None = None,
) -> Run:
    """Train ``problem`` with ``method`` on a simulated ``cluster`` until ``gradients`` minibatch gradients are taken.

    ``gradients`` counts all workers together. ``seed`` drives the cluster's randomness; the problem has its own seed
    for its data and minibatches. Every ``evaluate_every`` gradients the shipped model is evaluated into the trace (None:
    only at the end). ``watch`` is called with every event as it happens, for a progress bar or an early look.

    The same arguments give the same bits, on an idle machine and on a busy one, on the same kind of processor with the same
    torch and number of torch's threads (on which the last bits of a long sum depend; the trace's header has it).

    Gradients of workers in flight depend on nothing that is still to come, so several may be taken at once: ``lanes`` is
    how many in one call, ``abreast`` how many by a thread of its own each, both at least 1, and one of them 1. The results
    are those of one at a time to rounding, and each number has bits of its own. ``lanes="auto"`` measures which way is the
    fastest, so that another run may take another; the trace's header has the numbers that give the same bits again.

    Raises ``ValueError`` for a bad argument, `Diverged` when a gradient or loss is not finite or not shaped like the
    parameters, `Deadlock` when nodes wait for each other for ever, `WorkerLost` when nobody is left to work; each of
    the last three keeps the trace.
    """
    return Simulation(
        method, problem, cluster or Cluster(), gradients, seed, evaluate_every, lanes, abreast, watch
    ).run()


def messages(method: Method) -> str:
    """What kind of messages a method has: ``server``, ``gossip``, ``reduce``."""
    while isinstance(method, OuterMethod):
        method = method.inner
    return "server" if isinstance(method, ServerMethod) else "gossip" if isinstance(method, GossipMethod) else "reduce"


@dataclass(eq=False, slots=True)
class _Worker:
    """A worker in the simulator: its loop and what it is waiting for."""

    node: Node
    loop: Loop
    times: Iterator[float]
    x: Tensor  # where it takes its present gradient
    idle: float  # since when it has had no gradient to compute
    steps: int = 0  # gradients started
    visits: int = 0  # by others, since its gradient was started
    pending: bool = False  # whether it has a gradient that has not taken effect yet
    undelivered: int = 0  # gradients taken whose effect nobody else has
    leaving: bool = False
    gone: bool = False
    returning: bool = False  # to join again as soon as it has left
    waits: Request | None = None
    ahead: Taken | Coming | None = None  # its present gradient, taken before its time
    taken: Taken | None = None  # the same once it is done, until the loop asks for it
    flying: bool = False  # whether it is at one that no fault will cut short
    due: float = 0.0  # when, if it has its cores for itself
    begun: float = 0.0  # since when it is at its present gradient
    inbox: deque[tuple[int, int | None, Message]] = field(default_factory=deque)
    coming: list[_Letter] = field(default_factory=list)  # one-way messages under way to it
    missed: set[tuple[int, int | None]] = field(default_factory=set)  # lost ones, by sender and round
    compute: float = 0.0  # seconds of its present gradient
    waited: float = 0.0  # seconds it had waited before that
    sent: float = 0.0  # bytes since its last event
    transits: list[float] = field(default_factory=list)  # seconds on the way of what has come since


@dataclass(eq=False)
class _Letter:
    """A one-way message under way."""

    source: _Worker
    to: _Worker
    round: int | None
    message: Message
    lost: bool
    sent: float


_Gradient = tuple[int, Tensor, float]
"""A gradient until its effect is recorded: the worker's step, the point, the loss."""


@dataclass
class _Reduction:
    """An all-reduce that not all have come to."""

    asked: dict[int, Message]
    missing: set[int]


def together(simulations: Sequence[Simulation]) -> list[Run | Failure]:
    """Run all to their end, side by side where their problems are kin: what each came to, or how it failed."""
    came: dict[Simulation, Run | Failure] = {}
    kin: dict[int, list[Simulation]] = {}
    for s in simulations:
        kin.setdefault(id(s.problem.kin() if isinstance(s.problem, Batched) else s), []).append(s)
    for alike in kin.values():
        came |= _side_by_side(alike)
    return [came[simulation] for simulation in simulations]


def _side_by_side(simulations: list[Simulation]) -> dict[Simulation, Run | Failure]:
    first = simulations[0]
    lanes = Lanes(first.problem, first.lanes, first.abreast, sum(s.gradients for s in simulations))
    came: dict[Simulation, Run | Failure] = {}
    wants: dict[Simulation, list[_Worker]] = {}

    def go(simulation: Simulation) -> None:
        simulation.start = lanes.start if lanes.threads else None
        try:
            wants[simulation] = simulation.proceed(alone=lanes.single)
            if wants[simulation]:
                return
            if len(came) + 1 == len(simulations):
                lanes.close()  # so that the last evaluation has all threads
            came[simulation] = simulation.end()
        except Failure as failure:
            came[simulation] = failure
        wants.pop(simulation, None)

    try:
        for simulation in simulations:
            simulation.begin()
            go(simulation)
        while wants:
            if lanes.single:
                flying = [next((s, workers[0]) for s, workers in wants.items())]
            else:  # those needed first, first
                ranks = zip_longest(*([(s, w) for w in workers] for s, workers in wants.items()))
                flying = [each for rank in ranks for each in rank if each]
            points = [Point(s.problem, w.x, w.node.id, w.steps - 1) for s, w in flying]
            for (_, worker), taken in zip(flying, lanes(points), strict=False):
                worker.ahead = taken
            for simulation in [s for s, workers in wants.items() if workers[0].ahead]:
                go(simulation)
    finally:
        lanes.close()
        for simulation in simulations:
            simulation.trace.header |= {"lanes": lanes.taken, "abreast": lanes.abreast}
    return came


class Simulation:
    """One run in progress. `simulate` is the usual way in."""

    def __init__(
        self,
        method: Method,
        problem: Problem,
        cluster: Cluster,
        gradients: int,
        seed: int = 0,
        evaluate_every: int | None = None,
        lanes: Count = 1,
        abreast: int = 1,
        watch: Callable[[Event], None] | None = None,
    ) -> None:
        if not isinstance(gradients, int) or gradients < 1:
            raise ValueError(f"gradients = {gradients!r}: must be a whole number, at least 1")
        if evaluate_every is not None and evaluate_every < 1:
            raise ValueError(f"evaluate_every = {evaluate_every!r}: must be at least 1, or None")
        check_lanes(lanes)
        if not isinstance(abreast, int) or abreast < 1:
            raise ValueError(f"abreast = {abreast!r}: must be a whole number, at least 1")
        if lanes != 1 != abreast:
            raise ValueError(f"lanes = {lanes}, abreast = {abreast}: one of them must be 1")
        method.check(cluster.workers)
        gone = cluster.events or [fault for fault in cluster.faults if isinstance(fault, Crashes)]
        if isinstance(method, Local) and gone:
            field = "events" if cluster.events else "faults"
            refuse(cluster, field, gone, f"{method.name!r} sends no messages, so nobody can join or leave it")
        self.problem, self.cluster, self.gradients, self.seed = problem, cluster, gradients, seed
        self.evaluate_every, self.watch = evaluate_every, watch
        self.x0 = problem.x0()
        stands = getattr(problem, "parameters", None)  # for how many of them, where nothing is learnt
        self.scale = (stands or self.x0.numel()) / self.x0.numel()
        self.method = still(method, self.x0) if stands else method
        self.nothing = Taken(torch.zeros_like(self.x0), 0.0) if stands else None
        self.lanes, self.abreast = lanes, abreast
        self.clock = Clock()
        self.slowdowns, self.crashes, self.losses, self.partitions = (
            [getattr(fault, hook) for fault in cluster.faults if getattr(type(fault), hook) is not getattr(Fault, hook)]
            for hook in ("slowdown", "crash", "loses", "healed")
        )
        self.traffic = Traffic(cluster.network, self.clock, self._healed)
        self.granted = 0
        self.evaluated = 0
        self.workers: dict[int, _Worker] = {}
        self.streams: dict[int, Iterator[float]] = {}
        self.steps: dict[int, int] = {}
        self.newcomers: dict[int, Node] = {}
        self.reducing: dict[tuple[Members, int | None], _Reduction] = {}
        self.ensemble = ensemble(self.method, self.x0, seed)
        self.peers = self.ensemble if isinstance(self.ensemble, Peers) else None
        self.processors = None if cluster.machines is None else Processors(cluster.machines, self.clock)
        self.instant = self.traffic.free and not self.partitions and self.processors is None
        self.sizes: dict[int, float] = {}
        self.kept: list[Message] = []  # so that no other takes its place
        quiet = self.instant and not (cluster.events or cluster.faults or evaluate_every)
        meets = isinstance(self.method, ServerMethod) and self.method.period == 1 and not self.method.late
        self.finishing = self._rounds if quiet and meets and self.method is not method else self._finish  # bound once
        self.wanting: _Worker | None = None  # a gradient, before anything else can happen
        self.start: Callable[[Point, int], Coming | None] | None = None  # begins with a gradient before it is wanted
        self.trace = Trace(
            {
                "engine": "simulator",
                "method": repr(method),
                "problem": repr(problem),
                "cluster": repr(cluster),
                "gradients": gradients,
                "seed": seed,
                "evaluate_every": evaluate_every,
                "lanes": lanes,
                "abreast": abreast,
                "messages": messages(method),
                "ping": self.traffic.ping(),
                "parameters": round(self.scale * self.x0.numel()),
                "provenance": dict(getattr(problem, "provenance", {})),
                "threads": torch.get_num_threads(),
                "versions": {"offbeat": __version__, "torch": torch.__version__, "python": platform.python_version()},
            }
        )

    def run(self) -> Run:
        """Run to the end."""
        (run,) = together([self])
        if isinstance(run, Failure):
            raise run
        return run

    def begin(self) -> None:
        """Let the workers come."""
        nodes = [Node(name, self.method) for name in range(self.cluster.workers)]
        self.ensemble.begin(nodes)
        for event in self.cluster.events:
            self.clock.at(event.at, 0, self._member, event)
        for node in nodes:
            self._start(node, node.id)

    def proceed(self, alone: bool) -> list[_Worker]:
        """Let things happen until a gradient is needed: whose, and unless ``alone`` all in flight that have none, by time.

        Empty when nothing happens any more. Raises a `Failure`.
        """
        while self.clock.step():
            if self.wanting:
                wanting, self.wanting = self.wanting, None
                if alone:
                    return [wanting]
                wants = [w for w in self.workers.values() if w.flying and w.ahead is None]
                return sorted(wants, key=lambda w: (w.due, w is not wanting, w.node.id))
        return []

    def end(self) -> Run:
        """What it came to."""
        if self.granted < self.gradients:
            raise self._stuck()
        self._evaluate()
        last = self.trace.evaluations[-1]
        return Run(self.ensemble.x(), self.trace, last.seconds, last.figures)

    # who is there

    def _start(self, node: Node, source: int) -> None:
        """The node has its state: its loop begins, next after the model has come from ``source`` (itself: from nobody)."""
        if node.id not in self.streams:
            self.streams[node.id] = self.cluster.speed.stream(self.seed, node.id)
        times, steps = self.streams[node.id], self.steps.get(node.id, 0)
        worker = _Worker(node, loop(self.method, node), times, self.x0, self.clock.now, steps)
        self.workers[node.id] = worker
        if source == node.id:
            self._resume(worker, None)
        else:
            self._transfer(source, node.id, self.x0, self._resume, worker, None)

    def _transfer(self, source: int, to: int, message: Message, act: Callable[..., None], *args: Any) -> None:
        """Call ``act(*args)`` once ``message`` has come from ``source`` to ``to``."""
        worker = self.workers.get(source)
        if worker is None and self.instant:
            act(*args)
            return
        size = self._size(message)
        if worker:
            worker.sent += size
            if size and "message" not in self.trace.header:
                self.trace.header["message"] = size
        if self.instant:
            act(*args)
        elif worker and self.processors:
            self.processors.handle(source, self.traffic.send, source, to, size, act, *args)
        else:
            self.traffic.send(source, to, size, act, *args)

    def _size(self, message: Message) -> float:
        """How many bytes ``message`` has."""
        if self.nothing is None:
            return self.cluster.network.size(message, self.scale)
        size = self.sizes.get(id(message))  # a still method's messages are few, and always the same
        if size is None:
            self.sizes[id(message)] = size = self.cluster.network.size(message, self.scale)
            self.kept.append(message)
        return size

    def _healed(self, a: int, b: int, now: float) -> float:
        """When ``a`` and ``b`` can next talk."""
        while self.partitions and (then := max(healed(a, b, now) for healed in self.partitions)) > now:
            now = then
        return now

    def _member(self, event: MemberEvent) -> None:
        if len(self.trace) >= self.gradients:
            return  # what happens to workers after the last gradient is nobody's business
        if isinstance(event, Join) and event.worker in self.workers:  # it is still at its last gradient
            self.workers[event.worker].returning = True
        elif isinstance(event, Join):
            node = Node(event.worker, self.method)
            self.newcomers[event.worker] = node
            self.trace.note(Incident(self.clock.now, event.worker, "joined"))
            source = self.ensemble.enter(node)
            if source is not None:
                self._start(node, source)
        elif event.worker not in self.workers:  # a newcomer that still waits for its round
            self.ensemble.leave(self.newcomers[event.worker], orderly=isinstance(event, Leave))
            self.trace.note(Incident(self.clock.now, event.worker, "left" if isinstance(event, Leave) else "crashed"))
        elif isinstance(event, Leave):
            self.workers[event.worker].leaving = True
            self.workers[event.worker].returning = False
        elif isinstance(event, Crash):
            worker = self.workers[event.worker]
            worker.returning = False
            lost = worker.pending
            self._gone(worker, "crashed", int(lost), worker.undelivered)
            if lost:  # somebody else takes it
                self.granted -= 1
                for other in list(self.workers.values()):
                    if isinstance(other.waits, Gradient | Begin) and not other.pending:
                        self._grant(other, other.waits)

    def _die(self, worker: _Worker, downtime: float) -> None:
        """The worker crashes by a fault, and will be back."""
        if not worker.gone:
            self._member(Crash(worker.node.id, self.clock.now))
            self.clock.at(self.clock.now + downtime, 0, self._member, Join(worker.node.id, self.clock.now + downtime))

    def _gone(self, worker: _Worker, what: str, lost: int = 0, undone: int = 0) -> None:
        del self.workers[worker.node.id]
        worker.gone = True
        self.steps[worker.node.id] = worker.steps
        worker.loop.close()
        self.trace.note(Incident(self.clock.now, worker.node.id, what, lost, undone))
        orderly = what == "left"
        for letter in worker.coming:
            self._return(letter, orderly)
        if orderly:
            for _, _, message in worker.inbox:
                give_back(worker.node, message)
        self._release(self.ensemble.leave(worker.node, orderly))
        for other in list(self.workers.values()):
            if isinstance(other.waits, Recv):
                self._receive(other)
        for (members, round), reduction in list(self.reducing.items()):
            reduction.missing.discard(worker.node.id)
            self._reduce(members, round)
        for newcomer in self.ensemble.arrivals(None):
            self._start(newcomer, newcomer.id)
        if worker.returning:
            self._member(Join(worker.node.id, self.clock.now))

    # what happens

    def _finish(self, worker: _Worker) -> None:
        """A worker's gradient is done: take it, and let the worker go on with it."""
        if worker.gone:
            return  # it crashed meanwhile
        taken = worker.ahead or self.nothing
        if taken is None:
            self.wanting = worker
            self.clock.at(self.clock.now, -1, self._finish, worker)  # next
            return
        worker.taken = taken if isinstance(taken, Taken) else taken()
        if self.processors:  # it may have shared its cores meanwhile
            worker.compute = self.clock.now - worker.begun
        worker.idle, worker.ahead, worker.flying = self.clock.now, None, False
        if isinstance(worker.waits, Gradient):  # else it is on a visit, and takes it when it is back
            self._use(worker)

    def _use(self, worker: _Worker) -> None:
        """A worker's gradient takes effect."""
        taken, worker.taken = worker.taken, None
        assert taken is not None
        if self.evaluate_every:
            self._evaluate_due()
        if taken.wrong:
            raise self._failed(Diverged, taken.wrong, worker.node.id, worker.steps - 1)
        self._advance(worker, taken.g, (worker.steps - 1, worker.x, taken.loss))

    def _rounds(self, first: _Worker) -> None:
        """The whole run from its first gradient on, where a server is met at no cost and nothing is learnt or can fail."""
        assert isinstance(self.ensemble, Centre)
        server, record, watch, left = self.ensemble.server, self.trace.extend, self.watch, self.gradients - self.granted
        version, seen = server.version, server.seen
        flying = [w for w in self.workers.values() if w.flying]
        size = self._size(server.method.push(first.node.state))
        if size:
            self.trace.header["message"] = size
        heap = [(w.due, serial, w) for serial, w in enumerate(flying)]
        heapify(heap)
        self.clock.clear()
        while heap:
            now, _, worker = heap[0]
            who = worker.node.id
            row = now, who, worker.steps - 1, version - seen[who], 0.0, 0.0, 0.0, worker.compute, 0.0, size, 0.0
            record(row)
            if watch:
                watch(Event(*row))
            version += 1
            seen[who] = version
            if version <= left:
                worker.steps += 1
                worker.compute = took = next(worker.times)
                heapreplace(heap, (now + took, version + len(flying), worker))
            else:
                heappop(heap)
        server.version, self.granted = version, self.gradients

    def _advance(self, worker: _Worker, answer: Any, taken: _Gradient | None = None) -> None:
        """Let the worker's loop run until it waits for something."""
        if worker.gone:
            return None  # it crashed meanwhile
        worker.waits = None
        while True:
            request = worker.loop.send(answer)
            if taken and not (isinstance(request, Ask) and request.to == SERVER):
                self._record(worker, taken, None)
                taken = None
            if self.peers:
                self.peers.changed(worker.node)
            worker.waits = request
            if isinstance(request, Gradient) and worker.pending:  # it has begun
                return self._use(worker) if worker.taken else None
            if isinstance(request, Gradient | Begin):
                return self._grant(worker, request)
            if isinstance(request, Recv):
                return self._receive(worker)
            if isinstance(request, AllReduce) and self.processors:
                return self.processors.handle(worker.node.id, self._contribute, worker, request)
            if isinstance(request, AllReduce):
                return self._contribute(worker, request)
            if isinstance(request, Ask) and request.to == SERVER:
                return self._transfer(worker.node.id, SERVER, request.msg, self._arrive, worker, request.msg, taken)
            if isinstance(request, Ask):
                return self._ask(worker, request)
            worker.waits = None
            if isinstance(request, Send):
                answer = self._send(worker, request)
            else:
                answer = [(source, message) for source, _, message in worker.inbox]
                worker.inbox.clear()

    def _grant(self, worker: _Worker, request: Gradient | Begin) -> None:
        if self.peers:
            for newcomer in self.peers.arrivals(worker.node):
                self._start(newcomer, worker.node.id)
        if request.free and isinstance(request, Gradient):
            worker.undelivered = 0
        if worker.leaving and request.free:
            self._gone(worker, "left")
        elif self.granted < self.gradients:
            now, who = self.clock.now, worker.node.id
            self.granted += 1
            worker.steps += 1
            worker.x = request.x
            worker.pending = True
            worker.visits = 0
            worker.waited = now - worker.idle
            worker.compute = next(worker.times)
            for slowdown in self.slowdowns:
                worker.compute *= slowdown(who, now)
            if isinstance(request, Begin):
                self._resume(worker, None)
            if self.crashes:
                deaths = (crash(self.seed, who, worker.steps - 1) for crash in self.crashes)
                if death := next(filter(None, deaths), None):
                    part, downtime = death
                    self.clock.at(now + part * worker.compute, 0, self._die, worker, downtime)
                    return
            worker.flying = True
            worker.begun, worker.due = now, now + worker.compute
            if self.start:
                worker.ahead = self.start(Point(self.problem, worker.x, who, worker.steps - 1), len(self.workers))
            if self.processors:
                self.processors.compute(who, worker.compute, self.finishing, worker)
            else:
                self.clock.at(worker.due, 2, self.finishing, worker)  # after all that it may see

    def _resume(self, worker: _Worker, answer: Any, sent: float | None = None) -> None:
        """What the worker waited for is there (on its way since ``sent``): it goes on next, at the same time."""
        worker.waits = None
        if sent is not None:
            worker.transits.append(self.clock.now - sent)
        self.clock.at(self.clock.now, 1, self._advance, worker, answer)

    # answers that are messages

    def _arrive(self, worker: _Worker, msg: Message, taken: _Gradient | None) -> None:
        """What the worker has sent is at the server."""
        if self.processors:
            self.processors.serve(self._visit, worker, msg, taken)
        else:
            self._visit(worker, msg, taken)

    def _visit(self, worker: _Worker, msg: Message, taken: _Gradient | None) -> None:
        """What the worker has sent is served."""
        if not isinstance(self.ensemble, Centre):
            raise TypeError(f"{self.method!r} asks a server, and is no ServerMethod: there is none")
        if worker.gone:
            return  # it crashed meanwhile, and the server takes nothing from the dead
        if taken:
            self._evaluate_due()
            self._record(worker, taken, msg)
        worker.undelivered = 0
        replies = self.ensemble.server.visit(worker.node.id, msg)
        if self.nothing is None:
            self.ensemble.travel.moved(self.ensemble.mean())
        if self.instant and len(replies) == 1 and worker.node.id in replies and not self.clock.busy(1):
            self._advance(worker, replies[worker.node.id])
        else:
            self._release(replies)

    def _release(self, replies: dict[int, Message]) -> None:
        for node, reply in replies.items():
            self._transfer(SERVER, node, reply, self._resume, self.workers[node], reply, self.clock.now)

    def _ask(self, worker: _Worker, request: Ask) -> None:
        if not isinstance(self.method, PairGossipMethod):
            raise TypeError(f"{self.method!r} asks node {request.to}, and only a PairGossipMethod's peers answer")
        if request.to in self.workers:
            self._transfer(worker.node.id, request.to, request.msg, self._meet, worker, request)
        else:
            self._resume(worker, None)

    def _meet(self, worker: _Worker, request: Ask) -> None:
        """A visitor is at the peer that it asks."""
        assert isinstance(self.method, PairGossipMethod)
        if worker.gone:
            return  # the visitor crashed meanwhile
        peer = self.workers.get(request.to)
        if peer is None:
            self._resume(worker, None)
            return
        peer.node.state, reply = self.method.meet(peer.node.state, request.msg)
        peer.visits += 1
        worker.undelivered = peer.undelivered = 0  # each has a part in what the other did
        self.ensemble.changed(peer.node)
        self._transfer(request.to, worker.node.id, reply, self._resume, worker, reply, self.clock.now)

    def _send(self, worker: _Worker, request: Send) -> bool:
        to = self.workers.get(request.to)
        if to is None or (request.round is not None and request.round < to.node.since):
            return False  # dead, or not the one who would have taken it
        lost = any(loses(self.seed, worker.node.id, request.to, worker.steps - 1) for loses in self.losses)
        letter = _Letter(worker, to, request.round, request.msg, lost, self.clock.now)
        to.coming.append(letter)
        self._transfer(worker.node.id, request.to, request.msg, self._deliver, letter)
        return True

    def _deliver(self, letter: _Letter) -> None:
        """A one-way message is where it should be, or would be now had it not been lost."""
        source, to = letter.source.node.id, letter.to
        to.coming.remove(letter)
        if letter.lost:
            to.missed.add((source, letter.round))
            self.trace.note(Incident(self.clock.now, source, "lost message"))
        elif not to.gone:
            to.inbox.append((source, letter.round, letter.message))
            to.transits.append(self.clock.now - letter.sent)
        if isinstance(to.waits, Recv) and source in to.waits.sources:
            self._receive(to)

    def _return(self, letter: _Letter, orderly: bool) -> None:
        """The receiver of a message under way has gone: it goes back at once, before an average is taken without it."""
        source, to = letter.source.node, letter.to.node
        if letter.lost:
            return
        if not letter.source.gone:
            give_back(source, letter.message)
            self.ensemble.changed(source)
        elif orderly:
            give_back(to, letter.message)  # who hands it on
        else:
            self.trace.note(Incident(self.clock.now, source.id, "lost message"))  # with both its ends

    def _comes(self, node: int, round: int | None) -> bool:
        """Whether the node may still say something that belongs to ``round``."""
        return node in self.workers and (round is None or self.workers[node].node.step <= round)

    def _receive(self, worker: _Worker) -> None:
        assert isinstance(worker.waits, Recv)
        sources, round = worker.waits
        got: dict[int, Message] = {}
        rest: deque[tuple[int, int | None, Message]] = deque()
        for item in worker.inbox:
            source, of, message = item
            if of == round and source in sources and source not in got:
                got[source] = message
            else:
                rest.append(item)
        coming = {(letter.source.node.id, letter.round) for letter in worker.coming}
        for s in sources:
            comes = (s, round) in coming or ((s, round) not in worker.missed and self._comes(s, round))
            if s not in got and comes:
                return
        worker.inbox = rest
        worker.missed -= {(s, round) for s in sources}
        self._resume(worker, {s: got[s] for s in sources if s in got})

    def _contribute(self, worker: _Worker, request: AllReduce) -> None:
        members, round = request.members, request.round
        if worker.gone:
            return  # it crashed meanwhile
        if (members, round) not in self.reducing:
            self.reducing[members, round] = _Reduction({}, {m for m in members if self._comes(m, round)})
        reduction = self.reducing[members, round]
        reduction.asked[worker.node.id] = request.msg
        reduction.missing.discard(worker.node.id)
        self._reduce(members, round)

    def _reduce(self, members: Members, round: int | None) -> None:
        """Answer those who reduce over ``members`` in ``round``, once all of them who can have asked."""
        asked, missing = self.reducing[members, round].asked, self.reducing[members, round].missing
        if missing:
            return
        del self.reducing[members, round]
        here = [m for m in members if self._comes(m, round)]
        if not here:
            return
        mean = asked[here[0]] if self.nothing else average([asked[m] for m in here])
        size = self._size(asked[here[0]])
        done = self.traffic.reduce(here, size)
        for m in here:
            self.workers[m].waits = None
            self.workers[m].sent += 2 * (len(here) - 1) / len(here) * size
            if done > self.clock.now:
                self.workers[m].transits.append(done - self.clock.now)
            self.clock.at(done, 1, self._advance, self.workers[m], mean)

    # what is recorded

    def _record(self, worker: _Worker, taken: _Gradient, push: Message | None) -> None:
        """The event of a gradient, just before what it brings about (``push`` at the server) changes the model."""
        step, x, loss = taken
        ensemble, transits = self.ensemble, worker.transits
        lag = ensemble.lag(worker.node) + worker.visits
        transit = sum(transits) / len(transits) if transits else 0.0
        gap, normalised, extra = 0.0, 0.0, {}
        if self.nothing is None:
            model = ensemble.mean()
            gap, normalised = ensemble.travel.gaps(model, x)
            extra = ensemble.measure(worker.node, push)
            ensemble.travel.moved(model)
        cost = worker.compute, worker.waited, worker.sent, transit
        event = Event(self.clock.now, worker.node.id, step, lag, gap, normalised, loss, *cost, extra)
        worker.pending, worker.sent, worker.transits = False, 0.0, []
        worker.undelivered += 1
        self.trace.add(event)
        if self.processors and len(self.trace) % max(1, self.gradients // 100) == 0:
            counts = {SERVER: len(self.trace)} | {w.node.id: w.steps for w in self.workers.values()}
            for load in self.processors.loads(counts):
                self.trace.note(load)
        if self.watch:
            self.watch(event)

    def _evaluate_due(self) -> None:
        if self.evaluate_every and len(self.trace) % self.evaluate_every == 0:
            self._evaluate()

    def _evaluate(self) -> None:
        """Evaluate the model after the gradients so far, once."""
        if self.evaluated == len(self.trace):
            return
        self.evaluated = len(self.trace)
        x = self.ensemble.x()
        if not bool(torch.isfinite(x).all()):
            worker = self.trace[-1].worker
            raise self._failed(Diverged, "the parameters are not finite", worker, self.trace[-1].step)
        figures = {name: float(value) for name, value in self.problem.evaluate(x).items()}
        self.trace.note(Evaluation(self.trace[-1].seconds, len(self.trace), figures))

    # failures

    def _failed(self, failure: type[Diverged], what: str, worker: int, step: int) -> Failure:
        self.trace.note(Incident(self.clock.now, worker, "diverged"))
        place = f"worker {worker}, step {step}, at {self.clock.now:.6g} s after {len(self.trace)} gradients"
        cure = "lower the learning rate or lengthen the warm-up" if "finite" in what else "correct the problem's grad"
        return failure(f"{type(self.method).__name__} diverged at {place}: {what}; {cure}", self.trace, worker, step)

    def _stuck(self) -> Failure:
        left = f"{self.gradients - self.granted} of {self.gradients} gradients were never taken"
        now = f"{self.clock.now:.6g} s"
        waiting = [self._waits(w) for w in self.workers.values()]
        if not waiting:
            return WorkerLost(f"no worker is left at {now}, {left}: add a Join or remove a Leave", self.trace)
        return Deadlock(f"nothing can happen after {now}, {left}: {'; '.join(waiting)}", self.trace)

    def _waits(self, worker: _Worker) -> str:
        request, who = worker.waits, worker.node.id
        if isinstance(request, Recv):
            here = {source for source, round, _ in worker.inbox if round == request.round}
            return f"worker {who} waits for {', '.join(str(s) for s in request.sources if s not in here)}"
        if isinstance(request, AllReduce):
            missing = self.reducing[request.members, request.round].missing
            return f"worker {who} waits for {', '.join(map(str, sorted(missing)))} to reduce"
        return f"worker {who} waits for the server's reply"
