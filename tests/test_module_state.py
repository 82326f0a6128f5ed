"""What a module keeps or draws besides parameters and torch's numbers: a simulation has it right, or says that it has not."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn

import offbeat as ob
from offbeat.core.problem import Point
from offbeat.tasks.state import Attributes

DRAW = torch.Generator().manual_seed(1)
INPUTS, LABELS = torch.randn(60, 6, generator=DRAW), torch.randint(3, (60,), generator=DRAW)


class Net(nn.Module):
    """A layer, and what a subclass does with its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.begin()

    def begin(self) -> None:
        """What the module has besides."""

    def act(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


def problem(net: Callable[[], nn.Module], **settings: object) -> ob.Supervised:
    data = INPUTS, LABELS
    return ob.Supervised(net, nn.functional.cross_entropy, data, data, batch=10, **settings)  # type: ignore[arg-type]


def gradients(problem: ob.Supervised, count: int = 20) -> list[Tensor]:
    x = problem.x0()
    return [problem.grad(x, 0, step)[0] for step in range(count)]


def played(problem: ob.Supervised) -> bool:
    return bool(problem._live.tape.tapes)


# Python's random numbers


class Layerdrop(Net):
    def act(self, x: Tensor) -> Tensor:
        return x * 3 if random.random() < 0.5 else x


class Numpy(Net):
    def act(self, x: Tensor) -> Tensor:
        return x + float(numpy.random.randn())


def shifted(inputs: Tensor, generator: torch.Generator) -> Tensor:
    return inputs + random.gauss(0, 1) + numpy.random.rand()


class Shifted(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return len(INPUTS)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor]:
        return INPUTS[k] + random.random(), LABELS[k]


CASES = [
    problem(Layerdrop),
    problem(Numpy),
    problem(Net, augment=shifted),
    ob.Supervised(Net, nn.functional.cross_entropy, Shifted(), (INPUTS, LABELS), batch=10),
]


@pytest.mark.parametrize("case", CASES, ids=["random", "numpy", "augmentation", "items"])
def test_numbers_of_python_and_numpy_follow_from_the_seed(case: ob.Supervised) -> None:
    """In any order, whatever the caller draws, and to the last call; and the caller's numbers stay its own."""
    state = random.getstate(), numpy.random.get_state()[2]
    first = gradients(case)
    assert (random.getstate(), numpy.random.get_state()[2]) == state
    random.seed(9)
    numpy.random.seed(9)
    x = case.x0()
    assert all(torch.equal(case.grad(x, 0, step)[0], first[step]) for step in reversed(range(20)))
    same_data = [torch.equal(case.grad(x, 0, step)[0], case.reseeded(1).grad(x, 0, step)[0]) for step in range(3)]
    assert not any(same_data)


def test_a_branch_that_is_drawn_is_taken_anew_each_time() -> None:
    case = problem(Layerdrop)
    x, turns = case.x0(), [case.minibatch(0, step) for step in range(40)]
    losses = {step: float(case.grad(x, 0, step)[1]) for step in range(40)}
    net, tripled = Net(), 0
    with torch.no_grad():
        nn.utils.vector_to_parameters(x, net.parameters())
        for step, (inputs, targets) in enumerate(turns):
            usual, thrice = (float(nn.functional.cross_entropy(k * net(inputs), targets)) for k in (1, 3))
            tripled += abs(losses[step] - thrice) < abs(losses[step] - usual)
    assert 8 < tripled < 32
    assert not played(case)


@pytest.mark.parametrize("net", [Layerdrop, Numpy])
def test_lanes_refuse_what_python_draws_once_for_all(net: type[Net]) -> None:
    case = problem(net)
    points = [Point(case, case.x0(), worker, 0) for worker in range(3)]
    with pytest.raises(RuntimeError, match="lanes=1"):
        case.grads(points)
    assert ob.simulate(ob.methods.ASGD(), case, ob.Cluster(3), gradients=400, lanes="auto").trace.header["lanes"] == 1


def test_initial_weights_that_numpy_draws_follow_from_the_seed() -> None:
    def net() -> nn.Module:
        module = Net()
        nn.init.constant_(module.layer.bias, float(numpy.random.rand()))
        return module

    start = problem(net).x0()
    numpy.random.seed(5)
    assert torch.equal(problem(net).x0(), start)
    assert not torch.equal(problem(net, seed=1).x0()[-3:], start[-3:])


# what a module keeps


class Counter(Net):
    """A head that is switched on late."""

    def begin(self) -> None:
        self.calls = 0

    def act(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1.0 if self.calls > 12 else 0.0)


class OfClass(Net):
    calls = 0

    def act(self, x: Tensor) -> Tensor:
        type(self).calls += 1
        return x


class Listed(Net):
    def begin(self) -> None:
        self.seen: dict[str, list[int]] = {"sizes": []}

    def act(self, x: Tensor) -> Tensor:
        self.seen["sizes"].append(len(x))
        return x


class Average(Net):
    """A moving average in a tensor that is no buffer."""

    def begin(self) -> None:
        self.average = torch.ones(())

    def act(self, x: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * x.detach().abs().mean()
        return x / self.average


class Own(Net):
    """A generator of its own."""

    def begin(self) -> None:
        self.draw = random.Random(3)

    def act(self, x: Tensor) -> Tensor:
        return x * self.draw.random()


@pytest.mark.parametrize(
    ("net", "what"),
    [(Counter, "calls"), (OfClass, "OfClass.calls"), (Listed, "seen"), (Average, "average"), (Own, "draw")],
)
def test_what_a_module_keeps_in_python_is_said_once_and_never_played(net: type[Net], what: str) -> None:
    case = problem(net)
    with pytest.warns(UserWarning, match=rf"{net.__name__} changes {what}\.") as said:
        gradients(case)
    assert len(said) == 1
    assert not played(case)


def test_a_switch_is_seen_when_it_is_thrown() -> None:
    with pytest.warns(UserWarning, match="changes calls"):
        came = gradients(problem(Counter))
    assert [bool(g.any()) for g in came] == [step >= 12 for step in range(20)]


def test_what_is_kept_in_python_is_said_in_lanes_too() -> None:
    case = problem(Counter)
    points = [Point(case, case.x0(), worker, 0) for worker in range(3)]
    with pytest.warns(UserWarning, match="changes calls") as said:
        _ = [case.grads(points) for _ in range(20)]
    assert len(said) == 1
    assert not case._live.tapes.tapes


class Looked(Net):
    """Leaves its outputs to be looked at, and fills a cache at its first call."""

    def begin(self) -> None:
        self.cache: dict[str, Tensor] = {}

    def act(self, x: Tensor) -> Tensor:
        self.cache.setdefault("scale", torch.tensor(2.0))
        self.last = x.detach()
        return x * self.cache["scale"]


def test_what_is_left_to_be_looked_at_is_no_state() -> None:
    case = problem(Looked)
    gradients(case)  # warnings are errors here
    assert played(case)


def test_a_hook_sees_every_gradient() -> None:
    seen = list[int]()

    def net() -> nn.Module:
        module = Net()
        module.layer.register_forward_hook(lambda module, inputs, outputs: seen.append(1))
        return module

    gradients(problem(net), 20)
    assert len(seen) == 20


class Running(nn.Module):
    """A loss in units of its running mean, kept in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(outputs, targets)
        self.mean.mul_(0.9).add_(0.1 * loss.detach())
        return loss / self.mean


class Growing:
    """A loss whose weight grows."""

    weight = 1.0

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.weight *= 1.01
        return self.weight * nn.functional.cross_entropy(outputs, targets)


@pytest.mark.parametrize(("loss", "what"), [(Running(), r"loss\.mean"), (Growing(), "loss")])
def test_a_loss_that_keeps_something_is_said(loss: Callable[[Tensor, Tensor], Tensor], what: str) -> None:
    data = INPUTS, LABELS
    case = ob.Supervised(Net, loss, data, data, batch=10)
    with pytest.warns(UserWarning, match=f"changes {what}\\.") as said:
        gradients(case)
    assert len(said) == 1
    assert not played(case)


SWITCH = {"on": False}


class Hidden(Net):
    def act(self, x: Tensor) -> Tensor:
        return -x if SWITCH["on"] else x


def test_a_recording_that_is_no_longer_right_is_found_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can see what a global variable will do, but a recording is compared now and then."""
    case, called = problem(Hidden), problem(Hidden)
    right = gradients(called, 60)
    assert played(called)
    assert all(map(torch.equal, gradients(case, 20), right))
    monkeypatch.setitem(SWITCH, "on", True)
    with pytest.warns(UserWarning, match="Hidden did something else in gradient 32 than in the first ones") as said:
        gradients(case, 40)
    assert len(said) == 1
    assert not played(case)


def test_buffers_that_learn_are_said_once_with_their_names() -> None:
    class Scaled(Net):
        def begin(self) -> None:
            self.register_buffer("scale", torch.ones(()))
            self.register_buffer("constant", torch.ones(()))

        def act(self, x: Tensor) -> Tensor:
            self.scale.mul_(0.9).add_(0.1 * x.detach().std())
            return x / self.scale

    case = problem(lambda: nn.Sequential(nn.BatchNorm1d(6), Scaled()))
    with pytest.warns(UserWarning, match=r"Sequential changes its buffers 1\.scale\.") as said:
        first = gradients(case)
    assert len(said) == 1
    assert played(case), "each gradient starts from the same buffers, so it may be"
    assert all(map(torch.equal, gradients(case), first))


def test_statistics_of_batch_normalisation_are_expected_to_change() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(problem(lambda: nn.Sequential(nn.BatchNorm1d(6), Net())))


def test_kept_values_are_compared_as_they_were() -> None:
    """Also in objects and containers, in a cycle, and what cannot be read."""

    class Box:
        def __init__(self) -> None:
            self.number, self.me = 1, self

    net = Net()
    net.box, net.array, net.names, net.draw = Box(), numpy.zeros(3), {"b", "a"}, torch.Generator()  # type: ignore[assignment]
    net.numpy, net.act_ = numpy.random.default_rng(1), lambda x: x  # type: ignore[assignment]
    before = Attributes.by(net)
    assert before.changed(Attributes.by(net)) == []
    net.box.number = 2  # type: ignore[union-attr, assignment]
    net.array[1] = 1  # type: ignore[operator, index]
    net.names.add("c")  # type: ignore[operator, union-attr]
    torch.rand(1, generator=net.draw)  # type: ignore[arg-type, call-overload]
    net.numpy.random()  # type: ignore[operator, union-attr]
    net.act_ = lambda x: -x  # type: ignore[assignment]
    assert sorted(before.changed(Attributes.by(net))) == ["array", "box", "draw", "names", "numpy"]


# complex numbers


class Filtered(nn.Module):
    def __init__(self, parameter: bool) -> None:
        super().__init__()
        w = torch.polar(torch.ones(4), torch.linspace(0, 3, 4))
        if parameter:
            self.w = nn.Parameter(w)
        else:
            self.register_buffer("w", w)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * self.w, n=6))


def test_complex_parameters_are_refused_with_the_cure() -> None:
    with pytest.raises(ValueError, match=r"complex parameters w \(torch.complex64\).*view_as_complex"):
        problem(lambda: Filtered(True)).x0()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_complex_buffers_keep_both_their_parts(dtype: torch.dtype) -> None:
    case = problem(lambda: Filtered(False), dtype=dtype)
    buffer = case._live.module.w
    assert buffer.dtype == dtype.to_complex()
    torch.testing.assert_close(buffer.to(torch.complex64), Filtered(False).w)
    assert case.grad(case.x0(), 0, 0)[0].dtype == dtype
