"""The simulator: runs a method on a cluster of many workers in one process, deterministically, on a virtual clock.

Discrete events in a heap ordered by (time, priority, serial). A worker's loop is advanced until it asks for something
that takes time; the engine answers and never knows which method it runs. The same arguments give the same bits.
"""

from __future__ import annotations

import heapq
import platform
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import __version__
from ..core.method import Local, Method, ServerMethod
from ..core.problem import Problem
from ..core.protocol import SERVER, AllReduce, Ask, Gradient, Inbox, Loop, Message, Node, Recv, Request, Send, Server, loop
from ..core.values import require
from ..failure import Deadlock, Diverged, Failure, WorkerLost
from ..trace import Evaluation, Event, Incident, Trace
from .cluster import Cluster, Crash, Join, Leave, Membership


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

        ``train_loss`` is the mean minibatch loss over the last tenth of the gradients (at least one).
        """
        loss, lag, gap = (self.trace.column(name).double() for name in ("loss", "lag", "gap"))
        last = max(1, len(loss) // 10)
        lost = sum(i.lost for i in self.trace.incidents)
        crashed = sum(i.what == "crashed" for i in self.trace.incidents)
        return self.figures | {
            "train_loss": float(loss[-last:].mean()),
            "mean_lag": float(lag.mean()),
            "mean_gap": float(gap.mean()),
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

    ``gradients`` counts all workers together. ``seed`` drives the cluster's randomness; the problem has its own seed for
    its data and minibatches. ``evaluate_every`` gradients the shipped model is evaluated into the trace (None: only at
    the end). ``watch`` is called with every event as it happens, for a progress bar or an early look.

    Raises ``ValueError`` for a bad argument, `Diverged` when a gradient or loss is not finite or not shaped like the
    parameters, `Deadlock` when nodes wait for each other for ever, `WorkerLost` when nobody is left to work; each of the
    last three keeps the trace.
    """
    return Simulation(method, problem, cluster or Cluster(), gradients, seed, evaluate_every, watch).run()


@dataclass
class _Worker:
    """A worker in the simulator: its loop and what it is waiting for."""

    node: Node
    loop: Loop
    times: Iterator[float]
    steps: int = 0  # gradients started
    leaving: bool = False
    waits: Request | None = None
    inbox: deque[tuple[int, Message]] = field(default_factory=deque)


@dataclass
class _Taken:
    """A gradient that was taken, until its effect is recorded."""

    step: int
    x: Tensor
    loss: float


