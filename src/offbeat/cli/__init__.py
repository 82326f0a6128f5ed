"""The command line."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Sequence

from .. import __version__
from ..core.values import unknown
from ..experiment import CellFailed
from .command import FAILED, INTERRUPTED, USAGE, Command, Refused
from .display import err, out, shown, table
from .flags import parse
from .launch import Launch
from .run import Serve, Work
from .simulate import Compare, Methods, Replay, Report, Simulate, Tasks

COMMANDS: dict[str, type[Command]] = {
    "methods": Methods,
    "tasks": Tasks,
    "simulate": Simulate,
    "compare": Compare,
    "launch": Launch,
    "server": Serve,
    "worker": Work,
    "replay": Replay,
    "report": Report,
}


def main(argv: Sequence[str]) -> int:
    """Run the command that ``argv`` describes; the exit status."""
    try:
        if not argv or argv[0] in ("-h", "--help"):
            _overview()
            return 0 if argv else USAGE
        if argv[0] == "--version":
            out.print(f"offbeat {__version__}")
            return 0
        if argv[0] not in COMMANDS:
            raise Refused(unknown("command", argv[0], list(COMMANDS)))
        return parse(COMMANDS[argv[0]], argv[0], argv[1:]).run(argv)
    except Refused as refused:
        err.print(f"offbeat: {shown(refused)}")
        return USAGE
    except CellFailed as failed:
        err.print(f"offbeat: {shown(failed)}")
        return FAILED
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return INTERRUPTED  # the terminal is closed, so there is nowhere to say it
    except KeyboardInterrupt:
        err.print("offbeat: interrupted")
        return INTERRUPTED


def _overview() -> None:
    out.print("usage: offbeat COMMAND [OPTIONS]\n")
    out.print("Train neural networks without lockstep, on simulated clusters.\n")
    lines = [[name, inspect.getdoc(cls) or ""] for name, cls in COMMANDS.items()]
    out.print(table(["command", ""], lines, right=()))
    out.print("offbeat COMMAND --help tells the options of a command.")
