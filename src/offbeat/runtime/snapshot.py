"""Snapshots: files that are whole or not there at all, and are never believed unless their hash says so."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MAGIC = b"offbeat snapshot 1\n"


class Damaged(ValueError):
    """A file that is no snapshot, or only a part of one."""


def write(folder: Path, number: int, content: dict[str, Any], keep: int = 3) -> Path:
    """Put ``content`` (tensors, numbers, text, and lists and dicts of them) into the snapshot ``number`` of ``folder``.

    Written aside, synced to the disk and renamed, so that a kill at any moment leaves whole snapshots only. The newest
    ``keep`` stay.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getbuffer()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{number:012d}.snapshot"
    aside = path.with_suffix(".part")
    with open(aside, "wb") as file:
        file.write(MAGIC + hashlib.sha256(data).hexdigest().encode() + b"\n")
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    _sync(folder)
    for old in found(folder)[keep:]:
        old.unlink(missing_ok=True)
    return path


def read(path: Path) -> dict[str, Any]:
    """What `write` has put there; `Damaged` where it is not all of it. Never runs code that a file may hold."""
    data = path.read_bytes()
    start = len(MAGIC) + 65
    if data[: len(MAGIC)] != MAGIC or len(data) <= start:
        raise Damaged(f"{path} is no snapshot")
    if hashlib.sha256(data[start:]).hexdigest().encode() != data[len(MAGIC) : start - 1]:
        raise Damaged(f"{path} does not meet its hash: it was cut short or changed")
    try:
        content: dict[str, Any] = torch.load(io.BytesIO(data[start:]), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise Damaged(f"{path} cannot be read ({str(error).splitlines()[0]})") from None
    return content


def found(folder: Path) -> list[Path]:
    """The snapshots of a folder, the newest first."""
    return sorted(folder.glob("*.snapshot"), reverse=True)


def newest(folder: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest snapshot that is whole, if there is one; ``say`` is told about each that is not."""
    for path in found(folder):
        try:
            return path, read(path)
        except Damaged as damaged:
            say(f"{damaged}; trying the one before")
    return None


def _sync(folder: Path) -> None:
    """The folder's own entry, so that the new name survives a power cut."""
    if os.name == "posix":
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
