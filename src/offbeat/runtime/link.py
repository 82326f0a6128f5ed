"""Links: connections between two processes that carry frames, and know when the other end is gone.

A link is a TCP connection on which both ends have proven that they know the run's token. Headers, notes and signs of life
go over it; payloads too, or beside it: through memory that both map (`SharedLink`), or through a process group of two
(`gloo.GlooLink`). So whoever waits for the next message waits on a socket, where waiting costs nothing and may last, and
a payload is only asked for once its header has been checked.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import hmac
import json
import os
import secrets
import select
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import formats
from .protocol.wire import CURE, NOTE, SIZE, Corrupt, Header, Kind, checksum

GREETING = f"{formats.PROTOCOL:<23}\n".encode()
"""What each end says first, of the same length in every version, so that two versions can tell each other."""
AT_ONCE = 4096
"""Bytes that are read from a socket at once where fewer are asked for: a header and its note come together."""
LOOKOUT = 3e-4
"""Seconds for which to look out for what must be about to come, before one sleeps: about what two wake-ups take."""
NOTHING = torch.empty(0, dtype=torch.uint8)
NO = bytes(32)
"""In the place of a proof: the token is not the run's. Said in full, for a server that dies meanwhile says nothing."""


T = TypeVar("T", int, bytes)


class LinkLost(ConnectionError):
    """The other end is gone, or silent for too long; the message says who, and what was waited for."""


def view(data: Tensor) -> memoryview:
    """The memory of ``uint8 Tensor[n]``, to read and write while the tensor lives."""
    return memoryview((ctypes.c_ubyte * data.numel()).from_address(data.data_ptr())).cast("B")


def look_out(there: Callable[[], bool]) -> bool:
    """Wait for a moment, without sleeping, until what must be about to come is ``there``: to be woken costs both ends more.

    Whoever else wants this core gets it meanwhile. Returns whether it came.
    """
    end = time.perf_counter() + LOOKOUT
    while not (came := there()) and time.perf_counter() < end:
        _give_way()
    return came


def _give_way() -> None:
    if hasattr(os, "sched_yield"):
        os.sched_yield()
        select.select((), (), (), 0)  # gives up the interpreter's lock, as the line above does from Python 3.12 on
    else:
        time.sleep(0)


class Frame:
    """What came: a header, its note, and the payload as bytes (empty where there is none)."""

    def __init__(self, header: Header, note: Any, payload: Tensor) -> None:
        self.header, self.note, self.payload = header, note, payload


