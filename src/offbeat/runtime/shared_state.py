"""What all workers' models must share beside the trained parameters: frozen parameters and buffers.

A script that sets no seed makes them anew in each process. So those of the first worker go to all: it says their names, shapes, dtypes
and digests when it joins, and brings them; a worker that joins later says the same of its own, and gets those that differ before its
script goes on. They are in ``model.pt`` too, so that a module loads it strictly.

- Bytes travel over a link's own socket, whatever way its payloads take: their number does not depend on the model's vector.
- Above `LIMIT` nothing is brought: what differs is refused by name then, and ``model.pt`` is without them.
- Where the ranks of a worker have a part of the model each, nothing is brought either, as each rank has another host.
- Buffers that change in training (running statistics) stay each worker's own, but for what `buffers` makes the same after a pass; one that
  leaves brings them for ``model.pt``.
"""

from __future__ import annotations

import logging
import math
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..tasks.flat import local
from .layout import plain_name
from .link import Frame, Link
from .protocol.wire import WORD, Corrupt, Header, Kind
from .snapshot import write_whole

if TYPE_CHECKING:
    from .team import Team

LIMIT = 2 << 30
"""Bytes of frozen parameters and buffers that are brought at most."""
BLOCK = 1 << 16
"""Words of which a digest takes one sum, which stay in a cache."""
FILE = "shared-state.pt"
"""Where a host keeps what the first worker has brought, beside its snapshots."""
DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype) and not str(d).startswith("torch.q")}


class StateEntry(NamedTuple):
    """A frozen parameter or a buffer."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    buffer: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        kind = "buffer" if self.buffer else "frozen parameter"
        return f"{kind} {self.name[:200]} {list(self.shape)} of {self.dtype.removeprefix('torch.')}"


class Told(NamedTuple):
    """What a worker tells of its model's frozen parameters and buffers."""

    entries: list[StateEntry]
    keys: list[tuple[str, str]]
    """Of the module's ``state_dict``, each with the name of what is there: tied parameters have several keys and one name."""
    digests: list[int | None]
    """Of each entry; None where it is not to be compared."""
    whole: bool
    """Whether the model is not sharded over ranks."""

    def json(self) -> list[Any]:
        return [[list(entry) for entry in self.entries], self.keys, self.digests, self.whole]

    @classmethod
    def read(cls, given: Any) -> Told:
        """What another process has told; nothing where that makes no sense."""
        try:
            entries, keys, digests, whole = given
            told = cls(
                [StateEntry(str(n), tuple(map(int, shape)), str(d), bool(b)) for n, shape, d, b in entries],
                [(str(key), str(name)) for key, name in keys],
                [None if d is None else int(d) for d in digests],
                bool(whole),
            )
        except (TypeError, ValueError, OverflowError):
            return NOTHING
        well = len(told.digests) == len(told.entries)
        return (
            told if well and all(e.dtype in DTYPES and min(e.shape, default=0) >= 0 for e in told.entries) else NOTHING
        )


NOTHING = Told([], [], [], True)


