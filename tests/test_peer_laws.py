"""Laws of methods without a server, and of servers that make workers wait: exact, in float64, after 400 gradients.

The equations stand here once more, as plain loops over all peers in step with each other; a peer's own descent is a
``torch.optim`` optimiser. The library runs on a simulated cluster whose workers have very uneven speeds; the point of
every single gradient must be the reference's.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from functools import cache, partial
from random import Random
from typing import Any

import pytest
import torch
from conftest import differ, same
from torch import Tensor

import offbeat as ob
from offbeat.core.periodic import OuterMethod
from offbeat.core.protocol import AllReduce as Reduce
from offbeat.core.protocol import Ask, Begin, Gradient, Inbox, Node, Recv, Send, loop
from offbeat.core.seeds import derive
from offbeat.core.topology import (
    Complete,
    Exponential,
    Graph,
    Mixing,
    OnePeerExponential,
    RandomMatching,
    RandomPeer,
    Ring,
    Star,
    Topology,
    Torus,
)
from offbeat.engines.simulator import Simulation
from offbeat.methods import (
    ADPSGD,
    ASGD,
    BMUF,
    DPSGD,
    EASGD,
    OSGP,
    SGP,
    SSP,
    AllReduce,
    BackupWorkers,
    DiLoCo,
    GoSGD,
    GroupSGD,
    HierarchicalSGD,
    LocalSGD,
    NesterovBMUF,
    PostLocalSGD,
    PullGossip,
    PushGossip,
    SlowMo,
    SlowMoNoAverage,
    SyncPullGossip,
    SyncPushGossip,
)

X0 = torch.linspace(-1, 1, 7, dtype=torch.float64) + 0.15
ZERO = torch.zeros(7, dtype=torch.float64)
N, STEPS, TAU = 4, 100, 5  # peers, steps of each, steps in a block
LR, MU, WD = 0.05, 0.9, 0.02
UNEVEN = ob.Gamma(cv=0.5, machine_cv=0.5)  # for those that wait for each other
FAIR = ob.Gamma(cv=0.5)

Lr = Callable[[int], float]
Outer = Callable[[Tensor, float], Tensor]  # (models of all peers [n, d], the block's rate) -> where all go on


# ---------------------------------------------------------------- the library's side


class Dish:
    """A coupled, wavy bowl; each worker has an optimum of its own, and each of its minibatches another."""

    k = torch.arange(1, 8, dtype=torch.float64)
    hessian = torch.diag(torch.logspace(0, -1, 7, dtype=torch.float64)) + torch.outer(k.sin(), k.sin()) / 5
    worker, step = (
        torch.arange(size, dtype=torch.float64).view(shape) for size, shape in ((24, (-1, 1, 1)), (1200, (-1, 1)))
    )
    pull = 2 + torch.cos(k * (worker + 1)) / 2 + 0.4 * torch.sin(k * (0.7 + 1.3 * step + 2.9 * worker))
    loss = torch.zeros((), dtype=torch.float64)

    def x0(self) -> Tensor:
        return X0

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        return self.hessian @ x + 0.2 * torch.sin(3 * x) - self.pull[worker, step], self.loss

    def evaluate(self, x: Tensor) -> dict[str, float]:
        return {"norm": float(x.norm())}

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class Seen(Dish):
    """Remembers where each worker's gradients were taken."""

    def __init__(self) -> None:
        self.at: dict[tuple[int, int], Tensor] = {}

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        assert (worker, step) not in self.at
        self.at[worker, step] = x.clone()
        return super().grad(x, worker, step)


DISH = Dish()


@cache
def path(
    method: ob.Method,
    n: int = N,
    steps: int = STEPS,
    seed: int = 1,
    speed: ob.Speed = UNEVEN,
    problem: type[Seen] = Seen,
) -> Tensor:
    """Where the first gradients of each of ``n`` simulated workers were taken. [steps, n, d]"""
    seen, more = problem(), 12 if speed is UNEVEN else 24  # steps that the fast may be ahead
    ob.simulate(method, seen, ob.Cluster(n, speed), gradients=n * (steps + more), seed=seed)
    return torch.stack([torch.stack([seen.at[i, t] for i in range(n)]) for t in range(steps)])


# ---------------------------------------------------------------- references: descent


def constant(t: int) -> float:
    return LR


def dropping(t: int) -> float:
    """Changes once inside a block and once between two."""
    return 0.05 * 0.3 ** ((t >= 32) + (t >= 65))


DROPPING = 0.05 * ob.MultiStep((32, 65), factor=0.3)
RATES = [pytest.param(LR, constant, id="constant"), pytest.param(DROPPING, dropping, id="dropping")]
each_rate = pytest.mark.parametrize(("rate", "lr"), RATES)

Torch = Callable[..., torch.optim.Optimizer]
RULES: dict[str, tuple[Callable[[Any], ob.Rule], Torch]] = {
    "sgd": (ob.SGD, torch.optim.SGD),
    "heavy ball": (partial(ob.SGD, momentum=MU), partial(torch.optim.SGD, momentum=MU)),
    "nesterov": (
        partial(ob.SGD, momentum=MU, nesterov=True, weight_decay=WD),
        partial(torch.optim.SGD, momentum=MU, nesterov=True, weight_decay=WD),
    ),
    "adam": (partial(ob.Adam, betas=(0.8, 0.95)), partial(torch.optim.Adam, betas=(0.8, 0.95))),
    "adamw": (
        partial(ob.AdamW, betas=(0.8, 0.95), weight_decay=0.1),
        partial(torch.optim.AdamW, betas=(0.8, 0.95), weight_decay=0.1),
    ),
}
BUFFERING = ("maintain", "reset", "average")
each_buffering = pytest.mark.parametrize("buffering", BUFFERING)


class Descent:
    """A ``torch.optim`` optimiser over one model [d], or over all peers' at once [n, d]: it works elementwise."""

    def __init__(self, rule: str, lr: Lr, x: Tensor = X0) -> None:
        self.p = torch.nn.Parameter(x.clone())
        self.optimiser = RULES[rule][1]([self.p], lr=1.0)
        self.lr, self.t = lr, 0

    @property
    def x(self) -> Tensor:
        return self.p.detach().clone()

    @x.setter
    def x(self, x: Tensor) -> None:
        self.p.data = x.clone()

    def step(self, g: Tensor) -> None:
        self.optimiser.param_groups[0]["lr"] = self.lr(self.t)
        self.p.grad = g.clone()
        self.optimiser.step()
        self.t += 1

    def rebuffer(self, buffering: str) -> None:
        """Line 2 of SlowMo's algorithm 1."""
        state = self.optimiser.state[self.p]
        if buffering == "reset":
            state.clear()
        elif buffering == "average":
            for name in ("momentum_buffer", "exp_avg", "exp_avg_sq"):
                if state.get(name) is not None and state[name].dim() == 2:
                    state[name].copy_(state[name].mean(0).expand_as(state[name]))


def grad(x: Tensor, i: int, t: int) -> Tensor:
    return DISH.grad(x, i, t)[0]


def grads(x: Tensor, t: int) -> Tensor:
    """The gradient of each peer at its own model [n, d]."""
    return x @ Dish.hessian + 0.2 * torch.sin(3 * x) - Dish.pull[: len(x), t]


@cache
def large_batch(rule: str, lr: Lr = constant, n: int = N, steps: int = STEPS) -> Tensor:
    """One worker with the mean of ``n`` gradients at one point. [steps, n, d]"""
    one, points = Descent(rule, lr), []
    for t in range(steps):
        points.append(one.x.expand(n, -1))
        one.step(grads(points[-1], t).mean(0))
    return torch.stack(points)


# ---------------------------------------------------------------- references: averages after blocks


def mean_rate(lr: Lr, begin: int, end: int) -> float:
    """The mean rate of the steps of a block."""
    return sum(lr(t) for t in range(begin, end)) / (end - begin)


