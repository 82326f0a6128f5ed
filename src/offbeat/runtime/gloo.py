"""Process groups: gloo from memory to memory, by the same code NCCL between GPUs.

A group of torch.distributed has a fixed membership and breaks as a whole when a member dies, so each link has one of its
own, with two members: a death breaks that link only. Averages take a group of all who take part, and a new one when those
change. Members find each other over links that they have already, which no stranger can join. Payloads of a pair are asked
for once their header has come over the link's socket, so a receive never waits for a computation, and its time-out, after
which a gloo pair is closed for good, means that the link is dead.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .link import Link, LinkLost
from .protocol.wire import Corrupt, Header, Kind, checksum

c10d: Any = torch.distributed  # whose types do not name stores and process groups

Entry = tuple[str, bytes]
"""What a member lets the others know of where it listens: a key and a value."""


class Group:
    """A process group of ``size`` members of which this is number ``rank``, over the network interface of ``host``.

    ``tell`` brings an entry to all other members, ``hear`` waits for the next one of theirs. Raises `LinkLost` or `Corrupt`
    as they do, and `LinkLost` where no group comes about.
    """

    def __init__(
        self,
        tell: Callable[[Entry], None],
        hear: Callable[[], Entry],
        rank: int,
        size: int,
        host: str,
        timeout: float,
    ) -> None:
        options = c10d.ProcessGroupGloo._Options()
        options._devices = [_device(host)]
        options._timeout = timedelta(seconds=min(timeout, 5.0) / 5)  # gloo tries five times to connect
        options._threads = 1
        self._book = _Book(tell, hear)  # the group would miss it
        try:
            self._group = c10d.ProcessGroupGloo(self._book, rank, size, options)
        except (LinkLost, Corrupt):
            raise
        except RuntimeError as error:
            raise self._book.lost or LinkLost(f"no process group of {size} ({_first(error)})") from None
        self._timeout = timedelta(seconds=timeout)
        self._group._set_default_timeout(self._timeout)

    def send(self, data: Tensor, to: int) -> None:
        """Bring ``data`` to member ``to``, which receives it. Raises `LinkLost`, as all that follow."""
        self._done(lambda: self._group.send([data], to, 0))

    def recv(self, data: Tensor, source: int) -> None:
        """Fill ``data`` with what member ``source`` sends."""
        self._done(lambda: self._group.recv([data], source, 0))

    def sum(self, data: Tensor) -> None:
        """Put the sum of all members' ``data`` into each one's."""
        self._done(lambda: self._group.allreduce([data]))

    def close(self) -> None:
        """Leave: what is asked of it from now on is lost, at the other members too."""
        self._group = None

    def _done(self, start: Callable[[], Any]) -> None:
        try:
            start().wait(self._timeout)
        except RuntimeError as error:
            raise LinkLost(_first(error)) from None


class GlooLink(Link):
    """A link whose payloads go through a process group of two."""

    transport = "gloo"

    def __init__(self, sock: socket.socket, name: str, timeout: float, accepts: bool) -> None:
        """``accepts`` says which end this is: the one that accepted the connection."""
        super().__init__(sock, name, timeout)
        self.other, self.host = int(accepts), sock.getsockname()[0]
        self.pair: Group | None = None

    def meet(self) -> None:
        self.pair = Group(self._say, self._hear, 1 - self.other, 2, self.host, self.timeout)

    def put(self, data: Tensor) -> None:
        assert self.pair is not None
        try:
            self.pair.send(data, self.other)
        except LinkLost as lost:
            raise LinkLost(f"{self.name} took no payload ({lost})") from None

    def take(self, length: int, lent: bool = False) -> tuple[Tensor, int]:
        assert self.pair is not None
        data = self._room(length, lent)
        try:
            self.pair.recv(data, self.other)
        except LinkLost as lost:
            raise LinkLost(f"{self.name} gave no payload ({lost})") from None
        return data, checksum(data)

    def close(self) -> None:
        super().close()
        self.pair = None

    def _say(self, entry: Entry) -> None:
        self.send(Header(Kind.MEET), None, {"key": entry[0], "value": entry[1].hex()})

    def _hear(self) -> Entry:
        note = self.recv({Kind.MEET: 0}, "where it listens").note
        try:
            return str(note["key"]), bytes.fromhex(note["value"])
        except (KeyError, TypeError, ValueError):
            raise Corrupt(f"{self.name} does not say where it listens") from None


class _Book(c10d.Store):  # type: ignore[misc]
    """The store through which members tell each other where they listen."""

    def __init__(self, tell: Callable[[Entry], None], hear: Callable[[], Entry]) -> None:
        super().__init__()
        self.tell, self.hear, self.known = tell, hear, dict[str, bytes]()
        self.lost: Exception | None = None

    def set(self, key: str, value: bytes) -> None:
        self.known[key] = bytes(value)
        with self._kept():
            self.tell((key, self.known[key]))

    def get(self, key: str) -> bytes:
        while key not in self.known:
            with self._kept():
                other, value = self.hear()
                self.known[other] = value
        return self.known[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        return all(key in self.known for key in keys)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        """What is raised here may come out of the group as another error."""
        try:
            yield
        except (LinkLost, Corrupt) as error:
            self.lost = error
            raise


@cache
def _device(host: str) -> Any:
    """What listens and waits for all groups of this process at one of its addresses."""
    return c10d.ProcessGroupGloo.create_device(hostname=host)


def _first(error: RuntimeError) -> str:
    return str(error).splitlines()[0][:200]
