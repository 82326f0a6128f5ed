"""Without its arithmetic, a method says the same to the same at the same time."""

from __future__ import annotations

import pytest
import torch
from conftest import by_turns
from torch.utils._python_dispatch import TorchDispatchMode

import offbeat as ob
from offbeat.core.method import Local
from offbeat.engines import simulator
from offbeat.engines.still import still
from offbeat.methods import all_methods

METHODS = [m for cls in all_methods() if not isinstance(m := cls(), Local)]
METHODS += [ob.methods.SlowMo(ob.methods.SGP()), ob.methods.DanaZero(lr=0.1 * ob.Warmup(20))]
CLUSTERS = {
    "free": ob.Cluster(6, ob.Gamma(1.0, 0.4)),
    "alike": ob.Cluster(6, ob.Fixed((1.0, 1.0, 2.0))),
    "many": ob.Cluster(300, ob.Gamma(1.0, 0.4)),
    "cards": ob.Cluster(6, ob.Gamma(1.0, 0.4), network=ob.Network(0.05, 2e7)),
    "faults": ob.Cluster(
        6, ob.Gamma(1.0, 0.4), network=ob.Network(0.05, 2e7), faults=(ob.Crashes(0.02, 5.0), ob.Loss(0.05))
    ),
    "members": ob.Cluster(5, ob.Gamma(1.0, 0.4), events=(ob.Leave(2, 9.0), ob.Join(5, 11.0), ob.Crash(0, 20.0))),
}


def run(method: ob.Method, cluster: ob.Cluster) -> ob.Run:
    return ob.simulate(method, ob.tasks.TimeOnly(), cluster, gradients=200)


@pytest.mark.parametrize(("method", "where"), by_turns(METHODS, CLUSTERS))
def test_a_still_method_takes_the_time_of_the_method(
    method: ob.Method, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = run(method, CLUSTERS[where])
    monkeypatch.setattr(simulator, "still", lambda method, x0: method)
    moving = run(method, CLUSTERS[where])
    assert quiet.seconds == moving.seconds
    for name in ("seconds", "worker", "step", "lag", "compute", "waited", "sent", "transit"):
        assert torch.equal(quiet.trace.column(name), moving.trace.column(name)), name
    assert quiet.trace.incidents == moving.trace.incidents
    assert quiet.trace.header == moving.trace.header


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_longer_run_touches_no_more_tensors(method: ob.Method) -> None:
    """But for those whose arithmetic decides who waits."""
    calls = []
    for gradients in (200, 400):
        with Count() as count:
            ob.simulate(method, ob.tasks.TimeOnly(), CLUSTERS["cards"], gradients=gradients)
        calls.append(count.calls)
    if still(method, torch.zeros(1)) is method:
        assert calls[1] > calls[0]
    else:
        assert calls[1] == calls[0]
