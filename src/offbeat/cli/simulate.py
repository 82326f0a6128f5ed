"""Commands that need no cluster: methods, tasks, simulate, compare, replay, report."""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from rich.markup import escape
from tyro.conf import Positional, arg

from .. import tracking
from ..core.gossip import GossipMethod
from ..core.method import Method, ServerMethod
from ..core.periodic import PeriodicMethod
from ..core.values import require, require_count
from ..engines.cluster import Cluster
from ..engines.lanes import AUTO, Count
from ..engines.simulator import Simulation
from ..experiment import Cell, Comparison, Grid, compare, rerun, show, warmed
from ..failure import Failure
from ..figures import entries
from ..log import Lines, lines_to
from ..methods import all_methods, find
from ..names import read
from ..plain import dumps
from ..runtime.folder import choose
from ..tasks import catalogue
from ..trace import Trace
from ..watch.watcher import Watcher
from .command import FAILED, INTERRUPTED, Command, told, writable
from .display import command_line, err, out, page, progress, shown, table, watching
from .flags import MethodName, PresetName, TaskName, described, method_of, preset, said_in, task_class

CURE = "name another folder with --out"


@dataclass(frozen=True)
class Methods(Command):
    """List all methods, or tell everything about one."""

    name: Positional[str | None] = None
    """The method to tell about."""

    def run(self, argv: Sequence[str]) -> int:
        if self.name is not None:
            with told():
                cls = find(self.name)
            out.print(f"[bold]{cls.name}[/]  {cls.__name__}, {kind(cls)}\n")
            out.print(escape(inspect.getdoc(cls) or "") + "\n", soft_wrap=True)
            out.print(table(["field", "default", ""], [[n, d, h] for n, d, h in described(cls)], right=()))
            return 0
        lines = [
            [c.name, c.__name__, kind(c), " ".join((c.__doc__ or "").split("\n\n")[0].split())] for c in all_methods()
        ]
        out.print(table(["method", "class", "kind", ""], lines, right=()))
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
        out.print(table(["task", "", "data"], lines, right=()))
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
    lanes: Count = 1
    """Gradients of workers in flight that are taken in one call; the same number gives the same bits. auto: the fastest
    way is measured, lanes or --abreast, and told."""
    abreast: int = 1
    """Gradients that are taken at once, by a thread each: for nets too large for lanes and too small for all cores."""
    track: Annotated[tuple[str, ...], arg(metavar="TRACKER [TRACKER ...]")] = ()
    """Where figures go at the end, any of csv, tensorboard, wandb, mlflow, or MODULE:CLASS of your own."""
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: runs/METHOD-TASK-WORKERSw)")] = None
    """Where trace, summary and page go."""

    def __post_init__(self) -> None:
        require_count(self, "evaluations")
        require(self, "warmup", 0 <= self.warmup <= 1, "must be in [0, 1]")

    @classmethod
    def defaults(cls, argv: Sequence[str]) -> Self:
        method, task = method_of(said_in(argv, "--method", cls.method)), task_class(said_in(argv, "--task", cls.task))
        return cls(settings=method, cluster=preset(argv) or Cluster(), data=task())

    def run(self, argv: Sequence[str]) -> int:
        workers = self.cluster.workers
        name = type(self.settings).name
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # as in a cell of a comparison; small nets gain nothing from more
        with told():
            method = warmed(self.settings, self.warmup, self.gradients, workers)
            task = replace(self.data, seed=self.seed)
            every = max(1, self.gradients // self.evaluations)
            taking = self.lanes, self.abreast
            simulation = Simulation(method, task, self.cluster, self.gradients, self.seed, every, *taking)
            trackers = {which: tracking.find(which) for which in self.track}
            default = Path("runs") / f"{name}-{self.task}-{workers}w"
            folder = writable(choose(self.out, default, same=_of(argv), cure=CURE))
        figures: dict[str, float] = {}
        failure, message, status = "", "", 0
        try:
            with progress(self.gradients) as tell:
                simulation.watch = watching(tell)
                figures = simulation.run().summary()
        except Failure as error:
            failure, message, status = type(error).__name__, str(error), FAILED
        except KeyboardInterrupt:
            message, status = f"interrupted after {len(simulation.trace)} of {self.gradients} gradients", INTERRUPTED
        summary = {"command": command_line(argv), "failure": failure, "message": message, "figures": figures}
        if self.lanes == AUTO:
            way = "abreast" if simulation.trace.header["abreast"] > 1 else "lanes"
            out.print(
                f"gradients were taken by --{way} {simulation.trace.header[way]}, which was measured to be the fastest"
            )
        simulation.trace.write(folder / "trace.jsonl")
        (folder / "summary.json").write_text(dumps(summary, indent=1) + "\n", encoding="utf-8")
        if trackers:
            with lines_to(Lines()):
                Watcher(folder, trackers=trackers).run(lambda: False)
        if figures:
            out.print(table([name, f"workers: {workers}"], entries(figures, simulation.trace)))
        page((simulation.trace, summary), folder)
        if message:
            err.print(f"offbeat: {shown(message)}\nthe trace until then is {shown(folder / 'trace.jsonl')}")
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
    jobs: Annotated[int | None, arg(help_behavior_hint="(default: one for each CPU that may be used)")] = None
    """Processes that run cells. The results do not depend on it."""
    lanes: Count = 1
    """Gradients that are taken in one call, those of all seeds of a cell together; the same number gives the same bits. auto:
    what is faster is measured for each number of workers, and told."""
    out: Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: runs/compare-TASK)")] = None
    """Where results, traces and page go."""

    def __post_init__(self) -> None:
        require(self, "jobs", self.jobs is None or self.jobs >= 1, "must be at least 1")

    @classmethod
    def defaults(cls, argv: Sequence[str]) -> Self:
        cluster = preset(argv)
        like = {n: getattr(cluster, n) for n in ("speed", "network", "faults")} if cluster else {}
        return cls(grid=Grid(**like), data=task_class(said_in(argv, "--task", cls.task))())

    def run(self, argv: Sequence[str]) -> int:
        with told():
            grid = replace(self.grid, task=self.data)
            header = {"command": command_line(argv), **grid.header()}
            default = Path("runs") / f"compare-{self.task}"
            folder = writable(choose(self.out, default, same=_of(argv), cure=CURE))
        cells: list[Cell] = []
        keys = grid.keys
        try:
            with progress(len(keys) * grid.gradients) as tell:

                def watch(cell: Cell) -> None:
                    cells.append(cell)
                    chief = next((n for n in ("accuracy", "loss") if n in cell.figures), "")
                    outcome = f"{chief} {show(chief, cell.figures[chief])}" if chief else cell.failure or "done"
                    tell(len(cells) * grid.gradients, f", {len(cells)} of {len(keys)} runs; {cell.key}: {outcome}")

                compare(grid, jobs=self.jobs, lanes=self.lanes, watch=watch)
        finally:  # what is done is kept, however it ends
            comparison = Comparison(header, sorted(cells, key=lambda cell: keys.index(cell.key)))
            if cells:
                comparison.write(folder)
            if 0 < len(cells) < len(keys):
                err.print(
                    f"{len(cells)} of {len(keys)} runs are kept: offbeat report {shown(shlex.quote(str(folder)))}"
                )
        titles, *lines = comparison.table()
        out.print(table(titles, lines))
        if self.lanes == AUTO:
            for workers in grid.workers:
                most = max((cell.trace.header["lanes"] for cell in cells if cell.key.workers == workers), default=1)
                out.print(
                    f"gradients of {workers} workers were taken in up to {most} lanes, measured to be the fastest"
                )
        for cell in cells:
            if cell.failure:
                err.print(shown(f"{cell.key}: {cell.message}"))
        page(comparison, folder)
        return 0


