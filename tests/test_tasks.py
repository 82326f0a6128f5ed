"""Problems are pure functions, gradients are autograd's, and data is what it claims to be."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import re
import struct
import threading
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from offbeat.core.problem import Problem
from offbeat.tasks import (
    TASKS,
    DataCorrupt,
    DataDiffers,
    DataMissing,
    Digits,
    Flat,
    Mnist,
    Quadratic,
    Supervised,
    data,
    mnist,
    supervised,
)

N, BATCH = 70, 8


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def examples(n: int = N, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g)
    return x, (x.sum(1) > 0).long() + (x[:, 0] > 0).long()


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3))


def jitter(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs.add_(torch.randn(inputs.shape, generator=generator, dtype=inputs.dtype))


def problem(model=plain, **fields) -> Supervised:
    given = {"train": examples(), "test": examples(40, 1), "batch": BATCH, "dtype": torch.float64} | fields
    return Supervised(model=model, loss=F.cross_entropy, **given)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


pure = pytest.mark.parametrize(
    "make",
    [
        partial(problem, plain),
        partial(problem, noisy),
        partial(problem, noisy, augment=jitter),
        Digits,
        Quadratic,
        partial(Quadratic, noise=0.5, dtype="float32"),
    ],
    ids=["plain", "noisy", "augmented", "digits", "quadratic", "quadratic32"],
)


# --- purity


@pure
def test_a_gradient_is_a_pure_function(make):
    a, b = make(), make()
    assert isinstance(a, Problem)
    x = a.x0()
    y = x + 0.1
    calls = [(x, 0, 0), (y, 0, 1), (x, 1, 0), (x, 0, 25), (y, 3, 200)]
    first = [a.grad(*call) for call in calls]
    evaluated = a.evaluate(x)
    torch.rand(7)  # unrelated use of the global generator
    a.evaluate(y)
    for call, got in reversed(list(zip(calls, first, strict=True))):
        assert same(a.grad(*call), got)
        assert same(b.grad(*call), got)
    assert a.evaluate(x) == evaluated == b.evaluate(x)
    assert torch.equal(a.x0(), x)
    assert torch.equal(b.x0(), x)


@pure
def test_steps_workers_and_seeds_differ(make):
    p = make()
    x = p.x0() + 0.01
    grads = [p.grad(x, w, s)[0] for w in range(3) for s in (0, 1, 2, 40, 41)]
    grads += [replace(p, seed=1).grad(x, 0, 0)[0]]
    for i, g in enumerate(grads):
        assert not any(torch.equal(g, h) for h in grads[:i])


@pure
def test_the_caller_keeps_its_random_state_and_its_x(make):
    torch.manual_seed(5)
    torch.rand(3)
    before = torch.get_rng_state()
    p = make()
    x = p.x0()
    kept = x.clone()
    g, loss = p.grad(x, 0, 0)
    p.evaluate(x)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, kept)
    assert torch.equal(p.x0(), kept)
    assert g.shape == x.shape
    assert g.dtype == x.dtype
    assert loss.shape == ()
    assert not g.requires_grad
    assert not loss.requires_grad
    again = g.clone()
    p.grad(x, 0, 1)
    assert torch.equal(g, again), "the gradient is a new tensor"
    torch.manual_seed(5)
    torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_and_augmentation_draw_for_each_worker_and_step():
    # With one batch per pass and the rows sorted, only dropout or augmentation can make a difference.
    everything = {"train": examples(BATCH), "batch": BATCH}
    p = problem(lambda: nn.Sequential(nn.Dropout(0.5), plain()), **everything)
    x = p.x0()
    losses = {float(p.grad(x, w, s)[1]) for w in range(2) for s in range(4)}
    assert len(losses) == 8
    q = problem(augment=jitter, **everything)
    rows = [q.minibatch(0, s)[0].sum().item() for s in range(4)]
    assert len(set(rows)) == 4
    assert torch.equal(q.train[0], examples(BATCH)[0]), "augmenting in place leaves the data alone"
    sure = problem(**everything)
    assert len({round(float(sure.grad(x, 0, s)[1]), 9) for s in range(4)}) == 1


def test_augmentation_may_use_the_default_generator():
    p = problem(augment=lambda inputs, _: inputs + torch.randn_like(inputs))
    batch = p.minibatch(0, 3)
    torch.rand(1)
    assert same(p.minibatch(0, 3), batch)
    assert not torch.equal(p.minibatch(0, 4)[0], batch[0])


def test_a_failing_loss_leaves_the_problem_and_the_generator_as_they_were():
    fail = [False]

    def loss(out: Tensor, y: Tensor) -> Tensor:
        if fail[0]:
            raise KeyError("user")
        return F.cross_entropy(out, y)

    p = Supervised(noisy, loss, examples(), examples(), batch=BATCH)
    x = p.x0()
    good, figures, state = p.grad(x, 0, 0), p.evaluate(x), torch.get_rng_state()
    fail[0] = True
    for call in (partial(p.grad, x, 0, 0), partial(p.evaluate, x)):
        with pytest.raises(KeyError, match="user"):
            call()
    fail[0] = False
    assert torch.equal(torch.get_rng_state(), state)
    assert same(p.grad(x, 0, 0), good)
    assert p.evaluate(x) == figures


def test_threads_get_what_one_thread_gets():
    p, q = problem(noisy, augment=jitter), problem(noisy)
    x = p.x0()
    expected = {(r, w, s): r.grad(x + w, w, s) for r in (p, q) for w in range(3) for s in range(8)}
    wrong = []

    def work(r: Supervised, w: int) -> None:
        wrong.extend((w, s) for s in range(8) if not same(r.grad(x + w, w, s), expected[r, w, s]))

    threads = [threading.Thread(target=work, args=(r, w)) for r in (p, q) for w in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_gradients_work_where_the_caller_switched_them_off():
    p = problem()
    with torch.no_grad():
        g = p.grad(p.x0().requires_grad_(), 0, 0)
    assert same(g, p.grad(p.x0(), 0, 0))


# --- correctness


def test_the_gradient_is_autograds():
    p = problem()
    x = p.x0() + 0.3
    net = plain().double()
    vector_to_parameters(x, net.parameters())
    for worker, step in [(0, 0), (2, 11), (0, 5)]:
        inputs, targets = p.minibatch(worker, step)
        net.zero_grad()
        loss = F.cross_entropy(net(inputs), targets)
        loss.backward()
        g, got = p.grad(x, worker, step)
        torch.testing.assert_close(g, torch.cat([q.grad.flatten() for q in net.parameters()]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got, loss.detach())


def test_the_gradient_is_a_finite_difference_of_the_loss():
    p = problem(noisy)
    x = p.x0()
    v = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    h = 1e-6
    slope = (p.grad(x + h * v, 1, 2)[1] - p.grad(x - h * v, 1, 2)[1]) / (2 * h)
    torch.testing.assert_close(p.grad(x, 1, 2)[0] @ v, slope, rtol=1e-6, atol=1e-8)


def test_a_pass_shows_each_example_once_and_passes_differ():
    inputs = torch.arange(float(N)).unsqueeze(1)
    p = problem(train=(inputs, torch.zeros(N, dtype=torch.long)))
    steps = N // BATCH

    def seen(worker: int, turn: int) -> list[float]:
        return [v for s in range(steps) for v in p.minibatch(worker, turn * steps + s)[0].flatten().tolist()]

    orders = [seen(w, t) for w in range(2) for t in range(2)]
    for order in orders:
        assert len(order) == len(set(order)) == steps * BATCH
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert set(orders[0]) != set(orders[1]), "what a pass drops differs"


def test_evaluate_is_the_mean_over_the_whole_test_set(monkeypatch):
    p = problem()
    x = p.x0() + 0.1
    whole = p.evaluate(x)
    net = plain().double()
    vector_to_parameters(x, net.parameters())
    inputs, targets = p.test
    out = net(inputs.double())
    assert whole["loss"] == pytest.approx(F.cross_entropy(out, targets).item())
    assert whole["accuracy"] == pytest.approx((out.argmax(1) == targets).double().mean().item())
    monkeypatch.setattr(supervised, "CHUNK", 7)
    assert p.evaluate(x) == pytest.approx(whole)


def test_metrics_are_yours_or_the_accuracy_where_there_are_labels():
    assert set(problem().evaluate(problem().x0())) == {"loss", "accuracy"}
    assert set(problem(metrics={}).evaluate(problem().x0())) == {"loss"}
    mine = problem(metrics={"top2": lambda out, y: (out.topk(2).indices == y[:, None]).any(1).double().mean()})
    assert 0 <= mine.evaluate(mine.x0())["top2"] <= 1
    x, y = examples()
    regression = Supervised(
        lambda: nn.Linear(6, 1), lambda o, t: F.mse_loss(o[:, 0], t), (x, y.float()), (x, y.float())
    )
    assert set(regression.evaluate(regression.x0())) == {"loss"}


# --- batch normalisation and other buffers


def test_running_statistics_are_no_parameters_and_are_recomputed_for_evaluation():
    p = problem(noisy, batch=10)
    x = p.x0() + 0.2
    assert x.numel() == sum(q.numel() for q in noisy().parameters())
    fresh = p.evaluate(x)
    for step in range(30):
        p.grad(x * step, 0, step)
    assert p.evaluate(x) == fresh

    net = noisy().double()
    vector_to_parameters(x, net.parameters())
    norm = net[1]
    norm.momentum = None
    net.eval()
    norm.train()
    live = p._live
    for index in live.order(supervised._SAMPLE, p.seed).split(10)[: N // 10]:
        net(p.train[0][index].double())
    net.eval()
    assert norm.num_batches_tracked == N // 10
    expected = F.cross_entropy(net(p.test[0].double()), p.test[1]).item()
    assert fresh["loss"] == pytest.approx(expected, rel=1e-9)


def test_statistics_that_the_module_freezes_stay():
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(6), nn.Linear(6, 3)
            self.norm.running_mean.fill_(0.5)

        def train(self, mode: bool = True) -> Frozen:
            super().train(mode)
            self.norm.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.norm(x))

    p = problem(Frozen)
    p.grad(p.x0(), 0, 0)
    p.evaluate(p.x0())
    assert p._live.module.norm.running_mean.eq(0.5).all()


@pytest.mark.filterwarnings("ignore:.*changes its buffers calls, inner")
def test_other_buffers_do_not_leak_either():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 3))  # an iteration kept in buffers
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1  # another tensor in its place
            return self.inner(x) * self.calls

    p = problem(Counting)
    x = p.x0()
    first, figures = p.grad(x, 0, 0), p.evaluate(x)
    p.grad(x, 0, 1)
    assert same(p.grad(x, 0, 0), first)
    assert p.evaluate(x) == figures


# --- Flat


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x))


def test_flat_views_parameters_and_takes_gradients():
    net = plain()
    vector = parameters_to_vector(net.parameters()).detach().clone()
    flat = Flat(net)
    assert torch.equal(flat.data, vector)
    assert torch.equal(parameters_to_vector(net.parameters()), vector)
    x, y = examples()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in net.parameters()])
    grad = flat.take_gradient()
    assert torch.equal(grad, expected)
    assert all(p.grad is None for p in net.parameters())
    flat.data.sub_(0.1 * grad)
    assert F.cross_entropy(net(x), y) < loss
    assert torch.equal(parameters_to_vector(net.parameters()), flat.data)
    F.cross_entropy(net[2](torch.zeros(1, 12)), torch.zeros(1, dtype=torch.long)).backward()
    assert flat.take_gradient()[: 6 * 12 + 12].count_nonzero() == 0, "a missing gradient counts as 0"


def test_flat_takes_tied_parameters_once_and_leaves_frozen_ones_out():
    tied, words = Tied(), torch.tensor([0, 3])
    (expected,) = torch.autograd.grad(tied(words).square().sum(), tied.parameters())
    flat = Flat(tied)
    assert flat.data.numel() == 20
    assert tied.out.weight is tied.embed.weight
    tied(words).square().sum().backward()
    torch.testing.assert_close(flat.take_gradient(), expected.flatten())
    net = plain()
    net[0].requires_grad_(False)
    weight = net[0].weight.clone()
    flat = Flat(net)
    assert flat.data.numel() == 12 * 3 + 3
    flat.data.zero_()
    assert torch.equal(net[0].weight, weight)


def test_flat_gathers_sparse_gradients():
    net = nn.Embedding(5, 4, sparse=True)
    flat = Flat(net)
    net(torch.tensor([1, 1, 3])).sum().backward()
    assert net.weight.grad.is_sparse
    assert flat.take_gradient().view(5, 4).sum(1).tolist() == [0, 8, 0, 4, 0]


def test_flat_orders_channels_last_parameters_as_any_other():
    a, b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    b.load_state_dict(a.state_dict())
    b.to(memory_format=torch.channels_last)
    assert not b.weight.is_contiguous()
    x = torch.randn(2, 3, 8, 8)
    flats = [Flat(a), Flat(b)]
    a(x).square().sum().backward()
    b(x.to(memory_format=torch.channels_last)).square().sum().backward()
    assert torch.equal(flats[0].data, flats[1].data)
    torch.testing.assert_close(flats[0].take_gradient(), flats[1].take_gradient(), rtol=1e-4, atol=1e-4)


def test_flat_refuses_what_is_no_vector():
    mixed = plain()
    mixed[2].double()
    with pytest.raises(ValueError, match=r"2\.weight is torch\.float64.*module\.to") as error:
        Flat(mixed)
    assert "0.weight is torch.float32" in str(error.value)
    mixed[2].requires_grad_(False)
    Flat(mixed)
    away = plain()
    away[0].to("meta")
    with pytest.raises(ValueError, match="mixes dtypes or devices"):
        Flat(away)
    with pytest.raises(ValueError, match="ReLU has no trainable parameters"):
        Flat(nn.ReLU())
    with pytest.raises(ValueError, match=r"without a shape \(weight, bias\)"):
        Flat(nn.LazyLinear(3))
    waves = nn.ParameterDict({"w": torch.zeros(3, dtype=torch.complex64), "v": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"complex parameters \(w\).*torch\.view_as_real"):
        Flat(waves)
    pair = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    pair[1].weight.data = pair[0].weight.data
    with pytest.raises(ValueError, match="same memory"):
        Flat(pair)


# --- a user's own problem


def test_a_problem_in_under_ten_lines_trains():
    x, y = examples(200)
    p = Supervised(
        model=lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)),
        loss=nn.functional.cross_entropy,
        train=(x, y),
        test=examples(100, 1),
    )
    at = p.x0()
    for step in range(150):
        at = at - 0.5 * p.grad(at, 0, step)[0]
    assert p.evaluate(at)["accuracy"] > 0.9


class Pairs(Dataset):
    """Items as users give them: a tensor and a number; a random one draws from torch."""

    def __init__(self, n: int = N, random: bool = False) -> None:
        self.pairs, self.random, self.reads = list(zip(*examples(n), strict=True)), random, 0

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.reads += 1
        x, y = self.pairs[i]
        return (x + torch.randn(6) if self.random else x), int(y)


def test_a_dataset_is_the_same_as_its_tensors(monkeypatch):
    expected = problem()
    x = expected.x0()
    pairs = Pairs()
    held = problem(train=pairs)
    assert same(held.grad(x, 1, 12), expected.grad(x, 1, 12))
    reads = pairs.reads
    held.grad(x, 1, 13)
    assert pairs.reads == reads, "read once"
    assert same(problem(train=TensorDataset(*examples())).grad(x, 0, 0), expected.grad(x, 0, 0))
    monkeypatch.setattr(supervised, "HELD", 100)  # too big to hold
    lazy = problem(train=Pairs(), test=Pairs())
    assert same(lazy.grad(x, 1, 12), expected.grad(x, 1, 12))
    assert lazy.evaluate(x) == problem(test=examples()).evaluate(x)


def test_random_items_are_drawn_again_at_each_step():
    p = problem(train=Pairs(BATCH, random=True))
    x = p.x0()
    one = p.grad(x, 0, 0)
    assert len({float(p.grad(x, 0, s)[1]) for s in range(4)}) == 4
    assert same(p.grad(x, 0, 0), one)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": N + 1}, rf"Supervised\.batch = {N + 1}: choose 1 to {N}"),
        ({"batch": 0}, "batch = 0"),
        ({"seed": 0.5}, "seed = 0.5"),
        ({"dtype": torch.int64}, "floating-point"),
        ({"train": (torch.zeros(3, 6), torch.zeros(4))}, r"train = \[3, 4\]"),
        ({"test": (torch.zeros(0, 6), torch.zeros(0))}, "at least one example"),
        ({"train": 3}, "train = 3"),
        ({"train": type("Stream", (IterableDataset,), {"__iter__": lambda self: iter(())})()}, "__getitem__"),
        ({"model": nn.Linear(6, 3)}, "a function that builds it"),
        ({"metrics": {"loss": F.cross_entropy}}, "another name"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        problem(**fields)


def test_items_that_are_no_pairs_are_refused():
    with pytest.raises(ValueError, match="pairs"):
        problem(train=TensorDataset(torch.zeros(N, 6))).x0()


# --- the library's own problems


VALUES = [Digits(), Digits(batch=7, hidden=3, seed=2, dtype="float64"), Mnist(batch=5), Quadratic(), Quadratic(d=1)]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_tasks_print_compare_and_pickle(value):
    again = eval(repr(value), {type(value).__name__: type(value)})
    assert again == value
    assert hash(again) == hash(value)
    assert replace(value, seed=9) != value
    if not isinstance(value, Mnist):
        g = value.grad(value.x0(), 0, 3)
        stored = pickle.dumps(value)
        assert len(stored) < 300, "what was built stays behind"
        thawed = pickle.loads(stored)
        assert thawed == value
        assert same(thawed.grad(value.x0(), 0, 3), g)


def test_a_users_problem_pickles_without_what_it_built():
    p = problem(noisy)
    g = p.grad(p.x0(), 0, 0)
    stored = pickle.dumps(p)
    again, fresh = (pickle.dumps(pickle.loads(each)) for each in (stored, pickle.dumps(problem(noisy))))
    assert len(again) == len(fresh)  # once more, as which equal strings are one object depends on where they came from
    assert same(pickle.loads(stored).grad(p.x0(), 0, 0), g)
    assert "tensor" not in repr(p)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (partial(Digits, batch=1438), "Digits.batch = 1438"),
        (partial(Digits, hidden=0), "Digits.hidden = 0"),
        (partial(Digits, dtype="float16"), "Digits.dtype = 'float16'"),
        (partial(Mnist, batch=0), "Mnist.batch = 0"),
        (partial(Mnist, seed=None), "Mnist.seed = None"),
        (partial(Mnist, dtype="half"), "Mnist.dtype = 'half'"),
        (partial(Quadratic, d=0), "Quadratic.d = 0"),
        (partial(Quadratic, condition=0.5), "Quadratic.condition = 0.5"),
        (partial(Quadratic, condition=float("nan")), "Quadratic.condition = nan"),
        (partial(Quadratic, noise=-1), "Quadratic.noise = -1"),
        (partial(Quadratic, noise=float("inf")), "Quadratic.noise = inf"),
    ],
)
def test_bad_values_of_tasks_are_refused(make, field):
    with pytest.raises(ValueError, match=field.replace(".", r"\.") + ": choose"):
        make()


def test_tasks_have_names_and_every_field_is_documented():
    import inspect
    from dataclasses import fields

    for name, task in TASKS.items():
        assert name == task.__name__.lower()
        bases = [base for base in task.__mro__ if f"{base.__module__}.".startswith("offbeat.")]
        source = "".join(map(inspect.getsource, bases))
        for f in fields(task):
            lines = re.findall(rf'^    {f.name}: .*\n    """.', source, re.M)
            assert lines, f"{name}.{f.name} has no docstring"


