"""How a training loop's passes over its data are shared among all workers: `Replica.shard`.

A worker lists the order of a pass from a seed, as all others do, and draws leases, which are indices into it. Loaders go on
making minibatches in their own way: only their batch sampler is another one, which gives the minibatches of the leases.
"""

from __future__ import annotations

import math
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sized
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from ..core.seeds import derive
from .leases import COUNTED, Key, Lease, Opening
from .orders import GeneratorStates, Order, digest, kept
from .schedulers import bring
from .team import Team

if TYPE_CHECKING:
    from .replica import Replica

T = TypeVar("T")

# what can be shared


class Items:
    """A sequence, or a data set of which any item can be had: item i is minibatch i, and each rank of a group gets its own."""

    kind = "sequence"

    def __init__(self, data: Any, team: Team) -> None:
        self.data, self.team, self.name = data, team, type(data).__name__
        self.owners: list[Any] = []
        self.length = len(data) // team.size
        if len(data) and not self.length:
            raise ValueError(f"shard: the {type(data).__name__} has {len(data)} items, and there are {team.size} ranks")

    def listed(self) -> Iterator[list[Any]]:
        return ([i * self.team.size + self.team.rank] for i in range(self.length))

    def short(self, indices: list[Any]) -> bool:
        return False  # each rank lists an item of its own

    def digest(self, order: Order) -> str:
        with order.streams():
            return f"{self.kind} {digest(self.data[0]) if self.length else ''}"

    def feed(self, part: Iterable[list[Any]]) -> Iterator[Any]:
        return (self.data[i] for (i,) in part) if self.length else iter(())


class Batches:
    """A `DataLoader`, whose minibatches are dealt out as its own samplers make them."""

    kind = "loader"

    def __init__(
        self, loader: DataLoader[Any], replica: Replica, clones: weakref.WeakKeyDictionary[Any, tuple[Any, Deal]]
    ) -> None:
        self.loader, self.team, self.clones, self.member = loader, replica.team, clones, replica._member
        self.name, self.batched = type(loader).__name__, loader.batch_sampler is not None
        self.ranks = 1 if self.batched else self.team.size
        samplers: tuple[Any, Any] = loader.sampler, loader.batch_sampler
        self.sampler = samplers[self.batched]
        self.owners = [loader, *_samplers(loader.sampler), *_samplers(loader.batch_sampler)]
        if any(isinstance(owner, DistributedSampler) for owner in self.owners):
            raise ValueError("the loader has a DistributedSampler: give one without, `shard` does its work")
        self.length: int | None = None
        with suppress(TypeError, NotImplementedError):  # of a sampler that has none
            self.length = len(self.sampler) // self.ranks
        if self.length == 0:
            examples = len(loader.dataset)  # type: ignore[arg-type]
            raise ValueError(f"the loader has no minibatch ({examples} examples): choose a smaller batch")

    def listed(self) -> Iterator[list[Any]]:
        if self.batched:
            return (list(batch) for batch in self.sampler)
        size, indices = self.team.size, iter(self.sampler)
        groups = iter(lambda: list(islice(indices, size)), [])
        return (group[self.team.rank : self.team.rank + 1] for group in groups if len(group) == size)

    def short(self, indices: list[Any]) -> bool:
        """Whether there is not one example for each rank."""
        return len(indices) * self.ranks < self.team.size

    def digest(self, order: Order) -> str:
        data = self.loader.dataset
        about = type(data).__qualname__, len(data) if isinstance(data, Sized) else None, self.batched
        return f"{self.kind} {order.digest()} {digest(about)}"

    def feed(self, part: Iterable[list[Any]]) -> Iterator[Any]:
        found = self.clones.get(self.loader)
        if found is None:
            deal = Deal(self.sampler)
            found = self.clones[self.loader] = self._with(self.loader, deal), deal
        clone, deal = found
        rank, size = self.team.rank, self.team.size
        deal.part = iter(indices[rank::size] if self.batched else indices[0] for indices in part)
        return iter(clone)

    def _with(self, loader: Any, deal: Deal) -> Any:
        """A loader like the user's own, subclass and all, with another sampler."""
        clone = object.__new__(type(loader))
        own = vars(clone)
        own.update(vars(loader))
        inside = [name for name, value in own.items() if isinstance(value, DataLoader)]
        for name in inside:  # it is an adapter, as accelerate's are
            own[name] = self._with(own[name], deal)
        if not inside:
            own["batch_sampler" if self.batched else "sampler"] = deal
            own["worker_init_fn"] = self.member.patient(loader.worker_init_fn)
            own["_iterator"] = None
        return clone


