"""What goes wrong on a cluster: stragglers, partitions, crashes and lost messages. Every method lives through them, what
was lost is on record, and what happens is a function of (seed, who, step) and of nothing else."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Bowl, by_turns

import offbeat as ob
from offbeat import Crash, Crashes, Join, Loss, Network, Partition, Straggler
from offbeat.core.gossip import PushGossipMethod, RoundGossipMethod
from offbeat.core.protocol import SERVER
from offbeat.core.rates import with_rate
from offbeat.engines.network import Traffic
from offbeat.engines.simulator import Simulation
from offbeat.methods import ASGD, EASGD, AllReduce, PushGossip
from offbeat.names import read

BOWL = Bowl()
SPEED = ob.Gamma(cv=0.4, machine_cv=0.3)
NET = Network(0.2, 200.0, duplex="half")  # a message of a bowl has 56 bytes
METHODS = ob.methods.all_methods()
SERVERS = [cls for cls in METHODS if issubclass(cls, ob.ServerMethod)]
ONE_WAY = [cls for cls in METHODS if issubclass(cls, RoundGossipMethod | PushGossipMethod)]
each_method = pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)


@cache
def calm(cls: type[ob.Method]) -> ob.Method:
    """The method with its defaults, and a rate at which none diverges."""
    return with_rate(cls(), 0.01)


@cache
def simulate(
    method: ob.Method, *faults: ob.Fault, gradients: int = 48, workers: int = 4, network: Network = NET, **more: Any
) -> ob.Run:
    cluster = ob.Cluster(workers, more.pop("speed", SPEED), more.pop("events", ()), network, faults)
    return ob.simulate(method, BOWL, cluster, gradients=gradients, **more)


def equal(a: ob.Run, b: ob.Run) -> bool:
    """The same run to the bit, whatever its cluster was called."""
    notes = (a.trace.incidents, a.trace.evaluations) == (b.trace.incidents, b.trace.evaluations)
    return list(a.trace) == list(b.trace) and notes and torch.equal(a.x, b.x) and a.seconds == b.seconds


# ---------------------------------------------------------------- every method lives through everything


FAULTS: dict[str, tuple[ob.Fault, ...]] = {
    "straggler": (Straggler(1, 6.0, start=2.0, end=9.0),),
    "partition": (Partition((0, 2), start=3.0, end=8.5),),
    "crashes": (Crashes(0.1, 4.0),),
    "loss": (Loss(0.1),),
}
FAULTS["all at once"] = tuple(fault for faults in FAULTS.values() for fault in faults)
FAULTS["all, and often"] = (
    Straggler(0, 3.0),
    Straggler(1, 30.0, start=1.0, end=4.0),
    Straggler(1, 0.5, start=4.0),
    Partition((1, SERVER), start=0.0, end=3.0),
    Partition((2, 3), start=3.0, end=6.0),
    Crashes(0.5, 2.5),
    Loss(0.3),
)


@pytest.mark.parametrize(("cls", "name"), by_turns(METHODS, FAULTS, every=3))
def test_a_run_goes_on(cls: type[ob.Method], name: str) -> None:
    """To exactly its gradients, finite, in order of time, no minibatch twice, and to the same bits again."""
    run, again = simulate(calm(cls), *FAULTS[name]), simulate.__wrapped__(calm(cls), *FAULTS[name])
    assert run.trace == again.trace
    assert equal(run, again)
    assert len(run.trace) == 48
    assert bool(torch.isfinite(run.x).all())
    seconds = run.trace.column("seconds").tolist()
    assert seconds == sorted(seconds)
    taken = [(event.worker, event.step) for event in run.trace]
    assert len(set(taken)) == 48


@each_method
def test_faults_change_what_happens(cls: type[ob.Method]) -> None:
    """Each of them, and another seed gives another pattern."""
    plain = simulate(calm(cls))
    for name in ("straggler", "crashes", *(("loss",) if cls in ONE_WAY else ())):
        run = simulate(calm(cls), *FAULTS[name])
        assert not equal(run, plain)
        if name != "straggler":
            assert simulate(calm(cls), *FAULTS[name], seed=1).trace.incidents != run.trace.incidents


@each_method
def test_workers_crash_and_come_back_at_a_rate(cls: type[ob.Method]) -> None:
    """One crash per 200 gradients, 10 s away: it still learns, and who comes back works."""
    run = ob.simulate(
        with_rate(cls(), 0.02),
        quadratic := ob.tasks.Quadratic(),
        ob.Cluster(4, SPEED, network=Network(1e-3, 1e6), faults=(Crashes(1 / 200, 10.0),)),
        gradients=300,
        seed=1,
    )
    assert run.figures["loss"] < 0.5 * quadratic.evaluate(quadratic.x0())["loss"]
    assert run.summary()["crashes"] >= 2
    back = {incident.worker for incident in run.trace.incidents if incident.what == "joined"}
    assert back
    for worker in back:
        at = next(i.seconds for i in run.trace.incidents if i.worker == worker and i.what == "joined")
        assert any(event.worker == worker and event.seconds > at for event in run.trace)


# ---------------------------------------------------------------- what was lost is on record


@each_method
def test_the_summary_counts_what_the_trace_shows(cls: type[ob.Method], tmp_path: Path) -> None:
    """Crashes, lost and undone gradients and lost messages are those of the incidents, on disk too; and what was begun is
    what was taken and what was lost."""
    sim = Simulation(calm(cls), BOWL, ob.Cluster(4, SPEED, network=NET, faults=FAULTS["all, and often"]), 100, seed=1)
    run = sim.run()
    run.trace.write(tmp_path / "trace")
    figures = run.summary()
    for incidents in (run.trace.incidents, ob.Trace.read(tmp_path / "trace").incidents):
        crashes = [incident for incident in incidents if incident.what == "crashed"]
        assert figures["crashes"] == len(crashes) > 0
        assert figures["lost_gradients"] == sum(incident.lost for incident in crashes) == len(crashes)
        assert figures["undone_gradients"] == sum(incident.undone for incident in crashes)
        assert figures["lost_messages"] == sum(incident.what == "lost message" for incident in incidents)
        assert {incident.what for incident in incidents} <= {"crashed", "joined", "lost message"}
    last = dict(sim.steps) | {name: worker.steps for name, worker in sim.workers.items()}
    assert sum(last.values()) == 100 + figures["lost_gradients"]
    assert (figures["lost_messages"] > 0) == (cls in ONE_WAY)


@each_method
def test_nobody_works_while_it_is_away(cls: type[ob.Method]) -> None:
    """From a crash until it is back a worker delivers nothing, and it is away for as long as said; then it takes the next
    minibatch, and never one that it had begun."""
    run = simulate(calm(cls), Crashes(0.1, 3.25), gradients=100)
    away = defaultdict(list)
    for incident in run.trace.incidents:
        away[incident.worker].append((incident.what, incident.seconds))
    assert away
    for worker, notes in away.items():
        assert [what for what, _ in notes] == (["crashed", "joined"] * len(notes))[: len(notes)]
        for (what, begin), (_, end) in pairwise(notes):
            if what == "crashed":
                assert end == begin + 3.25
                assert not any(e.worker == worker and begin <= e.seconds <= end for e in run.trace)


def test_undone_gradients_are_those_that_nobody_had() -> None:
    """With a period of 4: those since the worker's last visit."""
    run = simulate(EASGD(0.01), Crashes(0.1, 3.0), gradients=200, network=Network())
    since: dict[int, int] = defaultdict(int)
    undone = []
    notes = sorted(
        [(e.seconds, 0, e.worker) for e in run.trace] + [(i.seconds, 1, i.worker) for i in run.trace.incidents]
    )
    for _, crashed, worker in notes:
        if crashed:
            undone.append(since[worker] % 4)
        since[worker] = 0 if crashed else since[worker] + 1
    crashes = [i for i in run.trace.incidents if i.what == "crashed"]
    joins = [i for i in run.trace.incidents if i.what == "joined"]
    assert len(crashes) > 10
    assert sum(undone) == sum(i.undone for i in crashes) == run.summary()["undone_gradients"] > 0
    assert not any(i.undone or i.lost for i in joins)


