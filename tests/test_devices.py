"""Models on a device that is not the CPU: every method, and every way of joining a run.

A run on the device must have the bits of the same method on the CPU: of the same run where that is deterministic, of the
replay of its trace where threads decide the order.

`Supervised` is not among these: it repeats gradients by the generators of a device, knows those of the CPU and of CUDA, and
refuses all others.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import fake_device
import pytest
import torch
from conftest import by_turns
from crew import Serving, heard, until
from test_peers import PEERS, PROBLEM, Run
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import offbeat as ob
from offbeat.core.method import Local
from offbeat.core.tree import leaves, rebuild
from offbeat.names import read
from offbeat.runtime.averages import Averages
from offbeat.runtime.entry import enter
from offbeat.runtime.host import Terms
from offbeat.runtime.link import LinkLost
from offbeat.runtime.place import Place
from offbeat.runtime.protocol.wire import Form
from offbeat.runtime.team import Team
from offbeat.runtime.worker import Driver

CPU, DEVICE = torch.device("cpu"), fake_device.install()
METHODS = [cls for cls in ob.methods.all_methods() if not issubclass(cls, Local)]
SERVER = [cls for cls in METHODS if issubclass(cls, ob.ServerMethod)]


def each(classes: list[type[ob.Method]]) -> Any:
    return pytest.mark.parametrize("cls", classes, ids=lambda cls: cls.__name__)


def short(cls: type[Any]) -> Any:
    """The method with blocks so short that a short run has several."""
    brief = {"period": 2, "start": 4}
    return cls(**{f.name: brief[f.name] for f in fields(cls) if f.init and f.name in brief})


def steps(driver: Driver, count: int, device: torch.device = DEVICE, pause: float = 0.0) -> None:
    """Take ``count`` gradients. All that the driver has is on the device, and nowhere else."""
    for _ in range(count):
        assert {t.device for t in leaves((driver.x, driver.node.state))} == {device}
        g, loss = PROBLEM.grad(driver.x.cpu(), driver.terms.worker, driver.node.step)
        time.sleep(pause)
        driver.step(g.to(device), float(loss))
    assert driver.master().device == device


# ---------------------------------------------------------------- the device itself


def test_the_device_is_not_the_host() -> None:
    """What fails on a GPU fails here, and all else has the CPU's bits."""
    a, b = torch.arange(6.0), torch.arange(6.0, device=DEVICE)
    group = torch.distributed.ProcessGroupGloo(torch.distributed.HashStore(), 0, 1, timedelta(seconds=5))
    for wrong in (
        lambda: a + b,
        lambda: b.add_(a),
        lambda: torch.cat([a, b]),
        lambda: torch.dot(b, a),
        lambda: group.allreduce([b]),
    ):
        with pytest.raises(RuntimeError, match=r"same device|unsupported device type"):
            wrong()
    with pytest.raises(TypeError, match="numpy"):
        b.numpy()
    assert b.data_ptr() > 1 << 48, "the host could read this address"
    b.view(2, 3)[1, :2].zero_()
    assert b.tolist() == [0, 1, 2, 0, 0, 5]
    weight = torch.nn.Parameter(torch.ones(6, device=DEVICE))
    (weight * b).square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.device == DEVICE
    assert torch.equal(weight.grad.cpu(), 2 * b.cpu() ** 2)


def test_what_is_sent_is_the_same_from_any_device_to_any_device() -> None:
    message = torch.arange(5.0), (torch.tensor(3.0, dtype=torch.float64), torch.arange(3.0).half(), torch.tensor(7))
    form, moved = Form.of(message), rebuild(message, [t.to(DEVICE) for t in leaves(message)])
    assert Form.of(moved).parts == form.parts
    assert torch.equal(form.pack(moved), form.pack(message))
    assert torch.equal(form.pack(moved, torch.zeros(form.bytes, dtype=torch.uint8)), form.pack(message))
    for device in (CPU, DEVICE):
        came = leaves(form.unpack(form.pack(moved), device))
        assert {t.device for t in came} == {device}
        assert all(torch.equal(a.cpu(), b) for a, b in zip(came, leaves(message), strict=True))


# ---------------------------------------------------------------- alone


@each(METHODS)
def test_a_worker_alone(cls: type[ob.Method]) -> None:
    def trained(device: torch.device) -> Tensor:
        driver = enter(Place(), PROBLEM.x0().to(device), short(cls), {}, read, heard())
        steps(driver, 12, device)
        return driver.master().cpu()

    assert torch.equal(trained(DEVICE), trained(CPU))


# ---------------------------------------------------------------- with a server


