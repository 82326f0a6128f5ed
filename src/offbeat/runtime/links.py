"""The links that a peer has dialled to other peers: one to each, in its present life."""

from __future__ import annotations

from typing import Any

from .incarnation import Incarnation
from .link import Link, LinkLost, dial, machine
from .protocol.wire import Kind
from .way import taken


class Links:
    """Links from one life of a peer to others, made when they are wanted. Several threads may use it."""

    def __init__(self, incarnation: Incarnation, token: str) -> None:
        self.incarnation, self.token = incarnation, token
        self.links: dict[int, tuple[int, Link]] = {}  # worker -> its life, and the link

    def to(self, worker: int, about: dict[str, Any]) -> Link:
        """The link to a peer in its present life. Raises `LinkLost`, `Corrupt`, and ``PermissionError`` where a stranger has its port."""
        life, link = self.links.get(worker, (0, None))
        if link is not None and life == about["life"]:
            return link
        self.drop(worker)
        own = self.incarnation
        link = dial(about["address"], self.token, f"worker {worker}", own.timeout)
        try:
            link.send(own.head._replace(kind=Kind.HELLO), None, {"machine": machine()})
            welcome = link.recv({Kind.WELCOME: 0}, "its welcome")
            if welcome.header[2:4] != (worker, about["life"]):
                raise LinkLost(f"somebody else answers at {about['address']}, where worker {worker} was")
            link = taken(link, welcome.note)
            with own.monitor:  # a thread may have dialled for a life that is over by now, whose links are closed
                if own.over.is_set():
                    raise LinkLost(f"{own.lost or 'this life is over'}; worker {worker} was dialled")
                self.links[worker] = about["life"], link
        except BaseException:
            link.close()
            raise
        return link

    def drop(self, worker: int) -> None:
        """Close the link to a peer, if there is one."""
        _, link = self.links.pop(worker, (0, None))  # at once, as several threads may
        if link is not None:
            link.close()

    def leave_the_dead(self) -> None:
        """Hang up on lives that are over, as no answer comes from them. Under the monitor."""
        for to, (life, link) in list(self.links.items()):
            if self.incarnation.alive.get(to, {}).get("life") != life:
                link.hang_up()

    def close(self) -> None:
        """Close all."""
        for to in list(self.links):
            self.drop(to)