def blocks(
    rule: str,
    outer: Outer,
    lr: Lr = constant,
    buffering: str = "maintain",
    n: int = N,
    steps: int = STEPS,
    ends: Callable[[int], bool] = lambda t: t % TAU == 0,
) -> Tensor:
    """Local steps; where a block ``ends`` (after t steps) all go on from ``outer`` of all models. [steps, n, d]"""
    peers, points = Descent(rule, lr, X0.repeat(n, 1)), []
    began = 0
    for t in range(steps):
        points.append(peers.x)
        peers.step(grads(peers.x, t))
        if ends(t + 1):
            peers.x = outer(peers.x, mean_rate(lr, began, t + 1)).repeat(n, 1)
            peers.rebuffer(buffering)
            began = t + 1
    return torch.stack(points)


def average(models: Tensor, gamma: float) -> Tensor:
    return models.mean(0)


def slowmo(alpha: float, beta: float) -> Outer:
    """arXiv:1910.00643, algorithm 1, lines 6 to 8; a block at rate 0 has moved nobody."""
    x0, u = X0, ZERO

    def outer(models: Tensor, gamma: float) -> Tensor:
        nonlocal x0, u
        u = beta * u + ((x0 - models.mean(0)) / gamma if gamma else ZERO)
        x0 = x0 - alpha * gamma * u
        return x0

    return outer


def bmuf(block_lr: float, momentum: float, nesterov: bool = False) -> Outer:
    """fairseq: S <- BM S + lr (G - mean W);  W <- G - S;  Nesterov: W <- W - BM S;  G <- W."""
    g, s = X0, ZERO

    def outer(models: Tensor, gamma: float) -> Tensor:
        nonlocal g, s
        s = momentum * s + block_lr * (g - models.mean(0))
        g = g - s - (momentum * s if nesterov else 0)
        return g

    return outer


def cntk(eta: float, zeta: float, nesterov: bool = False) -> Outer:
    """CNTK: Delta <- SUM over workers of (W_prev - W_i);  S <- eta S + (1 - eta) zeta Delta;  W <- W_prev - S."""
    w, s = X0, ZERO

    def outer(models: Tensor, gamma: float) -> Tensor:
        nonlocal w, s
        s = eta * s + (1 - eta) * zeta * (w - models).sum(0)
        w = w - s
        if nesterov:
            w = w - eta * s
        return w

    return outer


def optimiser(make: Torch, rate: Lr = constant) -> Outer:
    """A ``torch.optim`` optimiser takes the mean of what the peers moved for a gradient; ``rate`` counts averages."""
    p, t = torch.nn.Parameter(X0.clone()), itertools.count()
    outer_optimiser = make([p], lr=1.0)

    def outer(models: Tensor, gamma: float) -> Tensor:
        outer_optimiser.param_groups[0]["lr"] = rate(next(t))
        p.grad = p.detach() - models.mean(0)
        outer_optimiser.step()
        return p.detach().clone()

    return outer


NESTEROV = partial(torch.optim.SGD, momentum=0.6, nesterov=True)
OUTERS: dict[str, tuple[Callable[..., ob.Method], Callable[[], Outer]]] = {
    "LocalSGD": (LocalSGD, lambda: average),
    "SlowMo as Local SGD": (partial(SlowMo, alpha=1.0, beta=0.0), lambda: average),
    "SlowMo": (partial(SlowMo, alpha=0.8, beta=0.5), partial(slowmo, 0.8, 0.5)),
    "BMUF": (partial(BMUF, block_lr=0.9, block_momentum=0.6), partial(bmuf, 0.9, 0.6)),
    "BMUF of CNTK": (partial(BMUF, block_lr=(1 - 0.6) * 0.4 * N, block_momentum=0.6), partial(cntk, 0.6, 0.4)),
    "BMUF at the pace of n": (partial(BMUF, block_lr=0.7, block_momentum=1 - 1 / N), partial(cntk, 1 - 1 / N, 0.7)),
    "NesterovBMUF": (partial(NesterovBMUF, block_lr=0.8, block_momentum=0.5), partial(bmuf, 0.8, 0.5, nesterov=True)),
    "NesterovBMUF of CNTK": (
        partial(NesterovBMUF, block_lr=0.5 * 0.3 * N, block_momentum=0.5),
        partial(cntk, 0.5, 0.3, nesterov=True),
    ),
    "DiLoCo": (
        partial(DiLoCo, outer_lr=0.7, outer_momentum=0.6),
        lambda: optimiser(NESTEROV, lambda k: 0.7),
    ),
    "DiLoCo with a schedule": (
        partial(DiLoCo, outer_lr=0.7 * ob.MultiStep((6, 14), factor=0.5), outer_momentum=0.6),
        lambda: optimiser(NESTEROV, lambda k: 0.7 * 0.5 ** ((k >= 6) + (k >= 14))),
    ),
    "DiLoCo as Local SGD": (partial(DiLoCo, outer_lr=1.0, outer_momentum=0.0), lambda: average),
}


def library(name: str, rule: str, rate: Any = LR, buffering: str = "maintain") -> ob.Method:
    return OUTERS[name][0](ob.Local(RULES[rule][0](rate)), period=TAU, buffering=buffering)


@pytest.mark.parametrize(
    ("name", "rule"),
    [*((name, "nesterov") for name in OUTERS), *((name, "adamw") for name in ("LocalSGD", "SlowMo", "BMUF", "DiLoCo"))],
)
def test_an_outer_step_walks_its_papers_equations(name: str, rule: str) -> None:
    """Also where the inner rate changes in the middle of a block."""
    wanted = blocks(rule, OUTERS[name][1](), dropping)
    assert same(path(library(name, rule, DROPPING)), wanted)
    assert differ(wanted, blocks(rule, lambda models, gamma: models[0], dropping))


@each_buffering
@pytest.mark.parametrize("rule", ["heavy ball", "adam"])
@pytest.mark.parametrize("name", ["LocalSGD", "SlowMo as Local SGD", "SlowMo"])
def test_buffers_are_kept_emptied_or_averaged(name: str, rule: str, buffering: str) -> None:
    """``average`` with Local SGD is double averaging (Yu et al. 2019)."""
    assert same(path(library(name, rule, buffering=buffering)), blocks(rule, OUTERS[name][1](), buffering=buffering))


@pytest.mark.parametrize("rule", ["heavy ball", "nesterov", "adam", "adamw"])
def test_what_becomes_of_buffers_matters(rule: str) -> None:
    paths = [path(library("LocalSGD", rule, buffering=buffering), steps=50) for buffering in BUFFERING]
    for a, b in itertools.combinations(paths, 2):
        assert differ(a, b)


def test_slowmo_empties_buffers_unless_told_otherwise() -> None:
    assert SlowMo().buffering == "reset"
    assert {LocalSGD().buffering, DiLoCo().buffering, BMUF().buffering} == {"maintain"}


@pytest.mark.parametrize("name", OUTERS)
def test_the_run_ends_at_the_last_average(name: str) -> None:
    method = library(name, "nesterov")
    run = ob.simulate(method, DISH, ob.Cluster(N, UNEVEN), gradients=N * 40)
    assert same(run.x, blocks("nesterov", OUTERS[name][1](), steps=41)[40, 0])


# ---------------------------------------------------------------- SlowMo's special cases


@each_buffering
@each_rate
def test_slowmo_after_every_step_is_large_batch_heavy_ball(rate: Any, lr: Lr, buffering: str) -> None:
    """arXiv:1910.00643: base SGD, tau = 1, alpha = 1; also across changes of the rate."""
    method = SlowMo(ob.Local(ob.SGD(rate)), alpha=1.0, beta=MU, period=1, buffering=buffering)
    assert same(path(method), large_batch("heavy ball", lr))


def test_only_slowmo_keeps_its_momentum_across_changes_of_the_rate() -> None:
    wanted = large_batch("heavy ball", dropping)
    local = ob.Local(ob.SGD(DROPPING))
    walked = path(BMUF(local, block_lr=1.0, block_momentum=MU, period=1))
    assert same(walked[:33], wanted[:33])
    assert differ(walked[33:], wanted[33:])
    assert differ(path(SlowMo(local, alpha=0.9, beta=MU, period=1)), wanted)


