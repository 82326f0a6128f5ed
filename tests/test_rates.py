"""The rate that a script sets: `Replica` is an optimizer, whose ``param_groups`` schedulers of torch turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from crew import Serving, heard, remote, until
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import lr_scheduler as schedulers

import offbeat as ob
from offbeat.core.rates import dial_of, rate_of, with_rate
from offbeat.core.schedule import Schedule
from offbeat.engines.replay import replay
from offbeat.runtime.host import Terms
from offbeat.runtime.optimizer import Offered
from offbeat.runtime.worker import Worker

STEPS = 96
PROBLEM = ob.tasks.Quadratic(d=11, noise=0.3)
Serve = Callable[..., Serving]


@dataclass(frozen=True)
class Decay(Schedule):
    """`torch.optim.lr_scheduler.ExponentialLR`."""

    start: float

    def at(self, step: Tensor) -> Tensor:
        return self.start * 0.97**step


def net() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 1).double()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Callable[[Any], Any] = lambda o: None
) -> Tensor:
    """The parameters after ``STEPS`` steps of an ordinary loop."""
    scheduler = schedule(optimizer)
    draw = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x = torch.randn(8, 4, generator=draw).double()
        optimizer.zero_grad()
        loss = (model(x) - x[:, :1].sin()).square().mean()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step(*([loss.detach()] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
    if isinstance(optimizer, ob.Replica):
        optimizer.leave()
    return parameters_to_vector(model.parameters()).detach()


def exponential(optimizer: torch.optim.Optimizer) -> Any:
    return schedulers.ExponentialLR(optimizer, 0.97)


@pytest.mark.parametrize("cls", ob.methods.all_methods(), ids=lambda cls: cls.__name__)
def test_a_scheduler_does_what_a_schedule_of_the_method_does(cls: type[ob.Method]) -> None:
    method, model, other = cls(), net(), net()
    own = train(other, ob.Replica(other, with_rate(method, Decay(float(rate_of(method))))))  # type: ignore[arg-type]
    torch.testing.assert_close(train(model, ob.Replica(model, method), exponential), own, rtol=1e-12, atol=1e-13)
    still = net()
    assert not torch.allclose(train(still, ob.Replica(still, method)), own, rtol=1e-3), "the rate matters"


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "a warm-up from 0": lambda o: schedulers.LambdaLR(o, lambda k: min(1.0, k / 5)),
    "steps": lambda o: schedulers.MultiStepLR(o, [3, 9]),
    "a cosine": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 0.1, STEPS + 1, cycle_momentum=False),
    "one after another": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=4), schedulers.ExponentialLR(o, 0.9)], [4]
    ),
    "a plateau": lambda o: schedulers.ReduceLROnPlateau(o, factor=0.5, patience=1),
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(
    ("method", "momentum", "nesterov"),
    [
        (ob.methods.ASGD(0.05), 0.0, False),
        (ob.methods.MultiASGD(0.05, momentum=0.9), 0.9, False),
        (ob.methods.LocalSGD(ob.Local(ob.SGD(0.05, momentum=0.9, nesterov=True))), 0.9, True),
        (ob.methods.SGP(ob.SGD(0.05, momentum=0.9, nesterov=True)), 0.9, True),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ob.Method) else "",
)
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # SequentialLR's own, up to torch 2.6
def test_a_scheduler_of_torch(
    schedule: Callable[[Any], Any], method: ob.Method, momentum: float, nesterov: bool
) -> None:
    """One worker steps as the plain optimizer does."""
    plain, model = net(), net()
    sgd = torch.optim.SGD(plain.parameters(), 0.05, momentum=momentum, nesterov=nesterov)
    want = train(plain, sgd, schedule)
    torch.testing.assert_close(train(model, ob.Replica(model, method), schedule), want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "method", [ob.methods.ASGD(0.05), ob.methods.LocalSGD(ob.Local(ob.SGD(0.05)), period=5)], ids=lambda m: m.name
)
def test_the_rate_goes_along_with_the_gradient(serve: Serve, method: ob.Method) -> None:
    """To the server that steps by it, and into the trace, from the gradient on for which it was set."""
    run = serve(Terms(method, workers=1, beat=0.05))
    model, plain = net(), net()
    got = train(model, ob.Replica(model, place=run.place(0)), exponential)
    want = train(plain, torch.optim.SGD(plain.parameters(), 0.05), exponential)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    until(lambda: not run.server.sessions, "its leaving")
    rates = run.trace().column("lr").tolist()
    assert math.isnan(rates[0]), "nobody had set any"
    assert rates[1:] == pytest.approx([0.05 * 0.97**k for k in range(1, STEPS)])


def test_each_worker_s_gradients_have_its_own_rate(serve: Serve) -> None:
    """Also of one whose script has set none, between those of one that has."""
    run = serve(Terms(ob.methods.ASGD(0.5), workers=2, beat=0.05))
    models = [nn.Linear(1, 1, bias=False).double() for _ in range(2)]
    a, b = (ob.Replica(model, place=run.place(i)) for i, model in enumerate(models))
    a.param_groups[0]["lr"] = 0.125
    before, steps = float(run.x()), []
    for replica in (a, b, a, b, b):
        replica.model.weight.sum().backward()
        replica.step()
        steps.append(before - float(run.x()))
        before = float(run.x())
    assert steps == pytest.approx([0.125, 0.5, 0.125, 0.5, 0.5], abs=1e-12)
    a.leave()
    b.leave()


def test_a_rate_that_is_none_is_refused_by_the_server(serve: Serve) -> None:
    run = serve(Terms(ob.methods.ASGD(0.05), workers=1, beat=0.05))
    model = net()
    replica = ob.Replica(model, place=run.place(0))
    for wrong in (float("nan"), -1, True, "high", [0.1, None, []]):
        with pytest.raises(ValueError, match=r"the rate .*: must be a number, at least 0"):
            run.server.server.tell(wrong)
    assert run.server.server.dial is None
    replica.leave()


@pytest.mark.parametrize(
    ("method", "lr", "why"),
    [
        (ob.methods.ASGD(0.1 * ob.Warmup(5)), 0.3, "the rate of ASGD is a schedule of its own"),
        (ob.methods.LocalSGD(), float("nan"), "must be a finite number, at least 0"),
        (ob.methods.ASGD(), -0.1, "lr = -0.1 in param_groups"),
    ],
)
def test_a_rate_that_cannot_be_is_refused(method: ob.Method, lr: float, why: str) -> None:
    model = net()
    replica = ob.Replica(model, method)
    replica.param_groups[0]["lr"] = lr
    model(torch.ones(3, 4).double()).sum().backward()
    with pytest.raises(ValueError, match=why):
        replica.step()
    replica.leave(done=False)


def test_what_an_optimizer_has() -> None:
    model = net()
    replica = ob.Replica(model, ob.methods.DanaZero(0.05))
    assert isinstance(replica, torch.optim.Optimizer)
    assert replica.param_groups[0]["params"] == list(model.parameters())
    assert replica.param_groups[0]["lr"] == replica.defaults["lr"] == 0.05
    replica.param_groups[0]["lr"] = 0.01
    saved = replica.state_dict()
    replica.leave()
    other = ob.Replica(model, ob.methods.DanaZero(0.05))
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.01
    with pytest.raises(ValueError, match="give Replica optimizer="):
        other.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    other.leave()


def test_the_groups_are_those_of_the_script_s_optimizer() -> None:
    """Also after it has loaded a checkpoint, by the replica or beside it."""
    model = net()
    groups = [{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.2}]
    sgd = torch.optim.SGD(groups, 0.3, momentum=0.9)
    replica = ob.Replica(model, ob.methods.LocalSGD(period=2), optimizer=sgd)
    for load in (replica.load_state_dict, sgd.load_state_dict):
        model(torch.ones(3, 4).double()).sum().backward()
        replica.step()
        assert replica.param_groups is sgd.param_groups
        assert replica.state is sgd.state
        assert set(replica.state[model.weight]) == {"momentum_buffer"}
        load(replica.state_dict())
    model(torch.ones(3, 4).double()).sum().backward()
    scheduler = schedulers.ExponentialLR(replica, 0.5)
    replica.step()
    scheduler.step()
    assert [group["lr"] for group in sgd.param_groups] == [0.05, 0.1]
    replica.leave()


def test_an_optimizer_that_is_offered_steps_where_workers_step() -> None:
    """As one that is given does."""
    found = []
    for offer in (lambda sgd: sgd, Offered):
        model = net()
        sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        found.append(train(model, ob.Replica(model, ob.methods.LocalSGD(period=2), optimizer=offer(sgd)), exponential))
        assert len(sgd.state) == 2
    assert torch.equal(*found)


@pytest.mark.filterwarnings(
    "ignore:Detected call of"
)  # the scheduler counts the steps of the optimizer that takes none
def test_an_optimizer_that_is_offered_gives_a_server_its_rate(caplog: pytest.LogCaptureFixture) -> None:
    """And its schedule, whichever of the two the scheduler turns."""
    plain = net()
    expected = train(plain, torch.optim.Adam(plain.parameters(), 0.02), exponential)
    for whose in ("replica", "optimizer"):
        model = net()
        own = torch.optim.AdamW(model.parameters(), 0.02)
        replica = ob.Replica(model, ob.methods.AsyncAdam(), optimizer=Offered(own))
        assert replica.param_groups is own.param_groups
        found = train(model, replica, lambda o, own=own, whose=whose: exponential(o if whose == "replica" else own))  # type: ignore[misc]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert not own.state
    assert (
        caplog.text.count("AsyncAdam takes the steps: of AdamW the learning rate counts (0.02), and nothing else") == 2
    )


def test_what_cannot_be_meant_by_an_offer_is_refused() -> None:
    model = net()
    weight, bias = model.parameters()
    adam = torch.optim.AdamW([weight, bias], 0.02)
    two = [torch.optim.SGD([p], 0.1) for p in (weight, bias)]
    for method, offered, why in (
        (
            ob.methods.DanaZero(0.3),
            Offered(adam),
            "DanaZero has the learning rate 0.3, and AdamW has 0.02: leave the method's",
        ),
        (
            ob.methods.Overlap(ob.methods.DanaZero(0.3)),
            Offered(adam),
            "Overlap has the learning rate 0.3, and AdamW has 0.02",
        ),
        (ob.methods.DanaZero(), Offered(*two), "this script has 2 optimizers: take a method whose workers step"),
        (
            ob.methods.DanaZero(),
            Offered(torch.optim.SGD([{"params": [weight], "lr": 0.1}, {"params": [bias], "lr": 0.2}])),
            r"DanaZero steps all parameters at one learning rate, and the groups of param_groups have \[0.1, 0.2\]",
        ),
        (ob.methods.ASGD(0.1 * ob.Warmup(5)), Offered(adam), "the rate of ASGD is a schedule of its own"),
    ):
        with pytest.raises(ValueError, match=why):
            ob.Replica(model, method, optimizer=offered)
    ob.Replica(model, ob.methods.DanaZero(0.02), optimizer=Offered(adam)).leave()


@pytest.mark.parametrize(
    "method",
    [ob.methods.DanaZero(0.05), ob.methods.Downpour(0.05, period=3), ob.methods.SSP(ob.methods.ASGD(0.05))],
    ids=lambda m: m.name,
)
def test_a_run_whose_rate_was_set_is_replayed(serve: Serve, method: ob.Method) -> None:
    """Gradient by gradient, each with the rate that it was taken with."""
    run = serve(Terms(method, workers=1, beat=0.05))
    dial = dial_of(method)
    assert dial is not None
    worker = Worker(remote(run.place(0), PROBLEM), heard(run.said), lambda method: with_rate(method, dial))
    for k in range(12):
        if k >= 4:
            dial.value = worker.rate = 0.05 / k
        g, loss = PROBLEM.grad(worker.x, 0, worker.node.step)
        worker.step(g, float(loss))
    worker.leave(done=True)
    run.join()
    again = replay(run.trace(), method, PROBLEM)
    torch.testing.assert_close(again.x, run.x(), rtol=1e-12, atol=1e-14)
