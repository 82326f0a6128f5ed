"""Where the lines of a run go: to the standard library's `logging`, by the loggers ``offbeat.server``, ``offbeat.worker`` and
``offbeat.launch``. What is lost or goes wrong is a warning, what comes and goes in good order is information.

The commands of this library say where their lines are to be seen. In a user's script the user does; where it has configured
nothing, lines go to the standard error, as `Unconfigured` says.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

TREE = logging.getLogger("offbeat")
SERVER = logging.getLogger("offbeat.server")
WORKER = logging.getLogger("offbeat.worker")
LAUNCH = logging.getLogger("offbeat.launch")


STAMPED = "%(asctime)s offbeat: %(message)s"
"""How the commands for several machines show a line: with the time of day."""


class Lines(logging.StreamHandler[TextIO]):
    """Writes lines to what is the standard error at the time. Those that cannot be written are dropped, as nobody could be told: the
    disk is full, or the launcher that would read them is dead."""

    def __init__(self, form: str = "offbeat: %(message)s") -> None:
        super().__init__(sys.stderr)
        self.setFormatter(logging.Formatter(form, "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError | ValueError):  # ValueError: the stream is closed
            super().handleError(record)


class Unconfigured(Lines):
    """Shows all lines for a script that has configured no logging, and goes as soon as it has."""

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            TREE.removeHandler(self)
            TREE.setLevel(logging.NOTSET)
        else:
            super().emit(record)


def seen() -> None:
    """See that the lines of a user's script are shown where it has said nothing of them."""
    if not TREE.hasHandlers() and TREE.level == logging.NOTSET:
        TREE.addHandler(Unconfigured())
        TREE.setLevel(logging.INFO)


@contextmanager
def lines_to(handler: logging.Handler) -> Iterator[None]:
    """Inside, all lines of this library go to ``handler`` alone: for commands, whose process is ours."""
    handlers, level, propagate = TREE.handlers[:], TREE.level, TREE.propagate
    TREE.handlers[:], TREE.propagate = [handler], False
    TREE.setLevel(logging.INFO)
    try:
        yield
    finally:
        TREE.handlers[:], TREE.propagate = handlers, propagate
        TREE.setLevel(level)
