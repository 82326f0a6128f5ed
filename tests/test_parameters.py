"""A module's parameters as a vector that is read from them and written into them: they stay the module's own."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

import offbeat as ob
from offbeat.runtime.parameters import Parameters


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


def vector(module: nn.Module) -> Tensor:
    return parameters_to_vector(module.parameters()).detach().clone()


def test_the_vector_is_read_and_written() -> None:
    model = net()
    flat, start = Parameters(model), vector(model)
    assert torch.equal(flat.held, start)
    x = torch.arange(len(start), dtype=torch.float32)
    flat.write(x)
    assert torch.equal(vector(model), x)
    x += 1
    assert not torch.equal(vector(model), x), "no memory in common"
    assert torch.equal(flat.read(), x - 1)
    flat.hold(flat.held)
    assert torch.equal(vector(model), x - 1)


@pytest.mark.parametrize("width", [12, 50_000], ids=["small", "large"])
def test_what_was_computed_before_a_write_is_not_differentiated_after_it(width: int) -> None:
    """As after a step of an optimizer, autograd refuses; it would take the new numbers for the old ones."""
    model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))
    flat = Parameters(model)
    loss = model(torch.ones(1, 6)).sum()
    flat.write(2 * flat.held)
    assert flat.touched() == []
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_memory_formats_and_ties_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model.to(memory_format=torch.channels_last)
    model[2].weight = model[1].weight
    flat = Parameters(model)
    assert len(flat.held) == 3 * 4 * 9 + 4 + 16
    flat.write(torch.arange(len(flat.held), dtype=torch.float32))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    assert model[0].weight.flatten().tolist() == list(range(108)), "row-major"
    assert flat.touched() == []
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = 7
    assert flat.touched() == ["0.weight"]


def test_gradients_are_put_together_whoever_dropped_or_set_them() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Embedding(5, 4, sparse=True), nn.Linear(3, 1)])
    flat = Parameters(model)
    (model[0].weight.sum() + model[1](torch.tensor([1, 1, 3])).sum()).backward()
    model[0].bias.grad = torch.full((2,), 9.0)
    assert model[1].weight.grad is not None
    assert model[1].weight.grad.is_sparse
    room = torch.full((len(flat.held),), -1.0)
    g = flat.gradient(out=room)
    assert g.data_ptr() == room.data_ptr()
    assert g.tolist() == [1.0] * 4 + [9.0] * 2 + [0.0] * 4 + [2.0] * 4 + [0.0] * 4 + [1.0] * 4 + [0.0] * 4 + [0.0] * 4
    assert torch.equal(flat.gradient(), g)
    flat.put_gradient(2 * g)
    assert torch.equal(flat.gradient(), 2 * g)
    flat.zero_grad(set_to_none=False)
    assert not flat.gradient().any()
    flat.zero_grad()
    assert all(p.grad is None for p in model.parameters())


EDITS: dict[str, Callable[[nn.Parameter], object]] = {
    "clamp_": lambda p: p.data.clamp_(-0.01, 0.01),
    "data =": lambda p: setattr(p, "data", torch.zeros_like(p)),
    "init": nn.init.ones_,
    "one bit": lambda p: p.data.view(torch.int32)[-1].bitwise_xor_(1),
    "through numpy": lambda p: p.detach().numpy().__setitem__(0, 5.0),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_whatever_writes_into_a_parameter_is_seen(edit: Callable[[nn.Parameter], object]) -> None:
    model = net()
    flat = Parameters(model)
    assert flat.touched() == []
    edit(model[0].bias)
    assert flat.touched() == ["0.bias"]
    flat.read()
    assert flat.touched() == []


def test_numbers_that_are_none_are_no_edit() -> None:
    model = net()
    nn.init.constant_(model[2].bias, torch.nan)
    assert Parameters(model).touched() == []


@pytest.mark.parametrize(
    "move", [nn.Module.double, lambda m: setattr(m[0].weight, "data", torch.zeros(2, 2))], ids=["cast", "resized"]
)
def test_a_module_that_is_cast_or_resized_is_refused(move: Callable[[nn.Module], object]) -> None:
    model = net()
    flat = Parameters(model)
    move(model)
    with pytest.raises(RuntimeError, match=r"parameter 0\.weight is .*, then make the Replica"):
        flat.touched()


@pytest.mark.parametrize("method", [ob.methods.DanaZero(lr=0.1), ob.methods.LocalSGD(period=2)], ids=lambda m: m.name)
def test_a_part_of_a_replicas_model_is_saved_at_its_own_size(method: ob.Method) -> None:
    """Each parameter has memory of its own, of its own size: what saves storages, or looks for shared ones, needs that."""
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 2))
    before = len(pickle.dumps(model[1].state_dict()))
    replica = ob.Replica(model, method)
    for _ in range(3):
        model(torch.randn(4, 100)).square().mean().backward()
        replica.step()
        storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
        assert [storages[p.untyped_storage().data_ptr()] for p in model.parameters()] == [
            p.nbytes for p in model.parameters()
        ]
    assert len(pickle.dumps(model[1].state_dict())) == before
    replica.leave()


@pytest.mark.parametrize("method", [ob.methods.DanaZero(0.1), ob.methods.LocalSGD()], ids=lambda m: m.name)
def test_the_state_that_would_be_shipped(method: ob.Method) -> None:
    """It loads strictly into a module without wrappers: the master's point, frozen parts and buffers, in memory of its own."""
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[0].bias.requires_grad_(False)
    model[3].weight = model[2].weight
    wrapped = torch.compile(model, backend="eager")
    replica = ob.Replica(wrapped, method)
    for _ in range(3):
        model(torch.randn(8, 4)).square().sum().backward()
        replica.step()
    state = replica.model_state()
    other = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    other.load_state_dict(state)
    shipped = replica.worker.master()
    assert torch.equal(torch.cat([state[n].flatten() for n, p in model.named_parameters() if p.requires_grad]), shipped)
    assert torch.equal(state["0.bias"], model[0].bias)
    assert torch.equal(state["1.running_mean"], model[1].running_mean)
    look_ahead = isinstance(method, ob.methods.DanaZero)
    assert torch.equal(state["0.weight"], model[0].weight) != look_ahead, (
        "the model is where the next gradient is taken"
    )
    state["3.weight"].zero_()
    assert model[3].weight.any()
    replica.leave()
    assert torch.equal(replica.model_state()["0.weight"], model[0].weight)
    assert replica.main


@pytest.mark.parametrize("method", [ob.methods.DanaZero(0.1), ob.methods.LocalSGD(period=4)], ids=lambda m: m.name)
def test_in_the_middle_of_a_pass_the_model_holds_what_would_be_shipped(method: ob.Method) -> None:
    """And what it held before afterwards, gradients too: training goes on as if nobody had looked."""
    found = []
    for looks in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
        replica = ob.Replica(model, method)
        for k, (x,) in enumerate(replica.shard(DataLoader(TensorDataset(torch.randn(48, 4)), 8))):
            model(x).square().sum().backward()
            if looks and k % 2:
                before, gradients = (
                    [p.detach().clone() for p in model.parameters()],
                    [p.grad for p in model.parameters()],
                )
                with replica.shipped():
                    shown = torch.cat([p.detach().flatten() for p in model.parameters()])
                    with replica.shipped():
                        pass
                    assert torch.equal(shown, replica.worker.master())
                assert all(map(torch.equal, before, model.parameters()))
                assert all(a is p.grad for a, p in zip(gradients, model.parameters(), strict=True))
            replica.step()
        replica.leave()
        with replica.shipped():
            found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)