def test_digits_split_is_fixed_and_even():
    a = Digits()
    inputs, labels = a.problem.test
    assert len(labels) == 360
    assert len(a.problem.train[1]) == 1437
    assert labels.bincount().min() >= 34
    assert torch.equal(inputs, Digits(seed=5).problem.test[0])
    both = torch.cat([a.problem.train[0], inputs])
    assert abs(both.mean()) < 1e-3
    assert abs(both.std() - 1) < 1e-3
    assert dict(a.provenance) == {"sklearn.datasets.load_digits": "official"}


def test_digits_learns():
    p = Digits()
    x = p.x0()
    assert x.numel() == 75 * 128 + 10
    for step in range(300):
        x = x - 0.3 * p.grad(x, 0, step)[0]
    assert p.evaluate(x)["accuracy"] > 0.95


def test_digits_without_scikit_learn_says_what_to_install(monkeypatch):
    import sys

    from offbeat.tasks import digits

    digits.load.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"offbeat\[tasks\]"):
        Digits().x0()


def test_the_quadratics_optimum_has_zero_mean_gradient_and_loss():
    p = Quadratic(d=30, condition=100.0, noise=0.5)
    assert p.evaluate(p.optimum) == {"loss": 0.0, "distance": 0.0}
    grads = torch.stack([p.grad(p.optimum, w, s)[0] for w in range(20) for s in range(100)])
    assert grads.mean(0).abs().max() < 5 * 0.5 / 2000**0.5
    assert grads.std() == pytest.approx(0.5, rel=0.02)
    assert abs((grads[:-1] * grads[1:]).mean()) < 0.01, "steps are independent"


