"""What messages cost: queues at cards, links, closed forms of throughput; and that costs change when things happen and
never what a method computes."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
import torch
from conftest import Bowl, by_turns, same
from torch import Tensor

import offbeat as ob
from offbeat import Crash, Join, Leave, Link, Network
from offbeat.core.gossip import PushGossipMethod, RoundGossipMethod
from offbeat.core.periodic import PeriodicMethod
from offbeat.core.protocol import SERVER
from offbeat.core.rates import with_rate
from offbeat.core.topology import Complete, Exponential, RandomPeer, Ring
from offbeat.engines.clock import Clock
from offbeat.engines.network import Traffic
from offbeat.engines.simulator import Simulation
from offbeat.methods import ADPSGD, ASGD, DPSGD, OSGP, SGP, SSP, AllReduce, BackupWorkers, GoSGD, PullGossip, PushGossip
from offbeat.names import read

BOWL = Bowl()
UNEVEN = ob.Gamma(cv=0.4, machine_cv=0.3)
METHODS = ob.methods.all_methods()
each_method = pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
GOING = (Join(3, 2.5), Leave(1, 5.0), Crash(0, 7.0), Join(0, 9.0), Crash(2, 12.0))
COSTLY = Network(
    0.3, 200.0, download=300.0, server=150.0, duplex="half", links=(Link(0, latency=0.9), Link(1, -1, 0.1))
)
"""A message of a bowl has 56 bytes: on the way for about as long as a gradient takes."""


def calm(cls: type[ob.Method]) -> ob.Method:
    """The method with its defaults, and a rate at which none diverges."""
    return with_rate(cls(), 0.01)


def simulate(
    method: ob.Method, network: Network, workers: int = 3, gradients: int = 60, speed: ob.Speed = UNEVEN, **more: Any
) -> ob.Run:
    cluster = ob.Cluster(workers, speed, more.pop("events", ()), network)
    return ob.simulate(method, more.pop("problem", BOWL), cluster, gradients=gradients, **more)


# ---------------------------------------------------------------- nothing costs nothing


FREE = {
    "the default": Network(),
    "no number left out": Network(0.0, math.inf, math.inf, math.inf, 3, "half", "float64", (Link(0, 1), Link(-1))),
}


@each_method
def test_a_free_network_is_bit_for_bit_none(cls: type[ob.Method], monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is written: as if what is sent were there at once. Workers come and go meanwhile."""
    free = [simulate(calm(cls), network, events=GOING, evaluate_every=7) for network in FREE.values()]
    monkeypatch.setattr(Traffic, "send", lambda self, source, to, size, act, *args: act(*args))
    monkeypatch.setattr(Traffic, "reduce", lambda self, members, size: self.clock.now)
    none = simulate(calm(cls), COSTLY, events=GOING, evaluate_every=7)
    for run in free:
        assert [e._replace(sent=0.0) for e in run.trace] == [e._replace(sent=0.0) for e in none.trace]
        assert (run.trace.incidents, run.trace.evaluations) == (none.trace.incidents, none.trace.evaluations)
        assert torch.equal(run.x, none.x)
        assert run.seconds == none.seconds
    assert free[0].trace.column("sent").equal(free[1].trace.column("sent"))


@each_method
def test_costs_are_the_same_bits_twice(cls: type[ob.Method]) -> None:
    """Whoever comes and goes; and they cost time."""
    free, a, b = (simulate(calm(cls), network, events=GOING) for network in (Network(), COSTLY, COSTLY))
    assert a.trace == b.trace
    assert torch.equal(a.x, b.x)
    assert len(a.trace) == 60
    seconds = a.trace.column("seconds").tolist()
    assert seconds == sorted(seconds)
    assert a.seconds > free.seconds or not a.trace.column("sent").any() or issubclass(cls, PushGossipMethod)


# ---------------------------------------------------------------- synchronous methods


