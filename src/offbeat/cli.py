"""The command line. A command is a dataclass: its fields are the flags, their docstrings the help.

A command's parts (a method, a task, a cluster, a grid) are dataclasses too, and give their fields as flags without a
prefix, unless the name is taken. What is no number or text is written as Python, such as ``Gamma(cv=0.1)``.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_args, get_origin, get_type_hints

import docstring_parser
import torch
import tyro
from rich.console import Console, Group
from rich.live import Live
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
from .core.values import refuse, require, require_count, unknown
from .engines.cluster import Cluster
from .engines.faults import Fault, Straggler
from .engines.network import Link
from .engines.presets import PRESETS
from .engines.simulator import Run, Simulation
from .engines.speed import Speed
from .experiment import Cell, CellFailed, Comparison, Grid, compare, entry, rerun, show, warmed
from .failure import Failure
from .methods import all_methods, find
from .names import KINDS, read
from .tasks import TASKS, catalogue
from .trace import Event, Trace

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
        for item in catalogue():
            where = item.where
            if where is None:
                data = "needs no files"
            elif where.present:
                data = f"{where.title}: found in {next(iter(where.found.values())).parent}"
            else:
                data = f"{where.title}: {len(where.missing)} files missing; put them in {where.folders[0]}"
            lines.append([item.name, item.summary, data])
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
    lanes: Annotated[int | None, arg(help_behavior_hint="(default: measured)")] = None
    """Gradients of workers in flight that are taken in one call; the same number gives the same bits."""
    abreast: Annotated[int | None, arg(help_behavior_hint="(default: measured)")] = None
    """Gradients that are taken at once, by a thread each: for nets too large for lanes and too small for all cores."""
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: runs/METHOD-TASK-WORKERSw)")] = None
    """Where trace, summary and page go."""

    def __post_init__(self) -> None:
        require_count(self, "evaluations")
        require(self, "warmup", 0 <= self.warmup <= 1, "must be in [0, 1]")

    @classmethod
    def defaults(cls, argv: Sequence[str]) -> Self:
        method, task = _method(_said(argv, "--method", cls.method)), _task(_said(argv, "--task", cls.task))
        return cls(settings=method, cluster=_preset(argv) or Cluster(), data=task())

    def run(self, argv: Sequence[str]) -> int:
        workers = self.cluster.workers
        name = type(self.settings).name
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # as in a cell of a comparison; small nets gain nothing from more
        with _told():
            method = warmed(self.settings, self.warmup, self.gradients, workers)
            task = replace(self.data, seed=self.seed)
            every = max(1, self.gradients // self.evaluations)
            taking = self.lanes, self.abreast
            simulation = Simulation(method, task, self.cluster, self.gradients, self.seed, every, *taking)
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
class Launch(Command):
    """Train on processes of this machine: offbeat launch [OPTIONS] SCRIPT.py [ARGUMENTS], or without a script a task."""

    settings: Annotated[Any, arg(name="method")]
    """Settings of the method that --method names."""
    data: Annotated[Any, arg(name="task")]
    """Settings of the task that --task names."""
    method: Annotated[
        str | None, arg(metavar="NAME", help_behavior_hint="(default: what the script says; dana-zero)")
    ] = None
    """The method: a name, or a value such as "SlowMo(SGP(), period=8)"."""
    task: TaskName = "digits"
    workers: int = 2
    """Worker processes, at least 1."""
    gradients: Annotated[int | None, arg(help_behavior_hint="(default: 4000; of a script: until its loops end)")] = None
    """Minibatch gradients, all workers together."""
    warmup: float = 0.0
    """Part of the run over which the learning rate of a task's method rises to its full value, 0 to 1."""
    seed: int = 0
    """What weights and the order of the data follow from."""
    speed: Speed | None = None
    """Seconds that a gradient of a task takes at least: the rest is slept, to try a cluster out."""
    faults: tuple[Fault, ...] = ()
    """Straggler(worker, factor), with --speed: slows that worker of a task."""
    transport: Literal["auto", "shared", "gloo", "tcp"] = "auto"
    """How payloads travel; auto is shared memory here."""
    shards: int = 1
    """Server processes, each with a part of the model, at least 1."""
    ranks: int = 1
    """Processes that together are one worker of a script, started by torchrun, at least 1: see Replica's group."""
    restarts: int = 10
    """How often a process that dies is started again, at least 0."""
    timeout: float = 30.0
    """Seconds of silence after which a process is taken for dead."""
    every: float = 30.0
    """Seconds between two snapshots."""
    evaluations: int = 20
    """How often the model of a task that would be shipped is evaluated, evenly over the gradients."""
    resume: bool = False
    """Go on from the newest snapshot in --out."""
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: runs/launch)")] = None
    """Where logs, trace, snapshots, model and page go."""
    script: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()

    def __post_init__(self) -> None:
        for name in ("workers", "shards", "ranks", "evaluations"):
            require_count(self, name)
        require_count(self, "restarts", least=0)
        require(self, "shards", 1 in (self.shards, self.ranks), "is that of --ranks, where there are several")
        if self.gradients is not None:
            require_count(self, "gradients")
        require(self, "warmup", 0 <= self.warmup <= 1, "must be in [0, 1]")
        for name in ("timeout", "every"):
            require(self, name, 0 < getattr(self, name) < float("inf"), "must be finite and above 0 seconds")
        for fault in self.faults:
            if not isinstance(fault, Straggler):
                refuse(
                    self, "faults", fault, "on real processes only a Straggler can be tried; kill a process to try more"
                )

    @classmethod
    def defaults(cls, argv: Sequence[str]) -> Self:
        method, task = _method(_said(argv, "--method", "dana-zero")), _task(_said(argv, "--task", cls.task))
        return cls(settings=method, data=task())

    def run(self, argv: Sequence[str]) -> int:
        from .runtime.launch import Launch as Processes
        from .runtime.launch import LaunchFailed

        folder = _folder(self.out or Path("runs") / "launch")
        gradients = self.gradients if self.gradients or self.script else 4000
        flags = ["--workers", str(self.workers), "--seed", str(self.seed), "--transport", self.transport]
        flags += ["--timeout", str(self.timeout), "--every", str(self.every), "--evaluations", str(self.evaluations)]
        if gradients:
            flags += ["--gradients", str(gradients)]
        said = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}
        with _told():
            if self.method is not None or not self.script:
                method = warmed(self.settings, self.warmup, gradients or 1, self.workers)
                method.check(self.workers)
                flags += ["--method", repr(method)]
                said["OFFBEAT_METHOD"] = repr(method)
            if self.script:
                if not Path(self.script[0]).is_file():
                    raise ValueError(f"{self.script[0]}: there is no such file")
                worker = [sys.executable, *self.script]
            else:
                require(self, "ranks", self.ranks == 1, "only the workers of a script can have more than one")
                task = replace(self.data, seed=self.seed)
                task.x0()  # whatever is wrong with its data is said here
                worker = [sys.executable, "-m", "offbeat", "worker", "--problem", repr(task)]
                worker += ["--speed", repr(self.speed)] if self.speed else []
                worker += ["--faults", *map(repr, self.faults)] if self.faults else []
        total = gradients
        with _board(total) as tell:
            processes = Processes(
                folder,
                [sys.executable, "-m", "offbeat", "server", "--status", *flags],
                worker,
                self.workers,
                max(self.shards, self.ranks),
                self.restarts,
                self.ranks,
                environment=said,
                resume=self.resume,
                say=lambda text: err.print(f"offbeat: {escape(text)}"),
                watch=tell,
            )
            try:
                over = processes.run()
            except LaunchFailed as failed:
                err.print(f"offbeat: {escape(str(failed))}\nlogs, trace and snapshots are in {escape(str(folder))}")
                return FAILED
        whole = self.shards == self.ranks == 1
        figures = _finished(folder, argv, gradients) if whole else {}
        if figures:
            name = self.method or "launch"
            out.print(_table([name, f"workers: {self.workers}"], [[n, show(n, v)] for n, v in figures.items()]))
        out.print(f"model: {folder / ('model.pt' if whole else 'shard-*/model.pt')}", soft_wrap=True)
        return 0 if over else INTERRUPTED


