"""Methods at their edges: rounds whose workers crash, blocks at rate zero, weights after hundreds of crashes, steps that
are too long, servers whose workers come and go. What docstrings say of such moments is true, or these tests fail."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from random import Random
from typing import Any

import pytest
import torch
from conftest import Bowl, differ, same
from test_peer_laws import (
    CONNECTED,
    DISH,
    LR,
    MU,
    RULES,
    TAU,
    UNEVEN,
    UNFAIR_TOPOLOGY,
    VANISHING,
    X0,
    ZERO,
    Descent,
    Engine,
    N,
    base_of,
    close,
    constant,
    path,
    push_sum,
    random_peer,
    slow_states,
    unfair,
)
from test_peer_membership import random_events, tensors
from torch import Tensor

import offbeat as ob
from offbeat import Crash, Join
from offbeat.core.server import ParameterServer
from offbeat.core.topology import RandomPeer
from offbeat.engines.simulator import Simulation
from offbeat.methods import (
    OSGP,
    SGP,
    AdaptiveDelayCompensation,
    BackupWorkers,
    DanaDC,
    DanaZero,
    DiLoCo,
    GoSGD,
    SlowMo,
    SlowMoNoAverage,
)
from offbeat.tasks import Digits, Quadratic


def in_turn(n: int, times: int) -> Iterator[Any]:
    """One after the other crashes and comes back, so that all have done so many times."""
    for k in range(times):
        yield from (Crash(k % n, 2.3 + 1.2 * k), Join(k % n, 3.1 + 1.2 * k))


def all_at_once(n: int, times: int) -> Iterator[Any]:
    """All have crashed before the first comes back."""
    for k in range(times // n):
        start = 2.3 + 2.6 * k
        yield from (Crash(i, start + 0.01 * i) for i in range(n))
        yield from (Join(i, start + 0.1 + 0.3 * i) for i in range(n))


# ---------------------------------------------------------------- backup workers


class Round:
    """arXiv:1604.00981 with who is there by name: all gradients given to the round, and the givers who wait for its end."""

    def __init__(self, rule: str, backups: int) -> None:
        self.master, self.backups, self.number = Descent(rule, constant), backups, 0
        self.sent: dict[int, int] = {}  # the round that each was last sent
        self.given: list[Tensor] = []
        self.waiting: list[int] = []
        self.kept = 0  # gradients that a step took of those who were gone

    def join(self, i: int) -> Tensor:
        self.sent[i] = self.number
        return self.master.x

    def visit(self, i: int, g: Tensor) -> set[int]:
        if self.sent[i] < self.number:
            self.sent[i] = self.number
            return {i}
        self.given.append(g)
        self.waiting.append(i)
        return self.end()

    def leave(self, i: int) -> set[int]:
        del self.sent[i]
        self.waiting = [j for j in self.waiting if j != i]
        return self.end()

    def end(self) -> set[int]:
        if len(self.waiting) < max(1, len(self.sent) - self.backups):
            return set()
        self.master.step(torch.stack(self.given).mean(0))
        self.number += 1
        self.kept += len(self.given) - len(self.waiting)
        self.sent |= dict.fromkeys(self.waiting, self.number)
        out, self.given, self.waiting = set(self.waiting), [], []
        return out


@dataclass
class Checked(ParameterServer):
    """A server of `BackupWorkers` that does at every moment what `Round` says, and lets out nobody else."""

    round: Any = None

    def join(self, worker: int) -> Tensor:
        x = super().join(worker)
        assert same(x, self.round.join(worker))
        return x  # type: ignore[no-any-return]

    def visit(self, worker: int, msg: Tensor) -> dict[int, Tensor]:
        return self.compare(super().visit(worker, msg), self.round.visit(worker, msg))

    def leave(self, worker: int) -> dict[int, Tensor]:
        return self.compare(super().leave(worker), self.round.leave(worker))

    def compare(self, replies: dict[int, Tensor], out: set[int]) -> dict[int, Tensor]:
        assert set(replies) == out
        assert all(torch.equal(x, self.x()) for x in replies.values())
        assert same(self.x(), self.round.master.x)
        return replies

    @classmethod
    def of(cls, backups: int, rule: str = "nesterov", lr: float = LR) -> Checked:
        server = cls.start(BackupWorkers(RULES[rule][0](lr), backups=backups), X0)
        assert isinstance(server, cls)
        server.round = Round(rule, backups)
        server.round.master.lr = lambda t: lr
        return server


G = torch.ones(7, dtype=torch.float64)


def seats(backups: int, workers: int) -> Checked:
    server = Checked.of(backups, "sgd", 1.0)
    for i in range(workers):
        server.join(i)
    return server


def test_a_worker_that_crashes_while_it_waits_leaves_its_gradient_in_the_mean() -> None:
    """Nobody is waited for in its place: the two who are there end the round, with three gradients."""
    server = seats(0, 3)
    assert server.visit(0, 3 * G) == {}
    assert server.leave(0) == {}
    assert server.visit(1, 6 * G) == {}
    assert set(server.visit(2, 9 * G)) == {1, 2}
    assert torch.equal(server.x(), X0 - 6)


@pytest.mark.parametrize("backups", [0, 1])
def test_nobody_present_is_passed_over_for_the_dead(backups: int) -> None:
    """One of four gave and is gone: the round still takes all who are there but ``backups``, besides the dead one's."""
    server = seats(backups, 4)
    server.visit(0, 4 * G)
    server.leave(0)
    assert server.visit(1, 4 * G) == {}
    if not backups:
        assert server.visit(2, 4 * G) == {}
    assert set(server.visit(3, 8 * G)) == ({1, 3} if backups else {1, 2, 3})
    assert same(server.x(), X0 - (16 / 3 if backups else 5))


