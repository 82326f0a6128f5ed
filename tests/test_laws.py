"""Laws: what the papers' equations say exactly, in float64, after 400 gradients.

The equations stand here once more, as plain loops over an order of workers, as each paper prints them. A library method
must walk the same path: served by hand in a random order, and simulated, where the trace tells the order.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from conftest import Bowl, by_turns, differ, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import offbeat as ob
from offbeat.core.master import Correction, Master, Stale, Uncorrected
from offbeat.core.server import ParameterServer
from offbeat.methods import (
    ASGD,
    DCASGD,
    EAMSGD,
    EASGD,
    GEM,
    LWP,
    NAGASGD,
    AdaptiveDelayCompensation,
    AppliedGapPenalty,
    AsyncAdam,
    DanaDC,
    DanaGA,
    DanaSlim,
    DanaZero,
    DelayCompensation,
    Downpour,
    GapAware,
    GapAwareAdam,
    GapPenalty,
    GlobalGapPenalty,
    MultiASGD,
    StalenessAware,
    StalenessPenalty,
)

BOWL = Bowl()
X0, ZERO = BOWL.x0(), torch.zeros(7, dtype=torch.float64)
STEPS = 400
LR, MU, WD = 0.01, 0.9, 0.02

Grad = Callable[[Tensor, int], Tensor]
Lr = Callable[[int], float]
Walk = Iterator[tuple[Tensor, Tensor]]  # after each gradient: the master, and where its worker takes the next gradient
Path = tuple[Tensor, Tensor]


def constant(t: int) -> float:
    return LR


def dropping(t: int) -> float:
    return 0.02 * 0.3 ** ((t >= 150) + (t >= 300))


DROPPING = 0.02 * ob.MultiStep((150, 300), factor=0.3)


def order_of(workers: int, steps: int = STEPS, seed: int = 1) -> list[int]:
    """Workers in random order, each at least once; some are much slower than others."""
    rng = random.Random(seed)
    weights = [1 + 3 * rng.random() for _ in range(workers)]
    return [*rng.sample(range(workers), workers), *rng.choices(range(workers), weights, k=steps - workers)]


def walk(equations: Callable[..., Walk], order: list[int], **hyper: Any) -> Path:
    """The path of a paper's equations when ``order`` says whose gradient comes next."""
    steps: Counter[int] = Counter()

    def grad(x: Tensor, i: int) -> Tensor:
        steps[i] += 1
        return BOWL.grad(x, i, steps[i] - 1)[0]

    masters, points = zip(*equations(grad, order, **hyper), strict=True)
    return torch.stack(masters), torch.stack(points)


def drive(method: ob.ServerMethod, order: list[int]) -> Path:
    """The path of a method of the library, its server called by hand in this order."""
    server = ParameterServer.start(method, X0)
    workers = {i: method.init(server.join(i)) for i in sorted(set(order))}
    steps: Counter[int] = Counter()
    masters, points = [], []
    for i in order:
        g, _ = BOWL.grad(method.params(workers[i]), i, steps[i])
        steps[i] += 1
        workers[i] = method.local(workers[i], g)
        if steps[i] % method.period == 0:
            workers[i] = method.pull(workers[i], server.serve(i, method.push(workers[i])))
        masters.append(server.x())
        points.append(method.params(workers[i]))
    return torch.stack(masters), torch.stack(points)


def optimise(optimiser: type, steps: int = STEPS, lr: Lr = constant, worker: int = 0, **hyper: Any) -> Tensor:
    """The iterates of one worker alone under a ``torch.optim`` class."""
    x = torch.nn.Parameter(X0.clone())
    optimiser = optimiser([x], lr=lr(0), **hyper)
    path = []
    for t in range(steps):
        optimiser.param_groups[0]["lr"] = lr(t)
        x.grad = BOWL.grad(x.detach().clone(), worker, t)[0]
        optimiser.step()
        path.append(x.detach().clone())
    return torch.stack(path)


ALONE = [0] * STEPS
SGD, ADAM = torch.optim.SGD, torch.optim.Adam


# ---------------------------------------------------------------- the papers' equations


def zeros() -> defaultdict[int, Tensor]:
    return defaultdict(lambda: ZERO)


def starts() -> defaultdict[int, Tensor]:
    return defaultdict(lambda: X0)


def asgd(grad: Grad, order: list[int], lr: Lr = constant, mu: float = 0.0, wd: float = 0.0) -> Walk:
    theta, v, w = X0, ZERO, starts()
    for t, i in enumerate(order):
        v = mu * v + (grad(w[i], i) + wd * theta)
        theta = theta - lr(t) * v
        w[i] = theta
        yield theta, w[i]


def nag_asgd(grad: Grad, order: list[int], lr: Lr = constant, mu: float = MU, wd: float = 0.0) -> Walk:
    theta, v, w = X0, ZERO, starts()
    for t, i in enumerate(order):
        v = mu * v + grad(w[i], i) + wd * theta
        theta = theta - lr(t) * v
        w[i] = theta - lr(t) * mu * v
        yield theta, w[i]


def multi_asgd(grad: Grad, order: list[int], lr: Lr = constant, mu: float = MU, wd: float = 0.0) -> Walk:
    theta, v, w = X0, zeros(), starts()
    for t, i in enumerate(order):
        v[i] = mu * v[i] + grad(w[i], i) + wd * theta
        theta = theta - lr(t) * v[i]
        w[i] = theta
        yield theta, w[i]


def lwp(
    grad: Grad, order: list[int], lr: Lr = constant, mu: float = MU, wd: float = 0.0, delay: float | None = None
) -> Walk:
    """arXiv:2003.11666, LWP-v: the delay is the number of workers unless it is given."""
    theta, v, w = X0, ZERO, starts()
    delay = len(set(order)) if delay is None else delay
    for t, i in enumerate(order):
        v = mu * v + grad(w[i], i) + wd * theta
        theta = theta - lr(t) * v
        w[i] = theta - delay * lr(t) * v
        yield theta, w[i]


