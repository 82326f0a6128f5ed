"""Reading files that grow: a run's trace, and the log of its launcher."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHUNK = 1 << 20
"""Bytes that are read at once: a few thousand gradients, which take some hundredths of a second."""
MARK = 256
"""Bytes before the place in a file by which it is known whether they are still the same."""


class Tail:
    """The whole lines of a file, as they are added. A file that was cut, or replaced, is read anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.again = False
        """Whether what `read` returned last begins at the file's first line, and other lines were returned before."""
        self._place = 0  # up to which whole lines were returned
        self._mark = b""  # what is before that place

    def read(self) -> list[bytes]:
        """The next whole lines, without their ends; at most those of about `CHUNK` bytes, and none where there are no new ones."""
        self.again = False
        try:
            with open(self.path, "rb") as file:
                file.seek(self._place - len(self._mark))
                if file.read(len(self._mark)) != self._mark:
                    self.again, self._place, self._mark = True, 0, b""
                    file.seek(0)
                data = file.read(CHUNK)
                while (end := data.rfind(b"\n") + 1) == 0 and (more := file.read(CHUNK)):
                    data += more
        except OSError:
            return []
        self._place += end
        self._mark = (self._mark + data[max(0, end - MARK) : end])[-MARK:]
        return data[:end].splitlines()


class Follower:
    """What a trace has to say, as it grows."""

    def __init__(self, folder: Path) -> None:
        self._tail = Tail(folder / "trace.jsonl")
        self.again = False
        """Whether the trace begins anew with what `read` returned last: a server has gone on from a snapshot."""

    def read(self) -> list[dict[str, Any]]:
        """The next lines as they are in the file: the header, gradients, notes; some thousand at most. What is no such line, as after a
        power cut, is left out."""
        lines = self._tail.read()
        self.again = self._tail.again
        return list(_entries([line for line in lines if not line.startswith(b'{"deeds"')]))


def _entries(lines: list[bytes]) -> Iterator[dict[str, Any]]:
    try:
        entries = json.loads(b"[" + b",".join(lines) + b"]")  # all at once is twice as fast
    except ValueError:
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue
    return (entry for entry in entries if isinstance(entry, dict))
