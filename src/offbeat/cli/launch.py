"""The command that trains on processes of this machine."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import tyro
from tyro.conf import arg

from ..core.values import refuse, require, require_count
from ..engines.faults import Fault, Straggler
from ..engines.simulator import Run
from ..engines.speed import Speed
from ..experiment import warmed
from ..figures import entries
from ..log import Lines, lines_to
from ..plain import dumps
from ..trace import Trace
from ..watch.beside import check
from .command import FAILED, INTERRUPTED, PARTLY, Command, told, writable
from .display import board, command_line, err, out, page, shown, table
from .flags import ModuleNames, TaskName, load, method_of, said_in, task_class, words_of


@dataclass(frozen=True)
class Launch(Command):
    """Train on processes of this machine: offbeat launch [OPTIONS] SCRIPT [ARGUMENTS], or -m MODULE, or without either a task."""

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
    """How often an hour each process that dies is started again, at least 0; a worker that dies more often is given up."""
    timeout: float = 30.0
    """Seconds of silence after which a process is taken for dead."""
    every: float = 30.0
    """Seconds between two snapshots."""
    evaluations: int = 20
    """How often the model of a task that would be shipped is evaluated, evenly over the gradients."""
    page: Annotated[str | None, arg(metavar="[HOST:]PORT", help_behavior_hint="(default: none)")] = None
    """Serve a live page of the run, and metrics, at this port of this machine (0: any that is free); beyond it with OFFBEAT_TOKEN set."""
    track: Annotated[tuple[str, ...], arg(metavar="TRACKER [TRACKER ...]")] = ()
    """Where figures go, any of csv, tensorboard, wandb, mlflow, or MODULE:CLASS of your own."""
    show: str = "0"
    """Whose lines are shown here: those of the script of a worker, by its number, of "all", or of "none"; all are in the logs."""
    resume: bool = False
    """Go on from the newest snapshot in --out, if there is one; all workers are started anew."""
    imports: ModuleNames = ()
    """Modules to import where methods are read: those of your own classes, such as mypackage.methods."""
    out: Annotated[
        Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: runs/launch, runs/launch-2, ...)")
    ] = None
    """Where logs, trace, snapshots, model and page go: a folder that holds no run yet, but for --resume."""
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
        one = self.show.isdecimal() and int(self.show) < self.workers
        require(self, "show", one or self.show in ("all", "none"), 'must be a worker\'s number, "all" or "none"')
        for fault in self.faults:
            if not isinstance(fault, Straggler):
                refuse(
                    self, "faults", fault, "on real processes only a Straggler can be tried; kill a process to try more"
                )

    @classmethod
    def defaults(cls, argv: Sequence[str]) -> Self:
        load(words_of(argv, "--import"))
        method, task = method_of(said_in(argv, "--method", "dana-zero")), task_class(said_in(argv, "--task", cls.task))
        return cls(settings=method, data=task())

    @lines_to(Lines())
    def run(self, argv: Sequence[str]) -> int:
        from ..runtime.folder import claim
        from ..runtime.launch import Launch as Processes
        from ..runtime.supervisor import Ending

        gradients = self.gradients if self.gradients or self.script else 4000
        with told():
            server, worker, variables = self._commands(gradients)
            watched = check(self.page, self.track, os.environ.get("OFFBEAT_TOKEN", ""))
            default = Path("runs") / "launch"
            folder, held = claim(self.out, default, "launch", writable, self.resume)
        if self.out is None and folder != default:
            which = "the last one" if self.resume else "those before hold earlier runs"
            err.print(f"offbeat: the run's folder is {shown(folder)}: {which}")
        before = _length(folder) if self.resume else 0
        with held, watched(folder) as pass_on, board() as tell:
            processes = Processes(
                folder,
                server,
                worker,
                self.workers,
                max(self.shards, self.ranks),
                self.restarts,
                self.ranks,
                environment=variables,
                resume=self.resume,
                watch=lambda status: (tell(status), pass_on())[0],
                hear=self._shows,
            )
            end = processes.run()
        if end.why:
            err.print(f"offbeat: {shown(end.why)}\nlogs are in {shown(folder / 'logs')}")
        status = {Ending.OVER: 0, Ending.FAILED: FAILED, Ending.STOPPED: INTERRUPTED}[end.ending]
        one = self.shards == self.ranks == 1
        if one:
            done = _length(folder)
            if not done:
                err.print("offbeat: no gradient was taken, so there is no model: see the logs")
                return status or FAILED
            if done == before and end.ending is Ending.OVER:
                err.print(f"offbeat: no gradient was taken since: the run was over before, with {done:,}")
            figures = _finished(folder, argv, model=end.whole)
            if figures:
                name = self.method or "launch"
                out.print(table([name, f"workers: {self.workers}"], figures))
        if end.whole:
            out.print(f"model: {shown(folder / ('model.pt' if one else 'shard-*/model.pt'))}", soft_wrap=True)
        else:
            err.print(f"offbeat: the model was not written; go on with --resume --out {shown(folder)}")
        if end.failed and end.ending is Ending.OVER:
            err.print(
                f"offbeat: {', '.join(end.failed)} failed: the model is whole, what the scripts had to do besides is not"
            )
            return PARTLY
        return status or (0 if end.whole else FAILED)

    def _shows(self, worker: int, text: str) -> None:
        """Print a line of a worker, where it is one that is shown."""
        if self.show == "all":
            out.print(f"worker {worker}: {text}", markup=False, soft_wrap=True)
        elif self.show == str(worker):
            out.print(text, markup=False, soft_wrap=True)

    def _commands(self, gradients: int | None) -> tuple[list[str], list[str], dict[str, str]]:
        """Commands of a server and of a worker, and variables for both."""
        flags = ["--workers", str(self.workers), "--seed", str(self.seed), "--transport", self.transport]
        flags += ["--timeout", str(self.timeout), "--every", str(self.every), "--evaluations", str(self.evaluations)]
        flags += ["--gradients", str(gradients)] if gradients else []
        modules = ["--import", *self.imports] if self.imports else []
        variables = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}
        if (
            self.imports and self.script and self.script[0] != "-m"
        ):  # what lies beside the script, the script can import
            beside = str(Path(self.script[0]).resolve().parent)
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, (beside, os.environ.get("PYTHONPATH", ""))))
        if self.method is not None or not self.script:
            method = warmed(self.settings, self.warmup, gradients or 1, self.workers)
            method.check(self.workers)
            flags += ["--method", repr(method)]
            variables["OFFBEAT_METHOD"] = repr(method)
        offbeat = [sys.executable, "-m", "offbeat"]
        if self.script:
            worker = [sys.executable, *_found(self.script)]
        else:
            require(self, "ranks", self.ranks == 1, "only the workers of a script can have more than one")
            task = replace(self.data, seed=self.seed)
            task.x0()  # whatever is wrong with its data is said here
            worker = [*offbeat, "worker", "--problem", repr(task), *modules]
            worker += ["--speed", repr(self.speed)] if self.speed else []
            worker += ["--faults", *map(repr, self.faults)] if self.faults else []
        return [*offbeat, "server", "--status", *flags, *modules], worker, variables


def _found(script: Sequence[str]) -> Sequence[str]:
    """A script or a module with its arguments, once it is clear that it is there."""
    if script[0] != "-m":
        if not Path(script[0]).is_file():
            raise ValueError(f"{script[0]}: there is no such file")
        return script
    if len(script) < 2:
        raise ValueError("-m: name a module, as in -m package.train")
    package = script[1].partition(".")[0]
    if importlib.util.find_spec(package) is None and not list(Path().glob(f"{package}*")):
        raise ValueError(f"-m {script[1]}: there is no module {package} in this folder or installed")
    return script


def _length(folder: Path) -> int:
    """How many gradients the trace of a run has."""
    path = folder / "trace.jsonl"
    return len(Trace.read(path)) if path.exists() else 0


def _finished(folder: Path, argv: Sequence[str], model: bool) -> list[list[str]]:
    """The figures of a run that has ended, as lines of a table; writes its summary and its page."""
    trace = Trace.read(folder / "trace.jsonl")
    figures: dict[str, float] = {}
    if model:
        x = torch.cat([t.reshape(-1) for t in torch.load(folder / "model.pt", weights_only=True).values()])
        last = trace.evaluations[-1].figures if trace.evaluations else {}
        figures = {n: v for n, v in Run(x, trace, trace[-1].seconds, last).summary().items() if v == v}
    summary = {"command": command_line(argv), "failure": "", "message": "", "figures": figures}
    try:
        (folder / "summary.json").write_text(dumps(summary, indent=1) + "\n", encoding="utf-8")
        page((trace, summary), folder)
    except OSError as error:  # the run is over, and its model is there
        err.print(f"no summary and no page: {shown(error)}; then offbeat report {shown(folder)}")
    return entries(figures, trace) if figures else []
