"""Passes over data as training loops see them: each goes over its own data once, or is refused with what to write instead."""

from __future__ import annotations

import itertools
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from crew import Serving, until
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    TensorDataset,
)

import offbeat as ob
from offbeat.runtime.host import Terms
from offbeat.runtime.leases import COUNTED, Lease
from offbeat.runtime.orders import AHEAD, WINDOW, GeneratorStates, Order

Serve = Callable[..., Serving]
SGD = ob.methods.ASGD(lr=1e-4)
N = 24


def terms(method: ob.Method = SGD, **other: Any) -> Terms:
    return Terms(**{"method": method, "workers": 2, "beat": 0.05, "timeout": 20.0} | other)


def numbers(count: int = N) -> TensorDataset:
    return TensorDataset(torch.arange(float(count))[:, None])


def loader(count: int = N, batch: int | None = 2, **options: Any) -> DataLoader[Any]:
    return DataLoader(numbers(count), batch, **{"shuffle": True} | options)


def crew(run: Serving, count: int = 2) -> list[ob.Replica]:
    return [ob.Replica(nn.Linear(1, 1), place=run.place(i)) for i in range(count)]


def step(replica: ob.Replica, x: Tensor) -> None:
    replica.model(x / N).square().mean().backward()
    replica.step()


def walk(replica: ob.Replica, batches: Any) -> Iterator[list[int]]:
    """Train on minibatches; the examples of each."""
    for batch in batches:
        x = batch[0] if isinstance(batch, list | tuple) else batch
        step(replica, x)
        yield x.flatten().int().tolist()


def together(*walks: Iterator[list[int]]) -> list[list[int]]:
    """All examples that each walk comes to, where they go on by turns."""
    seen: list[list[int]] = [[] for _ in walks]
    going = set(range(len(walks)))
    while going:
        for i in sorted(going):
            batch = next(walks[i], None)
            if batch is None:
                going.discard(i)
            else:
                seen[i] += batch
    return seen