class Seen(Bowl):
    """Keeps the point of every gradient."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "at", {})

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        self.at.setdefault((worker, step), x)  # type: ignore[attr-defined]
        return super().grad(x, worker, step)


IN_ROUNDS = [calm(cls) for cls in METHODS if issubclass(cls, RoundGossipMethod | PeriodicMethod)]
LOCKSTEP = [BackupWorkers(), SSP(bound=0)]


@pytest.mark.parametrize("method", [*IN_ROUNDS, *LOCKSTEP], ids=lambda m: m.name)
def test_what_synchronous_methods_compute_costs_nothing_to_change(method: ob.Method) -> None:
    """Each worker's k-th gradient is taken at the same point whatever messages cost, and two workers end at the same
    parameters; only the seconds differ. (A server adds up what comes in order of arrival: the same to rounding.)"""
    equal: Callable[[Tensor, Tensor], bool] = torch.equal if method in IN_ROUNDS else same
    points = []
    for network in (Network(), COSTLY):
        problem = Seen()
        simulate(method, network, 4, 96, problem=problem)
        points.append(problem.at)  # type: ignore[attr-defined]
    both = points[0].keys() & points[1].keys()
    assert len(both) > 80
    assert all(equal(points[0][place], points[1][place]) for place in both)
    free, costly = (simulate(method, network, 2, 96) for network in (Network(), COSTLY))
    assert equal(free.x, costly.x)
    assert costly.seconds > free.seconds or not costly.trace.column("sent").any() or getattr(method, "overlaps", False)


# ---------------------------------------------------------------- conservation


PLACES = torch.stack([torch.sin(torch.arange(7, dtype=torch.float64) * (worker + 1.3)) for worker in range(4)])
LEAST, MOST = PLACES.amin(0), PLACES.amax(0)  # between which every mean of them lies


class Scatter(Bowl):
    """The first gradient of the first four takes each to a place of its own; all others are 0."""

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        g = self.x0() - PLACES[worker] if step == 0 and worker < 4 else torch.zeros_like(x)
        return g, torch.zeros((), dtype=torch.float64)


JUMP = ob.SGD(1.0)
JITTER = ob.Recorded(((1.0, 0.9, 1.2, 0.7), (1.1, 0.8), (0.95, 1.3, 0.85), (0.75, 1.25)))
SLOW = {  # a message has 56 or 64 bytes
    "latency": Network(1.37),
    "queues": Network(0.11, 60.0),
    "half duplex": Network(0.11, 90.0, duplex="half"),
    "uneven": Network(0.11, links=(Link(0, latency=2.3), Link(2, bandwidth=50.0))),
}
EVENTS = (
    Join(4, 4.1417),
    Leave(1, 5.2718),
    Crash(2, 6.5111),
    Join(7, 7.7322),
    Leave(0, 9.1414),
    Join(2, 9.6111),
    Crash(4, 10.7333),
    Join(1, 12.5777),
    Crash(1, 19.1115),
    Join(1, 19.4115),
)


class Watched(Simulation):
    """A run in which peers jump apart and then only mix. ``moments`` are those after which time goes on: what each worker
    has, and what is under way from whom to whom."""

    def __init__(self, method: ob.Method, part: Callable[..., Tensor], network: Network) -> None:
        super().__init__(method, Scatter(), ob.Cluster(4, JITTER, EVENTS, network), 120, seed=1)
        self.moments: list[tuple[dict[int, Tensor], list[tuple[int, int, Tensor]]]] = []
        self.lives: list[Any] = []  # who has ever been there: a worker that comes back is another
        self.left: list[Any] = []
        self.since = math.inf  # when all had jumped
        self.handed: dict[int, Tensor] = {}  # what those who left gave to others
        self.returns: dict[int, Tensor] = {}  # what visitors of peers take home, while it is under way
        step, clock = self.clock.step, self.clock

        def stepped() -> bool:
            now, own, letters = clock.now, dict[int, Tensor](), []
            for worker in self.workers.values():
                self.lives.append(worker)
                own[id(worker)] = part(worker.node.state, *(message for *_, message in worker.inbox))
                own[id(worker)] = own[id(worker)] + self.returns.get(id(worker), 0.0)
                letters += [(id(lt.source), id(worker), part(None, lt.message)) for lt in worker.coming]
            going = step()
            jumped = {event.worker for event in self.trace if event.step == 0} >= {0, 1, 2, 3}
            if clock.now > now and jumped:  # nothing more happened at that instant
                self.since = min(self.since, now)
                self.moments.append((own, letters))
            return going

        clock.step = stepped  # type: ignore[method-assign]
        self.run()

    def _meet(self, worker: Any, request: Any) -> None:
        peer = self.workers.get(request.to)
        before = peer.node.state if peer else None
        super()._meet(worker, request)
        if peer and self.workers.get(worker.node.id) is worker:
            d = before.x - peer.node.state.x  # type: ignore[union-attr]
            self.returns[id(worker)] = torch.cat((d, torch.zeros(1, dtype=torch.float64)))

    def _advance(self, worker: Any, answer: Any, taken: Any = None) -> None:
        self.returns.pop(id(worker), None)
        super()._advance(worker, answer, taken)

    def _gone(self, worker: Any, what: str, lost: int = 0, undone: int = 0) -> None:
        self.left += [worker] if what == "left" else []
        others = [other.node for other in self.workers.values() if other is not worker]
        before = [node.state.x for node in others]
        super()._gone(worker, what, lost, undone)
        if what == "left" and isinstance(self.method, ADPSGD):  # the last visit, whose other half goes with the worker
            moved = torch.stack([node.state.x - x for node, x in zip(others, before, strict=True)])
            assert zero(moved.sum(0) - (worker.node.state.x - before[int(moved.norm(dim=1).argmax())]) / 2)
            self.handed[id(worker)] = torch.cat((moved.sum(0), torch.zeros(1, dtype=torch.float64)))

    def changes(self) -> Iterator[tuple[Tensor, Tensor, int, Tensor]]:
        """How the sum of all has changed; what those took along who went; how many have come; and all that was there, before
        and after. Who leaves in good order
        takes nothing along where weights are kept, and in AD-PSGD its model, halfway to the one that it visits last."""
        left = set() if isinstance(self.method, ADPSGD) else {id(worker) for worker in self.left}
        for (own, letters), (own_later, letters_later) in itertools.pairwise(self.moments):
            nothing = torch.zeros(8, dtype=torch.float64)
            before = sum((*own.values(), *(mass for *_, mass in letters)), nothing)
            after = sum((*own_later.values(), *(mass for *_, mass in letters_later)), nothing)
            taken = nothing
            for worker in own.keys() - own_later.keys() - left:
                orphans = [mass for source, to, mass in letters if to == worker and source not in own]
                taken = sum(orphans, taken + own[worker] - self.handed.get(worker, nothing))
            there = torch.stack([*own.values(), *own_later.values()])
            yield after - before, taken, len(own_later.keys() - own.keys()), there


def push_sum(state: Any, *letters: tuple[Tensor, Tensor]) -> Tensor:
    """Mass and weight, in one vector."""
    pairs = [*([(state.x, state.weight)] if state else []), *letters]
    return torch.stack([torch.cat((x, w[None])) for x, w in pairs]).sum(0)


def weighed(state: Any, *letters: tuple[Tensor, Tensor]) -> Tensor:
    pairs = [*([(state.x, state.weight)] if state else []), *letters]
    return torch.stack([torch.cat((w * x, w[None])) for x, w in pairs]).sum(0)


def models(state: Any, *_: Any) -> Tensor:
    return torch.cat((state.x, torch.ones(1, dtype=torch.float64)))


CONSERVING: dict[str, tuple[ob.Method, Callable[..., Tensor]]] = {
    "SGP": (SGP(JUMP), push_sum),
    "SGP at random": (SGP(JUMP, topology=RandomPeer()), push_sum),
    "SGP on a ring, every third step": (SGP(JUMP, topology=Ring(), period=3), push_sum),
    "OSGP": (OSGP(JUMP), push_sum),
    "OSGP to many": (OSGP(JUMP, topology=Exponential()), push_sum),
    "OSGP at random": (OSGP(JUMP, topology=RandomPeer(), period=2), push_sum),
    "GoSGD": (GoSGD(JUMP), weighed),
    "GoSGD always": (GoSGD(JUMP, probability=1.0, topology=Complete()), weighed),
    "ADPSGD": (ADPSGD(JUMP), models),
    "ADPSGD on a ring": (ADPSGD(JUMP, topology=Ring()), models),
}


def zero(x: Tensor) -> bool:
    return float(x.abs().max()) < 1e-9


@pytest.mark.parametrize(("name", "network"), by_turns(CONSERVING, SLOW))
def test_nothing_is_lost_under_way(name: str, network: str) -> None:
    """Push-sum's mass and weight, and the sum of models that meet in pairs, messages under way counted: the same at all
    times, while workers leave, crash and join; but for what one that crashes has, and for what a newcomer is given."""
    method, part = CONSERVING[name]
    run = Watched(method, part, SLOW[network])
    taking = 0
    for change, taken, come, there in run.changes():
        new = change + taken
        if come and not isinstance(method, GoSGD):  # a model that is the others', of weight 1 at most
            weight = float(new[-1])
            assert -1e-9 <= weight <= come + 1e-9
            # who jumps from where a visit has led lands off its place
            least, most = (there.amin(0)[:-1], there.amax(0)[:-1]) if isinstance(method, ADPSGD) else (LEAST, MOST)
            assert ((weight * least - 1e-9 <= new[:-1]) & (new[:-1] <= weight * most + 1e-9)).all()
        else:
            assert zero(new)
        taking += not zero(taken)
    going = ("crashed", "left") if isinstance(method, ADPSGD) else ("crashed",)
    assert taking == sum(i.what in going and i.seconds > run.since for i in run.trace.incidents) > 2
    flying = [len(letters) for _, letters in run.moments]
    assert isinstance(method, ADPSGD) or sum(count > 0 for count in flying) > len(flying) / 4


# ---------------------------------------------------------------- queues


Sent = tuple[float, int, int, float]  # when, from, to, bytes


def arrivals(network: Network, sends: list[Sent], healed: Any = lambda a, b, now: now) -> list[float]:
    """When each of ``sends`` has come."""
    clock = Clock()
    traffic, came = Traffic(network, clock, healed), dict[int, float]()
    for k, (at, source, to, size) in enumerate(sends):
        clock.at(at, 1, traffic.send, source, to, size, lambda k=k: came.__setitem__(k, clock.now))
    while clock.step():
        pass
    return [came[k] for k in range(len(sends))]


def test_an_idle_path_costs_latency_and_bytes_over_the_slowest() -> None:
    """A transfer is passed on while it still comes in (cut-through)."""
    rng = Random(0)
    for _ in range(100):
        up, down, server, wire = (rng.choice((1.0, 2.0, 4.0, 8.0)) for _ in range(4))
        shards, latency = rng.choice((1, 2, 4)), rng.choice((0.0, 0.5, 3.0))
        network = Network(latency, up, down, server, shards, links=(Link(0, -1, bandwidth=wire),))
        assert arrivals(network, [(1.0, 0, SERVER, 16.0)]) == [1.0 + latency + 16 / min(up, wire, server * shards)]
        assert arrivals(network, [(1.0, SERVER, 0, 16.0)]) == [1.0 + latency + 16 / min(down, wire, server * shards)]
        assert arrivals(network, [(1.0, 1, 2, 16.0)]) == [1.0 + latency + 16 / min(up, down)]


def test_a_card_serves_in_the_order_in_which_transfers_come_to_it() -> None:
    """First come, first served, whatever their sizes, and by arrival, not by sending."""
    network = Network(server=1.0, links=(Link(2, latency=5.0),))
    assert arrivals(network, [(0.0, 0, -1, 3.0), (1.0, 1, -1, 1.0), (1.5, 0, -1, 2.0)]) == [3.0, 4.0, 6.0]
    assert arrivals(network, [(0.0, 2, -1, 1.0), (1.0, 1, -1, 1.0), (5.5, 0, -1, 1.0)]) == [6.0, 2.0, 7.0]
    assert arrivals(Network(0.5, 1.0), [(0.0, 0, 1, 4.0), (0.0, 0, 2, 1.0)]) == [4.5, 5.5]


@pytest.mark.parametrize("duplex", ["full", "half"])
def test_sending_and_receiving_share_a_card_of_half_duplex_only(duplex: Any) -> None:
    network = Network(bandwidth=math.inf, server=1.0, duplex=duplex)
    sends = [(0.0, 0, SERVER, 3.0), (0.0, SERVER, 1, 2.0), (1.0, 2, SERVER, 1.0)]
    assert arrivals(network, sends) == ([3.0, 2.0, 4.0] if duplex == "full" else [3.0, 5.0, 6.0])


@pytest.mark.parametrize("duplex", ["full", "half"])
def test_no_card_is_faster_than_it_is(duplex: Any) -> None:
    """Random transfers: none comes before its idle path allows, those between two nodes keep their order, and what has come
    through a card by any time is no more than it can have passed since the first was sent."""
    for seed in range(20):
        rng = Random(seed)
        ends = [rng.sample(range(-1, 4), 2) for _ in range(60)]
        sends = sorted((rng.random() * 9, a, b, rng.choice((0.5, 1.0, 5.0))) for a, b in ends)
        network = Network(rng.choice((0.0, 0.2)), 2.0, duplex=duplex, server=5.0, links=(Link(3, bandwidth=1.5),))
        came = arrivals(network, sends)
        for (at, a, b, size), end in zip(sends, came, strict=True):
            assert end >= at + network.latency + size / (1.5 if 3 in (a, b) else 2.0) - 1e-9
        cards = defaultdict[Any, list[tuple[float, float]]](list)
        for (_, a, b, size), end in zip(sends, came, strict=True):
            cards[a, "out" if duplex == "full" else ""].append((end, size))
            cards[b, "in" if duplex == "full" else ""].append((end, size))
            cards[a, b, "pair"].append((end, 0.0))
        for card, passed in cards.items():
            if card[-1] == "pair":
                assert passed == sorted(passed)
                continue
            total = 0.0
            for end, size in sorted(passed):
                total += size
                assert total <= (5.0 if card[0] == SERVER else 2.0) * (end - sends[0][0]) + 1e-9


def test_a_link_is_an_exception_to_the_rule() -> None:
    """The link that names both ends counts, else the worst of those that name one; what it leaves out is as elsewhere."""
    links = (Link(0, 1, 7.0), Link(0, latency=2.0, bandwidth=4.0), Link(1, latency=3.0, bandwidth=8.0), Link(2, 3))
    network = Network(1.0, links=(*links, Link(3, bandwidth=2.0), Link(4, SERVER, 0.0)))
    latencies = {(0, 1): 7.0, (0, 2): 2.0, (1, 2): 3.0, (0, 3): 2.0, (2, 3): 1.0, (2, 4): 1.0, (4, -1): 0.0, (2, -1): 1}
    seconds = {(0, 1): 0.0, (0, 2): 2.0, (1, 2): 1.0, (0, 3): 4.0, (2, 3): 0.0, (2, 4): 0.0, (4, -1): 0.0, (2, -1): 0.0}
    for (a, b), latency in latencies.items():
        assert arrivals(network, [(0.0, a, b, 8.0)]) == arrivals(network, [(0.0, b, a, 8.0)])
        assert arrivals(network, [(0.0, a, b, 8.0)]) == [latency + seconds[a, b]]
    assert arrivals(network, [(0.0, 3, 4, 8.0), (0.0, 3, 4, 8.0)]) == [5.0, 9.0]
    assert arrivals(network, [(0.0, 3, 4, 8.0), (0.0, 4, 3, 8.0)]) == [5.0, 5.0]


@pytest.mark.parametrize(("duplex", "each"), [("full", 1), ("half", 2)])
def test_an_all_reduce_goes_round_a_ring(duplex: Any, each: int) -> None:
    """2 (n - 1) steps with an n-th of the message each, as slow as the slowest link or card on the ring; cards are busy."""
    for n, links, slowest, latency in (
        (2, (), 4.0, 0.5),
        (5, (), 4.0, 0.5),
        (5, (Link(1, 2, bandwidth=1 / each),), 1.0 / each, 0.5),
        (5, (Link(1, 3, 9.0, 0.1),), 4.0, 0.5),  # no neighbours on the ring
        (5, (Link(0, 4, 9.0),), 4.0, 9.0),
    ):
        clock = Clock()
        traffic = Traffic(Network(0.5, 4.0, duplex=duplex, links=links), clock, lambda a, b, now: now)
        rate = slowest / each if slowest == 4.0 else slowest
        done = traffic.reduce(range(n), 20.0)
        assert done == pytest.approx(2 * (n - 1) * (20.0 / n / rate + latency), rel=1e-12)
        assert traffic.reduce(range(1), 20.0) == 0.0
        assert traffic.reduce((0, 9), 1.0) > done


CYCLES = {
    "latency": (Network(0.25), 0.25, 0.25),
    "one bandwidth": (Network(0.25, 28.0), 2.25, 2.25),
    "slow up": (Network(0.25, 28.0, download=56.0, server=56.0), 2.25, 1.25),
    "slow down": (Network(0.25, 56.0, download=28.0), 1.25, 2.25),
    "a slow server": (Network(0.25, 56.0, server=14.0), 4.25, 4.25),
    "a slow server, sharded": (Network(0.25, 56.0, server=14.0, shards=4), 1.25, 1.25),
    "a slow server, sharded to excess": (Network(0.25, 56.0, server=14.0, shards=16), 1.25, 1.25),
    "half duplex": (Network(0.25, 28.0, duplex="half"), 2.25, 2.25),
    "a far worker": (Network(0.25, 56.0, links=(Link(0, latency=3.0),)), 4.0, 4.0),
    "a far server": (Network(0.25, 56.0, links=(Link(-1, latency=3.0), Link(0, latency=1.0))), 4.0, 4.0),
    "a thin wire": (Network(0.25, 56.0, links=(Link(-1, 0, bandwidth=14.0),)), 4.25, 4.25),
    "halves": (Network(0.25, 28.0, dtype="float32"), 1.25, 1.25),
    "quarters": (Network(0.25, 14.0, dtype="bfloat16"), 1.25, 1.25),
}


@pytest.mark.parametrize("case", CYCLES)
def test_a_visit_takes_as_long_as_its_messages(case: str) -> None:
    """One worker and a server, a message of 56 bytes: gradient, message, reply, to the bit."""
    network, up, down = CYCLES[case]
    run = simulate(ASGD(), network, 1, 6, ob.Fixed(1.0))
    cycle = 1.0 + up + down
    assert [event.seconds for event in run.trace] == [1.0 + up + k * cycle for k in range(6)]
    assert [event.waited for event in run.trace] == [0.0, *5 * [up + down]]
    assert [event.transit for event in run.trace] == [0.0, *5 * [down]]
    assert [event.compute for event in run.trace] == 6 * [1.0]


# ---------------------------------------------------------------- sizes


def size(message: Any, width: int | None = None) -> float:
    """Bytes of a message: numel * element_size of its tensors, or ``width`` for each float."""
    if isinstance(message, Tensor):
        return message.numel() * (width if width and message.is_floating_point() else message.element_size())
    return sum(size(part, width) for part in message)


@pytest.mark.parametrize(("dtype", "width"), [(None, None), ("bfloat16", 2)])
@each_method
def test_a_message_has_the_size_of_its_tensors(
    cls: type[ob.Method], dtype: Any, width: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is on the way is what the method says, and an event has what its worker has sent since the one before."""
    sent, count = defaultdict[int, float](float), 0
    transfer, reduce = Simulation._transfer, Simulation._reduce

    def transferred(self: Any, source: int, to: int, message: Any, act: Any, *args: Any) -> None:
        nonlocal count
        if source in self.workers:
            sent[source] += size(message, width)
            count += 1
        transfer(self, source, to, message, act, *args)

    def reduced(self: Any, members: Any, round: Any) -> None:
        nonlocal count
        asked = dict(self.reducing[members, round].asked)
        reduce(self, members, round)
        if (members, round) not in self.reducing:
            for worker, message in asked.items():
                sent[worker] += 2 * (len(asked) - 1) / len(asked) * size(message, width)
                count += 1

    def watch(event: ob.Event) -> None:
        assert event.sent == pytest.approx(sent.pop(event.worker, 0.0), rel=1e-12)

    monkeypatch.setattr(Simulation, "_transfer", transferred)
    monkeypatch.setattr(Simulation, "_reduce", reduced)
    run = simulate(calm(cls), Network(0.1, 1e3, dtype=dtype), 3, 75, problem=Bowl(dtype=torch.float32), watch=watch)
    assert count > 5 or not run.trace.column("sent").any()


