"""Peers that crash, leave, join and come back at awkward moments: every method without a server goes on, to the last
gradient and to the bit, and what a method conserves stays conserved among the living."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import torch
from conftest import by_turns
from test_peer_laws import DISH, JUMP, Scatter, close
from torch import Tensor

import offbeat as ob
from offbeat import Crash, Join, Leave
from offbeat.core.protocol import Gradient
from offbeat.core.topology import Complete, Exponential, Graph, RandomMatching, RandomPeer, Ring, Star, Torus
from offbeat.engines.simulator import Simulation
from offbeat.methods import (
    ADPSGD,
    BMUF,
    DPSGD,
    OSGP,
    SGP,
    AllReduce,
    DiLoCo,
    GoSGD,
    GroupSGD,
    HierarchicalSGD,
    LocalSGD,
    SlowMo,
    SlowMoNoAverage,
)

EVEN, UNEVEN = ob.Fixed(1.0), ob.Gamma(cv=0.4, machine_cv=0.4)
PEERS = [cls for cls in ob.methods.all_methods() if not issubclass(cls, ob.ServerMethod)]
each_method = pytest.mark.parametrize("cls", PEERS, ids=lambda cls: cls.__name__)

NESTED: dict[str, ob.Method] = {
    "SlowMo of SGP": SlowMo(SGP(), period=3),
    "SlowMo of OSGP": SlowMo(OSGP(), period=3),
    "SlowMo of OSGP, no average": SlowMoNoAverage(OSGP(topology=Exponential()), period=3),
    "SlowMo of AllReduce": SlowMo(AllReduce(), period=2),
    "LocalSGD of DPSGD": LocalSGD(DPSGD(), period=4),
    "groups of groups": HierarchicalSGD(GroupSGD(GroupSGD(period=2, size=2), period=1, size=3), period=2),
    "DiLoCo of groups": DiLoCo(GroupSGD(SlowMo(period=2), period=1, size=2), period=3),
    "SGP at random": SGP(topology=RandomPeer(), period=2),
    "SGP on a star": SGP(topology=Star()),
    "OSGP on a ring": OSGP(topology=Ring()),
    "OSGP at random": OSGP(topology=RandomPeer()),
    "DPSGD in pairs": DPSGD(topology=RandomMatching()),
    "DPSGD on a torus": DPSGD(topology=Torus(), period=2),
    "DPSGD on a path": DPSGD(topology=Graph(((0, 1), (1, 2), (2, 3)))),
    "ADPSGD on a path": ADPSGD(topology=Graph(((0, 1), (1, 2), (2, 3)))),
    "GoSGD with everybody": GoSGD(topology=Complete()),
}

Events = tuple[Any, ...]
SCENARIOS: dict[str, Events] = {  # four workers, a second for a gradient
    "crash during a gradient": (Crash(1, 3.5),),
    "crash as gradients end": (Crash(1, 3.0),),
    "the first crashes": (Crash(0, 3.5),),
    "two crash at once": (Crash(1, 3.0), Crash(2, 3.0)),
    "two crash at the start": (Crash(1, 0.0), Crash(2, 0.0)),
    "leave during a gradient": (Leave(1, 3.5),),
    "leave as gradients end": (Leave(0, 3.0),),
    "two leave at once": (Leave(0, 3.5), Leave(2, 3.5)),
    "join during a gradient": (Join(4, 3.5),),
    "join as gradients end": (Join(4, 3.0),),
    "join at the start": (Join(4, 0.0),),
    "join one after the other": (Join(4, 3.2), Join(5, 3.4), Join(6, 4.2)),
    "join with a gap in the names": (Join(11, 3.5), Join(7, 3.5)),
    "crash and come back": (Crash(1, 3.5), Join(1, 4.5)),
    "crash and come back at once": (Crash(1, 3.0), Join(1, 3.0)),
    "leave and come back before the last gradient is done": (Leave(1, 3.3), Join(1, 3.4)),
    "come back twice": (Crash(1, 1.5), Join(1, 2.5), Leave(1, 4.5), Join(1, 6.5)),
    "a newcomer crashes while it waits": (Join(4, 3.1), Crash(4, 3.2)),
    "a newcomer leaves while it waits": (Join(4, 3.1), Leave(4, 3.2)),
    "a newcomer crashes while it waits and comes again": (Join(4, 3.1), Crash(4, 3.2), Join(4, 3.3)),
    "one of two newcomers crashes while it waits": (Join(4, 3.1), Join(5, 3.1), Crash(4, 3.2)),
    "others crash while a newcomer waits": (Join(4, 3.1), Crash(0, 3.2), Crash(3, 3.3)),
    "all but one crash at once": (Crash(0, 3.5), Crash(1, 3.5), Crash(3, 3.5)),
    "all but one go one by one": (Crash(3, 2.5), Leave(0, 3.5), Crash(1, 4.5)),
    "all but a newcomer crash": (Join(4, 3.1), *(Crash(i, 3.5) for i in range(4))),
    "all but two newcomers leave": (Join(4, 3.1), Join(5, 3.2), *(Leave(i, 3.5) for i in range(4))),
    "all crash, then one joins": (*(Crash(i, 3.5) for i in range(4)), Join(9, 6.0)),
    "all crash, one joins, another comes and goes": (
        *(Crash(i, 3.5) for i in range(4)),
        Join(9, 5.0),
        Join(10, 5.7),
        Crash(10, 6.4),
    ),
    "all crash, then others join one by one": (
        *(Crash(i, 3.5) for i in range(4)),
        Join(9, 4.0),
        Join(10, 4.6),
        Join(11, 6.3),
    ),
    "all leave, then two join": (*(Leave(i, 3.5) for i in range(4)), Join(9, 6.0), Join(1, 6.0)),
    "all are replaced": (*(Join(4 + i, 2.5) for i in range(4)), *(Crash(i, 4.5) for i in range(4))),
    "all at one instant": (Crash(0, 3.0), Leave(1, 3.0), Join(4, 3.0), Crash(2, 3.0), Join(2, 3.0)),
}


def sized(cls: type[ob.Method], period: int) -> ob.Method:
    """The method with its defaults, but for this period where it has one, and 1 for what is inside it."""
    method = cls()
    if hasattr(method, "inner") and hasattr(method.inner, "period"):
        method = dataclasses.replace(method, inner=dataclasses.replace(method.inner, period=1))
    return dataclasses.replace(method, period=period) if hasattr(method, "period") else method


def check(method: ob.Method, events: Events, speed: ob.Speed, workers: int = 4, gradients: int = 46) -> ob.Run:
    """One run: exactly these gradients, finite, who is there in the end on record, no minibatch twice."""
    cluster = ob.Cluster(workers, speed, events)
    run = ob.simulate(method, DISH, cluster, gradients=gradients, seed=2)
    assert len(run.trace) == gradients
    assert bool(torch.isfinite(run.x).all())
    here, there = set(range(workers)), set(range(workers))
    assert run.seconds > max(event.at for event in events)
    for event in sorted(events, key=lambda event: event.at):
        here = here | {event.worker} if isinstance(event, Join) else here - {event.worker}
    for incident in run.trace.incidents:
        there = there | {incident.worker} if incident.what == "joined" else there - {incident.worker}
    assert here == there
    steps = defaultdict(list)
    for event in run.trace:
        steps[event.worker].append(event.step)
    lost = sum(i.lost for i in run.trace.incidents)
    assert all(taken == sorted(set(taken)) for taken in steps.values())
    assert sum(max(taken) + 1 - len(taken) for taken in steps.values()) <= lost
    assert all(i.lost in (0, 1) and (i.what == "crashed" or not i.lost) for i in run.trace.incidents)
    return run


WHAT = {Crash: "crashed", Leave: "left", Join: "joined"}


@pytest.mark.parametrize(("cls", "scenario"), by_turns(PEERS, SCENARIOS, every=5))
def test_a_run_goes_on(cls: type[ob.Method], scenario: str) -> None:
    """Everything that happens is on record. Methods of a kind share out two speeds and periods among them."""
    events = SCENARIOS[scenario]
    period, speed = ((1, EVEN), (3, UNEVEN))[(PEERS.index(cls) + list(SCENARIOS).index(scenario)) % 2]
    run = check(sized(cls, period), events, speed)
    happened = [(event.worker, WHAT[type(event)]) for event in events]
    assert sorted((i.worker, i.what) for i in run.trace.incidents) == sorted(happened)


@pytest.mark.parametrize("name", NESTED)
def test_a_run_of_a_composed_method_goes_on(name: str) -> None:
    for events in list(SCENARIOS.values())[list(NESTED).index(name) % 2 :: 2]:
        check(NESTED[name], events, UNEVEN)


@pytest.mark.parametrize("workers", [1, 2, 7])
@each_method
def test_of_few_and_of_many(cls: type[ob.Method], workers: int) -> None:
    """All at the start go, some at once and some not, and others take over."""
    gone = [(Crash if i % 2 else Leave)(i, 3.0 + 0.25 * (i // 2)) for i in range(workers)]
    check(sized(cls, 2), (*gone, Join(20, 3.25), Join(21, 5.0)), EVEN, workers)
    check(sized(cls, 5), (Join(20, 2.3), *gone, Join(0, 7.0)), UNEVEN, workers)


def random_events(seed: int, workers: int, back: bool) -> Events:
    """Anything that a cluster allows, half of it at moments at which gradients end too; who has gone comes ``back``, or
    only others come. Somebody is there in the end."""
    rng, here, events = Random(seed), set(range(workers)), list[Any]()
    names = [i for i in range(workers + 3) if back or i >= workers]
    for at in sorted(rng.choice((rng.randint(0, 16) / 2, 8 * rng.random())) for _ in range(rng.randint(4, 12))):
        free = [i for i in names if i not in here]
        if here and (not free or rng.random() < 0.55):
            worker = rng.choice(sorted(here))
            here.remove(worker)
            events.append(rng.choice((Crash, Leave))(worker, at))
        elif free:
            worker = rng.choice(free)
            if not back:
                names.remove(worker)
            here.add(worker)
            events.append(Join(worker, at))
    return (*events, Join(20, 8.2))


def repeat(method: ob.Method, seed: int, back: bool, workers: int) -> None:
    events, speed = random_events(seed, workers, back), (EVEN, UNEVEN)[seed % 2]
    a, b = (check(method, events, speed, workers, gradients=70) for _ in range(2))
    assert torch.equal(a.x, b.x)
    assert a.trace == b.trace


@pytest.mark.parametrize("back", [False, True], ids=["others come", "who went comes back"])
@each_method
def test_whatever_happens_happens_again(cls: type[ob.Method], back: bool) -> None:
    """Random scenarios: the same bits twice."""
    for seed in range(4):
        repeat(sized(cls, 1 + seed % 3), seed, back, workers=1 + seed)


@pytest.mark.parametrize("back", [False, True], ids=["others come", "who went comes back"])
@pytest.mark.parametrize("name", NESTED)
def test_whatever_happens_to_a_composed_method_happens_again(name: str, back: bool) -> None:
    for seed in range(100, 104):
        repeat(NESTED[name], seed, back, workers=4 if "path" in name else seed - 99)


@each_method
@pytest.mark.parametrize("event", [Crash, Leave])
def test_when_nobody_is_left_the_run_says_so(cls: type[ob.Method], event: Any) -> None:
    cluster = ob.Cluster(3, UNEVEN, tuple(event(i, 4.0 + i) for i in range(3)))
    with pytest.raises(ob.WorkerLost, match=r"no worker is left .* of 200 gradients were never taken"):
        ob.simulate(sized(cls, 2), DISH, cluster, gradients=200)


# ---------------------------------------------------------------- rounds


class Stamped(DPSGD):
    """Each message says of which round it is."""

    def send(self, w: Any, out: Any, keep: float) -> tuple[Any, dict[int, Any]]:
        return w, dict.fromkeys(out, (w.x, w.rule.step))

    def merge(self, w: Any, inbox: Any, into: Any, own: float) -> Any:
        assert all(step == w.rule.step for _, step in inbox.values()), "a message of another round"
        return super().merge(w, {peer: x for peer, (x, _) in inbox.items()}, into, own)


PATH = Graph(((0, 1), (1, 2), (2, 3)))


@pytest.mark.parametrize("topology", [PATH, Ring(), Exponential(), RandomMatching()], ids=lambda t: type(t).__name__)
def test_messages_of_different_rounds_never_mix(topology: Any) -> None:
    """Whoever comes and goes."""
    for seed in range(10):
        events = random_events(seed, 4, back=False)
        check(Stamped(ob.SGD(0.05), topology=topology), events, UNEVEN, gradients=70)


@pytest.mark.parametrize("event", [Crash, Leave])
@pytest.mark.parametrize("name", [2, 9])
def test_who_comes_back_is_not_taken_for_who_went(event: Any, name: int) -> None:
    """Worker 0 is ten times slower, so others are rounds ahead of it: 1 still asks for rounds of the old worker 2 when
    the new one is in later rounds. A newcomer of another name is no problem."""
    events = (event(2, 5.5), Join(name, 5.6))
    check(Stamped(ob.SGD(0.05), topology=PATH), events, ob.Fixed((10.0, 1.0, 1.0, 1.0)))


# ---------------------------------------------------------------- what is conserved


class Still:
    """A run in which peers jump apart at their first gradient and then only mix; ``moments`` are those at which nothing
    happens: who is there, and what each has, messages under way to it included, unless their round is over for it."""

    def __init__(self, method: ob.Method, part: Callable[[Any, list[Any]], Any], cluster: ob.Cluster) -> None:
        class Jump(Scatter):
            def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
                g, loss = super().grad(x, worker, step)
                return (g if worker < cluster.workers else 0 * g), loss

        self.moments: list[dict[int, Any]] = []
        self.lives: list[list[Any]] = []  # who is there at each of them; who comes back is another
        jump, late = Jump(), method.period if getattr(method, "overlaps", False) else 0  # type: ignore[attr-defined]
        sim = Simulation(method, jump, cluster, 200, seed=1)  # type: ignore[arg-type]
        step = sim.clock.step

        def stepped() -> bool:
            now = sim.clock.now
            there, lives = {}, list(sim.workers.values())
            for i, worker in sim.workers.items():
                step_of = worker.node.step - late
                letters = [msg for _, round, msg in worker.inbox if round is None or round >= step_of]
                there[i] = part(worker.node.state, letters)
            jumped = all((i, 0) in jump.at for i in range(cluster.workers))
            going = step()
            if sim.clock.now > now and jumped:  # nothing more happened at that instant
                self.moments.append(there)
                self.lives.append(lives)
            return going

        sim.clock.step = stepped  # type: ignore[method-assign]
        self.run = sim.run()

    def changes(self) -> Iterator[tuple[dict[int, Any], dict[int, Any]]]:
        return itertools.pairwise(self.moments)


def push_sum(state: Any, letters: list[Any]) -> Tensor:
    """Mass and weight, in one vector."""
    return torch.stack([torch.cat((x, w[None])) for x, w in ((state.x, state.weight), *letters)]).sum(0)


def weighed(state: Any, letters: list[Any]) -> Tensor:
    pairs = [(state.x, state.weight), *letters]
    return torch.stack([torch.cat((w * x, w[None])) for x, w in pairs]).sum(0)


JITTER = ob.Recorded(((1.0, 0.9, 1.2, 0.7), (1.1, 0.8), (0.95, 1.3, 0.85), (0.75, 1.25)))
GOING = (
    Join(4, 4.1417),
    Leave(1, 5.2718),
    Crash(2, 6.5111),
    Join(7, 7.7322),
    Join(8, 7.7322),
    Leave(0, 9.1414),
    Join(2, 9.6111),
    Crash(4, 10.7333),
    Join(1, 12.5777),
    Leave(7, 13.1115),
    Leave(8, 13.1115),
)
PLACES = torch.stack([Scatter.place(i) for i in range(4)])
LEAST, MOST = PLACES.amin(0), PLACES.amax(0)  # between which every mean of them lies
CONSERVING: dict[str, tuple[ob.Method, Any]] = {
    "SGP": (SGP(JUMP), push_sum),
    "SGP at random": (SGP(JUMP, topology=RandomPeer()), push_sum),
    "SGP on a ring, every third step": (SGP(JUMP, topology=Ring(), period=3), push_sum),
    "OSGP": (OSGP(JUMP), push_sum),
    "OSGP to many": (OSGP(JUMP, topology=Exponential()), push_sum),
    "OSGP at random": (OSGP(JUMP, topology=RandomPeer(), period=2), push_sum),
    "GoSGD": (GoSGD(JUMP), weighed),
    "GoSGD always": (GoSGD(JUMP, probability=1.0, topology=Complete()), weighed),
}


BACK = (Crash(2, 14.5), Join(2, 14.6), Leave(3, 25.5), Join(3, 25.8), Crash(1, 38.4), Join(1, 38.45))
COMINGS = {  # speeds, and who comes and goes
    "jitter": (JITTER, GOING),
    "uneven": (UNEVEN, GOING),
    "back at once among peers that wait for a slow one": (ob.Fixed((10.0, 1.0, 1.0, 1.0)), BACK),
}


@pytest.mark.parametrize("coming", COMINGS)
@pytest.mark.parametrize("name", CONSERVING)
def test_mass_stays_among_the_living(name: str, coming: str) -> None:
    """A leave hands over and a message to the dead comes back: only a crash takes mass away, its own. A join splits in
    GoSGD; in SGP it may add mass, at a living peer's z, so that the newcomer has weight 1."""
    method, part = CONSERVING[name]
    still = Still(method, part, ob.Cluster(4, *COMINGS[coming]))
    crashed = {(i.seconds, i.worker) for i in still.run.trace.incidents if i.what == "crashed"}
    assert len(crashed) == 2
    gone, begun = set(), False
    for (before, after), (old, now) in zip(still.changes(), itertools.pairwise(still.lives), strict=True):
        lost = torch.zeros(8, dtype=torch.float64)
        for i in before.keys() - after.keys():
            if i in {worker for _, worker in crashed} - gone:
                lost = lost + before[i]
                gone.add(i)
        new = sum(after.values()) - sum(before.values()) + lost
        come = sum(all(worker is not other for other in old) for worker in now)
        if part is push_sum and come:
            assert -1e-12 <= float(new[-1]) <= come + 1e-12
            assert ((new[-1] * LEAST - 1e-9 <= new[:-1]) & (new[:-1] <= new[-1] * MOST + 1e-9)).all()
        else:
            assert close(new, torch.zeros_like(new))
        begun = begun or bool(lost.norm() > 0.1)
    assert begun
    assert {frozenset(there) for there in still.moments} >= {frozenset({0, 1, 2, 3})}