def test_the_quadratic_is_what_its_formula_says():
    p = Quadratic(d=5, condition=16.0, noise=0.0)
    torch.testing.assert_close(p.eigenvalues, torch.tensor([1, 1 / 2, 1 / 4, 1 / 8, 1 / 16], dtype=torch.float64))
    x = p.x0().requires_grad_()
    loss = p.grad(x, 0, 0)[1]
    loss.backward()
    torch.testing.assert_close(p.grad(x.detach(), 0, 0)[0], x.grad)
    assert p.evaluate(x.detach())["loss"] == pytest.approx(loss.item())
    assert Quadratic(d=1).eigenvalues.tolist() == [1.0]


# --- files of data


def small_mnist(place: Path, *, pack: bool = True, n: int = 80) -> dict[str, bytes]:
    """A well-formed set of the right shape, which is not MNIST."""
    g = torch.Generator().manual_seed(0)
    contents = {}
    for part in ("train", "t10k"):
        pixels = torch.randint(256, (n * 784,), generator=g).tolist()
        labels = torch.randint(10, (n,), generator=g).tolist()
        contents[f"{part}-images-idx3-ubyte"] = struct.pack(">4I", 0x803, n, 28, 28) + bytes(pixels)
        contents[f"{part}-labels-idx1-ubyte"] = struct.pack(">2I", 0x801, n) + bytes(labels)
    place.mkdir(parents=True)
    for name, content in contents.items():
        write(place, name, content, pack=pack)
    return contents