@each_method
def test_half_the_bytes_are_as_good_as_twice_the_bandwidth(cls: type[ob.Method]) -> None:
    """float32 instead of float64 changes what messages cost and not their values: the same bits but for bytes."""
    half, fast = (simulate(calm(cls), n) for n in (Network(0.1, 50.0, dtype="float32"), Network(0.1, 100.0)))
    if cls is ob.methods.Rounded:  # whose messages stay as they are
        assert half.trace.column("sent").equal(fast.trace.column("sent"))
        return
    assert [e._replace(sent=2 * e.sent) for e in half.trace] == list(fast.trace)
    assert torch.equal(half.x, fast.x)


def test_a_message_stands_for_the_parameters_that_a_problem_is_taken_to_have() -> None:
    """A vector for 1,000,000 float32 numbers, a single number for itself."""
    problem, wide = ob.tasks.TimeOnly(1_000_000), Network(0.1, 1e6)
    for method, network, wanted in (
        (ASGD(), wide, 4e6),
        (ASGD(), replace(wide, dtype="bfloat16"), 2e6),
        (ASGD(), replace(wide, dtype="float64"), 8e6),
        (PushGossip(), wide, 4e6),
        (SGP(), wide, 4e6 + 8),
        (AllReduce(), wide, 4e6),
        (DPSGD(), wide, 8e6),
    ):
        run = simulate(method, network, 4 if method == DPSGD() else 2, 40, problem=problem)
        assert run.trace[-1].sent == wanted
    assert simulate(ASGD(), wide, 2, 40, problem=problem).summary()["megabytes"] == 40 * 4