@pytest.mark.parametrize(("cls", "over"), by_turns(SERVER, [(1, "shared"), (2, "tcp")]))
def test_a_worker_of_servers(cls: type[ob.ServerMethod], over: tuple[int, str], serve: Callable[..., Serving]) -> None:
    """Its link breaks, and it joins again."""
    servers, transport = over

    def trained(device: torch.device) -> Tensor:
        terms = Terms(short(cls), None, 1, transport=transport, beat=0.05)
        parts = [serve(replace(terms, shard=(k, servers)), folder=f"{device}{k}") for k in range(servers)]
        place = replace(parts[0].place(0), servers=tuple(part.address for part in parts))
        hello = {"problem": repr(PROBLEM), "layout": None}
        driver: Any = enter(place, PROBLEM.x0().to(device), terms.method, hello, read, heard())
        steps(driver, 9, device)
        driver.exchange.shards[0].link.hang_up()
        steps(driver, 9, device)
        assert driver.life == 2
        driver.leave(True)
        for part in parts:
            until(part.server.over, f"the end of the run: {part.said}")
        return torch.cat([part.x() for part in parts])

    assert torch.equal(trained(DEVICE), trained(CPU))


# ---------------------------------------------------------------- peers


class Moved(Run):
    """Peers whose models are on the device."""

    def enter(self, worker: int) -> Driver:
        hello = {"problem": repr(PROBLEM), "layout": None}
        place, x0 = replace(self.place, worker=worker), PROBLEM.x0().to(DEVICE)
        return enter(place, x0, self.method, hello, read, heard(self.said))


@pytest.fixture
def moved(tmp_path: Path) -> Any:
    runs = list[Moved]()
    with ExitStack() as made:

        def make(*args: Any, **settings: Any) -> Moved:
            run = Moved(tmp_path / str(len(runs)), *args, **settings)
            runs.append(run)
            made.callback(run.threads[0].join, 10)
            made.callback(run.host.stop)
            return run

        yield make


def stays(driver: Driver) -> None:
    steps(driver, 24, pause=0.003)
    driver.leave(True)


@each(PEERS)
def test_peers(cls: type[ob.Method], moved: Callable[..., Moved]) -> None:
    run = moved(short(cls), 2, None, transport="shared")
    run.start(0, stays)
    run.start(1, stays)
    x, trace = run.end()
    assert torch.equal(x, ob.rerun(trace).x)


@each(PEERS)
def test_peers_come_and_go(cls: type[ob.Method], moved: Callable[..., Moved]) -> None:
    """One leaves before the others, one comes late, and the link of a third to the coordinator breaks, so that it joins again: all
    get states of others."""
    run = moved(short(cls), 3, None, transport="gloo")

    def breaks(driver: Any) -> None:
        steps(driver, 8, pause=0.003)
        driver.incarnation.link.hang_up()
        stays(driver)

    def goes(driver: Driver) -> None:
        steps(driver, 8, pause=0.003)
        while not driver.free:
            steps(driver, 1)
        driver.leave(False)

    for worker, act in enumerate((stays, breaks, goes)):
        run.start(worker, act)
    until(lambda: run.errors or sum(run.host.steps.values()) >= 20, "20 gradients")
    run.start(3, stays)
    x, trace = run.end()
    incidents = [(i.worker, i.what) for i in trace.incidents]
    assert {(2, "left"), (3, "joined")} <= set(incidents), run.said
    assert incidents.count((1, "joined")) == 2, run.said
    assert PROBLEM.evaluate(x)["loss"] < PROBLEM.evaluate(PROBLEM.x0())["loss"]


def together(run: Run, act: Callable[[int], None]) -> None:
    """Both workers' scripts, in threads, to the end of the run."""
    for worker in range(2):
        run.script(act, worker)
    run.end()


def test_an_average_that_one_could_not_take(moved: Callable[..., Moved], monkeypatch: pytest.MonkeyPatch) -> None:
    """It fetches the average from the one who has it."""
    total, fetch, fetched = Averages._sum, Averages._fetch, list[Any]()

    def fails_once(averages: Averages, *about: Any) -> Any:
        mean = total(averages, *about)
        if averages.head.worker == 1 and not fetched:
            fetched.append(None)
            raise LinkLost("the other end is gone")
        return mean

    def fetches(averages: Averages, *about: Any) -> Any:
        fetched.append(fetch(averages, *about))
        return fetched[-1]

    monkeypatch.setattr(Averages, "_sum", fails_once)
    monkeypatch.setattr(Averages, "_fetch", fetches)
    run = moved(ob.methods.SlowMo(period=2), 2, None, transport="shared")
    run.start(0, stays)
    run.start(1, stays)
    x, trace = run.end()
    assert {t.device for t in leaves(fetched[1].message)} == {DEVICE}
    assert torch.equal(x, ob.rerun(trace).x)


def test_ranks_of_one_worker_put_parts_together_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of a whole message, too, which are the first rank's."""
    monkeypatch.setattr(torch.distributed, "broadcast", lambda t, **how: None)
    monkeypatch.setattr(torch.distributed, "all_gather", lambda parts, mine, **how: [p.copy_(mine) for p in parts])
    team = Team()
    team.size = 2
    vector, number = team.join((torch.arange(2.0, device=DEVICE), torch.tensor(3.0, device=DEVICE)), 4)
    assert vector.device == number.device == DEVICE
    assert (vector.tolist(), number.tolist()) == ([0, 1, 0, 1], 3)


# ---------------------------------------------------------------- a script


def net(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.BatchNorm1d(6), nn.Linear(6, 3)).double().to(device)


