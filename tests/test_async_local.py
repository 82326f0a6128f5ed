"""Laws of servers whose workers take many steps on their own, or have to wait for each other: exact, in float64.

The equations stand here once more, as plain loops over the order in which workers ended their gradients, which the
trace of a simulated run tells; a worker's own descent is a ``torch.optim`` optimiser.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import differ, same
from test_peer_laws import (
    DISH,
    DROPPING,
    LR,
    MU,
    RULES,
    X0,
    ZERO,
    Descent,
    Dish,
    Lr,
    Seen,
    constant,
    dropping,
    grad,
    large_batch,
)
from torch import Tensor

import offbeat as ob
from offbeat.core.server import ParameterServer
from offbeat.engines.simulator import Simulation
from offbeat.methods import (
    ASGD,
    EAMSGD,
    EASGD,
    GEM,
    SSP,
    AllReduce,
    AsyncLocalSGD,
    BackupWorkers,
    DanaSlim,
    DanaZero,
    DelayedNesterov,
    Downpour,
    DyLU,
    FedBuff,
)

N, H = 4, 5  # workers, local steps
EVEN, UNEVEN = ob.Fixed(1.0), ob.Gamma(cv=0.4, machine_cv=0.6)
each_setting = pytest.mark.parametrize(
    ("rule", "speed"), [("nesterov", UNEVEN), ("adamw", EVEN)], ids=["nesterov-uneven", "adamw-even"]
)

Key = tuple[int, int]  # (worker, step of its own)
Points = dict[Key, Tensor]


class Record:
    """A simulated run: where each gradient was taken, in which order they ended, and the server afterwards."""

    def __init__(
        self,
        method: ob.ServerMethod,
        speed: ob.Speed = UNEVEN,
        n: int = N,
        gradients: int = 400,
        events: tuple[Any, ...] = (),
    ) -> None:
        seen = Seen()
        sim = Simulation(method, seen, ob.Cluster(n, speed, events), gradients, seed=1)  # type: ignore[arg-type]
        self.run = sim.run()
        self.at = seen.at
        self.order = [(event.worker, event.step) for event in self.run.trace]
        self.server: ParameterServer = sim.ensemble.server  # type: ignore[attr-defined]

    def walks(self, points: Points, master: Tensor) -> bool:
        """Whether every gradient was taken at these points, and the run ended at this master."""
        assert len(self.at) == len(self.order)
        wanted = torch.stack([points[key] for key in self.at])
        return same(torch.stack(list(self.at.values())), wanted) and same(self.run.x, master)


# ---------------------------------------------------------------- asynchronous local SGD

OuterStep = Callable[[Tensor, Tensor], Tensor]  # (theta, pseudo-gradient) -> theta


def sprints(order: list[Key], step: OuterStep, rule: str = "nesterov", lr: Lr = dropping) -> tuple[Points, Tensor]:
    """H inner steps from theta, buffers kept, rates by the gradients of the whole run; then one outer step."""
    theta, taken, start = X0, 0, dict.fromkeys(range(N), X0)
    workers = [Descent(rule, lr) for _ in range(N)]
    points = {(i, 0): X0 for i in range(N)}
    for i, k in order:
        me = workers[i]
        me.step(grad(me.x, i, k))
        if (k + 1) % H == 0:
            theta, taken = step(theta, start[i] - me.x), taken + H
            me.x = start[i] = theta
            me.t = taken
        points[i, k + 1] = me.x
    return points, theta


def plain(lr: float) -> OuterStep:
    return lambda theta, g: theta - lr * g


def nesterov(lr: float, momentum: float) -> OuterStep:
    """torch.optim.SGD with the pseudo-gradient for a gradient."""
    p = torch.nn.Parameter(X0.clone())
    sgd = torch.optim.SGD([p], lr=lr, momentum=momentum, nesterov=True)

    def step(theta: Tensor, g: Tensor) -> Tensor:
        p.grad = g.clone()
        sgd.step()
        return p.detach().clone()

    return step


def delayed(lr: Callable[[int], float], beta: float, n: int, c: float) -> OuterStep:
    """arXiv:2401.09135, delayed Nesterov."""
    m, delta, t = ZERO, ZERO, 0

    def step(theta: Tensor, g: Tensor) -> Tensor:
        nonlocal m, delta, t
        delta = delta + g
        if (t + 1) % n == 0:
            m = beta * m + delta / n
            theta = theta - lr(t) * ((1 - c * n + c) * beta * m + g / n)
            delta = ZERO
        else:
            theta = theta - lr(t) * (c * beta * m + g / n)
        t += 1
        return theta

    return step


def buffered(lr: float, k: int) -> OuterStep:
    """arXiv:2106.06639: the mean of every k pseudo-gradients."""
    waiting: list[Tensor] = []

    def step(theta: Tensor, g: Tensor) -> Tensor:
        waiting.append(g)
        if len(waiting) < k:
            return theta
        mean = torch.stack(waiting).mean(0)
        waiting.clear()
        return theta - lr * mean

    return step


def summed(lr: float, k: int) -> OuterStep:
    """The same as its authors' program has it: along the sum."""
    step = buffered(1.0, k)
    return lambda theta, g: theta + lr * k * (step(theta, g) - theta)


