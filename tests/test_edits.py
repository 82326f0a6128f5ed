"""What a script does to the parameters of its replica between two steps: taken over, or refused with the cure."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from crew import Serving, heard
from test_peers import Run, runs
from torch import Tensor, nn
from torch.nn.utils import prune

import offbeat as ob
from offbeat.core.server import ParameterServer
from offbeat.core.tree import leaves
from offbeat.engines.replay import replay
from offbeat.names import read
from offbeat.runtime.edits import OtherSteps
from offbeat.runtime.host import Terms
from offbeat.runtime.optimizer import lent, with_rule
from offbeat.runtime.parameters import Parameters
from offbeat.runtime.solitary import Solitary

__all__ = ["runs"]
METHODS = ob.methods.all_methods()
STEPPING = [cls for cls in METHODS if issubclass(cls, ob.methods.LocalSGD | ob.methods.SlowMo | ob.methods.DiLoCo)]
STEPPING = [*STEPPING, ob.methods.SGP, ob.methods.DPSGD, ob.methods.ADPSGD, ob.methods.GoSGD, ob.methods.AsyncLocalSGD]
Serve = Callable[..., Serving]


def named(cls: type) -> str:
    return cls.__name__


def short(cls: type[ob.Method]) -> ob.Method:
    """The method on one worker, in blocks of 3."""
    return cls(**{"period": 3} if "period" in {f.name for f in fields(cls)} else {})  # type: ignore[arg-type]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def data(k: int) -> Tensor:
    return torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(k))


def vector(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def fill(module: nn.Module, value: float) -> None:
    module.load_state_dict({name: torch.full_like(t, value) for name, t in module.state_dict().items()})


def stay(module: nn.Module) -> None:
    """A gradient of 0, at which no method moves."""
    for p in module.parameters():
        p.grad = torch.zeros_like(p)


# ---------------------------------------------------------------- the handler


def start(method: ob.Method, x: Tensor) -> Any:
    """A worker's state at ``x``."""
    return method.init(ParameterServer.start(method, x).join(0) if isinstance(method, ob.ServerMethod) else x)


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("cls", METHODS, ids=named)
def test_a_state_moves_to_where_the_script_has_put_the_model(cls: type[ob.Method], begins: bool) -> None:
    """Exactly there, whatever it was; nothing that it was given changes, and its form stays."""
    method = short(cls)
    w = start(method, torch.linspace(-1, 1, 6, dtype=torch.float64))
    for _ in range(2):
        w = method.local(w, torch.ones(6, dtype=torch.float64))
    before, x = copy.deepcopy(leaves(w)), torch.arange(6, dtype=torch.float64)
    moved = method.moved(w, x, begins)
    assert all(torch.equal(a, b) for a, b in zip(leaves(w), before, strict=True))
    if moved is not None:
        torch.testing.assert_close(method.params(moved), x, rtol=0, atol=1e-12)
        assert [(t.shape, t.dtype) for t in leaves(moved)] == [(t.shape, t.dtype) for t in before]
    follows = not issubclass(cls, ob.core.method.GradientServer | ob.methods.AllReduce | ob.methods.Downpour)
    if cls not in (ob.methods.SSP, ob.methods.Overlap, ob.methods.Rounded):  # as the method inside
        assert (moved is not None) == follows


def test_push_sum_keeps_its_weight_and_a_look_ahead_its_momentum() -> None:
    x = torch.tensor([1.0, 2.0])
    sgp = ob.methods.SGP()
    w, _ = sgp.send(sgp.init(x), {1: 0.75}, 0.25)
    moved = sgp.moved(w, 2 * x, True)
    assert (moved.weight, moved.x.tolist()) == (0.25, [0.5, 1.0])
    eamsgd = ob.methods.EAMSGD(lr=0.1, momentum=0.5)
    v = eamsgd.local(start(eamsgd, x), torch.ones(2))
    assert eamsgd.moved(v, x, False).v is v.v


def test_a_block_begins_where_the_script_has_put_the_model_and_else_has_moved_so_far() -> None:
    method, x = ob.methods.DiLoCo(period=4), torch.tensor([1.0])
    w = method.init(x)
    assert method.moved(w, 5 * x, True).slow.x == 5
    assert method.moved(w, 5 * x, False).slow.x == 1


