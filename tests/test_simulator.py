"""The simulator: deterministic, exact in what it counts, and never silent about a failure."""

from __future__ import annotations

import gc
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Bowl, same
from torch import Tensor

import offbeat as ob
from offbeat.core import protocol
from offbeat.core.protocol import AllReduce, Ask, Begin, Gradient, Inbox, Loop, Node, Recv, Request, Send
from offbeat.methods import ASGD, GEM, DanaZero, Downpour

BOWL = Bowl()
METHOD = DanaZero(0.01)


def simulate(
    cluster: ob.Cluster, gradients: int = 60, method: ob.Method = METHOD, problem: Any = BOWL, **more: Any
) -> ob.Run:
    return ob.simulate(method, problem, cluster, gradients=gradients, **more)


def of(run: ob.Run, worker: int) -> list[ob.Event]:
    return [event for event in run.trace if event.worker == worker]


# ---------------------------------------------------------------- determinism and counting


def test_the_same_call_gives_the_same_bits() -> None:
    cluster = ob.Cluster(5, ob.Gamma(cv=0.4, machine_cv=0.3), (ob.Crash(1, 6.0), ob.Join(1, 8.0)))
    a, b, other = (simulate(cluster, 200, method=GEM(0.01), seed=seed, evaluate_every=40) for seed in (0, 0, 1))
    assert torch.equal(a.x, b.x)
    assert a.trace == b.trace
    assert (a.seconds, a.figures, a.summary()) == (b.seconds, b.figures, b.summary())
    assert other.trace != a.trace
    assert not torch.equal(other.x, a.x)


@pytest.mark.parametrize("gradients", [1, 7, 8, 100])
@pytest.mark.parametrize("method", [METHOD, Downpour(0.01, period=3)], ids=repr)
def test_a_run_has_exactly_its_gradients(method: ob.Method, gradients: int) -> None:
    """One event for each, in order of time; no worker takes the same minibatch twice or leaves one out."""
    run = simulate(ob.Cluster(8, ob.Gamma(cv=0.5)), gradients, method)
    assert len(run.trace) == gradients == run.summary()["gradients"]
    seconds = run.trace.column("seconds").tolist()
    assert seconds == sorted(seconds)
    assert run.seconds == seconds[-1]
    for worker in range(8):
        assert [event.step for event in of(run, worker)] == list(range(len(of(run, worker))))


def test_the_simulator_changes_nothing_it_is_given() -> None:
    """Neither the problem's start nor a state that a method returned is written to."""
    x0 = BOWL.x0()
    start = x0.clone()

    class Kept(Bowl):
        def x0(self) -> Tensor:
            return x0

    simulate(ob.Cluster(3), problem=Kept())
    assert torch.equal(x0, start)


def test_what_a_run_reports() -> None:
    run = simulate(ob.Cluster(4, ob.Fixed(2.0)), 40)
    loss, lag, gap = (run.trace.column(name).double() for name in ("loss", "lag", "gap"))
    assert run.summary() == {
        "loss": BOWL.evaluate(run.x)["loss"],
        "train_loss": float(loss[-4:].mean()),
        "mean_lag": float(lag.mean()),
        "mean_gap": float(gap.mean()),
        "mean_consensus": 0.0,
        "seconds": 20.0,
        "gradients": 40.0,
        "gradients_per_second": 2.0,
        "megabytes": 40 * run.x.numel() * run.x.element_size() / 1e6,
        "crashes": 0.0,
        "lost_gradients": 0.0,
        "undone_gradients": 0.0,
        "lost_messages": 0.0,
    }
    assert run.trace[0].loss == float(BOWL.grad(BOWL.x0(), 0, 0)[1])


def test_watch_sees_every_event_as_it_happens() -> None:
    seen: list[ob.Event] = []
    run = simulate(ob.Cluster(3), 20, watch=seen.append)
    assert seen == list(run.trace)


def test_a_methods_own_figures_are_in_the_trace() -> None:
    """GEM's energies (arXiv:1805.08469 eqs. 8 to 18): the first worker's first step has exactly the proxy's."""
    run = simulate(ob.Cluster(3), 50, GEM(0.01))
    assert run.trace[0].extra["energy"] == pytest.approx(run.trace[0].extra["proxy"], rel=1e-9)
    assert set(run.trace[0].extra) == {"energy", "proxy", "clamped"} <= set(run.trace.columns)
    with pytest.raises(KeyError, match="no column 'speed'; it has seconds"):
        run.trace.column("speed")


# ---------------------------------------------------------------- evaluation


def test_an_evaluation_is_of_the_model_after_that_many_gradients() -> None:
    """What ``evaluate_every`` records after k gradients is what a run of k gradients would ship."""
    one = ob.Cluster(1, ob.Fixed())
    evaluations = simulate(one, 50, evaluate_every=10).trace.evaluations
    for k in (10, 20, 30, 40, 50):
        wanted = simulate(one, k).figures
        assert [e.figures for e in evaluations if e.gradients == k][:1] == [wanted], f"after {k} gradients"
        assert all(e.seconds == k for e in evaluations if e.gradients == k)