def dana_zero(
    grad: Grad, order: list[int], lr: Lr = constant, mu: float = MU, wd: float = 0.0, lam: float = 0.0
) -> Walk:
    """arXiv:1907.11612, DANA-Zero and (lam) DANA-DC: the sum of momenta taken anew, one rate for all of the look-ahead."""
    theta, v, w = X0, zeros(), starts()
    for t, i in enumerate(order):
        g = grad(w[i], i)
        g = g + lam * g * g * (theta - w[i])
        v[i] = mu * v[i] + g + wd * theta
        theta = theta - lr(t) * v[i]
        w[i] = theta - lr(t) * mu * sum(v.values())
        yield theta, w[i]


def dana_zero_own_rates(grad: Grad, order: list[int], lr: Lr = constant, mu: float = MU) -> Walk:
    """DANA-Zero where a message has the rate in force when its worker was last sent parameters, look-ahead included."""
    theta, v, w, last, sent = X0, zeros(), starts(), defaultdict(float), Counter()
    for t, i in enumerate(order):
        last[i] = lr(sent[i])
        v[i] = mu * v[i] + grad(w[i], i)
        theta = theta - last[i] * v[i]
        w[i] = theta - mu * sum(last[j] * v[j] for j in v)
        sent[i] = t + 1
        yield w[i], w[i]


def dana_slim(grad: Grad, order: list[int], mu: float = MU, wd: float = 0.0) -> Walk:
    """arXiv:1907.11612, DANA-Slim at a constant rate; weight decay at the worker's point."""
    theta, v, w = X0, zeros(), starts()
    for i in order:
        g = grad(w[i], i) + wd * w[i]
        v[i] = mu * v[i] + g
        theta = theta - LR * (g + mu * v[i])
        w[i] = theta
        yield theta, w[i]


def staleness_aware(grad: Grad, order: list[int], lr: Lr = constant, mu: float = MU, wd: float = 0.0) -> Walk:
    """arXiv:1511.05950 eq. (6): the rate is divided by the lag, where that is 1 or more."""
    theta, v, w, read = X0, ZERO, starts(), Counter()
    for t, i in enumerate(order):
        tau = t - read[i]
        v = mu * v + (grad(w[i], i) + wd * theta) / max(1, tau)
        theta = theta - lr(t) * v
        w[i], read[i] = theta, t + 1
        yield theta, w[i]


def dc_asgd_c(grad: Grad, order: list[int], lr: Lr = constant, lam: float = 0.04, wd: float = 0.0) -> Walk:
    """arXiv:1609.08326 eq. (10), constant lambda; weight decay outside the squared gradient."""
    theta, backup = X0, starts()
    for t, i in enumerate(order):
        g = grad(backup[i], i)
        theta = theta - lr(t) * (g + lam * g * g * (theta - backup[i]) + wd * theta)
        backup[i] = theta
        yield theta, theta


def dc_asgd_a(grad: Grad, order: list[int], lr: Lr = constant, lam: float = 2.0, wd: float = 0.0) -> Walk:
    """arXiv:1609.08326, adaptive lambda, with one mean square for each worker as in the authors' program."""
    theta, backup, square = X0, starts(), zeros()
    for t, i in enumerate(order):
        g = grad(backup[i], i)
        square[i] = 0.95 * square[i] + 0.05 * g * g
        g = g + lam / torch.sqrt(square[i] + 1e-7) * g * g * (theta - backup[i])
        theta = theta - lr(t) * (g + wd * theta)
        backup[i] = theta
        yield theta, theta


def gap_aware(
    grad: Grad, order: list[int], lr: Lr = constant, mu: float = MU, wd: float = 0.0, dana: bool = False
) -> Walk:
    """Gap-Aware (ICLR 2020) before momentum at the master, or (dana) before DANA-Zero; P is 1 while R is 0.

    With a momentum for each worker (dana), R is the weighted mean of the steps that were taken: a first visit has none.
    """
    theta, v, w, square, largest, fed = X0, zeros(), starts(), ZERO, 0.0, 0
    for t, i in enumerate(order):
        g, mine = grad(w[i], i), i if dana else 0
        moved = v[mine] if mu else g
        if not dana or i in order[:t]:
            fed += 1
            square = 0.999 * square + 0.001 * moved**2
        largest = max(largest, lr(t))
        travel = largest * (torch.sqrt(square / (1 - 0.999 ** max(1, fed))) + 1e-8)
        penalty = torch.where(square == 0, torch.ones(7, dtype=torch.float64), 1 + (theta - w[i]).abs() / travel)
        v[mine] = mu * v[mine] + (g + wd * theta) / penalty
        theta = theta - lr(t) * v[mine]
        w[i] = theta - lr(t) * mu * sum(v.values()) if dana else theta
        yield theta, w[i]


