"""Buffers that change in training, such as running statistics, made the same at all workers: their mean, or the first worker's.

After a pass, a worker that wants this brings its own on a link of its own, and takes what the host has of all workers by then: each one's as it
was when it last brought them. Nobody waits for anybody.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..log import WORKER
from .link import Link, LinkLost, dial
from .place import Place
from .protocol.wire import Corrupt, Header, Kind
from .shared_state import DTYPES, LIMIT, Shared, StateEntry, as_bytes, digest, shaped

if TYPE_CHECKING:
    from .team import Team

RULES = ("average", "first")


class Meeting:
    """The host's side: what each worker has brought last."""

    def __init__(self) -> None:
        self._of: dict[int, dict[int, Tensor]] = {}  # of each worker, by the number of the entry
        self._lock = threading.Lock()

    def forget(self, worker: int) -> None:
        """A worker is lost: what it had counts no more."""
        with self._lock:
            self._of.pop(worker, None)

    def answer(self, link: Link, note: Any, entries: list[StateEntry]) -> None:
        """Take what a worker brings, of buffers among ``entries``, and bring what it asks for. Raises `Corrupt` for what makes no sense."""
        note = note if isinstance(note, dict) else {}
        worker, which, rule = note.get("worker"), note.get("brings"), note.get("rule")
        fits = isinstance(which, list) and all(
            type(k) is int and 0 <= k < len(entries) and entries[k].buffer for k in which
        )
        if type(worker) is not int or rule not in RULES or not fits or sum(entries[k].bytes for k in which) > LIMIT:
            raise Corrupt(f"{link.name} brings what are no buffers of the run's model")
        brought = {k: shaped(link.recv_aside(entries[k].bytes), entries[k]) for k in which}
        with self._lock:
            self._of[worker] = brought
            all_of = dict(self._of)
        found = first(all_of) if rule == "first" else average(all_of)
        takes = [k for k in which if k in found]
        link.send_aside(Header(Kind.SHARED), {"takes": takes}, (as_bytes(found[k]) for k in takes))


def average(brought: dict[int, dict[int, Tensor]]) -> dict[int, Tensor]:
    """The mean over the workers that have brought an entry, taken in float64; of floating-point ones only."""
    found = {}
    for k in sorted({k for one in brought.values() for k in one}):
        parts = [brought[worker][k] for worker in sorted(brought) if k in brought[worker]]
        if parts[0].is_floating_point():
            found[k] = torch.stack([part.double() for part in parts]).mean(0).to(parts[0].dtype)
    return found


def first(brought: dict[int, dict[int, Tensor]]) -> dict[int, Tensor]:
    """Those of the worker with the lowest number."""
    return brought[min(brought)]


class Buffers:
    """A worker's side."""

    def __init__(self, shared: Shared, rule: str) -> None:
        self.shared, self.rule = shared, rule
        self._moving = set[int]()  # entries that have changed so far

    def meet(self, place: Place, worker: int, team: Team) -> None:
        """Bring the buffers that change, and put those of all in their place; the first of ``team`` does it for all its ranks. Where
        the host is not there, they stay, which is said."""
        takes: list[int] = []
        if not team.rank:
            try:
                takes = self._meet(place, worker)
            except (LinkLost, Corrupt) as lost:
                WORKER.warning(f"buffers stay worker {worker}'s own after this pass: {lost}")
        for k in team.first(takes) if team.size > 1 else ():
            self.shared.put(k, team.first(self.shared.at(k)))

    def _meet(self, place: Place, worker: int) -> list[int]:
        shared = self.shared
        for k, entry in enumerate(shared.entries):
            wanted = entry.buffer and (self.rule == "first" or DTYPES[entry.dtype].is_floating_point)
            if wanted and k not in self._moving and digest(shared.at(k)) != shared.digests[k]:
                self._moving.add(k)
        if not self._moving:
            return []
        which = sorted(self._moving)
        link = dial(place.servers[0], place.token, "the host", place.timeout)
        try:
            note = {"worker": worker, "brings": which, "rule": self.rule}
            link.send_aside(Header(Kind.SHARED), note, (shared.at(k) for k in which))
            frame = link.recv({Kind.SHARED: 0}, "the buffers of all workers")
            takes: list[int] = frame.note["takes"]
            for k in takes:
                shared.put(k, link.recv_aside(shared.entries[k].bytes))
        finally:
            link.close()
        return takes