@pytest.mark.parametrize(
    ("every", "wanted"), [(None, [50]), (20, [20, 40, 50]), (50, [50]), (10, [10, 20, 30, 40, 50])]
)
def test_evaluations_come_as_often_as_asked_and_once_at_the_end(every: int | None, wanted: list[int]) -> None:
    run = simulate(ob.Cluster(3), 50, evaluate_every=every)
    assert [e.gradients for e in run.trace.evaluations] == wanted
    assert run.trace.evaluations[-1].figures == run.figures == BOWL.evaluate(run.x)


# ---------------------------------------------------------------- speeds


def draws(speed: ob.Speed, count: int, worker: int = 0, seed: int = 0) -> list[float]:
    return list(itertools.islice(speed.stream(seed, worker), count))


@pytest.mark.parametrize("family", [ob.Gamma, ob.LogNormal])
@pytest.mark.parametrize("cv", [0.1, 0.6])
def test_times_have_the_mean_and_spread_that_were_asked_for(family: Any, cv: float) -> None:
    """The coefficient-of-variation method (Ali et al., HCW 2000): one machine's times around its mean."""
    times = draws(family(mean=128.0, cv=cv), 40_000)
    assert statistics.mean(times) == pytest.approx(128, rel=4 * cv / 200)
    assert statistics.stdev(times) / statistics.mean(times) == pytest.approx(cv, rel=0.04)
    assert min(times) > 0


def test_gamma_times_are_gamma() -> None:
    """Shape 1 / cv^2 and scale mean cv^2: the third moment too, where the log-normal's differs."""
    for family, skewness in ((ob.Gamma, 2 * 0.6), (ob.LogNormal, 3 * 0.6 + 0.6**3)):
        times = torch.tensor(draws(family(cv=0.6), 40_000), dtype=torch.float64)
        z = (times - times.mean()) / times.std()
        assert float((z**3).mean()) == pytest.approx(skewness, rel=0.1)


@pytest.mark.parametrize("family", [ob.Gamma, ob.LogNormal])
def test_machines_have_means_of_their_own(family: Any) -> None:
    """Heterogeneous clusters: a machine's mean is drawn once, and its times spread around that."""
    means = [statistics.mean(draws(family(mean=2.0, cv=0.1, machine_cv=0.6), 20, worker)) for worker in range(3000)]
    assert statistics.mean(means) == pytest.approx(2.0, rel=0.05)
    assert statistics.stdev(means) / statistics.mean(means) == pytest.approx(0.6, rel=0.1)
    one = draws(family(mean=2.0, cv=0.1, machine_cv=0.6), 5000)
    assert statistics.stdev(one) / statistics.mean(one) == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("family", [ob.Gamma, ob.LogNormal])
def test_no_spread_means_exactly_the_mean(family: Any) -> None:
    assert draws(family(mean=3.0, cv=0.0), 5) == [3.0] * 5
    assert len(set(draws(family(cv=0.0, machine_cv=0.5), 5))) == 1


@pytest.mark.parametrize("speed", [ob.Gamma(cv=0.3), ob.LogNormal(cv=0.3)], ids=repr)
def test_times_are_a_function_of_seed_and_worker(speed: ob.Speed) -> None:
    assert draws(speed, 50) == draws(speed, 100)[:50]
    assert len({tuple(draws(speed, 5, worker, seed)) for worker in range(10) for seed in range(10)}) == 100


def test_fixed_and_recorded_times_are_kept_to() -> None:
    fixed = simulate(ob.Cluster(3, ob.Fixed((1.0, 2.0))), 20)
    assert [event.seconds for event in of(fixed, 1)] == [2.0 * (k + 1) for k in range(len(of(fixed, 1)))]
    assert [event.seconds for event in of(fixed, 2)] == [1.0 * (k + 1) for k in range(len(of(fixed, 2)))]
    recorded = simulate(ob.Cluster(3, ob.Recorded(((1.0, 2.0, 3.0), (5.0,)))), 20)
    laps = {}
    for worker in (0, 2):  # the second one repeats the first one's record, from some place on
        times = [event.seconds for event in of(recorded, worker)]
        cycles = [(1.0, 2.0, 3.0), (2.0, 3.0, 1.0), (3.0, 1.0, 2.0)]
        sums = [list(itertools.accumulate(itertools.islice(itertools.cycle(c), len(times)))) for c in cycles]
        laps[worker] = [k for k, wanted in enumerate(sums) if times == wanted]
    assert laps[0] == [0]
    assert len(laps[2]) == 1


@pytest.mark.parametrize("workers", [2, 4, 8, 32])
def test_equal_workers_are_exactly_as_many_times_faster(workers: int) -> None:
    """No server cost yet, no waiting: n workers of fixed speed take 1 / n of the virtual time."""
    alone, together = (simulate(ob.Cluster(n, ob.Fixed(0.25)), 32) for n in (1, workers))
    assert alone.seconds / together.seconds == workers


# ---------------------------------------------------------------- workers that come and go

PACE = ob.Fixed(1.0)


def test_a_crash_loses_exactly_the_gradient_in_flight() -> None:
    run = simulate(ob.Cluster(2, PACE, (ob.Crash(1, 2.5),)), 10)
    assert run.trace.incidents == [ob.Incident(2.5, 1, "crashed", 1)]
    assert [event.seconds for event in of(run, 1)] == [1.0, 2.0]
    assert [event.seconds for event in of(run, 0)] == [float(k) for k in range(1, 9)]
    assert (run.summary()["crashes"], run.summary()["lost_gradients"]) == (1, 1)


