"""Averages among peers: taken in a group of those who live, made again when that changes, or fetched from one who has it."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..core.method import Message
from ..core.protocol import AllReduce
from ..core.tree import leaves, rebuild
from .circle import Circle, joint
from .incarnation import Incarnation
from .link import Frame, Link, LinkLost, dial, machine
from .links import Links
from .protocol.wire import Corrupt, Form, Header, Kind

if TYPE_CHECKING:
    from .gloo import Group


@dataclass(eq=False)
class Standing:
    """A circle or a process group for averages, which stands until somebody comes or goes."""

    name: str
    ranks: tuple[int, ...]
    living: tuple[tuple[int, int], ...]  # the workers, and their lives
    group: Group | Circle | None = None

    def close(self) -> None:
        """Whoever still relies on it sees that it is gone."""
        if self.group is not None:
            self.group.close()
            self.group = None


class Mean(NamedTuple):
    """An average that was taken: by whom, and what came out."""

    name: str
    ranks: tuple[int, ...]
    turn: tuple[int, int]
    message: Message


class Averages:
    """The averages of one life of a peer, whose vectors are on ``device``.

    ``ask`` puts a question to the coordinator, with whom to take an average, and returns the answer; its second argument says
    what is waited for.
    """

    def __init__(
        self,
        incarnation: Incarnation,
        links: Links,
        device: torch.device,
        ask: Callable[[dict[str, Any], str], dict[str, Any]],
    ) -> None:
        self.incarnation, self.links, self.device, self.ask = incarnation, links, device, ask
        self.head = incarnation.head
        self.groups: dict[tuple[Any, ...], Standing] = {}  # by their members and bytes
        self.comers: dict[tuple[str, int], Link] = {}  # who has dialled to join a circle, by its name and theirs
        self.broken: set[str] = set()  # names of circles that did not come about
        self.meets: deque[dict[str, Any]] = deque()  # where members of a group listen
        self.turn = (-1, 0)  # the last average: its round, and how many of that round came before it
        self.last: Mean | None = None  # for members who could not take it

    def mean(self, request: AllReduce) -> Mean:
        """The mean over the members who live, the same at all of them. Raises `LinkLost` where the coordinator is gone."""
        round, members = request.round or 0, request.members
        self.turn = round, self.turn[1] + 1 if self.turn[0] == round else 0
        living = tuple((m, life) for m in members if (life := self._life(m, round)))
        key = members, sum(t.nbytes for t in leaves(request.msg))
        standing = self.groups.get(key)
        if standing is not None and standing.living != living:
            standing = None
        while True:
            if standing is None:
                if key in self.groups:
                    self.groups.pop(key).close()
                note = {"round": round, "index": self.turn[1], "members": list(members)}
                told = self.ask(note, f"the average of round {round} with workers {members}")
                if told["holder"] is not None:
                    mean = self._fetch(told["holder"], request.msg)
                    if mean is None:
                        continue
                    break
                ranks = tuple(told["ranks"])
                standing = Standing(told["group"], ranks, tuple((m, self._life(m, round)) for m in ranks))
            try:
                mean = self._sum(request.msg, standing)
            except (LinkLost, Corrupt) as error:
                if self.incarnation.lost:
                    raise LinkLost(self.incarnation.lost) from None
                self.incarnation.log.warning(f"an average with workers {standing.ranks} broke ({error}); again")
                standing.close()
                standing = None
            else:
                self.groups[key] = standing
                break
        self.last = mean
        return mean

    def _life(self, worker: int, round: int) -> int:
        """The life in which a worker takes part in an average after ``round``; 0 where it does not."""
        if worker == self.head.worker:
            return self.head.incarnation
        about = self.incarnation.alive.get(worker)
        there = about is not None and about["place"] == "in" and about["since"] < round
        return int(about["life"]) if about is not None and there else 0

    def _sum(self, message: Message, standing: Standing) -> Mean:
        """The mean over the members of a group, which is made at its first average."""
        ranks, name = standing.ranks, standing.name
        kinds: dict[torch.dtype, list[Tensor]] = {}  # in one order at all members
        for t in leaves(message):
            kinds.setdefault(t.dtype, []).append(t)
        flats = {dtype: torch.cat([t.reshape(-1) for t in parts]).cpu() for dtype, parts in kinds.items()}
        if len(ranks) > 1 and standing.group is None:
            make = self._circle if self._near(ranks) else self._group
            standing.group = make(name, ranks, max(flat.nbytes for flat in flats.values()))
        pieces: dict[torch.dtype, Iterator[Tensor]] = {}
        for dtype, flat in flats.items():
            if standing.group is not None:
                standing.group.sum(flat)
                self.incarnation.sent += 2 * flat.nbytes * (len(ranks) - 1) // len(ranks)  # as a ring does
                flat /= len(ranks)
            sizes = [t.numel() for t in kinds[dtype]]
            flat = flat.to(self.device)
            pieces[dtype] = iter(torch.split(flat, sizes) if len(sizes) > 1 else (flat,))
        means = [next(pieces[t.dtype]).view(t.shape) for t in leaves(message)]
        return Mean(f"{name} at {self.turn}", ranks, self.turn, rebuild(message, means))

    def _near(self, ranks: tuple[int, ...]) -> bool:
        """Whether all of these can share memory, and are to."""
        with self.incarnation.monitor:
            others = {self.incarnation.alive.get(r, {}).get("machine") for r in ranks if r != self.head.worker}
        return others == {machine()} and self.incarnation.transport in ("auto", "shared")

    def _group(self, name: str, ranks: tuple[int, ...], length: int) -> Group:
        """A process group of these workers, for vectors of any ``length``."""
        from .gloo import Group

        rank = ranks.index(self.head.worker)
        tell, hear = (lambda entry: self._call_out(name, entry)), (lambda: self._called(name, ranks))
        return Group(tell, hear, rank, len(ranks), self.incarnation.host, self.incarnation.timeout)

    def _circle(self, name: str, ranks: tuple[int, ...], length: int) -> Circle:
        """A circle of these workers, all on this machine, for vectors of up to ``length`` bytes: each dials those before it."""
        links: dict[int, Link] = {}
        own = self.incarnation
        with contextlib.ExitStack() as made:
            made.callback(self._dismiss, name)
            for rank, to in enumerate(ranks[: ranks.index(self.head.worker)]):
                with own.monitor:
                    about = own.alive.get(to)
                if about is None:
                    raise LinkLost(f"worker {to} is gone")
                link: Link = dial(about["address"], self.links.token, f"worker {to}", own.timeout)
                made.callback(link.close)
                link.send(self.head._replace(kind=Kind.HELLO), None, {"circle": name})
                welcome = link.recv({Kind.WELCOME: 0}, "its welcome to a circle")
                links[rank] = joint(link, length, welcome.note["path"])
            for rank, by in enumerate(ranks[len(links) + 1 :], len(links) + 1):
                with own.changed:
                    end = time.monotonic() + own.timeout
                    while (name, by) not in self.comers:
                        if own.place(by) != "in":
                            raise LinkLost(f"worker {by} is gone")
                        if time.monotonic() > end:
                            raise LinkLost(f"worker {by} did not join the circle within {own.timeout:g} s")
                        own.wait(f"worker {by}, who is to join a circle,")
                    link = self.comers.pop((name, by))
                made.callback(link.close)
                links[rank] = joint(link, length)
                link.send(self.head._replace(kind=Kind.WELCOME), None, links[rank].offer())
            made.pop_all()
        return Circle(links, ranks.index(self.head.worker), self.head)

    def _dismiss(self, name: str) -> None:
        """A circle has broken: nobody waits for a welcome to it, who has come or will."""
        with self.incarnation.monitor:
            self.broken.add(name)
            for key in [key for key in self.comers if key[0] == name]:
                self.comers.pop(key).close()

    def _fetch(self, holder: int, message: Message) -> Mean | None:
        """The average like ``message`` that a peer has taken; None where that one is gone."""
        form, own = Form.of(message), self.incarnation
        while True:
            with own.monitor:
                about = own.alive.get(holder)
                own.check(f"an average of worker {holder} was waited for")
            if about is None:
                return None
            try:
                link = self.links.to(holder, about)
                link.send(self.head._replace(kind=Kind.MEAN), None, {"turn": self.turn})
                frame = link.recv({Kind.REPLY: form.bytes, Kind.REFUSED: 0}, f"worker {holder}'s average")
            except (LinkLost, Corrupt, PermissionError):
                self.links.drop(holder)
                with own.changed:
                    own.changed.wait(0.05)
                continue
            if frame.header.kind == Kind.REFUSED:
                raise LinkLost(f"worker {holder} has no average {self.turn} with this one")
            mean = form.unpack(frame.payload, self.device)
            return Mean(frame.note["name"], tuple(frame.note["ranks"]), self.turn, mean)

    def _call_out(self, name: str, entry: tuple[str, bytes]) -> None:
        """Tell the other members of a group where this one listens."""
        self.incarnation.link.send(
            self.head._replace(kind=Kind.MEET), None, {"group": name, "key": entry[0], "value": entry[1].hex()}
        )

    def _called(self, name: str, ranks: tuple[int, ...]) -> tuple[str, bytes]:
        """Where another member listens."""
        own = self.incarnation
        end = time.monotonic() + own.timeout
        with own.changed:
            while True:
                for note in self.meets:
                    if note["group"] == name:
                        self.meets.remove(note)
                        try:
                            return str(note["key"]), bytes.fromhex(note["value"])
                        except (KeyError, TypeError, ValueError):
                            raise Corrupt(f"one of workers {ranks} does not say where it listens") from None
                gone = [r for r in ranks if r != self.head.worker and own.place(r) != "in"]
                if gone:
                    raise LinkLost(f"worker {gone[0]} is gone")
                if time.monotonic() > end:
                    raise LinkLost(f"not all of workers {ranks} said within {own.timeout:g} s where they listen")
                own.wait(f"the other members of a group, {ranks},")

    def join(self, link: Link, name: str, hello: Header) -> None:
        """A peer wants to join this one's circle, which the loop's thread sees to."""
        own = self.incarnation
        with own.changed:
            if own.over.is_set():
                raise LinkLost("this life is over")
            if name in self.broken:
                raise LinkLost("this circle has broken: its members take another one")
            for key, before in list(self.comers.items()):
                if before.waiting(0):  # who has to wait for a welcome says nothing, unless it hangs up
                    self.comers.pop(key).close()
            self.comers[name, hello.worker] = link
            own.changed.notify_all()

    def give(self, link: Link, frame: Frame) -> None:
        """Give a peer the average that it could not take."""
        with self.incarnation.monitor:
            mean = self.last
        if mean is None or not isinstance(frame.note, dict) or frame.note.get("turn") != list(mean.turn):
            link.send(self.head._replace(kind=Kind.REFUSED))
            return
        note = {"name": mean.name, "ranks": mean.ranks}
        link.send(self.head._replace(kind=Kind.REPLY), Form.of(mean.message).pack(mean.message), note)

    def disband(self) -> None:
        """Leave all groups."""
        for standing in self.groups.values():
            standing.close()
        self.groups = {}

    def close(self) -> None:
        """Leave all groups, and hang up on who wanted to join one."""
        self.disband()
        for link in self.comers.values():
            link.close()
        self.comers = {}