# ---------------------------------------------------------------- who waits


@pytest.mark.parametrize("cls", [c for c in METHODS if issubclass(c, PushGossipMethod)], ids=lambda c: c.__name__)
def test_who_pushes_waits_for_no_transfer(cls: type[ob.Method]) -> None:
    """However slow the network: gradients are taken at the same times as without, one after the other."""
    free, slow = (simulate(calm(cls), network, 4, 100) for network in (Network(), Network(30.0, 1.0, duplex="half")))
    assert slow.trace.column("seconds").equal(free.trace.column("seconds"))
    assert slow.trace.column("waited").abs().max() == 0
    assert not torch.equal(slow.x, free.x)


LATE = [c for c in METHODS if getattr(c, "overlaps", False)]


@pytest.mark.parametrize("cls", LATE, ids=lambda c: c.__name__)
def test_who_overlaps_waits_for_what_a_gradient_does_not_hide(cls: type[ob.Method]) -> None:
    """A transfer shorter than a gradient costs nothing, a longer one what it is longer."""
    for seconds in (0.25, 0.75, 1.0, 1.5, 3.0):
        run = simulate(calm(cls), Network(seconds), 4, 80, ob.Fixed(1.0))
        late = run.trace.column("waited")[8:]  # rounds of messages that were sent by the first gradients
        assert late.equal(torch.full_like(late, max(0.0, seconds - 1)))
        assert run.seconds == 20 + 18 * max(0.0, seconds - 1)
    assert LATE