@pytest.mark.parametrize("cls", [c for c in SERVERS if not c.gated], ids=lambda c: c.__name__)
def test_a_push_from_a_worker_that_crashed_is_refused(cls: type[ob.Method]) -> None:
    """It dies while its message is under way: for the server that is as if it had died before it sent it."""
    network, speed = Network(0.5), ob.Fixed((1.0, 1.3, 0.9))
    whole = simulate(calm(cls), network=network, speed=speed, workers=3)
    visit = next(e for e in whole.trace if e.worker == 1 and e.sent and e.seconds > 9)
    before, under_way, after = (
        simulate(calm(cls), network=network, speed=speed, workers=3, events=(Crash(1, visit.seconds - early),))
        for early in (0.7, 0.2, -0.2)
    )
    assert torch.equal(before.x, under_way.x)
    assert list(before.trace) == list(under_way.trace)
    assert [i._replace(seconds=0.0) for i in before.trace.incidents] == [
        i._replace(seconds=0.0) for i in under_way.trace.incidents
    ]
    assert under_way.trace.incidents[0].lost == 1
    assert visit.step not in [e.step for e in under_way.trace if e.worker == 1]
    assert visit.step in [e.step for e in after.trace if e.worker == 1]
    assert after.trace.incidents[0].lost == 0