OUTERS: dict[str, tuple[Callable[..., ob.ServerMethod], Callable[[], OuterStep]]] = {
    "AsyncLocalSGD": (partial(AsyncLocalSGD, outer_lr=0.3), lambda: plain(0.3)),
    "DelayedNesterov of every visit": (
        partial(DelayedNesterov, outer_lr=0.2, outer_momentum=0.6, buffer=1),
        lambda: nesterov(0.2, 0.6),
    ),
    "DelayedNesterov": (
        partial(DelayedNesterov, outer_lr=0.8, outer_momentum=0.6, buffer=3, c=0.2),
        lambda: delayed(lambda t: 0.8, 0.6, 3, 0.2),
    ),
    "DelayedNesterov spread evenly": (
        partial(DelayedNesterov, outer_lr=0.8, outer_momentum=0.6, buffer=4, c=0.25),
        lambda: delayed(lambda t: 0.8, 0.6, 4, 0.25),
    ),
    "DelayedNesterov with a schedule": (
        partial(DelayedNesterov, outer_lr=0.8 * ob.MultiStep((21, 50), factor=0.4), outer_momentum=0.6, buffer=4),
        lambda: delayed(lambda t: 0.8 * 0.4 ** ((t >= 21) + (t >= 50)), 0.6, 4, 0.0),
    ),
    "FedBuff": (partial(FedBuff, outer_lr=0.7, buffer=3), lambda: buffered(0.7, 3)),
    "FedBuff along a sum": (partial(FedBuff, outer_lr=3 * 0.2, buffer=3), lambda: summed(0.2, 3)),
    "FedBuff of one": (partial(FedBuff, outer_lr=0.3, buffer=1), lambda: plain(0.3)),
}


@each_setting
@pytest.mark.parametrize("name", OUTERS)
def test_local_steps_and_an_outer_step(name: str, rule: str, speed: ob.Speed) -> None:
    """In round robin, and in the order of uneven workers."""
    cls, reference = OUTERS[name]
    record = Record(cls(RULES[rule][0](DROPPING), period=H), speed)
    assert (record.order == [(i, k) for k in range(100) for i in range(N)]) == (speed is EVEN)
    assert record.walks(*sprints(record.order, reference(), rule))
    assert differ(record.run.x, sprints(record.order, plain(0.31), rule)[1])


