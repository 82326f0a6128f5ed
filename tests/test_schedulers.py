"""Schedulers that go by where the run is: all workers together go through the schedule of the plain script once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from crew import Serving
from test_passes import SGD, N, alone, crew, leave, loader, step, terms
from torch import Tensor
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import IterableDataset

import offbeat as ob

Serve = Callable[..., Serving]
M = N // 2
"""Minibatches of a pass."""


def plain(make: Callable[[Any], Any], steps: int) -> list[float]:
    """The rates of a plain script's steps, and the one after them."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=SGD.lr)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return [*rates, optimizer.param_groups[0]["lr"]]


def one_cycle(optimizer: Any) -> Any:
    return schedulers.OneCycleLR(optimizer, max_lr=0.1, total_steps=2 * M + 1, cycle_momentum=False)


def test_two_workers_go_through_one_schedule(serve: Serve) -> None:
    """One worker is slow, and comes to where the other has brought the run."""
    run, rates = serve(terms()), plain(one_cycle, 2 * M)
    replicas = crew(run)
    found: list[list[tuple[int, float]]] = [[], []]

    def train(i: int) -> Iterator[None]:
        replica = replicas[i]
        scheduler = replica.schedule(one_cycle(replica))
        for _ in range(2):
            for batch in replica.shard(loader()):
                step(replica, batch[0])
                scheduler.step()
                found[i].append((replica.passes.position, replica.param_groups[0]["lr"]))
                yield

    fast, slow = train(0), train(1)
    going = True
    while going:
        going = next(fast, 0) is None
        going = next(fast, 0) is None or going
        going = next(slow, 0) is None or going
    leave(run, *replicas)
    assert len(found[0]) + len(found[1]) == 2 * M
    assert len(found[1]) < len(found[0])
    assert all(lr == pytest.approx(rates[place]) for seen in found for place, lr in seen)
    assert max(place for seen in found for place, _ in seen) == 2 * M


def test_alone_it_is_the_plain_one() -> None:
    for each in (1, 3):
        rates = plain(lambda o: schedulers.StepLR(o, 2, 0.5), M // each)
        replica = alone()
        scheduler = replica.schedule(schedulers.StepLR(replica, 2, 0.5))
        assert scheduler.step_size == 2
        seen = []
        for k, batch in enumerate(replica.shard(loader(batch=2)), 1):
            replica.model(batch[0] / N).square().mean().backward()
            if not k % each:
                seen.append(replica.param_groups[0]["lr"])
                replica.step()
                scheduler.step()
        assert [*seen, replica.param_groups[0]["lr"]] == pytest.approx(rates)
        replica.leave()


def test_after_passes_it_goes_by_passes(serve: Serve) -> None:
    """Also for one that comes late."""
    run = serve(terms())
    a, b = crew(run)
    first, second = (r.schedule(schedulers.ExponentialLR(r, 0.5)) for r in (a, b))
    for epoch in a.epochs(3):
        for batch in a.shard(loader()):
            step(a, batch[0])
        first.step()
        assert a.param_groups[0]["lr"] == pytest.approx(SGD.lr * 0.5 ** (epoch + 1))
    for _ in b.epochs(4):  # only the last is left
        for batch in b.shard(loader()):
            step(b, batch[0])
        second.step()
    assert b.param_groups[0]["lr"] == pytest.approx(SGD.lr * 0.5**4)
    leave(run, a, b)


def test_an_epoch_begins_with_its_scheduler_in_place(serve: Serve) -> None:
    """Also for one that comes late, and for a script that goes on from its own checkpoint."""
    run = serve(terms())
    a, b = crew(run)
    first, second = (schedulers.ExponentialLR(r, 0.5) for r in (a, b))
    seen = []
    for epoch in a.epochs(2, 4, scheduler=first):
        seen.append(epoch)
        assert a.param_groups[0]["lr"] == pytest.approx(SGD.lr * 0.5**epoch)
        for batch in a.shard(loader()):
            step(a, batch[0])
        first.step()
    assert seen == [2, 3]
    for epoch in b.epochs(2, 5, scheduler=second):  # of epoch 3 something is kept for it
        seen.append(epoch)
        assert second.last_epoch == epoch
        for batch in b.shard(loader()):
            step(b, batch[0])
    assert seen == [2, 3, 3, 4]
    leave(run, a, b)
    with pytest.raises(ValueError, match="must go up by one"):
        next(a.epochs(4, 2, -1))


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(float(N))[:, None, None])


def test_streams_and_loops_of_ones_own(serve: Serve) -> None:
    run = serve(terms())
    a, b = crew(run)
    scheduler = b.schedule(schedulers.ExponentialLR(b, 0.9))
    for k, x in enumerate(b.shard(Endless()), 1):
        step(b, x)
        scheduler.step()
        assert scheduler.last_epoch == b.passes.position == 2 * k
    leave(run, a, b)
    replica = alone()
    scheduler = replica.schedule(schedulers.ExponentialLR(replica, 0.9))
    for k in range(3):
        step(replica, torch.ones(1, 1))
        scheduler.step()
        assert scheduler.last_epoch == k + 1
    replica.leave()


def test_a_scheduler_that_is_told_a_figure_is_stepped_once() -> None:
    replica = alone()
    scheduler = replica.schedule(schedulers.ReduceLROnPlateau(replica, factor=0.5, patience=0))
    for figure in (1.0, 1.0):
        scheduler.step(figure)
    assert replica.param_groups[0]["lr"] == 0.5 * SGD.lr
    assert isinstance(scheduler.state_dict(), dict)
    replica.leave()


def test_it_is_of_the_run_and_not_of_the_scripts_optimizer() -> None:
    """It works with the script's own optimizer as well."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    replica = ob.Replica(model, ob.methods.LocalSGD(), optimizer=optimizer)
    scheduler = replica.schedule(schedulers.ExponentialLR(optimizer, 0.5))
    for k, batch in enumerate(replica.shard(loader()), 1):
        step(replica, batch[0])
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**k)
    replica.leave()