def write(place: Path, name: str, content: bytes, *, pack: bool = True) -> None:
    if pack:
        (place / f"{name}.gz").write_bytes(gzip.compress(content))
    else:
        (place / name).write_bytes(content)


@pytest.fixture
def away(monkeypatch, tmp_path):
    monkeypatch.setenv("OFFBEAT_DATA", str(tmp_path))
    return tmp_path


def test_the_data_folder_is_the_variables_or_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("OFFBEAT_DATA", str(tmp_path))
    assert data.folder() == tmp_path
    monkeypatch.delenv("OFFBEAT_DATA")
    assert data.folder().name == "offbeat"


def test_missing_data_says_what_to_get_and_where_to_put_it(away):
    with pytest.raises(DataMissing) as error:
        Mnist().x0()
    message = str(error.value)
    assert isinstance(error.value, FileNotFoundError)
    for part in (
        "train-images-idx3-ubyte",
        str(away / "mnist" / "train-images-idx3-ubyte.gz"),
        str(away / "MNIST/raw" / "train-images-idx3-ubyte"),
        "Y. LeCun",
        "torchvision.datasets.MNIST",
        f"put them in {away / 'mnist'}",
        "OFFBEAT_DATA",
    ):
        assert part in message
    small_mnist(away / "mnist")
    (away / "mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataMissing, match="t10k-labels-idx1-ubyte is missing"):
        Mnist().x0()


@pytest.mark.parametrize(
    ("place", "pack"), [("mnist", True), ("mnist", False), ("MNIST/raw", True), ("MNIST/raw", False)]
)
def test_other_content_warns_once_and_is_recorded(away, place, pack):
    contents = small_mnist(away / place, pack=pack)
    p = Mnist(batch=20)
    with pytest.warns(DataDiffers, match="MNIST: not the published content") as caught:
        x = p.x0()
    assert len(caught) == 1
    assert all(str(away / place / name) in str(caught[0].message) for name in contents)
    assert dict(p.provenance) == {n: f"differs: sha256 {hashlib.sha256(c).hexdigest()}" for n, c in contents.items()}
    images, labels = p.problem.train
    assert images.shape == (80, 1, 28, 28)
    assert bytes(images.flatten().tolist()) == contents["train-images-idx3-ubyte"][16:]
    assert bytes(labels.tolist()) == contents["train-labels-idx1-ubyte"][8:]
    same_again = Mnist(batch=20, seed=1)
    assert same_again.problem.train[0] is images, "held once per process"
    state = torch.get_rng_state()
    one = p.grad(x, 0, 1)
    torch.rand(2)
    assert same(p.grad(x, 0, 1), one)
    assert torch.equal(Mnist(batch=20).x0(), x)
    torch.set_rng_state(state)


def test_matching_content_is_official_and_silent(away, monkeypatch):
    contents = small_mnist(away / "mnist")
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(mnist, "SOURCE", replace(mnist.SOURCE, files=hashes))
    assert set(Mnist(batch=20).provenance.values()) == {"official"}


def damaged(content: bytes, how: str) -> bytes:
    stored = gzip.compress(content)
    if how == "cut":
        return stored[: len(stored) // 2]
    if how == "flipped":
        middle = len(stored) // 2
        return stored[:middle] + bytes([stored[middle] ^ 1]) + stored[middle + 1 :]
    return {"empty": b"", "page": b"<html>moved</html>"}[how]


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "page"])
def test_damaged_archives_are_refused(away, how):
    name = "train-images-idx3-ubyte"
    content = small_mnist(away / "mnist")[name]
    path = away / "mnist" / f"{name}.gz"
    path.write_bytes(damaged(content, how))
    with pytest.raises(DataCorrupt, match="Delete the file") as error:
        Mnist().x0()
    message = str(error.value)
    assert isinstance(error.value, ValueError)
    assert str(path) in message
    assert hashlib.sha256(path.read_bytes() if how != "empty" else b"").hexdigest() in message
    assert mnist.SOURCE.files[name] in message


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("train-images-idx3-ubyte", struct.pack(">4I", 0x804, 1, 28, 28) + bytes(784), "starts with '00000804'"),
        (
            "train-images-idx3-ubyte",
            struct.pack(">4I", 0x803, 2, 28, 28) + bytes(784),
            "promises 1568 values, it has 784",
        ),
        ("train-images-idx3-ubyte", struct.pack(">4I", 0x803, 1, 32, 32) + bytes(1024), "32 x 32"),
        ("train-images-idx3-ubyte", struct.pack(">4I", 0x803, 0, 28, 28), "promises 0 values"),
        ("t10k-labels-idx1-ubyte", struct.pack(">2I", 0x801, 80) + bytes([10]) * 80, "the label 10"),
        ("t10k-labels-idx1-ubyte", struct.pack(">2I", 0x801, 79) + bytes(79), "79 labels for 80 images"),
        ("t10k-labels-idx1-ubyte", b"\0\0\x08", "starts with '000008'"),
    ],
)
def test_impossible_content_is_refused(away, name, content, reason):
    small_mnist(away / "mnist", pack=False)
    write(away / "mnist", name, content, pack=False)
    with pytest.raises(DataCorrupt, match=reason) as error:
        Mnist().x0()
    assert hashlib.sha256(content).hexdigest() in str(error.value)
    assert mnist.SOURCE.files[name] in str(error.value)