class Shared:
    """The frozen parameters and buffers of a worker's model, at the worker."""

    def __init__(self, model: nn.Module, buffers: bool = True, whole: bool = True) -> None:
        """``buffers`` says that buffers are shared too; ``whole`` that the model is not sharded over ranks.

        What has no bytes to send is left out: sparse, quantized, on the meta device, or without a shape yet.
        """
        self.whole = whole
        self.places: list[tuple[nn.Module, str]] = []
        self.entries: list[StateEntry] = []
        self.keys: list[tuple[str, str]] = []
        names: dict[int, str] = {}
        for prefix, module in model.named_modules(remove_duplicate=False):
            for key, t in (*module._parameters.items(), *module._buffers.items()):
                if t is None or is_lazy(t) or t.layout != torch.strided or t.is_meta or str(t.dtype) not in DTYPES:
                    continue
                path, buffer = plain_name(model, f"{prefix}.{key}" if prefix else key), key in module._buffers
                if id(t) not in names:
                    names[id(t)] = path
                    if buffer or not t.requires_grad:
                        self.places.append((module, key))
                        self.entries.append(StateEntry(path, tuple(local(t).shape), str(t.dtype), buffer))
                if key not in module._non_persistent_buffers_set:
                    self.keys.append((path, names[id(t)]))
        self.compared = [buffers or not entry.buffer for entry in self.entries]
        self.digests = [digest(self._at(k)) for k in range(len(self.entries))]
        """Of what it has, as far as the host knows."""
        self.took: list[int] = []
        """Which entries are the first worker's now, in the place of its own."""
        self.there = False
        """Whether it has joined before, and trains: its buffers are its own then."""

    def told(self) -> Told:
        """What to tell the host."""
        compared = [not self.there and compared for compared in self.compared]
        digests = [here if known else None for here, known in zip(self.digests, compared, strict=True)]
        return Told(self.entries, self.keys, digests, self.whole)

    def answer(self, link: Link, head: Header, note: Any) -> None:
        """Bring what the host asks for, or take what it brings."""
        if "bring" in note:
            self._send(link, head, note["bring"], "brought")
            return
        for k in note["take"]:
            self.put(k, link.recv_aside(self.entries[k].bytes))
        self.took = list(note["take"])

    def joined(self, team: Team) -> None:
        """The worker has joined: all of its ranks have what the first one was given, unless each has its own part."""
        if team.size > 1 and self.whole:
            self.took = team.first(self.took)
            for k in self.took:
                self.put(k, team.first(self.at(k)))
        for k in self.took:
            self.digests[k] = digest(self._at(k))
        self.there = True

    def leave(self, link: Link, head: Header) -> None:
        """Bring the buffers that have changed since the host last had them."""
        if not (self.there and self.whole):
            return
        now = [digest(self._at(k)) if entry.buffer else self.digests[k] for k, entry in enumerate(self.entries)]
        changed = [k for k, here in enumerate(now) if here != self.digests[k]]
        if changed and sum(self.entries[k].bytes for k in changed) <= LIMIT:
            self._send(link, head, changed, "changed")
            self.digests = now

    def put(self, k: int, data: Tensor) -> None:
        """Write ``data``, ``uint8 Tensor[bytes]``, over entry ``k``."""
        with torch.no_grad():
            self._at(k).copy_(shaped(data, self.entries[k]))

    def at(self, k: int) -> Tensor:
        """The bytes of entry ``k``, ``uint8 Tensor[bytes]``, in the memory of this process."""
        return as_bytes(self._at(k)).cpu()

    def _at(self, k: int) -> Tensor:
        module, key = self.places[k]
        t = module._parameters.get(key) if key in module._parameters else module._buffers[key]
        assert t is not None
        return local(t.detach())

    def _send(self, link: Link, head: Header, which: list[int], what: str) -> None:
        link.send_aside(head._replace(kind=Kind.SHARED), {what: which}, (self.at(k) for k in which))