@pytest.mark.parametrize(
    ("rule", "buffering"), [("heavy ball", "reset"), ("nesterov", "maintain"), ("adam", "maintain")]
)
def test_slowmo_of_one_worker_without_momentum_is_lookahead(rule: str, buffering: str) -> None:
    """arXiv:1907.08610: k fast steps, then slow <- slow + alpha (fast - slow), and fast starts again from there."""
    fast, slow, points = Descent(rule, constant), X0, []
    for t in range(400):
        points.append(fast.x[None])
        fast.step(grad(fast.x, 0, t))
        if (t + 1) % TAU == 0:
            slow = slow + 0.5 * (fast.x - slow)
            fast.x = slow
            fast.rebuffer(buffering)
    wanted = torch.stack(points)
    method = SlowMo(ob.Local(RULES[rule][0](LR)), alpha=0.5, beta=0.0, period=TAU, buffering=buffering)
    assert same(path(method, n=1, steps=400), wanted)
    assert differ(path(dataclasses.replace(method, alpha=1.0), n=1, steps=50), wanted[:50])


@pytest.mark.parametrize("rule", ["nesterov", "adam"])
def test_slowmo_is_bmuf_while_the_rate_is_constant(rule: str) -> None:
    """Also DiLoCo with a heavy-ball outer optimiser; and none of these once the rate has changed."""
    heavy = partial(torch.optim.SGD, momentum=0.5)
    for lr, rate in ((constant, LR), (dropping, DROPPING)):
        slow = path(library("SlowMo", rule, rate))
        for outer in (bmuf(0.8, 0.5), optimiser(heavy, lambda k: 0.8)):
            other = blocks(rule, outer, lr)
            first = 35  # the end of the first block whose mean rate is not that of the one before
            assert same(slow[:first], other[:first])
            assert same(slow, other) if lr is constant else differ(slow[first:], other[first:])


def test_the_library_says_the_same_of_slowmo_and_bmuf() -> None:
    method = BMUF(ob.Local(ob.SGD(DROPPING, momentum=MU)), block_lr=0.8, block_momentum=0.5, period=TAU)
    slow = SlowMo(method.inner, alpha=0.8, beta=0.5, period=TAU, buffering="maintain")
    assert same(path(slow)[:35], path(method)[:35])
    assert differ(path(slow)[35:], path(method)[35:])


def vanishing(t: int) -> float:
    """0 for two blocks at the start and two in the middle."""
    return 0.0 if t < 10 or 50 <= t < 60 else LR


def at_zero(then: ob.Schedule) -> ob.Schedule:
    return ob.Sequence(ob.Constant(0.0), 10, then)


VANISHING = LR * at_zero(ob.Sequence(ob.Constant(1.0), 40, at_zero(ob.Constant(1.0))))


@pytest.mark.parametrize("cls", [SlowMo, SlowMoNoAverage])
def test_slowmo_at_rate_zero_divides_by_nothing(cls: type[SlowMo]) -> None:
    """A block at rate 0 moves nobody, and adds nothing to u, which decays."""
    method = cls(ob.Local(ob.SGD(VANISHING, momentum=MU)), alpha=0.8, beta=0.5, period=TAU)
    walked = path(method, n=1)
    assert torch.equal(walked[:11], X0.expand(11, 1, -1))
    assert torch.equal(walked[50:61], walked[50].expand(11, 1, -1))
    assert same(walked, blocks("heavy ball", slowmo(0.8, 0.5), vanishing, "reset", n=1))


def test_slowmo_uses_the_mean_rate_of_a_block() -> None:
    """At every step another rate: their mean is in both places of the slow step, and not the first or the last."""

    def falling(t: int) -> float:
        return 0.08 * 0.5 * (1 + math.cos(math.pi * t / 130))

    slow = path(SlowMo(ob.Local(ob.SGD(0.08 * ob.Cosine(130))), alpha=0.8, beta=0.5, period=TAU))
    assert same(slow, blocks("sgd", slowmo(0.8, 0.5), falling))
    for which in (-TAU, -1):
        other, rates = slowmo(0.8, 0.5), (falling(TAU * k + which) for k in itertools.count(1))
        assert differ(slow, blocks("sgd", lambda models, _, f=other, r=rates: f(models, next(r)), falling))  # type: ignore[misc]


@pytest.mark.parametrize("first", [1, 3, 50])
def test_a_warm_up_does_not_inflate_slow_momentum(first: int) -> None:
    """u is in units of a gradient: after a block it is TAU times a weighted mean of the block's gradients."""
    method = SlowMo(ob.Local(ob.SGD(LR * ob.Warmup(first))), alpha=1.0, beta=0.5, period=TAU)
    walked = path(method, steps=TAU)
    largest = max(float(grads(walked[t], t).mean(0).norm()) for t in range(TAU))
    u = slow_states(method, gradients=2 * N * TAU)[0][1].u
    assert 0 < float(u.norm()) <= TAU * largest


# ---------------------------------------------------------------- SlowMo's state


def slow_states(method: ob.Method, n: int = N, gradients: int = 200) -> dict[int, list[Any]]:
    """Each peer's slow state after each slow step, in a run with uneven speeds."""
    sim = Simulation(method, DISH, ob.Cluster(n, UNEVEN), gradients, seed=1)
    found: dict[int, list[Any]] = defaultdict(list)
    step = sim.clock.step

    def stepped() -> bool:
        going = step()
        for name, worker in sim.workers.items():
            slow = worker.node.state.slow
            if not found[name] or slow is not found[name][-1]:
                found[name].append(slow)
        return going

    sim.clock.step = stepped  # type: ignore[method-assign]
    sim.run()
    return found


BASES: dict[str, Any] = {
    "Local SGD": ob.Local(ob.SGD(LR, momentum=MU, nesterov=True)),
    "Local Adam": ob.Local(ob.Adam(LR)),
    "SGP": SGP(ob.SGD(LR, momentum=MU, nesterov=True)),
    "OSGP": OSGP(ob.SGD(LR, momentum=MU, nesterov=True)),
    "DPSGD": DPSGD(ob.SGD(LR, momentum=MU, nesterov=True)),
    "AllReduce": AllReduce(ob.SGD(LR, momentum=MU, nesterov=True)),
    "GroupSGD": GroupSGD(ob.Local(ob.SGD(LR)), period=1, size=2),
}


