"""What a command is, how it ends, and how a bad input is told."""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tyro

PARTLY, USAGE, FAILED, INTERRUPTED = 1, 2, 3, 130
"""Exit statuses: a run that is over, and a worker of which failed; a bad input, a run that failed, Ctrl-C."""


class Refused(Exception):
    """A bad input: the message names the thing, its value and the cure."""


class Command(ABC):
    """One word after ``offbeat``."""

    @classmethod
    def defaults(cls, argv: Sequence[str]) -> Any:
        """What the command is with no flags but those in ``argv`` that decide what other flags there are."""
        return tyro.MISSING_NONPROP

    @abstractmethod
    def run(self, argv: Sequence[str]) -> int:
        """Do it; the exit status."""


@contextmanager
def told() -> Iterator[None]:
    """What a bad input raises inside is for the user, in one line; anything else is ours, with a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise Refused(str(error)) from error


def writable(path: Path) -> Path:
    """``path`` as a folder that can be written to, found out by making it and writing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise Refused(f"the folder {path} cannot be written to ({error.strerror}): choose another one") from error
    return path
