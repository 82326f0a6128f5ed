"""How the two ends of a link agree on the way that payloads take."""

from __future__ import annotations

from typing import Any

from .host import Refused
from .link import Link, machine
from .protocol.wire import Corrupt
from .shared_memory import SharedLink


def offered(link: Link, other: Any, transport: str, sizes: tuple[int, int]) -> tuple[Link, dict[str, Any]]:
    """At the accepting end: the link with the way for payloads that suits both, and what the other end must know of it.

    ``other`` is the other end's `machine`; ``sizes`` are the bytes that this end puts and takes at most. Both ends call
    `Link.meet` once the other knows. Raises `Refused` where ``transport`` is impossible.
    """
    near = other == machine()
    if transport == "auto":
        transport = "shared" if near else "gloo"
    if transport == "shared":
        if not near:
            raise Refused("a process on another machine cannot share memory: take the transport gloo, tcp or auto")
        try:
            better = SharedLink(link.sock, link.name, link.timeout, sizes)
        except OSError as error:
            raise Refused(str(error)) from None
        return _follows(better, link), {"transport": "shared", "sizes": sizes, **better.offer()}
    if transport == "gloo":
        from .gloo import GlooLink

        return _follows(GlooLink(link.sock, link.name, link.timeout, True), link), {"transport": "gloo"}
    return link, {"transport": "tcp"}


def taken(link: Link, note: dict[str, Any]) -> Link:
    """At the dialling end: the link with the way that the other end has offered."""
    if note["transport"] == "shared":
        sizes, path = note.get("sizes"), note.get("path")
        if not (isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size >= 0 for size in sizes)):
            raise Corrupt(f"{link.name} offers shared memory of {str(sizes)[:100]} bytes: two whole numbers are due")
        theirs, mine = sizes
        link = _follows(SharedLink(link.sock, link.name, link.timeout, (mine, theirs), str(path)), link)
    elif note["transport"] == "gloo":
        from .gloo import GlooLink

        link = _follows(GlooLink(link.sock, link.name, link.timeout, False), link)
    link.meet()
    return link


def _follows(better: Link, link: Link) -> Link:
    """``better`` in the place of ``link``, with what that one has read ahead."""
    better.unread = link.unread
    return better
