"""Where the library's data sets come from: files that are found, checked and vouched for, and never downloaded.

A data set is looked for in the folder that the environment variable ``OFFBEAT_DATA`` names, else in the user's cache
folder (on Linux ``~/.cache/offbeat``). Each file's content, after decompression, is compared with the published one:

- it is missing: `DataMissing`, which says what to get and where to put it;
- it cannot be what it claims to be (cut short, damaged, impossible values): `DataCorrupt`;
- it is well formed but not the published content: the warning `DataDiffers`, and a note in the set's ``provenance``,
  so that a result says what it was computed from;
- nothing is known to compare it with: the note says ``unchecked`` and gives the hash.

Whether a task's files are there can be asked without reading them: `Recipe.data` and `Source.where`.
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
    """File name -> ``"official"``, ``"differs: sha256 ..."`` or ``"unchecked: sha256 ..."``."""


class Where(NamedTuple):
    """Where the files of a data set were looked for, and whether they are there; nothing of them was read."""

    title: str
    """The set's official name."""
    publisher: str
    """Who published it, and a common way to fetch it."""
    folders: tuple[Path, ...]
    """Where it was looked for; put it in the first."""
    found: dict[str, Path]
    """What is there, by name."""
    missing: tuple[str, ...]
    """The names of what is not."""

    @property
    def present(self) -> bool:
        """Whether everything is there."""
        return not self.missing


@dataclass(frozen=True)
class File:
    """One file's content and the hash of the published content."""

    path: str
    """Where it was found."""
    content: bytes = field(repr=False)
    """Its bytes, after decompression."""
    official: str
    """The sha256 or md5 of the published content, in hexadecimal (64 or 32 digits), or "" where none is known."""

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the content, in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def algorithm(self) -> str:
        """The hash function that ``official`` is of: ``"sha256"`` or ``"md5"``."""
        return "md5" if len(self.official) == 32 else "sha256"

    @cached_property
    def digest(self) -> str:
        """The content's hash, to compare with ``official``."""
        if self.algorithm == "sha256":
            return self.sha256
        return hashlib.md5(self.content, usedforsecurity=False).hexdigest()

    @property
    def note(self) -> str:
        """What the provenance says of it."""
        if self.official == self.digest:
            return "official"
        return f"{'differs' if self.official else 'unchecked'}: sha256 {self.sha256}"

    def text(self) -> str:
        """The content as UTF-8 text; raises `DataCorrupt` if it is none, or is blank."""
        try:
            text = self.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.corrupt(f"it is no UTF-8 text ({error})") from None
        if not text.strip():
            raise self.corrupt("it has no words")
        return text

    def corrupt(self, reason: str) -> DataCorrupt:
        """The error to raise when the content cannot be what the file claims to be."""
        return DataCorrupt(
            f"{self.path}: {reason}. Its {self.algorithm} is {self.digest}, the official content's is "
            f"{self.official or 'not known here'}. "
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
    """File name (without ``.gz``) -> sha256 or md5 of the published content, or "" where none is known."""

    def where(self, folder: Path) -> Where:
        """Which files of the set are under ``folder``, without reading any."""
        paths = {name: self._find(folder, name) for name in self.files}
        return Where(
            title=self.title,
            publisher=self.publisher,
            folders=tuple(folder / inside for inside in self.folders),
            found={name: path for name, path in paths.items() if path is not None},
            missing=tuple(name for name, path in paths.items() if path is None),
        )

    def read(self, folder: Path) -> dict[str, File]:
        """Every file of the set under ``folder``, plain or with ``.gz``, by name, decompressed."""
        return {name: self._read(folder, name) for name in self.files}

    def vouch(self, files: Mapping[str, File]) -> dict[str, str]:
        """The provenance of these files; warns once if any is well formed but not as published."""
        notes = {name: file.note for name, file in files.items()}
        if odd := [files[name].path for name, note in notes.items() if note.startswith("differs")]:
            message = f"{self.title}: not the published content, results will differ: {', '.join(odd)}"
            warnings.warn(message, DataDiffers, stacklevel=2)
        return notes

    def _places(self, folder: Path, name: str) -> list[Path]:
        return [folder / inside / (name + end) for inside in self.folders for end in ("", ".gz")]

    def _find(self, folder: Path, name: str) -> Path | None:
        return next((p for p in self._places(folder, name) if p.is_file()), None)

    def _read(self, folder: Path, name: str) -> File:
        path = self._find(folder, name)
        if path is None:
            looked = ", ".join(map(str, self._places(folder, name)))
            raise DataMissing(
                f"{self.title}: {name} is missing. Looked for {looked}. Nothing is downloaded: "
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
