"""Replay: runs the recorded order of a real run again, in one process, so that a run on a cluster can be looked into."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from ..core.gossip import GossipMethod, PairGossipMethod
from ..core.method import Message, Method, ServerMethod
from ..core.problem import Problem
from ..core.protocol import AllReduce, Ask, Begin, Gradient, Inbox, Loop, Node, Recv, Send, give_back, loop
from ..core.rates import Dial, dial_of, with_rate
from ..core.server import NotFinite, ParameterServer
from ..trace import Deeds, Event, Incident, Trace
from .ensemble import average
from .simulator import Run


class _Replayed:
    """A worker's loop and what it asked for last."""

    def __init__(self, method: Method, worker: int, state: Any, step: int, seed: int) -> None:
        method, self.dial = _dialled(method)
        self.node = Node(worker, method, state, step, seed=seed)
        self.loop: Loop = loop(method, self.node)
        self.request: Any = next(self.loop)


def replay(trace: Trace, method: Method, problem: Problem, watch: Callable[[Event], None] | None = None) -> Run:
    """Run the events of ``trace`` again in the order in which the server took them, with the same gradients.

    ``problem`` must be the one that the workers had, whose gradient is a function of (x, worker, step). The final
    parameters are those of the recorded run to rounding, whatever the machines were. Raises ``ValueError`` where the trace
    is of a part of the model, or does not fit the method or the problem.
    """
    if trace.header.get("shard", [0, 1])[1] != 1:
        raise ValueError(
            "cannot replay this trace: its server had one shard of the model, and each shard took its own order; "
            "record a run with one server"
        )
    if not isinstance(method, ServerMethod):
        return _Together(trace, method, problem, watch).run()
    server = ParameterServer.start(method, problem.x0())
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
            lr = _told(entry)
            if lr is not None:
                worker.dial.value = lr
            server.tell(lr)
            worker.request = worker.loop.send(g)
            steps[entry.worker] = entry.step + 1
            event = entry._replace(loss=float(loss), lag=lag)
            again.add(event)
            if isinstance(worker.request, Ask):
                try:
                    deliver(server.visit(entry.worker, worker.request.msg))
                except NotFinite as wrong:
                    raise ValueError(
                        f"the trace does not fit: worker {entry.worker}, step {entry.step}: {wrong}, and the server that "
                        "recorded it took it; give the problem and the method of that run"
                    ) from None
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


def _dialled(method: Method) -> tuple[Method, Dial]:
    """``method``, and the dial of its rate, which turns nothing where a schedule is its rate: no script can have set any then."""
    dial = dial_of(method)
    return (method, Dial(math.nan)) if dial is None else (with_rate(method, dial), dial)


def _told(event: Event) -> float | None:
    """The rate that the script had set for this gradient; None where it had set none."""
    lr = event.extra.get("lr", math.nan)
    return lr if math.isfinite(lr) else None


Life = tuple[int, int]
"""A worker and which of its lives."""
Which = tuple[int, int, int]
"""A message: whose, of which life, and its number there."""


class _Life:
    """One life of one peer, and what it still has to do."""

    def __init__(self) -> None:
        self.deeds: deque[list[Any]] = deque()
        self.views: dict[int, tuple[int, ...]] = {}
        self.node: Node | None = None
        self.dial = Dial(math.nan)
        self.loop: Loop
        self.request: Any = None
        self.left = False

    def view(self, step: int) -> tuple[int, ...]:
        return self.views[step] if step in self.views else self.views[-1]