@pytest.mark.parametrize("method", [SGP(), DPSGD(), AllReduce(), ADPSGD(), ASGD()], ids=lambda m: m.name)
def test_who_does_not_overlap_waits_for_the_transfer(method: ob.Method) -> None:
    """Two workers of equal speed: one way for what both send, two for an answer and for both steps of a ring. A visit in
    AD-PSGD is made while the gradient is computed, so it costs what it takes longer."""
    way = 0.5 + 56 / 64
    run = simulate(method, Network(0.5, 64.0), 2, 40, ob.Fixed(1.0))
    waited = run.trace.column("waited")[2:]
    ways = {SGP(): 0.5 + 64 / 64, DPSGD(): way, AllReduce(): 2 * (0.5 + 28 / 64)}
    if method in ways:
        assert waited.equal(torch.full_like(waited, ways[method]))
    else:
        hidden = 1.0 if isinstance(method, ADPSGD) else 0.0
        assert waited.min() >= 2 * way - hidden
        assert waited.max() <= 3 * way - hidden


@pytest.mark.parametrize("method", [ADPSGD(), PullGossip()], ids=lambda m: m.name)
def test_a_visit_costs_what_it_takes_longer_than_the_gradient(method: ob.Method) -> None:
    """Gradients of 1 s, 10 by each of 4 workers: 10 s while there and back takes less than 1 s; in turn it would be 17.2 s."""
    run = simulate(method, Network(0.4), 4, 40, ob.Fixed(1.0))
    assert run.seconds == pytest.approx(10.0, rel=1e-12)
    assert run.trace.column("waited").abs().max() < 1e-9
    run = simulate(method, Network(0.8), 4, 40, ob.Fixed(1.0))
    assert run.seconds == pytest.approx(16.0, rel=1e-12)
    assert run.trace.column("waited")[4:].tolist() == pytest.approx([0.6] * 36)
    assert run.trace.column("compute").tolist() == [1.0] * 40


