"""A worker that is itself a group: the ranks of one process group train in step, and exchange with the others in parts.

Where each rank has the whole model (DistributedDataParallel), rank r of G exchanges the r-th part of each vector, with the
r-th server or with the r-th ranks of other workers, and the ranks then put the parts together. Where each has a shard of
the model (FSDP2), that is its part. Methods work on each element by itself, so parts are exact; the few numbers that belong
to a whole message are the first rank's for all. What breaks for one rank breaks for all: they join anew together.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.method import Message
from ..core.tree import leaves, rebuild
from .leases import Lease
from .link import LinkLost
from .protocol.wire import Corrupt
from .worker import Exchange, Remote, Spoilt, Terms

T = TypeVar("T")


class Agreed(LinkLost):
    """What one rank has lost, raised at all of them."""


class AgreedSpoilt(Agreed, Spoilt):
    """What one rank has brought and is not finite, raised at all of them."""


class Team:
    """The ranks of ``group`` (None: this process alone) as one worker; ``whole`` says that each has the whole model. All ranks
    call the same methods in the same order."""

    def __init__(self, group: dist.ProcessGroup | None = None, whole: bool = True) -> None:
        self.group, self.whole = group, whole
        self.rank, self.size, self.device = 0, 1, torch.device("cpu")
        if group is not None:
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
            self.device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")

    def part(self, parameters: int) -> slice:
        """Which of so many parameters this rank exchanges."""
        if not self.whole:
            return slice(0, parameters)
        return slice(round(self.rank * parameters / self.size), round((self.rank + 1) * parameters / self.size))

    def cut(self, message: Message) -> Message:
        """This rank's part of a message that all ranks have."""
        if self.size == 1:
            return message
        return rebuild(message, [t[self.part(len(t))] if t.dim() else t for t in leaves(message)])

    def join(self, message: Message, parameters: int) -> Message:
        """The message of which each rank has its part, for a model of so many parameters."""
        if self.size == 1:
            return message
        return rebuild(message, [self._joined(t, parameters) for t in leaves(message)])

    def _joined(self, t: Tensor, parameters: int) -> Tensor:
        if not t.dim():
            number = t.detach().clone().to(self.device)
            dist.broadcast(number, group_src=0, group=self.group)
            return number.to(t.device)
        if not self.whole:
            return t
        edges = [round(r * parameters / self.size) for r in range(self.size + 1)]
        longest = max(b - a for a, b in pairwise(edges))
        mine = torch.zeros(longest, dtype=t.dtype, device=self.device)  # gloo gathers tensors of one length only
        mine[: len(t)].copy_(t)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.group)
        return torch.cat([parts[r][: edges[r + 1] - edges[r]] for r in range(self.size)]).to(t.device)

    def first(self, value: T) -> T:
        """The first rank's value, for all; anything that can be pickled."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group_src=0, group=self.group)
        return box[0]

    def highest(self, number: int) -> int:
        """The highest of all ranks' numbers."""
        if self.size == 1:
            return number
        told = torch.tensor([number], device=self.device)
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group)
        return int(told)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so."""
        return bool(self.highest(int(flag)))

    def __enter__(self) -> None:
        """What is lost inside by one rank is lost by all, who get it as `Agreed`."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        lost = isinstance(error, LinkLost | Corrupt)
        if isinstance(error, Agreed) or (error is not None and not lost):
            return
        worst = self.highest(2 if isinstance(error, Spoilt) else int(lost))
        if worst == 2:
            step = error.step if isinstance(error, Spoilt) else -1
            raise AgreedSpoilt(
                str(error or "another rank's part of what this worker brought is not finite"), step
            ) from error
        if worst:
            raise Agreed(str(error or "another rank of this worker has lost its link")) from error


class Together(Exchange):
    """A server, or its shards, as the ranks of a team see it: each exchanges its own part."""

    def __init__(self, mine: Remote, team: Team, parameters: int) -> None:
        """``mine`` exchanges this rank's part of ``parameters``."""
        self.mine, self.team, self.parameters = mine, team, parameters

    def join(self) -> Terms:
        terms: Terms | None = None
        for rank in range(self.team.size):  # the first server says which worker this is
            with self.team:
                if rank == self.team.rank:
                    terms = self.mine.join()
            self.mine.worker = self.team.first(self.mine.worker)
        assert terms is not None
        reply = self.team.join(terms.reply, self.parameters)
        return self.team.first(terms._replace(reply=()))._replace(reply=reply)

    def push(self, msg: Message, gradients: int, note: dict[str, Any]) -> None:
        with self.team:
            self.mine.push(self.team.cut(msg), gradients, note)

    def reply(self) -> tuple[Message, list[Lease]]:
        with self.team:
            reply, leases = self.mine.reply()
        return self.team.join(reply, self.parameters), self.team.first(leases)

    def more(self, note: dict[str, Any]) -> dict[str, Any]:
        with self.team:
            answer = self.mine.more(note) if not self.team.rank else {}
        return self.team.first(answer)

    def master(self) -> Tensor:
        with self.team:
            part = self.mine.master()
        x: Tensor = self.team.join(part, self.parameters)
        return x

    def leave(self, note: dict[str, Any]) -> None:
        self.mine.leave(note)