class _Together:
    """Peers whose recorded deeds are done again: each in its own order, and each as soon as what it needs is there."""

    def __init__(
        self, trace: Trace, method: Method, problem: Problem, watch: Callable[[Event], None] | None = None
    ) -> None:
        self.trace, self.method, self.problem, self.watch = trace, method, problem, watch
        self.again = Trace({**trace.header, "engine": "replay"})
        self.lives: dict[Life, _Life] = {}
        self.messages: dict[Which, Message] = {}
        self.answers: dict[Which, Message] = {}
        self.states: dict[Which, tuple[Any, int]] = {}  # and the step that their givers were at
        self.means: dict[str, Message] = {}
        self.events: dict[tuple[int, int], deque[Event]] = {}
        for entry in trace.entries():
            if isinstance(entry, Deeds):
                self.lives.setdefault((entry.worker, entry.life), _Life()).deeds.extend(entry.deeds)
            elif isinstance(entry, Event):
                self.events.setdefault((entry.worker, entry.step), deque()).append(entry)

    def run(self) -> Run:
        """Do all of it; ``ValueError`` where something is missing."""
        going = True
        while going:
            going = False
            for life, peer in self.lives.items():
                while peer.deeds and self._do(life, peer):
                    going = True
        stuck = {f"worker {w} at {p.deeds[0]}" for (w, _), p in self.lives.items() if p.deeds}
        ends = [p for p in self.lives.values() if p.node is not None and not p.left and not p.deeds]
        if stuck or not ends:
            raise ValueError(f"the trace is not whole: {'; '.join(sorted(stuck)) or 'nobody is left at the end'}")
        last = dict(sorted(self.lives))  # the last life of each
        ends = [self.lives[key] for key in last.items() if not self.lives[key].left]
        x = torch.stack([self.method.params(peer.node.state) for peer in ends if peer.node is not None]).mean(0)
        return Run(x, self.again, self.trace[-1].seconds if len(self.trace) else 0.0, self.problem.evaluate(x))

    def _do(self, life: Life, peer: _Life) -> bool:
        """The next deed of a peer, if what it needs is there."""
        what, *about = peer.deeds[0]
        for deed in list(peer.deeds)[1:]:  # who was there is asked in the middle of a deed
            if deed[0] != "view":
                break
            peer.views[deed[1]] = tuple(deed[2])
        if what == "view":
            peer.views[about[0]] = tuple(about[1])
        elif what in ("begin", "born"):
            if what == "born" and tuple(about[0]) not in self.states:
                return False
            if what == "begin" and about[0]:
                raise ValueError("the trace is of a run that began again from a snapshot: replay it from there on")
            start = self.method.init(self.problem.x0()), 0
            state, step = start if what == "begin" else self.states[tuple(about[0])]
            seed = int(self.trace.header.get("seed", 0))
            method, peer.dial = _dialled(self.method)
            peer.node = Node(life[0], method, state, step, since=step, seed=seed, view=peer.view)
            peer.loop = loop(method, peer.node)
            peer.request = next(peer.loop)
        else:
            assert peer.node is not None
            return self._act(life, peer, peer.node, what, about)
        peer.deeds.popleft()
        return True

    def _act(self, life: Life, peer: _Life, node: Node, what: str, about: list[Any]) -> bool:
        now, request = peer.deeds[0], peer.request
        answer: Any = None
        goes_on = True
        if what == "step":
            assert isinstance(request, Gradient)
            g, loss = self.problem.grad(request.x, life[0], about[0])
            for event in list(self.events.get((life[0], about[0]), ()))[:1]:
                if (lr := _told(event)) is not None:
                    peer.dial.value = lr
                self.again.add(event._replace(loss=float(loss)))
                if self.watch:
                    self.watch(event)
            answer = g
        elif what == "went":
            assert isinstance(request, Begin)
        elif what == "sent":
            assert isinstance(request, Send)
            answer = about[1]
        elif what == "asked":
            assert isinstance(request, Ask)
            which = (*life, about[0])
            if about[1] and which not in self.answers:
                return False
            answer = self.answers[which] if about[1] else None
        elif what == "took":
            keys: list[Which] = [tuple(which) for which in about[0]]
            if any(key not in self.messages for key in keys):
                return False
            pairs = [(key[0], self.messages[key]) for key in keys]
            assert isinstance(request, Inbox | Recv)
            answer = (
                pairs
                if isinstance(request, Inbox)
                else {s: dict(pairs)[s] for s in request.sources if s in dict(pairs)}
            )
        elif what == "averaged":
            group, ranks = about
            if group not in self.means:
                members = [
                    peer for (worker, _), peer in self.lives.items() if worker in ranks and self._at(peer, group)
                ]
                if len(members) < len(ranks):
                    return False
                self.means[group] = average([member.request.msg for member in members])
            assert isinstance(request, AllReduce)
            answer = self.means[group]
        else:
            goes_on = False
            if what in ("met", "heir"):
                which = tuple(about[0])
                source = self.messages if what == "met" else self.states
                if which not in source:
                    return False
                if what == "met":
                    assert isinstance(self.method, PairGossipMethod)
                    node.state, self.answers[which] = self.method.meet(node.state, self.messages[which])
                else:
                    assert isinstance(self.method, GossipMethod)
                    node.state = self.method.inherit(node.state, self.states[which][0])
            elif what == "welcomed":
                node.state, state = self.method.welcome(node.state)
                self.states[(*life, about[0])] = state, node.step
            elif what in ("left", "kept"):
                if any(tuple(key) not in self.messages for key in about[0]):
                    return False
                for key in about[0]:
                    give_back(node, self.messages[tuple(key)])
                if what == "left":
                    self.states[(*life, about[1])] = node.state, node.step
                    peer.left = True
            elif what == "moved":
                raise ValueError(
                    f"the script of worker {life[0]} has set its parameters by itself in step {node.step}: the trace does "
                    "not say to what, so it cannot be replayed"
                )
            else:
                raise ValueError(f"the trace has a deed {what!r} that this version does not know")
        if goes_on:
            peer.request = peer.loop.send(answer)
            if isinstance(peer.request, Send | Ask):  # others may get it before this peer goes on
                number = next(
                    (deed[1] for deed in peer.deeds if deed[0] in ("sent", "asked") and deed is not now), None
                )
                if number is not None:
                    self.messages[(*life, number)] = peer.request.msg
        peer.deeds.popleft()
        return True

    def _at(self, peer: _Life, group: str) -> bool:
        """Whether a peer is about to average with this group."""
        return bool(peer.deeds) and peer.deeds[0][0] == "averaged" and peer.deeds[0][1] == group