@pytest.mark.parametrize("at", [8.5, 9.5, 9.99])
def test_the_budget_is_met_when_a_worker_crashes_near_the_end(at: float) -> None:
    """The gradient that a slow worker was to deliver last is taken by one that had already come to its end."""
    run = simulate(ob.Cluster(2, ob.Fixed((1.0, 10.0)), (ob.Crash(1, at),)), 10)
    assert len(run.trace) == 10
    assert run.trace.incidents == [ob.Incident(at, 1, "crashed", 1)]
    assert len(of(run, 0)) == 10


def test_a_worker_that_had_nothing_left_to_do_loses_nothing() -> None:
    """Budget 4: worker 0 is done at 3 s, worker 1 delivers the last gradient at 10 s; a crash at 5 s takes no gradient."""
    run = simulate(ob.Cluster(2, ob.Fixed((1.0, 10.0)), (ob.Crash(0, 5.0),)), 4)
    assert len(run.trace) == 4
    assert run.seconds == 10.0
    assert run.trace.incidents == [ob.Incident(5.0, 0, "crashed", 0)]


def test_a_leave_delivers_its_gradient() -> None:
    run = simulate(ob.Cluster(2, PACE, (ob.Leave(1, 2.5),)), 10)
    assert run.trace.incidents == [ob.Incident(3.0, 1, "left", 0)]
    assert [event.seconds for event in of(run, 1)] == [1.0, 2.0, 3.0]
    assert run.summary()["crashes"] == 0


def test_a_join_gets_a_worker_that_works() -> None:
    """It starts at the present parameters, with a lag of its own reading."""
    run = simulate(ob.Cluster(1, PACE, (ob.Join(1, 2.5),)), 12)
    assert run.trace.incidents == [ob.Incident(2.5, 1, "joined", 0)]
    assert [(event.seconds, event.step, event.lag) for event in of(run, 1)][:2] == [(3.5, 0, 1), (4.5, 1, 1)]
    assert len(run.trace) == 12


def test_a_worker_that_comes_back_goes_on_with_new_minibatches() -> None:
    """No memory of before, but no minibatch twice either."""
    events = (ob.Crash(1, 2.5), ob.Join(1, 4.2), ob.Leave(1, 6.0), ob.Join(1, 9.0))
    run = simulate(ob.Cluster(2, PACE, events), 40)
    assert [i.what for i in run.trace.incidents] == ["crashed", "joined", "left", "joined"]
    steps = [event.step for event in of(run, 1)]
    assert len(steps) > 8
    assert steps == sorted(set(steps))


def test_a_worker_may_come_back_before_it_has_delivered_its_last_gradient() -> None:
    """Leave at 1 s during a gradient of 10 s, join at 5 s: a valid cluster, so it runs."""
    events = (ob.Leave(1, 1.0), ob.Join(1, 5.0))
    run = simulate(ob.Cluster(2, ob.Fixed((1.0, 10.0)), events), 30)
    assert len(run.trace) == 30


@pytest.mark.parametrize("event", [ob.Leave, ob.Crash])
def test_a_worker_that_comes_back_and_goes_again_meanwhile_is_gone(event: Callable[[int, float], Any]) -> None:
    """Leave at 1 s, join at 5 s, gone at 7 s, all during one gradient of 10 s: afterwards it takes none."""
    events = (ob.Leave(1, 1.0), ob.Join(1, 5.0), event(1, 7.0))
    run = simulate(ob.Cluster(2, ob.Fixed((1.0, 10.0)), events), 40)
    assert len(run.trace) == 40
    assert [e.seconds for e in of(run, 1)] in ([], [10.0])


def test_membership_after_the_last_gradient_does_not_happen() -> None:
    run = simulate(ob.Cluster(2, PACE, (ob.Crash(1, 100.0), ob.Join(2, 200.0))), 10)
    assert (run.trace.incidents, run.seconds) == ([], 5.0)


@pytest.mark.parametrize("event", [ob.Leave, ob.Crash])
def test_when_nobody_is_left_the_run_says_so(event: Callable[[int, float], Any]) -> None:
    with pytest.raises(ob.WorkerLost, match=r"no worker is left .* of 100 gradients were never taken") as lost:
        simulate(ob.Cluster(2, PACE, (event(0, 2.5), event(1, 4.5))), 100)
    delivered = {ob.Leave: 3 + 5, ob.Crash: 2 + 4}[event]
    assert len(lost.value.trace) == delivered
    assert f"{100 - delivered} of 100" in str(lost.value)
    assert isinstance(lost.value, ob.Failure)


def test_a_late_join_saves_a_run_that_everybody_has_left() -> None:
    run = simulate(ob.Cluster(1, PACE, (ob.Crash(0, 2.5), ob.Join(3, 10.0))), 5)
    assert [event.seconds for event in run.trace] == [1.0, 2.0, 11.0, 12.0, 13.0]


