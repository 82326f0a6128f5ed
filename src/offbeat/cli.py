"""The command line. A command is a dataclass: its fields are the flags, their docstrings the help.

A command's parts (a method, a task, a cluster, a grid) are dataclasses too, and give their fields as flags without a
prefix, unless the name is taken. What is no number or text is written as Python, such as ``Gamma(cv=0.1)``.
"""

from __future__ import annotations

import inspect
import json
import os
import shlex
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self, cast, get_args, get_origin, get_type_hints

import docstring_parser
import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tyro.conf import Positional, arg
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from . import __version__
from .core.gossip import GossipMethod
from .core.method import Method, ServerMethod
from .core.periodic import PeriodicMethod
from .core.values import require, require_count, unknown
from .engines.cluster import Cluster
from .engines.network import Link
from .engines.presets import PRESETS
from .engines.simulator import Simulation
from .experiment import Cell, CellFailed, Comparison, Grid, compare, show, warmed
from .failure import Failure
from .methods import all_methods, find
from .names import KINDS, read
from .tasks import TASKS, catalogue
from .trace import Event

USAGE, FAILED, INTERRUPTED = 2, 3, 130
"""Exit statuses: a bad input, a run that failed, Ctrl-C."""

out = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)

MethodName = Annotated[str, arg(metavar="NAME", help=f"One of {', '.join(c.name for c in all_methods())}.")]
TaskName = Annotated[str, arg(metavar="NAME", help=f"One of {', '.join(sorted(TASKS))}.")]

PresetName = Annotated[
    str | None,
    arg(metavar="NAME", help=f"A cluster to start from: {', '.join(PRESETS)}. Other flags change it."),
]


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


@dataclass(frozen=True)
class Methods(Command):
    """List all methods, or tell everything about one."""

    name: Positional[str | None] = None
    """The method to tell about."""

    def run(self, argv: Sequence[str]) -> int:
        if self.name is not None:
            with _told():
                cls = find(self.name)
            out.print(f"[bold]{cls.name}[/]  {cls.__name__}, {_kind(cls)}\n")
            out.print(escape(inspect.getdoc(cls) or "") + "\n", soft_wrap=True)
            out.print(_table(["field", "default", ""], [[n, d, h] for n, d, h in _described(cls)], right=()))
            return 0
        lines = [
            [c.name, c.__name__, _kind(c), " ".join((c.__doc__ or "").split("\n\n")[0].split())] for c in all_methods()
        ]
        out.print(_table(["method", "class", "kind", ""], lines, right=()))
        return 0


@dataclass(frozen=True)
class Tasks(Command):
    """List all tasks, the data that each needs, and whether it was found."""

    def run(self, argv: Sequence[str]) -> int:
        lines = []
        for entry in catalogue():
            where = entry.where
            if where is None:
                data = "needs no files"
            elif where.present:
                data = f"{where.title}: found in {next(iter(where.found.values())).parent}"
            else:
                data = f"{where.title}: {len(where.missing)} files missing; put them in {where.folders[0]}"
            lines.append([entry.name, entry.summary, data])
        out.print(_table(["task", "", "data"], lines, right=()))
        return 0


