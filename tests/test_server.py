"""`ParameterServer` by itself: a visit takes place as a whole or not at all, and rates and measures are in one place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import offbeat as ob
from offbeat.core.server import Handler, NotFinite, ParameterServer
from offbeat.core.tree import leaves

X0 = torch.linspace(-1, 1, 5, dtype=torch.float64)
METHODS: list[ob.ServerMethod] = [
    ob.methods.ASGD(0.5),
    ob.methods.DanaZero(0.5),
    ob.methods.GEM(0.5),
    ob.methods.SSP(ob.methods.DCASGD(0.5)),
    ob.methods.BackupWorkers(ob.SGD(0.5)),
]


def seen(server: ParameterServer) -> tuple[Any, ...]:
    """All that a visit changes."""
    tensors = [t.clone() for t in leaves((server.state, server.own))]
    return server.version, dict(server.seen), dict(server.sent), dict(server.clock), list(server.waiting), tensors


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[:-1] == b[:-1] and all(torch.equal(s, t) for s, t in zip(a[-1], b[-1], strict=True))


def refused(server: ParameterServer, msg: Tensor) -> str:
    """Why a server of two workers does not take ``msg``; it is as it was before."""
    for k in range(8):  # some methods move once all have come
        before = seen(server)
        try:
            server.visit(k % 2, msg)
        except NotFinite as wrong:
            assert same(seen(server), before)
            return str(wrong)
    raise AssertionError("it was taken")


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.7e308], ids=str)
def test_a_visit_that_is_not_finite_leaves_everything_as_it_was(method: ob.ServerMethod, bad: float) -> None:
    """The message itself, or what it would make of the model."""
    server = ParameterServer.start(method, X0 * 1e308)
    for worker in range(2):
        server.join(worker)
    why = "the model would not be finite any more" if bad < float("inf") else "the message is not finite"
    assert refused(server, torch.full_like(X0, -bad)) == why


def test_a_handler_that_raises_leaves_everything_as_it_was() -> None:
    """Also the visit's number and who waits."""

    def broken(method: ob.ServerMethod) -> Handler:
        def serve(s: Any, own: Any, msg: Any) -> Any:
            raise RuntimeError("no room")

        return serve

    server = ParameterServer.start(ob.methods.SSP(), X0, broken)
    server.join(0)
    before = seen(server)
    with pytest.raises(RuntimeError, match="no room"):
        server.visit(0, X0)
    assert same(seen(server), before)


def test_the_first_rate_makes_a_new_handler() -> None:
    """One that was compiled for the method before would keep its number."""
    made: list[ob.ServerMethod] = []

    def handler(method: ob.ServerMethod) -> Handler:
        made.append(method)
        return method.serve

    server = ParameterServer.start(ob.methods.ASGD(0.5), X0, handler)
    server.join(0)
    steps: list[Tensor] = []
    for rate in (None, 0.25, [0.1, 0.125], None):
        before = server.x()
        server.tell(rate)
        server.visit(0, torch.ones_like(X0))
        steps.append(before - server.x())
    assert torch.allclose(torch.stack(steps), torch.tensor([0.5, 0.25, 0.125, 0.5]).double()[:, None], atol=1e-12)
    assert made == [ob.methods.ASGD(0.5), server.method]


@pytest.mark.parametrize("wrong", [float("nan"), -1, True, "high", [0.1, None, []], float("inf")], ids=str)
def test_a_rate_that_is_no_number_is_refused(wrong: Any) -> None:
    server = ParameterServer.start(ob.methods.ASGD(0.5), X0)
    with pytest.raises(ValueError, match=r"^the rate .*: must be a number, at least 0$"):
        server.tell(wrong)
    assert server.dial is None
    scheduled = ParameterServer.start(ob.methods.ASGD(0.1 * ob.Warmup(5)), X0)
    with pytest.raises(ValueError, match=r"^the rate 0\.1: the rate of ASGD\(.*\) is a schedule of its own$"):
        scheduled.tell(0.1)


@pytest.mark.parametrize("size", [5, 3 * (1 << 17) + 1], ids=["small", "blocks"])
def test_a_gap_is_the_rmse(size: int) -> None:
    x, point = torch.zeros(size), torch.linspace(-2, 3, size)
    gap = ParameterServer.start(ob.methods.ASGD(), x).gap(point)
    assert gap == pytest.approx(float(point.double().square().mean().sqrt()), rel=1e-12)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_visit_that_is_checked_has_the_bits_of_one_that_is_not(method: ob.ServerMethod) -> None:
    """So a simulation, whose visits are not checked, and a real server come to the same."""
    plain = ParameterServer.start(method, X0, lambda method: method.serve)
    safe = ParameterServer.start(method, X0)
    for server in (plain, safe):
        for worker in range(3):
            server.join(worker)
    for k in range(30):
        worker, g = k % 3, torch.sin(X0 * k)
        a, b = plain.visit(worker, g), safe.visit(worker, g)
        assert list(a) == list(b)
        assert all(torch.equal(s, t) for s, t in zip(leaves(list(a.values())), leaves(list(b.values())), strict=True))
    assert same(seen(plain), seen(safe))