def test_a_peer_that_was_visited_meanwhile_moves_as_far_as_the_script_has() -> None:
    method, x = ob.methods.ADPSGD(), torch.tensor([1.0, 2.0])
    driver = Solitary(method, x, heard())
    driver.step(torch.zeros(2), 0.0)
    driver.node.state, _ = method.meet(driver.node.state, torch.tensor([5.0, 2.0]))
    assert driver.moved(torch.tensor([1.0, 7.0]), x)
    assert driver.x.tolist() == method.params(driver.node.state).tolist() == [3.0, 7.0]


# ---------------------------------------------------------------- alone


@pytest.mark.parametrize("own", [True, False], ids=["torch.optim", "rule"])
@pytest.mark.parametrize("cls", METHODS, ids=named)
def test_a_state_that_is_loaded_before_the_first_step_is_where_a_run_of_one_begins(
    cls: type[ob.Method], own: bool
) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if own else None
    if own and with_rule(cls(), ob.SGD()) is None:
        pytest.skip("its workers do not step")
    replica = ob.Replica(model, short(cls), optimizer=optimizer)
    fill(model, 7.0)
    for _ in range(8):
        stay(model)
        replica.step()
        torch.testing.assert_close(vector(model), torch.full_like(vector(model), 7.0), rtol=0, atol=1e-3)
    replica.leave()


@pytest.mark.parametrize("own", [True, False], ids=["torch.optim", "rule"])
@pytest.mark.parametrize("cls", STEPPING, ids=named)
def test_weights_that_are_clipped_after_each_step_stay_so(cls: type[ob.Method], own: bool) -> None:
    """The model that is shipped is the clipped one, of a pass and at the end; where a slow step goes further, it follows."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05) if own else None
    replica = ob.Replica(model, short(cls), optimizer=optimizer)

    def turn(x: Tensor) -> None:
        (model(x).mean() - model(x + 1).mean()).backward()
        replica.step()
        with torch.no_grad():
            for p in model.parameters():
                p.data.clamp_(-0.05, 0.05)

    for x in replica.shard([data(k) for k in range(31)]):
        turn(x)
    bound = 0.05 if not issubclass(cls, ob.methods.AsyncLocalSGD) else 0.2  # whose server goes a quarter of the way
    assert float(vector(model).abs().max()) <= bound
    turn(data(31))
    replica.leave()
    assert float(replica.worker.master().abs().max()) <= bound


@pytest.mark.parametrize("cls", [ob.methods.DanaZero, ob.methods.ASGD, ob.methods.AllReduce, ob.methods.Downpour])
def test_weights_that_a_method_cannot_take_over_are_refused_until_they_are_put_back(cls: type[ob.Method]) -> None:
    model = net()
    replica = ob.Replica(model, cls())

    def step() -> None:
        model(data(0)).square().mean().backward()
        replica.step()

    step()
    before = vector(model)
    with torch.no_grad():
        model[2].bias.add_(1)
    said = rf"parameter 2\.bias was written into .* {cls.__name__} cannot .* before the Replica is made.*LocalSGD\(period=1\)"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=said):
            step()
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"parameter 0\.weight \(and 1 more\)"):
        list(replica.shard([]))
    nn.utils.vector_to_parameters(before.clone(), model.parameters())
    step()
    replica.leave()


def test_what_is_done_between_passes_counts_too() -> None:
    """A state that is loaded when a pass is over is where the next one begins."""
    model = net()
    replica = ob.Replica(model, ob.methods.SGP())
    for x in replica.shard([data(0), data(1)]):
        model(x).square().mean().backward()
        replica.step()
    fill(model, 7.0)
    for _ in replica.shard([data(0)]):
        assert vector(model).tolist() == [7.0] * len(vector(model))
    replica.leave()


# ---------------------------------------------------------------- in a run


def terms(method: ob.Method, workers: int = 1) -> Terms:
    return Terms(method, None, workers, seed=0, transport="tcp")


def test_in_a_run_with_a_server_a_state_is_loaded_before_the_replica_is_made(serve: Serve) -> None:
    """Also where workers step themselves: others have the server's weights already. What is clipped later is taken over."""
    run = serve(terms(ob.methods.AsyncLocalSGD(ob.SGD(0.1), period=2)))
    model = net()
    replica = ob.Replica(model, place=run.place(0))
    start = vector(model)
    fill(model, 7.0)
    stay(model)
    with pytest.raises(RuntimeError, match="before the Replica is made"):
        replica.step()
    nn.utils.vector_to_parameters(start.clone(), model.parameters())
    for k in range(4):
        stay(model)
        replica.step()
        if k == 0:
            fill(model, 7.0)
    torch.testing.assert_close(run.x(), start + 0.25 * (7 - start))
    replica.leave()
    run.join()