# ---------------------------------------------------------------- stragglers


@each_method
def test_a_straggler_is_slow_by_its_factor_in_its_window_and_nowhere_else(cls: type[ob.Method]) -> None:
    """What is begun in a window takes ``factor`` times the worker's own next time, to the bit."""
    slow = (
        Straggler(1, 4.0, start=3.111, end=11.111),
        Straggler(1, 0.25, start=11.111, end=15.5),
        Straggler(2, 7.0, start=5.0),
    )
    run = simulate(calm(cls), *slow, gradients=100, network=Network())
    times = [list(islice(SPEED.stream(0, worker), 100)) for worker in range(4)]
    seen = set()
    for event in run.trace:
        begin, factor = event.seconds - event.compute, 1.0
        for fault in slow:
            if fault.worker == event.worker and fault.start <= begin < fault.end:
                factor = fault.factor
        assert event.compute == times[event.worker][event.step] * factor
        seen.add((event.worker, factor))
    assert {(1, 1.0), (1, 4.0), (2, 1.0), (2, 7.0)} <= seen
    assert {factor for worker, factor in seen if worker in (0, 3)} == {1.0}


def test_a_straggler_slows_down_whom_others_wait_for() -> None:
    """All-reduce goes at its pace for as long as it is slow; workers of a server do not."""
    late = Straggler(2, 4.0, start=10.0, end=30.0)
    seconds = {}
    for method in (AllReduce(), ASGD()):
        run = simulate(method, late, gradients=160, network=Network(), speed=ob.Fixed(1.0))
        seconds[method] = run.seconds
        others = [event for event in run.trace if event.worker == 0]
        if method == ASGD():
            assert [event.seconds for event in others] == [1.0 + k for k in range(len(others))]
    assert seconds[AllReduce()] == 40 + 5 * 3
    assert seconds[ASGD()] == 44


# ---------------------------------------------------------------- partitions


@dataclass
class Crossing:
    """A transfer, or an all-reduce of ``ends``."""

    ends: tuple[int, ...]
    sent: float
    came: float


def watched(method: ob.Method, monkeypatch: pytest.MonkeyPatch, *faults: ob.Fault, **more: Any) -> list[Crossing]:
    """All that crosses between nodes in a run."""
    seen: list[Crossing] = []
    send, reduce = Traffic.send, Traffic.reduce

    def sent(self: Traffic, source: int, to: int, size: float, act: Any, *args: Any) -> None:
        if getattr(act, "watched", False) or getattr(act, "__func__", None) is sent:
            send(self, source, to, size, act, *args)
            return
        at = self.clock.now

        def acted(*args: Any) -> None:
            seen.append(Crossing((source, to), at, self.clock.now))
            act(*args)

        acted.watched = True  # type: ignore[attr-defined]
        send(self, source, to, size, acted, *args)

    def reduced(self: Traffic, members: Any, size: float) -> float:
        done = reduce(self, members, size)
        seen.append(Crossing(tuple(members), self.clock.now, done))
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Traffic, "send", sent)
        patch.setattr(Traffic, "reduce", reduced)
        simulate(method, *faults, **more)
    return seen


