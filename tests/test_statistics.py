"""Running statistics that fit the parameters which a run would ship."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import TOLERANCE
from crew import heard
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from offbeat.runtime.statistics import BYTES, MINIBATCHES, Statistics


class Net(nn.Module):
    """Batch norm beside what must not be touched: dropout, a counter, and a batch norm that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.frozen, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        self.calls += 1
        return self.drop(self.frozen(self.second(self.norm(self.first(scale * x)))))


def net() -> Net:
    torch.manual_seed(3)
    model = Net().double()
    model.train()
    model.frozen.eval()
    return model


def batches(count: int, size: int = 16) -> list[Tensor]:
    return [torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(count)]


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.7).add_(0.3)


def test_they_are_those_of_a_fresh_pass() -> None:
    """As `update_bn` takes them at the same parameters; nothing else changes, and no random number is drawn."""
    model, said = net(), list[str]()
    statistics = Statistics(model, heard(said))
    for x in batches(5):
        model(x, scale=2.0)
    move(model)
    fresh, state = copy.deepcopy(model), torch.get_rng_state()
    frozen, counted = fresh.frozen.running_mean.clone(), int(model.norm.num_batches_tracked)
    statistics.take()
    assert torch.equal(torch.get_rng_state(), state)
    update_bn([2.0 * x for x in batches(5)], fresh)
    for ours, theirs in (
        (model.norm.running_mean, fresh.norm.running_mean),
        (model.norm.running_var, fresh.norm.running_var),
    ):
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(model.frozen.running_mean, frozen)
    assert int(model.norm.num_batches_tracked) == counted
    assert int(model.calls) == 5
    assert model.norm.momentum == 0.1
    assert not said


@pytest.mark.parametrize("ways", ["eval", "no_grad"])
def test_only_calls_in_training_are_remembered(ways: str) -> None:
    model = net()
    statistics = Statistics(model, heard())
    if ways == "eval":
        model.eval()
    with torch.set_grad_enabled(ways == "eval"):
        model(batches(1)[0])
    before = model.norm.running_mean.clone()
    statistics.take()
    assert not statistics.calls
    assert torch.equal(model.norm.running_mean, before)


def test_what_is_remembered_is_bounded() -> None:
    model = net()
    statistics = Statistics(model, heard())
    for x in batches(MINIBATCHES + 7):
        model(x)
    assert [torch.equal(c.args[0], x) for c, x in zip(statistics.calls, batches(MINIBATCHES + 7)[7:], strict=True)] == [
        True
    ] * MINIBATCHES
    large = torch.empty(1, dtype=torch.float64).expand(BYTES // 8 + 1)  # says that it is large, and is not
    for _ in range(2):
        statistics.remember((large,), {})
    assert len(statistics.calls) == 1
    statistics.forget()
    model(batches(1)[0])
    assert not statistics.calls


def test_a_model_that_cannot_be_called_again() -> None:
    """It is said, once, and the statistics are what they were."""
    model, said = net(), list[str]()
    statistics = Statistics(model, heard(said))
    model(batches(1)[0])
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.drop = nn.Linear(5, 1)
    for _ in range(2):
        statistics.take()
    assert len(said) == 1
    assert "stay this worker's own" in said[0]
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_copies_of_the_model_are_not_remembered() -> None:
    """Nor is what was saved of it, which needs nothing of ours to be loaded."""
    model = net()
    statistics = Statistics(model, heard())
    model(batches(1)[0])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(batches(1)[0])
    assert len(statistics.calls) == 1
    plain = nn.Sequential(nn.BatchNorm1d(2))
    kept = Statistics(plain, heard())
    assert kept.hook is not None
    assert b"offbeat" not in pickle.dumps(plain)