def test_a_worker_that_crashes_before_giving_is_waited_for_no_more() -> None:
    """Its going ends the round for those who wait, and takes nothing out of the mean."""
    server = seats(0, 3)
    server.visit(0, 2 * G)
    server.visit(1, 4 * G)
    assert set(server.leave(2)) == {0, 1}
    assert torch.equal(server.x(), X0 - 3)


@pytest.mark.parametrize("backups", [0, 1])
def test_a_round_that_everybody_has_left_ends_with_those_who_come_next(backups: int) -> None:
    """At that round's parameters; with backups the first to give ends it, and the other one is late."""
    server = seats(backups, 2)
    if not backups:
        server.visit(0, 3 * G)
    for i in (0, 1):
        assert server.leave(i) == {}
    assert torch.equal(server.x(), X0)
    assert torch.equal(server.join(2), X0)
    assert torch.equal(server.join(3), X0)
    out = server.visit(3, 5 * G)
    assert set(out) == ({3} if backups else set())
    assert set(server.visit(2, 7 * G)) == ({2} if backups else {2, 3})
    assert torch.equal(server.x(), X0 - 5)  # (3 + 5 + 7) / 3, or 5 alone


def test_when_no_more_workers_are_left_than_backups_one_gradient_ends_a_round() -> None:
    server = seats(2, 4)
    server.leave(0)
    server.leave(1)
    assert set(server.visit(2, G)) == {2}
    assert set(server.visit(3, 100 * G)) == {3}  # late
    assert torch.equal(server.x(), X0 - 1)


@pytest.mark.parametrize("backups", [0, 1, 3])
def test_backup_workers_in_any_order(backups: int) -> None:
    """Visits, comings and goings in random order: the rounds of the equations, and somebody can always go on."""
    kept = 0
    for seed in range(8):
        rng, server = Random(seed), Checked.of(backups)
        free: set[int] = set()
        for name in range(120):
            if not server.own or rng.random() < 0.2:
                server.join(name)
                free.add(name)
            elif rng.random() < 0.2:
                gone = rng.choice(sorted(server.own))
                free = (free | set(server.leave(gone))) - {gone}
            else:
                giver = rng.choice(sorted(free))
                free = (free - {giver}) | set(server.visit(giver, torch.sin(Bowl().numbers[2] * (name + seed))))
            assert free or not server.own
        kept += server.round.kept
    assert kept > 3


def rounds(backups: int, cluster: ob.Cluster, seed: int = 2, gradients: int = 70) -> tuple[int, int]:
    """A run whose every step is checked; how many steps it came to, and how many gradients of the dead they took."""
    method = BackupWorkers(RULES["nesterov"][0](LR), backups=backups)
    sim = Simulation(method, DISH, cluster, gradients, seed)
    server = sim.ensemble.server = Checked.of(backups)  # type: ignore[attr-defined]
    run = sim.run()
    assert len(run.trace) == gradients
    assert torch.equal(run.x, server.x())
    return server.round.number, server.round.kept