@dataclass(frozen=True)
class Replay(Command):
    """Run a recorded run again: simulate it from its header, or replay the order of a real run in one process."""

    trace: Positional[Path]
    """The trace, or the folder of a run."""
    problem: Annotated[str | None, arg(metavar="TASK", help_behavior_hint="(default: the trace's own)")] = None
    """The problem of a user's own script, as a task such as "Digits()"."""

    def run(self, argv: Sequence[str]) -> int:
        with told():
            path = self.trace / "trace.jsonl" if self.trace.is_dir() else self.trace
            trace = Trace.read(path)
            problem = None if self.problem is None else read(self.problem)
            with progress(max(1, len(trace))) as tell:
                run = rerun(trace, problem, watching(tell))
        told_of = entries(run.summary(), run.trace)
        model = path.parent / "model.pt"
        if model.exists() and trace.header.get("engine") == "runtime":
            x = torch.cat([t.reshape(-1) for t in torch.load(model, weights_only=True).values()])
            if x.shape == run.x.shape:
                told_of.append(["distance to the recorded run's model", f"{float((x - run.x).abs().max()):.3g}"])
        out.print(table(["replay", ""], told_of))
        return 0


@dataclass(frozen=True)
class Report(Command):
    """Draw the page of an earlier run or comparison again."""

    folder: Positional[Path]
    """Where `offbeat simulate` or `offbeat compare` has put its results."""

    def run(self, argv: Sequence[str]) -> int:
        with told():
            from ..report import load

            result = load(self.folder)
        page(result, writable(self.folder))
        return 0


def kind(cls: type[Method]) -> str:
    kinds = (ServerMethod, GossipMethod, PeriodicMethod)
    return next((k.__name__.removesuffix("Method").lower() for k in kinds if issubclass(cls, k)), "")


def _of(argv: Sequence[str]) -> Callable[[Path], bool]:
    """Whether a folder holds what the very same command has left, which gives the same results once more."""

    def same(folder: Path) -> bool:
        for name in ("summary.json", "comparison.json"):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if json.loads((folder / name).read_text(encoding="utf-8")).get("command") == command_line(argv):
                    return True
        return False

    return same