@pytest.mark.parametrize(
    "events",
    [
        (ob.Join(0, 1.0),),
        (ob.Leave(2, 1.0),),
        (ob.Crash(7, 1.0),),
        (ob.Crash(1, 1.0), ob.Crash(1, 2.0)),
        (ob.Leave(1, 1.0), ob.Crash(1, 2.0)),
        (ob.Join(2, 1.0), ob.Join(2, 2.0)),
        (ob.Leave(2, 1.0), ob.Join(2, 2.0)),
    ],
    ids=repr,
)
def test_impossible_memberships_are_refused(events: tuple[Any, ...]) -> None:
    """Named when the cluster is built, with the worker and the time."""
    with pytest.raises(ValueError, match=r"^Cluster\.events = .*: worker \d is (not )?there"):
        ob.Cluster(2, PACE, events)


def test_memberships_count_in_order_of_time_not_of_writing() -> None:
    ob.Cluster(2, PACE, (ob.Leave(2, 8.0), ob.Join(2, 5.0), ob.Join(1, 4.0), ob.Crash(1, 3.0)))


# ---------------------------------------------------------------- failures


@dataclass(frozen=True)
class Faulty(Bowl):
    """A bowl whose gradient goes wrong for worker 1 at step 3."""

    fault: str = "nan gradient"

    def grad(self, x: Tensor, worker: int, step: int) -> Any:
        g, loss = super().grad(x, worker, step)
        if (worker, step) != (1, 3):
            return g, loss
        return {
            "nan gradient": (g * math.nan, loss),
            "infinite gradient": (g / 0, loss),
            "one nan": (torch.where(torch.arange(7) == 4, math.nan, g), loss),
            "nan loss": (g, loss * math.nan),
            "wrong shape": (g[:-1], loss),
            "no vector": (g[None], loss),
            "wrong dtype": (g.float(), loss),
            "no tensor": (g.tolist(), loss),
        }[self.fault]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("nan gradient", "not finite"),
        ("infinite gradient", "not finite"),
        ("one nan", "not finite"),
        ("nan loss", "not finite"),
        ("wrong shape", r"the gradient is \(6,\) torch.float64, the parameters are \(7,\) torch.float64"),
        ("no vector", r"the gradient is \(1, 7\)"),
        ("wrong dtype", r"the gradient is \(7,\) torch.float32, the parameters are \(7,\) torch.float64"),
        ("no tensor", "the gradient is list"),
    ],
)
def test_a_bad_gradient_ends_the_run_by_name(fault: str, message: str) -> None:
    """`Diverged` says whose gradient it was and when, gives a cure, and keeps the trace."""
    with pytest.raises(ob.Diverged, match=message) as diverged:
        simulate(ob.Cluster(2, PACE), 100, problem=Faulty(fault=fault))
    error = diverged.value
    assert (error.worker, error.step, len(error.trace)) == (1, 3, 7)
    assert error.trace.incidents == [ob.Incident(4.0, 1, "diverged", 0)]
    for part in ("DanaZero", "worker 1, step 3", "4 s", "7 gradients", "; "):
        assert part in str(error)
    assert list(error.trace) == list(simulate(ob.Cluster(2, PACE), 7).trace)


def test_a_rate_that_is_too_high_is_diverged() -> None:
    with pytest.raises(ob.Diverged, match="lower the learning rate"):
        simulate(ob.Cluster(4), 5000, ASGD(50.0))