@pytest.mark.parametrize("backups", [0, 1, 2])
def test_a_run_with_backup_workers_never_stops(backups: int) -> None:
    """Whoever goes and comes back, at equal moments too, with messages that take time, with a crash in ten gradients, and
    where those crash who wait for a slow one."""
    steps = kept = 0
    for seed in range(9):
        workers = backups + 1 + seed % 3
        network = ob.Network(latency=0.3) if seed % 2 else ob.Network()
        speed = UNEVEN if seed % 4 < 2 else ob.Fixed(1.0)
        events = random_events(seed, workers, back=seed % 3 > 0)
        for cluster in (
            ob.Cluster(workers, speed, events, network),
            ob.Cluster(workers, speed, (), network, (ob.Crashes(0.1, downtime=1.5),)),
            ob.Cluster(4, ob.Fixed((1.0, 2.0, 3.0, 6.0)), tuple(in_turn(3, 15)), network),
        ):
            number, dead = rounds(backups, cluster, seed)
            steps, kept = steps + number, kept + dead
    assert steps > 200
    assert kept > 3


# ---------------------------------------------------------------- SlowMo


BETA = 0.5
COMPOSED = ("Local SGD", "Local Adam", "SGP", "OSGP", "SGP unfair", "DPSGD", "AllReduce")


@pytest.mark.parametrize("base", COMPOSED)
@pytest.mark.parametrize("cls", [SlowMo, SlowMoNoAverage], ids=lambda cls: cls.__name__)
def test_in_blocks_at_rate_zero_slow_momentum_decays(cls: type[SlowMo], base: str) -> None:
    """u to the bit, at all peers, also where peers without an exact average mix on meanwhile; where there is one, nobody
    moves. At the start too, where u is 0."""
    found = slow_states(
        cls(base_of(base, VANISHING), alpha=0.8, beta=BETA, period=TAU),
        gradients=N * (130 if base.startswith("Local") else 75),
    )
    assert len(found) == N
    for states in found.values():
        us = [state.u for state in states]
        assert all(torch.equal(u, ZERO) for u in us[:3])
        assert all(float(u.norm()) > 0.1 for u in us[3:])
        for k in (10, 11):  # blocks of steps 50 to 59
            assert torch.equal(us[k + 1], BETA * us[k])
        assert not any(torch.equal(us[k + 1], BETA * us[k]) for k in (9, 12))
        if cls is SlowMo:
            gamma = torch.zeros((), dtype=torch.float64)
            assert all(close(states[k].x, X0) for k in (1, 2))
            assert all(close(states[k + 1].x, states[k].x) for k in (10, 11))
            assert torch.equal(states[12].rates - states[10].rates, gamma)


GRAPHS = {"unfair": (UNFAIR_TOPOLOGY, unfair), "random": (RandomPeer(), random_peer)}


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("rule", ["nesterov", "adamw"])
def test_without_average_and_slow_momentum_slowmo_is_push_sum_itself(graph: str, rule: str) -> None:
    """On graphs that are not doubly stochastic, where weights differ; of buffers that are kept."""
    inner = SGP(RULES[rule][0](LR), topology=GRAPHS[graph][0])
    bare = partial(SlowMoNoAverage, inner, alpha=1.0, beta=0.0, period=TAU)
    assert same(path(bare(buffering="maintain")), path(inner))
    assert differ(path(bare(buffering="reset")), path(inner))


@pytest.mark.parametrize("graph", GRAPHS)
def test_over_messages_that_overlap_slowmo_without_average_takes_them_in_at_a_blocks_end(graph: str) -> None:
    """Otherwise it is overlap SGP itself; in blocks of one step nothing overlaps any more, and it is SGP."""
    topology, matrix = GRAPHS[graph]
    inner = OSGP(RULES["nesterov"][0](LR), topology=topology)
    bare = partial(SlowMoNoAverage, inner, alpha=1.0, beta=0.0, buffering="maintain")

    def stay(models: Tensor, gamma: float) -> Tensor:
        return models[0]

    walked = path(bare(period=TAU))
    assert same(walked, push_sum("nesterov", matrix, late=True, outers=(stay,) * N))
    assert same(walked[:TAU], path(inner)[:TAU])
    assert differ(walked, path(inner))
    assert same(path(bare(period=1)), path(SGP(inner.rule, topology=topology)))