@pytest.mark.parametrize("base", BASES)
def test_slow_momentum_and_start_are_the_same_bits_at_all_peers(base: str) -> None:
    found = slow_states(SlowMo(BASES[base], beta=0.5, period=TAU, buffering="average"))
    assert len(found) == N
    assert {len(states) for states in found.values()} == {200 // (N * TAU) + 1}
    for states in zip(*found.values(), strict=True):
        for other in states[1:]:
            assert torch.equal(other.x, states[0].x)
            assert torch.equal(other.u, states[0].u)


@pytest.mark.parametrize("base", ["Local SGD", "SGP", "OSGP"])
def test_without_the_average_slow_states_differ(base: str) -> None:
    found = slow_states(SlowMoNoAverage(BASES[base], beta=0.5, period=TAU))
    for states in list(zip(*found.values(), strict=False))[1:]:
        for a, b in itertools.combinations(states, 2):
            assert not torch.equal(a.x, b.x)
            assert not torch.equal(a.u, b.u)


# ---------------------------------------------------------------- references: gossip


Matrix = Callable[[int], Tensor]  # the weights W[to, from] of a round


def shift(k: int, n: int = N) -> Tensor:
    """One-peer exponential: half stays, half goes 1, 2, 1, 2, ... places on (of 4)."""
    eye = torch.eye(n, dtype=torch.float64)
    return 0.5 * eye + 0.5 * eye.roll(2 ** (k % 2), 0)


def ring(k: int, n: int = N) -> Tensor:
    eye = torch.eye(n, dtype=torch.float64)
    return (eye + eye.roll(1, 0) + eye.roll(-1, 0)) / 3


UNFAIR = torch.tensor(  # columns sum to 1, rows do not
    [[0.4, 0.1, 0.0, 0.3], [0.3, 0.6, 0.2, 0.0], [0.0, 0.3, 0.7, 0.0], [0.3, 0.0, 0.1, 0.7]], dtype=torch.float64
)
UNFAIR_TOPOLOGY = Mixing(tuple(map(tuple, UNFAIR.tolist())))


def unfair(k: int) -> Tensor:
    return UNFAIR


def random_peer(k: int, n: int = N, seed: int = 1) -> Tensor:
    """Half stays, half goes to the one that the topology draws."""
    w = 0.5 * torch.eye(n, dtype=torch.float64)
    for i, (j,) in RandomPeer().edges(n, k, seed).items():
        w[j, i] += 0.5
    return w


@cache
def push_sum(
    rule: str,
    matrix: Matrix,
    lr: Lr = constant,
    *,
    late: bool = False,
    period: int = 1,
    outers: tuple[Outer, ...] = (),
    buffering: str = "maintain",
    n: int = N,
    steps: int = STEPS,
) -> Tensor:
    """SGP, arXiv:1811.10792, and (``late``) overlap SGP, whose messages are picked up a round later. [steps, n, d]

    With ``outers``, after every TAU steps an outer step: of the exact average if there is one outer, and else of each
    peer's z, at the weight that it has.
    """
    peers, points = Descent(rule, lr, X0.repeat(n, 1)), []
    x, w = X0.repeat(n, 1), torch.ones(n, 1, dtype=torch.float64)
    way = torch.zeros_like(x), torch.zeros_like(w)
    for t in range(steps):
        z = x / w
        points.append(z)
        peers.x = z
        peers.step(grads(z, t))
        x = x + (peers.x - z)
        if (t + 1) % period == 0:
            p = matrix(t // period)
            keep, away = p.diagonal()[:, None], p - p.diagonal().diag()
            if late:
                x, w = x + way[0], w + way[1]
            way = away @ x, away @ w
            x, w = keep * x, keep * w
            if not late:
                x, w = x + way[0], w + way[1]
        if outers and (t + 1) % TAU == 0:
            if late:
                x, w = x + way[0], w + way[1]
                way = torch.zeros_like(x), torch.zeros_like(w)
            gamma = mean_rate(lr, t + 1 - TAU, t + 1)
            if len(outers) == 1:
                assert abs(float(w.sum()) - n) < 1e-9
                x = outers[0](x.sum(0, keepdim=True) / w.sum(), gamma).repeat(n, 1)
                w = torch.ones_like(w)
            else:
                x = w * torch.stack([outer(z[None], gamma) for outer, z in zip(outers, x / w, strict=True)])
            peers.rebuffer(buffering)
    return torch.stack(points)


@cache
def mix(
    rule: str,
    blend: Callable[[int, Tensor], Tensor],
    lr: Lr = constant,
    *,
    period: int = 1,
    outer: Outer | None = None,
    buffering: str = "maintain",
    n: int = N,
    steps: int = STEPS,
) -> Tensor:
    """All take a step, then models [n, d] are blended, as in D-PSGD (arXiv:1705.09056): x_i <- sum_j W_ij x_j."""
    peers, points = Descent(rule, lr, X0.repeat(n, 1)), []
    for t in range(steps):
        points.append(peers.x)
        peers.step(grads(peers.x, t))
        if (t + 1) % period == 0:
            peers.x = blend(t // period, peers.x)
        if outer and (t + 1) % TAU == 0:
            peers.x = outer(peers.x, mean_rate(lr, t + 1 - TAU, t + 1)).repeat(n, 1)
            peers.rebuffer(buffering)
    return torch.stack(points)


def by(matrix: Matrix) -> Callable[[int, Tensor], Tensor]:
    return lambda k, models: matrix(k) @ models


GRAPHS: dict[str, tuple[Topology, Matrix]] = {
    "one peer": (OnePeerExponential(), shift),
    "ring": (Ring(), ring),
    "unfair": (UNFAIR_TOPOLOGY, unfair),
    "random": (RandomPeer(), random_peer),
}


@pytest.mark.parametrize(("graph", "period"), [*((graph, 1) for graph in GRAPHS), ("unfair", 3), ("random", 3)])
@pytest.mark.parametrize("cls", [SGP, OSGP])
def test_stochastic_gradient_push(cls: type[SGP], graph: str, period: int) -> None:
    topology, matrix = GRAPHS[graph]
    wanted = push_sum("nesterov", matrix, dropping, late=cls is OSGP, period=period)
    method = cls(RULES["nesterov"][0](DROPPING), topology=topology, period=period)
    assert same(path(method), wanted)
    assert differ(wanted, push_sum("nesterov", matrix, dropping, late=cls is SGP, period=period))


class Penalised(Seen):
    """With a penalty on the parameters in its loss."""

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        g, loss = super().grad(x, worker, step)
        return g + WD * x, loss


@pytest.mark.parametrize("cls", [SGP, OSGP])
def test_weight_decay_of_push_sum_is_a_penalty_in_the_loss(cls: type[SGP]) -> None:
    """At z, where the gradient is taken: also while the weight of overlap SGP is far from 1."""
    decaying, plain = (cls(ob.SGD(LR, momentum=MU, weight_decay=wd)) for wd in (WD, 0.0))
    walked = path(decaying)
    assert same(walked, path(plain, problem=Penalised))
    assert differ(walked, path(plain))


@pytest.mark.parametrize("rule", ["adamw", "heavy ball"])
def test_stochastic_gradient_push_of_other_rules(rule: str) -> None:
    assert same(path(SGP(RULES[rule][0](LR), topology=UNFAIR_TOPOLOGY)), push_sum(rule, unfair))


@pytest.mark.parametrize("graph", ["one peer", "ring"])
def test_push_sum_on_doubly_stochastic_rounds_is_plain_mixing(graph: str) -> None:
    topology, matrix = GRAPHS[graph]
    walked = path(SGP(RULES["nesterov"][0](LR), topology=topology))
    assert same(walked, mix("nesterov", by(matrix)))
    assert same(walked, path(DPSGD(RULES["nesterov"][0](LR), topology=topology)))
    unbalanced = path(SGP(RULES["nesterov"][0](LR), topology=UNFAIR_TOPOLOGY))
    assert differ(unbalanced, mix("nesterov", by(unfair)))


@pytest.mark.parametrize("topology", [OnePeerExponential(), Exponential(), Ring()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_weights_stay_one_on_regular_graphs(topology: Topology, n: int) -> None:
    """To rounding, where shares such as 1/3 do not sum to 1 exactly; OSGP's are away while they are under way."""
    engine = Engine(SGP(ob.SGD(LR), topology=topology), n, seed=2)
    for _ in range(400):
        engine.tick()
        for i, node in enumerate(engine.nodes):
            if isinstance(engine.asked[i], Gradient):
                assert float(node.state.weight) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("rule", ["nesterov", "adamw"])
@pytest.mark.parametrize("period", [1, 3])
def test_d_psgd(rule: str, period: int) -> None:
    wanted = mix(rule, by(ring), dropping, period=period)
    assert same(path(DPSGD(RULES[rule][0](DROPPING), period=period)), wanted)
    assert differ(wanted, mix(rule, by(shift), dropping, period=period))


@pytest.mark.parametrize("rule", ["sgd", "heavy ball", "nesterov"])
def test_d_psgd_on_the_complete_graph_is_large_batch_sgd(rule: str) -> None:
    """With momentum at each peer too, as it is linear: the buffers' mean is the large batch's."""
    wanted = large_batch(rule, dropping)
    assert same(path(DPSGD(RULES[rule][0](DROPPING), topology=Complete())), wanted)
    assert differ(path(DPSGD(RULES[rule][0](DROPPING), topology=Star()), steps=50), wanted[:50])


def test_adam_at_each_peer_is_not_large_batch_adam() -> None:
    assert differ(path(DPSGD(ob.Adam(LR, betas=(0.8, 0.95)), topology=Complete())), large_batch("adam"))
    assert same(path(AllReduce(ob.Adam(LR, betas=(0.8, 0.95)))), large_batch("adam"))


def pull(k: int, models: Tensor, n: int = N, seed: int = 1) -> Tensor:
    drawn = RandomPeer().edges(n, k, seed)
    return torch.stack([0.5 * (models[i] + models[drawn[i][0]]) for i in range(n)])


def push(k: int, models: Tensor, n: int = N, seed: int = 1) -> Tensor:
    got: dict[int, list[Tensor]] = {i: [models[i]] for i in range(n)}
    for i, (j,) in RandomPeer().edges(n, k, seed).items():
        got[j].append(models[i])
    return torch.stack([torch.stack(got[i]).mean(0) for i in range(n)])


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize(("cls", "blend"), [(SyncPullGossip, pull), (SyncPushGossip, push)])
def test_gossip_in_rounds(cls: Any, blend: Any, period: int) -> None:
    method = cls(RULES["nesterov"][0](DROPPING), period=period)
    wanted = mix("nesterov", blend, dropping, period=period)
    assert same(path(method), wanted)
    assert differ(path(method, steps=40, seed=2), wanted[:40])
    other = push if blend is pull else pull
    assert differ(wanted, mix("nesterov", other, dropping, period=period))


# ---------------------------------------------------------------- SlowMo over each base


def synchronous(rule: str, outer: Outer, lr: Lr, buffering: str, steps: int = STEPS) -> Tensor:
    """Large-batch descent with an outer step after every TAU steps."""
    one, points = Descent(rule, lr), []
    for t in range(steps):
        points.append(one.x.expand(N, -1))
        one.step(grads(points[-1], t).mean(0))
        if (t + 1) % TAU == 0:
            one.x = outer(one.x[None], mean_rate(lr, t + 1 - TAU, t + 1))
            one.rebuffer(buffering)
    return torch.stack(points)


def on_base(base: str, outer: Callable[[], Outer], lr: Lr, buffering: str) -> Tensor:
    """The hand-written path of a base of BASES with an outer step after every TAU steps."""
    if base.startswith("Local"):
        return blocks({"Local SGD": "nesterov", "Local Adam": "adam"}[base], outer(), lr, buffering)
    if base == "DPSGD":
        return mix("nesterov", by(ring), lr, outer=outer(), buffering=buffering)
    if base == "AllReduce":
        return synchronous("nesterov", outer(), lr, buffering)
    matrix = unfair if "unfair" in base else shift
    return push_sum("nesterov", matrix, lr, late="OSGP" in base, outers=(outer(),), buffering=buffering)


def base_of(base: str, rate: Any) -> Any:
    rule = RULES["adam" if base == "Local Adam" else "nesterov"][0](rate)
    kinds: dict[str, Callable[[ob.Rule], Any]] = {
        "Local SGD": ob.Local,
        "Local Adam": ob.Local,
        "SGP": SGP,
        "OSGP": OSGP,
        "SGP unfair": partial(SGP, topology=UNFAIR_TOPOLOGY),
        "OSGP unfair": partial(OSGP, topology=UNFAIR_TOPOLOGY),
        "DPSGD": DPSGD,
        "AllReduce": AllReduce,
    }
    return kinds[base](rule)


SOUND = ("Local SGD", "Local Adam", "SGP", "OSGP", "SGP unfair", "OSGP unfair", "DPSGD", "AllReduce")


@pytest.mark.parametrize("base", SOUND)
def test_slowmo_without_slow_momentum_is_the_base_and_exact_averages(base: str) -> None:
    inner, buffering = base_of(base, LR), "reset"
    walked = path(SlowMo(inner, alpha=1.0, beta=0.0, period=TAU, buffering=buffering))
    assert same(walked, path(LocalSGD(inner, period=TAU, buffering=buffering)))
    assert same(walked, on_base(base, lambda: average, constant, buffering))


@pytest.mark.parametrize("base", SOUND)
def test_slowmo_over_each_base(base: str) -> None:
    buffering = "average"
    walked = path(SlowMo(base_of(base, DROPPING), alpha=0.8, beta=0.5, period=TAU, buffering=buffering))
    assert same(walked, on_base(base, partial(slowmo, 0.8, 0.5), dropping, buffering))
    assert differ(walked, on_base(base, lambda: average, dropping, buffering))


@pytest.mark.parametrize("cls", [SGP, OSGP])
def test_slowmo_over_gossip_at_every_other_step(cls: type[SGP]) -> None:
    """Blocks of five steps, rounds of two: a block may end between two rounds, with mass under way or not."""
    outers = (slowmo(0.8, 0.5),)
    wanted = push_sum("nesterov", unfair, dropping, late=cls is OSGP, period=2, outers=outers, buffering="reset")
    inner = cls(RULES["nesterov"][0](DROPPING), topology=UNFAIR_TOPOLOGY, period=2)
    assert same(path(SlowMo(inner, alpha=0.8, beta=0.5, period=TAU)), wanted)


@pytest.mark.parametrize("base", ["SGP", "OSGP", "SGP unfair"])
def test_an_exact_average_changes_a_gossip_base(base: str) -> None:
    inner = base_of(base, LR)
    assert differ(path(LocalSGD(inner, period=TAU), steps=30), path(inner, steps=30))


@pytest.mark.parametrize("base", ["Local SGD", "SGP", "OSGP", "SGP unfair"])
def test_slowmo_without_the_average(base: str) -> None:
    """arXiv:1910.00643, SGP-SlowMo-noaverage: line 6 is left out, each peer has its own u and x_0."""
    matrix = {"Local SGD": lambda k: torch.eye(N, dtype=torch.float64), "SGP unfair": unfair}.get(base, shift)
    outers = tuple(slowmo(0.8, 0.5) for _ in range(N))
    wanted = push_sum("nesterov", matrix, dropping, late=base == "OSGP", outers=outers, buffering="reset")
    method = SlowMoNoAverage(base_of(base, DROPPING), alpha=0.8, beta=0.5, period=TAU)
    assert same(path(method, speed=FAIR), wanted)
    assert differ(wanted, on_base(base, partial(slowmo, 0.8, 0.5), dropping, "reset"))


def test_an_outer_step_around_slowmo_finds_nothing_to_average() -> None:
    inner = SlowMo(base_of("Local SGD", LR), alpha=0.8, beta=0.5, period=TAU, buffering="maintain")
    assert same(path(LocalSGD(inner, period=3)), blocks("nesterov", slowmo(0.8, 0.5)))


OUTER_METHODS = [cls for cls in ob.methods.all_methods() if issubclass(cls, OuterMethod)]


@pytest.mark.parametrize("cls", OUTER_METHODS, ids=lambda cls: cls.__name__)
def test_an_unsound_base_is_refused_with_the_reason(cls: type[OuterMethod]) -> None:
    """Of a method whose messages may be under way no exact average can be taken; a server's workers have none."""
    for base in (PushGossip(), PullGossip(), ADPSGD(), GoSGD()):
        with pytest.raises(
            TypeError, match=rf"^{cls.__name__}\.inner = {type(base).__name__}\(.*the mean would not be"
        ):
            cls(base)
    for server in (ASGD(), EASGD(), SSP(), BackupWorkers()):
        with pytest.raises(TypeError, match=rf"^{cls.__name__}\.inner = {type(server).__name__}\(.*must be a Local"):
            cls(server)


# ---------------------------------------------------------------- all-reduce, post-local, hierarchical


@pytest.mark.parametrize("rule", RULES)
def test_all_reduce_is_one_worker_with_the_mean_gradient(rule: str) -> None:
    assert same(path(AllReduce(RULES[rule][0](DROPPING))), large_batch(rule, dropping))


@pytest.mark.parametrize("n", [1, 2, 7])
def test_all_reduce_of_any_number(n: int) -> None:
    steps = 400 // n
    assert same(path(AllReduce(RULES["nesterov"][0](LR)), n, steps), large_batch("nesterov", n=n, steps=steps))


def test_all_reduce_of_momentum_steps() -> None:
    """arXiv:1611.04581: Delta_i <- -eta g_i + mu Delta(before);  Delta <- mean_i Delta_i;  theta <- theta + Delta."""
    theta, delta, points = X0, ZERO, []
    for t in range(STEPS):
        points.append(theta)
        delta = torch.stack([-LR * grad(theta, i, t) + MU * delta for i in range(N)]).mean(0)
        theta = theta + delta
    wanted = torch.stack(points)[:, None].expand(STEPS, N, -1)
    assert same(path(AllReduce(ob.SGD(LR, momentum=MU))), wanted)


@pytest.mark.parametrize("start", [0, 1, 23, 60])
def test_post_local_sgd(start: int) -> None:
    """Averaged after every step of the first ``start``, then every TAU steps from there."""

    def ends(t: int) -> bool:
        return t <= start or (t - start) % TAU == 0

    method = PostLocalSGD(ob.Local(RULES["nesterov"][0](DROPPING)), start=start, period=TAU)
    assert same(path(method), blocks("nesterov", average, dropping, ends=ends))


@pytest.mark.parametrize(("rule", "equal"), [("nesterov", True), ("adam", False)])
def test_the_first_phase_of_post_local_sgd_is_large_batch_sgd(rule: str, equal: bool) -> None:
    """Momentum stays at the peer, and is linear; Adam is not."""
    walked = path(PostLocalSGD(ob.Local(RULES[rule][0](LR)), start=10**6))
    assert (same if equal else differ)(walked, large_batch(rule))


@cache
def nested(rule: str, levels: tuple[tuple[int, int], ...], n: int, lr: Lr = constant, steps: int = 60) -> Tensor:
    """After every so many steps, groups of so many neighbours take their mean; inner levels first. [steps, n, d]"""
    peers, points = Descent(rule, lr, X0.repeat(n, 1)), []
    for t in range(1, steps + 1):
        points.append(peers.x)
        peers.step(grads(peers.x, t - 1))
        for every, size in levels:
            if t % every == 0:
                groups = peers.x.split(size)
                peers.x = torch.cat([group.mean(0).expand_as(group) for group in groups])
    return torch.stack(points)


@pytest.mark.parametrize("n", [1, 4, 5, 7])
def test_groups_average_among_themselves(n: int) -> None:
    """A group at the end may be smaller; groups never hear of each other."""
    method = GroupSGD(ob.Local(RULES["nesterov"][0](DROPPING)), period=3, size=2)
    walked = path(method, n, 60, speed=FAIR)
    assert same(walked, nested("nesterov", ((3, 2),), n, dropping))
    assert n < 3 or differ(walked, nested("nesterov", ((3, n),), n, dropping))


@pytest.mark.parametrize("n", [4, 5, 7])
def test_groups_inside_groups(n: int) -> None:
    local = ob.Local(RULES["nesterov"][0](DROPPING))
    two = HierarchicalSGD(GroupSGD(local, period=3, size=2), period=2)
    assert same(path(two, n, 60), nested("nesterov", ((3, 2), (6, n)), n, dropping))
    three = HierarchicalSGD(GroupSGD(GroupSGD(local, period=2, size=2), period=2, size=4), period=3)
    assert same(path(three, n, 60), nested("nesterov", ((2, 2), (4, 4), (12, n)), n, dropping))


def test_slowmo_around_groups() -> None:
    """The slow step is of the mean over all peers, whatever happened inside."""
    method = SlowMo(GroupSGD(ob.Local(ob.SGD(LR)), period=2, size=2), alpha=0.8, beta=0.5, period=2)
    x, outer, points = X0.repeat(N, 1), slowmo(0.8, 0.5), []
    for t in range(STEPS):
        points.append(x)
        x = x - LR * grads(x, t)
        if t % 2:
            x = x.view(2, 2, -1).mean(1).repeat_interleave(2, 0)
        if t % 4 == 3:
            x = outer(x, LR).repeat(N, 1)
    assert same(path(method), torch.stack(points))


# ---------------------------------------------------------------- an engine that tries every order


def mean_of(messages: list[Any]) -> Any:
    if isinstance(messages[0], Tensor):
        return torch.stack(messages).mean(0)
    return tuple(mean_of(list(parts)) for parts in zip(*messages, strict=True))


class Engine:
    """Lets nodes go on in random order: a message or an answer is under way for as long as chance will have it."""

    def __init__(self, method: ob.Method, n: int, seed: int, problem: Dish = DISH) -> None:
        self.method, self.problem, self.rng = method, problem, Random(seed)
        members = tuple(range(n))
        self.nodes = [Node(i, method, method.init(X0), seed=seed, view=lambda step: members) for i in members]
        self.loops = [loop(method, node) for node in self.nodes]
        self.asked: list[Any] = [next(life) for life in self.loops]
        self.mail: list[list[tuple[int, int | None, Any]]] = [[] for _ in members]  # under way to each
        self.answers: dict[int, Any] = {}  # under way back to each
        self.taken = Counter[int]()
        self.sent = Counter[int]()
        self.crossed = 0  # visits to a node that was itself on a visit

    def can_go_on(self, i: int) -> bool:
        asked = self.asked[i]
        if isinstance(asked, Recv):
            return set(asked.sources) <= {source for source, round, _ in self.mail[i] if round == asked.round}
        return not isinstance(asked, Reduce) or all(isinstance(self.asked[j], Reduce) for j in asked.members)

    def tick(self) -> tuple[int, Tensor | None]:
        """Let one node go on that can; who it was, and the gradient if it took one."""
        i = self.rng.choice([i for i in range(len(self.nodes)) if self.can_go_on(i)])
        match self.asked[i]:
            case Gradient(x=x):
                g, _ = self.problem.grad(x, i, self.taken[i])
                self.taken[i] += 1
                self.go_on(i, g)
                return i, g
            case Begin():
                self.go_on(i, None)
            case Ask(to=to, msg=msg) if i not in self.answers:
                self.crossed += to in self.answers
                self.nodes[to].state, self.answers[i] = self.method.meet(self.nodes[to].state, msg)  # type: ignore[attr-defined]
            case Ask():
                self.go_on(i, self.answers.pop(i))
            case Recv(sources, round):
                due = {(source, round) for source in sources}
                here = [letter for letter in self.mail[i] if letter[:2] in due]
                self.mail[i] = [letter for letter in self.mail[i] if letter[:2] not in due]
                assert len(here) == len(due), "one message of a round from each source"
                self.go_on(i, {source: msg for source, _, msg in here})
            case Inbox():
                arrived = self.rng.randint(0, len(self.mail[i]))
                here, self.mail[i] = self.mail[i][:arrived], self.mail[i][arrived:]
                self.go_on(i, [(source, msg) for source, _, msg in here])
            case Reduce(members=members):
                messages = [self.asked[j].msg for j in members]
                self.reducing(messages)
                for j in members:
                    self.go_on(j, mean_of(messages))
        return i, None

    def go_on(self, i: int, answer: Any) -> None:
        self.asked[i] = self.loops[i].send(answer)
        while isinstance(self.asked[i], Send):
            to, msg, round = self.asked[i]
            self.mail[to].append((i, round, msg))
            self.sent[i] += 1
            self.asked[i] = self.loops[i].send(True)

    def reducing(self, messages: list[Any]) -> None:
        """All of ``messages`` are about to be averaged."""

    def letters(self) -> list[Any]:
        return [msg for box in self.mail for *_, msg in box]


def close(a: Tensor | float, b: Tensor | float) -> bool:
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return float((a - b).norm()) <= 1e-9 * max(1.0, float(b.norm()))


CONNECTED: dict[str, Callable[[int], Topology]] = {
    "complete": lambda n: Complete(),
    "ring": lambda n: Ring(),
    "exponential": lambda n: Exponential(),
    "one peer": lambda n: OnePeerExponential(),
    "torus": lambda n: Torus(),
    "star": lambda n: Star(),
    "graph": lambda n: Graph(tuple(itertools.pairwise(range(n)))),
    "matching": lambda n: RandomMatching(),
    "random peer": lambda n: RandomPeer(),
    "unfair": lambda n: UNFAIR_TOPOLOGY,
}


@pytest.mark.parametrize("topology", CONNECTED)
@pytest.mark.parametrize("cls", [SGP, OSGP])
def test_push_sum_conserves_mass(cls: type[SGP], topology: str) -> None:
    """At every moment, in any order, mass under way counted: weights sum to n, and x to n x_0 less all steps taken."""
    n = 4 if topology == "unfair" else 6
    engine = Engine(cls(ob.SGD(LR), topology=CONNECTED[topology](n)), n, seed=3)
    total, away = n * X0, 0
    while sum(engine.taken.values()) < 150:
        _, g = engine.tick()
        if g is not None:
            total = total - LR * g
        letters = engine.letters()
        away += bool(letters)
        assert close(sum(node.state.weight for node in engine.nodes) + sum(w for _, w in letters), n)
        assert close(sum(node.state.x for node in engine.nodes) + sum(x for x, _ in letters), total)
    assert away > 50


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("probability", [0.3, 1.0])
def test_go_sgd_conserves_mass(probability: float, period: int) -> None:
    """Weights sum to n; the weighted sum of models moves only by the weighted steps."""
    n = 5
    engine = Engine(GoSGD(ob.SGD(LR), probability=probability, period=period), n, seed=4)
    total, away = n * X0, 0
    while sum(engine.taken.values()) < 400:
        weights = [float(node.state.weight) for node in engine.nodes]
        i, g = engine.tick()
        if g is not None:
            total = total - LR * weights[i] * g
        letters = engine.letters()
        away += bool(letters)
        assert close(sum(node.state.weight for node in engine.nodes) + sum(w for _, w in letters), n)
        models = sum(node.state.weight * node.state.x for node in engine.nodes) + sum(w * x for x, w in letters)
        assert close(models, total)
    assert away > 50
    share = sum(engine.sent.values()) / 400
    assert abs(share - probability / period) < 0.1


@pytest.mark.parametrize("topology", ["complete", "ring", "star", "random peer"])
def test_visits_in_pairs_conserve_the_mean(topology: str) -> None:
    """AD-PSGD: also while an answer is under way to a visitor that is itself visited, or steps, meanwhile."""
    n = 5
    engine = Engine(ADPSGD(ob.SGD(LR), topology=CONNECTED[topology](n)), n, seed=5)
    total = n * X0
    while sum(engine.taken.values()) < 400:
        _, g = engine.tick()
        if g is not None:
            total = total - LR * g
        assert close(sum(node.state.x for node in engine.nodes) + sum(engine.answers.values()), total)
    assert engine.crossed > 50


def test_a_gradient_is_applied_where_visits_during_it_have_led() -> None:
    """AD-PSGD, arXiv:1710.06952: x_i <- (x_i + x_j) / 2 - eta g(x_i as it was), with momentum and weight decay at the average."""
    method = ADPSGD(ob.SGD(LR, momentum=MU, weight_decay=WD), topology=Complete())
    nodes = [Node(i, method, method.init(x), view=lambda step: (0, 1)) for i, x in enumerate((X0, 2 * X0 + 1))]
    life = loop(method, nodes[0])
    assert torch.equal(next(life).x, X0)  # type: ignore[union-attr]
    to, msg = life.send(None)  # type: ignore[misc]
    assert to == 1
    nodes[1].state, reply = method.meet(nodes[1].state, msg)
    request = life.send(reply)
    middle = (X0 + 2 * X0 + 1) / 2
    assert close(nodes[0].state.x, middle)
    assert isinstance(request, Gradient)
    assert torch.equal(request.x, X0)
    nodes[0].state, _ = method.meet(nodes[0].state, -X0)  # while the gradient is computed
    now, g = (middle - X0) / 2, DISH.grad(X0, 0, 0)[0]
    assert isinstance(life.send(g), Begin)
    assert close(nodes[0].state.x, now - LR * (g + WD * now))


def test_a_visitor_may_be_visited_on_its_way() -> None:
    """0 visits 1; before it is back, 2 visits 0: nothing of either visit is lost."""
    method = ADPSGD(ob.SGD(1.0), topology=Graph(((0, 1), (0, 2))))
    a, b, c = (method.init(x) for x in (X0, 2 * X0 + 1, -X0))
    b, home = method.meet(b, method.offer(a))
    a, other = method.meet(a, method.offer(c))
    a, c = method.settle(a, home), method.settle(c, other)
    assert close(a.x + b.x + c.x, X0 + (2 * X0 + 1) - X0)
    assert close(b.x, (X0 + 2 * X0 + 1) / 2)
    assert close(c.x, (X0 - X0) / 2)
    assert close(a.x, (X0 - X0) / 2 + ((2 * X0 + 1) - X0) / 2)


@pytest.mark.parametrize("topology", ["one peer", "ring", "random peer"])
@pytest.mark.parametrize("outer", [LocalSGD, SlowMo], ids=lambda cls: cls.__name__)
def test_nothing_is_under_way_when_the_exact_average_is_taken(outer: Any, topology: str) -> None:
    """Overlap SGP is flushed first: the mean of the shares stands for all mass there is."""
    n, reductions = 6, []

    class Watched(Engine):
        def reducing(self, messages: list[Any]) -> None:
            assert not self.letters()
            x, w = (torch.stack([message[0][part] for message in messages]).sum(0) for part in (0, 1))
            assert close(w, n)
            assert close(x, total)
            reductions.append(w)

    engine = Watched(outer(OSGP(ob.SGD(LR), topology=CONNECTED[topology](n)), period=4), n, seed=6)
    total, away = n * X0, 0
    while sum(engine.taken.values()) < 400:
        before = len(reductions)
        _, g = engine.tick()
        away += bool(engine.letters())
        if g is not None:
            total = total - LR * g
        if len(reductions) > before:
            total = sum(node.state.inner.x for node in engine.nodes)
            assert {float(node.state.inner.weight) for node in engine.nodes} == {1.0}
    assert len(reductions) >= 15
    assert away > 50


# ---------------------------------------------------------------- mixing alone


class Scatter(Seen):
    """The first gradient takes each peer to a place of its own; all others are 0."""

    @staticmethod
    def place(worker: int) -> Tensor:
        return X0 - torch.sin(torch.arange(7, dtype=torch.float64) * (worker + 1.3))

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        super().grad(x, worker, step)
        g = X0 - self.place(worker) if step == 0 else torch.zeros_like(x)
        return g, torch.zeros((), dtype=torch.float64)


JUMP = ob.SGD(1.0)


def scattered(method: ob.Method, n: int = N, steps: int = 25, speed: ob.Speed = UNEVEN) -> tuple[Tensor, Tensor]:
    """Places [n, d], and the path: mixing alone from step 1 on, the first mix included there."""
    return torch.stack([Scatter.place(i) for i in range(n)]), path(method, n, steps, speed=speed, problem=Scatter)


@pytest.mark.parametrize("topology", [t for t in CONNECTED if t not in ("random peer", "unfair")])
@pytest.mark.parametrize("cls", [DPSGD, SGP])
def test_mixing_conserves_the_mean(cls: Any, topology: str) -> None:
    n = 6
    graph = CONNECTED[topology](n)
    places, walked = scattered(cls(JUMP, topology=graph), n)
    models = places
    for t in range(1, 25):
        models = graph.matrix(n, t - 1, seed=1) @ models
        assert close(walked[t], models)
        assert close(walked[t].mean(0), places.mean(0))


@pytest.mark.parametrize("n", [2, 4, 8, 16])
@pytest.mark.parametrize("cls", [DPSGD, SGP, OSGP])
def test_one_peer_at_a_time_reaches_the_exact_mean_in_log2_n_rounds(cls: Any, n: int) -> None:
    """With overlap one round later, which is the messages' delay."""
    places, walked = scattered(cls(JUMP, topology=OnePeerExponential()), n, steps=8)
    rounds = n.bit_length() - 1 + (cls is OSGP)
    for t in range(8):
        assert torch.allclose(walked[t], places.mean(0), rtol=0, atol=1e-14) == (t >= rounds)


GOSSIP = [cls for cls in ob.methods.all_methods() if issubclass(cls, ob.GossipMethod)]
each_gossip = pytest.mark.parametrize("cls", GOSSIP, ids=lambda cls: cls.__name__)


@each_gossip
def test_consensus_is_a_fixed_point(cls: type[ob.GossipMethod]) -> None:
    class Still(Seen):
        def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
            _, loss = super().grad(x, worker, step)
            return torch.zeros_like(x), loss

    walked = path(cls(JUMP), 5, 30, speed=FAIR, problem=Still)
    assert torch.allclose(walked, X0.expand_as(walked), rtol=0, atol=1e-14)


@each_gossip
def test_values_stay_between_those_of_the_peers(cls: type[ob.GossipMethod]) -> None:
    """Every coordinate is in the hull of where the peers began; in the end all agree on a point inside.

    AD-PSGD applies its first gradient where visits have led, so that a peer begins at that point and its step.
    """
    places, walked = scattered(cls(JUMP), 5, steps=45, speed=FAIR)
    begun = [*places, X0, *(walked[: 2 * N].reshape(-1, len(X0)) if cls is ADPSGD else ())]
    low, high = (getattr(torch.stack(begun), end)(0).values[None] for end in ("min", "max"))
    assert bool((walked >= low.min(0).values - 1e-12).all())
    assert bool((walked <= high.max(0).values + 1e-12).all())
    assert float((walked[-1] - walked[-1].mean(0)).norm()) < 1e-3 * float((places - places.mean(0)).norm())


@pytest.mark.parametrize(
    ("cls", "conserved"),
    [(PullGossip, False), (PushGossip, False), (SyncPullGossip, False), (SyncPushGossip, False), (ADPSGD, True)],
)
def test_one_sided_gossip_does_not_conserve_the_mean(cls: Any, conserved: bool) -> None:
    places, walked = scattered(cls(JUMP), 5, speed=FAIR)
    assert close(walked[24].mean(0), places.mean(0)) == conserved
    assert conserved or differ(walked[24].mean(0), places.mean(0))


@pytest.mark.parametrize("cls", [SyncPullGossip, SyncPushGossip])
def test_one_sided_gossip_conserves_the_mean_in_expectation(cls: Any) -> None:
    """Over many seeds the mean after one round is the mean before it to within sampling error; of one seed it is not."""
    places = torch.stack([Scatter.place(i) for i in range(N)])
    means = torch.stack([one_round(cls(), places, seed).mean(0) for seed in range(300)])
    spread = means.std(0) / 300**0.5
    assert bool(((means.mean(0) - places.mean(0)).abs() <= 4.5 * spread + 1e-12).all())
    assert sum(differ(mean, places.mean(0)) for mean in means) > 200


def one_round(method: Any, models: Tensor, seed: int) -> Tensor:
    """One round by the handlers, all peers in step."""
    states = [method.init(x) for x in models]
    rows = []
    for i, into in method.topology.round(tuple(range(len(models))), 0, seed).into.items():
        others = {j: weight for j, weight in into.items() if j != i}
        rows.append(method.merge(states[i], {j: states[j].x for j in others}, others, into[i]).x)
    return torch.stack(rows)


# ---------------------------------------------------------------- gossip that never waits


def drawn(i: int, k: int, n: int = N, seed: int = 1) -> int:
    return RandomPeer().edges(n, k, seed)[i][0]


def wander(
    kind: str, order: list[tuple[int, int]], rule: str, lr: Lr, period: int
) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
    """Where gradients are taken when peers end theirs in this order of (peer, step), each exchange atomic; and the mean
    model at the end. A visit is made at the start of a gradient, which is applied to what has become of the peer by its end;
    a push goes out at the end of one, and what has come in is merged before the next."""
    peers, weight, box = [Descent(rule, lr) for _ in range(N)], [1.0] * N, [deque[Any]() for _ in range(N)]
    at = {(i, 0): X0 for i in range(N)}  # where visits of first steps change nothing
    for taken, (i, k) in enumerate(order):
        me = peers[i]
        me.step(grad(at[i, k], i, k))
        if (k + 1) % period == 0 and kind == "push":
            box[drawn(i, k)].append((me.x, 0.0))
        if (k + 1) % period == 0 and kind == "go" and derive(1, i, k, 1) / 2**63 < 0.6:
            weight[i] /= 2
            box[drawn(i, k)].append((me.x, weight[i]))
        while box[i]:  # arXiv:1611.04581, 1611.09726
            x, w = box[i].popleft()
            me.x = (weight[i] * me.x + w * x) / (weight[i] + w) if kind == "go" else (me.x + x) / 2
            weight[i] += w
        at[i, k + 1] = me.x
        if (
            (k + 2) % period == 0 and kind in ("pull", "pair") and taken + N < len(order)
        ):  # else there is no next gradient
            other = peers[drawn(i, k + 1)]
            middle = (me.x + other.x) / 2
            me.x = middle
            if kind == "pair":  # arXiv:1710.06952
                other.x = middle
    return at, torch.stack([peer.x for peer in peers]).mean(0)


@pytest.mark.parametrize(("rule", "period"), [("nesterov", 1), ("adamw", 3)])
@pytest.mark.parametrize(
    ("kind", "cls"),
    [("pull", PullGossip), ("push", PushGossip), ("pair", ADPSGD), ("go", partial(GoSGD, probability=0.6))],
    ids=["PullGossip", "PushGossip", "ADPSGD", "GoSGD"],
)
def test_gossip_without_waiting(kind: str, cls: Any, rule: str, period: int) -> None:
    """In the order that the trace tells, with the topology's own draws."""
    seen, method = Seen(), cls(RULES[rule][0](DROPPING), period=period)
    run = ob.simulate(method, seen, ob.Cluster(N, UNEVEN), gradients=400, seed=1)
    wanted, mean = wander(kind, [(event.worker, event.step) for event in run.trace], rule, dropping, period)
    assert len(seen.at) == 400
    assert same(torch.stack(list(seen.at.values())), torch.stack([wanted[key] for key in seen.at]))
    assert same(run.x, mean)


@each_gossip
def test_the_seed_decides_and_nothing_else(cls: type[ob.GossipMethod]) -> None:
    """At equal speeds the cluster draws nothing: another seed matters exactly where the topology is random."""
    method = cls(ob.SGD(LR, momentum=MU))
    runs = [ob.simulate(method, DISH, ob.Cluster(6, ob.Fixed(1.0)), gradients=60, seed=seed) for seed in (3, 3, 4)]
    assert torch.equal(runs[0].x, runs[1].x)
    assert runs[0].trace == runs[1].trace
    assert torch.equal(runs[0].x, runs[2].x) == bool(method.topology.cycle(6))


# ---------------------------------------------------------------- the consensus in the trace


def consensus(method: ob.Method, events: tuple[Any, ...] = ()) -> tuple[Tensor, Tensor]:
    """The trace's column, and the RMSE of the peers' models to their mean just before each gradient took effect."""
    sim = Simulation(method, DISH, ob.Cluster(N, UNEVEN, events), 200, seed=1)  # type: ignore[arg-type]
    step, wanted = sim.clock.step, []

    def stepped() -> bool:
        models = torch.stack([method.params(worker.node.state) for worker in sim.workers.values()])
        events = len(sim.trace)
        going = step()
        if len(sim.trace) > events:
            wanted.append((models - models.mean(0)).square().mean().sqrt())
        return going

    sim.clock.step = stepped  # type: ignore[method-assign]
    return sim.run().trace.column("consensus"), torch.stack(wanted)


@pytest.mark.parametrize(
    "method",
    [LocalSGD(period=TAU), DPSGD(), SGP(), OSGP(), PushGossip(), ADPSGD(), GoSGD(), SlowMo(OSGP(), period=TAU)],
    ids=lambda method: type(method).__name__,
)
def test_consensus_is_the_distance_of_the_peers_from_their_mean(method: ob.Method) -> None:
    found, wanted = consensus(method)
    assert found.shape == wanted.shape == (200,)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)  # a difference of squares
    assert float(wanted.max()) > 0.05


@pytest.mark.parametrize("method", [LocalSGD(period=TAU), SGP(), ADPSGD()], ids=lambda method: type(method).__name__)
def test_consensus_is_that_of_those_who_are_there(method: ob.Method) -> None:
    events = (ob.Crash(1, 5.1), ob.Join(7, 8.2), ob.Leave(0, 11.3), ob.Join(1, 14.7))
    found, wanted = consensus(method, events)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6)


def test_consensus_of_all_reduce_is_zero() -> None:
    found, wanted = consensus(AllReduce())
    assert float(wanted.max()) < 1e-15
    assert float(found.max()) < 1e-6