@pytest.mark.parametrize("network", [Network(), Network(1.7, 200.0, duplex="half")], ids=["free", "costly"])
@each_method
def test_nothing_crosses_a_partition_until_it_heals(
    cls: type[ob.Method], network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what is sent meanwhile nor what was under way; afterwards all does."""
    parts = Partition((0, 2), start=4.111, end=9.222), Partition((0, 3, SERVER), start=9.222, end=14.333)
    crossings = watched(calm(cls), monkeypatch, *parts, gradients=120, network=network)
    late = after = 0
    for crossing in crossings:
        for part in parts:
            if len({end in part.nodes for end in crossing.ends}) == 2:
                assert not part.start <= crossing.came < part.end
                late += crossing.sent < part.end <= crossing.came
                after += crossing.sent >= parts[-1].end
    assert (late and after) or not crossings
    assert crossings or not simulate(calm(cls)).trace.column("sent").any()


def test_a_partition_delays_and_loses_nothing() -> None:
    """One worker apart from the server: its message of 4 s is there when the partition heals, the other's at once."""
    run = simulate(ASGD(), Partition((1,), start=3.5, end=8.25), workers=2, network=Network(), speed=ob.Fixed(1.0))
    assert [e.seconds for e in run.trace if e.worker == 1][:6] == [1.0, 2.0, 3.0, 8.25, 9.25, 10.25]
    assert [e.seconds for e in run.trace if e.worker == 0][:6] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert run.trace.incidents == []
    run = simulate(ASGD(), Partition((1,), start=3.6, end=8.25), workers=2, network=Network(0.75), speed=ob.Fixed(1.0))
    assert [e.seconds for e in run.trace if e.worker == 1][:3] == [1.75, 8.25, 8.25 + 2.5]  # under way when it began
    assert [e.seconds for e in run.trace if e.worker == 0][:3] == [1.75, 4.25, 6.75]


def test_a_newcomers_model_waits_for_the_partition_to_heal() -> None:
    parts, events = Partition((9,), start=1.0, end=20.5), (Join(9, 2.5),)
    run = simulate(ASGD(), parts, workers=2, network=Network(), speed=ob.Fixed(1.0), events=events)
    assert next(e.seconds for e in run.trace if e.worker == 9) == 21.5


# ---------------------------------------------------------------- lost messages


@each_method
def test_only_one_way_messages_are_lost(cls: type[ob.Method]) -> None:
    """Whoever waits for an answer, or all for each other, asks until it comes: there nothing is lost, to the bit."""
    lossy, whole = simulate(calm(cls), *FAULTS["loss"]), simulate(calm(cls))
    assert (lossy.summary()["lost_messages"] > 0) == (cls in ONE_WAY)
    assert equal(lossy, whole) == (cls not in ONE_WAY)


def test_messages_are_lost_at_the_rate() -> None:
    for rate in (0.05, 0.3):
        run = simulate(PushGossip(), Loss(rate), gradients=1000)
        assert run.summary()["lost_messages"] == pytest.approx(1000 * rate, abs=4 * (1000 * rate * (1 - rate)) ** 0.5)


@dataclass(frozen=True)
class Named(ob.Fault):
    """What goes wrong at given steps: a fault of a user's own."""

    lost: tuple[tuple[int, int], ...] = ()
    died: tuple[tuple[int, int], ...] = ()

    def loses(self, seed: int, source: int, to: int, step: int) -> bool:
        return (source, step) in self.lost

    def crash(self, seed: int, worker: int, step: int) -> tuple[float, float] | None:
        return (0.5, 2.0) if (worker, step) in self.died else None


def test_a_step_is_that_of_the_trace() -> None:
    """A message belongs to the gradient after which it is sent, and a crash to the one that it takes away."""
    fault = Named(lost=((0, 3), (1, 0)), died=((2, 4),))
    run = simulate(PushGossip(), fault, workers=3, network=Network(), speed=ob.Fixed(1.0))
    lost = [(i.seconds, i.worker) for i in run.trace.incidents if i.what == "lost message"]
    assert lost == [(1.0, 1), (4.0, 0)]
    assert [e.step for e in run.trace if e.worker == 2][:6] == [0, 1, 2, 3, 5, 6]
    assert [(i.what, i.seconds) for i in run.trace.incidents if i.worker == 2] == [("crashed", 4.5), ("joined", 6.5)]


# ---------------------------------------------------------------- nothing goes wrong


HARMLESS: tuple[tuple[ob.Fault, ...], ...] = (
    (ob.Fault(), Crashes(0.0), Loss(0.0), Straggler(1, 1.0), Partition((2,), start=1e6, end=1e7)),
    (Straggler(1, 9.0, start=1e6), Partition((-1, 0, 1, 2, 3), end=1e6)),
)
"""At no rate, by no factor, after the end, from nobody."""


@each_method
def test_what_never_happens_changes_no_bit(cls: type[ob.Method]) -> None:
    plain = simulate(calm(cls))
    for faults in HARMLESS:
        assert equal(simulate(calm(cls), *faults), plain)


# ---------------------------------------------------------------- pure in (seed, who, step)


def begun(run: ob.Run) -> dict[int, tuple[int, set[int]]]:
    """For each worker, how far it came, and the steps before that from which nothing came: those it died in."""
    steps = defaultdict(set)
    for event in run.trace:
        steps[event.worker].add(event.step)
    return {worker: (max(taken), set(range(max(taken))) - taken) for worker, taken in steps.items()}


@each_method
def test_crashes_are_a_function_of_seed_worker_and_step(cls: type[ob.Method]) -> None:
    """In a run exactly those happen that the fault says, whatever else goes wrong with this worker or with others."""
    crashes = Crashes(0.1, 2.0)
    others = [(), (Straggler(1, 5.0), Partition((0,), end=9.0), Loss(0.2))]
    patterns = set()
    for seed in (0, 1):
        for faults in others:
            run = simulate(calm(cls), crashes, *faults, seed=seed)
            for worker, (last, missing) in begun(run).items():
                said = {step for step in range(last) if crashes.crash(seed, worker, step)}
                assert missing == said
                patterns.add((seed, worker, frozenset(step for step in range(10) if crashes.crash(seed, worker, step))))
    assert len({steps for *_, steps in patterns}) > 3


def test_draws_are_pure_and_even() -> None:
    """At the rate, in equal parts of the gradient; another seed, worker or step is another draw."""
    crashes, loss = Crashes(0.25, 3.0), Loss(0.25)
    drawn = [crashes.crash(seed, worker, step) for seed in range(5) for worker in range(20) for step in range(100)]
    assert drawn == [
        replace(crashes).crash(seed, worker, step) for seed in range(5) for worker in range(20) for step in range(100)
    ]
    parts = [part for part, downtime in filter(None, drawn) if downtime == 3.0]
    assert len(parts) == pytest.approx(2500, abs=4 * (10000 * 0.25 * 0.75) ** 0.5)
    assert all(0 <= part < 1 for part in parts)
    assert sum(parts) / len(parts) == pytest.approx(0.5, abs=4 * (1 / 12 / len(parts)) ** 0.5)
    nodes, steps = range(5), range(80)
    lost = {(s, a, b, k): loss.loses(s, a, b, k) for s in nodes for a in nodes for b in nodes for k in steps}
    assert sum(lost.values()) == pytest.approx(2500, abs=4 * (10000 * 0.25 * 0.75) ** 0.5)
    for moved in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):  # no part of who it is goes unused
        pairs = [(who, tuple(a + b for a, b in zip(who, moved, strict=True))) for who in lost]
        differ = [lost[who] != lost[other] for who, other in pairs if other in lost]
        assert sum(differ) == pytest.approx(0.375 * len(differ), rel=0.1)
    assert any(bool(crashes.crash(0, w, k)) != loss.loses(0, w, w, k) for w in range(4) for k in range(9))