@dataclass(frozen=True)
class Serve(Command):
    """Serve a run to workers, here or on other machines; its address is host:port, and OFFBEAT_TOKEN the run's secret."""

    method: Annotated[str | None, arg(metavar="METHOD", help_behavior_hint="(default: what the first worker says)")] = (
        None
    )
    """A server method by name, with settings if wanted: "dana-zero(lr=0.02)"."""
    host: str = "127.0.0.1"
    """Where to listen: beyond this machine only with OFFBEAT_TOKEN set. Use a private network: payloads are not encrypted."""
    port: int = 0
    """At which port; 0: any that is free."""
    workers: int = 1
    """How many workers will end their loops before the run is over; more may come and go."""
    gradients: int | None = None
    """Minibatches to hand out, all workers together; None: until the workers' loops end."""
    seed: int = 0
    """What the order of the data follows from."""
    transport: Literal["auto", "shared", "gloo", "tcp"] = "auto"
    """How payloads travel; auto: shared memory within a machine, gloo between two."""
    shard: tuple[int, int] = (0, 1)
    """Which part of the model this server has, of how many."""
    timeout: float = 30.0
    """Seconds of silence after which a worker is taken for dead."""
    every: float = 30.0
    """Seconds between two snapshots."""
    evaluations: int = 20
    """How often a task's model is evaluated, evenly over the gradients."""
    resume: bool = False
    """Go on from the newest whole snapshot in --out, if there is one."""
    status: bool = False
    """Write status as JSON lines to the standard output instead of a table."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("runs/server")
    """Where trace, snapshots and model go."""

    def run(self, argv: Sequence[str]) -> int:
        from .runtime.coordinator import host_for
        from .runtime.host import Terms as RunTerms

        folder = _folder(self.out)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        with _told():
            method = None if self.method is None else _method(self.method)
            terms = RunTerms(
                method,
                self.gradients,
                self.workers,
                self.seed,
                self.transport,
                self.timeout,
                min(1.0, self.timeout / 4),
                self.every,
                self.shard,
            )
            token = os.environ.get("OFFBEAT_TOKEN", "")
            server = host_for(terms)(terms, token, folder, read, _log, self.host, self.port)
            if self.resume:
                server.resume()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        address = f"{self.host}:{server.port}"
        with contextlib.nullcontext(_lines) if self.status else _board(self.gradients) as tell:
            if self.status:
                print(json.dumps({"address": address}), flush=True)
            else:
                err.print(f"offbeat: workers may join with OFFBEAT_SERVER={address}")
            watch = _Evaluating(server, self.evaluations, tell)
            server.run(watch.look, watch.end)
            # the first worker may have named a method of the other kind, and will be back
            if server.other is not None and not server.told:
                terms = replace(terms, method=server.other.method)
                server = host_for(terms)(terms, token, folder, read, _log, self.host, server.port)
                watch = _Evaluating(server, self.evaluations, tell)
                server.run(watch.look, watch.end)
        return 0


@dataclass(frozen=True)
class Work(Command):
    """Be a worker of a run: offbeat worker --server HOST:PORT SCRIPT.py [ARGUMENTS], or without a script of a task."""

    server: Annotated[str, arg(metavar="HOST:PORT", help_behavior_hint="(default: $OFFBEAT_SERVER)")] = ""
    """Where the server is; of several shards all, with commas between them."""
    problem: Annotated[str | None, arg(metavar="TASK")] = None
    """A task as a value, such as "Digits(batch=16)"."""
    number: Annotated[int | None, arg(help_behavior_hint="(default: $OFFBEAT_WORKER, or one that is free)")] = None
    """The worker's number."""
    speed: Speed | None = None
    """Seconds that a gradient of a task takes at least."""
    faults: tuple[Fault, ...] = ()
    """What slows the worker of a task."""
    script: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()

    def run(self, argv: Sequence[str]) -> int:
        said = {"OFFBEAT_SERVER": self.server, "OFFBEAT_WORKER": "" if self.number is None else str(self.number)}
        os.environ.update({name: value for name, value in said.items() if value})
        if not os.environ.get("OFFBEAT_SERVER"):
            raise Refused("no server is named: give --server HOST:PORT, or set OFFBEAT_SERVER")
        if self.script:
            os.execv(sys.executable, [sys.executable, *self.script])
        if self.problem is None:
            raise Refused("nothing to do: give a script, or a task such as --problem 'Digits()'")
        from .runtime.link import LinkLost
        from .runtime.place import Place
        from .runtime.replica import enter
        from .runtime.worker import train

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        stopped: list[int] = []  # no event, whose lock the main thread may hold when the signal comes
        signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
        stops = lambda: bool(stopped)  # noqa: E731
        with _told():
            problem, place = read(self.problem), Place.read()
            method = read(place.method) if place.method else None
            hello = {"problem": repr(problem), "layout": None}
            try:
                worker = enter(place, problem.x0(), method, hello, read, _log, stops)
                train(worker, problem, self.speed, self.faults, stops)
            except (LinkLost, Failure) as error:
                err.print(f"offbeat: {escape(str(error))}")
                return FAILED
        return 0


