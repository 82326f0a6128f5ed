"""Payloads over process groups of two: gloo from memory to memory, by the same code NCCL between GPUs.

A group of torch.distributed has a fixed membership and breaks as a whole when a member dies, so each link has one of its
own, with two members: a death breaks that link only. The group is made through a `TCPStore` under a prefix that only the
two ends know. Payloads are asked for once their header has come over the link's socket, so a receive never waits for a
computation, and its time-out, after which a gloo pair is closed for good, means that the link is dead.
"""

from __future__ import annotations

import secrets
import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from .link import Link, LinkLost

c10d: Any = torch.distributed  # whose types do not name stores and process groups


class GlooLink(Link):
    """A link whose payloads go through a process group of two."""

    transport = "gloo"

    def __init__(self, sock: socket.socket, name: str, timeout: float, store: Any, prefix: str = "") -> None:
        """``prefix`` is what the accepting end has offered; without it this is that end.

        ``store`` is this link's own connection to the store: who waits for a key on one lets nobody else use it.
        """
        super().__init__(sock, name, timeout)
        self.store, self.accepts = store, not prefix
        self.prefix = prefix or secrets.token_hex(16)
        self.pair: Any = None

    def offer(self) -> dict[str, Any]:
        return {"prefix": self.prefix}

    def put(self, data: Tensor) -> None:
        self._group()
        self._done(lambda: self.pair.send([data], int(self.accepts), 0), "took")

    def take(self, length: int) -> Tensor:
        self._group()
        data = torch.empty(length, dtype=torch.uint8)
        self._done(lambda: self.pair.recv([data], int(self.accepts), 0), "gave")
        return data

    def close(self) -> None:
        super().close()
        self.pair = self.store = None

    def _group(self) -> None:
        """Make the group at the first payload: both ends are there then."""
        if self.pair is None:
            host = self.sock.getsockname()[0]
            self.pair = group(self.store, self.prefix, int(not self.accepts), 2, host, self.timeout)
            self.store = None  # the group has what it needs

    def _done(self, start: Any, verb: str) -> None:
        try:
            start().wait()
        except RuntimeError as error:
            raise LinkLost(f"{self.name} {verb} no payload ({_first(error)})") from None


def group(store: Any, prefix: str, rank: int, size: int, host: str, timeout: float) -> Any:
    """A process group among those who give the same ``prefix``, over the network of ``host``. Raises `LinkLost`."""
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=timeout)
    try:
        return c10d.ProcessGroupGloo(c10d.PrefixStore(prefix, store), rank, size, options)
    except RuntimeError as error:
        raise LinkLost(f"no process group of {size} ({_first(error)})") from None


def join_store(host: str, port: int, timeout: float) -> Any:
    """A connection to the store at ``host`` and ``port``. Raises `LinkLost`."""
    try:
        return c10d.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout), wait_for_workers=False)
    except RuntimeError as error:
        raise LinkLost(f"no store for process groups at {host}:{port} ({_first(error)})") from None


def make_store(host: str, timeout: float) -> tuple[Any, int]:
    """A store that listens at ``host`` only, and its port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host, 0), family=family)
    port = sock.getsockname()[1]
    store = c10d.TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        master_listen_fd=sock.detach(), use_libuv=False,
    )
    return store, port


def _first(error: RuntimeError) -> str:
    return str(error).splitlines()[0][:200]