class Deal(Sampler[Any]):
    """In the place of a loader's batch sampler: it gives the minibatches of one worker's part of a pass."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.part: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.part

    def __len__(self) -> int:
        return len(self.original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)


class Steps:
    """The minibatches of another source, ``count`` for a step, or fewer for its last one: each item is a list of them."""

    def __init__(self, source: Items | Batches, count: int) -> None:
        self.source, self.count, self.owners, self.name = source, count, source.owners, source.name
        self.length = None if source.length is None else math.ceil(source.length / count)

    def listed(self) -> Iterator[list[Any]]:
        whole = (indices for indices in self.source.listed() if not self.source.short(indices))
        return iter(lambda: list(islice(whole, self.count)), [])

    def short(self, step: list[Any]) -> bool:
        return not step

    def digest(self, order: Order) -> str:
        return self.source.digest(order)

    def feed(self, part: Iterable[list[Any]]) -> Iterator[list[Any]]:
        due, found = deque[int](), list[Any]()

        def minibatches() -> Iterator[Any]:
            for step in part:
                due.append(len(step))
                yield from step

        for minibatch in self.source.feed(minibatches()):
            found.append(minibatch)
            if due and len(found) >= due[0]:
                due.popleft()
                yield found
                found = []


def _samplers(sampler: Any) -> list[Any]:
    """A sampler and those inside of it."""
    found, todo = list[Any](), [sampler]
    while todo:
        one = todo.pop()
        if not isinstance(one, type) and hasattr(one, "__dict__") and not any(one is other for other in found):
            found.append(one)
            todo += [v for name, v in vars(one).items() if isinstance(v, Sampler) or "sampler" in name.lower()]
    return found


class Stream:
    """Anything else that can be gone over: worker i of n takes items i, i + n, ... of it."""

    kind = "stream"

    def __init__(self, items: Iterable[Any], team: Team, accumulate: int | None) -> None:
        self.items, self.team, self.accumulate = items, team, accumulate
        for name, value in getattr(items, "__dict__", {}).items():
            if isinstance(value, DataLoader) and not isinstance(items, DataLoader):
                raise ValueError(
                    f"shard: the loader is inside of a {type(items).__name__} (its {name}), where its minibatches cannot be dealt "
                    "out: shard the loader itself; what goes around it goes around the shard, as in tqdm(replica.shard(loader))"
                )

    def deal(self, number: int, count: int, streams: GeneratorStates) -> Iterator[tuple[bool, Any]]:
        """All items, and whether they are the ``number``-th worker's of ``count``."""
        with streams():
            items = iter(self.items)
        for k in range(sys.maxsize):
            try:
                with streams():
                    item = next(items) if self.accumulate is None else list(islice(items, self.accumulate))
            except StopIteration:
                return
            if self.accumulate is not None and not item:
                return
            yield k % count == number, item


Source = Items | Batches | Steps
"""What is dealt out by leases."""
Walk = Generator[tuple[Any, Callable[[], bool]]]
"""Items, and what says that one is begun: whether it is to be used."""

# a worker's passes