def test_large_but_finite_gradients_are_not_diverged() -> None:
    """Entries whose squares overflow are still finite."""

    class Large(Bowl):
        def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
            return torch.full_like(x, 1e30), torch.tensor(1.0)

    run = ob.simulate(ASGD(1e-35), Large(dtype=torch.float32), ob.Cluster(2), gradients=5)
    assert bool(torch.isfinite(run.x).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradients": 0}, r"gradients = 0: must be a whole number"),
        ({"gradients": -5}, r"gradients = -5"),
        ({"gradients": 1.5}, r"gradients = 1\.5"),
        ({"evaluate_every": 0}, r"evaluate_every = 0: must be at least 1"),
        ({"evaluate_every": -1}, r"evaluate_every = -1"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ob.simulate(METHOD, BOWL, ob.Cluster(2), **{"gradients": 10} | options)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ob.Cluster(0), r"Cluster\.workers = 0: must be"),
        (lambda: ob.Cluster(2.5), r"Cluster\.workers = 2\.5"),
        (lambda: ob.Cluster(True), r"Cluster\.workers = True"),
        (lambda: ob.Cluster(2, 1.0), r"Cluster\.speed = 1\.0: must be a Speed"),
        (lambda: ob.Fixed(0.0), r"Fixed\.seconds = 0\.0: must be"),
        (lambda: ob.Fixed((1.0, math.inf)), r"Fixed\.seconds = \(1\.0, inf\)"),
        (lambda: ob.Fixed(()), r"Fixed\.seconds = \(\)"),
        (lambda: ob.Gamma(mean=0.0), r"Gamma\.mean = 0\.0"),
        (lambda: ob.Gamma(cv=-1.0), r"Gamma\.cv = -1\.0"),
        (lambda: ob.LogNormal(machine_cv=math.nan), r"LogNormal\.machine_cv = nan"),
        (lambda: ob.Recorded(()), r"Recorded\.seconds = \(\)"),
        (lambda: ob.Recorded(((1.0,), ())), r"Recorded\.seconds = .*none of them empty"),
        (lambda: ob.Recorded(((1.0, -1.0),)), r"Recorded\.seconds"),
        (lambda: ob.Crash(-1, 1.0), r"Crash\.worker = -1: workers are"),
        (lambda: ob.Join(1, -0.5), r"Join\.at = -0\.5: must be"),
        (lambda: ob.Leave(1, math.nan), r"Leave\.at = nan"),
    ],
)
def test_a_bad_cluster_is_refused_by_name(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        build()


def test_a_lone_rule_wants_one_worker() -> None:
    for cluster in (ob.Cluster(2), ob.Cluster(1, PACE, (ob.Join(1, 2.0),)), None):
        with pytest.raises(ValueError, match=r"sends no messages"):
            ob.simulate(ob.Local(), BOWL, cluster, gradients=10)


# ---------------------------------------------------------------- other kinds of request


@dataclass(frozen=True)
class Talker(ob.Method):
    """A test's own kind: plain SGD on x, and ``talk``, which yields requests after each gradient and returns the next x."""

    talk: Callable[[Node, Tensor], Any] = lambda node, x: (yield Inbox())
    lr: float = 0.1

    def init(self, start: Tensor) -> Tensor:
        return start

    def params(self, w: Tensor) -> Tensor:
        return w

    def local(self, w: Tensor, g: Tensor) -> Tensor:
        return w - self.lr * g


@protocol.loop.register
def _talk(method: Talker, node: Node) -> Loop:
    while True:
        g = yield Gradient(method.params(node.state))
        x = method.local(node.state, g)
        node.state = yield from method.talk(node, x)
        node.step += 1


def ring(node: Node, x: Tensor) -> Loop:
    """Three in a ring: send to the next, wait for the one before, take the mean."""
    yield Send((node.id + 1) % 3, x)
    before = (node.id - 1) % 3
    got = yield Recv((before,))
    return (x + got.get(before, x)) / 2


def test_send_and_receive() -> None:
    """A ring in step with itself, whatever the speeds; messages of different rounds never mix."""
    run = simulate(ob.Cluster(3, ob.Fixed((1.0, 1.7, 0.3))), 60, Talker(ring))
    x = [BOWL.x0()] * 3
    for k in range(20):
        stepped = [x[i] - 0.1 * BOWL.grad(x[i], i, k)[0] for i in range(3)]
        x = [(stepped[i] + stepped[i - 1]) / 2 for i in range(3)]
    assert same(run.x, torch.stack(x).mean(0))
    assert len(run.trace) == 60
    assert [event.step for event in of(run, 2)] == list(range(20))


def test_the_dead_are_missing_from_what_is_received() -> None:
    """Who waits for a worker that crashes gets an answer without it, and goes on."""
    run = simulate(ob.Cluster(3, PACE, (ob.Crash(2, 4.5),)), 60, Talker(ring))
    assert len(run.trace) == 60
    assert bool(torch.isfinite(run.x).all())


def test_a_message_to_the_dead_is_known_not_to_arrive() -> None:
    """``Send`` answers whether the receiver is alive as far as is known."""
    answers: list[tuple[int, bool]] = []

    def talk(node: Node, x: Tensor) -> Loop:
        if node.id == 0:
            answers.append((node.step, (yield Send(1, x))))
        return x

    simulate(ob.Cluster(2, PACE, (ob.Crash(1, 4.5),)), 20, Talker(talk))
    assert answers == [(step, step < 4) for step in range(len(answers))]
    assert len(answers) == 16


def all_reduce(node: Node, x: Tensor) -> Loop:
    return (yield AllReduce(x, tuple(range(4))))


@pytest.mark.parametrize("workers", [1, 4])
def test_all_reduce_gives_the_mean(workers: int) -> None:
    """Averaging after each step is SGD with the mean gradient; everybody waits for the slowest."""
    run = simulate(ob.Cluster(workers, ob.Fixed((1.0, 0.5, 2.0, 0.1)[:workers])), 20 * workers, Talker(all_reduce))
    x = BOWL.x0()
    for k in range(20):
        x = x - 0.1 * torch.stack([BOWL.grad(x, i, k)[0] for i in range(workers)]).mean(0)
    assert same(run.x, x)
    assert run.seconds == 20 * max((1.0, 0.5, 2.0, 0.1)[:workers])


def test_all_reduce_among_some() -> None:
    """Two groups of two never wait for each other, and each is SGD on its own mean."""

    def talk(node: Node, x: Tensor) -> Loop:
        return (yield AllReduce(x, (0, 1) if node.id < 2 else (2, 3)))

    run = simulate(ob.Cluster(4, ob.Fixed((1.0, 1.0, 4.0, 4.0))), 50, Talker(talk))
    assert [len(of(run, i)) for i in range(4)] == [20, 20, 5, 5]
    ends = []
    for group, rounds in (((0, 1), 20), ((2, 3), 5)):
        x = BOWL.x0()
        for k in range(rounds):
            x = x - 0.1 * torch.stack([BOWL.grad(x, i, k)[0] for i in group]).mean(0)
        ends.append(x)
    assert same(run.x, torch.stack(ends).mean(0))


@pytest.mark.parametrize("event", [ob.Crash, ob.Leave])
@pytest.mark.parametrize("gone", [0, 1])
def test_all_reduce_goes_on_among_the_living(event: Callable[[int, float], Any], gone: int) -> None:
    """When the one that was waited for goes, or one that waits, the rest get their mean and go on."""
    run = simulate(ob.Cluster(3, ob.Fixed((1.0, 4.0, 2.0)), (event(gone, 11.0),)), 60, Talker(all_reduce))
    assert len(run.trace) == 60
    assert [i.worker for i in run.trace.incidents] == [gone]


def test_an_inbox_holds_everything_in_order_and_never_waits() -> None:
    got: list[list[tuple[int, int]]] = []

    def talk(node: Node, x: Tensor) -> Loop:
        if node.id < 2:
            yield Send(2, torch.tensor(node.step))
        else:
            got.append([(source, int(step)) for source, step in (yield Inbox())])
        return x

    simulate(ob.Cluster(3, ob.Fixed((1.0, 2.1, 5.5))), 34, Talker(talk))
    assert got[0] == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (1, 1), (0, 4)]
    for source in (0, 1):
        steps = [step for box in got for i, step in box if i == source]
        assert steps == list(range(len(steps)))