def begin(replica: ob.Replica) -> None:
    """The first minibatch of a pass, and its step."""
    for _ in replica.steps(1000):
        stay(replica.model)
        replica.step()
        break


@pytest.mark.parametrize(
    "method",
    [ob.methods.DanaZero(lr=0.1), ob.methods.AsyncLocalSGD(ob.SGD(0.1), period=1)],
    ids=["dana", "async-local"],
)
def test_a_state_that_is_loaded_before_the_first_pass_is_where_the_run_begins(serve: Serve, method: ob.Method) -> None:
    """Whoever loads it first; those who had joined before join again. Who loads one when the run has begun goes on from the run's."""
    run = serve(terms(method, 3))
    models = [net() for _ in range(3)]
    first, second = (ob.Replica(models[i], place=run.place(i)) for i in range(2))
    fill(models[1], 7.0)
    begin(second)
    assert any("worker 1 has loaded weights before the run's first gradient" in line for line in run.said)
    fill(models[0], 7.0)
    begin(first)
    third = ob.Replica(models[2], place=run.place(2))
    fill(models[2], 3.0)
    begin(third)
    torch.testing.assert_close(run.x(), torch.full_like(run.x(), 7.0))
    for model in models:
        torch.testing.assert_close(vector(model), torch.full_like(run.x(), 7.0))
    for replica in (first, second, third):
        replica.leave()
    run.join()


def test_weights_that_are_not_finite_are_refused_before_the_first_pass(serve: Serve) -> None:
    run = serve(terms(ob.methods.ASGD(lr=0.1)))
    model = net()
    replica = ob.Replica(model, place=run.place(0))
    fill(model, float("nan"))
    with pytest.raises(ValueError, match="weights that the worker's script has set are not finite"):
        begin(replica)
    fill(model, 1.0)
    begin(replica)
    replica.leave()


def test_a_peer_that_comes_late_puts_aside_what_its_script_loads(
    runs: Callable[..., Run], caplog: pytest.LogCaptureFixture
) -> None:
    """As a worker does that was started again with a checkpoint which the run has left behind."""
    run = runs(ob.methods.LocalSGD(ob.Local(ob.SGD(0.1)), period=1), 2, None)
    models = [net(), net()]
    first = ob.Replica(models[0], run.method, place=replace(run.place, worker=0))
    fill(models[0], 7.0)
    begin(first)
    told = threading.Event()

    def live() -> None:
        while not told.is_set():
            stay(models[0])
            first.step()
        first.leave()

    run.script(live)
    second = ob.Replica(models[1], run.method, place=replace(run.place, worker=1))
    fill(models[1], 3.0)
    begin(second)
    assert "the weights that worker 1's script has loaded are put aside" in caplog.text
    told.set()
    second.leave()
    run.end()
    for model in models:
        torch.testing.assert_close(vector(model), torch.full_like(vector(model), 7.0))


def test_peers_average_what_their_scripts_have_set(runs: Callable[..., Run]) -> None:
    run = runs(ob.methods.LocalSGD(ob.Local(ob.SGD(0.1)), period=2), 2, None)
    ends: dict[int, Tensor] = {}

    def live(worker: int) -> None:
        model = net()
        replica = ob.Replica(model, run.method, place=replace(run.place, worker=worker))
        fill(model, 6.0 + worker)
        for _ in range(2):
            stay(model)
            replica.step()
        ends[worker] = vector(model)
        replica.leave()

    for i in range(2):
        run.script(live, i)
    x, trace = run.end()
    for end in (*ends.values(), x):
        torch.testing.assert_close(end, torch.full_like(end, 6.5))
    with pytest.raises(ValueError, match=r"has set its parameters by itself in step 0.* cannot be replayed"):
        replay(trace, run.method, ob.tasks.Quadratic(d=len(x)))


