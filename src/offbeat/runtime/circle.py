"""Averages on one machine: members joined by a link each, through memory that both of two map.

Whoever waits, waits on a socket in its own thread, so that an average of a small vector takes two turns of the scheduler,
where a process group takes a millisecond. A death closes sockets, and all see it at once.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from .link import Link, look_out
from .protocol.wire import Corrupt, Header, Kind
from .shared_memory import SharedLink

SMALL = 1 << 16
"""Bytes up to which each member adds up whole vectors; above, each adds up a part of them for all."""


def joint(link: Link, length: int, path: str = "") -> SharedLink:
    """``link`` with memory for sums of ``length`` bytes: two places each way, as one may be read while the next is laid."""
    better = SharedLink(link.sock, link.name, link.timeout, (length, length), path, places=2)
    better.unread = link.unread
    return better


class Circle:
    """Number ``rank`` of members that add up vectors, with links to all others by their ranks."""

    def __init__(self, links: dict[int, Link], rank: int, head: Header) -> None:
        self.links, self.rank, self.size, self.head = links, rank, len(links) + 1, head._replace(kind=Kind.SHARE)
        self.turn = 0

    def sum(self, data: Tensor) -> None:
        """Put the sum of all members' ``data`` [d] into each one's: the same bits, as all add up in one order.

        Raises `LinkLost` where a member is gone, or silent for its link's time-out.
        """
        everyone = dict.fromkeys(self.links, data)
        if self.size == 2 or data.nbytes <= SMALL:
            self._add(data, self._swap(everyone, everyone))
            return
        edges = [r * len(data) // self.size // 8 * 8 for r in range(self.size)]  # where words of 64 bits begin
        parts = [data[begin:end] for begin, end in pairwise([*edges, len(data)])]
        mine, theirs = parts[self.rank], {rank: parts[rank] for rank in self.links}
        told = dict.fromkeys(self.links, mine)
        self._add(mine, self._swap(theirs, told))
        for rank, part in self._swap(told, theirs).items():
            parts[rank].copy_(part)

    def close(self) -> None:
        """Hang up: whoever still relies on this circle sees it."""
        for link in self.links.values():
            link.close()

    def _swap(self, out: dict[int, Tensor], like: dict[int, Tensor]) -> dict[int, Tensor]:
        """Send each member its part of ``out``: what they have sent, shaped like ``like`` and good until the next but one."""
        self.turn += 1
        head = self.head._replace(version=self.turn)
        for rank, link in self.links.items():
            link.send(head, out[rank].view(torch.uint8))
        came = {}
        for rank, link in self.links.items():
            look_out(partial(link.waiting, 0))
            due = {Kind.SHARE: like[rank].nbytes}
            frame = link.recv(due, "its part of an average", lent={Kind.SHARE})
            if frame.header.version != self.turn:
                raise Corrupt(f"{link.name} is at average {frame.header.version}, and this one at {self.turn}")
            came[rank] = frame.payload.view(like[rank].dtype)
        return came

    def _add(self, mine: Tensor, others: dict[int, Tensor]) -> None:
        """Add up into ``mine``, in the order of ranks."""
        first, *rest = (part for _, part in sorted({**others, self.rank: mine}.items()))
        total = first + rest[0] if len(rest) > 1 else mine.add_(others[1 - self.rank])  # which is the same in any order
        for part in rest[1:]:
            total += part
        mine.copy_(total)