@pytest.mark.parametrize("weight", [0.125, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("cls", [SGP, OSGP])
def test_a_newcomer_of_push_sum_has_weight_one_out_of_the_surplus(cls: type[SGP], weight: float) -> None:
    """Both go on from the sponsor's z; what it has above 1 is given away first, and the rest is new mass."""
    method = cls(JUMP)
    w = method.init(torch.tensor([3.0, -1.0], dtype=torch.float64))
    w = method.local(w, torch.tensor([0.5, 2.0], dtype=torch.float64))._replace(weight=torch.tensor(weight).double())
    mine, theirs = method.welcome(w)
    z = method.params(w)
    assert close(method.params(mine), z)
    assert close(method.params(theirs), z)
    assert float(theirs.weight) == 1.0
    assert close(mine.weight + theirs.weight, torch.tensor(max(weight, min(weight, 1.0) + 1)).double())
    assert theirs.rule.step == w.rule.step


def test_a_crash_in_ad_psgd_takes_its_own_model_and_nothing_else() -> None:
    """The sum of the others' models is the same before and after; a newcomer adds the model that it copies."""
    events = (Crash(2, 6.5111), Join(7, 8.2718), Crash(0, 9.1414), Leave(3, 11.3131))
    still = Still(ADPSGD(JUMP), lambda state, letters: state.x, ob.Cluster(5, JITTER, events))
    seen = set()
    for before, after in still.changes():
        come, gone = after.keys() - before.keys(), before.keys() - after.keys()
        if gone:
            assert len(gone) == 1
            rest = sum(x for i, x in before.items() if i not in gone)
            seen.add(next(iter(gone)))
            if gone != {3}:  # who leaves in good order first delivers its gradient, and goes on a last visit
                assert close(sum(after.values()), rest)
        elif come:
            donor = before[min(before)]
            assert close(after[7], donor)
            assert close(sum(after.values()), sum(before.values()) + donor)
        else:
            assert close(sum(after.values()), sum(before.values()))
    assert seen == {2, 0, 3}


# ---------------------------------------------------------------- newcomers to averages


def tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for part in tree:
            yield from tensors(part)


AVERAGED: dict[str, tuple[ob.Method, Callable[[Any], Any]]] = {
    "AllReduce": (AllReduce(), lambda w: (w.x, w.rule)),
    "AllReduce of Adam": (AllReduce(ob.Adam(0.01)), lambda w: (w.x, w.rule)),
    "LocalSGD": (LocalSGD(period=3), lambda w: w.inner.x),
    "double averaging": (LocalSGD(period=3, buffering="average"), lambda w: w.inner.x),
    "BMUF": (BMUF(period=4), lambda w: (w.inner.x, w.slow)),
    "DiLoCo": (DiLoCo(period=4), lambda w: (w.inner.x, w.slow)),
    "SlowMo": (SlowMo(period=3), lambda w: (w.inner, w.slow)),
    "SlowMo of SGP": (SlowMo(SGP(), period=3), lambda w: (w.inner, w.slow)),
    "SlowMo of OSGP": (SlowMo(OSGP(), period=3), lambda w: (w.inner, w.slow)),
    "SlowMo of AllReduce": (SlowMo(AllReduce(), period=2), lambda w: (w.inner.x, w.inner.rule, w.slow)),
}


ARRIVALS: dict[str, Events] = {
    "to others": (Join(4, 5.3), Crash(0, 7.7), Join(6, 8.1), Join(0, 10.2), Leave(1, 12.4)),
    "when all have gone": (*(Crash(i, 5.4) for i in range(3)), Join(4, 6.1), Join(6, 9.3), Join(0, 12.2)),
}


@pytest.mark.parametrize("arrivals", ARRIVALS)
@pytest.mark.parametrize("name", AVERAGED)
def test_a_newcomer_has_the_same_bits_as_the_others_after_each_average(name: str, arrivals: str) -> None:
    """Parameters, slow momentum (u) and start (x_0), and the outer optimiser's state; with all-reduce the rule's too."""
    method, shared = AVERAGED[name]
    for speed in (EVEN, UNEVEN):
        sim = Simulation(method, DISH, ob.Cluster(3, speed, ARRIVALS[arrivals]), 160, seed=3)  # type: ignore[arg-type]
        step = sim.clock.step
        found: dict[int, dict[int, tuple[Tensor, ...]]] = defaultdict(dict)

        def stepped(sim: Simulation = sim, step: Any = step, found: Any = found) -> bool:
            going = step()
            for i, worker in sim.workers.items():
                node = worker.node
                if isinstance(worker.waits, Gradient) and worker.waits.free and i not in found[node.step]:
                    found[node.step][i] = tuple(tensors(shared(node.state)))
            return bool(going)

        sim.clock.step = stepped  # type: ignore[method-assign]
        sim.run()
        for states in found.values():
            for other in list(states.values())[1:]:
                assert all(map(torch.equal, next(iter(states.values())), other))
        for newcomer in (4, 6, 0):
            assert sum(newcomer in states and len(states) > 2 for states in found.values()) > 3


@pytest.mark.parametrize("name", ["AllReduce", "SlowMo"])
def test_a_newcomer_waits_for_the_next_average_and_starts_there(name: str) -> None:
    """Its first gradient is taken where the others' is, in the same round."""
    method, _ = AVERAGED[name]
    run = check(method, (Join(4, 5.3),), EVEN)
    first = next(event for event in run.trace if event.worker == 4)
    assert first.seconds == 7
    at_once = [event for event in run.trace if event.seconds == first.seconds]
    assert {event.worker for event in at_once} == {0, 1, 2, 3, 4}
