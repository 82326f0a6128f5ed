"""A process of a launch: started in a session of its own, bound to its launcher, and killed with all that it has started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


MOST = 1 << 20
"""Bytes that wait in memory for a log that cannot be written."""


class Log:
    """A file that is added to. What it has no room for waits, and the oldest of that is lost in the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = bytearray()

    def add(self, data: bytes) -> None:
        self._waiting += data
        with contextlib.suppress(OSError), open(self.path, "ab", buffering=0) as file:
            del self._waiting[: file.write(self._waiting)]
        del self._waiting[:-MOST]

    def size(self) -> int:
        """Bytes that have been added, but for those that are lost."""
        with contextlib.suppress(OSError):
            return self.path.stat().st_size + len(self._waiting)
        return len(self._waiting)

    def tail(self, place: int) -> str:
        """What was added since its size was ``place``, at most the last 16 KiB."""
        data = b""
        with contextlib.suppress(OSError), open(self.path, "rb") as file:
            file.seek(max(place, os.fstat(file.fileno()).st_size - (1 << 14)))
            data = file.read()
        return (data + self._waiting)[-(1 << 14) :].decode(errors="replace")


class Process:
    """What runs under a name, one process after another; what they say is added to ``log``."""

    def __init__(self, log: Path) -> None:
        self.log = Log(log)
        self.starts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._place = 0  # in the log, where the last one began
        self._stream: IO[bytes] | None = None
        self._heard = False
        self._line = b""  # the beginning of one that is not yet whole

    def start(self, command: Sequence[str], environment: dict[str, str], heard: bool = False) -> None:
        """Start it. Its standard output is ``heard`` by `lines` and its errors go to the log; or both go there by way of `lines`,
        as a script cannot go on where it prints to a full disk.

        On Linux the kernel sends it SIGTERM when this thread ends, however that comes. Elsewhere a server sees that nobody
        reads its output any more, and workers that their server is gone.
        """
        self.starts += 1
        parent = os.getpid()

        def bind() -> None:  # in the child: no import, no lock
            assert _LIBC is not None
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it has died before
                os.kill(os.getpid(), signal.SIGKILL)

        self.close()
        self.log.add(b"")  # so that it is there
        self._place, self._heard = self.log.size(), heard
        with open(self.log.path, "ab") if heard else contextlib.nullcontext(subprocess.STDOUT) as errors:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,  # Ctrl-C comes to the launcher alone, which passes it on
                preexec_fn=bind if _LIBC else None,
            )
        assert self._process.stdout is not None
        self._stream = self._process.stdout
        os.set_blocking(self._stream.fileno(), False)

    @property
    def running(self) -> bool:
        """Whether its end has not been seen yet."""
        return self._process is not None

    def lines(self) -> list[bytes]:
        """The whole lines that it has written since the last call; where they are not heard, the log has them, too."""
        whole: list[bytes] = []
        while self._stream is not None:
            try:
                part = os.read(self._stream.fileno(), 1 << 16)
            except BlockingIOError:
                break
            if not part:
                whole.extend([self._line] if self._line else [])
                self.close()
                break
            if not self._heard:
                self.log.add(part)
            *parts, rest = (self._line + part).split(b"\n")
            whole.extend(parts)
            self._line = rest[-MOST:]
        return whole

    def poll(self) -> int | None:
        """The status with which it has ended, once; what it had started is killed then. None while it runs, or is none."""
        process = self._process
        if process is None:
            return None
        if hasattr(os, "waitid"):  # look first: as long as it is not reaped, its group has its number
            with contextlib.suppress(ChildProcessError):
                if os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                    return None
            self._kill(process.pid)
        code = process.poll()
        if code is not None:
            self._process = None
        return code

    def tell(self) -> None:
        """Send it SIGTERM."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, signal.SIGTERM)

    def kill(self) -> None:
        """Kill it, and what it has started."""
        if self._process is not None:
            self._kill(self._process.pid)

    def tail(self) -> tuple[str, ...]:
        """The last lines that it has added to its log."""
        return tuple(line.rstrip() for line in self.log.tail(self._place).splitlines() if line.strip())[-100:]

    def close(self) -> None:
        """Hear it no more."""
        if self._stream is not None:
            self._stream.close()
        self._stream, self._line = None, b""

    @staticmethod
    def _kill(group: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)