def test_a_process_is_one_worker_of_a_run_once(serve: Serve) -> None:
    """A second replica of the same number would throw the first one out, and be thrown out by it, at each step."""
    run = serve(terms(ob.methods.ASGD(lr=0.1)))
    first = ob.Replica(net(), place=run.place(0))
    with pytest.raises(RuntimeError, match=r"is worker 0 of the run already.*nn\.ModuleList\(\[a, b\]\).*leave\(\)"):
        ob.Replica(net(), place=run.place(0))
    first.leave(done=False)
    second = ob.Replica(net(), place=run.place(0))
    stay(second.model)
    second.step()
    second.leave()
    run.join()


def test_two_replicas_alone_are_two_runs() -> None:
    models = [net(), net()]
    replicas = [ob.Replica(model, ob.methods.ASGD(lr=0.1)) for model in models]
    fill(models[0], 1.0)
    fill(models[1], 2.0)
    for model, replica in zip(models, replicas, strict=True):
        stay(model)
        replica.step()
    assert [float(vector(model).mean()) for model in models] == [1.0, 2.0]
    for replica in replicas:
        replica.leave()


# ---------------------------------------------------------------- other steps


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        (
            ob.methods.LocalSGD(period=2),
            True,
            r"replica\.step\(\) calls it: leave optimizer\.step\(\) out, or call .*exchange",
        ),
        (ob.methods.LocalSGD(period=2), False, r"LocalSGD steps by a rule of its own: give Replica optimizer="),
        (ob.methods.DanaZero(), False, r"DanaZero takes the steps: leave optimizer\.step\(\) out"),
        (ob.methods.EASGD(), False, r"EASGD takes the steps: leave optimizer\.step\(\) out"),
    ],
    ids=["its own", "another", "gradients", "a rate"],
)
def test_a_step_of_an_optimizer_beside_the_replicas_is_said(method: ob.Method, given: bool, said: str) -> None:
    model, other = net(), net()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    replica = ob.Replica(model, method, optimizer=optimizers[0] if given else None)
    for m in (model, other):
        m(data(0)).square().mean().backward()
    optimizers[1].step()  # of a model that is nobody's replica
    replica.step()
    optimizers[0].step()  # without a gradient it does nothing
    model(data(0)).square().mean().backward()
    replica.step()
    model(data(0)).square().mean().backward()
    optimizers[0].step()
    with pytest.raises(RuntimeError, match=rf"SGD\.step\(\) was called beside replica\.step\(\).*{said}"):
        replica.step()
    replica.leave()


