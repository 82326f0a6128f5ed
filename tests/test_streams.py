"""Random numbers of each worker, and that work done twice is said."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterator

import numpy
import pytest
import torch
from conftest import Bowl
from crew import Serving, hire
from torch import nn

import offbeat as ob
from offbeat.runtime.host import Terms
from offbeat.runtime.place import Place
from offbeat.runtime.streams import IN_A_ROW, Twins, seed_streams

Serve = Callable[..., Serving]


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    numpy.random.set_state(states[2])


def draw(seed: int, *who: int) -> tuple[float, ...]:
    """What a script draws that has set a seed before its streams were."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    seed_streams(*who)
    return float(torch.rand(())), random.random(), float(numpy.random.rand())


def test_streams_follow_from_the_script_and_the_worker() -> None:
    """Run's seed, worker, steps, rank: each makes all of them others, and the same ones make the same."""
    cases = [(1, 0, 0, 0, 0), (1, 0, 1, 0, 0), (1, 0, 0, 9, 0), (1, 0, 0, 0, 1), (1, 5, 0, 0, 0), (2, 0, 0, 0, 0)]
    drawn = [draw(*case) for case in cases]
    assert drawn == [draw(*case) for case in cases]
    for each in zip(*drawn, strict=True):
        assert len(set(each)) == len(cases)


def seen(told: list[tuple[int, int, Hashable]]) -> list[tuple[int, int]]:
    twins = Twins()
    return [two for worker, step, mark in told if (two := twins.see(worker, step, mark))]


N = 3 * IN_A_ROW


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ([(w, k, k) for k in range(N) for w in (0, 1)], [(0, 1)]),
        ([(w, k, k) for w in (1, 0) for k in range(N)], [(0, 1)]),  # one after the other
        ([(w, k, k) for k in range(N) for w in (0, 1, 2)], [(0, 1), (0, 2)]),
        ([(w, k, (k, w)) for k in range(N) for w in (0, 1)], []),
        ([(w, k, 0.0) for k in range(N) for w in (0, 1)], []),  # a loss that stays
        ([(w, k, k if k % IN_A_ROW else (k, w)) for k in range(N) for w in (0, 1)], []),  # not in a row
        ([(w, k + w, k) for k in range(N) for w in (0, 1)], []),  # not at the same steps
        ([(0, k, k // 2) for k in range(N)], []),  # one worker
    ],
)
def test_twins(told: list[tuple[int, int, Hashable]], found: list[tuple[int, int]]) -> None:
    assert seen(told) == found


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_a_server_says_that_work_is_done_twice(serve: Serve, tells: bool, same: bool) -> None:
    """By the losses, or where there is none, by what is brought."""
    run = serve(Terms(ob.methods.ASGD(lr=0.01), workers=2, beat=0.05))
    workers = [hire(run.place(i), Bowl()) for i in range(2)]
    for k in range(2 * IN_A_ROW):
        for i, worker in enumerate(workers):
            g, _ = Bowl().grad(Bowl().x0(), i * (not same), k)
            worker.step(g, float(g.sum()) if tells else math.nan)
    for worker in workers:
        worker.leave(done=True)
    run.join()
    assert sum("workers 0 and 1 compute the very same" in line for line in run.said) == same


def test_a_replica_has_streams_of_its_own(serve: Serve) -> None:
    """Two scripts with one seed draw other minibatches in one run; alone, a script draws what it would without us."""

    def script(place: Place | None) -> tuple[float, ob.Replica]:
        torch.manual_seed(1337)
        model = nn.Linear(2, 1).double()
        replica = ob.Replica(model, ob.methods.ASGD(lr=0.1), place=place)
        return float(torch.rand(())), replica

    run = serve(Terms(workers=2, beat=0.05))
    drawn, replicas = zip(*(script(run.place(i)) for i in range(2)), strict=True)
    alone, replica = script(None)
    for one in (*replicas, replica):
        one.leave()
    torch.manual_seed(1337)
    nn.Linear(2, 1).double()
    assert alone == float(torch.rand(()))
    assert len({alone, *drawn}) == 3
