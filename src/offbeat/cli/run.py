"""Commands of real runs: launch, server, worker."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
import tyro
from rich.markup import escape
from tyro.conf import arg

from ..core.values import refuse, require, require_count
from ..engines.faults import Fault, Straggler
from ..engines.simulator import Run
from ..engines.speed import Speed
from ..experiment import warmed
from ..failure import Failure
from ..figures import entries
from ..names import read
from ..plain import dumps
from ..trace import Trace
from .command import FAILED, INTERRUPTED, Command, Refused, told, writable
from .display import board, command_line, err, out, page, table
from .flags import TaskName, method_of, said_in, task_class

if TYPE_CHECKING:
    from ..runtime.host import Host


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
        method, task = method_of(said_in(argv, "--method", "dana-zero")), task_class(said_in(argv, "--task", cls.task))
        return cls(settings=method, data=task())

    def run(self, argv: Sequence[str]) -> int:
        from ..runtime.launch import Launch as Processes
        from ..runtime.launch import LaunchFailed

        folder = writable(self.out or Path("runs") / "launch")
        gradients = self.gradients if self.gradients or self.script else 4000
        flags = ["--workers", str(self.workers), "--seed", str(self.seed), "--transport", self.transport]
        flags += ["--timeout", str(self.timeout), "--every", str(self.every), "--evaluations", str(self.evaluations)]
        if gradients:
            flags += ["--gradients", str(gradients)]
        said = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": "1"}
        with told():
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
        with board(total) as tell:
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
        figures = _finished(folder, argv, gradients) if whole else []
        if figures:
            name = self.method or "launch"
            out.print(table([name, f"workers: {self.workers}"], figures))
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
    """Go on from the newest whole snapshot in --out, if there is one; all workers are started anew."""
    again: bool = False
    """The same where this server alone has ended: workers dial again, and those that have ended their loops are not waited for."""
    status: bool = False
    """Write status as JSON lines to the standard output instead of a table."""
    out: Annotated[Path, arg(metavar="FOLDER")] = Path("runs/server")
    """Where trace, snapshots and model go."""

    def run(self, argv: Sequence[str]) -> int:
        from ..runtime.coordinator import host_for, resumed
        from ..runtime.host import Terms as RunTerms

        folder = writable(self.out)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        with told():
            method = None if self.method is None else method_of(self.method)
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
            if self.resume or self.again:
                terms = resumed(terms, folder, read, _log)
            token = os.environ.get("OFFBEAT_TOKEN", "")
            server = host_for(terms)(terms, token, folder, read, _log, self.host, self.port)
            if self.resume or self.again:
                server.resume(anew=not self.again)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        address = f"{self.host}:{server.port}"
        with contextlib.nullcontext(_lines) if self.status else board(self.gradients) as tell:
            if self.status:
                print(dumps({"address": address}), flush=True)
            else:
                err.print(f"offbeat: workers may join with OFFBEAT_SERVER={address}")
            well = server.run(_watch(server, tell), self.evaluations)
            # the first worker may have named a method of the other kind, and will be back
            if server.other is not None and not server.told:
                terms = replace(terms, method=server.other.method)
                server = host_for(terms)(terms, token, folder, read, _log, self.host, server.port)
                well = server.run(_watch(server, tell), self.evaluations)
        return _ended(server, 0 if well else FAILED)


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
        from ..runtime.exit import Member
        from ..runtime.link import LinkLost
        from ..runtime.place import Place
        from ..runtime.replica import enter
        from ..runtime.worker import train

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        member = Member(_log)
        with told():
            problem, place = read(self.problem), Place.read()
            method = read(place.method) if place.method else None
            hello = {"problem": repr(problem), "layout": None}
            try:
                worker = enter(place, problem.x0(), method, hello, read, _log, member.told)
                member.joined(worker)
                train(worker, problem, self.speed, self.faults, member.told)
            except (LinkLost, Failure) as error:
                err.print(f"offbeat: {escape(str(error))}")
                return FAILED
            finally:
                member.forget()
        return 0


def _watch(server: Host, tell: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
    """What the server calls some times a second: it tells its status about once a second."""
    last = 0.0

    def look() -> None:
        nonlocal last
        if time.monotonic() - last < 1.0:
            return
        last = time.monotonic()
        try:
            tell(server.status())
        except BrokenPipeError:  # the launcher is dead
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            server.stop()
        except OSError:
            pass  # a full disk has no room for it

    return look


def _ended(server: Host, status: int) -> int:
    """``status``; but where a thread is still at work, this process ends here: all is written and closed, the thread may be inside
    of torch's compiler for a minute, and Python's own end would abort the process under it."""
    if server.busy:
        _log(f"ended without waiting for {', '.join(server.busy)}")
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    return status


def _lines(status: dict[str, Any]) -> None:
    print(dumps(status), flush=True)


def _log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} offbeat: {text}", file=sys.stderr, flush=True)


def _finished(folder: Path, argv: Sequence[str], gradients: int | None) -> list[list[str]]:
    """The figures of a run that is over, as lines of a table; writes its summary and its page."""
    path = folder / "trace.jsonl"
    trace = Trace.read(path) if path.exists() else Trace()
    if not len(trace):
        err.print(f"offbeat: no gradient was taken; see the logs in {escape(str(folder / 'logs'))}")
        return []
    x = torch.cat([t.reshape(-1) for t in torch.load(folder / "model.pt", weights_only=True).values()])
    last = trace.evaluations[-1].figures if trace.evaluations else {}
    figures = {n: v for n, v in Run(x, trace, trace[-1].seconds, last).summary().items() if v == v}
    summary = {"command": command_line(argv), "failure": "", "message": "", "figures": figures}
    (folder / "summary.json").write_text(dumps(summary, indent=1) + "\n", encoding="utf-8")
    page((trace, summary), folder)
    return entries(figures, trace)