class Link:
    """One end of a connection; payloads go over the socket itself.

    ``name`` is what the other end is called in messages. One thread receives; sending is safe from several threads.
    """

    transport = "tcp"

    def __init__(self, sock: socket.socket, name: str, timeout: float) -> None:
        self.sock, self.name, self.timeout = sock, name, timeout
        self.unread = b""  # what came along with what was asked for
        self.box = torch.empty(0, dtype=torch.uint8)  # where payloads that are lent come to
        self.sending = threading.Lock()
        self.heard = time.monotonic()
        self.deadline: float | None = None  # until when all that is waited for must have come
        self.sent_bytes = 0

    # what another way for payloads overrides

    def offer(self) -> dict[str, Any]:
        """At the accepting end: what the other one must know to join the way for payloads."""
        return {}

    def meet(self) -> None:
        """At both ends, once both know the way for payloads and before the first one: make ready. Raises `LinkLost`."""

    def room(self, length: int) -> Tensor | None:
        """Where the next payload of so many bytes may be written so that it need not be copied, ``uint8 Tensor[length]``; None
        where it has to be brought to the other end anyway. For the only thread that sends payloads."""
        return None

    def lay(self, data: Tensor) -> int:
        """Before the header goes: the seal of ``uint8 Tensor[n]``, which tells whether it has come as it was sent. It may be laid
        where the other end finds it."""
        return checksum(data)

    def put(self, data: Tensor) -> None:
        """After the header has gone: send ``uint8 Tensor[n]`` to the other end, which takes it."""
        self._write(view(data))

    def take(self, length: int, lent: bool = False) -> tuple[Tensor, int]:
        """The ``length`` bytes that the other end puts, ``uint8 Tensor[length]``, the caller's own or ``lent`` until the other
        end puts the next; and their seal."""
        data = self._room(length, lent)
        self._read_into(view(data))
        return data, checksum(data)

    def _room(self, length: int, lent: bool) -> Tensor:
        """Memory for a payload; where it is lent always the same, as fresh memory costs more than to fill it."""
        if not lent:
            return torch.empty(length, dtype=torch.uint8)
        if len(self.box) < length:
            self.box = torch.empty(length, dtype=torch.uint8, pin_memory=on_gpu())
        return self.box[:length]

    def hang_up(self) -> None:
        """End the connection, from any thread: the other end sees it at once, and so does whoever uses this one."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up and let go of everything, from the thread that receives."""
        self.hang_up()
        with self.sending:  # the number of a closed socket may be another one's at once
            self.sock.close()

    # frames

    def send(self, header: Header, payload: Tensor | None = None, note: Any = None) -> None:
        """Send a frame; ``payload`` is ``uint8 Tensor[n]``. Raises `LinkLost`."""
        text = b"" if note is None else json.dumps(note).encode()
        if len(text) > NOTE:
            raise ValueError(f"a note of {len(text)} bytes: at most {NOTE} are taken")
        length = 0 if payload is None else payload.numel()
        with self.sending:
            if payload is None or not length:  # the other end takes nothing
                self._write(header._replace(note=len(text)).pack() + text)
            else:
                header = header._replace(length=length, checksum=self.lay(payload), note=len(text))
                self._write(header.pack() + text)
                self.put(payload)
        self.sent_bytes += length

    def recv(self, due: dict[Kind, int], what: str, patient: bool = False, lent: Collection[Kind] = ()) -> Frame:
        """The next frame that is no sign of life. ``due`` says which kinds may come, and how many bytes each has.

        A payload of a kind that is ``lent`` stays in the link's own memory, and is good until the other end sends the next. Raises
        `Corrupt` for a frame that is not due or whose payload does not meet its checksum, `LinkLost` where the other end
        hangs up or is silent for `timeout`; ``what`` is what is waited for, for the message. One that is ``patient``
        bears silence before the frame: the kernel notices a dead machine.
        """
        while True:
            header = self._header(what, patient)
            note = self._note(header)
            if header.kind == Kind.BEAT:
                continue
            if header.kind not in due:
                raise Corrupt(
                    f"{self.name} sent {header.kind.name} where {', '.join(k.name for k in due)} is due{CURE}"
                )
            if header.length != due[header.kind]:
                raise Corrupt(
                    f"{self.name} announced {header.length} bytes of {header.kind.name} where {due[header.kind]} are due{CURE}"
                )
            if not header.length:
                return Frame(header, note, NOTHING)
            payload, seal = self.take(header.length, header.kind in lent)
            if seal != header.checksum:
                raise Corrupt(f"{self.name} sent {header.length} bytes that do not meet their checksum")
            return Frame(header, note, payload)

    def send_aside(self, header: Header, note: Any, parts: Iterable[Tensor]) -> None:
        """Send a frame without a payload, and after it ``parts``, ``uint8 Tensor[n]`` each, over the socket itself: they need no room
        on the payloads' way. The other end takes them with `recv_aside`. Raises `LinkLost`."""
        text = json.dumps(note).encode()
        with self.sending:
            self._write(header._replace(note=len(text)).pack() + text)
            for part in parts:
                if len(part):
                    self._write(view(part))

    def recv_aside(self, length: int) -> Tensor:
        """The next ``length`` bytes of what `send_aside` has sent, ``uint8 Tensor[length]``. Raises `LinkLost`."""
        data = torch.empty(length, dtype=torch.uint8)
        if length:
            self._read_into(view(data))
        return data

    def waiting(self, seconds: float) -> bool:
        """Whether something comes within ``seconds``, the end of the connection included."""
        if self.unread:
            return True
        if not hasattr(select, "poll"):
            return bool(select.select([self.sock], [], [], seconds)[0])
        poll = select.poll()  # select knows only the first 1024 files of a process
        try:
            poll.register(self.sock, select.POLLIN)
        except ValueError:
            raise LinkLost(f"the link to {self.name} has been closed") from None
        return bool(poll.poll(1000 * seconds))

    def living(self, seconds: float) -> bool:
        """Whether the other end is there: it was heard within ``seconds``, or what it has said is still to be read. Not where it has
        hung up, which is known at once where its process has died."""
        poll = select.poll()
        try:
            poll.register(self.sock, select.POLLIN | getattr(select, "POLLRDHUP", 0))
        except ValueError:  # it is closed
            return False
        said = poll.poll(0)
        return said[0][1] == select.POLLIN if said else time.monotonic() - self.heard < seconds

    def beat(self, header: Header) -> None:
        """Say that this end is alive."""
        self.send(header._replace(kind=Kind.BEAT, length=0))

    def drain(self) -> None:
        """Take the signs of life that have come; `Corrupt` where it is something else, `LinkLost` where it is the end."""
        while self.waiting(0):
            header = self._header("a sign of life")
            if header.kind != Kind.BEAT:
                raise Corrupt(f"{self.name} sent {header.kind.name} while it is its turn to listen")

    def _header(self, what: str, patient: bool = False) -> Header:
        try:
            return Header.unpack(self._read(SIZE, what, patient))
        except Corrupt as corrupt:
            raise Corrupt(f"{self.name} sent {corrupt}{CURE}") from None

    def _note(self, header: Header) -> Any:
        if not header.note:
            return None
        try:
            return json.loads(self._read(header.note, "a note"))
        except (ValueError, RecursionError) as error:
            raise Corrupt(f"{self.name} sent a note that is no JSON ({error})") from None

    # bytes

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self.sock.sendall(data)
        except TimeoutError:
            raise LinkLost(f"{self.name} has taken nothing for {self.timeout:g} s") from None
        except OSError as error:
            raise LinkLost(f"{self.name} has hung up ({error.strerror or error})") from None

    def _read(self, length: int, what: str, patient: bool = False) -> bytes:
        if length > 16 * AT_ONCE:  # a long note, put together where it belongs
            whole = bytearray(length)
            self._read_into(memoryview(whole), what)
            return bytes(whole)
        while (missing := length - len(self.unread)) > 0:
            self.unread += self._fill(self.sock.recv, max(missing, AT_ONCE), what, patient and not self.unread)
        data, self.unread = self.unread[:length], self.unread[length:]
        return data

    def _read_into(self, data: memoryview, what: str = "the rest of a message") -> None:
        here = self.unread[: len(data)]
        data[: len(here)], self.unread = here, self.unread[len(here) :]
        data = data[len(here) :]
        while len(data):
            data = data[self._fill(self.sock.recv_into, data, what) :]

    def _fill(self, read: Callable[[Any], T], about: Any, what: str, patient: bool = False) -> T:
        """What ``read(about)`` of the socket gives, which is never nothing."""
        while True:
            try:
                if self.deadline is not None:
                    self.sock.settimeout(max(0.001, self.deadline - time.monotonic()))
                came = read(about)
            except TimeoutError as error:
                if patient and error.errno is None:  # else it is the kernel that has given up
                    continue
                raise LinkLost(f"{self.name} was silent for {self.timeout:g} s while {what} was waited for") from None
            except OSError as error:
                raise LinkLost(f"{self.name} is gone ({error.strerror or error}) while {what} was waited for") from None
            if not came:
                raise LinkLost(f"{self.name} has hung up while {what} was waited for")
            self.heard = time.monotonic()
            return came