@pytest.mark.parametrize("topology", ["unfair", "random peer", "star", "one peer"])
@pytest.mark.parametrize("cls", [SGP, OSGP])
def test_slow_steps_without_average_leave_the_weights_their_sum(cls: type[SGP], topology: str) -> None:
    """At every moment, in any order, what is under way counted; a slow step moves mass, and no weight."""
    n = 4 if topology == "unfair" else 6
    inner = cls(ob.SGD(LR, momentum=MU), topology=CONNECTED[topology](n))
    engine = Engine(SlowMoNoAverage(inner, alpha=0.8, beta=BETA, period=3), n, seed=3)
    slowed = 0
    while sum(engine.taken.values()) < 180:
        before = [node.state.slow for node in engine.nodes]
        i, _ = engine.tick()
        slowed += engine.nodes[i].state.slow is not before[i]
        weights = [node.state.inner.weight for node in engine.nodes]
        assert min(weights) > 0
        assert close(sum(weights) + sum(w for _, w in engine.letters()), n)
    assert slowed > 50


# ---------------------------------------------------------------- weights through hundreds of crashes


GOING: dict[str, Callable[[int, int], Iterator[Any]]] = {"in turn": in_turn, "all at once": all_at_once}
PUSHERS: dict[str, Callable[[], Any]] = {
    "SGP": SGP,
    "SGP at random": partial(SGP, topology=RandomPeer()),
    "OSGP": OSGP,
    "GoSGD": GoSGD,
}


def weights(method: Any, n: int, events: tuple[Any, ...], dtype: Any) -> tuple[ob.Run, list[list[float]], list[float]]:
    """A run; at all its moments each peer's weight, and the sum, what is under way counted."""
    problem, last = Quadratic(8, dtype=dtype), max(event.at for event in events)
    sim = Simulation(method, problem, ob.Cluster(n, UNEVEN, events), int(n * last) + 100, seed=1)
    single, total, step = list[list[float]](), list[float](), sim.clock.step

    def stepped() -> bool:
        going = step()
        here = sim.workers.values()
        if here:
            single.append([float(worker.node.state.weight) for worker in here])
            letters = [msg for worker in here for *_, msg in worker.inbox]
            letters += [letter.message for worker in here for letter in worker.coming]
            total.append(sum(single[-1]) + sum(float(w) for _, w in letters))
        return going

    sim.clock.step = stepped  # type: ignore[method-assign]
    return sim.run(), single, total


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("going", GOING)
@pytest.mark.parametrize("name", PUSHERS)
def test_peers_that_crash_and_come_back_hundreds_of_times(name: str, going: str, dtype: Any) -> None:
    """Parameters stay finite and weights above 0. Push-sum weights stay about as many as there are peers, so that a step
    moves a model as far as ever; GoSGD's, whose size says nothing, dwindle."""
    n = 4 if dtype == "float32" else 3
    run, single, total = weights(PUSHERS[name](), n, tuple(GOING[going](n, 200)), dtype)
    assert sum(i.what == "crashed" for i in run.trace.incidents) >= 198
    assert len(single[-1]) == n
    assert bool(torch.isfinite(run.x).all())
    assert run.x.dtype == getattr(torch, dtype)
    assert run.figures["distance"] < 0.8  # 1 at the start; between crashes of all there is little time to learn
    assert all(0 < w < float("inf") for now in single for w in now)
    living = list(map(len, single))
    if name == "GoSGD":
        assert total[-1] < 1e-9
    else:
        assert n / 2 < total[-1] < 3 * n / 2
        # a peer halves its weight each time it sends, and who took it may die: the least seen is 1/8 for one peer that is left
        assert all(k / 16 < t < 3 * k for k, t in zip(living, total, strict=True))


def test_gossip_weights_do_not_vanish() -> None:
    """Halved six hundred times, which is beyond what a float holds next to others."""
    run, single, _ = weights(GoSGD(), 1, tuple(in_turn(1, 600)), "float32")
    assert single[-1] == [2.0**-500]
    assert bool(torch.isfinite(run.x).all())


# ---------------------------------------------------------------- DANA with delay compensation


def digits(method: ob.Method, workers: int, gradients: int, seed: int) -> float:
    """The accuracy that the method comes to on the digits; 0 where it diverges."""
    try:
        run = ob.simulate(method, Digits(seed=seed), ob.Cluster(workers), gradients=gradients, seed=seed)
    except ob.Diverged:
        return 0.0
    return run.figures["accuracy"]


WARM = partial(DanaDC, 0.05 * ob.Warmup(50))
SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])