def test_a_message_that_is_the_same_object_each_time_is_still_a_message_each_time() -> None:
    """A fast sender's equal messages wait in line; each receipt takes one."""
    token = torch.ones(1)
    received = []

    def talk(node: Node, x: Tensor) -> Loop:
        if node.id == 0:
            yield Send(1, token)
        else:
            received.append((yield Recv((0,))))
        return x

    simulate(ob.Cluster(2, ob.Fixed((1.0, 3.5))), 40, Talker(talk))
    assert len(received) == 9
    assert all(got[0] is token for got in received)


def test_receive_from_nobody_is_no_wait() -> None:
    def talk(node: Node, x: Tensor) -> Loop:
        assert (yield Recv(())) == {}
        return x

    assert len(simulate(ob.Cluster(2), 10, Talker(talk)).trace) == 10


def test_a_deadlock_says_who_waits_for_whom() -> None:
    """Each waits for the next before it sends: a cycle."""

    def talk(node: Node, x: Tensor) -> Loop:
        after = (node.id + 1) % 3
        got = yield Recv((after,))
        yield Send((node.id - 1) % 3, x)
        return got[after]

    with pytest.raises(ob.Deadlock) as deadlock:
        simulate(ob.Cluster(3, PACE), 30, Talker(talk))
    for i in range(3):
        assert f"worker {i} waits for {(i + 1) % 3}" in str(deadlock.value)
    assert "27 of 30 gradients were never taken" in str(deadlock.value)
    assert len(deadlock.value.trace) == 3


def test_a_deadlock_among_reducers_says_for_whom_they_wait() -> None:
    def talk(node: Node, x: Tensor) -> Loop:
        return (yield Recv((0,)))[0] if node.id == 2 else (yield AllReduce(x, (0, 1, 2)))

    with pytest.raises(ob.Deadlock, match=r"worker 0 waits for 2\b") as deadlock:
        simulate(ob.Cluster(3, PACE), 30, Talker(talk))
    assert "worker 2 waits for 0" in str(deadlock.value)


def test_a_kind_without_a_loop_is_refused() -> None:
    class Kindless(ob.Method):
        init = params = local = lambda self, *args: args[0]

    with pytest.raises(TypeError, match="Kindless is of no kind that has a loop"):
        simulate(ob.Cluster(1), 10, Kindless())


def test_there_are_seven_requests() -> None:
    assert set(Request.__args__) == {Gradient, Begin, Ask, Send, Recv, Inbox, AllReduce}


# ---------------------------------------------------------------- traces


@pytest.fixture
def eventful() -> ob.Trace:
    events = (ob.Crash(1, 6.0), ob.Join(1, 8.0), ob.Leave(2, 9.0))
    return simulate(
        ob.Cluster(3, ob.Gamma(cv=0.4), events), 60, GEM(0.01 * ob.Warmup(5)), evaluate_every=7, seed=5
    ).trace


def test_a_trace_survives_the_disk(eventful: ob.Trace, tmp_path: Path) -> None:
    """Every bit of every float, incidents and evaluations included; the header rebuilds what was run."""
    eventful.write(tmp_path / "run.jsonl")
    back = ob.Trace.read(tmp_path / "run.jsonl")
    assert back == eventful
    assert (back.header, back.incidents, back.evaluations) == (
        eventful.header,
        eventful.incidents,
        eventful.evaluations,
    )
    assert list(back) == list(eventful)
    for name in eventful.columns:
        assert torch.equal(back.column(name), eventful.column(name))
    assert eval(back.header["method"], {**vars(ob), **vars(ob.methods)}) == GEM(0.01 * ob.Warmup(5))
    assert (back.header["seed"], back.header["gradients"], back.header["parameters"]) == (5, 60, 7)
    back.write(str(tmp_path / "again.jsonl"))
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "run.jsonl").read_bytes()