@dataclass(frozen=True)
class Replay(Command):
    """Run a recorded run again: simulate it from its header, or replay the order of a real run in one process."""

    trace: Positional[Path]
    """The trace, or the folder of a run."""
    problem: Annotated[str | None, arg(metavar="TASK", help_behavior_hint="(default: the trace's own)")] = None
    """The problem of a user's own script, as a task such as "Digits()"."""

    def run(self, argv: Sequence[str]) -> int:
        with _told():
            path = self.trace / "trace.jsonl" if self.trace.is_dir() else self.trace
            trace = Trace.read(path)
            problem = None if self.problem is None else read(self.problem)
            with _progress(max(1, len(trace))) as tell:
                run = rerun(trace, problem, _watch(tell))
        lines = [[name, show(name, value)] for name, value in run.summary().items()]
        model = path.parent / "model.pt"
        if model.exists() and trace.header.get("engine") == "runtime":
            x = torch.cat([t.reshape(-1) for t in torch.load(model, weights_only=True).values()])
            if x.shape == run.x.shape:
                lines.append(["distance to the recorded run's model", f"{float((x - run.x).abs().max()):.3g}"])
        out.print(_table(["replay", ""], lines))
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
    argv, script = _script(argv) if "script" in {f.name for f in fields(command)} else (argv, ())
    with _told():
        default = command.defaults(argv)
    parts = [getattr(default, f.name) for f in fields(command) if hasattr(default, f.name)]
    registry = _registry(command, [type(part) for part in parts if is_dataclass(part)])
    parsed = tyro.cli(command, prog=f"offbeat {name}", args=list(argv), default=default, registry=registry)
    return cast(Command, replace(parsed, script=tuple(script)) if script else parsed)


