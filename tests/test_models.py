"""Several modules that are one model, and several optimizers over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from crew import Serving, until
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import offbeat as ob
from offbeat.runtime.host import Terms

Serve = Callable[..., Serving]


def pair() -> tuple[nn.Module, nn.Module]:
    """A generator and a critic."""
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), nn.Linear(3, 1)


def play(one: nn.Module, other: nn.Module, k: int) -> Tensor:
    noise = torch.randn(8, 2, generator=torch.Generator().manual_seed(k))
    value: Tensor = other(one(noise)).square().mean()
    return value


@pytest.mark.parametrize("kind", ["dictionary", "list"])
def test_several_modules_are_one_model(serve: Serve, kind: str) -> None:
    """By their names; a script loads what a run ships into modules of its own."""
    run = serve(Terms(ob.methods.ASGD(lr=0.1), workers=1, beat=0.05, timeout=20.0))
    one, other = pair()
    model: Any = {"g": one, "d": other} if kind == "dictionary" else [one, other]
    with ob.Replica(model, place=run.place(0)) as replica:
        for k in range(3):
            play(one, other, k).backward()
            replica.step()
        assert [next(iter(replica.model_state())), len(list(replica.model.parameters()))] == [
            "g.0.weight" if kind == "dictionary" else "0.0.weight",
            8,
        ]
    until(run.server.over, "the end of the run")
    run.join()
    shipped = torch.load(run.folder / "model.pt")
    fresh = pair()
    whole = nn.ModuleDict(dict(zip("gd", fresh, strict=True))) if kind == "dictionary" else nn.ModuleList(fresh)
    whole.load_state_dict(shipped, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(fresh[0].parameters(), one.parameters(), strict=True))
    assert not torch.equal(fresh[1].weight, pair()[1].weight)


def test_statistics_of_each_module_are_taken_anew() -> None:
    """Batch norm is in one of them, which the script calls."""
    one, other = pair()
    replica = ob.Replica([one, other], ob.methods.DanaZero(lr=0.1))
    for _ in replica.steps(3):
        play(one, other, 0).backward()
        replica.step()
    batch = one[0](torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    assert torch.allclose(one[1].running_mean, batch.mean(0), atol=1e-6)
    replica.leave()


def test_what_is_no_model_is_refused_by_name() -> None:
    for model, said in (
        ({"g": nn.Linear(1, 1), "d": 3}, r"model\['d'\] = 3: must be a module"),
        ([nn.Linear(1, 1), None], r"model\[1\] = None: must be a module"),
        (3, "model = 3: must be a module, or a dictionary or list of modules"),
        ("net", "model = net: must be a module, or a dictionary or list of modules"),
    ):
        with pytest.raises(TypeError, match=said):
            ob.Replica(model, ob.methods.ASGD())  # type: ignore[arg-type]
    wrapped = object.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    with pytest.raises(ValueError, match="name the process group"):
        ob.Replica({"g": wrapped}, ob.methods.ASGD())


def test_several_optimizers_have_all_parameters_once() -> None:
    one, other = pair()
    a, b = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (one, other))
    for given, said in (
        ([a], "make it of model.parameters()"),
        ([a, b, torch.optim.SGD(other.parameters(), lr=0.1)], "2 parameters are in several optimizers"),
    ):
        with pytest.raises(ValueError, match=said):
            ob.Replica([one, other], ob.methods.LocalSGD(), optimizer=given)


def test_several_optimizers_step_in_turns() -> None:
    """As in a GAN; their states are the replica's, and a step that is taken twice is refused."""
    one, other = pair()
    a, b = torch.optim.Adam(one.parameters(), lr=0.1), torch.optim.SGD(other.parameters(), lr=0.2, momentum=0.9)
    replica = ob.Replica({"g": one, "d": other}, ob.methods.DiLoCo(period=2), optimizer=[a, b])
    before = [p.clone() for p in (*one.parameters(), *other.parameters())]
    for k in range(4):
        play(one, other, k).backward()
        b.step()
        a.step()
        replica.exchange()
    assert all(not torch.equal(p, q) for p, q in zip(before, (*one.parameters(), *other.parameters()), strict=True))
    assert [group["lr"] for group in replica.param_groups] == [0.1, 0.2]
    assert set(replica.state[one[0].weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert len(replica.state) == 8
    state = replica.state_dict()
    assert [len(part["state"]) for part in state["optimizers"]] == [6, 2]
    replica.load_state_dict(state)
    play(one, other, 0).backward()
    a.step()
    with pytest.raises(RuntimeError, match=r"Adam\.step\(\) was called.*call replica\.exchange\(\)"):
        replica.step()
    one.zero_grad()
    replica.leave()


def test_a_step_of_several_is_one_of_each() -> None:
    models = [pair(), pair()]
    plain = [torch.optim.SGD(m.parameters(), lr=lr) for m, lr in zip(models[0], (0.1, 0.2), strict=True)]
    own = [torch.optim.SGD(m.parameters(), lr=lr) for m, lr in zip(models[1], (0.1, 0.2), strict=True)]
    replica = ob.Replica(list(models[1]), ob.methods.LocalSGD(), optimizer=own)
    for k in range(3):
        for one, other in models:
            play(one, other, k).backward()
        for optimizer in plain:
            optimizer.step()
            optimizer.zero_grad()
        replica.step()
    parameters = [[p for m in pair for p in m.parameters()] for pair in models]
    assert all(torch.equal(p, q) for p, q in zip(*parameters, strict=True))
    replica.leave()