@dataclass(frozen=True)
class Simulate(Command):
    """Train one method on a simulated cluster; write its trace, a summary and a page with pictures."""

    settings: Annotated[Any, arg(name="method")]
    """Settings of the method that --method names."""
    cluster: Cluster
    """The cluster."""
    data: Annotated[Any, arg(name="task")]
    """Settings of the task that --task names."""
    method: MethodName = "dana-zero"
    task: TaskName = "digits"
    preset: PresetName = None
    gradients: int = 4000
    """Minibatch gradients, all workers together."""
    evaluations: int = 20
    """How often the model that would be shipped is evaluated, evenly over the gradients; at least 1."""
    warmup: float = 0.0
    """Part of the run over which the learning rate rises to its full value, 0 to 1."""
    seed: int = 0
    """Drives the task (weights, order of the data) and the cluster."""
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: runs/METHOD-TASK-WORKERSw)")] = None
    """Where trace, summary and page go."""

    def __post_init__(self) -> None:
        require_count(self, "evaluations")
        require(self, "warmup", 0 <= self.warmup <= 1, "must be in [0, 1]")

    @classmethod
    def defaults(cls, argv: Sequence[str]) -> Self:
        method, task = find(_said(argv, "--method", cls.method)), _task(_said(argv, "--task", cls.task))
        return cls(settings=method(), cluster=_preset(argv) or Cluster(), data=task())

    def run(self, argv: Sequence[str]) -> int:
        workers = self.cluster.workers
        name = find(self.method).name
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # as in a cell of a comparison; small nets gain nothing from more
        with _told():
            method = warmed(self.settings, self.warmup, self.gradients, workers)
            task = replace(self.data, seed=self.seed)
            every = max(1, self.gradients // self.evaluations)
            simulation = Simulation(method, task, self.cluster, self.gradients, self.seed, every)
        folder = _folder(self.out or Path("runs") / f"{name}-{self.task}-{workers}w")
        figures: dict[str, float] = {}
        failure, message, status = "", "", 0
        try:
            with _progress(self.gradients) as tell:
                simulation.watch = _watch(tell)
                figures = simulation.run().summary()
        except Failure as error:
            failure, message, status = type(error).__name__, str(error), FAILED
        except KeyboardInterrupt:
            message, status = f"interrupted after {len(simulation.trace)} of {self.gradients} gradients", INTERRUPTED
        summary = {"command": _line(argv), "failure": failure, "message": message, "figures": figures}
        simulation.trace.write(folder / "trace.jsonl")
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        if figures:
            out.print(_table([name, f"workers: {workers}"], [[n, show(n, v)] for n, v in figures.items()]))
        _page((simulation.trace, summary), folder)
        if message:
            err.print(f"offbeat: {escape(message)}\nthe trace until then is {escape(str(folder / 'trace.jsonl'))}")
        return status


@dataclass(frozen=True)
class Compare(Command):
    """Run methods against numbers of workers and seeds, all with the same number of gradients; write results and a page."""

    grid: Grid
    """The grid."""
    data: Annotated[Any, arg(name="task")]
    """Settings of the task that --task names."""
    task: TaskName = "digits"
    preset: PresetName = None
    jobs: Annotated[int | None, arg(help_behavior_hint="(default: one for each CPU)")] = None
    """Processes that run cells. The results do not depend on it."""
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: runs/compare-TASK)")] = None
    """Where results, traces and page go."""

    def __post_init__(self) -> None:
        require(self, "jobs", self.jobs is None or self.jobs >= 1, "must be at least 1")

    @classmethod
    def defaults(cls, argv: Sequence[str]) -> Self:
        cluster = _preset(argv)
        like = {n: getattr(cluster, n) for n in ("speed", "network", "faults")} if cluster else {}
        return cls(grid=Grid(**like), data=_task(_said(argv, "--task", cls.task))())

    def run(self, argv: Sequence[str]) -> int:
        with _told():
            grid = replace(self.grid, task=self.data)
            header = {"command": _line(argv), **grid.header()}
        folder = _folder(self.out or Path("runs") / f"compare-{self.task}")
        cells: list[Cell] = []
        keys = grid.keys
        try:
            with _progress(len(keys) * grid.gradients) as tell:

                def watch(cell: Cell) -> None:
                    cells.append(cell)
                    chief = next((n for n in ("accuracy", "loss") if n in cell.figures), "")
                    outcome = f"{chief} {show(chief, cell.figures[chief])}" if chief else cell.failure
                    tell(len(cells) * grid.gradients, f"{len(cells)} of {len(keys)} runs; {cell.key}: {outcome}")

                compare(grid, jobs=self.jobs, watch=watch)
        finally:  # what is done is kept, however it ends
            comparison = Comparison(header, sorted(cells, key=lambda cell: keys.index(cell.key)))
            if cells:
                comparison.write(folder)
            if 0 < len(cells) < len(keys):
                err.print(f"{len(cells)} of {len(keys)} runs are kept: offbeat report {shlex.quote(str(folder))}")
        titles, *lines = comparison.table()
        out.print(_table(titles, lines))
        for cell in cells:
            if cell.failure:
                err.print(escape(f"{cell.key}: {cell.message}"))
        _page(comparison, folder)
        return 0