@pytest.mark.parametrize("latency", [0.4, 0.8])
def test_who_dies_on_a_visit_takes_its_gradient_along(latency: float) -> None:
    """Also where the gradient was done and the visitor not back yet; another takes it, and the run has all it was to have."""
    events = (Crash(1, 2.1), Crash(2, 5.7), Join(1, 6.1))
    run = simulate(ADPSGD(), Network(latency), 4, 40, ob.Fixed(1.0), events=events)
    assert len(run.trace) == 40
    assert [i.lost for i in run.trace.incidents if i.what == "crashed"] == [1, 1]


# ---------------------------------------------------------------- newcomers


@each_method
def test_a_newcomer_waits_for_the_models_transfer(cls: type[ob.Method]) -> None:
    """Its model has latency and bytes like any message; those who were there at the start have it."""
    network = Network(0.25, 14.0)
    run = simulate(calm(cls), network, 2, 80, ob.Fixed(1.0), events=(Join(5, 3.5),))
    first = {worker: next(e for e in run.trace if e.worker == worker) for worker in (0, 1, 5)}
    assert first[0].waited == first[1].waited == 0
    assert first[5].waited >= 0.25 + 56 / 14
    free = simulate(calm(cls), Network(), 2, 80, ob.Fixed(1.0), events=(Join(5, 3.5),))
    assert next(e for e in free.trace if e.worker == 5).waited == 0


