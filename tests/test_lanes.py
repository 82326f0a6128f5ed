"""Gradients of several workers in one call are those of each alone; runs and seeds side by side are those alone."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import mul

import pytest
import torch
from torch import Tensor, nn

import offbeat as ob
from offbeat.core.problem import Batched, Point
from offbeat.engines import lanes as lanes_module
from offbeat.engines.lanes import AUTO, Lanes
from offbeat.engines.simulator import Simulation, together
from offbeat.experiment import Grid, compare, rerun
from offbeat.failure import Diverged
from offbeat.tasks.tape import OFTEN, Function, Tapes

METHODS = [
    ob.methods.DanaZero(lr=0.01),
    ob.methods.EAMSGD(),
    ob.methods.SGP(),
    ob.methods.ADPSGD(),
    ob.methods.GoSGD(),
    ob.methods.SlowMo(),
]


class Noisy(nn.Module):
    """Draws random numbers in each of the ways in which modules do."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.1 * torch.randn_like(x) + 0.1 * torch.rand(x.shape[1:], dtype=x.dtype)
        return x + 0.1 * torch.empty_like(x).uniform_(-1, 1) * torch.bernoulli(torch.full_like(x, 0.5))


def convolutional() -> nn.Module:
    """Batch statistics of its own minibatch, and dropout from its own random numbers, for each worker."""
    features = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.3), Noisy(), nn.Flatten()
    return nn.Sequential(*features, nn.Linear(96, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 4))


def attentive() -> nn.Module:
    return nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(36, 4, 16, 0.2, batch_first=True), nn.Flatten(), nn.Linear(108, 4))  # fmt: skip


def plain() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.ReLU(), nn.Linear(16, 4))


def branching() -> nn.Module:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.detach().sum()) > 0 else -x

    return nn.Sequential(plain(), Branch())


