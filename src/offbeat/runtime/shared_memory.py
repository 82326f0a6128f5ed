"""Links whose payloads go through memory that two processes of one machine map.

Whoever accepts makes the memory and says where it is; whoever dials maps what it is told of, and so looks first whether it is
what this library makes: a stranger could name any file, which would be written into and removed.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import tempfile
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engines.kernel import ALIGNED
from .link import Link, LinkLost, on_gpu, view
from .protocol.wire import WORD, whole

NAME = "offbeat"
"""What the memory is called, where the system says so."""


class _Slot:
    """Shared memory for one payload at a time."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.parts: dict[int, tuple[Tensor, memoryview]] = {}  # by their lengths, which are few

    def part(self, length: int) -> Tensor:
        """Its first ``length`` bytes."""
        return self._part(length)[0]

    def seal(self, length: int) -> int:
        """The sum of some of their words, a page or more apart, the last one among them: nothing is carried that could be
        damaged, but what lies there might be another message."""
        return sum(self._part(length)[1]) & WORD

    def _part(self, length: int) -> tuple[Tensor, memoryview]:
        """The bytes, and the words that seal them."""
        if length not in self.parts:
            words = view(self.memory[: whole(length)]).cast("Q")
            apart = max(512, len(words) // 1024)
            self.parts[length] = self.memory[:length], words[(len(words) - 1) % apart :: apart]
        return self.parts[length]


class SharedLink(Link):
    """Payloads go through memory that both processes of one machine map; the socket only says that they are there.

    On Linux the memory has no name but its owner's in /proc, so that a kill at any moment leaves nothing behind. Elsewhere
    it is a file, which the other end removes as soon as it has it open.
    """

    transport = "shared"

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        timeout: float,
        sizes: tuple[int, int],
        path: str = "",
        places: int = 1,
    ) -> None:
        """``sizes`` are the bytes that this end puts and takes at most; ``path`` the memory, where the other end made it;
        ``places`` how many payloads each way have room at once."""
        super().__init__(sock, name, timeout)
        mine, theirs = (-(-size // ALIGNED) * ALIGNED * places for size in sizes)
        total = mine + theirs
        self.fd, self.path = (_offered(path, max(1, total), name), path) if path else _memory(max(1, total))
        try:
            memory = torch.from_file(f"/dev/fd/{self.fd}", shared=True, size=max(1, total), dtype=torch.uint8)
        except RuntimeError as error:
            self._let_go()
            raise LinkLost(
                f"the memory of the link to {name} cannot be mapped ({str(error).splitlines()[0]}); if this comes again, start "
                "the server with the transport gloo or tcp"
            ) from None
        self.pinned = _pin(memory)
        if path:
            into, out = memory[:theirs], memory[theirs:total]
            self._let_go()
        else:
            out, into = memory[:mine], memory[mine:total]
        self.put_at, self.take_at = (cycle(map(_Slot, part.chunk(places))) for part in (out, into))
        self.next = next(self.put_at)

    def offer(self) -> dict[str, Any]:
        return {"path": self.path}

    def room(self, length: int) -> Tensor:
        return self.next.part(length)

    def lay(self, data: Tensor) -> int:
        here, self.next = self.next, next(self.put_at)
        part = here.part(len(data))
        if data.data_ptr() != part.data_ptr():
            part.copy_(data)
        return here.seal(len(data))

    def put(self, data: Tensor) -> None:
        pass  # it is there

    def take(self, length: int, lent: bool = False) -> tuple[Tensor, int]:
        here = next(self.take_at)
        part = here.part(length)
        return part if lent else part.clone(), here.seal(length)

    def close(self) -> None:
        super().close()
        if self.pinned:
            torch.cuda.cudart().cudaHostUnregister(self.pinned)  # type: ignore[no-untyped-call]
            self.pinned = 0
        self._let_go()

    def _let_go(self) -> None:
        """Close the file and remove it, where it has a name; what is mapped stays."""
        if self.path and not self.path.startswith("/proc/"):
            Path(self.path).unlink(missing_ok=True)
        self.path = ""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _offered(path: str, size: int, name: str) -> int:
    """The memory of ``size`` bytes that the other end says is at ``path``: its file descriptor. `LinkLost` unless it is just what
    `_memory` makes; nothing else is waited for, mapped, changed or removed."""
    try:
        if re.fullmatch(r"/proc/\d+/fd/\d+", path) and os.readlink(path).startswith(f"/memfd:{NAME}"):
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            ours = os.readlink(f"/proc/self/fd/{fd}").startswith(f"/memfd:{NAME}")
        elif (
            not hasattr(os, "memfd_create")
            and Path(path).parent == Path(tempfile.gettempdir())
            and Path(path).name.startswith(f"{NAME}-")
        ):
            fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
            about = os.fstat(fd)
            ours = about.st_uid == os.getuid() and stat.S_IMODE(about.st_mode) == 0o600 and about.st_nlink == 1
        else:
            raise LinkLost(
                f"{name} offers {path[:200]!r} as memory to share, which it has not made for that: not touched"
            )
    except OSError as error:
        raise LinkLost(
            f"the memory that {name} offers cannot be mapped ({error.strerror}); if this comes again, start the server with "
            "the transport gloo or tcp"
        ) from None
    about = os.fstat(fd)
    if not (ours and stat.S_ISREG(about.st_mode) and about.st_size == size):
        os.close(fd)
        raise LinkLost(
            f"{name} offers {path[:200]!r} as memory to share, of {about.st_size:,} bytes where {size:,} are due: not touched"
        )
    return fd


def _memory(size: int) -> tuple[int, str]:
    """New memory of ``size`` bytes to share: its file descriptor, and a path under which others can map it."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(NAME)
        path = f"/proc/{os.getpid()}/fd/{fd}"
    else:
        fd, path = tempfile.mkstemp(prefix=f"{NAME}-")
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)  # now, for later a full memory is a bus error
        else:
            os.truncate(fd, size)
    except OSError as error:
        os.close(fd)
        if not path.startswith("/proc/"):
            os.unlink(path)
        raise OSError(
            f"there is no room for {size:,} bytes of shared memory ({error.strerror}); take the transport gloo or tcp"
        ) from None
    return fd, path


def _pin(memory: Tensor) -> int:
    """Let a GPU read and write ``memory`` without a copy in between, where this process uses one: its address, 0 if it does not.

    Memory that cannot be pinned is used as it is.
    """
    if not on_gpu():
        return 0
    if not int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)):  # type: ignore[no-untyped-call]
        return memory.data_ptr()
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")  # the next launch would tell of that error, and so this one does
    return 0