# --- MNIST itself, where it is


@pytest.fixture(scope="module")
def digits60k():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mnist.load(data.folder())
    except DataMissing as missing:
        pytest.skip(f"MNIST is not here: {missing}")
    return Mnist(batch=64)


def test_mnist_is_the_official_set(digits60k):
    images, labels = digits60k.problem.train
    assert set(digits60k.provenance.values()) == {"official"}
    assert images.shape == (60_000, 1, 28, 28)
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert (images.sum(dtype=torch.int64) / images.numel() / 255).item() == pytest.approx(0.1307, abs=1e-4)
    assert digits60k.problem.test[0].shape == (10_000, 1, 28, 28)
    assert len(pickle.dumps(digits60k)) < 300


def test_mnist_trains_and_is_pure(digits60k):
    p = digits60k
    x = p.x0()
    assert x.numel() == 163_790
    first = p.grad(x, 3, 1000)
    assert first[1].item() == pytest.approx(2.3, abs=0.1)
    v = torch.zeros_like(x)
    for step in range(100):
        v = 0.9 * v + p.grad(x, 0, step)[0]
        x = x - 0.05 * v
    assert p.evaluate(x)["accuracy"] > 0.85
    assert same(p.grad(p.x0(), 3, 1000), first)
    assert same(Mnist(batch=64).grad(p.x0(), 3, 1000), first)