def on_gpu() -> bool:
    """Whether this process uses a GPU."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def machine() -> str:
    """What processes that can share memory have in common: the machine, the container, and the user."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    name = boot.read_text().strip() if boot.exists() else socket.gethostname()
    return f"{name} {os.stat(space if space.exists() else tempfile.gettempdir()).st_ino} {os.getuid()}"


# making connections


def listen(host: str, port: int = 0) -> socket.socket:
    """A socket that listens at ``host`` and ``port`` (0: any)."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.create_server(address[:2], family=family, backlog=256, reuse_port=False)
    except OSError as error:
        raise OSError(
            f"cannot listen at {host}:{port} ({error.strerror or error}): choose another host or port"
        ) from None
    return sock


def prepare(sock: socket.socket, timeout: float) -> None:
    """No delay for small frames, and a dead machine or cut wire is noticed by the kernel within ``timeout`` seconds."""
    sock.settimeout(timeout)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", timeout / 2), ("TCP_KEEPINTVL", timeout / 8), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), max(1, int(value)))
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * timeout))


def dial(address: str, token: str, name: str, timeout: float) -> Link:
    """A link to the process that listens at ``address`` (host:port) and knows ``token``. Raises `LinkLost`.

    `PermissionError` where the other end does not know the token, or does not believe that this one does; `OtherVersion` where
    it speaks another protocol.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"OFFBEAT_SERVER = {address!r}: must be HOST:PORT, with a port from 1 to 65535")
    try:
        sock = socket.create_connection((host.strip("[]"), int(port)), timeout=timeout)
        if (
            sock.getsockname() == sock.getpeername()
        ):  # the kernel joins a port of this machine to itself if nobody listens
            sock.close()
            raise ConnectionRefusedError("nobody listens")
    except OSError as error:
        raise LinkLost(f"nobody answers at {address} ({error.strerror or error})") from None
    prepare(sock, timeout)
    link = Link(sock, f"{name} at {address}", timeout)
    try:
        mine = secrets.token_bytes(32)
        link._write(GREETING + mine)
        theirs = link._read(len(GREETING) + 32, "its greeting")
        if not formats.check(_greeting(theirs), formats.PROTOCOL, f"{name} at {address}"):
            raise LinkLost(f"what answers at {address} is no offbeat {name}")
        theirs = theirs[len(GREETING) :]
        link._write(_proof(token, b"dials", mine, theirs))
        proof = link._read(32, "its proof")
        if proof == NO:
            raise PermissionError(f"{name} at {address} refuses the token: check OFFBEAT_TOKEN at both ends")
        if not hmac.compare_digest(proof, _proof(token, b"accepts", mine, theirs)):
            raise PermissionError(f"{name} at {address} does not know this run's token: check OFFBEAT_TOKEN")
    except BaseException:
        link.close()
        raise
    return link


