"""The trace of a real run as it is written: off the path of a visit, on the disk's side soon after, and read again at a resume."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from pathlib import Path
from typing import Any, BinaryIO

from ..trace import Event, Note, line

WAITING = 1 << 28
"""Bytes of lines that wait in memory while they cannot be written, at most: about a million gradients. Later ones are left out."""


class Unwritten:
    """Says once that something cannot be written, and once that it can be again."""

    def __init__(self, what: str, place: Path, log: logging.Logger) -> None:
        self.what, self.place, self.log = what, place, log
        self.why: str | None = None  # what has failed last time; None: nothing

    def failed(self, error: OSError) -> None:
        why = error.strerror or str(error)
        if why != self.why:
            self.log.warning(
                f"{self.what} cannot be written to {self.place} ({why}): it is tried again, and training goes on"
            )
        self.why = why

    def written(self) -> None:
        if self.why is not None:
            self.log.info(f"{self.what} is written to {self.place} again")
        self.why = None


class Journal:
    """A trace file to go on with after ``place`` bytes, which are whole lines: see `whole`. Entries wait for `flush`, which the
    host calls five times a second and before all that others rely on: so a host that is killed loses the lines of its last
    moment. What cannot be written waits in memory until it can (`WAITING`). Not thread-safe."""

    def __init__(self, path: Path, place: int, log: logging.Logger) -> None:
        self.path, self.place, self.log = path, place, log
        self.trouble = Unwritten("the trace", path.parent, log)
        self.closed = False
        self.left_out = 0
        self._file: BinaryIO | None = None
        self._entries: list[Event | Note | dict[str, Any]] = []
        self._lines = bytearray()  # of entries before those, as far as they are not in the file

    def add(self, entry: Event | Note | dict[str, Any]) -> None:
        """Record a gradient, a note, or the header; what happens after `close` is no part of the run."""
        self._entries.append(entry)

    def flush(self) -> bool:
        """Hand all lines to the system, which keeps them whatever becomes of this process; whether it has taken them."""
        entries, self._entries = self._entries, []
        if self.closed:
            return True
        for entry in entries:
            if len(self._lines) < WAITING:
                self._lines += line(entry).encode("utf-8", "surrogateescape") + b"\n"
            else:
                self._leave_out()
        try:
            file = self._file = self._file or self._open()
            while self._lines:
                written = file.write(self._lines)
                del self._lines[:written]
                self.place += written
        except OSError as error:
            self.trouble.failed(error)
            return False
        self.trouble.written()
        if self.left_out:
            self.log.warning(
                f"{self.left_out:,} entries are missing in the trace from here on, as there was no room for them"
            )
            self.left_out = 0
        return True

    def sync(self) -> None:
        """See that what was flushed survives a power cut. Raises ``OSError``. Other threads may add and flush meanwhile."""
        if self._file is not None and not self.closed:
            os.fsync(self._file.fileno())

    def close(self) -> bool:
        """Flush for the last time, and close the file; whether all lines are in it."""
        flushed = self.flush()
        self.closed = True
        if self._file is not None:
            self._file.close()
        return flushed

    def _open(self) -> BinaryIO:
        file = open(self.path, "r+b" if self.path.exists() else "wb", buffering=0)  # noqa: SIM115
        file.seek(self.place)
        file.truncate()
        return file

    def _leave_out(self) -> None:
        if not self.left_out:
            self.log.warning(
                f"the trace waits in memory with {WAITING:,} bytes, its bound: what happens until it can be written is left out "
                "of it"
            )
        self.left_out += 1


def whole(path: Path, place: int) -> int:
    """How many of the first ``place`` bytes of a trace are whole lines: all of them, but where a power cut has taken the end
    of the file, or left NUL bytes in its place."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        end, position = 0, 0
        while chunk := file.read(min(1 << 20, place - position)):
            chunk, nul, _ = chunk.partition(b"\0")
            last = chunk.rfind(b"\n") + 1
            end, position = position + last if last else end, position + len(chunk)
            if nul:
                break
        return end


def beyond(path: Path, place: int) -> tuple[int, float]:
    """How many gradients are recorded after the first ``place`` bytes of a trace, and the seconds of the last of them."""
    lost, seconds = 0, 0.0
    if path.exists():
        with open(path, "rb") as file:
            file.seek(place)
            for text in file:
                with contextlib.suppress(ValueError, TypeError, KeyError):  # a line that was cut, or is no gradient's
                    entry = json.loads(text)
                    seconds, lost = float(entry["seconds"]), lost + ("step" in entry)
    return lost, seconds
