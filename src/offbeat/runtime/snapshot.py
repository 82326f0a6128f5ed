"""Snapshots: files that are whole or not there at all, and are never believed unless their hash says so."""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .. import formats

MAGIC = formats.SNAPSHOT.encode() + b"\n"
HEAD = len(MAGIC) + 65
"""Bytes before a snapshot's content: what it is, and the hash of the content."""


class Damaged(ValueError):
    """A file that is no snapshot, or only a part of one."""


class _Hashed:
    """A file that is written to and hashed on the way, so that the content is in memory once."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.hash.update(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        self.file.flush()


def write(folder: Path, number: int, content: dict[str, Any], keep: int = 3) -> Path:
    """Put ``content`` (tensors, numbers, text, and lists and dicts of them) into the snapshot ``number`` of ``folder``.

    Written aside, synced to the disk and renamed, so that a kill at any moment leaves whole snapshots only. The newest
    ``keep`` stay. Raises ``OSError`` where it cannot be written; nothing of it is left then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:012d}.snapshot"
    write_whole(path, content, hashed=True)
    for old in found(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def write_whole(path: Path, content: dict[str, Any], hashed: bool = False) -> None:
    """Put ``content`` into the file ``path``, for ``torch.load`` to read: all of it or, with an ``OSError``, nothing.

    ``hashed``: a snapshot's head comes first.
    """
    aside = path.with_suffix(".part")
    try:
        with open(aside, "wb") as file:
            file.write(bytes(HEAD) if hashed else b"")
            _save(content, there := _Hashed(file))
            if hashed:
                file.seek(0)
                file.write(MAGIC + there.hash.hexdigest().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _save(content: dict[str, Any], file: _Hashed) -> None:
    try:
        torch.save(content, file)  # type: ignore[arg-type]
    except Exception:
        if file.error is not None:  # of which torch makes another one
            raise file.error from None
        raise


def read(path: Path) -> dict[str, Any]:
    """What `write` has put there; `Damaged` where it is not all of it, `OtherVersion` where another offbeat wrote it.

    Never runs code that a file may hold.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD)
        formats.check(head.partition(b"\n")[0].decode("latin-1"), formats.SNAPSHOT, str(path))
        if head[: len(MAGIC)] != MAGIC or not file.read(1):
            raise Damaged(f"{path} is no snapshot")
        file.seek(HEAD)
        if hashlib.file_digest(file, "sha256").hexdigest().encode() != head[len(MAGIC) : -1]:
            raise Damaged(f"{path} does not meet its hash: it was cut short or changed")
        file.seek(HEAD)
        try:
            content: dict[str, Any] = torch.load(file, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise Damaged(f"{path} cannot be read ({str(error).splitlines()[0]})") from None
    return content


def found(folder: Path) -> list[Path]:
    """The snapshots of a folder, the newest first."""
    return sorted(folder.glob("*.snapshot"), reverse=True)


def newest(folder: Path, log: logging.Logger) -> tuple[Path, dict[str, Any]] | None:
    """The newest snapshot that is whole, if there is one; ``log`` is told about each that is not.

    One of another version raises `OtherVersion`: to go on from an older one, or to begin anew, would lose the run.
    """
    for path in found(folder):
        try:
            return path, read(path)
        except Damaged as damaged:
            log.warning(f"{damaged}; trying the one before")
    return None


def _sync(folder: Path) -> None:
    """The folder's own entry, so that the new name survives a power cut."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