def test_what_happens_at_the_same_time_keeps_its_order_on_the_disk(tmp_path: Path) -> None:
    """Equal workers deliver, are evaluated and crash at equal times."""
    cluster = ob.Cluster(5, PACE, (ob.Crash(4, 2.5), ob.Crash(3, 2.5)))
    trace = simulate(cluster, 20, evaluate_every=2).trace
    trace.write(tmp_path / "t")
    back = ob.Trace.read(tmp_path / "t")
    assert [i.worker for i in back.incidents] == [4, 3]
    assert [e.gradients for e in back.evaluations] == [e.gradients for e in trace.evaluations]
    assert back == trace


def test_a_trace_is_a_sequence(eventful: ob.Trace) -> None:
    assert len(eventful) == 60
    assert eventful[-1] == list(eventful)[59]
    assert eventful[10:13] == [eventful[10], eventful[11], eventful[12]]
    assert eventful[0] in eventful
    with pytest.raises(IndexError):
        eventful[60]
    assert eventful.column("lag").dtype == torch.int64
    assert eventful.column("loss").dtype == torch.float64


def test_figures_that_are_not_always_there_survive_too(tmp_path: Path) -> None:
    trace = ob.Trace({"seed": 1})
    for k, extra in enumerate(({}, {"a": 1.0}, {"b": 5e-324}, {"a": 0.1, "b": -0.0})):
        trace.add(ob.Event(float(k), 0, k, 0, 0.1, 0.2, 1e300, extra=extra))
    trace.write(tmp_path / "t")
    back = ob.Trace.read(tmp_path / "t")
    assert back == trace
    assert math.isnan(back[0].extra["a"])
    assert back.column("b").tolist()[2:] == [5e-324, -0.0]


def test_figures_keep_the_order_in_which_they_came() -> None:
    """Not that of a set, which is another in every process: the same run is the same file."""
    names = ("figure", "energy", "proxy", "clamped", "weight", "distance", "angle")
    trace = ob.Trace()
    trace.add(ob.Event(0.0, 0, 0, 0, 0.1, 0.2, 0.3, extra=dict.fromkeys(names, 1.0)))
    assert trace.columns[-len(names) :] == names


def test_traces_that_differ_are_not_equal(eventful: ob.Trace, tmp_path: Path) -> None:
    eventful.write(tmp_path / "t")
    lines = (tmp_path / "t").read_text("utf-8").splitlines(keepends=True)

    def altered(change: Callable[[list[str]], Any]) -> ob.Trace:
        other = list(lines)
        change(other)
        (tmp_path / "other").write_text("".join(other), "utf-8")
        return ob.Trace.read(tmp_path / "other")

    loss = eventful[3].loss
    fourth = next(k for k, line in enumerate(lines) if str(loss) in line)
    nudged = lines[fourth].replace(str(loss), str(math.nextafter(loss, 9.0)))
    incident = next(k for k, line in enumerate(lines) if "incident" in line)
    assert altered(lambda other: None) == eventful
    assert altered(lambda other: other.__setitem__(fourth, nudged)) != eventful
    assert altered(lambda other: other.pop(incident)) != eventful
    assert altered(lambda other: other.pop()) != eventful
    assert eventful != "a trace"


BREAKS: dict[str, tuple[int, Callable[[list[str]], None]]] = {
    "cut off in the middle, and gone on with": (30, lambda lines: lines.__setitem__(29, lines[29][:20])),
    "no json": (5, lambda lines: lines.__setitem__(4, "hello")),
    "no object": (5, lambda lines: lines.__setitem__(4, "[1, 2]")),
    "a field is missing": (5, lambda lines: lines.__setitem__(4, '{"seconds": 1.0, "worker": 0}')),
    "a word for a number": (
        5,
        lambda lines: lines.__setitem__(4, lines[4].replace('"worker": ', '"worker": "x", "w": ')),
    ),
    "an empty line": (5, lambda lines: lines.__setitem__(4, "")),
    "no header": (1, lambda lines: lines.pop(0)),
    "another format": (1, lambda lines: lines.__setitem__(0, '{"format": "something else 9"}')),
    "no text": (1, lambda lines: lines.__setitem__(0, "\udcff\udcfe\x00")),
    "a bad incident": (5, lambda lines: lines.__setitem__(4, '{"incident": {"when": 3}}')),
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_file_that_is_no_trace_is_refused_by_its_line(eventful: ob.Trace, tmp_path: Path, case: str) -> None:
    """``ValueError`` with the path, the line and a cure."""
    number, spoil = BREAKS[case]
    path = tmp_path / "run.jsonl"
    eventful.write(path)
    lines = path.read_text("utf-8").splitlines()
    spoil(lines)
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=rf"run\.jsonl, line {number} is no line of .*give a file"):
        ob.Trace.read(path)