class Kept:
    """The frozen parameters and buffers of a run, at its host."""

    def __init__(self) -> None:
        self.told: Told | None = None
        self.data: dict[int, Tensor] = {}
        """Bytes of entries as the first worker has brought them, ``uint8 Tensor[bytes]``."""
        self.written = False
        self.changed: dict[int, Tensor] = {}
        """Bytes of buffers as the last worker that left has brought them."""

    @property
    def large(self) -> bool:
        """Whether they are too large to be brought."""
        return self.told is not None and sum(entry.bytes for entry in self.told.entries) > LIMIT

    def agree(self, told: Told) -> bool:
        """Whether a worker is the first to tell. Raises ``ValueError`` where it tells of another model than the first."""
        if self.told is None:
            self.told = told
            return True
        ours, theirs = self.told.entries, told.entries
        for k in range(max(len(ours), len(theirs))):
            worker, run = (entries[k] if k < len(entries) else "none" for entries in (theirs, ours))
            if worker != run:
                raise ValueError(
                    f"of frozen parameters and buffers, number {k} is {worker} in the worker's model and {run} in the run's: "
                    "start the same script everywhere"
                )
        return False

    def meet(self, link: Link, head: Header, told: Told, first: bool) -> None:
        """Ask the first worker for all, and bring another one what differs. Raises ``ValueError`` where that cannot be."""
        assert self.told is not None
        entries, head = self.told.entries, head._replace(kind=Kind.SHARED)
        if first:
            if not entries or self.large or not told.whole:
                return
            link.send(head, None, {"bring": list(range(len(entries)))})
            link.recv({Kind.SHARED: 0}, "frozen parameters and buffers")
            for k, entry in enumerate(entries):
                self.data[k] = link.recv_aside(entry.bytes)
                if told.digests[k] not in (None, digest(self.data[k])):
                    raise Corrupt(f"{link.name} sent {entry}, which does not meet its digest")
            self.told = told._replace(digests=[digest(self.data[k]) for k in range(len(entries))])
            return
        pairs = zip(told.digests, self.told.digests, strict=True)
        differ = [k for k, (theirs, ours) in enumerate(pairs) if None not in (theirs, ours) and theirs != ours]
        if any(k not in self.data for k in differ):
            why = f"more than {LIMIT / 2**30:g} GiB are not" if self.large else "parts of ranks are not"
            raise ValueError(
                f"{entries[differ[0]]} differs from the first worker's ({len(differ)} of {len(entries)} do), and {why} sent: let the "
                "script load it from one file, or make it from one seed, at all workers"
            )
        if differ:
            link.send_aside(head, {"take": differ}, (self.data[k] for k in differ))

    def take(self, link: Link, note: Any) -> None:
        """A worker that leaves brings buffers. Raises `Corrupt` for what is none."""
        which = note.get("changed") if isinstance(note, dict) else None
        entries = [] if self.told is None else self.told.entries
        if not isinstance(which, list) or not all(type(k) is int and 0 <= k < len(entries) for k in which):
            raise Corrupt(f"{link.name} brings what is no buffer")
        if not all(entries[k].buffer for k in which) or sum(entries[k].bytes for k in which) > LIMIT:
            raise Corrupt(f"{link.name} brings what is no buffer, or too much")
        self.changed |= {k: link.recv_aside(entries[k].bytes) for k in which}

    def state_dict(self, trained: dict[str, Tensor]) -> dict[str, Tensor]:
        """The module's ``state_dict`` with these trained parameters by their names, as far as it was brought."""
        told = self.told or NOTHING
        data = self.data | self.changed
        have = {entry.name: shaped(data[k], entry) for k, entry in enumerate(told.entries) if k in data} | trained
        keys = told.keys or [(name, name) for name in trained]
        return {key: have[name] for key, name in keys if name in have}

    def write(self, folder: Path) -> None:
        """Keep what the first worker has brought in a file, once. Raises ``OSError``."""
        if self.told is not None and self.told.entries and not self.written:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / FILE, {"told": self.told.json(), "data": self.data})
            self.written = True

    @classmethod
    def read(cls, folder: Path, log: logging.Logger) -> Kept:
        """What `write` has put there; nothing where it has not, so that the next worker brings its own."""
        kept = cls()
        try:
            content = torch.load(folder / FILE, weights_only=True)
            kept.told, kept.data, kept.written = Told.read(content["told"]), content["data"], True
        except FileNotFoundError:
            pass
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            log.warning(
                f"{folder / FILE} cannot be read ({str(error).splitlines()[0]}): the next worker's frozen parameters count"
            )
        return kept


def greeted(link: Link, head: Header, hello: dict[str, Any], shared: Shared | None) -> Frame:
    """Say hello to a host, and bring or take frozen parameters and buffers where it asks for that: its welcome, or its refusal."""
    link.send(head, None, hello if shared is None else {**hello, "state": shared.told().json()})
    due = {Kind.WELCOME: 0, Kind.REFUSED: 0}
    frame = link.recv(due if shared is None else {**due, Kind.SHARED: 0}, "its welcome")
    if shared is not None and frame.header.kind == Kind.SHARED:
        shared.answer(link, head, frame.note)
        frame = link.recv(due, "its welcome")
    return frame


def as_bytes(t: Tensor) -> Tensor:
    """The elements of ``t`` as ``uint8 Tensor[bytes]``, where it is."""
    return t.detach().contiguous().reshape(-1).view(torch.uint8)


def digest(t: Tensor) -> int:
    """64 bits that follow from the bytes of ``t`` and from their order, at the memory's speed, on its own device.

    Two tensors that differ have one digest with a chance of 2**-64, unless somebody makes them so.
    """
    data = as_bytes(t)
    total = len(data)
    if rest := len(data) % 8:
        data = torch.cat([data, data.new_zeros(8 - rest)])
    elif data.storage_offset() % 8:
        data = data.clone()
    words = data.view(torch.int64)
    factors = torch.arange(1, 2 * BLOCK, 2, device=words.device) * 0x5851F42D4C957F2D  # odd, so that no bit is lost
    for block in torch.split(words, BLOCK):
        total = (total * 0x9E3779B97F4A7C15 + int(torch.sum(block * factors[: len(block)]))) & WORD
    return total


def shaped(data: Tensor, entry: StateEntry) -> Tensor:
    """The bytes ``data``, ``uint8 Tensor[bytes]``, as the tensor that they are of."""
    return data.view(DTYPES[entry.dtype]).view(entry.shape)
