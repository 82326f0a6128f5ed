"""Where the library's data sets come from: files that are found, checked and vouched for, and never downloaded.

A data set is looked for in the folder that the environment variable ``OFFBEAT_DATA`` names, else in the user's cache
folder (on Linux ``~/.cache/offbeat``). Each file's content, after decompression, is compared with the published one:

- it is missing: `DataMissing`, which says what to get and where to put it;
- it cannot be what it claims to be (cut short, damaged, impossible values): `DataCorrupt`;
- it is well formed but not the published content: the warning `DataDiffers`, and a note in the set's ``provenance``,
  so that a result says what it was computed from.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch import Tensor


class DataMissing(FileNotFoundError):
    """A file of a data set is not there; the message says which, where it was looked for, and how to get it."""


class DataCorrupt(ValueError):
    """A file's content cannot be what it claims to be; the message names the file, both hashes and the cure."""


class DataDiffers(UserWarning):
    """A file is well formed, but its content is not the published one."""


class Loaded(NamedTuple):
    """A data set in memory."""

    train: tuple[Tensor, Tensor]
    """Inputs and targets, one row per example."""
    test: tuple[Tensor, Tensor]
    """The same for the test set."""
    provenance: dict[str, str]
    """File name -> ``"official"`` or ``"differs: sha256 ..."``."""


@dataclass(frozen=True)
class File:
    """One file's content and the sha256 of the published content."""

    path: str
    """Where it was found."""
    content: bytes = field(repr=False)
    """Its bytes, after decompression."""
    official: str
    """The sha256 of the published content, in hexadecimal."""

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the content, in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    def corrupt(self, reason: str) -> DataCorrupt:
        """The error to raise when the content cannot be what the file claims to be."""
        return DataCorrupt(
            f"{self.path}: {reason}. Its sha256 is {self.sha256}, the official content's is {self.official}. "
            "Delete the file and fetch it again"
        )


@dataclass(frozen=True)
class Source:
    """A published data set: its files, their hashes, and how to get them."""

    title: str
    """Its official name."""
    publisher: str
    """Who published it, and a common way to fetch it."""
    folders: tuple[str, ...]
    """Where in the data folder its files may lie; the first is the one to recommend."""
    files: Mapping[str, str]
    """File name (without ``.gz``) -> sha256 of the published content."""

    def read(self, folder: Path) -> dict[str, File]:
        """Every file of the set under ``folder``, plain or with ``.gz``, by name, decompressed."""
        return {name: self._read(folder, name) for name in self.files}

    def vouch(self, files: Mapping[str, File]) -> dict[str, str]:
        """The provenance of these files; warns once if any is well formed but not as published."""
        notes = {n: "official" if f.sha256 == f.official else f"differs: sha256 {f.sha256}" for n, f in files.items()}
        if odd := [files[name].path for name, note in notes.items() if note != "official"]:
            message = f"{self.title}: not the published content, results will differ: {', '.join(odd)}"
            warnings.warn(message, DataDiffers, stacklevel=2)
        return notes

    def _read(self, folder: Path, name: str) -> File:
        places = [folder / inside / (name + end) for inside in self.folders for end in ("", ".gz")]
        path = next((p for p in places if p.is_file()), None)
        if path is None:
            raise DataMissing(
                f"{self.title}: {name} is missing. Looked for {', '.join(map(str, places))}. Nothing is downloaded: "
                f"get {', '.join(self.files)} (plain or .gz) of {self.title} ({self.publisher}) and put them in "
                f"{folder / self.folders[0]}, or set OFFBEAT_DATA to the folder that has {self.folders[0]}/ in it"
            )
        stored = path.read_bytes()
        if path.suffix != ".gz":
            return File(str(path), stored, self.files[name])
        try:
            return File(str(path), gzip.decompress(stored), self.files[name])
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            damaged = File(str(path), stored, self.files[name])
            raise damaged.corrupt(f"cannot be decompressed ({error}), so it was hashed as it is stored") from None


def folder() -> Path:
    """The folder of all data sets: ``OFFBEAT_DATA`` if it is set, else the user's cache folder for offbeat.

    Raises ``ImportError`` where the latter is needed and platformdirs, which knows it, is missing.
    """
    if chosen := os.environ.get("OFFBEAT_DATA"):
        return Path(chosen).expanduser()
    try:
        from platformdirs import user_cache_path
    except ImportError as error:
        raise ImportError(
            "where is the data? Set OFFBEAT_DATA to its folder, or pip install 'offbeat[tasks]'"
        ) from error
    return user_cache_path("offbeat", appauthor=False)