@pytest.mark.parametrize(
    ("what", "spoil"),
    [
        ("is cut", lambda lines: [*lines[:30], lines[30][:20]]),
        ("is cut", lambda lines: [*lines[:30], lines[30][:-2]]),
        ("has NUL bytes", lambda lines: [*lines[:30], b"\0" * 300]),
        ("has NUL bytes", lambda lines: [*lines[:30], lines[30][:20] + b"\0" * 300]),
        ("has NUL bytes", lambda lines: [*lines[:30], b"\0" * 300 + lines[35], *lines[36:]]),  # gone on with since
    ],
)
def test_a_trace_after_a_power_cut_is_read_up_to_its_last_whole_line(
    eventful: ob.Trace, tmp_path: Path, what: str, spoil: Callable[[list[bytes]], list[bytes]]
) -> None:
    """And says so; a file whose last line only lacks its end is whole."""
    path = tmp_path / "run.jsonl"
    eventful.write(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:30]))
    whole = ob.Trace.read(path)
    assert not whole.cut
    path.write_bytes(b"".join(lines[:30]).removesuffix(b"\n"))
    assert ob.Trace.read(path) == whole
    path.write_bytes(b"".join(spoil(lines)))
    with pytest.warns(UserWarning, match=rf"run\.jsonl: line 31 {what}.* {len(whole)} gradients before it are read"):
        trace = ob.Trace.read(path)
    assert trace == whole
    assert f"line 31 {what}" in trace.cut


def test_a_cut_header_is_refused(eventful: ob.Trace, tmp_path: Path) -> None:
    eventful.write(tmp_path / "run.jsonl")
    (tmp_path / "run.jsonl").write_bytes((tmp_path / "run.jsonl").read_bytes()[:50])
    with pytest.raises(ValueError, match=r"line 1 is no line of"):
        ob.Trace.read(tmp_path / "run.jsonl")


def test_what_is_no_finite_number_is_null_in_a_file(tmp_path: Path) -> None:
    """``NaN`` and ``Infinity`` are no JSON: other programs could not read the file."""
    trace = ob.Trace({"engine": "test", "floor": -math.inf})
    trace.add(ob.Event(0.0, 0, 0, 0, math.nan, 0.2, math.inf, extra={"norm": math.nan, "a": 1.0}))
    trace.note(ob.trace.Evaluation(1.0, 1, {"accuracy": math.nan, "loss": 2.0}))
    trace.write(tmp_path / "t")

    def refused(text: str) -> None:
        raise AssertionError(f"{text} is no JSON")

    for line in (tmp_path / "t").read_text("utf-8").splitlines():
        json.loads(line, parse_constant=refused)
    back = ob.Trace.read(tmp_path / "t")
    assert back == trace
    (event,) = back
    assert [math.isnan(value) for value in (event.gap, event.normalised_gap, event.loss)] == [True, False, True]
    assert math.isnan(event.extra["norm"])
    assert math.isnan(back.evaluations[0].figures["accuracy"])
    assert back.evaluations[0].figures["loss"] == 2.0


class Named(DanaZero):
    """Its own figures are named like a trace's own things."""

    def measure(self, s: Any, own: Any, msg: Tensor) -> dict[str, Tensor]:
        return {name: torch.tensor(99.0) for name in ("loss", "worker", "extra", "incident", "format", "norm")}


def test_a_methods_figure_named_like_a_column_does_not_replace_it(tmp_path: Path) -> None:
    run = simulate(ob.Cluster(2), 20, Named(0.01))
    run.trace.write(tmp_path / "t")
    back = ob.Trace.read(tmp_path / "t")
    assert back == run.trace
    assert list(back) == list(run.trace)
    for trace in (run.trace, back):
        assert set(trace[0].extra) == {"loss", "worker", "extra", "incident", "format", "norm"}
        assert set(trace[3].extra.values()) == {99.0}
        assert len(set(trace.columns)) == len(trace.columns)
        for name in trace.columns[len(ob.Event._fields) - 1 :]:
            assert set(trace.column(name).tolist()) == {99.0}
        assert trace.column("loss").max() < 50
        assert trace.column("worker").tolist() == [event.worker for event in run.trace]


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").touch()
    with pytest.raises(ValueError, match=r"run\.jsonl is empty"):
        ob.Trace.read(tmp_path / "run.jsonl")


def test_each_line_is_json(eventful: ob.Trace, tmp_path: Path) -> None:
    eventful.write(tmp_path / "t")
    header, *rest = [json.loads(line) for line in (tmp_path / "t").read_text("utf-8").splitlines()]
    assert header["format"] == "offbeat trace 1"
    assert len(rest) == len(eventful) + len(eventful.incidents) + len(eventful.evaluations)


# ---------------------------------------------------------------- memory


def resident() -> int:
    """Bytes of memory that the process holds; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def test_memory_is_flat() -> None:
    """64 workers, 20,000 gradients: after the first half nothing grows but the trace (about 100 bytes for an event)."""
    held: dict[int, tuple[int, int, int]] = {}

    def look(event: ob.Event) -> None:
        nonlocal seen
        seen += 1
        if seen in (10_000, 20_000):
            now = resident()
            gc.collect()
            everything = gc.get_objects()
            tensors = sum(o.numel() * o.element_size() for o in everything if type(o) is Tensor)
            held[seen] = (len(everything), tensors, now)

    seen = 0
    simulate(ob.Cluster(64, ob.Gamma(cv=0.3)), 20_000, replace(METHOD, lr=1e-4), watch=look)
    (objects, tensors, before), (objects_later, tensors_later, after) = held.values()
    assert objects_later - objects < 500
    assert abs(tensors_later - tensors) < 100_000
    assert after - before < 20_000_000  # the allocator may keep some; each vector that was kept would be 38 kB