@pytest.mark.parametrize("n", [1, 3, 8])
def test_delayed_nesterov_is_nesterov_on_block_means_at_the_end_of_each_block(n: int) -> None:
    """With c = 0; inside a block it has moved along the block's own pseudo-gradients only."""
    method = DelayedNesterov(outer_lr=0.3, outer_momentum=0.7, buffer=n)
    server = ParameterServer.start(method, X0)
    server.join(0)
    step, theta = nesterov(0.3, 0.7), X0
    for block in range(400 // n):
        gs = torch.stack([torch.sin(Dish.k * (1 + block * n + j)) for j in range(n)])
        for j, g in enumerate(gs):
            server.serve(0, g)
            if j + 1 < n:
                assert same(server.x(), theta - 0.3 * gs[: j + 1].sum(0) / n)
        theta = step(theta, gs.mean(0))
        assert same(server.x(), theta)


def test_momentum_that_is_spread_is_not_momentum_at_once() -> None:
    paths = [Record(DelayedNesterov(ob.SGD(LR), period=H, buffer=4, c=c)).run.x for c in (0.0, 0.1, 0.25)]
    assert differ(paths[0], paths[1])
    assert differ(paths[1], paths[2])


def test_the_steps_of_a_crashed_worker_since_its_last_push_are_lost() -> None:
    record = Record(AsyncLocalSGD(ob.SGD(LR), period=H, outer_lr=0.3), EVEN, events=(ob.Crash(2, 7.5),), gradients=100)
    points, theta = sprints(record.order, plain(0.3), "sgd", constant)
    assert record.walks(points, theta)
    assert max(k for i, k in record.order if i == 2) == 6


@pytest.mark.parametrize(("period", "wanted"), [(12, (12, 6, 3)), (8, (8, 4, 2)), (40, (40, 20, 10))])
def test_dynamic_local_updates_follow_speed(period: int, wanted: tuple[int, ...]) -> None:
    """Gradients of 1, 2 and 4 seconds: H, H/2 and H/4 local steps, and all push at one pace."""
    method = DyLU(ob.SGD(0.01), period=period)
    record = Record(method, ob.Fixed((1.0, 2.0, 4.0)), n=3, gradients=40 * period)
    steps = [int(record.server.own[i].steps) for i in range(3)]
    assert steps == pytest.approx(wanted, abs=1)
    pushes = record.server.clock
    assert max(pushes.values()) < 1.25 * min(pushes.values())
    fixed = Record(DelayedNesterov(ob.SGD(0.01), period=period), ob.Fixed((1.0, 2.0, 4.0)), n=3, gradients=600)
    assert max(fixed.server.clock.values()) > 2 * min(fixed.server.clock.values())


def test_dynamic_local_updates_of_equal_workers_are_all_of_full_length() -> None:
    record = Record(DyLU(ob.SGD(0.01), period=8), EVEN)
    assert {int(own.steps) for own in record.server.own.values()} == {8}
    assert same(record.run.x, Record(DelayedNesterov(ob.SGD(0.01), period=8), EVEN).run.x)


def test_dynamic_local_updates_never_ask_for_none() -> None:
    record = Record(DyLU(ob.SGD(0.01), period=4), ob.Fixed((1.0, 50.0)), n=2)
    assert int(record.server.own[1].steps) == 1


# ---------------------------------------------------------------- backup workers


def first_come(order: list[Key], backups: int, rule: str, lr: Lr = constant, n: int = N) -> tuple[Points, Tensor]:
    """arXiv:1604.00981: the mean of the first n - b gradients of a round; one of an older round is refused."""
    master, number, sent = Descent(rule, lr), 0, dict.fromkeys(range(n), 0)
    points: Points = {(i, 0): X0 for i in range(n)}
    came: list[Tensor] = []
    waiting: list[Key] = []
    for i, k in order:
        if sent[i] < number:
            points[i, k + 1], sent[i] = master.x, number
            continue
        came.append(grad(points[i, k], i, k))
        waiting.append((i, k + 1))
        if len(came) == n - backups:
            master.step(torch.stack(came).mean(0))
            number += 1
            for key in waiting:
                points[key], sent[key[0]] = master.x, number
            came, waiting = [], []
    return points, master.x


@pytest.mark.parametrize("rule", ["nesterov", "adamw"])
def test_without_backups_it_is_synchronous_sgd(rule: str) -> None:
    record = Record(BackupWorkers(RULES[rule][0](DROPPING)))
    wanted = large_batch(rule, dropping)
    for (i, k), x in record.at.items():
        assert same(x, wanted[k, i])
    assert same(record.run.x, ob.simulate(AllReduce(RULES[rule][0](DROPPING)), DISH, ob.Cluster(N), gradients=400).x)


@each_setting
@pytest.mark.parametrize("backups", [0, 1, 2, 3])
def test_a_round_is_the_mean_of_the_first_gradients_to_come(backups: int, rule: str, speed: ob.Speed) -> None:
    record = Record(BackupWorkers(RULES[rule][0](DROPPING), backups=backups), speed)
    assert record.walks(*first_come(record.order, backups, rule, dropping))


def test_the_gradients_of_a_worker_that_is_always_late_never_enter() -> None:
    """Three at 1 s and one at 10.37 s, one backup: large-batch SGD of the three."""
    record = Record(BackupWorkers(RULES["nesterov"][0](LR), backups=1), ob.Fixed((1.0, 1.0, 1.0, 10.37)))
    rounds = Counter(i for i, _ in record.order)[0]
    assert Counter(i for i, _ in record.order)[3] > 8
    wanted = large_batch("nesterov", n=3, steps=rounds)
    assert all(same(record.at[i, k], wanted[k, i]) for i, k in record.at if i < 3)
    assert all(same(record.at[3, k], wanted[math.floor(10.37 * k), 0]) for i, k in record.at if i == 3)


def test_a_gradient_tagged_with_an_older_round_is_refused() -> None:
    server = ParameterServer.start(BackupWorkers(ob.SGD(1.0), backups=1), X0)
    for i in range(3):
        assert torch.equal(server.join(i), X0)
    g, late = torch.ones_like(X0), 1000 * torch.ones_like(X0)
    assert server.visit(0, g) == {}
    free = server.visit(1, 3 * g)
    assert set(free) == {0, 1}
    assert all(torch.equal(x, X0 - 2) for x in free.values())
    before = server.state
    free = server.visit(2, late)
    assert set(free) == {2}
    assert torch.equal(free[2], X0 - 2)
    assert all(torch.equal(a, b) for a, b in zip(before[2:], server.state[2:], strict=True))
    assert torch.equal(server.x(), X0 - 2)
    server.visit(2, 5 * g)  # now it is in time
    assert set(server.visit(0, g)) == {0, 2}
    assert torch.equal(server.x(), X0 - 5)


@pytest.mark.parametrize(("event", "closed"), [(ob.Crash, 10.0), (ob.Leave, 12.0)])
def test_a_worker_that_goes_in_the_middle_of_a_round_holds_nobody_up(event: Any, closed: float) -> None:
    """Three at 1 s wait since 9 s for one at 4 s, who goes at 10 s: at once, or when it has delivered."""
    speed = ob.Fixed((1.0, 1.0, 1.0, 4.0))
    record = Record(BackupWorkers(ob.SGD(LR)), speed, events=(event(3, 10.0),))
    x, points = X0, {}
    for k in range(140):
        four = k < 2 or (k == 2 and event is ob.Leave)
        points |= {(i, k): x for i in range(4 if four else 3)}
        x = x - LR * torch.stack([grad(x, i, k) for i in range(4 if four else 3)]).mean(0)
    assert all(same(x, points[key]) for key, x in record.at.items())
    assert [e.seconds for e in record.run.trace if (e.worker, e.step) == (0, 3)] == [closed + 1]
    assert len(record.order) == 400


@pytest.mark.parametrize("backups", [0, 1])
def test_a_worker_that_goes_while_it_waits_holds_nobody_up(backups: int) -> None:
    events = (ob.Crash(0, 10.0), ob.Join(7, 20.5), ob.Leave(1, 30.5), ob.Crash(2, 31.0))
    record = Record(BackupWorkers(ob.SGD(LR), backups=backups), ob.Fixed((1.0, 1.0, 1.0, 4.0)), events=events)
    assert len(record.order) == 400
    assert bool(torch.isfinite(record.run.x).all())


def test_backups_leave_at_least_one_gradient() -> None:
    for n in (1, 3):
        with pytest.raises(
            ValueError, match=rf"BackupWorkers\.backups = {n}: must be below the number of workers, {n}"
        ):
            ob.simulate(BackupWorkers(backups=n), DISH, ob.Cluster(n), gradients=10)  # type: ignore[arg-type]


# ---------------------------------------------------------------- stale-synchronous parallel


class Asgd:
    """A server and its workers as the papers print them. ``message`` is a worker's work with its k-th gradient, ``serve``
    the server's with the message, ``sent`` what the worker then gets, whenever it gets it."""

    period = 1

    def __init__(self) -> None:
        self.theta, self.x = X0, dict.fromkeys(range(N), X0)

    def work(self, i: int, g: Tensor) -> None:
        self.g = g

    def serve(self, i: int) -> None:
        self.theta = self.theta - LR * self.g

    def receive(self, i: int) -> None:
        self.x[i] = self.theta


class Zero(Asgd):
    """DANA-Zero, arXiv:1907.11612."""

    def __init__(self) -> None:
        super().__init__()
        self.v = dict.fromkeys(range(N), ZERO)

    def serve(self, i: int) -> None:
        self.v[i] = MU * self.v[i] + self.g
        self.theta = self.theta - 0.1 * LR * self.v[i]

    def receive(self, i: int) -> None:
        self.x[i] = self.theta - 0.1 * LR * MU * torch.stack(list(self.v.values())).sum(0)


class Slim(Zero):
    """DANA-Slim: the worker keeps its momentum and sends the step."""

    def serve(self, i: int) -> None:
        self.v[i] = MU * self.v[i] + self.g
        self.theta = self.theta - 0.1 * LR * (MU * self.v[i] + self.g)

    def receive(self, i: int) -> None:
        self.x[i] = self.theta


class Gem(Zero):
    """GEM, arXiv:1805.08469: s_i is the centre just before i's last visit, whenever i hears of it."""

    def __init__(self) -> None:
        super().__init__()
        self.s = dict.fromkeys(range(N), X0)

    def serve(self, i: int) -> None:
        d = -LR * self.g
        self.v[i] = MU * self.v[i] + d
        pi = (self.v[i].abs() - (self.theta - self.s[i]).abs()) / (d.abs() + 1e-12)
        self.s[i] = self.theta
        self.theta = self.theta + pi.clamp(0, 5) * d

    def receive(self, i: int) -> None:
        self.x[i] = self.theta


class Pour(Asgd):
    """Downpour: three local steps, their sum is sent."""

    period = 3

    def __init__(self) -> None:
        super().__init__()
        self.a = dict.fromkeys(range(N), ZERO)

    def work(self, i: int, g: Tensor) -> None:
        self.a[i] = self.a[i] - LR * g
        self.x[i] = self.x[i] - LR * g

    def serve(self, i: int) -> None:
        self.theta, self.a[i] = self.theta + self.a[i], ZERO


class Spring(Asgd):
    """EASGD, arXiv:1412.6651: d is what the visit moved the centre by, whenever the worker hears of it."""

    period = 2

    def __init__(self) -> None:
        super().__init__()
        self.before, self.d = dict(self.x), dict(self.x)

    def work(self, i: int, g: Tensor) -> None:
        self.before[i], self.x[i] = self.x[i], self.x[i] - LR * g

    def serve(self, i: int) -> None:
        self.d[i] = 0.8 / N * (self.before[i] - self.theta)
        self.theta = self.theta + self.d[i]

    def receive(self, i: int) -> None:
        self.x[i] = self.x[i] - self.d[i]


def bounded(order: list[Key], make: type[Asgd], bound: float) -> tuple[Points, Tensor]:
    """A worker may begin clock c once nobody is behind clock c - s, and then reads the server as it is."""
    server, clock, waiting = make(), dict.fromkeys(range(N), 0), list[Key]()
    points: Points = {(i, 0): X0 for i in range(N)}
    for i, k in order:
        server.work(i, grad(points[i, k], i, k))
        if (k + 1) % server.period:
            points[i, k + 1] = server.x[i]
            continue
        server.serve(i)
        clock[i] += 1
        waiting.append((i, k + 1))
        for j, m in list(waiting):
            if min(clock.values()) >= clock[j] - bound:
                server.receive(j)
                points[j, m] = server.x[j]
                waiting.remove((j, m))
    return points, server.theta


AROUND: dict[str, tuple[ob.ServerMethod, type[Asgd]]] = {
    "ASGD": (ASGD(LR), Asgd),
    "DanaZero": (DanaZero(0.1 * LR, momentum=MU), Zero),
    "DanaSlim": (DanaSlim(0.1 * LR, momentum=MU), Slim),
    "GEM": (GEM(LR, momentum=MU), Gem),
    "Downpour": (Downpour(LR, period=3), Pour),
    "EASGD": (EASGD(LR, beta=0.8, period=2), Spring),
}
each_inner = pytest.mark.parametrize("inner", AROUND)


@each_inner
@pytest.mark.parametrize("bound", [0, 1, 3, math.inf])
def test_a_reply_that_has_waited_is_the_server_as_it_is_when_it_goes_out(inner: str, bound: float) -> None:
    """Ho et al. 2013: a read contains all updates of clock c - s - 1 and before."""
    method, reference = AROUND[inner]
    record = Record(SSP(method, bound=bound))
    assert record.walks(*bounded(record.order, reference, bound))


def test_bound_zero_is_bulk_synchronous() -> None:
    """All gradients of a clock are taken at one point, and their sum is applied."""
    record = Record(SSP(ASGD(LR), bound=0))
    x = X0
    for k in range(100):
        for i in range(N):
            assert same(record.at[i, k], x), (i, k)
        x = x - LR * torch.stack([grad(x, i, k) for i in range(N)]).sum(0)
    assert same(record.run.x, x)


@pytest.mark.parametrize("bound", [1, 3])
def test_a_larger_bound_is_not_bulk_synchronous(bound: float) -> None:
    record = Record(SSP(ASGD(LR), bound=bound))
    assert any(not torch.equal(record.at[i, k], record.at[0, k]) for i, k in record.at if (0, k) in record.at)


@pytest.mark.parametrize(
    "method",
    [*(method for method, _ in AROUND.values()), EAMSGD(LR), AsyncLocalSGD(period=3), DelayedNesterov(period=2)],
    ids=lambda method: type(method).__name__,
)
def test_without_a_bound_it_is_the_method_itself_bit_for_bit(method: ob.ServerMethod) -> None:
    inner, outer = Record(method), Record(SSP(method, bound=math.inf))
    assert torch.equal(inner.run.x, outer.run.x)
    assert list(inner.run.trace) == list(outer.run.trace)
    assert all(torch.equal(x, outer.at[key]) for key, x in inner.at.items())


UNLIKE = (1.0, 1.375, 2.8125, 11.15625)  # seconds, exact in binary


def spreads(record: Record, period: int) -> tuple[int, int]:
    """The largest lead in clocks: at the start of a gradient that begins a clock, and at its end."""
    ends = [(event.seconds, event.worker) for event in record.run.trace]
    starts, during = [], []
    for event in record.run.trace:
        if event.step % period:
            continue
        begun = event.seconds - UNLIKE[event.worker]
        for moment, leads in ((begun, starts), (event.seconds, during)):
            steps = Counter(dict.fromkeys(range(N), 0))
            steps.update(i for seconds, i in ends if seconds <= moment)
            clocks = {i: steps[i] // period for i in range(N)}
            leads.append(
                max(clocks.values()) - min(clocks.values())
                if moment == event.seconds
                else clocks[event.worker] - min(clocks.values())
            )
    return max(starts), max(during)


@pytest.mark.parametrize("bound", [0, 1, 3])
@pytest.mark.parametrize(
    ("method", "period"),
    [(AROUND[name][0], reference.period) for name, (_, reference) in AROUND.items()],
    ids=list(AROUND),
)
def test_nobody_is_further_ahead_than_the_bound(method: ob.ServerMethod, period: int, bound: int) -> None:
    """At most s clocks when a clock begins, s + 1 while it lasts; with workers of 1 to 11 s both are reached."""
    record = Record(SSP(method, bound=bound), ob.Fixed(UNLIKE), gradients=300)
    assert spreads(record, period) == (bound, bound + 1)
    assert bool(torch.isfinite(record.run.x).all())
    free = Record(method, ob.Fixed(UNLIKE), gradients=300)
    assert min(spreads(free, period)) > bound + 1


@each_inner
def test_a_slow_worker_that_crashes_holds_nobody_up(inner: str) -> None:
    events = (ob.Crash(3, 40.0), ob.Join(3, 90.0), ob.Leave(3, 95.0))
    record = Record(SSP(AROUND[inner][0], bound=1), ob.Fixed((1.0, 1.0, 1.0, 30.0)), events=events)
    assert len(record.order) == 400
    assert record.run.seconds < 300  # at the slow one's pace it would be thousands


@pytest.mark.parametrize("event", [ob.Crash, ob.Leave])
def test_a_newcomer_starts_at_the_slowest_clock(event: Any) -> None:
    """Else it would have to catch up, and hold up everybody, or be waited for by nobody."""
    events = (event(0, 50.0), ob.Join(5, 60.0))
    record = Record(SSP(ASGD(LR), bound=0), EVEN, events=events)
    clocks = record.server.clock
    assert max(clocks.values()) - min(clocks.values()) <= 1
    assert Counter(i for i, _ in record.order)[5] > 30
    assert clocks[5] > Counter(i for i, _ in record.order)[5]