def accept(sock: socket.socket, token: str, name: str, timeout: float) -> Link:
    """A link over ``sock``, which has just been accepted, once its other end has proven that it knows ``token``.

    Raises `PermissionError` where it does not, `Corrupt` where it speaks otherwise, `LinkLost` where it says nothing within
    ``timeout`` or 10 seconds.
    """
    prepare(sock, min(timeout, 10.0))
    link = Link(sock, name, min(timeout, 10.0))
    link.deadline = time.monotonic() + link.timeout  # a stranger who sends byte after byte is not waited for
    theirs = link._read(len(GREETING) + 32, "a greeting")
    mine = secrets.token_bytes(32)
    try:
        if not formats.check(_greeting(theirs), formats.PROTOCOL, name):
            raise Corrupt(f"{name} does not speak as offbeat does")
    except formats.OtherVersion as other:
        link._write(GREETING + mine)  # so that the other end can tell as well
        raise Corrupt(str(other)) from None
    theirs = theirs[len(GREETING) :]
    link._write(GREETING + mine)
    if not hmac.compare_digest(link._read(32, "a proof"), _proof(token, b"dials", theirs, mine)):
        link._write(NO)
        raise PermissionError(f"{name} does not know the token")
    link._write(_proof(token, b"accepts", theirs, mine))
    prepare(sock, timeout)
    link.timeout, link.deadline = timeout, None
    return link


def _greeting(data: bytes) -> str:
    text, end = data[: len(GREETING) - 1], data[len(GREETING) - 1 : len(GREETING)]
    return text.decode("latin-1") if end == b"\n" else ""


def _proof(token: str, side: bytes, dialled: bytes, accepted: bytes) -> bytes:
    """That its maker knows the token, for this connection and this side of it only."""
    return hmac.new(token.encode(), side + dialled + accepted, hashlib.sha256).digest()