@dataclass(frozen=True)
class Report(Command):
    """Draw the page of an earlier run or comparison again."""

    folder: Positional[Path]
    """Where `offbeat simulate` or `offbeat compare` has put its results."""

    def run(self, argv: Sequence[str]) -> int:
        with _told():
            from .report import load

            result = load(self.folder)
        _page(result, _folder(self.folder))
        return 0


COMMANDS: dict[str, type[Command]] = {
    "methods": Methods,
    "tasks": Tasks,
    "simulate": Simulate,
    "compare": Compare,
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
        return _parse(argv[0], argv[1:]).run(argv)
    except Refused as refused:
        err.print(f"offbeat: {escape(str(refused))}")
        return USAGE
    except CellFailed as failed:
        err.print(f"offbeat: {escape(str(failed))}")
        return FAILED
    except KeyboardInterrupt:
        err.print("offbeat: interrupted")
        return INTERRUPTED


def _overview() -> None:
    out.print("usage: offbeat COMMAND [OPTIONS]\n")
    out.print("Train neural networks without lockstep, on simulated clusters.\n")
    lines = [[name, inspect.getdoc(cls) or ""] for name, cls in COMMANDS.items()]
    out.print(_table(["command", ""], lines, right=()))
    out.print("offbeat COMMAND --help tells the options of a command.")


@contextmanager
def _told() -> Iterator[None]:
    """What a bad input raises inside is for the user, in one line; anything else is ours, with a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise Refused(str(error)) from error


# flags


def _parse(name: str, argv: Sequence[str]) -> Command:
    command: Any = COMMANDS[name]
    with _told():
        default = command.defaults(argv)
    parts = [getattr(default, f.name) for f in fields(command) if hasattr(default, f.name)]
    registry = _registry(command, [type(part) for part in parts if is_dataclass(part)])
    return cast(Command, tyro.cli(command, prog=f"offbeat {name}", args=list(argv), default=default, registry=registry))


def _registry(command: Any, parts: Sequence[type]) -> ConstructorRegistry:
    """How the flags of ``command`` are made of those of its parts, and how their texts are read."""
    registry = ConstructorRegistry()
    taken = {f.name for f in fields(command)}
    free: dict[type, set[str]] = {}  # the fields of each part that need no prefix
    for part in parts:
        free[part] = {f.name for f in fields(part)} - taken
        taken |= free[part]

    @registry.primitive_rule
    def text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
        if get_origin(info.type) is tuple:
            return None  # its entries are read one by one
        union = (info.type, *get_args(info.type))
        if info.type in free or not any(isinstance(t, type) and issubclass(t, (*KINDS, Link)) for t in union):
            return None
        plain = str in union  # the grid's entries are read by the grid
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="METHOD" if plain else "VALUE",
            instance_from_str=lambda words: words[0] if plain else read(words[0]),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [value if isinstance(value, str) else repr(value)],
        )

    @registry.struct_rule
    def flat(info: StructTypeInfo) -> StructConstructorSpec | None:
        cls = type(info.default)
        if cls not in free:
            return None
        hidden = "task" if cls is Grid else "seed" if cls in TASKS.values() else ""  # the command sets it
        hints, helps = get_type_hints(cls), {name: text for name, _, text in _described(cls)}
        flags = [
            StructFieldSpec(
                name=f.name,
                type=cast(Any, Annotated[hints[f.name], arg(prefix_name=f.name not in free[cls])]),
                default=getattr(info.default, f.name),
                helptext=helps[f.name],
            )
            for f in fields(cls)
            if f.name != hidden
        ]

        def build(**settings: Any) -> Any:
            with _told():
                return cls(**settings)

        return StructConstructorSpec(instantiate=build, fields=tuple(flags))

    return registry


def _said(argv: Sequence[str], flag: str, default: str) -> str:
    """What ``argv`` says for ``flag``, before anything else is known about the flags."""
    said = default
    for word, value in zip(argv, [*argv[1:], "-"], strict=True):
        if word == flag and not value.startswith("-"):
            said = value
        elif word.startswith(f"{flag}="):
            said = word.partition("=")[2]
    return said


def _task(name: str) -> type[Any]:
    if name not in TASKS:
        raise ValueError(unknown("task", name, TASKS))
    return TASKS[name]


def _preset(argv: Sequence[str]) -> Cluster | None:
    """The cluster that ``--preset`` names."""
    name = _said(argv, "--preset", "")
    if name and name not in PRESETS:
        raise ValueError(unknown("preset", name, list(PRESETS)))
    return PRESETS[name]() if name else None


def _described(cls: type[Any]) -> list[tuple[str, str, str]]:
    """Name, default and docstring of each field of a dataclass."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if "__dataclass_fields__" in vars(base):
            params = docstring_parser.parse_from_object(base).params
            texts |= {p.arg_name: " ".join(p.description.replace("``", "").split()) for p in params if p.description}
    return [(f.name, repr(f.default), texts.get(f.name, "")) for f in fields(cls)]


def _kind(cls: type[Method]) -> str:
    kinds = (ServerMethod, GossipMethod, PeriodicMethod)
    return next((k.__name__.removesuffix("Method").lower() for k in kinds if issubclass(cls, k)), "")


# output


def _folder(path: Path) -> Path:
    """``path`` as a folder that can be written to, found out by making it and writing."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise Refused(f"the folder {path} cannot be written to ({error.strerror}): choose another one") from error
    return path


def _page(result: Any, folder: Path) -> None:
    try:
        from . import report
    except ImportError as error:
        err.print(f"no page: {escape(str(error))}, then offbeat report {shlex.quote(str(folder))}")
        return
    out.print(f"page: {report.page(result, folder)}", soft_wrap=True)


def _line(argv: Sequence[str]) -> str:
    return shlex.join(["offbeat", *argv])


def _table(titles: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int] | None = None) -> Table:
    """A table; the columns ``right`` are aligned there (None: all but the first)."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for i, title in enumerate(titles):
        aligned = i > 0 if right is None else i in right
        table.add_column(escape(title), justify="right" if aligned else "left")
    for line in lines:
        table.add_row(*map(escape, line))
    return table


Tell = Callable[[int, str], None]


@contextmanager
def _progress(total: int) -> Iterator[Tell]:
    """A function to call with the gradients that are done and a remark: a bar, or lines where there is no terminal."""
    start = time.monotonic()
    due = 0.0
    if not err.is_terminal or os.environ.get("CI"):

        def line(done: int, remark: str) -> None:
            nonlocal due
            if done >= due:
                due = total * (10 * done // total + 1) / 10
                rate = done / max(1e-9, time.monotonic() - start)
                err.print(f"{done:,} of {total:,} gradients, {rate:,.0f}/s, {escape(remark)}")

        due = total / 10
        yield line
        return

    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=err, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=total)

        def move(done: int, remark: str) -> None:
            nonlocal due
            now = time.monotonic()
            if now >= due or done >= total:
                due = now + 0.25
                rate = done / max(1e-9, now - start)
                bar.update(task, completed=done, description=f"{done:,} of {total:,}, {rate:,.0f}/s, {escape(remark)}")
                bar.refresh()

        yield move


def _watch(tell: Tell) -> Callable[[Event], None]:
    """Tells how many events there were, and their running mean loss."""
    done, loss = 0, 0.0

    def watch(event: Event) -> None:
        nonlocal done, loss
        done += 1
        loss += (event.loss - loss) * max(1 / done, 0.02)
        tell(done, f"loss {loss:.3g}")

    return watch
