"""Replay: runs the recorded order of a real run again, in one process, so that a run on a cluster can be looked into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.method import Method, ServerMethod
from ..core.problem import Problem
from ..core.protocol import Ask, Gradient, Loop, Node, Server, loop
from ..trace import Event, Incident, Trace
from .simulator import Run


class _Replayed:
    """A worker's loop and what it asked for last."""

    def __init__(self, method: Method, worker: int, state: Any, step: int, seed: int) -> None:
        self.node = Node(worker, method, state, step, seed=seed)
        self.loop: Loop = loop(method, self.node)
        self.request: Any = next(self.loop)


def replay(trace: Trace, method: Method, problem: Problem, watch: Callable[[Event], None] | None = None) -> Run:
    """Run the events of ``trace`` again in the order in which the server took them, with the same gradients.

    ``problem`` must be the one that the workers had, whose gradient is a function of (x, worker, step). The final
    parameters are those of the recorded run to rounding, whatever the machines were. Raises ``ValueError`` where the trace
    is of a part of the model, or does not fit the method.
    """
    if trace.header.get("shard", [0, 1])[1] != 1:
        raise ValueError(
            "cannot replay this trace: its server had one shard of the model, and each shard took its own order; "
            "record a run with one server"
        )
    if not isinstance(method, ServerMethod):
        raise ValueError(f"cannot replay {type(method).__name__}: the trace is of a run with a server")
    server = Server.start(method, problem.x0())
    workers: dict[int, _Replayed] = {}
    steps: dict[int, int] = {}
    again = Trace({**trace.header, "engine": "replay"})

    def deliver(replies: dict[int, Any]) -> None:
        for worker, reply in replies.items():
            workers[worker].request = workers[worker].loop.send(reply)

    for entry in trace.entries():
        if isinstance(entry, Event):
            worker = workers.get(entry.worker)
            if worker is None or not isinstance(worker.request, Gradient):
                raise ValueError(
                    f"the trace does not fit {type(method).__name__}: worker {entry.worker} has a gradient at "
                    f"{entry.seconds:.6g} s, where it is not there or waits for a reply"
                )
            g, loss = problem.grad(worker.request.x, entry.worker, entry.step)
            lag = server.lag(entry.worker)
            worker.request = worker.loop.send(g)
            steps[entry.worker] = entry.step + 1
            event = entry._replace(loss=float(loss), lag=lag)
            again.add(event)
            if isinstance(worker.request, Ask):
                deliver(server.visit(entry.worker, worker.request.msg))
            if watch:
                watch(event)
        elif isinstance(entry, Incident):
            again.note(entry)
            if entry.what == "joined":
                state = method.init(server.join(entry.worker))
                seed = int(trace.header.get("seed", 0))
                workers[entry.worker] = _Replayed(method, entry.worker, state, steps.get(entry.worker, 0), seed)
            elif entry.what in ("left", "crashed"):
                del workers[entry.worker]
                deliver(server.leave(entry.worker))
    x = server.x()
    return Run(x, again, again[-1].seconds if len(again) else 0.0, problem.evaluate(x))