@SEEDS
def test_dana_dc_of_eight_workers_converges_with_a_warm_up(seed: int) -> None:
    """At its defaults, with 5 % of the run for warm-up."""
    assert WARM().lr == 0.05 * ob.Warmup(1000 // 20)
    assert digits(WARM(), 8, 1000, seed) > 0.95


def test_of_dana_dc_with_sixteen_workers_a_strength_that_adapts_is_safer() -> None:
    """A constant lambda of 2 fails after a short warm-up, on some seeds, where the adaptive one does not."""
    constant = [digits(WARM(), 16, 600, seed) for seed in range(3)]
    adaptive = [digits(WARM(correction=AdaptiveDelayCompensation()), 16, 600, seed) for seed in range(3)]
    assert min(constant) < 0.8
    assert min(adaptive) > 0.9


# ---------------------------------------------------------------- DiLoCo


PUBLISHED = {"outer_lr": 0.7, "outer_momentum": 0.9}
HEAVY, PLAIN = ob.Local(ob.SGD(0.1, momentum=0.9)), ob.Local(ob.SGD(0.1))
CURVATURES = torch.logspace(-2, 0, 41, dtype=torch.float64)


def growth(method: DiLoCo) -> Tensor:
    """By how much a block multiplies the distance to the optimum in the long run, for each of `CURVATURES`.

    A block is a linear map of position, outer and inner momentum: its columns are the method's own handlers at the three
    unit vectors, and the growth its spectral radius."""
    columns = []
    zero, one = torch.zeros_like(CURVATURES), torch.ones_like(CURVATURES)
    for unit in range(3):
        x, outer, inner = (one if k == unit else zero for k in range(3))
        w = method.init(x)
        rule = w.inner.rule._replace(v=inner)
        w = w._replace(inner=w.inner._replace(rule=rule), slow=w.slow._replace(sgd=w.slow.sgd._replace(v=outer)))
        for _ in range(method.period):
            w = method.local(w, CURVATURES * method.params(w))
        w = method.absorb(w, method.contribute(w))
        columns.append(torch.stack([method.params(w), w.slow.sgd.v, w.inner.rule.v], -1))
    return torch.linalg.eigvals(torch.stack(columns, -1)).abs().amax(-1)


@pytest.mark.parametrize("period", range(1, 13))
def test_the_published_outer_step_is_unstable_after_few_steps_with_inner_momentum(period: int) -> None:
    """On quadratics: in blocks of up to 5 steps at rate 0.1. The default is stable, and so are both without momentum."""
    assert (float(growth(DiLoCo(HEAVY, period=period, **PUBLISHED)).max()) > 1.01) == (period <= 5)
    for stable in (
        DiLoCo(HEAVY, period=period),
        DiLoCo(PLAIN, period=period),
        DiLoCo(PLAIN, period=period, **PUBLISHED),
    ):
        assert float(growth(stable).max()) < 1


@dataclass(frozen=True)
class Product:
    """Numbers whose product should be 1, the smallest deep net: flat where it starts, steep beyond its optimum."""

    numbers: int = 5

    def x0(self) -> Tensor:
        return 0.3 * torch.linspace(0.8, 1.2, self.numbers, dtype=torch.float64)

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        off = x.prod() - 1
        others = torch.stack([x[torch.arange(len(x)) != k].prod() for k in range(len(x))])
        return off * others, off * off / 2

    def evaluate(self, x: Tensor) -> dict[str, float]:
        return {"loss": float(self.grad(x, 0, 0)[1])}


@pytest.mark.parametrize(
    ("problem", "period"), [(Product(), 8), (Quadratic(dtype="float32"), 2)], ids=["product-8", "quadratic-2"]
)
def test_diloco_diverges_with_a_name_where_the_outer_step_is_too_long(problem: Any, period: int) -> None:
    """Inner SGD at rate 0.1 with momentum 0.9, the published outer step. Worker and step are named, the trace is kept."""
    method, cluster, seen = DiLoCo(HEAVY, period=period, **PUBLISHED), ob.Cluster(N, UNEVEN), list[ob.Event]()
    with pytest.raises(ob.Diverged) as failed:
        ob.simulate(method, problem, cluster, gradients=20_000, watch=seen.append)
    failure, trace = failed.value, failed.value.trace
    assert f"DiLoCo diverged at worker {failure.worker}, step {failure.step}, " in str(failure)
    assert "not finite" in str(failure)
    assert [(i.worker, i.what) for i in trace.incidents] == [(failure.worker, "diverged")]
    assert Counter(event.worker for event in trace)[failure.worker] == failure.step
    assert bool(torch.isfinite(trace.column("loss")).all())
    assert list(trace) == seen


def test_diloco_converges_where_the_outer_step_is_as_long_as_the_peers_moved() -> None:
    """Where the published one diverges, the default does not."""
    product = ob.simulate(DiLoCo(HEAVY, period=8), Product(), ob.Cluster(N, UNEVEN), gradients=1200)
    assert product.figures["loss"] < 1e-6
    bowl = ob.simulate(DiLoCo(HEAVY, period=2), Quadratic(dtype="float32"), ob.Cluster(N, UNEVEN), gradients=1200)
    assert bowl.figures["distance"] < 0.2


@cache
def four(method: DiLoCo, seed: int) -> dict[str, float]:
    return ob.simulate(method, Digits(seed=seed), ob.Cluster(4), gradients=1600, seed=seed).figures


@SEEDS
def test_diloco_at_its_defaults_converges(seed: int) -> None:
    """Four peers, 400 gradients each."""
    assert four(DiLoCo(), seed)["accuracy"] > 0.95


def test_on_digits_the_published_outer_step_is_far_behind_with_inner_momentum_only() -> None:
    heavy, plain = DiLoCo(HEAVY, period=8), DiLoCo(PLAIN, period=8)
    assert four(heavy, 0)["loss"] < 0.1
    assert four(replace(heavy, **PUBLISHED), 0)["loss"] > 1
    assert four(replace(plain, **PUBLISHED), 0)["loss"] < 0.15


# ---------------------------------------------------------------- every server


SERVERS = [cls for cls in ob.methods.all_methods() if issubclass(cls, ob.ServerMethod)]
SUMS = [cls for cls in SERVERS if issubclass(cls, DanaZero)]
BOWL = Bowl()


def unchanged(a: Any, b: Any) -> bool:
    return all(map(torch.equal, tensors(a), tensors(b)))


@pytest.mark.parametrize("cls", SERVERS, ids=lambda cls: cls.__name__)
def test_workers_come_to_a_server_and_go_in_random_order(cls: type[ob.ServerMethod]) -> None:
    """Fifty come and go again, with visits between. Who comes moves no master, who goes neither (of backup workers it
    may end a round); who goes at once leaves nothing; DANA's running sum is the sum over those who are there; and
    whoever is there, somebody need not wait."""
    server, rng = ParameterServer.start(cls(), BOWL.x0()), Random(7)
    method, inside, free = server.method, dict[int, Any](), set[int]()
    steps: dict[int, int] = defaultdict(int)
    coming = list(range(50))

    def pull(replies: dict[int, Any]) -> None:
        for i, reply in replies.items():
            inside[i] = method.pull(inside[i], reply)
            free.add(i)

    while coming or inside:
        before, x = server.state, server.x()
        if coming and (not inside or rng.random() < 0.25):
            server.join(100)
            assert torch.equal(server.x(), x)
            assert server.leave(100) == {}
            assert unchanged(server.state, before)
            i = coming.pop(0)
            inside[i] = method.init(server.join(i))
            free.add(i)
            assert torch.equal(server.x(), x)
        elif rng.random() < 0.2:
            gone = rng.choice(sorted(inside))
            del inside[gone]
            free.discard(gone)
            pull(server.leave(gone))
            assert torch.equal(server.x(), x) or cls is BackupWorkers
        else:
            i = rng.choice(sorted(free))
            for _ in range(method.length(inside[i])):
                g = 0.05 * BOWL.grad(method.params(inside[i]), i, steps[i])[0]
                inside[i] = method.local(inside[i], g)
                steps[i] += 1
            free.remove(i)
            pull(server.visit(i, method.push(inside[i])))
        assert set(server.own) == set(inside)
        assert free or not inside
        if cls in SUMS:
            running, summed = server.state.mover, sum((own.mover for own in server.own.values()), ZERO)
            assert float((running - summed).norm()) <= 1e-13 * max(1.0, float(running.norm()))
        assert all(bool(torch.isfinite(t).all()) for t in tensors((server.state, tuple(inside.values()))))
    assert len(SUMS) == 3
    assert sum(steps.values()) > 100
    assert float((server.x() - BOWL.x0()).norm()) > 0.01
