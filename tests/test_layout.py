"""The names and shapes of a model's parameters: what wrappers add is left out, and all workers must have the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from crew import Serving, heard, remote
from test_peers import PROBLEM as QUADRATIC
from test_peers import Run, runs  # noqa: F401
from torch import nn

import offbeat as ob
from offbeat.runtime.host import Terms
from offbeat.runtime.layout import ParameterEntry, difference, layout_of, plain_name, read
from offbeat.runtime.worker import Worker, train

PROBLEM = ob.tasks.Quadratic(d=11)
SGD = ob.methods.ASGD(lr=0.1)


class Keeper(nn.Module):
    """A user's own module with an attribute that a wrapper has as well."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class DataParallel(Keeper):
    """A wrapper, by its class."""


class _FabricModule(nn.Module):
    """Keeps what it wraps as Lightning Fabric does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._forward_module = module
        self._original_module = module


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def compiled(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own
        return torch.compile(module, backend="eager")


@pytest.mark.parametrize(
    "wrapped",
    [
        compiled,
        _FabricModule,
        DataParallel,
        lambda m: _FabricModule(DataParallel(m)),
        lambda m: compiled(_FabricModule(m)),
    ],
    ids=["compile", "fabric", "parallel", "both", "twice"],
)
def test_what_a_wrapper_adds_to_names_is_left_out(wrapped: Callable[[nn.Module], nn.Module]) -> None:
    """The plain module has the same layout, so what was trained in the one loads into the other."""
    plain, other = net(), wrapped(net())
    assert layout_of(other) == layout_of(plain)
    assert [name for name, _ in layout_of(plain)] == list(plain.state_dict())
    assert {name for name, _ in other.named_parameters()}.isdisjoint(plain.state_dict())


def test_a_part_may_be_wrapped_and_a_users_own_names_stay() -> None:
    model = Keeper(net())
    model.module[0] = compiled(model.module[0])  # type: ignore[index, operator]
    assert [plain_name(model, name) for name, _ in model.named_parameters()] == [
        "module.0.weight",
        "module.0.bias",
        "module.1.weight",
        "module.1.bias",
    ]


def test_what_makes_no_sense_is_no_layout() -> None:
    assert read([["a", [2, 3]], ["b", []]]) == [ParameterEntry("a", (2, 3)), ParameterEntry("b", ())]
    for odd in (
        None,
        7,
        "ab",
        [["a"]],
        [["a", 3]],
        [["a", [-1]]],
        [["a", ["3"]]],
        [[7, [1]]],
        [["a", [True]]],
        {"a": 1},
    ):
        assert read(odd) == []


def test_the_first_difference_names_both() -> None:
    ours = [ParameterEntry("a", (2, 3)), ParameterEntry("b", (4,))]
    assert difference(ours, ours) == ""
    theirs = "parameter {} is {} in the worker's model and {} in the run's"
    assert difference([ours[1], ours[0]], ours) == theirs.format(0, "b [4]", "a [2, 3]")
    assert difference([ours[0], ParameterEntry("b", (2, 2))], ours) == theirs.format(1, "b [2, 2]", "b [4]")
    assert difference(ours[:1], ours) == theirs.format(1, "none", "b [4]")


def named(run: Serving, worker: int, layout: list[Any]) -> Worker:
    """A worker whose model has this layout."""
    exchange = remote(run.place(worker), PROBLEM)
    exchange.hello["layout"] = layout
    return Worker(exchange, heard())


def test_a_worker_with_another_order_is_refused(serve: Callable[..., Serving]) -> None:
    """Both entries are named, the run goes on, and the worker with the same layout joins."""
    layout = [["a", [2, 3]], ["b", [5]]]
    run = serve(Terms(SGD, None, 2))
    first = named(run, 0, layout)
    with pytest.raises(ValueError, match=r"parameter 0 is b \[5\] in the worker's model and a \[2, 3\] in the run's"):
        named(run, 1, layout[::-1])
    with pytest.raises(ValueError, match="in the order of a set"):
        named(run, 1, [["a", [3, 2]], ["b", [5]]])
    second = named(run, 1, layout)
    assert list(run.server.state_dict()) == ["a", "b"]
    for worker in (first, second):
        worker.leave(True)
    run.join()


def test_a_compiled_modules_model_loads_into_the_plain_one(serve: Callable[..., Serving]) -> None:
    run = serve(Terms(SGD, None, 1))
    trained = net()
    with ob.Replica(compiled(trained), place=run.place()) as replica:
        trained(torch.ones(3)).sum().backward()
        replica.step()
    run.join()
    plain = net()
    plain.load_state_dict(torch.load(run.folder / "model.pt", weights_only=True))
    assert torch.equal(plain[0].weight, run.x()[:6].view(2, 3))  # type: ignore[index]


MANY = [
    [f"base_model.layers.{k // 384}.mlp.experts.{k % 384}.gate_up_down_proj.lora_A.default.weight", []]
    for k in range(50_000)
]


def test_a_model_of_many_tensors_joins_a_server(serve: Callable[..., Serving]) -> None:
    run = serve(Terms(SGD, 5, 1))
    train(named(run, 0, MANY), PROBLEM)
    run.join()
    assert len(run.server.layout) == len(MANY)


def test_a_model_of_many_tensors_joins_a_coordinator(runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(Run, "layout", MANY)
    run = runs(ob.methods.AllReduce(ob.SGD(0.1)), 1, 5)
    run.start(0, lambda driver: train(driver, QUADRATIC))
    _, trace = run.end()
    assert len(trace) == 5
    assert len(run.host.layout) == len(MANY)


def test_a_peer_tells_of_many_visits(runs: Callable[..., Run]) -> None:  # noqa: F811
    """All that was done while it was busy is told, in order, however much that is."""
    run = runs(ob.methods.ADPSGD(ob.SGD(0.1)), 1, 5)

    def busy(driver: Any) -> None:
        for k in range(42_000):
            driver.incarnation.did("met", k, "by a peer whose name and message have as many bytes")
        train(driver, QUADRATIC)

    run.start(0, busy)
    _, trace = run.end()
    notes = [deeds.deeds for _, deeds in trace._notes if isinstance(deeds, ob.trace.Deeds)]
    assert [deed[1] for deeds in notes for deed in deeds if deed[0] == "met"] == list(range(42_000))
    assert max(map(len, notes)) <= 10_000