def flat(batches: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


def leave(run: Serving, *replicas: ob.Replica) -> None:
    for replica in replicas:
        replica.leave()
    until(run.server.over, f"the end of the run: {run.said}")


def alone(method: ob.Method = SGD) -> ob.Replica:
    return ob.Replica(nn.Linear(1, 1), method)


# whose minibatches


def test_steps_are_so_many_of_all_workers_together(serve: Serve) -> None:
    """For a script that draws its minibatches itself: whoever leaves in the middle, others take what it has not."""
    run = serve(terms())
    a, b = crew(run)

    def walk(replica: ob.Replica) -> Iterator[list[int]]:
        for number in replica.steps(N):
            step(replica, torch.tensor([[float(number)]]))
            yield [number]

    first, second = walk(a), walk(b)
    seen = [*next(first), *next(second), *next(second)]
    a.leave(done=False)
    seen += flat(second)
    b.leave()
    assert sorted(seen) == list(range(N))
    assert [replica.main for replica in (a, b)] == [True, False]


@pytest.mark.parametrize(
    "method", [SGD, ob.methods.LocalSGD(ob.Local(ob.SGD(1e-4)), period=2)], ids=["server", "peers"]
)
def test_a_pass_after_one_that_was_broken_off_is_whole(method: ob.Method) -> None:
    replica = alone(method)
    for stop in (3, 1, None, None):
        seen = [n for batch in itertools.islice(walk(replica, replica.shard(loader())), stop) for n in batch]
        assert len(seen) == len(set(seen)) == (N if stop is None else 2 * stop)
        assert replica._member.unfinished == (stop is not None)
    replica.leave()


def test_what_one_worker_breaks_off_or_holds_is_done_by_others(serve: Serve) -> None:
    """But for what came to a step, all of it goes back when a loop is left, also what was begun; a pass that is held and
    never gone on with is in nobody's way."""
    run = serve(terms())
    a, b = crew(run)
    first = list(itertools.islice(walk(a, a.shard(loader())), 3))
    for _ in a.shard(loader()):  # its second pass, of which no step is taken
        break
    held = iter(a.shard(loader()))  # and its third, which it never goes on with
    kept = next(held)
    step(a, kept[0])
    rest = list(walk(b, b.shard(loader())))
    assert sorted(n for batch in first + rest for n in batch) == list(range(N))
    assert sorted(n for batch in walk(b, b.shard(loader())) for n in batch) == list(range(N))
    seen = together(walk(b, b.shard(loader())), walk(a, iter(lambda: next(held, None), None)))
    assert sorted(flat(seen) + kept[0].flatten().int().tolist()) == list(range(N))
    leave(run, a, b)
    assert [i.lost for i in run.trace().incidents] == [0] * 4


def test_validation_may_be_shared_too_beside_training_or_inside_of_it(serve: Serve) -> None:
    run = serve(terms())
    replicas = crew(run)
    valid = [Counter[int](), Counter[int]()]

    def train(replica: ob.Replica, inside: bool) -> Iterator[list[int]]:
        for k, batch in enumerate(walk(replica, replica.shard(loader()))):
            if inside and k == 2:
                valid[0].update(int(n) for (x,) in replica.shard(loader(11, shuffle=False)) for n in x)
            yield batch
        if not inside:
            valid[1].update(int(n) for (x,) in replica.shard(loader(9, shuffle=False)) for n in x)

    for inside in (True, False):
        seen = together(*(train(replica, inside) for replica in replicas))
        assert sorted(flat(seen)) == list(range(N))
        assert all(seen)
    assert (valid[0], valid[1]) == (Counter(range(11)), Counter(range(9)))
    leave(run, *replicas)


def test_two_passes_at_once_are_refused() -> None:
    """A worker that loads ahead would have one of a pair, and another worker the other."""
    replica = alone()
    pairs = zip(replica.shard(loader()), replica.shard(loader()), strict=True)
    assert next(pairs)
    with pytest.raises(
        ValueError, match=r"from pass 0 while pass 1, which was begun later, .*StackDataset.* plain loader"
    ):
        next(pairs)
    del pairs
    assert len(list(replica.shard(loader()))) == N // 2
    replica.leave()


def test_a_worker_that_comes_late_begins_where_the_run_is(serve: Serve) -> None:
    run = serve(terms())
    (a,) = crew(run, 1)
    epochs, late = a.epochs(5), []
    for epoch in itertools.islice(epochs, 3):
        batches = walk(a, a.shard(loader()))
        seen = list(batches) if epoch < 2 else list(itertools.islice(batches, 5))
        assert list(a.shard(loader(3, shuffle=False), epoch=epoch))  # a second pass of the same epoch
    assert run.server.status()["total"] == 5 * (len(loader()) + len(loader(3)))
    a.leave(done=False)
    b = ob.Replica(nn.Linear(1, 1), place=run.place(1))
    for epoch in b.epochs(5):
        late.append(epoch)
        mine = list(walk(b, b.shard(loader())))
        if epoch == 2:
            assert sorted(flat(seen + mine)) == list(range(N))
    assert late == [2, 3, 4]
    assert list(b.epochs(5)) == []
    b.leave()
    run.stop()


def test_a_script_that_goes_on_from_its_own_checkpoint_says_the_epoch(serve: Serve) -> None:
    """Its passes are those of the others, whatever it has begun itself."""
    run = serve(terms())
    a, b = crew(run)
    seen = together(walk(a, a.shard(loader(), epoch=7)), walk(b, b.shard(loader(), epoch=7)))
    assert sorted(flat(seen)) == list(range(N))
    assert all(seen)
    with pytest.raises(ValueError, match="epoch = -1: it must be a whole number from 0 on"):
        a.shard(loader(), epoch=-1)
    leave(run, a, b)


def test_the_body_of_a_loop_runs_for_a_worker_that_has_missed_passes(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Of short passes a slow worker gets one minibatch each, and one that comes late some of the pass where the run is."""
    run = serve(terms())
    a, b = crew(run)
    counts = [Counter[int](), Counter[int]()]
    for _ in range(3):
        counts[0].update(flat(walk(a, a.shard(loader(8)))))
    for number in range(2):
        before = counts[1].total()
        counts[1].update(flat(walk(b, b.shard(loader(8)))))
        assert counts[1].total() > before, number
    assert sum(counts, Counter()) == Counter(dict.fromkeys(range(8), 3))
    assert caplog.text.count("was over before this worker came to it") == 1
    leave(run, a, b)


# orders


class Shuffled(Sampler[list[int]]):
    """Minibatches in an order that ``draw`` makes, as home-made samplers by length do."""

    def __init__(self, draw: Callable[[list[Any]], Any], count: int = N) -> None:
        self.draw, self.batches = draw, [[k, k + 1] for k in range(0, count, 2)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(self.batches)
        self.draw(batches)
        return iter(batches)


class Own(Shuffled):
    """One with a generator of its own."""

    def __init__(self, generator: Any) -> None:
        super().__init__(lambda batches: None)
        self.generator = generator

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(self.batches)
        self.generator.shuffle(batches)
        return iter(batches)


def by_numpy(batches: list[Any]) -> None:
    sys.modules["numpy"].random.shuffle(batches)


@pytest.mark.parametrize("kind", ["random", "numpy", "own random", "own numpy", "torch", "weights"])
def test_orders_are_the_same_at_all_workers_whatever_draws_them(serve: Serve, kind: str) -> None:
    """They follow from the run's seed and differ from pass to pass; what the script draws itself stays as it was."""
    np = pytest.importorskip("numpy")
    weights = torch.utils.data.WeightedRandomSampler([1.0] * N, N, replacement=False)
    make: dict[str, Callable[[], DataLoader[Any]]] = {
        "random": lambda: DataLoader(numbers(), batch_sampler=Shuffled(random.shuffle)),
        "numpy": lambda: DataLoader(numbers(), batch_sampler=Shuffled(by_numpy)),
        "own random": lambda: DataLoader(numbers(), batch_sampler=Own(random.Random())),
        "own numpy": lambda: DataLoader(numbers(), batch_sampler=Own(np.random.default_rng())),
        "torch": lambda: loader(generator=torch.Generator()),
        "weights": lambda: loader(sampler=weights, shuffle=None),
    }
    run = serve(terms(seed=5))
    replicas = crew(run)
    orders = []
    for number in range(2):
        walks = []
        for i, replica in enumerate(replicas):
            random.seed(i), np.random.seed(i), torch.manual_seed(i)
            states = random.getstate(), np.random.get_state()[2], torch.get_rng_state().tolist()
            batches = iter(replica.shard(make[kind]()))
            walks.append(walk(replica, itertools.chain([next(batches)], batches)))
            assert states[:2] == (random.getstate(), np.random.get_state()[2])
            if kind == "numpy":  # else the loader draws a seed of its own
                assert len(states[2]) == len(torch.get_rng_state())
        seen = together(*walks)
        assert sorted(flat(seen)) == list(range(N)), number
        orders.append(seen)
    assert orders[0] != orders[1]
    leave(run, *replicas)


def test_what_differs_among_workers_is_refused_by_name(serve: Serve) -> None:
    run = serve(terms())
    a, b = crew(run)
    secret = random.Random()
    by_time = Shuffled(lambda batches: secret.shuffle(batches))
    cases: list[tuple[Any, Any, str]] = [
        (
            loader(batch=4),
            loader(batch=2),
            "pass 0 has 12 minibatches at this worker and 6 at others: all workers need",
        ),
        (loader(), loader(N + 1, drop_last=True), "pass 1 begins with other minibatches at this worker"),
        (
            DataLoader(numbers(), batch_sampler=by_time),
            DataLoader(numbers(), batch_sampler=by_time),
            "pass 2 begins with other",
        ),
        (loader(), numbers(), "pass 3 has 24 minibatches|pass 3 is over a sequence at this worker and over a loader"),
        (list(loader()), list(loader(generator=torch.Generator().manual_seed(9))), "pass 4 begins with other"),
        (
            iter([1, 2]),
            iter([2, 1]),
            "pass 5 begins with another item at this worker .* give shard the DataLoader itself",
        ),
    ]
    for one, other, why in cases:
        assert list(a.shard(one))
        with pytest.raises(ValueError, match=why):
            list(b.shard(other))
    assert run.server.refused == len(cases)
    leave(run, a, b)


def test_an_order_is_listed_as_far_as_it_is_needed() -> None:
    """Going forward costs a window of memory; what is older is listed anew, and is the same."""
    sampler = BatchSampler(RandomSampler(numbers(), replacement=True, num_samples=10**10), 4, False)
    order = Order(lambda: iter(sampler), 3, [sampler])
    early, digest = [order[k] for k in range(200)], order.digest()
    for k in range(200, 3 * WINDOW):
        order[k]
    assert len(order.window) <= WINDOW + AHEAD
    assert [order[k] for k in range(0, 200, 7)] == early[::7]
    assert Order(lambda: iter(sampler), 3, [sampler]).digest() == digest != Order(lambda: iter(sampler), 4, []).digest()
    short = Order(lambda: iter([[0], [1]]), 0, [])
    assert short[1] == [1]
    with pytest.raises(IndexError):
        short[2]
    assert short.length == 2


def test_a_sampler_that_shuffles_its_own_list_is_left_as_it_was_when_another_pass_is_listed(serve: Serve) -> None:
    class InPlace(Shuffled):
        def __iter__(self) -> Iterator[list[int]]:
            random.shuffle(self.batches)
            return iter(list(self.batches))

    run = serve(terms(workers=1))
    (a,) = crew(run, 1)
    mine = [DataLoader(numbers(), batch_sampler=InPlace(random.shuffle)) for _ in range(2)]
    assert sorted(flat(walk(a, a.shard(mine[0])))) == list(range(N))
    seen = flat(itertools.islice(walk(a, a.shard(mine[0])), 3))
    a.leave(done=False)
    b = ob.Replica(nn.Linear(1, 1), place=run.place(0))
    for _ in range(2):  # for its first pass, which is over, it lists the second one and has one minibatch of it
        seen += flat(walk(b, b.shard(mine[1])))
    assert sorted(seen) == list(range(N))
    leave(run, b)


def test_generators_go_on_where_they_were() -> None:
    whole, parts = GeneratorStates(7), GeneratorStates(7)
    with whole():
        wanted = [random.random() for _ in range(4)]
    got = []
    for _ in range(4):
        random.seed(1)
        with parts():
            got.append(random.random())
        assert random.getstate() == random.Random(1).getstate()
    assert got == wanted


# loaders


class Scaled(DataLoader[Any]):
    """A loader that makes its minibatches when it is gone over."""

    def __iter__(self) -> Any:
        for (x,) in super().__iter__():
            yield {"x": x / 2, "n": len(x)}


class Prefetched(DataLoader[Any]):
    """One that has its iterator once and for all, and so never asks a sampler of ours."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.iterator = super().__iter__()

    def __iter__(self) -> Any:
        return (next(self.iterator) for _ in range(len(self)))


class Filtered(DataLoader[Any]):
    """One that leaves out minibatches."""

    def __iter__(self) -> Any:
        return (batch for batch in super().__iter__() if int(batch[0][0]) % 3)


class Split(DataLoader[Any]):
    """One that gives two for each that it draws."""

    def __iter__(self) -> Any:
        return (half for (x,) in super().__iter__() for half in x.chunk(2))


def plus_one(rows: list[tuple[Tensor]]) -> Tensor:
    return torch.stack([x for (x,) in rows]) + 1


def test_loaders_make_their_minibatches_in_their_own_way() -> None:
    replica = alone()
    scaled = list(replica.shard(Scaled(numbers(8), batch_size=4)))
    assert [batch["n"] for batch in scaled] == [4, 4]
    assert sorted(float(x) for batch in scaled for x in batch["x"]) == [k / 2 for k in range(8)]
    collated = list(replica.shard(loader(4, collate_fn=plus_one)))
    assert sorted(int(x) for batch in collated for x in batch) == [1, 2, 3, 4]
    single = list(replica.shard(loader(4, batch=None)))
    assert sorted(int(x) for (x,) in single) == [0, 1, 2, 3]
    assert len(list(replica.shard(Filtered(numbers(N), batch_size=1)))) == 16
    assert len(list(replica.shard(Split(numbers(8), batch_size=4)))) == 4
    step(replica, torch.ones(1, 1))
    assert replica.worker.exchange.leases.out == 0
    with pytest.raises(
        ValueError, match="the Prefetched gives minibatches without drawing them from its batch_sampler"
    ):
        list(replica.shard(Prefetched(numbers(8), batch_size=4)))
    replica.leave()


def ahead(items: Iterable[Any]) -> Iterator[Any]:
    """One item further than what it gives, as loaders do that bring the next one to a GPU meanwhile."""
    source = iter(items)
    now = next(source)
    for item in source:
        yield now
        now = item
    yield now


@pytest.mark.parametrize(
    "data", [loader(22), [*range(11)], loader(22, num_workers=1)], ids=["loader", "list", "process"]
)
def test_minibatches_of_one_step_are_dealt_out_together(serve: Serve, data: Any) -> None:
    """Three to a step, and two in the last one, as one process makes them: whoever leaves in a step gives back all of it."""
    run = serve(terms())
    a, b = crew(run)
    shards = [replica.shard(data, accumulate=3) for replica in (a, b)]
    assert [len(shard) for shard in shards] == [4, 4]
    first, second = map(iter, shards)
    seen = [next(second), next(second)]
    for _ in seen:
        step(b, torch.ones(1, 1))
        assert b.passes.position in (1, 2, 3)
    next(first)
    a.leave(done=False)
    for found in second:
        step(b, torch.ones(1, 1))
        seen.append(found)
    b.leave()
    assert sorted(len(found) for found in seen) == [2, 3, 3, 3]
    assert b.passes.position == 4
    items = [x for found in seen for x in found]
    numbers = items if isinstance(data, list) else flat(x.flatten().int().tolist() for (x,) in items)
    assert sorted(numbers) == [*range(11 if isinstance(data, list) else 22)]


def test_a_stream_is_dealt_out_by_steps_too(serve: Serve) -> None:
    run = serve(terms())
    a, b = crew(run)
    assert [list(replica.shard(iter(range(7)), accumulate=2)) for replica in (a, b)] == [
        [[0, 1], [4, 5]],
        [[2, 3], [6]],
    ]
    leave(run, a, b)


def test_a_pass_goes_on_where_a_checkpoint_was_taken(serve: Serve) -> None:
    """The first minibatches are nobody's; the order of the others is that of a whole pass, and the next one is whole."""
    whole = alone()
    order = [flat(walk(whole, whole.shard(loader(), epoch=epoch))) for epoch in (2, 3)]
    whole.leave()
    run = serve(terms())
    a, b = crew(run)
    seen = together(walk(a, a.shard(loader(), epoch=2, skip=5)), walk(b, b.shard(loader(), epoch=2, skip=5)))
    assert sorted(flat(seen)) == sorted(order[0][10:])
    assert a.passes.run_epoch() == 3
    b.leave()
    shard = a.shard(loader(), epoch=3, skip=2)
    seen = [flat(walk(a, shard))]
    assert sorted(seen[0]) == sorted(order[1][4:])
    assert len(flat(walk(a, shard))) == N, "the next walk over it is a whole one"
    for wrong in ({"skip": -1}, {"skip": 1.5}, {"accumulate": 0}, {"accumulate": "2"}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"shard: {name} = {value!r}: it must be a whole number from"):
            a.shard(loader(), **wrong)  # type: ignore[call-overload]
    leave(run, a)


def test_a_worker_ends_the_run_for_all(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    run = serve(terms())
    a, b = crew(run)

    def epochs(replica: ob.Replica) -> Iterator[list[int]]:
        for epoch in replica.epochs(50):
            yield from walk(replica, replica.shard(loader()))
            if replica.main and epoch == 1:
                replica.stop()

    seen = together(epochs(a), epochs(b))
    assert len(flat(seen)) in range(2 * N, 2 * N + 8)  # and what the other had been given already
    assert list(b.shard(loader())) == []
    assert "nothing is left" not in caplog.text
    leave(run, a, b)


def test_what_reads_ahead_ends_a_pass_at_the_shipped_parameters_as_well() -> None:
    """It comes to the pass's end before the last step is taken."""
    replica = alone(ob.methods.DanaZero(lr=0.1))
    for _ in range(2):
        for (x,) in ahead(replica.shard(loader())):
            step(replica, x)
        shown = torch.cat([p.detach().reshape(-1) for p in replica.model.parameters()])
        assert torch.equal(shown, replica.worker.master())
        assert not torch.equal(shown, replica.worker.x)
    replica.leave()


def test_workers_of_a_loader_that_persist_serve_all_passes() -> None:
    replica = alone()
    lasting, processes = loader(8, num_workers=1, persistent_workers=True), set()
    for stop in (None, 1, None):
        seen = list(itertools.islice(walk(replica, replica.shard(lasting)), stop))
        assert len(seen) == (stop or 4)
        clone, _ = replica.passes.clones[lasting]
        processes.update(worker.pid for worker in clone._iterator._workers)
    assert len(processes) == 1
    assert lasting._iterator is None  # the user's own is untouched
    replica.leave()


class Endless(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return itertools.count() if self.count is None else iter(range(self.count))

    def __init__(self, count: int | None, length: int | None = None) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("no length")
        return self.length


def test_samplers_end_where_they_end_and_not_where_they_say() -> None:
    replica = alone()
    for sampler in (Endless(9), Endless(9, 20)):
        seen = flat(walk(replica, replica.shard(DataLoader(numbers(), 2, sampler=sampler))))
        assert seen == list(range(9))
    endless = DataLoader(numbers(10**6), 2, sampler=Endless(None))
    assert next(iter(replica.shard(endless)))[0].flatten().tolist() == [0, 1]
    long = loader(sampler=RandomSampler(numbers(), replacement=True, num_samples=10**10), shuffle=None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(replica.shard(long)) == 5 * 10**9
    assert len(next(iter(replica.shard(long)))[0]) == 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes
    replica.leave()


class Squares(Dataset[Tensor]):
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index**2)])


@pytest.mark.parametrize(
    "data", [range(5), Squares(), [torch.tensor([1.0])] * 5, torch.arange(5.0)], ids=lambda d: type(d).__name__
)
def test_sequences_and_data_sets_are_shared_item_by_item(serve: Serve, data: Any) -> None:
    run = serve(terms())
    replicas = crew(run)
    seen = [0, 0]
    walks = [iter(replica.shard(data)) for replica in replicas]
    for i in itertools.islice(itertools.cycle((0, 1)), 12):
        for item in itertools.islice(walks[i], 1):
            step(replicas[i], torch.as_tensor(item, dtype=torch.float32).reshape(1, 1))
            seen[i] += 1
    assert sum(seen) == 5
    assert min(seen) >= 1
    assert list(replicas[0].shard([])) == []
    leave(run, *replicas)


def test_a_shard_is_like_its_loader() -> None:
    replica, plain = alone(), loader(8)
    view = replica.shard(plain)
    assert (len(view), view.dataset, view.batch_size, view.sampler) == (4, plain.dataset, 2, plain.sampler)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = view.nothing_of_the_kind
    first, second = ([x.flatten().tolist() for (x,) in view] for _ in range(2))
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(8))
    assert first != second
    with pytest.raises(ValueError, match="sharded already"):
        replica.shard(view)
    replica.leave()


class Bar:
    """What a progress bar is."""

    def __init__(self, iterable: Any) -> None:
        self.iterable = iterable

    def __iter__(self) -> Iterator[Any]:
        return iter(self.iterable)


def test_what_cannot_be_shared_is_refused_with_what_to_write(serve: Serve) -> None:
    replica = alone()
    with pytest.raises(ValueError, match=r"inside of a Bar \(its iterable\).*as in tqdm\(replica.shard\(loader\)\)"):
        replica.shard(Bar(loader()))
    parts = DistributedSampler(numbers(), num_replicas=2, rank=0)
    for nested in (BatchSampler(parts, 2, False), Nested(BatchSampler(parts, 2, False))):
        with pytest.raises(ValueError, match="has a DistributedSampler: give one without"):
            replica.shard(DataLoader(numbers(), batch_sampler=nested))
    assert len(list(Bar(replica.shard(loader())))) == N // 2
    replica.leave()


class Nested(Shuffled):
    """As accelerate's batch samplers are: around another one."""

    def __init__(self, inside: Any) -> None:
        super().__init__(lambda batches: None)
        self.batch_sampler = inside


def test_streams_are_dealt_out_by_turns_of_one_order(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """What is random in them is the same at all workers, also what is drawn on the way."""
    run = serve(terms())
    replicas = crew(run)

    def drawn() -> Iterator[float]:
        for _ in range(9):
            yield random.random() + float(torch.rand(()))

    def islice() -> Iterator[int]:
        return (int(n) for (x,) in loader() for n in x)

    for kind in (drawn, islice):
        seen = []
        for i, replica in enumerate(replicas):
            random.seed(i), torch.manual_seed(i)
            seen.append(list(replica.shard(kind())))
        items = flat(seen)
        assert len(items) == len(set(items)) == (9 if kind is drawn else N)
        assert len(seen[0]) - len(seen[1]) == len(items) % 2
    assert caplog.text.count("is dealt out by turns") == 2  # once at each worker
    leave(run, *replicas)


# what is not finite


@pytest.mark.parametrize(
    "method",
    [SGD, ob.methods.DanaZero(lr=1e-4), ob.methods.EASGD(lr=1e-4, period=2), None],
    ids=["asgd", "dana", "easgd", "peer"],
)
@pytest.mark.parametrize("launched", [True, False], ids=["run", "alone"])
def test_one_broken_sample_does_not_end_a_run(
    serve: Serve, caplog: pytest.LogCaptureFixture, method: ob.Method | None, launched: bool
) -> None:
    """It is named, tried again at the end of the pass, and set aside then; all others are used."""
    data = torch.arange(float(N))[:, None]
    data[5] = torch.nan
    broken = DataLoader(TensorDataset(data), 2, shuffle=True)
    method = method or ob.methods.LocalSGD(ob.Local(ob.SGD(1e-4)), period=2)
    run = serve(terms(method, workers=1)) if launched else None
    replica = ob.Replica(nn.Linear(1, 1), place=run.place(0)) if run else alone(method)
    seen = [[int(n) for n in x.nan_to_num(5.0).flatten()] for (x,) in stepped(replica, replica.shard(broken))]
    counts = Counter(flat(seen))
    assert set(counts) == set(range(N))
    assert counts[5] == 2
    seen = [[int(n) for n in x.nan_to_num(5.0).flatten()] for (x,) in stepped(replica, replica.shard(broken))]
    said = caplog.text
    assert "look for what is not finite in the data of minibatch" in said
    assert "has the examples" in said
    assert ", 5" in said or " 5," in said
    assert all(bool(p.isfinite().all()) for p in replica.model.parameters())
    replica.leave()
    if run:
        until(run.server.over, "the end")
        assert [i.what for i in run.trace().incidents].count("set aside") == 2
        assert any("set aside, as twice its gradient was not finite: minibatch" in line for line in run.said)


def stepped(replica: ob.Replica, batches: Any) -> Iterator[Any]:
    for batch in batches:
        step(replica, batch[0])
        yield batch


@pytest.mark.parametrize("launched", [True, False], ids=["run", "alone"])
def test_data_of_which_nothing_is_finite_is_diverged(serve: Serve, launched: bool) -> None:
    run = serve(terms(SGD, workers=1)) if launched else None
    replica = ob.Replica(nn.Linear(1, 1), place=run.place(0)) if run else alone()
    nothing = DataLoader(TensorDataset(torch.full((40, 1), torch.nan)), 2)
    with pytest.raises(ob.Diverged, match=r"data of minibatch \d+ of pass 0, or lower the .*; 9 gradients in a row"):
        list(stepped(replica, replica.shard(nothing)))
    replica.leave()
    if run:
        run.stop()


# how a run ends


def test_a_finished_run_that_is_resumed_trains_further_passes(serve: Serve) -> None:
    def epochs(replica: ob.Replica, count: int) -> int:
        return sum(len(list(walk(replica, replica.shard(loader())))) for _ in range(count))

    run = serve(terms(workers=1))
    replica = ob.Replica(nn.Linear(1, 1), place=run.place(0))
    assert epochs(replica, 2) == N
    leave(run, replica)
    run.stop()
    again = serve(terms(workers=1), resume=True, anew=True)
    assert not again.server.over()
    replica = ob.Replica(nn.Linear(1, 1), place=again.place(0))
    assert epochs(replica, 4) == N
    leave(again, replica)
    assert len(again.trace()) == 2 * N


def test_lost_minibatches_are_those_that_were_begun(serve: Serve) -> None:
    run = serve(terms(workers=1))
    replica = ob.Replica(nn.Linear(1, 1), place=run.place(0))
    batches = iter(replica.shard(loader(num_workers=2)))
    for (x,) in itertools.islice(batches, 2):
        step(replica, x)
    assert len(run.server.leases.held[0]) > 1
    replica.worker.exchange._hang_up()
    until(lambda: not run.server.sessions, "the end of the life")
    (crash,) = (i for i in run.trace().incidents if i.what == "crashed")
    assert crash.lost == 1
    assert Lease(COUNTED, 0, 0) not in run.server.leases.held
    del batches
    run.stop()
    replica.leave()
