"""The trace of a real run as it is written: off the path of a visit, and on the disk's side soon after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..trace import Event, Note, line


class Journal:
    """A trace file to go on with after ``place`` bytes. Entries wait for `flush`, which the host calls five times a second
    and before all that others rely on: so a host that is killed loses the lines of its last moment. Not thread-safe."""

    def __init__(self, path: Path, place: int) -> None:
        self._file: Any = open(path, "r+" if path.exists() else "w", encoding="utf-8")  # noqa: SIM115
        self._file.seek(place)
        self._file.truncate()
        self._waiting: list[Event | Note | dict[str, Any]] = []

    def add(self, entry: Event | Note | dict[str, Any]) -> None:
        """Record a gradient, a note, or the header; what happens after `close` is no part of the run."""
        self._waiting.append(entry)

    def flush(self) -> None:
        """Hand all lines to the system, which keeps them whatever becomes of this process."""
        waiting, self._waiting = self._waiting, []
        if waiting and not self._file.closed:
            self._file.write("".join(line(entry) + "\n" for entry in waiting))
            self._file.flush()

    def tell(self) -> int:
        """Bytes of the trace so far."""
        self.flush()
        place: int = self._file.tell()
        return place

    def close(self) -> None:
        self.flush()
        self._file.close()
