"""The command line. What brings torch is imported with the command that needs it."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from .. import __version__
from ..core.values import unknown
from .command import FAILED, INTERRUPTED, USAGE, Command, Refused
from .display import err, out, shown, table


class Entry(NamedTuple):
    """Where a command is, and its docstring, which the overview shows without importing it."""

    module: str
    name: str
    about: str

    def load(self) -> type[Command]:
        """The class of the command."""
        command: type[Command] = getattr(import_module(f"{__name__}.{self.module}"), self.name)
        return command


COMMANDS = {
    "methods": Entry("simulate", "Methods", "List all methods, or tell everything about one."),
    "tasks": Entry("simulate", "Tasks", "List all tasks, the data that each needs, and whether it was found."),
    "simulate": Entry(
        "simulate",
        "Simulate",
        "Train one method on a simulated cluster; write its trace, a summary and a page with pictures.",
    ),
    "compare": Entry(
        "simulate",
        "Compare",
        "Run methods against numbers of workers and seeds, all with the same number of gradients; write results and a page.",
    ),
    "launch": Entry(
        "launch",
        "Launch",
        "Train on processes of this machine: offbeat launch [OPTIONS] SCRIPT [ARGUMENTS], or -m MODULE, or without either a task.",
    ),
    "server": Entry(
        "run",
        "Serve",
        "Serve a run to workers, here or on other machines; its address is host:port, and OFFBEAT_TOKEN the run's secret.",
    ),
    "worker": Entry(
        "run",
        "Work",
        "Be a worker of a run: offbeat worker --server HOST:PORT SCRIPT [ARGUMENTS], or -m MODULE, or without either of a task.",
    ),
    "attach": Entry(
        "attach",
        "Attach",
        "Watch a run that goes on, or is over, from its folder: in the terminal, as a page, in a tracker. The run does not notice.",
    ),
    "replay": Entry(
        "simulate",
        "Replay",
        "Run a recorded run again: simulate it from its header, or replay the order of a real run in one process.",
    ),
    "report": Entry("simulate", "Report", "Draw the page of an earlier run or comparison again."),
    "predict": Entry(
        "predict",
        "Predict",
        "Say from the record of a run how fast other methods and numbers of workers would be, and what would limit them.",
    ),
    "advise": Entry(
        "predict",
        "Advise",
        "Rank methods for the cluster that the record of a run shows: what is measured, computed and a rule of thumb of each.",
    ),
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
        return _run(argv)
    except Refused as refused:
        err.print(f"offbeat: {shown(refused)}")
        return USAGE
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return INTERRUPTED  # the terminal is closed, so there is nowhere to say it
    except KeyboardInterrupt:
        err.print("offbeat: interrupted")
        return INTERRUPTED


def _run(argv: Sequence[str]) -> int:
    from ..experiment import CellFailed
    from .flags import parse

    try:
        return parse(COMMANDS[argv[0]].load(), argv[0], argv[1:]).run(argv)
    except CellFailed as failed:
        err.print(f"offbeat: {shown(failed)}")
        return FAILED


def _overview() -> None:
    out.print("usage: offbeat COMMAND [OPTIONS]\n")
    out.print("Train neural networks without lockstep, on simulated clusters.\n")
    out.print(table(["command", ""], [[name, entry.about] for name, entry in COMMANDS.items()], right=()))
    out.print("offbeat COMMAND --help tells the options of a command.")