class Mine:
    """An optimizer of a script's own, which only says that others have stepped."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.param_groups = [group for o in optimizers for group in o.param_groups]
        self.state: dict[Any, Any] = {}

    def step(self) -> None:
        pass


@pytest.mark.parametrize("way", ["exchange", "an object", "several"])
@pytest.mark.parametrize("cls", STEPPING, ids=named)
def test_steps_of_the_scripts_own_are_those_of_its_optimizer(cls: type[ob.Method], way: str) -> None:
    """Two optimizers that the script steps, and then the exchange: bit for bit what `step` does with one optimizer of both."""
    models, rates = [net(), net()], (0.05, 0.02)
    groups = [[{"params": m[i].parameters(), "lr": lr} for i, lr in zip((0, 2), rates, strict=True)] for m in models]
    whole = torch.optim.SGD(groups[0], momentum=0.9)
    parts = [torch.optim.SGD([group], momentum=0.9) for group in groups[1]]
    own: Any = {"an object": Mine(*parts), "several": parts}.get(way) or torch.optim.SGD(groups[1])
    method = short(cls)
    if isinstance(method, ob.methods.SlowMo) and way != "several":
        method = replace(method, buffering="maintain")
    a, b = ob.Replica(models[0], method, optimizer=whole), ob.Replica(models[1], method, optimizer=own)
    for k in range(10):
        for model in models:
            model(data(k)).square().mean().backward()
        a.step(loss=1.0)
        for part in parts:
            part.step()
        if way != "an object":
            b.exchange(loss=1.0)
        else:
            b.step()
        assert torch.equal(vector(models[0]), vector(models[1]))
    for replica in (a, b):
        replica.leave()


def test_what_needs_the_gradients_refuses_an_exchange() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for method, given, said in (
        (ob.methods.DanaZero(), False, "DanaZero takes the steps"),
        (ob.methods.AllReduce(), True, r"AllReduce averages gradients.*LocalSGD\(period=1\)"),
        (ob.methods.LocalSGD(), False, "make the Replica with optimizer="),
    ):
        replica = ob.Replica(model, method, optimizer=optimizer if given else None)
        with pytest.raises(RuntimeError, match=said):
            replica.exchange()
        replica.leave()


def test_a_watch_ends_with_its_replica() -> None:
    from offbeat.runtime import edits

    model = net()
    watch = OtherSteps(list(model.parameters()))
    assert edits._watches is not None
    assert watch in edits._watches
    del watch
    assert not [w for w in edits._watches if w._ids & {id(p) for p in model.parameters()}]


# ---------------------------------------------------------------- closures


def closure_of(model: nn.Module, optimizer: Any, seen: list[float]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(data(0)) - 1).square().mean()
        loss.backward()
        seen.append(loss.item())
        return loss

    return closure


def test_an_optimizer_that_evaluates_the_loss_itself_gets_a_closure() -> None:
    models = [net(), net()]
    optimizers = [torch.optim.LBFGS(m.parameters(), max_iter=4) for m in models]
    replica = ob.Replica(models[0], ob.methods.LocalSGD(period=2), optimizer=optimizers[0])
    seen: list[list[float]] = [[], []]
    closures = [closure_of(m, o, s) for m, o, s in zip(models, optimizers, seen, strict=True)]
    for k in range(3):
        mine = replica.step(closures[0]) if k else replica.step(closure=closures[0])
        assert isinstance(mine, Tensor)
        assert mine.item() == optimizers[1].step(closures[1]).item()
        assert torch.equal(vector(models[0]), vector(models[1]))
    assert seen[0] == seen[1]
    assert len(seen[0]) > 6
    closures[0]()
    with pytest.raises(RuntimeError, match=r"LBFGS evaluates the loss itself.*replica\.step\(closure\)"):
        replica.step()
    replica.leave()
    with pytest.raises(ValueError, match=r"LBFGS .* AllReduce averages one gradient.*LocalSGD\(period=1\)"):
        ob.Replica(models[0], ob.methods.AllReduce(), optimizer=optimizers[0])


@pytest.mark.parametrize("own", [True, False], ids=["torch.optim", "rule"])
def test_a_closure_is_called_once_where_one_gradient_is_needed(own: bool, serve: Serve) -> None:
    method = ob.methods.AsyncLocalSGD(ob.SGD(0.1), period=1) if own else ob.methods.ASGD(lr=0.1)
    run = serve(terms(method))
    models = [net(), net()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    replica = ob.Replica(models[0], optimizer=optimizers[0] if own else None, place=run.place(0))
    seen: list[float] = []
    closure = closure_of(models[0], replica, seen)
    with torch.no_grad():
        loss = replica.step(closure)
    assert isinstance(loss, Tensor)
    assert [loss.item()] == seen
    closure_of(models[1], optimizers[1], [])()
    before = vector(models[1])
    optimizers[1].step()
    went = 0.25 if own else 1.0  # the outer rate
    torch.testing.assert_close(vector(models[0]), before + went * (vector(models[1]) - before), rtol=0, atol=1e-12)
    replica.leave()
    run.join()
    assert run.trace().column("loss").tolist() == seen


# ---------------------------------------------------------------- the optimizer's state in averages


class Odd(nn.Module):
    """A scalar first, a matrix, a vector, and a table that is used where ``touched``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale, self.matrix = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.randn(3, 4))
        self.shift, self.table = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor, touched: bool) -> Tensor:
        y = self.scale * (x @ self.matrix.T) + self.shift
        return y + self.table[2] if touched else y


