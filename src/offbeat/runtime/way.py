"""How the two ends of a link agree on the way that payloads take."""

from __future__ import annotations

import threading
from typing import Any

from .host import Refused
from .link import Link, SharedLink, machine


class Stores:
    """The store that this process hosts for process groups, made when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: tuple[Any, int] | None = None

    def made(self, host: str, timeout: float) -> tuple[Any, int]:
        """The store, which listens at ``host``, and its port."""
        from .gloo import make_store

        with self._lock:
            if self._made is None:
                self._made = make_store(host, timeout)
            return self._made


def offered(
    link: Link, other: Any, transport: str, sizes: tuple[int, int], stores: Stores, host: str
) -> tuple[Link, dict[str, Any]]:
    """At the accepting end: the link with the way for payloads that suits both, and what the other end must know of it.

    ``other`` is the other end's `machine`; ``sizes`` are the bytes that this end puts and takes at most. Raises
    ``ValueError`` where ``transport`` is impossible.
    """
    near = other == machine()
    if transport == "auto":
        transport = "shared" if near else "gloo"
    if transport == "shared":
        if not near:
            raise Refused("a process on another machine cannot share memory: take the transport gloo, tcp or auto")
        try:
            link = SharedLink(link.sock, link.name, link.timeout, sizes)
        except OSError as error:
            raise Refused(str(error)) from None
        return link, {"transport": "shared", "sizes": sizes, **link.offer()}
    if transport == "gloo":
        from .gloo import GlooLink

        store, port = stores.made(host, link.timeout)
        link = GlooLink(link.sock, link.name, link.timeout, store.clone())
        return link, {"transport": "gloo", "store": port, **link.offer()}
    return link, {"transport": "tcp"}


def taken(link: Link, note: dict[str, Any], address: str) -> Link:
    """At the dialling end: the link with the way that the other end, at ``address``, has offered."""
    if note["transport"] == "shared":
        theirs, mine = note["sizes"]
        return SharedLink(link.sock, link.name, link.timeout, (mine, theirs), note["path"])
    if note["transport"] == "gloo":
        from .gloo import GlooLink, join_store

        store = join_store(address.rpartition(":")[0].strip("[]"), note["store"], link.timeout)
        return GlooLink(link.sock, link.name, link.timeout, store, note["prefix"])
    return link