class _Travel:
    """How far each parameter moves in one update of the master: root of a running mean of squares, bias corrected."""

    decay = 0.99

    def __init__(self, x: Tensor) -> None:
        self.square = torch.zeros_like(x)
        self.weight = 0.0
        self.last = x

    def gaps(self, x: Tensor, point: Tensor) -> tuple[float, float]:
        """The gap between master ``x`` and ``point``: RMSE, and mean in units of each parameter's usual update."""
        difference = x - point
        rmse = float(difference.norm()) / x.numel() ** 0.5
        if not self.weight or not rmse:
            return rmse, 0.0
        usual = (self.square / self.weight).sqrt_()
        return rmse, float(difference.abs_().div_(usual.add_(torch.finfo(x.dtype).tiny)).mean())

    def moved(self, x: Tensor) -> None:
        if x is not self.last:
            step = x - self.last
            self.square.mul_(self.decay).addcmul_(step, step, value=1 - self.decay)
            self.weight = self.decay * self.weight + 1 - self.decay
            self.last = x


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
        if isinstance(method, Local) and (cluster.workers > 1 or cluster.events):
            require(cluster, "workers", False, f"{type(method).__name__} sends no messages: give it one worker, and no events")
        self.method, self.problem, self.cluster, self.gradients, self.seed = method, problem, cluster, gradients, seed
        self.evaluate_every, self.watch = evaluate_every, watch
        self.x0 = problem.x0()
        self.now = 0.0
        self.granted = 0
        self.heap: list[tuple[float, int, int, Callable[..., None], tuple[Any, ...]]] = []
        self.serial = 0
        self.workers: dict[int, _Worker] = {}
        self.streams: dict[int, Iterator[float]] = {}
        self.steps: dict[int, int] = {}
        self.server = Server.start(method, self.x0) if isinstance(method, ServerMethod) else None
        self.travel = _Travel(self.x0)
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
                "versions": {"offbeat": __version__, "torch": torch.__version__, "python": platform.python_version()},
            }
        )

    def run(self) -> Run:
        """Run to the end."""
        for worker in range(self.cluster.workers):
            self._join(worker)
        for event in self.cluster.events:
            self._push(event.at, 0, self._member, event)
        for worker in list(self.workers.values()):
            self._advance(worker, None)
        while self.heap and (len(self.trace) < self.gradients or self.heap[0][1]):  # no membership after the last gradient
            self.now, _, _, act, args = heapq.heappop(self.heap)
            act(*args)
        if self.granted < self.gradients:
            raise self._stuck()
        x = self._shipped()
        return Run(x, self.trace, self.now, self._evaluate(x))

    # what happens

    def _join(self, worker: int) -> _Worker:
        if worker not in self.streams:
            self.streams[worker] = self.cluster.speed.stream(self.seed, worker)
        node = Node(worker, self.method)
        start = self.server.join(worker) if self.server else self.x0
        node.state = self.method.init(start)
        self.workers[worker] = _Worker(node, loop(self.method, node), self.streams[worker], self.steps.get(worker, 0))
        return self.workers[worker]

    def _gone(self, worker: _Worker, what: str, lost: int = 0) -> None:
        del self.workers[worker.node.id]
        self.steps[worker.node.id] = worker.steps
        worker.loop.close()
        if self.server:
            self.server.leave(worker.node.id)
        self.trace.incidents.append(Incident(self.now, worker.node.id, what, lost))

    def _member(self, event: Membership) -> None:
        if isinstance(event, Join):
            worker = self._join(event.worker)
            self.trace.incidents.append(Incident(self.now, event.worker, "joined"))
            self._advance(worker, None)
            return
        worker = self.workers[event.worker]
        if isinstance(event, Leave):
            worker.leaving = True
        elif isinstance(event, Crash):
            lost = isinstance(worker.waits, Gradient)
            self.granted -= lost  # somebody else takes it
            self._gone(worker, "crashed", int(lost))

    def _finish(self, worker: _Worker) -> None:
        """A worker's gradient is done: take it, and let the worker go on with it."""
        if self.workers.get(worker.node.id) is not worker:
            return  # it crashed meanwhile
        assert isinstance(worker.waits, Gradient)
        x, step = worker.waits.x, worker.steps - 1
        g, loss = self.problem.grad(x, worker.node.id, step)
        self._check(g, loss, worker.node.id, step)
        self._advance(worker, g, _Taken(step, x, float(loss)))

    def _advance(self, worker: _Worker, answer: Any, taken: _Taken | None = None) -> None:
        """Let the worker's loop run until it waits for something."""
        while True:
            request = worker.loop.send(answer)
            if isinstance(request, Ask):
                self._record(worker, taken, request)
                taken = None
                answer = self._ask(worker, request)
                continue
            self._record(worker, taken)
            taken = None
            if isinstance(request, Inbox):
                answer = list(worker.inbox)
                worker.inbox.clear()
            elif isinstance(request, Send):
                answer = self._send(worker, request)
            else:
                break
        worker.waits = request
        if isinstance(request, Gradient):
            self._grant(worker)
        elif isinstance(request, Recv):
            self._receive(worker)
        elif isinstance(request, AllReduce):
            self._reduce()

    def _grant(self, worker: _Worker) -> None:
        if worker.leaving:
            self._gone(worker, "left")
        elif self.granted < self.gradients:
            self.granted += 1
            worker.steps += 1
            self._push(self.now + next(worker.times), 1, self._finish, worker)

    def _push(self, at: float, priority: int, act: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self.heap, (at, priority, self.serial, act, args))
        self.serial += 1

    # answers that are messages

    def _ask(self, worker: _Worker, request: Ask) -> Message:
        if request.to != SERVER or self.server is None:
            raise TypeError(f"{self.method!r} asks node {request.to}, and only a server answers")
        reply = self.server.serve(worker.node.id, request.msg)
        self.travel.moved(self.server.x())
        return reply

    def _send(self, worker: _Worker, request: Send) -> None:
        if request.to in self.workers:
            to = self.workers[request.to]
            to.inbox.append((worker.node.id, request.msg))
            if isinstance(to.waits, Recv):
                self._receive(to)

    def _receive(self, worker: _Worker) -> None:
        assert isinstance(worker.waits, Recv)
        got: dict[int, Message] = {}
        for source, message in worker.inbox:
            if source in worker.waits.sources and source not in got:
                got[source] = message
        if len(got) == len(worker.waits.sources):
            taken = {id(message) for message in got.values()}
            worker.inbox = deque(item for item in worker.inbox if id(item[1]) not in taken)
            self._resume(worker, got)

    def _resume(self, worker: _Worker, answer: Any) -> None:
        """What the worker waited for is there: it goes on next, at the same time."""
        worker.waits = None
        self._push(self.now, 1, self._advance, worker, answer)

    def _reduce(self) -> None:
        waiting = [w.waits for w in self.workers.values()]
        if all(isinstance(w, AllReduce) for w in waiting):
            mean = torch.stack([w.x for w in waiting if isinstance(w, AllReduce)]).mean(0)
            for worker in self.workers.values():
                self._resume(worker, mean)

    # what is recorded

    def _record(self, worker: _Worker, taken: _Taken | None, visit: Ask | None = None) -> None:
        """The event of a gradient, just before what it brings about changes the master."""
        if taken is None:
            return
        lag, gap, normalised, extra = 0, 0.0, 0.0, {}
        if self.server:
            who = worker.node.id
            lag = self.server.lag(who)
            gap, normalised = self.travel.gaps(self.server.x(), taken.x)
            if visit:
                figures = self.server.method.measure(self.server.state, self.server.own[who], visit.msg)
                extra = {name: float(value) for name, value in figures.items()}
        event = Event(self.now, worker.node.id, taken.step, lag, gap, normalised, taken.loss, extra)
        self.trace.add(event)
        if self.watch:
            self.watch(event)
        if self.evaluate_every and len(self.trace) % self.evaluate_every == 0:
            self._evaluate(self._shipped())

    def _evaluate(self, x: Tensor) -> dict[str, float]:
        if not bool(torch.isfinite(x).all()):
            worker = self.trace[-1].worker
            raise self._failed(Diverged, "the parameters are not finite", worker, self.trace[-1].step)
        figures = {name: float(value) for name, value in self.problem.evaluate(x).items()}
        self.trace.evaluations.append(Evaluation(self.now, len(self.trace), figures))
        return figures

    def _shipped(self) -> Tensor:
        if self.server:
            return self.server.x()
        return torch.stack([self.method.params(w.node.state) for w in self.workers.values()]).mean(0)

    # failures

    def _check(self, g: Tensor, loss: Tensor, worker: int, step: int) -> None:
        if not isinstance(g, Tensor) or g.shape != self.x0.shape or g.dtype != self.x0.dtype:
            shape = f"{tuple(g.shape)} {g.dtype}" if isinstance(g, Tensor) else type(g).__name__
            wanted = f"{tuple(self.x0.shape)} {self.x0.dtype}"
            raise self._failed(Diverged, f"the gradient is {shape}, the parameters are {wanted}", worker, step)
        if not bool(torch.isfinite(torch.dot(g, g))) or not bool(torch.isfinite(torch.as_tensor(loss))):
            raise self._failed(Diverged, f"gradient or loss is not finite (loss {float(loss)})", worker, step)

    def _failed(self, failure: type[Diverged], what: str, worker: int, step: int) -> Failure:
        self.trace.incidents.append(Incident(self.now, worker, "diverged"))
        place = f"worker {worker}, step {step}, at {self.now:.6g} s after {len(self.trace)} gradients"
        cure = "lower the learning rate or lengthen the warm-up" if "finite" in what else "correct the problem's grad"
        return failure(f"{type(self.method).__name__} diverged at {place}: {what}; {cure}", self.trace, worker, step)

    def _stuck(self) -> Failure:
        left = f"{self.gradients - self.granted} of {self.gradients} gradients were never taken"
        waiting = [self._waits(w) for w in self.workers.values()]
        if not waiting:
            return WorkerLost(f"no worker is left at {self.now:.6g} s, {left}: add a Join or remove a Leave", self.trace)
        return Deadlock(f"nothing can happen after {self.now:.6g} s, {left}: {'; '.join(waiting)}", self.trace)

    def _waits(self, worker: _Worker) -> str:
        request, who = worker.waits, worker.node.id
        if isinstance(request, Recv):
            here = {source for source, _ in worker.inbox}
            return f"worker {who} waits for {', '.join(str(s) for s in request.sources if s not in here)}"
        others = [str(w.node.id) for w in self.workers.values() if not isinstance(w.waits, AllReduce)]
        return f"worker {who} waits for {', '.join(others)} to reduce"