def momentum_on_weights_only(model: Odd) -> torch.optim.Optimizer:
    groups = [
        {"params": [model.shift, model.scale], "momentum": 0.0},
        {"params": [model.matrix, model.table], "momentum": 0.9},
    ]
    return torch.optim.SGD(groups, lr=0.05)


UNEVEN: dict[str, Callable[[Odd], torch.optim.Optimizer]] = {
    "groups": momentum_on_weights_only,
    "Adafactor": lambda model: torch.optim.Adafactor(model.parameters()),
    "a scalar first": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "Adam": lambda model: torch.optim.Adam(model.parameters(), amsgrad=True),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_states_of_optimizers_are_averaged_entry_by_entry(name: str, runs: Callable[..., Run]) -> None:
    """Of two workers one never uses a table: what it has no entry for counts as 0, and it gets none."""
    run = runs(ob.methods.LocalSGD(period=2, buffering="average"), 2, None)
    before: dict[int, dict[tuple[str, str], Tensor]] = {}
    after: dict[int, dict[tuple[str, str], Tensor]] = {}

    def live(worker: int) -> None:
        model = Odd()
        optimizer = UNEVEN[name](model)
        replica = ob.Replica(model, run.method, optimizer=optimizer, place=replace(run.place, worker=worker))

        def entries() -> dict[tuple[str, str], Tensor]:
            return {
                (which, entry): value.clone()
                for which, p in model.named_parameters()
                for entry, value in optimizer.state[p].items()
                if isinstance(value, Tensor) and value.shape == p.shape and entry != "step"
            }

        rule = replica._lending.rule
        assert rule is not None
        take = rule.take

        def spy(closure: Any = None) -> None:
            take(closure)
            before[worker] = entries()

        object.__setattr__(rule, "take", spy)
        for k in range(4):
            model(torch.full((2, 4), 0.1 * (k + 1) * (worker + 1)), worker == 0).square().mean().backward()
            replica.step()
        after[worker] = entries()
        assert all(int(s["step"]) == 4 for s in optimizer.state.values() if "step" in s)
        replica.leave()

    for i in range(2):
        run.script(live, i)
    run.end()
    assert set(after[1]) == {key for key in after[0] if key[0] != "table"}
    assert (name == "Adafactor") == (set(after[1]) == set(after[0])), "which keeps no entry of its shape for a matrix"
    assert name != "a scalar first" or ("scale", "momentum_buffer") in after[0]
    for key, value in after[0].items():
        there = before[1].get(key)
        wanted = before[0][key] / 2 if there is None else (before[0][key] + there) / 2
        torch.testing.assert_close(value, wanted)
        if there is not None:
            assert not torch.equal(before[0][key], there)
            assert torch.equal(after[1][key], value)


def test_what_is_averaged_follows_from_the_optimizer_and_not_from_what_it_has_seen() -> None:
    """So that all workers send messages of one form; looking at it steps nothing, and leaves no state behind."""
    for make in UNEVEN.values():
        model = Odd()
        optimizer = make(model)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps optimizer.step
        flat = Parameters(model)
        method, _ = lent(ob.methods.LocalSGD(), optimizer, flat, OtherSteps(flat.tensors))
        fresh = method.buffers(method.init(flat.held))  # type: ignore[attr-defined]
        assert flat.touched() == []
        assert not optimizer.state
        assert scheduler.last_epoch == 0
        model(torch.ones(2, 4), True).sum().backward()
        optimizer.step()
        used, _ = lent(ob.methods.LocalSGD(), optimizer, flat, OtherSteps(flat.tensors))
        later = used.buffers(used.init(flat.held))  # type: ignore[attr-defined]
        assert [(t.shape, t.dtype) for t in fresh] == [(t.shape, t.dtype) for t in later] != []
        assert all(len(t) == len(flat.held) for t in later)


def test_a_table_that_no_minibatch_touches_has_no_part_in_sparse_averages() -> None:
    tables = nn.ModuleList([nn.Embedding(6, 4, sparse=True) for _ in range(2)])
    optimizer = torch.optim.SparseAdam(list(tables.parameters()), lr=0.1)
    replica = ob.Replica(tables, ob.methods.LocalSGD(period=2, buffering="average"), optimizer=optimizer)
    for _ in range(4):
        tables[0](torch.tensor([1, 4])).square().sum().backward()
        replica.step()
    assert list(optimizer.state) == [tables[0].weight]
    replica.leave()


# ---------------------------------------------------------------- other parameters


def unfreeze(model: nn.Sequential) -> None:
    model[0].requires_grad_(True)


def grow(model: nn.Sequential) -> None:
    model.append(nn.Linear(1, 1).double())


def swap(model: nn.Sequential) -> None:
    model[2] = nn.Linear(6, 1).double()


def assign(model: nn.Sequential) -> None:
    model.load_state_dict({name: torch.zeros_like(t) for name, t in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (unfreeze, r"0\.weight, 0\.bias"),
        (grow, r"3\.weight, 3\.bias"),
        (swap, r"2\.weight"),
        (assign, r"2\.weight, 2\.bias"),
    ],
)
@pytest.mark.parametrize("own", [True, False], ids=["torch.optim", "rule"])
def test_parameters_that_nothing_would_move_are_said(
    change: Callable[[nn.Sequential], None], said: str, own: bool
) -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1) if own else None
    replica = ob.Replica(model, ob.methods.LocalSGD(), optimizer=optimizer)
    model(data(0)).sum().backward()
    replica.step()
    change(model)
    model(data(0)).sum().backward()
    with pytest.raises(RuntimeError, match=rf"Sequential has parameters to train .*{said}.* then make the Replica"):
        replica.step()
    replica.leave()