def _script(argv: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Flags of the command, and the user's script with its own arguments."""
    place = next((i for i, word in enumerate(argv) if word.endswith(".py")), len(argv))
    return argv[:place], argv[place:]


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


class _Evaluating:
    """Tells a server's status about once a second, and evaluates the model of a task as often as asked."""

    def __init__(self, server: Any, evaluations: int, tell: Callable[[dict[str, Any]], None]) -> None:
        total = server.terms.gradients
        self.server, self.tell, self.whole = server, tell, server.terms.shard == (0, 1)
        self.every = max(1, total // evaluations) if total and self.whole else 0
        self.due, self.last, self.problem = self.every, 0.0, None

    def look(self) -> None:
        """What the server calls some times a second."""
        done = self.server.tickets.done
        if self.every and self.server.problem and done >= self.due:
            self.problem = self.problem or read(self.server.problem)
            self.due = (done // self.every + 1) * self.every
            self.server.evaluate(self.problem)
        if time.monotonic() - self.last >= 1.0:
            self.last = time.monotonic()
            try:
                self.tell(self.server.status())
            except BrokenPipeError:  # the launcher is dead
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115
                self.server.stop()

    def end(self) -> None:
        """What the server calls at the end."""
        if self.whole and self.server.problem:
            self.server.evaluate(self.problem or read(self.server.problem))


def _lines(status: dict[str, Any]) -> None:
    print(json.dumps(status), flush=True)


def _log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} offbeat: {text}", file=sys.stderr, flush=True)


def _method(text: str) -> Method:
    """A method by name, by name with settings, or as a value."""
    value = read(text) if text[:1].isupper() and "(" in text else entry(text)
    if not isinstance(value, Method):
        raise ValueError(f"{text} is no method: offbeat methods lists them")
    return value


@contextmanager
def _board(total: int | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function to call with a run's status: a live table, or lines where there is no terminal."""
    if not err.is_terminal or os.environ.get("CI"):
        due = 0.0

        def line(status: dict[str, Any]) -> None:
            nonlocal due
            if time.monotonic() >= due:
                due = time.monotonic() + 5
                rate = sum(w["rate"] for w in status["workers"] if w["rate"] == w["rate"])
                of = f" of {total:,}" if total else ""
                err.print(f"{status['gradients']:,}{of} gradients, {rate:,.0f}/s, {len(status['workers'])} workers")

        yield line
        return
    with Live(console=err, auto_refresh=False, transient=True) as live:

        def draw(status: dict[str, Any]) -> None:
            titles = ["worker", "life", "gradients", "per second", "lag", "gap", "loss", "last seen, s"]
            names = ("worker", "life", "gradients", "rate", "lag", "gap", "loss", "seen")
            lines = [[show(name, float(w[name])) for name in names] for w in status["workers"]]
            of = f" of {total:,}" if total else ""
            head = f"{status['gradients']:,}{of} gradients, {status['seconds']:,.0f} s, {status['refused']} refused"
            live.update(Group(head, _table(titles, lines)), refresh=True)

        yield draw


def _finished(folder: Path, argv: Sequence[str], gradients: int | None) -> dict[str, float]:
    """The figures of a run that is over; writes its summary and its page."""
    path = folder / "trace.jsonl"
    trace = Trace.read(path) if path.exists() else Trace()
    if not len(trace):
        err.print(f"offbeat: no gradient was taken; see the logs in {escape(str(folder / 'logs'))}")
        return {}
    x = torch.cat([t.reshape(-1) for t in torch.load(folder / "model.pt", weights_only=True).values()])
    last = trace.evaluations[-1].figures if trace.evaluations else {}
    figures = {n: v for n, v in Run(x, trace, trace[-1].seconds, last).summary().items() if v == v}
    summary = {"command": _line(argv), "failure": "", "message": "", "figures": figures}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    _page((trace, summary), folder)
    return figures


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
