"""Models on a device that is not the CPU: every method, and every way of joining a run.

A run on the device must have the bits of the same method on the CPU: of the same run where that is deterministic, of the
replay of its trace where threads decide the order.
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
from crew import Serving, until
from test_peers import PEERS, PROBLEM, Run
from torch import Tensor

import offbeat as ob
from offbeat.core.method import Local
from offbeat.core.tree import leaves, rebuild
from offbeat.names import read
from offbeat.runtime.host import Terms
from offbeat.runtime.message import Form
from offbeat.runtime.place import Place
from offbeat.runtime.replica import enter
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
        driver = enter(Place(), PROBLEM.x0().to(device), short(cls), {}, read, print)
        steps(driver, 12, device)
        return driver.master().cpu()

    assert torch.equal(trained(DEVICE), trained(CPU))


# ---------------------------------------------------------------- with a server


@pytest.mark.parametrize(("servers", "transport"), [(1, "shared"), (2, "tcp")])
@each(SERVER)
def test_a_worker_of_servers(
    cls: type[ob.ServerMethod], servers: int, transport: str, serve: Callable[..., Serving]
) -> None:
    """Its link breaks, and it joins again."""

    def trained(device: torch.device) -> Tensor:
        terms = Terms(short(cls), None, 1, transport=transport, beat=0.05)
        parts = [serve(replace(terms, shard=(k, servers)), folder=f"{device}{k}") for k in range(servers)]
        place = replace(parts[0].place(0), servers=tuple(part.address for part in parts))
        hello = {"problem": repr(PROBLEM), "layout": None}
        driver: Any = enter(place, PROBLEM.x0().to(device), terms.method, hello, read, print)
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
        return enter(place, x0, self.method, hello, read, self.said.append)


@pytest.fixture
def moved(tmp_path: Path) -> Any:
    with ExitStack() as made:

        def make(*args: Any, **settings: Any) -> Moved:
            run = Moved(tmp_path, *args, **settings)
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
        driver.link.hang_up()
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
