"""Payloads over process groups of two: gloo from memory to memory, by the same code NCCL between GPUs.

A group of torch.distributed has a fixed membership and breaks as a whole when a member dies, so each link has one of its
own, with two members: a death breaks that link only. Its members find each other over the link itself, which no stranger
can join. Payloads are asked for once their header has come over the link's socket, so a receive never waits for a
computation, and its time-out, after which a gloo pair is closed for good, means that the link is dead.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .link import Link, LinkLost
from .message import Corrupt, Header, Kind

c10d: Any = torch.distributed  # whose types do not name stores and process groups


class GlooLink(Link):
    """A link whose payloads go through a process group of two."""

    transport = "gloo"

    def __init__(self, sock: socket.socket, name: str, timeout: float, accepts: bool) -> None:
        """``accepts`` says which end this is: the one that accepted the connection."""
        super().__init__(sock, name, timeout)
        self.other = int(accepts)
        self.pair: Any = None
        self.book: _Book | None = None

    def meet(self) -> None:
        options = c10d.ProcessGroupGloo._Options()
        options._devices = [_device(self.sock.getsockname()[0])]
        options._timeout = timedelta(seconds=self.timeout)
        options._threads = 1
        book = _Book(self)
        try:
            self.pair = c10d.ProcessGroupGloo(book, 1 - self.other, 2, options)
        except (LinkLost, Corrupt):
            raise
        except RuntimeError as error:
            raise book.lost or LinkLost(f"no process group with {self.name} ({_first(error)})") from None
        self.book = book  # the group would miss it

    def put(self, data: Tensor) -> None:
        self._done(lambda: self.pair.send([data], self.other, 0), "took")

    def take(self, length: int) -> Tensor:
        data = torch.empty(length, dtype=torch.uint8)
        self._done(lambda: self.pair.recv([data], self.other, 0), "gave")
        return data

    def close(self) -> None:
        super().close()
        self.pair = self.book = None

    def _done(self, start: Any, verb: str) -> None:
        try:
            start().wait()
        except RuntimeError as error:
            raise LinkLost(f"{self.name} {verb} no payload ({_first(error)})") from None


class _Book(c10d.Store):  # type: ignore[misc]
    """The store through which two members tell each other where they listen: what one writes goes over the link."""

    def __init__(self, link: GlooLink) -> None:
        super().__init__()
        self.link, self.known = link, dict[str, bytes]()
        self.lost: Exception | None = None

    def set(self, key: str, value: bytes) -> None:
        self.known[key] = bytes(value)
        with self._kept():
            self.link.send(Header(Kind.MEET), None, {"key": key, "value": self.known[key].hex()})

    def get(self, key: str) -> bytes:
        while key not in self.known:
            with self._kept():
                note = self.link.recv({Kind.MEET: 0}, "where it listens").note
                try:
                    self.known[str(note["key"])] = bytes.fromhex(note["value"])
                except (KeyError, TypeError, ValueError):
                    raise Corrupt(f"{self.link.name} does not say where it listens") from None
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