def test_a_higher_rate_has_the_crashes_of_a_lower_one_and_more() -> None:
    some, more = ({k for k in range(500) if Crashes(rate).crash(3, 1, k)} for rate in (0.05, 0.2))
    assert some < more


@each_method
def test_one_workers_straggling_is_not_anothers(cls: type[ob.Method]) -> None:
    """Take worker 1's fault away, and worker 2 is as slow as before at its k-th gradient, and dies in the same ones."""
    slow, crashes = Straggler(2, 3.0), Crashes(0.1, 2.0)
    both = simulate(calm(cls), Straggler(1, 6.0), slow, crashes)
    one = simulate(calm(cls), slow, crashes)
    for worker in (0, 2, 3):
        a, b = ({e.step: e.compute for e in run.trace if e.worker == worker} for run in (both, one))
        common = min(max(a), max(b))
        assert {k: t for k, t in a.items() if k <= common} == {k: t for k, t in b.items() if k <= common}


# ---------------------------------------------------------------- bad input


def four(*faults: Any, **more: Any) -> Callable[[], Any]:
    return lambda: ob.Cluster(4, faults=faults, **more)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "overlapping stragglers": (
        four(Straggler(1, end=9.0), Straggler(1, 2.0, start=8.0)),
        r"Cluster\.faults = Straggler\(start=8\.0, .*: it overlaps with Straggler\(.*: give windows one after the other",
    ),
    "overlapping partitions": (
        four(Partition((0,), end=9.0), Partition((1,), start=2.0, end=3.0)),
        r"Cluster\.faults = Partition\(start=2\.0, .*: it overlaps with .*: give windows one after the other",
    ),
    "two rates of crashes": (
        four(Crashes(), Loss(), Crashes(0.1)),
        r"Cluster\.faults = Crashes\(rate=0\.1, .*: there is Crashes\(.* too: leave one out",
    ),
    "two rates of loss": (four(Loss(), Loss()), r"Cluster\.faults = Loss\(.*: there is Loss\(.* too: leave one out"),
    "an unknown straggler": (
        four(Straggler(4)),
        r"Straggler\.worker = 4: there is no such worker: workers are 0 to 3",
    ),
    "the server as a straggler": (four(Straggler(-1)), r"Straggler\.worker = -1: there is no such worker"),
    "a partition of unknown nodes": (
        four(Partition((0, 9), end=1.0), events=(Join(6, 1.0),)),
        r"Partition\.nodes = \(0, 9\): there is no node 9: workers are 0, 1, 2, 3, 6, the server is -1",
    ),
    "a partition of nobody": (lambda: Partition((), end=1.0), r"Partition\.nodes = \(\): must be .* at least one node"),
    "a partition of a number": (lambda: Partition(3, end=1.0), r"Partition\.nodes = 3: must be a tuple"),  # type: ignore[arg-type]
    "a partition for ever": (lambda: Partition((0,)), r"Partition\.end = inf: must be finite: a partition heals"),
    "a negative rate of crashes": (lambda: Crashes(-0.1), r"Crashes\.rate = -0\.1: must be in \[0, 1\)"),
    "a certain crash": (lambda: Crashes(1.0), r"Crashes\.rate = 1\.0: must be in \[0, 1\)"),
    "a nan rate of crashes": (lambda: Crashes(math.nan), r"Crashes\.rate = nan: must be in \[0, 1\)"),
    "no downtime": (lambda: Crashes(downtime=0.0), r"Crashes\.downtime = 0\.0: must be finite and above 0 seconds"),
    "endless downtime": (lambda: Crashes(downtime=math.inf), r"Crashes\.downtime = inf: must be finite"),
    "a negative rate of loss": (lambda: Loss(-0.1), r"Loss\.rate = -0\.1: must be in \[0, 1\)"),
    "all lost": (lambda: Loss(1.0), r"Loss\.rate = 1\.0: must be in \[0, 1\)"),
    "a nan rate of loss": (lambda: Loss(math.nan), r"Loss\.rate = nan: must be in \[0, 1\)"),
    "a factor of 0": (lambda: Straggler(0, 0.0), r"Straggler\.factor = 0\.0: must be finite and above 0"),
    "a negative factor": (lambda: Straggler(0, -2.0), r"Straggler\.factor = -2\.0: must be finite and above 0"),
    "a nan factor": (lambda: Straggler(0, math.nan), r"Straggler\.factor = nan: must be finite and above 0"),
    "an endless factor": (lambda: Straggler(0, math.inf), r"Straggler\.factor = inf: must be finite and above 0"),
    "a straggler before the start": (lambda: Straggler(start=-1.0), r"Straggler\.start = -1\.0: must be finite and at"),
    "a straggler that ends first": (
        lambda: Straggler(start=5.0, end=4.0),
        r"Straggler\.end = 4\.0: must be later than start = 5\.0",
    ),
    "a partition of no length": (
        lambda: Partition(start=5.0, end=5.0),
        r"Partition\.end = 5\.0: must be later than start = 5\.0",
    ),
    "a nan end": (lambda: Partition(end=math.nan), r"Partition\.end = nan: must be later than start"),
    "crashes at times and at a rate": (
        four(Crashes(), events=(Crash(1, 3.0),)),
        r"Cluster\.events = \(Crash\(.*: there are crashes at a rate too: give either times or a rate",
    ),
    "no fault": (four(0.01), r"Cluster\.faults = 0\.01: must be faults such as Crashes\(1 / 200\)"),
    "a fault alone": (
        lambda: ob.Cluster(4, faults=Loss()),  # type: ignore[arg-type]
        r"Cluster\.faults = Loss\(rate=0\.01\): must be a tuple of faults such as",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_fault_is_refused_by_name(case: str) -> None:
    """A ``ValueError`` that names the thing, its value and the cure."""
    build, message = BAD[case]
    with pytest.raises(ValueError, match=f"^{message}"):
        build()


def test_windows_may_follow_each_other() -> None:
    """At the very second, of one kind or of several, and those of different workers may meet."""
    ob.Cluster(4, faults=(Straggler(1, end=9.0), Straggler(1, 2.0, start=9.0), Straggler(2), Partition((0,), end=20.0)))
    ob.Cluster(4, faults=(Partition((0,), end=5.0), Partition((0, 1), start=5.0, end=6.0), Crashes(), Loss()))


def test_a_lone_rule_cannot_crash() -> None:
    """Nobody could take its place; slow it may be."""
    one = ob.Cluster(1, faults=(Crashes(),))
    with pytest.raises(
        ValueError, match=r"^Cluster\.faults = \[Crashes\(.*: 'local' sends no messages, so nobody can join"
    ):
        ob.simulate(ob.Local(), BOWL, one, gradients=10)
    run = simulate(ob.Local(), Straggler(0, 2.0), Loss(0.5), Partition((0,), end=99.0), workers=1, speed=ob.Fixed(1.0))
    assert run.seconds == 2.0 * 48


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_values(name: str) -> None:
    found = ob.Cluster(4, network=NET, faults=FAULTS[name])
    assert read(repr(found)) == found
    assert hash(read(repr(found))) == hash(found)


# ---------------------------------------------------------------- from a trace


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    run = simulate(ASGD(), Crashes(0.1, 3.0), gradients=200)
    run.trace.write(tmp_path / "trace")
    return tmp_path / "trace"


@pytest.mark.parametrize(
    "header", [{"format": "offbeat trace 2"}, {"format": "other"}, {"format": 1}, {}, {"rows": []}]
)
def test_a_trace_of_another_format_or_version_is_refused(recorded: Path, header: dict[str, Any]) -> None:
    """By its line, with what it should say and the cure."""
    lines = recorded.read_text().splitlines()
    first = json.loads(lines[0])
    del first["format"]
    recorded.write_text("\n".join([json.dumps(first | header), *lines[1:]]))
    said = r"line 1 is no line of an 'offbeat trace \d' file .*; give a file that"
    with pytest.raises(
        ValueError, match=rf"{said}|has the format 'offbeat trace 2', .* knows 'offbeat trace 1': install a newer"
    ):
        ob.Cluster.from_trace(recorded)


def test_no_workers_are_refused(recorded: Path) -> None:
    assert ob.Cluster.from_trace(recorded).workers == 4
    assert ob.Cluster.from_trace(recorded, 9).workers == 9
    for workers in (0, -1):
        with pytest.raises(ValueError, match=rf"^Cluster\.workers = {workers}: must be a whole number, at least 1"):
            ob.Cluster.from_trace(recorded, workers)


@pytest.mark.parametrize("cls", ONE_WAY, ids=lambda cls: cls.__name__)
def test_a_trace_tells_how_many_messages_were_lost(cls: type[ob.Method]) -> None:
    """Of those that were sent, also where a worker sends several between two gradients; and a rate whatever has happened."""
    cluster = ob.Cluster(6, SPEED, network=NET, faults=(Loss(0.1),))
    sim, sent = Simulation(calm(cls), BOWL, cluster, 400), 0
    send = sim._send

    def counted(worker: Any, request: Any) -> bool:
        nonlocal sent
        sent += 1
        return send(worker, request)

    sim._send = counted  # type: ignore[method-assign]
    run = sim.run()
    (loss,) = ob.Cluster.from_trace(run.trace).faults
    assert isinstance(loss, Loss)
    assert loss.rate == pytest.approx(run.summary()["lost_messages"] / sent, rel=0.05)
    for seed in range(3):
        trace = simulate(calm(cls), Loss(0.9), Crashes(0.5, 0.5), workers=2, seed=seed, network=Network(5.0)).trace
        assert all(0 < fault.rate < 1 for fault in ob.Cluster.from_trace(trace).faults)  # type: ignore[attr-defined]