def test_a_newcomers_model_comes_from_the_server_or_from_a_peer() -> None:
    """To the bit: joined at 3.5 s, the model there 0.25 + 4 s later, the gradient 1 s later, and its message as late."""
    run = simulate(ASGD(), Network(0.25, server=14.0), 1, 30, ob.Fixed(100.0), events=(Join(5, 3.5),))
    assert run.trace[0].worker == 0
    event = next(e for e in run.trace if e.worker == 5)
    assert (event.waited, event.seconds) == (4.25, 3.5 + 4.25 + 100 + 4.25)
    run = simulate(PushGossip(), Network(0.25, 14.0), 2, 30, ob.Fixed(100.0), events=(Join(5, 3.5),))
    event = next(e for e in run.trace if e.worker == 5)
    assert (event.waited, event.seconds) == (4.25, 3.5 + 4.25 + 100)
    assert next(e for e in run.trace if e.worker == 0).sent == 56


# ---------------------------------------------------------------- throughput


TASK = ob.tasks.TimeOnly(1_000_000)
C, L, S, B = 0.1, 50e-6, 4e6, 10e9 / 8  # seconds per gradient, seconds one way, bytes of a message, bytes per second
NET = Network(L, B)
HALF = replace(NET, duplex="half")
GRAPH = ob.OnePeerExponential()


@dataclass(frozen=True)
class Form:
    """A method on a network, and the gradients per second that n workers have by arithmetic."""

    method: ob.Method
    network: Network
    says: Callable[[int], float]
    most: int = 256


def server(cap: float) -> Callable[[int], float]:
    return lambda n: min(n / (C + 2 * L + 2 * S / B), cap)


def ring(times: float) -> Callable[[int], float]:
    return lambda n: n / (C + 2 * (n - 1) / n * times * S / B + 2 * (n - 1) * L)


def hidden(n: int) -> float:
    return n / C


FORMS = {
    "server": Form(ASGD(), NET, server(B / S), 1024),
    "server, half duplex": Form(ASGD(), HALF, server(B / (2 * S)), 1024),
    "server, 4 shards": Form(ASGD(), replace(NET, shards=4), server(4 * B / S), 1024),
    "server, 4 shards, half duplex": Form(ASGD(), replace(HALF, shards=4), server(4 * B / (2 * S))),
    "server, half the bytes": Form(
        ASGD(), replace(NET, dtype="float16"), lambda n: min(n / (C + 2 * L + S / B), 2 * B / S)
    ),
    "all-reduce": Form(AllReduce(), NET, ring(1), 1024),
    "all-reduce, half duplex": Form(AllReduce(), HALF, ring(2)),
    "SGP": Form(SGP(topology=GRAPH), NET, lambda n: n / (C + (n > 1) * (L + S / B)), 1024),
    "SGP, half duplex": Form(SGP(topology=GRAPH), HALF, lambda n: n / (C + (n > 1) * 2 * S / B)),
    "D-PSGD on a ring": Form(DPSGD(), NET, lambda n: n / (C + (n > 1) * (L + 2 * S / B))),
    "overlap SGP": Form(OSGP(topology=GRAPH), NET, hidden),
    "push gossip": Form(PushGossip(topology=GRAPH), NET, hidden, 1024),
}


