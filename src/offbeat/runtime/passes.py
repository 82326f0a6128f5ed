"""How a pass over a loader's data is shared among all workers: `Replica.shard`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Sampler

from ..core.seeds import derive
from .team import Team
from .worker import Driver

if TYPE_CHECKING:
    from .replica import Replica

T = TypeVar("T")


def shard(replica: Replica, loader: Iterable[T]) -> Iterator[T]:
    """The minibatches of ``loader`` that fall to this worker: see `Replica.shard`."""
    number, replica._passes = replica._passes, replica._passes + 1
    replica._member.check()
    replica._member.unfinished = True
    replica._own()
    deal: _Deal | None = None
    batches: Iterable[T]
    if (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    ):
        deal = _Deal(loader, replica.worker, number, replica.team)
        batches = _dealt(loader, deal, replica._member.patient(loader.worker_init_fn))
    else:
        n = replica.worker.terms.workers * replica.team.size
        i = (replica.id * replica.team.size + replica.team.rank) % n
        batches = (item for k, item in enumerate(loader) if k % n == i)
    for batch in batches:
        replica._own()  # the link may have been mended while the minibatch was asked for
        if deal and deal.lives.popleft() != replica.worker.life:
            continue  # loaded ahead, and given to somebody else since
        replica.worker.use()
        yield batch
    with replica._member.turn():
        replica._show()
    replica._member.unfinished = False


class _Deal(Sampler[list[int]]):
    """The minibatches of a pass that this worker draws, as indices of the data set."""

    def __init__(self, loader: DataLoader[Any], worker: Driver, number: int, team: Team) -> None:
        self.loader, self.worker, self.number, self.team = loader, worker, number, team
        self.orders: dict[int, list[list[int]]] = {}
        self.lives: deque[int] = deque()  # of the worker, when it drew each minibatch that is still being loaded

    def __iter__(self) -> Iterator[list[int]]:
        size = len(self.loader)
        while (ticket := self.worker.ticket(before=(self.number + 1) * size)) is not None:
            self.lives.append(self.worker.life)
            yield self._order(ticket // size)[ticket % size][self.team.rank :: self.team.size]

    def _order(self, number: int) -> list[list[int]]:
        """All minibatches of pass ``number``, the same at all workers."""
        if number not in self.orders:
            seed = derive(self.worker.terms.seed, number)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed those of GPUs, too
                batches = self.loader.batch_sampler
                for part in (self.loader, self.loader.sampler, batches, getattr(batches, "sampler", None)):
                    generator = getattr(part, "generator", None)
                    if isinstance(generator, torch.Generator):
                        generator.manual_seed(seed)
                self.orders[number] = [list(batch) for batch in self.loader.batch_sampler or ()]
        return self.orders[number]


def _dealt(loader: DataLoader[T], deal: _Deal, init: Callable[[int], None]) -> DataLoader[T]:
    """``loader`` with the minibatches that this worker draws; ``init`` is called in each of its processes."""
    if isinstance(loader.sampler, DistributedSampler):
        raise ValueError("the loader has a DistributedSampler: give one without, `shard` does its work")
    if not len(loader):
        raise ValueError(f"the loader has no minibatch ({len(loader.dataset)} examples): choose a smaller batch")  # type: ignore[arg-type]
    return DataLoader(
        loader.dataset,
        batch_sampler=deal,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=init,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )
