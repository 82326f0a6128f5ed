"""What goes over a link: messages of methods as bytes, and the header that is checked before one is believed."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ... import formats
from ...core.method import Message
from ...core.tree import leaves, rebuild

PROTOCOL = formats.number(formats.PROTOCOL)
"""Both ends must speak the same."""


class Corrupt(ValueError):
    """A header or a payload that is not what it claims to be, or not what is due here; the message says which part."""


CURE = ": if this comes again, install the same offbeat at both ends"
"""What can be done about what does not fit."""


class Kind(IntEnum):
    """What a frame is."""

    BEAT = 0  # the sender is alive
    HELLO = 1  # who wants to join, as a note
    WELCOME = 2  # the terms of the run, as a note
    MODEL = 3  # the parameters at which the run starts
    PUSH = 4  # a worker's message
    REPLY = 5  # the server's answer to it; the first one comes unasked
    MASTER = 6  # asks for the model that would be shipped; and the answer
    LEAVE = 7  # the worker goes in good order
    REFUSED = 8  # what was sent was not taken; the note says why
    MEET = 9  # where the sender listens for what does not go over the link itself, as a note
    # of peers and their coordinator
    BEGIN = 10  # a peer has delivered everything and begins a round
    STEP = 11  # gradients were taken
    REDUCE = 12  # asks with whom to take an average
    MEAN = 13  # asks a peer for an average that it has taken
    NEWS = 14  # who is there
    ANSWER = 15  # to what was asked, or that a message was taken
    SEND = 16  # a peer's message to another
    ASK = 17  # a message that is answered
    STATE = 18  # the state that a newcomer begins with
    HEIR = 19  # the state of a peer that leaves, for another to take over
    ORPHAN = 20  # a newcomer says that who was to give it a state has gone
    ENTER = 21  # a newcomer asks in, from a round on
    SHARE = 22  # a member's part of an average
    SHARED = 23  # frozen parameters and buffers: which, as a note


HOST = torch.device("cpu")
"""Where bytes are that come and go."""
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""What parameters may be; a header names one by its place."""

_HEAD = struct.Struct("<4sBBHiIQQQIQI")
SIZE = _HEAD.size + 4
"""Bytes of a header."""
MAGIC = b"obt1"
WORD = (1 << 64) - 1
"""What a sum of words is taken of: its last 64 bits."""
NOTE = 1 << 26
"""Bytes that a note may have at most; the names and shapes of 50,000 parameters take a tenth of that. No header is read before
the other end has proven that it knows the token."""


class Header(NamedTuple):
    """The head of a frame: who sends, in which life, and what follows."""

    kind: Kind
    dtype: int = 0  # of the parameters, a place in DTYPES
    worker: int = -1
    incarnation: int = 0  # which life of that worker, numbered by the server
    step: int = 0  # gradients of that worker before those in this message
    version: int = 0  # visits that the server had served when it sent what this message was made from
    length: int = 0  # bytes of payload
    gradients: int = 0  # how many are in this message
    checksum: int = 0  # of the payload
    note: int = 0  # bytes of text that follow the header

    def pack(self) -> bytes:
        """The header as bytes, `SIZE` of them: the last four are their checksum."""
        kind, dtype, worker, incarnation, step, version, length, gradients, checksum, note = self
        head = _HEAD.pack(
            MAGIC, kind, dtype, PROTOCOL, worker, incarnation, step, version, length, gradients, checksum, note
        )
        return head + zlib.crc32(head).to_bytes(4, "little")

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """The header in ``data``; `Corrupt` where it is none."""
        head, crc = data[:-4], int.from_bytes(data[-4:], "little")
        if len(data) != SIZE:
            raise Corrupt(f"a header of {len(data)} bytes, not {SIZE}")
        magic, kind, dtype, protocol, *rest = _HEAD.unpack(head)
        if magic != MAGIC or zlib.crc32(head) != crc:
            raise Corrupt("bytes that are no header")
        if protocol != PROTOCOL:
            raise Corrupt(f"protocol {protocol}, and this end speaks {PROTOCOL}")
        if kind not in Kind.__members__.values() or dtype >= len(DTYPES) or rest[-1] > NOTE:
            raise Corrupt(f"a header with kind {kind}, dtype {dtype} and a note of {rest[-1]} bytes")
        return cls(Kind(kind), dtype, *rest)


@dataclass(frozen=True)
class Form:
    """The structure, shapes and dtypes that all messages of one direction have."""

    like: Message  # of meta tensors

    @classmethod
    def of(cls, message: Message) -> Form:
        """The form of ``message``."""
        return cls(rebuild(message, [torch.empty_like(t, device="meta") for t in leaves(message)]))

    @cached_property
    def parts(self) -> list[tuple[int, int, torch.dtype, torch.Size]]:
        """Of each tensor where its bytes begin and end, a multiple of 8 each beginning, its dtype and its shape."""
        wanted = leaves(self.like)
        begins = accumulate((whole(t.nbytes) for t in wanted), initial=0)
        return [(b, b + t.nbytes, t.dtype, t.shape) for b, t in zip(begins, wanted, strict=False)]

    @cached_property
    def bytes(self) -> int:
        """Bytes of a message, each tensor beginning at a multiple of 8."""
        return sum(whole(t.nbytes) for t in leaves(self.like))

    def pack(self, message: Message, out: Tensor | None = None) -> Tensor:
        """The message, on any device, as bytes on the host, ``uint8 Tensor[bytes]``: in ``out`` where given, in which parts of it may
        lie already; else one tensor alone that is on the host is not copied."""
        parts = leaves(message)
        self.check(parts)
        if out is None and len(parts) == 1 and whole(parts[0].nbytes) == parts[0].nbytes and parts[0].is_cpu:
            only = parts[0].detach().contiguous().reshape(-1)
            if only.storage_offset() * only.element_size() % 8 == 0:  # else its words could not be summed
                return only.view(torch.uint8)
        out = torch.zeros(self.bytes, dtype=torch.uint8) if out is None else out
        for t, place in zip(parts, self._places(out), strict=True):
            if t.data_ptr() != place.data_ptr():
                place.copy_(t.detach())
        return out

    def unpack(self, data: Tensor, device: torch.device = HOST) -> Message:
        """The message in ``data``, which is on the host: views of it, or of one copy of it where ``device`` is another."""
        places = self._places(data if device == HOST else data.to(device))
        return places[0] if isinstance(self.like, Tensor) else rebuild(self.like, places)

    def _places(self, data: Tensor) -> list[Tensor]:
        """Where in ``data`` each tensor is, as views: as few operations as can be, since threads wait for each other at each."""
        places = []
        for begin, end, dtype, shape in self.parts:
            place = (data if end - begin == len(data) else data[begin:end]).view(dtype)
            places.append(place if place.shape == shape else place.view(shape))
        return places

    def check(self, parts: list[Tensor]) -> None:
        """`Corrupt` unless the tensors have the shapes and dtypes of the form."""
        wanted = leaves(self.like)
        for got, due in zip(parts, wanted, strict=False):
            if got.shape != due.shape or got.dtype != due.dtype:
                raise Corrupt(f"a tensor {tuple(got.shape)} {got.dtype} where {tuple(due.shape)} {due.dtype} is due")
        if len(parts) != len(wanted):
            raise Corrupt(f"{len(parts)} tensors where {len(wanted)} are due")


def whole(length: int) -> int:
    """So many bytes in whole words."""
    return -(-length // 8) * 8


def checksum(data: Tensor) -> int:
    """The sum of the 64-bit words of ``uint8 Tensor[multiple of 8]``, modulo 2**64: at the memory's speed.

    Against accidents on the way, such as cut, mixed or flipped bytes; a forger could meet it.
    """
    return int(data.view(torch.int64).sum()) & WORD
