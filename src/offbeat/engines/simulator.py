"""The simulator: runs a method on a cluster of many workers in one process, deterministically, on a virtual clock.

Discrete events in a heap ordered by (time, priority, serial). A worker's loop is advanced until it asks for something
that takes time; the engine answers and never knows which method it runs. The same arguments give the same bits.
"""

from __future__ import annotations

import math
import platform
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..core.gossip import GossipMethod, PairGossipMethod
from ..core.method import Local, Message, Method
from ..core.problem import Problem
from ..core.protocol import SERVER, AllReduce, Ask, Gradient, Loop, Node, Recv, Request, Send, loop
from ..core.topology import Members
from ..core.values import refuse
from ..failure import Deadlock, Diverged, Failure, WorkerLost
from ..trace import Evaluation, Event, Incident, Trace
from .clock import Clock
from .cluster import Cluster, Crash, Join, Leave, Membership
from .ensemble import Centre, average, ensemble


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
        the mean RMSE of peers to their mean, 0 with a server.
        """
        loss, lag, gap = (self.trace.column(name).double() for name in ("loss", "lag", "gap"))
        last = max(1, len(loss) // 10)
        lost = sum(i.lost for i in self.trace.incidents)
        crashed = sum(i.what == "crashed" for i in self.trace.incidents)
        consensus = self.trace.column("consensus") if "consensus" in self.trace.columns else torch.zeros(1)
        return self.figures | {
            "train_loss": float(loss[-last:].mean()),
            "mean_lag": float(lag.mean()),
            "mean_gap": float(gap.mean()),
            "mean_consensus": float(consensus.mean()),
            "seconds": self.seconds,
            "gradients": float(len(loss)),
            "gradients_per_second": len(loss) / self.seconds,
            "crashes": float(crashed),
            "lost_gradients": float(lost),
        }


def simulate(
    method: Method,
    problem: Problem,
    cluster: Cluster | None = None,
    *,
    gradients: int,
    seed: int = 0,
    evaluate_every: int | None = None,
    watch: Callable[[Event], None] | None = None,
) -> Run:
    """Train ``problem`` with ``method`` on a simulated ``cluster`` until ``gradients`` minibatch gradients are taken.

    ``gradients`` counts all workers together. ``seed`` drives the cluster's randomness; the problem has its own seed
    for its data and minibatches. Every ``evaluate_every`` gradients the shipped model is evaluated into the trace (None:
    only at the end). ``watch`` is called with every event as it happens, for a progress bar or an early look.

    Raises ``ValueError`` for a bad argument, `Diverged` when a gradient or loss is not finite or not shaped like the
    parameters, `Deadlock` when nodes wait for each other for ever, `WorkerLost` when nobody is left to work; each of
    the last three keeps the trace.
    """
    return Simulation(method, problem, cluster or Cluster(), gradients, seed, evaluate_every, watch).run()


@dataclass
class _Worker:
    """A worker in the simulator: its loop and what it is waiting for."""

    node: Node
    loop: Loop
    times: Iterator[float]
    steps: int = 0  # gradients started
    visits: int = 0  # by others, since its gradient was started
    computing: bool = False
    leaving: bool = False
    returning: bool = False  # to join again as soon as it has left
    waits: Request | None = None
    inbox: deque[tuple[int, int | None, Message]] = field(default_factory=deque)


@dataclass
class _Taken:
    """A gradient that was taken, until its effect is recorded."""

    step: int
    x: Tensor
    loss: float


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
        watch: Callable[[Event], None] | None = None,
    ) -> None:
        if not isinstance(gradients, int) or gradients < 1:
            raise ValueError(f"gradients = {gradients!r}: must be a whole number, at least 1")
        if evaluate_every is not None and evaluate_every < 1:
            raise ValueError(f"evaluate_every = {evaluate_every!r}: must be at least 1, or None")
        method.check(cluster.workers)
        if isinstance(method, Local) and cluster.events:
            refuse(
                cluster, "events", cluster.events, f"{method.name!r} sends no messages, so nobody can join or leave it"
            )
        self.method, self.problem, self.cluster, self.gradients, self.seed = method, problem, cluster, gradients, seed
        self.evaluate_every, self.watch = evaluate_every, watch
        self.x0 = problem.x0()
        self.clock = Clock()
        self.granted = 0
        self.evaluated = 0
        self.workers: dict[int, _Worker] = {}
        self.streams: dict[int, Iterator[float]] = {}
        self.steps: dict[int, int] = {}
        self.newcomers: dict[int, Node] = {}
        self.reducing: dict[tuple[Members, int | None], dict[int, Message]] = {}
        self.ensemble = ensemble(method, self.x0, seed)
        self.trace = Trace(
            {
                "engine": "simulator",
                "method": repr(method),
                "problem": repr(problem),
                "cluster": repr(cluster),
                "gradients": gradients,
                "seed": seed,
                "evaluate_every": evaluate_every,
                "parameters": self.x0.numel(),
                "provenance": dict(getattr(problem, "provenance", {})),
                "threads": torch.get_num_threads(),
                "versions": {"offbeat": __version__, "torch": torch.__version__, "python": platform.python_version()},
            }
        )

    def run(self) -> Run:
        """Run to the end."""
        nodes = [Node(name, self.method) for name in range(self.cluster.workers)]
        self.ensemble.begin(nodes)
        for event in self.cluster.events:
            self.clock.at(event.at, 0, self._member, event)
        for node in nodes:
            self._start(node)
        while self.clock.step():
            pass
        if self.granted < self.gradients:
            raise self._stuck()
        self._evaluate()
        last = self.trace.evaluations[-1]
        return Run(self.ensemble.x(), self.trace, last.seconds, last.figures)

    # who is there

    def _start(self, node: Node) -> None:
        """The node has its state: its loop begins, next at this time."""
        if node.id not in self.streams:
            self.streams[node.id] = self.cluster.speed.stream(self.seed, node.id)
        worker = _Worker(node, loop(self.method, node), self.streams[node.id], self.steps.get(node.id, 0))
        self.workers[node.id] = worker
        self.clock.at(self.clock.now, 1, self._advance, worker, None)

    def _member(self, event: Membership) -> None:
        if len(self.trace) >= self.gradients:
            return  # what happens to workers after the last gradient is nobody's business
        if isinstance(event, Join) and event.worker in self.workers:  # it is still at its last gradient
            self.workers[event.worker].returning = True
        elif isinstance(event, Join):
            node = Node(event.worker, self.method)
            self.newcomers[event.worker] = node
            self.trace.note(Incident(self.clock.now, event.worker, "joined"))
            if self.ensemble.enter(node):
                self._start(node)
        elif event.worker not in self.workers:  # a newcomer that still waits for its round
            self.ensemble.leave(self.newcomers[event.worker], orderly=isinstance(event, Leave))
            self.trace.note(Incident(self.clock.now, event.worker, "left" if isinstance(event, Leave) else "crashed"))
        elif isinstance(event, Leave):
            self.workers[event.worker].leaving = True
            self.workers[event.worker].returning = False
        elif isinstance(event, Crash):
            worker = self.workers[event.worker]
            worker.returning = False
            lost, worker.computing = worker.computing, False
            self._gone(worker, "crashed", int(lost))
            if lost:  # somebody else takes it
                self.granted -= 1
                for other in list(self.workers.values()):
                    if isinstance(other.waits, Gradient) and not other.computing:
                        self._grant(other)

    def _gone(self, worker: _Worker, what: str, lost: int = 0) -> None:
        del self.workers[worker.node.id]
        self.steps[worker.node.id] = worker.steps
        worker.loop.close()
        self.trace.note(Incident(self.clock.now, worker.node.id, what, lost))
        orderly = what == "left"
        if orderly and isinstance(self.method, GossipMethod):
            for _, _, message in worker.inbox:
                worker.node.state = self.method.returned(worker.node.state, message)
        self._release(self.ensemble.leave(worker.node, orderly))
        for other in list(self.workers.values()):
            if isinstance(other.waits, Recv):
                self._receive(other)
        for members, round in list(self.reducing):
            self._reduce(members, round)
        for newcomer in self.ensemble.arrivals(None):
            self._start(newcomer)
        if worker.returning:
            self._member(Join(worker.node.id, self.clock.now))

    # what happens

    def _finish(self, worker: _Worker) -> None:
        """A worker's gradient is done: take it, and let the worker go on with it."""
        if self.workers.get(worker.node.id) is not worker:
            return  # it crashed meanwhile
        assert isinstance(worker.waits, Gradient)
        if self.evaluate_every and len(self.trace) % self.evaluate_every == 0:
            self._evaluate()
        worker.computing = False
        x, step = worker.waits.x, worker.steps - 1
        g, loss = self.problem.grad(x, worker.node.id, step)
        self._check(g, loss, worker.node.id, step)
        self._advance(worker, g, _Taken(step, x, float(loss)))

    def _advance(self, worker: _Worker, answer: Any, taken: _Taken | None = None) -> None:
        """Let the worker's loop run until it waits for something."""
        if self.workers.get(worker.node.id) is not worker:
            return None  # it crashed meanwhile
        worker.waits = None
        while True:
            request = worker.loop.send(answer)
            if taken:
                self._record(worker, taken, request)
                taken = None
            self.ensemble.changed(worker.node)
            worker.waits = request
            if isinstance(request, Gradient):
                return self._grant(worker)
            if isinstance(request, Recv):
                return self._receive(worker)
            if isinstance(request, AllReduce):
                self.reducing.setdefault((request.members, request.round), {})[worker.node.id] = request.msg
                return self._reduce(request.members, request.round)
            if isinstance(request, Ask) and request.to == SERVER:
                return self._visit(worker, request.msg)
            worker.waits = None
            if isinstance(request, Ask):
                answer = self._meet(request)
            elif isinstance(request, Send):
                answer = self._send(worker, request)
            else:
                answer = [(source, message) for source, _, message in worker.inbox]
                worker.inbox.clear()

    def _grant(self, worker: _Worker) -> None:
        for newcomer in self.ensemble.arrivals(worker.node):
            self._start(newcomer)
        assert isinstance(worker.waits, Gradient)
        if worker.leaving and worker.waits.free:
            self._gone(worker, "left")
        elif self.granted < self.gradients:
            self.granted += 1
            worker.steps += 1
            worker.computing = True
            worker.visits = 0
            self.clock.at(self.clock.now + next(worker.times), 2, self._finish, worker)  # after all that it may see

    def _resume(self, worker: _Worker, answer: Any) -> None:
        """What the worker waited for is there: it goes on next, at the same time."""
        worker.waits = None
        self.clock.at(self.clock.now, 1, self._advance, worker, answer)

    # answers that are messages

    def _visit(self, worker: _Worker, msg: Message) -> None:
        if not isinstance(self.ensemble, Centre):
            raise TypeError(f"{self.method!r} asks a server, and is no ServerMethod: there is none")
        self._release(self.ensemble.server.visit(worker.node.id, msg))
        self.ensemble.travel.moved(self.ensemble.mean())

    def _release(self, replies: dict[int, Message]) -> None:
        for node, reply in replies.items():
            self._resume(self.workers[node], reply)

    def _meet(self, request: Ask) -> Message | None:
        if not isinstance(self.method, PairGossipMethod):
            raise TypeError(f"{self.method!r} asks node {request.to}, and only a PairGossipMethod's peers answer")
        peer = self.workers.get(request.to)
        if peer is None:
            return None
        peer.node.state, reply = self.method.meet(peer.node.state, request.msg)
        peer.visits += 1
        self.ensemble.changed(peer.node)
        return reply

    def _send(self, worker: _Worker, request: Send) -> bool:
        to = self.workers.get(request.to)
        if to is None or (request.round is not None and request.round < to.node.since):
            return False  # dead, or not the one who would have taken it
        to.inbox.append((worker.node.id, request.round, request.msg))
        if isinstance(to.waits, Recv) and worker.node.id in to.waits.sources:
            self._receive(to)
        return True

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
        if all(source in got or not self._comes(source, round) for source in sources):
            worker.inbox = rest
            self._resume(worker, got)

    def _reduce(self, members: Members, round: int | None) -> None:
        """Answer those who reduce over ``members`` in ``round``, once all of them who can have asked."""
        asked = self.reducing[members, round]
        here = [m for m in members if self._comes(m, round)]
        if all(m in asked for m in here):
            del self.reducing[members, round]
            mean = average([asked[m] for m in here]) if here else None
            for m in here:
                self._resume(self.workers[m], mean)

    # what is recorded

    def _record(self, worker: _Worker, taken: _Taken, request: Request) -> None:
        """The event of a gradient, just before what it brings about changes the model."""
        push = request.msg if isinstance(request, Ask) and request.to == SERVER else None
        model = self.ensemble.mean()
        gap, normalised = self.ensemble.travel.gaps(model, taken.x)
        lag = self.ensemble.lag(worker.node) + worker.visits
        extra = self.ensemble.measure(worker.node, push)
        event = Event(self.clock.now, worker.node.id, taken.step, lag, gap, normalised, taken.loss, extra)
        self.ensemble.travel.moved(model)
        self.trace.add(event)
        if self.watch:
            self.watch(event)

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

    def _check(self, g: Tensor, loss: Tensor, worker: int, step: int) -> None:
        if not isinstance(g, Tensor) or g.shape != self.x0.shape or g.dtype != self.x0.dtype:
            shape = f"{tuple(g.shape)} {g.dtype}" if isinstance(g, Tensor) else type(g).__name__
            wanted = f"{tuple(self.x0.shape)} {self.x0.dtype}"
            raise self._failed(Diverged, f"the gradient is {shape}, the parameters are {wanted}", worker, step)
        finite = math.isfinite(float(torch.dot(g, g))) or bool(torch.isfinite(g).all())  # the first is faster
        if not finite or not math.isfinite(float(loss)):
            raise self._failed(Diverged, f"gradient or loss is not finite (loss {float(loss)})", worker, step)

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
            asked = self.reducing[request.members, request.round]
            others = [str(m) for m in request.members if m in self.workers and m not in asked]
            return f"worker {who} waits for {', '.join(others)} to reduce"
        return f"worker {who} waits for the server's reply"