def test_a_parameter_that_was_taken_out_is_said_and_one_that_has_moved_within_the_module_is_not() -> None:
    model = net()
    replica = ob.Replica(model, ob.methods.LocalSGD())
    prune.l1_unstructured(model[0], "weight", amount=0.5)  # type: ignore[no-untyped-call]
    start = model[0].weight_orig.detach().clone()
    for k in range(3):
        model(data(k)).sum().backward()
        replica.step()
    assert not torch.equal(model[0].weight_orig, start)
    del model[2].bias
    with pytest.raises(RuntimeError, match="1 parameters that Sequential had"):
        replica.step()
    replica.leave()


def test_a_parameter_that_is_frozen_later_is_not_stepped_by_the_users_optimizer() -> None:
    """Averages keep their form, and another life of the worker takes the optimizer again."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, momentum=0.9)
    replica = ob.Replica(model, ob.methods.LocalSGD(period=2, buffering="average"), optimizer=optimizer)
    for k in range(6):
        model(data(k)).sum().backward()
        replica.step()
        if k == 2:
            model[0].requires_grad_(False)
            before = model[0].weight.clone()
    assert torch.equal(model[0].weight, before)
    method = replica._lending(ob.methods.LocalSGD())
    assert [len(t) for t in method.buffers(method.init(replica.flat.held))] == [len(replica.flat.held)]  # type: ignore[attr-defined]
    replica.leave()


def test_complex_parameters_are_refused() -> None:
    model = nn.ParameterDict({"filter": torch.zeros(3, dtype=torch.complex64)})
    with pytest.raises(ValueError, match=r"complex parameters \(filter\).*torch\.view_as_real"):
        ob.Replica(model, ob.methods.DanaZero())


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("number", [np.float32, np.float64], ids=["float32", "float64"])
def test_numbers_of_numpy_are_numbers(number: type) -> None:
    """They are printed as numbers, so that the other end can read them."""
    method = ob.methods.SlowMo(
        ob.Local(ob.Adam(number(0.5), betas=(number(0.5), number(0.75)), eps=number(0.125))),
        period=np.int64(3),
        beta=number(0.25),
    )
    wanted = ob.methods.SlowMo(ob.Local(ob.Adam(0.5, betas=(0.5, 0.75), eps=0.125)), period=3, beta=0.25)
    assert repr(method) == repr(wanted)
    assert read(repr(method)) == method == wanted
    assert repr(ob.methods.DanaZero(lr=number(0.5), momentum=number(0.5))) == repr(
        ob.methods.DanaZero(0.5, momentum=0.5)
    )
    assert repr(number(0.5) * ob.Warmup(np.int64(5))) == repr(0.5 * ob.Warmup(5))