class Passes:
    """The passes of one replica."""

    def __init__(self, replica: Replica) -> None:
        self._replica = weakref.ref(replica)  # which leaves its run when the script has dropped it
        self.counted = 0  # passes that were begun, but for those of an epoch
        self.epoch, self.begun = -1, 0  # the last epoch, and how many passes of it were begun
        self.now: int | None = None  # the epoch that `epochs` is at
        self.clones: weakref.WeakKeyDictionary[Any, tuple[Any, Deal]] = weakref.WeakKeyDictionary()
        self.parts: list[Part] = []  # of passes that are not at their end, the last one inside of the others
        self.told = set[str]()  # what kinds of things were said
        self.running = 0  # passes that are not at their end, of any kind of data
        self.position = 0  # up to which minibatch of the run this worker has got, over all passes, one after the other
        self.over = 0  # passes that are over, or epochs
        self.taken = 0  # minibatches that this worker has had

    @property
    def replica(self) -> Replica:
        replica = self._replica()
        assert replica is not None
        return replica

    def shard(
        self, data: Iterable[Any], epoch: int | None, accumulate: int | None, skip: int, ahead: bool = False
    ) -> Shard[Any]:
        """See `Replica.shard`. ``ahead``: the loop asks for an item when it is about to begin the one before."""
        if isinstance(data, Shard):
            raise ValueError("shard: this is sharded already: give the loader itself")
        for name, value, least in (("epoch", epoch, 0), ("accumulate", accumulate, 1), ("skip", skip, 0)):
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"shard: {name} = {value!r}: it must be a whole number from {least} on")
        return Shard(self, data, epoch, accumulate, skip, ahead)

    def epochs(self, epochs: range, scheduler: Any = None) -> Iterator[int]:
        if epochs.step != 1 or epochs.start < 0:
            raise ValueError(f"epochs: {epochs} must go up by one, from 0 or more")
        self.replica._start()
        first = max(self.run_epoch(len(epochs)), epochs.start)
        if first > epochs.start:
            self.say("epoch", f"the run is at epoch {first}, and this worker begins there")
        try:
            for self.now in range(first, epochs.stop):
                if scheduler is not None:
                    bring(scheduler, self.now)
                yield self.now
                if self.stopped():
                    return
        finally:
            self.now = None

    def run_epoch(self, count: int = 0) -> int:
        """The epoch that the run is in; it has ``count`` of them, where that is known (above 0)."""
        return int(self.ask({"epoch": True, "of": count})["epoch"])

    def stopped(self) -> bool:
        """Whether a worker has ended the run for all."""
        return not self.replica.worker.left and bool(self.ask({"epoch": True})["stopped"])

    def key(self, epoch: int | None) -> Key:
        """A new pass begins: its series and number."""
        epoch = self.now if epoch is None else epoch
        if epoch is None:
            self.counted += 1
            return COUNTED, self.counted - 1
        if epoch != self.epoch:
            self.epoch, self.begun = epoch, 0
        self.begun += 1
        return self.begun - 1, epoch

    def source(self, data: Any, accumulate: int | None) -> Source | Stream:
        """How ``data`` can be shared."""
        team, batched = self.replica.team, isinstance(data, DataLoader)
        sized = hasattr(type(data), "__len__") and hasattr(type(data), "__getitem__")
        stream = isinstance(data.dataset, IterableDataset) if batched else not sized
        if stream or isinstance(data, Mapping | IterableDataset):
            return Stream(data, team, accumulate)
        source = Batches(data, self.replica, self.clones) if batched else Items(data, team)
        return source if accumulate is None else Steps(source, accumulate)

    def say(self, what: str, text: str) -> None:
        """Say something once of its kind."""
        if what not in self.told:
            self.told.add(what)
            self.replica.worker.log.warning(text)

    def ask(self, note: dict[str, Any]) -> dict[str, Any]:
        """A word about minibatches, and the answer; ``ValueError`` where it is a refusal."""
        with self.replica._member.turn():
            answer = self.replica.worker.more(note)
        if "refused" in answer:
            raise ValueError(answer["refused"])
        return answer

    def go(self, replica: Replica, source: Source | Stream, key: Key, skip: int, ahead: bool) -> Iterator[Any]:
        """This worker's minibatches of a pass, but for the first ones; ``replica`` stays until their end."""
        member = replica._member
        member.check()
        member.unfinished = True
        replica._start()
        replica._own()
        self.running += 1
        walk = self._turns(source, key, skip) if isinstance(source, Stream) else self._leased(source, key, skip)
        try:
            with closing(walk):
                for item, begin in walk:
                    if ahead or begin():
                        member.unfinished = True  # another pass, inside of this one, may have come to its end
                        yield item
                    if ahead:
                        begin()
        finally:
            self.running -= 1
            if key[0] <= 0:  # the first pass of its epoch, or one that is counted
                self.over = max(self.over, key[1] + 1)
        with member.turn():
            replica._show()
            replica._ended = True
        member.unfinished = False

    def reach(self, position: int) -> bool:
        """This worker has a minibatch, the ``position``-th of the run, and uses it."""
        self.taken += 1
        self.position = max(self.position, position)
        return True

    def _leased(self, source: Source, key: Key, skip: int) -> Walk:
        worker, part, whole = self.replica.worker, Part(self, source, key), False
        self.parts.append(part)
        if skip:
            self.ask({"open": part.opening, "want": 0, "skip": skip})
        try:
            for batch in source.feed(part):
                self.replica._own()  # the link may have been mended while the minibatch was asked for
                yield batch, part.begin
            part.rest()
            whole = True
        finally:
            self.parts.remove(part)
            worker.close(part.opening, whole)
            worker.back.extend(lease for life, lease, _ in part.drawn if life == worker.life)

    def _turns(self, source: Stream, key: Key, skip: int) -> Walk:
        replica, team = self.replica, self.replica.team
        kind = type(source.items).__name__
        self.say(
            kind,
            f"shard: this {kind} is dealt out by turns, item by item: a worker that is started again begins it anew, and what a "
            "worker had that died is not given to others; a DataLoader whose data set has a length is dealt out better",
        )
        count = replica.worker.terms.workers * team.size
        number = (replica.id * team.size + team.rank) % count
        streams, first, before = GeneratorStates(derive(replica.worker.terms.seed, *key), []), True, self.position
        asked = time.monotonic()
        for k, (mine, item) in enumerate(source.deal(number, count, streams)):
            if first:
                first, opening = False, Opening(*key, None, f"{source.kind} {digest(item)}")
                self.ask({"open": opening, "want": 0})
            if mine and k >= skip * team.size:
                if time.monotonic() > asked + 1.0:
                    asked = time.monotonic()
                    if self.stopped():
                        return
                replica._own()
                yield item, partial(self.reach, before + (k + 1) // team.size)


class Part:
    """One worker's part of one pass: what it draws, until it is used."""

    def __init__(self, passes: Passes, source: Source, key: Key) -> None:
        self.passes, self.source, self.worker = passes, source, passes.replica.worker
        self.order = self._order(key)
        self.opening = Opening(*key, source.length, source.digest(self.order))
        self.other: tuple[Key, Order | None] = (key, self.order)  # the last pass of which something was drawn
        self.fed = self.own = False  # whether it has had something, and takes nothing of other passes
        self.drawn: deque[tuple[int, Lease, list[Any]]] = deque()  # and not begun, and in which life of the worker

    def _order(self, key: Key) -> Order:
        return Order(self.source.listed, derive(self.worker.terms.seed, *key), self.source.owners)

    def __iter__(self) -> Iterator[list[Any]]:
        while (drawn := self._draw()) is not None:
            lease, indices = drawn
            if self.source.short(indices):
                self.worker.use(lease)
                continue
            self.drawn.append((self.worker.life, lease, indices))
            yield indices

    def begin(self) -> bool:
        """A minibatch has been loaded; whether it is to be used, which it is not if another worker has got it meanwhile."""
        if not self.drawn:
            if not self.fed:
                raise ValueError(
                    f"shard: the {self.source.name} gives minibatches without drawing them from its batch_sampler, so that they cannot be "
                    "dealt out: shard a DataLoader that makes its iterator when it is gone over"
                )
            return True  # it gives several for each that it draws
        life, lease, indices = self.drawn.popleft()
        if life != self.worker.life:
            return False
        self.worker.use(lease, indices)
        if lease.series <= 0:
            self.passes.reach(lease.number * (self.opening.length or 0) + lease.place + 1)
        return True

    def rest(self) -> None:
        """All is loaded: what a loader has drawn and not given, such as what it filters out, is used as well."""
        while self.drawn:
            self.begin()

    def _draw(self) -> tuple[Lease, list[Any]] | None:
        worker, team = self.worker, self.passes.replica.team
        if (last := self.passes.parts[-1]) is not self:
            raise ValueError(
                f"shard: a minibatch is drawn from pass {self.opening.number} while pass {last.opening.number}, which was begun "
                "later, is not at its end, as in zip(shard(a), shard(b)); their minibatches would not come to the same workers: "
                "put the data sets together (torch.utils.data.StackDataset) and shard one loader; to evaluate on some minibatches "
                "in the middle of a pass, use the plain loader"
            )
        end, pause = time.monotonic() + WAIT, 0.02
        while True:
            lease = worker.draw(self.opening, self.fed, self.own)
            if lease is None:
                if not (worker.wait and worker.free_to_wait) or team.any(
                    time.monotonic() > end or self.passes.replica._member.told()
                ):
                    break
                said = "has nothing left for this worker, which waits for others to begin the next"
                self.passes.say("wait", f"shard: pass {self.opening.number} {said}")
                time.sleep(pause)
                pause = min(2 * pause, 1.0)
                continue
            if (indices := self._look_up(lease)) is not None:
                self.fed = True
                return lease, indices
            worker.back.append(lease)
        if not self.fed and not worker.left and not self.passes.stopped():
            self.passes.say(
                "nothing",
                f"shard: of pass {self.opening.number} nothing is left for this worker, and its loop's body does not run; "
                "`for epoch in replica.epochs(n)` begins where the run is",
            )
        return None

    def _look_up(self, lease: Lease) -> list[Any] | None:
        """The indices of a minibatch; None where there is none, or not in this order."""
        if lease.key != self.opening.key:
            if self.other[0] != lease.key:
                with kept(self.source.owners):
                    order = self._order(lease.key)
                    self.other = lease.key, order if self.source.digest(order) == self.worker.order else None
            if self.other[1] is None:
                self.own = True
                return None
            if not self.fed:
                self.passes.say(
                    "late",
                    f"shard: pass {self.opening.number} was over before this worker came to it, and its loop gets one minibatch "
                    f"of pass {lease.number}; `for epoch in replica.epochs(n)` begins where the run is",
                )
            return self.other[1][lease.place]
        try:
            return self.order[lease.place]
        except IndexError:
            assert self.order.length is not None
            self.passes.ask({"open": self.opening, "want": 0, "end": self.order.length})
            return None


WAIT = 60.0
"""Seconds for which a worker that has had nothing of a pass waits for others to go on to the next."""


class Shard(Generic[T]):
    """A loader's minibatches as they fall to this worker: see `Replica.shard`. Going over it is one pass, and once more the next.

    Its length is that of the whole pass, of which this worker gets a part. Other attributes are the loader's.
    """

    def __init__(
        self,
        passes: Passes,
        data: Iterable[Any],
        epoch: int | None,
        accumulate: int | None,
        skip: int,
        ahead: bool,
    ) -> None:
        self._passes, self._data, self._epoch, self._accumulate = passes, data, epoch, accumulate
        self._skip, self._ahead = skip, ahead
        self._replica = passes.replica  # which stays as long as this does
        self._source = passes.source(data, accumulate)

    def __iter__(self) -> Iterator[T]:
        skip, self._skip = self._skip, 0
        return self._passes.go(self._replica, self._source, self._passes.key(self._epoch), skip, self._ahead)

    def __len__(self) -> int:
        return math.ceil(len(self._data) / (self._accumulate or 1))  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_data"], name)