def adam(
    grad: Grad,
    order: list[int],
    lr: Lr = constant,
    wd: float = 0.0,
    gap: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Walk:
    """arXiv:1412.6980 alg. 1 at the master; with Gap-Aware in units of the steps that Adam has applied."""
    b1, b2 = betas
    theta, m, n, w, square = X0, ZERO, ZERO, starts(), ZERO
    applied = ZERO
    for t, i in enumerate(order):
        d = grad(w[i], i) + wd * theta
        if gap:
            square = b2 * square + (1 - b2) * applied**2
            penalty = 1 + (theta - w[i]).abs() / (torch.sqrt(square) + 1e-8)
            d = d / torch.where(square > 0, penalty, torch.ones_like(penalty))
        m, n = b1 * m + (1 - b1) * d, b2 * n + (1 - b2) * d * d
        applied = lr(t) * (m / (1 - b1 ** (t + 1))) / (torch.sqrt(n / (1 - b2 ** (t + 1))) + 1e-8)
        theta = theta - applied
        w[i] = theta
        yield theta, theta


def gem(grad: Grad, order: list[int], lr: Lr = constant, mu: float = MU, kappa: float = 1.0, wd: float = 0.0) -> Walk:
    """arXiv:1805.08469 alg. 1 as released: clamped scale, s from before the own commit; moment corrected with the rate."""
    theta, w, s, m, last = X0, starts(), starts(), zeros(), {}
    for t, i in enumerate(order):
        d = -lr(t) * (grad(w[i], i) + wd * theta)
        m[i] = mu * m[i] * (lr(t) / last.get(i, lr(t))) + d
        pi = ((kappa * m[i].abs() - (theta - s[i]).abs()) / (d.abs() + 1e-12)).clamp(0, 5)
        s[i], last[i] = theta, lr(t)
        theta = theta + pi * d
        w[i] = theta
        yield theta, w[i]


def easgd(
    grad: Grad,
    order: list[int],
    lr: Lr = constant,
    beta: float = 0.9,
    tau: int = 4,
    delta: float = 0.0,
    wd: float = 0.0,
) -> Walk:
    """arXiv:1412.6651 in the order of the author's program: d before the local step, taken off after it."""
    alpha = beta / len(set(order))
    centre, x, v = X0, starts(), zeros()
    k, base, taken = Counter(), Counter(), 0
    for i in order:
        eta = lr(base[i] + k[i] % tau)
        d = alpha * (x[i] - centre) if k[i] % tau == tau - 1 else ZERO
        v[i] = delta * v[i]
        x[i] = x[i] + v[i]
        g = grad(x[i], i) + wd * x[i]
        x[i], v[i] = x[i] - eta * g, v[i] - eta * g
        k[i] += 1
        if k[i] % tau == 0:
            centre, x[i] = centre + d, x[i] - d
            taken += tau
            base[i] = taken
        yield centre, x[i] + delta * v[i]


def downpour(grad: Grad, order: list[int], lr: Lr = constant, tau: int = 3, wd: float = 0.0) -> Walk:
    """NIPS 2012: local steps summed, sent every tau gradients; their sum moves the master, which comes back."""
    theta, x, a, k, base, taken = X0, starts(), zeros(), Counter(), Counter(), 0
    for i in order:
        step = lr(base[i] + k[i] % tau) * (grad(x[i], i) + wd * x[i])
        x[i], a[i] = x[i] - step, a[i] - step
        k[i] += 1
        if k[i] % tau == 0:
            theta = theta + a[i]
            taken += tau
            x[i], a[i], base[i] = theta, ZERO, taken
        yield theta, x[i]


ADAPTIVE = AdaptiveDelayCompensation()
CASES: dict[str, tuple[ob.ServerMethod, Callable[..., Walk]]] = {
    "asgd": (ASGD(LR), asgd),
    "asgd, momentum, decay, schedule": (
        ASGD(DROPPING, momentum=MU, weight_decay=WD),
        partial(asgd, lr=dropping, mu=MU, wd=WD),
    ),
    "nag-asgd": (NAGASGD(LR), nag_asgd),
    "nag-asgd, decay, schedule": (NAGASGD(DROPPING, weight_decay=WD), partial(nag_asgd, lr=dropping, wd=WD)),
    "multi-asgd": (MultiASGD(LR), multi_asgd),
    "multi-asgd, decay, schedule": (MultiASGD(DROPPING, weight_decay=WD), partial(multi_asgd, lr=dropping, wd=WD)),
    "lwp": (LWP(LR / 10), partial(lwp, lr=lambda t: LR / 10)),
    "lwp, delay, decay, schedule": (
        LWP(DROPPING, delay=2.5, momentum=0.5, weight_decay=WD),
        partial(lwp, lr=dropping, delay=2.5, mu=0.5, wd=WD),
    ),
    "dana-zero": (DanaZero(LR), dana_zero),
    "dana-zero, decay": (DanaZero(LR, weight_decay=WD), partial(dana_zero, wd=WD)),
    "dana-zero, decay, schedule": (DanaZero(DROPPING, weight_decay=WD), partial(dana_zero, lr=dropping, wd=WD)),
    "dana-slim": (DanaSlim(LR), dana_slim),
    "dana-slim, decay": (DanaSlim(LR, weight_decay=WD), partial(dana_slim, wd=WD)),
    "dana-slim, schedule": (DanaSlim(DROPPING), partial(dana_zero_own_rates, lr=dropping)),
    "dana-dc": (DanaDC(LR / 5), partial(dana_zero, lr=lambda t: LR / 5, lam=2.0)),
    "dana-dc, decay, schedule": (
        DanaDC(DROPPING, weight_decay=WD, correction=DelayCompensation(0.3)),
        partial(dana_zero, lr=dropping, lam=0.3, wd=WD),
    ),
    "staleness-aware": (StalenessAware(LR), staleness_aware),
    "staleness-aware, decay, schedule": (
        StalenessAware(DROPPING, weight_decay=WD),
        partial(staleness_aware, lr=dropping, wd=WD),
    ),
    "dc-asgd-c": (DCASGD(LR, correction=DelayCompensation(0.04)), dc_asgd_c),
    "dc-asgd-c, decay": (
        DCASGD(LR, correction=DelayCompensation(1.5), weight_decay=WD),
        partial(dc_asgd_c, lam=1.5, wd=WD),
    ),
    "dc-asgd-a": (DCASGD(LR), dc_asgd_a),
    "dc-asgd-a, decay, schedule": (DCASGD(DROPPING, weight_decay=WD), partial(dc_asgd_a, lr=dropping, wd=WD)),
    "gap-aware": (GapAware(LR), gap_aware),
    "gap-aware, no momentum": (GapAware(LR, momentum=0.0), partial(gap_aware, mu=0.0)),
    "gap-aware, decay, schedule": (GapAware(DROPPING, weight_decay=WD), partial(gap_aware, lr=dropping, wd=WD)),
    "dana-ga": (DanaGA(LR), partial(gap_aware, dana=True)),
    "dana-ga, decay, schedule": (
        DanaGA(DROPPING, weight_decay=WD),
        partial(gap_aware, lr=dropping, dana=True, wd=WD),
    ),
    "gap-aware-adam, decay, schedule": (
        GapAwareAdam(DROPPING, weight_decay=WD),
        partial(adam, lr=dropping, gap=True, wd=WD),
    ),
    "gap-aware-adam, betas": (GapAwareAdam(LR, betas=(0.8, 0.95)), partial(adam, gap=True, betas=(0.8, 0.95))),
    "async-adam, decay, schedule": (AsyncAdam(DROPPING, weight_decay=WD), partial(adam, lr=dropping, wd=WD)),
    "gem": (GEM(LR), gem),
    "gem, kappa, decay, schedule": (
        GEM(DROPPING, kappa=2.0, weight_decay=WD),
        partial(gem, lr=dropping, kappa=2.0, wd=WD),
    ),
    "easgd": (EASGD(LR), easgd),
    "easgd, period 1, decay, schedule": (
        EASGD(DROPPING, period=1, weight_decay=WD),
        partial(easgd, lr=dropping, tau=1, wd=WD),
    ),
    "eamsgd, decay, schedule": (
        EAMSGD(DROPPING, period=3, weight_decay=WD, beta=0.5),
        partial(easgd, lr=dropping, tau=3, delta=0.9, wd=WD, beta=0.5),
    ),
    "downpour, period 3": (Downpour(LR, period=3), downpour),
    "downpour, decay, schedule": (
        Downpour(DROPPING, period=2, weight_decay=WD),
        partial(downpour, lr=dropping, tau=2, wd=WD),
    ),
}
each_case = pytest.mark.parametrize("case", CASES)


@pytest.mark.parametrize(("case", "workers"), by_turns(CASES, [1, 4, 16]))
def test_a_method_walks_its_papers_equations(case: str, workers: int) -> None:
    """Every paper's update, weight decay where the docstring says: the same master and sent points at every gradient."""
    method, equations = CASES[case]
    order = order_of(workers)
    master, sent = drive(method, order)
    wanted_master, wanted_sent = walk(equations, order)
    assert same(sent, wanted_sent)
    assert same(master, wanted_master)


@each_case
def test_a_simulated_run_walks_its_papers_equations(case: str) -> None:
    """The same in the simulator with uneven gamma speeds, in the order that its trace reports; and the gaps (DANA, 1.1)."""
    method, equations = CASES[case]
    run = ob.simulate(method, BOWL, ob.Cluster(5, ob.Gamma(cv=0.5, machine_cv=0.5)), gradients=STEPS)
    order = run.trace.column("worker").tolist()
    masters, points = walk(equations, order)
    assert same(run.x, masters[-1])
    last: dict[int, int] = {}
    gaps = []
    for t, i in enumerate(order):
        taken = points[last[i]] if i in last else X0
        gaps.append((masters[t - 1] - taken if t else ZERO).norm() / math.sqrt(7))
        last[i] = t
    torch.testing.assert_close(run.trace.column("gap"), torch.stack(gaps), rtol=1e-7, atol=1e-13)


# ---------------------------------------------------------------- DANA


@pytest.mark.parametrize("workers", [1, 4, 16])
def test_dana_slims_master_is_what_dana_zero_sends(workers: int) -> None:
    """arXiv:1907.11612: at a constant rate, without weight decay, for any order of workers."""
    order = order_of(workers, seed=workers)
    slim, zero = drive(DanaSlim(LR), order)[0], drive(DanaZero(LR), order)[1]
    assert same(slim, walk(dana_zero, order)[1])
    assert same(zero, walk(dana_slim, order)[0])


@pytest.mark.parametrize("change", [{"lr": DROPPING}, {"weight_decay": WD}], ids=["rate changes", "weight decay"])
def test_dana_slim_and_dana_zero_differ_otherwise(change: dict[str, Any]) -> None:
    """arXiv:1907.11612: the equality needs a constant rate and no weight decay (the two place it at different points)."""
    order = order_of(4)
    slim, zero = (drive(cls(**{"lr": LR} | change), order) for cls in (DanaSlim, DanaZero))
    assert differ(slim[0], zero[1])


def test_of_one_worker_dana_slim_takes_back_the_old_rates_look_ahead() -> None:
    """With one worker its own last rate is the present one, so Slim's corrected message is DANA-Zero under any schedule."""
    assert same(drive(DanaSlim(DROPPING), ALONE)[0], walk(partial(dana_zero, lr=dropping), ALONE)[1])


@pytest.mark.parametrize("cls", [DanaZero, NAGASGD, DanaSlim])
def test_one_worker_is_nesterov(cls: type[Master]) -> None:
    """What is sent to a single worker is the iterate of ``torch.optim.SGD(nesterov=True)``, a look-ahead itself."""
    nesterov = optimise(SGD, momentum=MU, nesterov=True)
    assert same(drive(cls(LR), ALONE)[1], nesterov)
    assert differ(drive(cls(DROPPING), ALONE)[1], optimise(SGD, lr=dropping, momentum=MU, nesterov=True))


def test_one_worker_with_weight_decay_is_nesterov_only_at_the_workers_point() -> None:
    """torch decays at the look-ahead, as DANA-Slim does; DANA-Zero and NAG-ASGD decay at the master's point."""
    nesterov = optimise(SGD, momentum=MU, nesterov=True, weight_decay=WD)
    assert same(drive(DanaSlim(LR, weight_decay=WD), ALONE)[1], nesterov)
    assert differ(drive(DanaZero(LR, weight_decay=WD), ALONE)[1], nesterov)
    assert differ(drive(NAGASGD(LR, weight_decay=WD), ALONE)[1], nesterov)


@pytest.mark.parametrize("cls", [MultiASGD, ASGD])
def test_one_worker_is_heavy_ball(cls: type[Master]) -> None:
    """Momentum at the master without a look-ahead is ``torch.optim.SGD(momentum)`` for one worker; any schedule."""
    method = cls(DROPPING, momentum=MU, weight_decay=WD)
    assert same(drive(method, ALONE)[1], optimise(SGD, lr=dropping, momentum=MU, weight_decay=WD))


@pytest.mark.parametrize("cls", [DanaZero, DanaSlim, NAGASGD, MultiASGD, LWP])
def test_without_momentum_everything_is_asgd(cls: type[Master]) -> None:
    """gamma = 0: no momentum and no look-ahead are left (LWP: delay 0 too)."""
    method = cls(LR, momentum=0.0, **{"delay": 0.0} if cls is LWP else {})
    order = order_of(4)
    assert same(torch.stack(drive(method, order)), torch.stack(walk(asgd, order)))


def test_dana_dc_without_strength_is_dana_zero() -> None:
    """arXiv:1907.11612: lambda = 0."""
    order = order_of(4)
    method = DanaDC(LR, correction=DelayCompensation(0.0))
    assert same(torch.stack(drive(method, order)), torch.stack(walk(dana_zero, order)))


def test_dana_dc_of_one_worker_is_not_nesterov() -> None:
    """The distance is from theta to the look-ahead that was sent, which is not 0 even without any lag."""
    assert differ(drive(DanaDC(LR), ALONE)[1], optimise(SGD, momentum=MU, nesterov=True))


def momenta(server: ParameterServer) -> tuple[Tensor, Tensor]:
    """DANA's running sum S, and the sum taken anew over the workers that are seated."""
    return server.state.mover, sum((own.mover for own in server.own.values()), ZERO)


def test_danas_running_sum_is_the_sum_when_workers_come_and_go() -> None:
    """S = sum_j v_j (arXiv:1907.11612), workers joining and leaving by hand."""
    server, rng = ParameterServer.start(DanaZero(LR), X0), random.Random(3)
    for t in range(STEPS):
        if len(server.own) < 2 or (rng.random() < 0.1 and len(server.own) < 12):
            point = server.join(t)
            assert same(point, server.x() - LR * MU * momenta(server)[1])
        elif rng.random() < 0.1:
            server.leave(rng.choice(sorted(server.own)))
        i = rng.choice(sorted(server.own))
        server.serve(i, BOWL.grad(server.x(), i, t)[0])
        running, summed = momenta(server)
        assert (running - summed).norm() <= 1e-13 * max(1.0, float(running.norm()))
    for i in sorted(server.own):
        server.leave(i)
    assert float(server.state.mover.norm()) <= 1e-13


def test_danas_running_sum_is_the_sum_through_cluster_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same when the simulator lets workers join, leave and crash."""
    servers: list[ParameterServer] = []
    start = ParameterServer.__init__

    def spy(self: ParameterServer, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        servers.append(self)

    def check(event: ob.Event) -> None:
        running, summed = momenta(servers[0])
        seated.add(tuple(sorted(servers[0].own)))
        assert (running - summed).norm() <= 1e-13 * max(1.0, float(running.norm()))

    monkeypatch.setattr(ParameterServer, "__init__", spy)
    seated: set[tuple[int, ...]] = set()
    events = (
        ob.Join(3, 5.5),
        ob.Crash(0, 20.2),
        ob.Leave(1, 30.1),
        ob.Join(0, 40.0),
        ob.Crash(3, 50.3),
        ob.Join(1, 60),
    )
    ob.simulate(DanaZero(LR), BOWL, ob.Cluster(3, events=events), gradients=STEPS, watch=check)
    assert seated == {(0, 1, 2), (0, 1, 2, 3), (1, 2, 3), (2, 3), (0, 2, 3), (0, 2)}


def test_lag() -> None:
    """Round robin: a worker's first message is as late as there were updates before it, every other one N - 1."""
    lags = ob.simulate(ASGD(LR), BOWL, ob.Cluster(8, ob.Fixed()), gradients=200).trace.column("lag").tolist()
    assert lags == [*range(8), *[7] * 192]


def test_mean_lag_of_equal_workers_is_one_less_than_their_number() -> None:
    """arXiv:1805.08469, section 1: mean lag N - 1 whatever the spread of the times."""
    trace = ob.simulate(ASGD(LR), BOWL, ob.Cluster(8, ob.Gamma(cv=0.5)), gradients=4000).trace
    assert float(trace.column("lag").double().mean()) == pytest.approx(7, abs=0.02)
    read: Counter[int] = Counter()
    for updates, event in enumerate(trace):
        assert event.lag == updates - read[event.worker]
        read[event.worker] = updates + 1


# ---------------------------------------------------------------- GEM (arXiv:1805.08469)


def visits(method: GEM, order: list[int], noise: float = 0.3) -> Iterator[tuple[Tensor, ...]]:
    """(d, m, A = theta - s, u, theta before, theta after) at each visit, all but u kept by this loop itself."""
    server = ParameterServer.start(method, X0)
    points = {i: server.join(i) for i in sorted(set(order))}
    s, m, steps = dict(points), zeros(), Counter()
    for i in order:
        before = server.x()
        g = Bowl(noise=noise).grad(points[i], i, steps[i])[0]
        steps[i] += 1
        d = -method.lr * g
        m[i] = method.momentum * m[i] + d
        u = method.visit(server.state, server.own[i], g).u
        points[i] = server.serve(i, g)
        yield d, m[i], before - s[i], u, before, server.x()
        s[i] = before


@pytest.mark.parametrize("workers", [1, 4, 16])
@pytest.mark.parametrize("kappa", [1.0, 2.0])
def test_gem_never_exceeds_the_energy_of_its_proxy(workers: int, kappa: float) -> None:
    """Eqs. (12) to (19), at every coordinate of every visit, with the released code's clamp."""
    met: Counter[str] = Counter()
    for d, m, moved, u, before, after in visits(GEM(0.05, kappa=kappa), order_of(workers)):
        a, most = moved.abs(), kappa * m.abs()
        bound = torch.maximum(most, a) * (1 + 1e-12)
        assert torch.equal(after, before + u)
        assert bool((u.abs() + a <= bound).all()), "|u| + A <= max(M, A)"
        assert bool(((moved + u).abs() <= bound).all())
        room = a <= most
        assert bool((0.5 * (moved + u) ** 2 <= 0.5 * most**2 * (1 + 1e-12))[room].all()), "stability where A <= M"
        assert bool((u[a >= most] == 0).all()), "nothing is sent where the others have used up the energy"
        assert bool(((u.sign() == d.sign()) | (u == 0)).all()), "never against the gradient"
        exact = room & ((most - a) <= 4.999 * d.abs()) & (d.abs() > 1e-7)
        torch.testing.assert_close(u.abs()[exact], (most - a)[exact], rtol=1e-4, atol=1e-15)  # eps / |d| <= 1e-5
        met.update(zero=int((a > most).sum()), exact=int(exact.sum()), clamped=int((most - a > 5 * d.abs()).sum()))
    assert met["exact"] > 200, "compliance was seen"
    assert met["clamped"] > 0
    assert met["zero"] > 0 or workers == 1


def test_gem_compliance_is_exact() -> None:
    """Eq. (19): |u| = kappa |m| - |theta - s| to 1e-9 where no clamp acts and |d| is far above eps."""
    for d, m, moved, u, *_ in visits(GEM(0.05, eps=1e-30), order_of(4)):
        free = (m.abs() > moved.abs()) & (m.abs() - moved.abs() < 5 * d.abs())
        torch.testing.assert_close(u.abs()[free], (m.abs() - moved.abs())[free], rtol=1e-9, atol=1e-16)


def test_gems_first_commit_is_kappa_times_sgd() -> None:
    """m = d and theta = s at the first visit of the first worker: pi = kappa, up to eps."""
    g, _ = BOWL.grad(X0, 0, 0)
    server = ParameterServer.start(GEM(LR, kappa=2.0), X0)
    server.join(0)
    torch.testing.assert_close(server.serve(0, g) - X0, -2 * LR * g, rtol=1e-8, atol=0)


def test_gem_of_one_worker_takes_turns_with_its_own_last_step() -> None:
    """With s from before the own commit: |u_t| = max(0, |m_t| - |u_{t-1}|), up to the clamp at 5 |d|."""
    last = ZERO
    for d, m, _, u, *_ in visits(GEM(0.05), ALONE):
        wanted = torch.minimum((m.abs() - last.abs()).clamp(min=0), 5 * d.abs())
        torch.testing.assert_close(u.abs(), wanted, rtol=1e-6, atol=1e-11)
        last = u


def test_gem_shares_the_proxys_step_among_the_workers() -> None:
    """A constant gradient in round robin: n workers and one's own last step share |m|, so mean |u| = |m| / (n + 1)."""
    server = ParameterServer.start(GEM(1.0), ZERO)
    for i in range(8):
        server.join(i)
    sizes = []
    for t in range(4000):
        before = server.x()
        server.serve(t % 8, torch.ones_like(ZERO))
        sizes.append((server.x() - before).abs())
    torch.testing.assert_close(
        9 * torch.stack(sizes[-9 * 8 * 10 :]).mean(0), torch.full_like(ZERO, 10.0), rtol=1e-3, atol=0
    )


def test_gem_without_momentum_only_damps() -> None:
    """mu = 0, kappa = 1: pi = clamp(1 - |theta - s| / |d|, 0, 5), never above 1."""
    for d, _, moved, u, *_ in visits(GEM(0.05, momentum=0.0), order_of(4)):
        torch.testing.assert_close(u, (1 - moved.abs() / d.abs()).clamp(0, 5) * d, rtol=1e-6, atol=1e-11)


def test_gem_without_momentum_and_lag_is_sgd() -> None:
    """mu = 0, kappa = 1 and theta = s, here because every visitor is new: plain SGD, up to eps."""
    server, x = ParameterServer.start(GEM(LR, momentum=0.0), X0), X0
    for t in range(50):
        g, _ = BOWL.grad(server.join(t), 0, t)
        server.serve(t, g)
        x = x - LR * g
        torch.testing.assert_close(server.x(), x, rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- Gap-Aware (ICLR 2020)

PENALTY = GapPenalty()
finite = st.floats(-10, 10).map(lambda v: v if abs(v) > 1e-6 else 1e-6)
vectors = st.lists(finite, min_size=5, max_size=5).map(lambda v: torch.tensor(v, dtype=torch.float64))


def corrected(
    g: Tensor, gap: Tensor, v: Tensor, lr: float = LR, theta: Tensor | None = None, wd: float = 0.0
) -> Tensor:
    """The direction after one visit whose mover's velocity is ``v`` and whose gap is ``gap``."""
    theta = torch.ones_like(g) if theta is None else theta
    first, second = torch.arange(2, dtype=torch.float64)
    stale = Stale(g, wd * theta, theta, theta - gap, second, first, lr, lambda: v)
    return PENALTY.correct(PENALTY.begin(theta), PENALTY.seat(PENALTY.begin(theta), theta), stale)[0]


@settings(deadline=None, max_examples=50, derandomize=True)
@given(g=vectors, gap=vectors, v=vectors, scale=st.floats(0.1, 10))
def test_gap_penalty(g: Tensor, gap: Tensor, v: Tensor, scale: float) -> None:
    """P = 1 + gap / C: at least 1, sign kept, scale free; and weight decay is penalised as the published trick does it."""
    theta = torch.zeros_like(g)
    d = corrected(g, gap, v, theta=theta)
    p = g / d
    assert bool((p >= 1).all())
    assert bool((d.sign() == g.sign()).all())
    torch.testing.assert_close(p, 1 + gap.abs() / (LR * (v.abs() + 1e-8)), rtol=1e-9, atol=0)
    torch.testing.assert_close(corrected(g, scale * gap, v, lr=scale * LR, theta=theta), d, rtol=1e-9, atol=1e-300)
    theta = g.flip(0)
    p = 1 + (theta - (theta - gap)).abs() / (LR * (v.abs() + 1e-8))
    trick = (g / p + WD * theta * (1 - p) / p) + WD * theta
    torch.testing.assert_close(corrected(g, gap, v, theta=theta, wd=WD), trick, rtol=1e-9, atol=1e-12)


def test_gap_penalty_of_one_usual_step_halves() -> None:
    """A gap of exactly C, what a parameter travels in one step, means P = 2."""
    g, v = BOWL.grad(X0, 0, 0)[0], BOWL.grad(X0, 0, 1)[0]
    usual = LR * (v.abs() + 1e-8)
    torch.testing.assert_close(corrected(g, usual, v, theta=torch.zeros_like(g)), g / 2, rtol=1e-12, atol=0)


def test_gap_penalty_waits_for_a_first_step() -> None:
    """While nothing has moved (R = 0) C means nothing, and the gradient passes unchanged, bit for bit."""
    g, v = BOWL.grad(X0, 0, 0)[0], ZERO.clone()
    assert torch.equal(corrected(g, torch.full_like(g, 3.0), v), g)
    v[0] = 1.0
    assert torch.equal(corrected(g, torch.full_like(g, 3.0), v)[1:], g[1:])
    assert corrected(g, torch.full_like(g, 3.0), v)[0].abs() < g[0].abs()


@pytest.mark.parametrize("momentum", [0.0, MU])
@pytest.mark.parametrize("wd", [0.0, WD])
def test_without_a_gap_gap_aware_is_its_base_bit_for_bit(momentum: float, wd: float) -> None:
    """One worker whose point is theta itself: P is exactly 1."""
    path = drive(GapAware(LR, momentum=momentum, weight_decay=wd), ALONE)[0]
    assert torch.equal(path, drive(ASGD(LR, momentum=momentum, weight_decay=wd), ALONE)[0])


def test_global_gap_penalty_is_one_number_for_the_model() -> None:
    """P = 1 + |theta - w| / (eta E|v|) in norms: 2 at a gap of one usual step, scale free, 1 until a step was seen."""
    penalty, g, v = GlobalGapPenalty(), BOWL.grad(X0, 0, 0)[0], BOWL.grad(X0, 0, 1)[0]

    def global_p(gap: Tensor, v: Tensor, lr: float = LR) -> float:
        stale = Stale(g, 0.0, X0, X0 - gap, *torch.arange(2, dtype=torch.float64).flip(0), lr, lambda: v)
        memory = penalty.begin(X0)
        mine = penalty.seat(memory, X0)
        d, memory, _ = penalty.correct(memory, mine, stale._replace(sums=penalty.sums(memory, mine, stale)))
        torch.testing.assert_close(memory.length, 0.001 * v.norm(), rtol=1e-9, atol=0)
        torch.testing.assert_close(d, g * (d[0] / g[0]), rtol=1e-12, atol=0)
        return float(g[0] / d[0])

    assert global_p(LR * v.flip(0), v) == pytest.approx(2, rel=1e-9)
    assert global_p(-3 * LR * v, v) == pytest.approx(4, rel=1e-9)
    assert global_p(5 * LR * v, v, lr=5 * LR) == pytest.approx(2, rel=1e-9)
    assert global_p(v, ZERO) == 1


@pytest.mark.parametrize("penalty", [GapPenalty(), GlobalGapPenalty()], ids=repr)
@pytest.mark.parametrize("base", [MultiASGD(LR), AsyncAdam(LR), ASGD(DROPPING, weight_decay=WD)], ids=repr)
def test_without_a_gap_any_base_is_itself_bit_for_bit(base: Master, penalty: Correction) -> None:
    """The same for the penalty in front of every mover that sends theta itself."""
    penalised = dataclasses.replace(base, correction=penalty)
    assert torch.equal(drive(penalised, ALONE)[0], drive(base, ALONE)[0])


def test_the_gap_of_adam_fades_with_its_second_moment() -> None:
    """One worker, gradients 1 to 5: the steps are close to the rate, and R after the fifth visit holds the first four."""
    method = GapAwareAdam(0.1, betas=(0.9, 0.5))
    server = ParameterServer.start(method, torch.zeros(1, dtype=torch.float64))
    server.join(0)
    points = [float(server.x())]
    for g in range(1, 6):
        server.serve(0, torch.tensor([g], dtype=torch.float64))
        points.append(float(server.x()))
    square = 0.0
    for before, after in itertools.pairwise(points[:-1]):
        square = 0.5 * square + 0.5 * (after - before) ** 2
    assert float(server.state.memory.square) == pytest.approx(square, rel=1e-9)
    assert square == pytest.approx(6.264e-3, rel=1e-4)
    assert AppliedGapPenalty(0.999).decay == 0.999  # said, it is what was said


@pytest.mark.parametrize("penalty", [GapPenalty(), GlobalGapPenalty()], ids=repr)
@pytest.mark.parametrize("base", [DanaZero(LR), MultiASGD(LR)], ids=repr)
@pytest.mark.parametrize("workers", [1, 8])
def test_first_visits_are_no_steps(workers: int, base: Master, penalty: Correction) -> None:
    """The first step that was taken is the usual one at once, however many workers came for the first time before."""
    method = dataclasses.replace(base, correction=penalty)
    server = ParameterServer.start(method, ZERO)
    for i in range(workers):
        server.join(i)
    g = torch.arange(1, 8, dtype=torch.float64)
    for i in range(workers):
        server.serve(i, g)  # P is 1: nothing has moved as far as anybody knows
    before, sent = server.x(), server.own[0].sent
    assert torch.equal(server.own[workers - 1].mover, g)
    server.serve(0, g)
    gap, usual = (before - sent).abs(), LR * g
    p = gap.norm() / usual.norm() if isinstance(penalty, GlobalGapPenalty) else gap / (LR * (g + 1e-8))
    moved = (before - server.x()) / LR - MU * g
    torch.testing.assert_close(moved, g / (1 + p), rtol=1e-9, atol=0)


# ---------------------------------------------------------------- the other corrections


@pytest.mark.parametrize("workers", [1, 2])
def test_staleness_up_to_one_is_not_penalised(workers: int) -> None:
    """arXiv:1511.05950 eq. (6): alpha0 / tau for tau >= 1, alpha0 for tau = 0; two workers in turn have a lag of 1."""
    order = [t % workers for t in range(STEPS)]
    assert torch.equal(drive(StalenessAware(LR), order)[0], drive(ASGD(LR, momentum=MU), order)[0])


@given(tau=st.integers(0, 1000))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_staleness_divides(tau: int) -> None:
    """arXiv:1511.05950 eq. (6): a lag of tau divides the gradient, weight decay included, by max(1, tau)."""
    g, decay = BOWL.grad(X0, 0, 0)[0], WD * X0
    at = torch.tensor(7.0, dtype=torch.float64)
    stale = Stale(g, decay, X0, (), at + tau, at, LR, lambda: g)
    torch.testing.assert_close(
        StalenessPenalty().correct((), (), stale)[0], (g + decay) / max(1, tau), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("correction", [DelayCompensation(3.0), ADAPTIVE], ids=repr)
def test_delay_compensation_without_delay_is_sgd(correction: Correction) -> None:
    """arXiv:1609.08326: theta is where the gradient was taken, so nothing is to be compensated."""
    method = DCASGD(DROPPING, correction=correction, weight_decay=WD)
    assert same(drive(method, ALONE)[1], optimise(SGD, lr=dropping, weight_decay=WD))


@pytest.mark.parametrize("correction", [DelayCompensation(0.0), AdaptiveDelayCompensation(0.0)], ids=repr)
def test_delay_compensation_without_strength_is_asgd(correction: Correction) -> None:
    """arXiv:1609.08326: lambda = 0."""
    order = order_of(4)
    assert same(drive(DCASGD(LR, correction=correction), order)[0], walk(asgd, order)[0])


def test_delay_compensation_starts_from_a_copy_of_the_start() -> None:
    """The copy of what a worker was first sent is theta_0, not 0 (as it is in the authors' program)."""
    server = ParameterServer.start(DCASGD(LR, correction=DelayCompensation(2.0)), X0)
    first, second = server.join(0), server.join(1)
    g, h = BOWL.grad(first, 0, 0)[0], BOWL.grad(second, 1, 0)[0]
    theta = X0 - LR * g
    assert same(server.serve(0, g), theta)
    assert same(server.serve(1, h), theta - LR * (h + 2 * h * h * (theta - X0)))


@pytest.mark.parametrize("wd", [0.0, WD])
def test_adam_at_the_master_of_one_worker_is_adam(wd: float) -> None:
    """arXiv:1412.6980: ``torch.optim.Adam``."""
    method = AsyncAdam(DROPPING, weight_decay=wd)
    assert same(drive(method, ALONE)[1], optimise(ADAM, lr=dropping, weight_decay=wd))


MASTERS = [cls for cls in ob.methods.all_methods() if issubclass(cls, Master)]
CORRECTIONS = [
    c for c in vars(ob.methods).values() if isinstance(c, type) and issubclass(c, Correction) and c is not Correction
]


@pytest.mark.parametrize("correction", [Uncorrected, *CORRECTIONS], ids=lambda c: c.__name__)
@pytest.mark.parametrize("cls", MASTERS, ids=lambda c: c.__name__)
def test_every_correction_works_with_every_master(cls: type[Master], correction: type[Correction]) -> None:
    """The two choices are orthogonal: every pair runs with a schedule and weight decay, stays finite, and gets better."""
    method = cls(lr=0.003 * ob.Warmup(20), correction=correction(), weight_decay=1e-3)
    run = ob.simulate(method, BOWL, ob.Cluster(4, ob.Gamma(cv=0.3)), gradients=100)
    assert bool(torch.isfinite(run.x).all())
    assert run.figures["loss"] < BOWL.evaluate(X0)["loss"]


# ---------------------------------------------------------------- elastic averaging and Downpour


@pytest.mark.parametrize("cls", [EASGD, EAMSGD])
def test_the_elastic_move_conserves_worker_plus_centre(cls: type[EASGD]) -> None:
    """arXiv:1412.6651: x_i loses exactly what the centre gains; alpha is beta over the workers present."""
    method, steps = cls(LR, period=3, beta=0.8), Counter()
    server = ParameterServer.start(method, X0)
    workers = {i: method.init(server.join(i)) for i in range(4)}
    for i in order_of(4):
        workers[i] = method.local(workers[i], BOWL.grad(method.params(workers[i]), i, steps[i])[0])
        steps[i] += 1
        if steps[i] % 3 == 0:
            x, before, centre = workers[i].x, workers[i].before, server.x()
            workers[i] = method.pull(workers[i], server.serve(i, method.push(workers[i])))
            assert float((workers[i].x + server.x() - (x + centre)).abs().max()) <= 1e-15 * 8
            torch.testing.assert_close(server.x() - centre, 0.2 * (before - centre), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("cls", "hyper"), [(EASGD, {}), (EAMSGD, {"momentum": MU, "nesterov": True})])
def test_without_elasticity_workers_are_on_their_own(cls: type[EASGD], hyper: dict[str, Any]) -> None:
    """beta = 0: each worker is independent (Nesterov) SGD, and the centre stays where it was."""
    order = order_of(4)
    centre, points = drive(cls(LR, beta=0.0), order)
    assert torch.equal(centre, X0.expand_as(centre))
    for i in range(4):
        mine = points[[t for t, j in enumerate(order) if j == i]]
        assert same(mine, optimise(SGD, steps=len(mine), worker=i, **hyper))


def test_easgd_in_round_robin() -> None:
    """arXiv:1412.6651, three workers in turn with period 2, written out in full."""
    lr, alpha = 0.05, 0.9 / 3
    centre, x, path = X0, [X0] * 3, []
    for k in range(60):
        for i in range(3):
            d = alpha * (x[i] - centre) if k % 2 else ZERO
            x[i] = x[i] - lr * BOWL.grad(x[i], i, k)[0] - d
            centre = centre + d
            path.append(centre)
    assert same(drive(EASGD(lr, period=2), [0, 1, 2] * 60)[0], torch.stack(path))


def test_downpour_of_period_one_is_asgd() -> None:
    """NIPS 2012: one step per exchange is a gradient per message (weight decay at the worker's point aside)."""
    order = order_of(4)
    assert same(drive(Downpour(LR, period=1), order)[0], walk(asgd, order)[0])