def data(device: torch.device, step: int, worker: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(100 * worker + step)
    x, y = torch.randn(8, 4, generator=draw, dtype=torch.float64), torch.randint(3, (8,), generator=draw)
    return x.to(device), y.to(device)


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).cpu()


@pytest.mark.parametrize("method", [ob.methods.DanaZero(0.05), ob.methods.DiLoCo(period=2), ob.methods.SGP()])
def test_a_script(method: ob.Method) -> None:
    """Alone, with gradients clipped and a scaler that skips a step."""

    def trained(device: torch.device) -> Tensor:
        model = net(device)
        scaler = torch.amp.GradScaler(device.type, init_scale=8.0)
        with ob.Replica(model, method, place=Place()) as replica:
            for step in range(8):
                x, y = data(device, step)
                loss = nn.functional.cross_entropy(model(x), y) * (float("inf") if step == 3 else 1.0)
                scaler.scale(loss).backward()
                scaler.unscale_(replica)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                scaler.step(replica)
                scaler.update()
        assert scaler.get_scale() == 4.0
        assert {p.device for p in model.parameters()} == {device}
        return vector(model)

    on_device, on_host = trained(DEVICE), trained(CPU)
    assert torch.isfinite(on_host).all()
    assert torch.equal(on_device, on_host)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("buffering", ["maintain", "reset", "average"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_scripts_with_optimizers_of_their_own(optimizer: str, buffering: str, moved: Callable[..., Moved]) -> None:
    ends: dict[torch.device, list[Tensor]] = {}
    for device in (DEVICE, CPU):
        run = moved(ob.methods.SlowMo(period=3, buffering=buffering), 2, None, transport="shared")
        models = [net(device), net(device)]

        def act(worker: int, device: torch.device = device, run: Run = run, models: Any = models) -> None:
            model = models[worker]
            mine = OPTIMIZERS[optimizer](model.parameters())
            replica = ob.Replica(model, run.method, optimizer=mine, place=replace(run.place, worker=worker))
            for step in range(9):
                x, y = data(device, step, worker)
                nn.functional.cross_entropy(model(x), y).backward()
                replica.step()
            replica.leave()

        together(run, act)
        ends[device] = [vector(model) for model in models]
    for on_device, on_host in zip(ends[DEVICE], ends[CPU], strict=True):
        assert torch.equal(on_device, on_host)


def test_local_steps_of_the_own_optimizer_read_nothing_back(moved: Callable[..., Moved]) -> None:
    """A GPU need not be waited for between averages."""
    run = moved(ob.methods.LocalSGD(period=100), 1, None)
    model = net(DEVICE)
    mine = OPTIMIZERS["SGD"](model.parameters())
    replica = ob.Replica(model, run.method, optimizer=mine, place=replace(run.place, worker=0))
    batches = [data(DEVICE, step) for step in range(8)]
    moves = []
    for x, y in batches:
        nn.functional.cross_entropy(model(x), y).backward()
        replica.step()
        moves.append(fake_device.moved.copy())
    assert moves[1] == moves[-1]  # the first one looks whether the optimizer is new
    replica.leave()
    run.end()


def test_a_pass_of_a_script(moved: Callable[..., Moved], serve: Callable[..., Serving]) -> None:
    """Ends with the model that would be shipped, and leaves the device's generators alone: workers' dropout would be the same."""
    ends = []
    for device in (DEVICE, CPU):
        run = serve(Terms(ob.methods.DanaZero(0.05), None, 1, beat=0.05), folder=str(device))
        model = net(device)
        examples = TensorDataset(*(torch.cat(part) for part in zip(*(data(CPU, k) for k in range(4)), strict=True)))
        loader = DataLoader(examples, batch_size=8, shuffle=True)
        with ob.Replica(model, run.server.terms.method, place=run.place(0)) as replica:
            seeds = list(fake_device.seeded)
            for x, y in replica.shard(loader):
                nn.functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
                replica.step()
            assert torch.equal(vector(model), run.x())
            assert fake_device.seeded == seeds
        ends.append(vector(model))
    assert torch.equal(*ends)


# ---------------------------------------------------------------- simulated


class OnDevice:
    """A problem whose vectors are on the device."""

    def x0(self) -> Tensor:
        return PROBLEM.x0().to(DEVICE)

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        assert x.device == DEVICE
        g, loss = PROBLEM.grad(x.cpu(), worker, step)
        return g.to(DEVICE), loss

    def evaluate(self, x: Tensor) -> dict[str, float]:
        return PROBLEM.evaluate(x.cpu())


@each(METHODS)
def test_the_simulator(cls: type[ob.Method]) -> None:
    events = (ob.Join(3, 3.5), ob.Leave(1, 6.0), ob.Crash(0, 7.0))
    cluster = ob.Cluster(3, ob.Gamma(cv=0.3), events)
    there, here = (ob.simulate(short(cls), problem, cluster, gradients=24, seed=1) for problem in (OnDevice(), PROBLEM))
    assert there.x.device == DEVICE
    assert torch.equal(there.x.cpu(), here.x)