class Behind(nn.Module):
    """A net, and what is done with its outputs."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.act = plain(), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


def backwards(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Does nothing forwards, and ``act`` with the gradient."""

    class Acting(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            return act(g)

    return Acting.apply  # type: ignore[no-any-return]


def flip(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs * torch.randint(2, (len(inputs), 1, 1, 1), generator=generator)


def problem(net: object = plain, augment: object = None, seed: int = 0) -> ob.Supervised:
    draw = torch.Generator().manual_seed(1)
    data = torch.randn(60, 3, 6, 6, generator=draw), torch.randint(4, (60,), generator=draw)
    loss = nn.functional.cross_entropy
    return ob.Supervised(net, loss, data, data, batch=10, dtype=torch.float64, augment=augment, seed=seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("augment", [None, flip])
@pytest.mark.parametrize("net", [plain, convolutional])
def test_each_lane_is_what_the_gradient_alone_is(net: object, augment: object) -> None:
    base = problem(net, augment)
    other = base.reseeded(7)
    points = [Point(p, p.x0() * (1 + worker / 10), worker, 3 * worker) for worker in range(3) for p in (base, other)]
    state = torch.get_rng_state()
    grads, losses = base.grads(points)
    assert torch.equal(torch.get_rng_state(), state)
    for point, g, loss in zip(points, grads, losses, strict=True):
        alone, its_loss = point.problem.grad(point.x, point.worker, point.step)
        torch.testing.assert_close(g, alone, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(loss, its_loss, rtol=1e-10, atol=1e-12)
    again, _ = base.grads(points[::-1])
    assert torch.equal(again.flip(0), grads)


def dense() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(108, 20), nn.Unflatten(1, (4, 5)))


def softened(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1)


DRAW = torch.Generator().manual_seed(2)
LABELS = torch.randint(4, (60, 5), generator=DRAW)
LABELS[torch.rand(60, 5, generator=DRAW) < 0.3] = -100  # which cross-entropy leaves out


@pytest.mark.parametrize("loss", [nn.functional.cross_entropy, softened])
@pytest.mark.parametrize(
    ("net", "targets"),
    [
        (plain, LABELS[:, 0]),
        (dense, LABELS),
        (plain, torch.rand(60, 4, generator=DRAW).double()),
        (dense, torch.rand(60, 4, 5, generator=DRAW).double()),
    ],
    ids=["some left out", "several a row", "probabilities", "several a row, probabilities"],
)
def test_a_loss_in_lanes_is_each_lane_s_mean(net: object, targets: Tensor, loss: object) -> None:
    whole = replace(problem(net), loss=loss, train=(problem().train[0], targets))  # type: ignore[arg-type, index]
    points = [Point(whole, whole.x0() * (1 + worker / 10), worker, worker) for worker in range(4)]
    for point, g, value in zip(points, *whole.grads(points), strict=True):
        alone, its_value = whole.grad(point.x, point.worker, point.step)
        torch.testing.assert_close(g, alone, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(value, its_value, rtol=1e-10, atol=1e-12)


def test_a_gradient_that_draws_late_is_noticed() -> None:
    """A module may draw its first random number at any call: then the lanes are taken again, each from its own."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.on = plain(), False

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            return x + torch.randn_like(x) if self.on else x

    base = problem(Late)
    points = [Point(base, base.x0(), worker, 0) for worker in range(3)]
    base.grads(points)
    base._live.module.on = True  # type: ignore[assignment]
    grads, _ = base.grads(points)
    for point, g in zip(points, grads, strict=True):
        torch.testing.assert_close(g, base.grad(point.x, point.worker, 0)[0], rtol=1e-10, atol=1e-12)


class Mixed(nn.Module):
    """Constants, writes in place, results of which a part is left, batch statistics, and what is computed for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.layer = nn.Linear(96, 8)
        self.register_buffer("mask", torch.arange(96.0) / 96)

    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x).flatten(1) * self.mask
        y[:, ::2] *= torch.tensor(0.5)
        best, _ = y.topk(3, 1)
        first, second = torch.split(self.layer(y), 4, 1)
        _ = second.exp().sum()
        return first.relu() + best.mean(1, keepdim=True)


@pytest.mark.parametrize("net", [plain, Mixed])
def test_what_is_played_back_is_what_was_recorded(net: Callable[[], nn.Module]) -> None:
    """The very bits, at other points, for other minibatches, and for other numbers of lanes in between."""
    played, called = problem(net), problem(net)
    called._live.tapes = Never()
    for call in range(OFTEN + 4):
        for lanes in (3, 2):
            points = [Point(played, played.x0() * (1 + call / 10 + w / 100), w, call) for w in range(lanes)]
            for ours, theirs in zip(played.grads(points), called.grads(points), strict=True):
                assert torch.equal(ours, theirs)
                assert not ours.requires_grad
    assert len(played._live.tapes.tapes) == 2


@pytest.mark.parametrize("net", [plain, Mixed, convolutional, attentive])
def test_a_gradient_that_is_played_back_is_the_gradient(net: Callable[[], nn.Module]) -> None:
    """The very bits, with what it draws, also where it is prepared for another thread."""
    played, called = problem(net, flip), problem(net, flip)
    called._live.tape = Never()
    state = torch.get_rng_state()
    prepared = 0
    for call in range(OFTEN + 4):
        x = played.x0() * (1 + call / 10)
        theirs = called.grad(x, 1, call)
        if gradient := played.prepare(Point(played, x, 1, call)):
            assert all(map(torch.equal, gradient(), theirs))
            prepared += 1
        assert all(map(torch.equal, played.grad(x, 1, call), theirs))
    assert len(played._live.tape.tapes) == 1
    assert prepared
    assert torch.equal(torch.get_rng_state(), state)


class Never(Tapes):
    def __call__(self, function: Function, *inputs: Tensor, **how: object) -> tuple[Tensor, ...]:
        return function(*inputs)


def through_lists(x: Tensor) -> tuple[Tensor, ...]:
    return (torch.tensor((x * 2).tolist()),)


def picks(x: Tensor) -> tuple[Tensor, ...]:
    return (x[x > 0].sum() + x,)


def draws(x: Tensor) -> tuple[Tensor, ...]:
    return (x + torch.native_dropout(x, 0.5, True)[0],)


def own(x: Tensor) -> tuple[Tensor, ...]:
    return (x + torch.rand(5, generator=torch.Generator().manual_seed(1)),)


def adds_up(x: Tensor) -> tuple[Tensor, ...]:
    total = torch.tensor(0.0)
    for part in x:
        total += part
    return total * x, total


def drops(x: Tensor) -> tuple[Tensor, ...]:
    return (nn.functional.dropout(x), torch.rand(3), torch.randint(1, 9, (4,)))


def test_a_recording_does_not_wait_for_torchs_compiler_to_be_loaded() -> None:
    """Which takes seconds, and a slow worker's straggler would multiply them."""
    script = f"""
import sys, offbeat as ob
problem = ob.tasks.Digits()
for step in range({OFTEN + 2}):
    problem.grad(problem.x0(), 0, step)
assert problem.problem._live.tape.tapes, "something is recorded"
print("torch._dynamo" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False"], done


@pytest.mark.parametrize(
    ("function", "plays"), [(through_lists, 0), (picks, 0), (draws, 0), (own, 0), (drops, 1), (adds_up, 1)]
)
def test_only_what_is_the_same_at_each_call_is_played_back(function: Function, plays: int) -> None:
    tapes, calls = Tapes((torch.default_generator,)), []

    def watched(x: Tensor) -> tuple[Tensor, ...]:
        calls.append(x)
        return function(x)

    for call in range(2 * OFTEN):
        x = torch.arange(-2.0, 3.0) + call
        state = torch.get_rng_state()
        came = tapes(watched, x)
        torch.set_rng_state(state)
        assert all(map(torch.equal, came, function(x)))
    assert len(tapes.tapes) == plays
    assert len(calls) == (OFTEN + 3 if plays else 2 * OFTEN + 1), "recorded once more, and compared at 5 and at 8"


def test_a_tape_holds_no_more_than_is_needed() -> None:
    """What is played is freed as soon as nothing needs it, and a recording holds nothing."""

    def chain(x: Tensor) -> tuple[Tensor, ...]:
        alive.clear()
        for _ in range(5):
            x = x.sin()
            alive.append(weakref.ref(x))
        return (x,)

    alive: list[weakref.ref[Tensor]] = []
    tapes = Tapes()
    for _ in range(OFTEN + 1):
        tapes(chain, torch.ones(3))
    assert not any(ref() is not None for ref in alive)
    (play,) = tapes.tapes.values()
    assert play.__code__.co_nlocals == 7


def test_a_reseeded_problem_is_the_problem_with_that_seed() -> None:
    base, fresh = problem(convolutional).reseeded(5), problem(convolutional, seed=5)
    assert base.kin() is not fresh.kin()
    assert torch.equal(base.x0(), fresh.x0())
    assert all(map(torch.equal, base.grad(base.x0(), 2, 9), fresh.grad(base.x0(), 2, 9)))
    assert base.evaluate(base.x0()) == fresh.evaluate(base.x0())


def test_what_a_seed_makes_besides_the_parameters_is_not_shared() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = plain()
            self.register_buffer("mask", torch.rand(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.mask

    base = problem(Frozen)
    other = base.reseeded(1)
    assert other.kin() is not base.kin()
    assert torch.equal(other.grad(other.x0(), 0, 0)[0], problem(Frozen, seed=1).grad(other.x0(), 0, 0)[0])


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_run_in_lanes_is_the_run_one_by_one(method: ob.Method) -> None:
    cluster = ob.Cluster(4, ob.Gamma(1.0, 0.3), faults=(ob.Crashes(0.02, 3.0),))
    runs = [ob.simulate(method, problem(convolutional), cluster, gradients=60, lanes=n) for n in (1, 3, 100)]
    for run in runs[1:]:
        torch.testing.assert_close(run.x, runs[0].x, rtol=1e-8, atol=1e-10)
        for name in ("seconds", "worker", "step", "lag"):
            assert torch.equal(run.trace.column(name), runs[0].trace.column(name))
        torch.testing.assert_close(run.trace.column("loss"), runs[0].trace.column("loss"), rtol=1e-8, atol=1e-10)
    assert [run.trace.header["lanes"] for run in runs] == [1, 3, 4], "what was taken"
    again = ob.simulate(method, problem(convolutional), cluster, gradients=60, lanes=4)
    assert again.trace == runs[2].trace
    assert torch.equal(again.x, runs[2].x)


def test_seeds_side_by_side_are_the_seeds_alone() -> None:
    """Also where one of them fails: it takes nobody along."""
    method, base = ob.methods.DanaZero(lr=0.01), ob.tasks.Digits()
    tasks = [base, base.reseeded(1), base.reseeded(2)]
    methods = [method, replace(method, lr=1e30), method]
    grids = [Simulation(m, task, ob.Cluster(4), 80, task.seed, None, 8) for m, task in zip(methods, tasks, strict=True)]
    came = together(grids)
    assert isinstance(came[1], Diverged)
    for k in (0, 2):
        alone = ob.simulate(method, ob.tasks.Digits(seed=k), ob.Cluster(4), gradients=80, seed=k, lanes=8)
        run = came[k]
        assert isinstance(run, ob.Run)
        torch.testing.assert_close(run.x, alone.x, rtol=1e-3, atol=1e-5)
        assert torch.equal(run.trace.column("worker"), alone.trace.column("worker"))


class Counting:
    """A problem that takes gradients at a pace of its own, alone or together, and counts how."""

    def __init__(self, alone: float, each: float) -> None:
        self.cost = {"alone": alone, "each": each}
        self.calls: list[int] = []

    def x0(self) -> Tensor:
        return torch.zeros(3)

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        self.calls.append(1)
        clock.now += self.cost["alone"]
        return x + 1, torch.zeros(())

    def grads(self, points: Sequence[Point]) -> tuple[Tensor, Tensor]:
        self.calls.append(len(points))
        clock.now += self.cost["each"] * len(points)
        return torch.stack([p.x + 1 for p in points]), torch.zeros(len(points))

    def kin(self) -> object:
        return self

    def reseeded(self, seed: int) -> Counting:
        return self

    def prepare(self, point: Point) -> None:
        return None

    def room(self, point: Point) -> int:
        return 6

    def evaluate(self, x: Tensor) -> dict[str, float]:
        return {}


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


clock = Clock()


@pytest.mark.parametrize(
    ("alone", "each", "gradients", "lanes"),
    [(0.001, 0.0005, 1000, 6), (0.001, 0.001, 1000, 1), (0.001, 0.002, 1000, 1), (1.0, 0.1, 200, 1), (1.0, 0.1, 2000, 6)],
    ids=["faster", "as fast", "slower", "too dear to try", "dear, in a long run"],
)  # fmt: skip
def test_lanes_are_taken_where_they_are_measured_to_be_faster(
    alone: float, each: float, gradients: int, lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes_module, "time", clock)
    counted = Counting(alone, each)
    assert isinstance(counted, Batched)
    points = [Point(counted, counted.x0(), worker, 0) for worker in range(8)]
    takes = Lanes(counted, AUTO, 1, gradients)
    assert len(takes(points)) == takes.taken == lanes
    counted.calls.clear()
    assert len(takes(points)) == lanes
    assert counted.calls == [lanes], "it is tried once"


def test_by_default_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a clock was read, the result could depend on what else the machine does."""

    def read() -> float:
        raise AssertionError("a clock is read")

    for name in ("perf_counter", "monotonic", "process_time", "thread_time", "time"):
        monkeypatch.setattr(time, name, read)
        monkeypatch.setattr(time, f"{name}_ns", read)
    run = ob.simulate(ob.methods.DanaZero(lr=0.01), ob.tasks.Digits(), ob.Cluster(4), gradients=60, evaluate_every=20)
    assert {name: run.trace.header[name] for name in ("lanes", "abreast")} == {"lanes": 1, "abreast": 1}
    grid = Grid(
        methods=("asgd", "sgp"), workers=(2,), seeds=(0, 1), gradients=30, evaluations=1, task=ob.tasks.Digits()
    )
    assert {cell.trace.header["lanes"] for cell in compare(grid, jobs=1).cells} == {1}


def test_a_trial_s_warnings_are_dropped_and_a_module_s_own_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The later, the slower, so that lanes are not taken; or the faster. What they cost is said by no later call either."""

    class Warns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(108, 4)

        def forward(self, x: Tensor) -> Tensor:
            warnings.warn("the module's own", UserWarning, stacklevel=1)
            q = x.reshape(len(x), 1, 9, 12)
            return self.layer(nn.functional.scaled_dot_product_attention(q, q, q).flatten(1))

    for lanes, took in (
        (1, map(float, itertools.accumulate(itertools.repeat(9), mul))),
        (4, itertools.count(9.0, -1.0)),
    ):
        monkeypatch.setattr(lanes_module, "_timed", lambda act, took=took: (act(), next(took)))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run = ob.simulate(ob.methods.ASGD(lr=0.01), problem(Warns), ob.Cluster(4), gradients=400, lanes="auto")
        assert run.trace.header["lanes"] == lanes
        assert {str(each.message) for each in said} == {"the module's own"}


@pytest.mark.parametrize("net", [branching, attentive])
def test_what_is_impossible_or_another_result_in_lanes_is_done_one_by_one(net: object) -> None:
    """A module that branches on a value; one whose dropout draws in the order of a memory layout that lanes change."""
    run = ob.simulate(ob.methods.ASGD(lr=0.01), problem(net), ob.Cluster(4), gradients=200, lanes="auto")
    assert run.trace.header["lanes"] == 1


def test_a_comparison_takes_lanes_for_all_seeds_and_does_not_depend_on_how_it_is_cut() -> None:
    grid = Grid(methods=("asgd", "sgp"), workers=(4,), seeds=(0, 1, 2), gradients=60, task=ob.tasks.Digits())
    assert [len(keys) for keys in grid.batches(grid.lanes(50))] == [3, 3]
    assert [len(keys) for keys in grid.batches(grid.lanes(1))] == [1] * 6
    for lanes in (1, 50):
        results = [compare(grid, jobs=jobs, lanes=lanes) for jobs in (1, 2)]
        for a, b in zip(results[0].cells, results[1].cells, strict=True):
            assert a.key == b.key
            assert a.trace == b.trace
            assert (a.trace.header["lanes"] > 1) == (lanes > 1)


def test_a_trace_of_lanes_runs_again_to_the_same_bits() -> None:
    run = ob.simulate(ob.methods.DanaZero(lr=0.01), ob.tasks.Digits(), ob.Cluster(4), gradients=100, lanes=4)
    assert rerun(run.trace).trace == run.trace


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_run_abreast_is_the_run_one_by_one(method: ob.Method) -> None:
    """Dropout, batch statistics and augmentation included, and with evaluations in the middle."""
    cluster = ob.Cluster(4, ob.Gamma(1.0, 0.3), faults=(ob.Crashes(0.02, 3.0),))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    runs = [
        ob.simulate(method, problem(convolutional, flip), cluster, gradients=60, evaluate_every=7, abreast=n)
        for n in (1, 3, 3)
    ]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(runs[1].x, runs[0].x, rtol=1e-8, atol=1e-10)
    for name in ("seconds", "worker", "step", "lag"):
        assert torch.equal(runs[1].trace.column(name), runs[0].trace.column(name))
    assert runs[2].trace == runs[1].trace
    assert [run.trace.header["abreast"] for run in runs] == [1, 3, 3]


def test_seeds_abreast_are_the_seeds_alone() -> None:
    base, method, cluster = problem(convolutional), ob.methods.DanaZero(lr=0.01), ob.Cluster(4)
    tasks = [base, base.reseeded(1)]
    came = together([Simulation(method, task, cluster, 40, task.seed, abreast=2) for task in tasks])
    for task, run in zip(tasks, came, strict=True):
        assert isinstance(run, ob.Run)
        assert run.trace == ob.simulate(method, task, cluster, gradients=40, seed=task.seed, abreast=2).trace


def test_what_draws_in_the_backward_pass_draws_the_same_abreast() -> None:
    """As in stochastic rounding."""
    runs = [
        ob.simulate(
            ob.methods.ASGD(lr=0.01), problem(lambda: Behind(backwards(rough))), ob.Cluster(4), gradients=30, abreast=n
        )
        for n in (1, 2)
    ]
    torch.testing.assert_close(runs[1].x, runs[0].x, rtol=1e-10, atol=1e-12)


def rough(g: Tensor) -> Tensor:
    return g + torch.rand_like(g)


def test_who_draws_from_torch_s_generator_disturbs_nothing_abreast() -> None:
    """A callback's numbers are its own, and the run's are the run's, though there is one generator."""

    def run(watch: Callable[[object], object] | None) -> ob.Trace:
        method, cluster = ob.methods.ASGD(lr=0.01), ob.Cluster(4)
        return ob.simulate(method, problem(convolutional), cluster, gradients=80, abreast=2, watch=watch).trace

    quiet, drawn = run(None), list[Tensor]()
    torch.manual_seed(3)
    assert run(lambda event: drawn.append(torch.rand(2))) == quiet
    torch.manual_seed(3)
    assert torch.equal(torch.stack(drawn), torch.stack([torch.rand(2) for _ in drawn]))


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:.*changes its buffers.*weight_u")
def test_what_cannot_be_copied_or_recorded_is_simulated_abreast(norm: Callable[[nn.Module], nn.Module]) -> None:
    """The old kind of norm puts a tensor with a history into the module."""

    def net() -> nn.Module:
        return nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(64, 4)))

    runs = [
        ob.simulate(ob.methods.ASGD(lr=0.01), problem(net), ob.Cluster(4), gradients=40, **how)
        for how in ({"lanes": 1}, {"abreast": 2}, {"lanes": "auto"})
    ]
    for run in runs:
        torch.testing.assert_close(run.x, runs[0].x, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("seconds", "abreast"), [((3.0, 4.0, 3.2), 2), ((3.0, 4.0, 3.4), 1)], ids=["slower", "faster"])
def test_gradients_are_taken_abreast_where_one_by_one_is_measured_to_be(
    seconds: tuple[float, ...], abreast: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One by one, and in two rounds abreast."""
    took = itertools.cycle(seconds)
    monkeypatch.setattr(lanes_module, "_timed", lambda act: (act(), next(took)))
    base, before = problem(convolutional), torch.get_num_threads()
    points = [Point(base, base.x0(), worker, 0) for worker in range(4)]
    torch.set_num_threads(2)
    try:
        assert lanes_module._tried_abreast(base, points, 25) == abreast
        assert lanes_module._tried_abreast(base, points, 24) == 1, "too dear to try"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class Meeting:
    """A problem whose gradients wait for each other, two and two."""

    def __init__(self) -> None:
        self.both = threading.Barrier(2, timeout=60)

    def x0(self) -> Tensor:
        return torch.zeros(3)

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        return x + 1, torch.zeros(())

    def grads(self, points: Sequence[Point]) -> tuple[Tensor, Tensor]:
        raise AssertionError("nobody asks for lanes")

    def prepare(self, point: Point) -> Callable[[], tuple[Tensor, Tensor]]:
        def gradient() -> tuple[Tensor, Tensor]:
            self.both.wait()
            return self.grad(point.x, point.worker, point.step)

        return gradient

    def kin(self) -> object:
        return self

    def reseeded(self, seed: int) -> Meeting:
        return self

    def room(self, point: Point) -> int:
        return 1

    def evaluate(self, x: Tensor) -> dict[str, float]:
        return {}


def test_gradients_abreast_are_taken_at_the_same_time() -> None:
    run = ob.simulate(ob.methods.ASGD(lr=0.01), Meeting(), ob.Cluster(2, ob.Fixed(1.0)), gradients=6, abreast=2)
    assert len(run.trace) == 6


def test_an_error_in_a_gradient_abreast_is_the_caller_s() -> None:
    def fail(outputs: Tensor) -> Tensor:
        raise KeyError("what the module says")

    threads = torch.get_num_threads()
    with pytest.raises(KeyError, match="what the module says"):
        ob.simulate(ob.methods.ASGD(lr=0.01), problem(lambda: Behind(fail)), ob.Cluster(4), gradients=20, abreast=2)
    assert torch.get_num_threads() == threads


def test_lanes_abreast_are_refused() -> None:
    with pytest.raises(ValueError, match="one of them must be 1"):
        ob.simulate(ob.methods.ASGD(), problem(), ob.Cluster(4), gradients=9, lanes=2, abreast=2)


@pytest.mark.parametrize("lanes", [0, -1, 1.5, "2", None])
def test_a_wrong_number_of_lanes_is_refused(lanes: object) -> None:
    with pytest.raises(ValueError, match="lanes"):
        ob.simulate(ob.methods.ASGD(), ob.tasks.Quadratic(), gradients=1, lanes=lanes)  # type: ignore[arg-type]


def test_a_problem_that_takes_one_gradient_at_a_time_is_asked_for_one() -> None:
    run = ob.simulate(ob.methods.ASGD(lr=0.01), ob.tasks.Quadratic(), ob.Cluster(3), gradients=9, lanes=4)
    assert run.trace.header["lanes"] == 1