@pytest.mark.parametrize("name", FORMS)
def test_throughput_is_what_arithmetic_says(name: str) -> None:
    """Within 5 %, for 1 to 1,024 workers: gradients per second over the second half of a run."""
    form = FORMS[name]
    for n in (n for n in (1, 4, 32, 256, 1024) if n <= form.most):
        half = max(2 if isinstance(form.method, ob.ServerMethod) else 1, 200 // n) * n
        cluster = ob.Cluster(n, ob.Fixed(C), network=form.network)
        trace = ob.simulate(form.method, TASK, cluster, gradients=2 * half).trace
        rate = half / (trace[-1].seconds - trace[half - 1].seconds)
        assert rate == pytest.approx(form.says(n), rel=0.05), f"{n} workers"


def test_a_servers_plateau_is_its_cards() -> None:
    """With 256 workers, whose gradients alone come ten times as fast: twice the card, or two, serve twice as many."""
    rates = {
        network: 512 / (trace[-1].seconds - trace[511].seconds)
        for network in (HALF, NET, replace(NET, server=2 * B), replace(NET, shards=2))
        for trace in [ob.simulate(ASGD(), TASK, ob.Cluster(256, ob.Fixed(C), network=network), gradients=1024).trace]
    }
    half, full, fast, sharded = rates.values()
    assert full == pytest.approx(2 * half, rel=0.03)
    assert fast == pytest.approx(2 * full, rel=0.01)
    assert sharded == fast


@pytest.mark.parametrize("method", [DPSGD(), DPSGD(topology=Exponential()), ADPSGD(), SGP()], ids=repr)
def test_a_trace_tells_the_size_of_one_message_of_several(method: ob.Method) -> None:
    """A peer that sends to several between two gradients: the bandwidth read from its trace is that of one message."""
    cluster = ob.Cluster(8, ob.Gamma(0.25, 0.1), network=Network(1e-3, 125e6))
    trace = ob.simulate(method, TASK, cluster, gradients=800).trace
    found = ob.Cluster.from_trace(trace).network
    assert found.bandwidth == pytest.approx(125e6, rel=1e-3)
    assert found == Network(1e-3, found.bandwidth)


# ---------------------------------------------------------------- bad input


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no bandwidth": (lambda: Network(bandwidth=0.0), r"Network\.bandwidth = 0\.0: must be above 0 bytes"),
    "negative bandwidth": (lambda: Network(bandwidth=-1e6), r"Network\.bandwidth = -1000000\.0: must be above 0"),
    "nan bandwidth": (lambda: Network(bandwidth=math.nan), r"Network\.bandwidth = nan: must be above 0"),
    "None as bandwidth": (lambda: Network(bandwidth=None), r"Network\.bandwidth = None: must be above 0"),  # type: ignore[arg-type]
    "no download": (lambda: Network(download=0.0), r"Network\.download = 0\.0: must be above 0"),
    "nan download": (lambda: Network(download=math.nan), r"Network\.download = nan: must be above 0"),
    "negative server": (lambda: Network(server=-1.0), r"Network\.server = -1\.0: must be above 0"),
    "negative latency": (lambda: Network(-1e-3), r"Network\.latency = -0\.001: must be finite and at least 0"),
    "nan latency": (lambda: Network(math.nan), r"Network\.latency = nan: must be finite"),
    "endless latency": (lambda: Network(math.inf), r"Network\.latency = inf: must be finite"),
    "no shards": (lambda: Network(shards=0), r"Network\.shards = 0: must be a whole number, at least 1"),
    "half a shard": (lambda: Network(shards=0.5), r"Network\.shards = 0\.5: must be a whole"),  # type: ignore[arg-type]
    "unknown duplex": (lambda: Network(duplex="simplex"), r"Network\.duplex = 'simplex': must be 'full' or 'half'"),  # type: ignore[arg-type]
    "unknown dtype": (lambda: Network(dtype="int8"), r"Network\.dtype = 'int8': must be one of .*'bfloat16'"),  # type: ignore[arg-type]
    "a link alone": (lambda: Network(links=Link(0)), r"Network\.links = Link\(.*: must be a tuple of links such as"),  # type: ignore[arg-type]
    "no link": (lambda: Network(links=(0, 1)), r"Network\.links = \(0, 1\): must be a tuple of links such as"),  # type: ignore[arg-type]
    "a link twice": (lambda: Network(links=(Link(0, 1), Link(0, 1, 2.0))), r"Network\.links = .*leave one out"),
    "the other way round": (lambda: Network(links=(Link(0, 1), Link(1, 0))), r"Network\.links = .*leave one out"),
    "all links twice": (lambda: Network(links=(Link(3), Link(3))), r"Network\.links = .*join the same nodes: leave"),
    "a link to itself": (lambda: Link(2, 2), r"Link\.other = 2: a link joins two nodes; None means all others"),
    "a link with no bandwidth": (lambda: Link(2, bandwidth=0.0), r"Link\.bandwidth = 0\.0: must be above 0"),
    "a link with nan bandwidth": (lambda: Link(2, bandwidth=math.nan), r"Link\.bandwidth = nan: must be above 0"),
    "a link with negative latency": (lambda: Link(2, latency=-1.0), r"Link\.latency = -1\.0: must be finite and at"),
    "a link with nan latency": (lambda: Link(2, latency=math.nan), r"Link\.latency = nan: must be finite"),
    "a link from nowhere": (
        lambda: ob.Cluster(4, network=Network(links=(Link(7, 1),))),
        r"Network\.links = Link\(node=7, .*: there is no node 7: workers are 0 to 3, the server is -1",
    ),
    "a link to nowhere": (
        lambda: ob.Cluster(2, events=(Join(5, 1.0),), network=Network(links=(Link(5, 1), Link(1, -2)))),
        r"Network\.links = Link\(node=1, other=-2, .*: there is no node -2: workers are 0, 1, 5, the server is -1",
    ),
    "no network": (lambda: ob.Cluster(network=1e9), r"Cluster\.network = 1000000000\.0: must be a Network such as"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_network_is_refused_by_name(case: str) -> None:
    """A ``ValueError`` that names the thing, its value and the cure."""
    build, message = BAD[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        build()


def test_a_network_is_a_value() -> None:
    network = replace(COSTLY, dtype="bfloat16", shards=3)
    assert read(repr(network)) == network
    assert hash(network) == hash(read(repr(network)))
