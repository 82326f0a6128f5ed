"""Commands of real runs that others may be part of: server and worker."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from tyro.conf import arg

from ..engines.faults import Fault
from ..engines.speed import Speed
from ..failure import Failure
from ..log import SERVER, STAMPED, WORKER, Lines, lines_to
from ..names import read
from ..plain import dumps
from ..watch import status
from ..watch.beside import check
from .command import FAILED, Command, Refused, told, writable
from .display import board, err, shown
from .flags import ModuleNames, load, method_of

if TYPE_CHECKING:
    from ..runtime.host import Host


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
    page: Annotated[str | None, arg(metavar="[HOST:]PORT", help_behavior_hint="(default: none)")] = None
    """Serve a live page of the run, and metrics, at this port of this machine (0: any that is free); beyond it with OFFBEAT_TOKEN set."""
    track: Annotated[tuple[str, ...], arg(metavar="TRACKER [TRACKER ...]")] = ()
    """Where figures go, any of csv, tensorboard, wandb, mlflow, or MODULE:CLASS of your own."""
    status: bool = False
    """Write status as JSON lines to the standard output instead of a table."""
    imports: ModuleNames = ()
    """Modules to import where methods are read: those of your own classes, such as mypackage.methods."""
    out: Annotated[
        Path | None, arg(metavar="FOLDER", help_behavior_hint="(default: runs/server, runs/server-2, ...)")
    ] = None
    """Where trace, snapshots and model go: a folder that holds no run yet, but for --resume."""

    @lines_to(Lines(STAMPED))
    def run(self, argv: Sequence[str]) -> int:
        from ..runtime.coordinator import host_for, resumed
        from ..runtime.folder import claim
        from ..runtime.host import Terms as RunTerms

        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        with told():
            load(self.imports)
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
            default = Path("runs/server")
            folder, held = claim(self.out, default, "server", writable, self.resume or self.again)
            if self.resume or self.again:
                terms = resumed(terms, folder, _read, SERVER)
            token = os.environ.get("OFFBEAT_TOKEN", "")
            watched = check(self.page, self.track, token)
            server = host_for(terms)(terms, token, folder, _read, SERVER, self.host, self.port)
            if self.resume or self.again:
                _go_on(server, folder, self.again)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: server.stop())
        address = f"{self.host}:{server.port}"
        with contextlib.nullcontext(_lines) if self.status else board() as tell, watched(folder) as pass_on:
            if self.status:
                print(dumps({"address": address, "over": server.over()}), flush=True)
            else:
                err.print(f"offbeat: workers may join with OFFBEAT_SERVER={address}")
            well = server.run(_watch(server, tell, pass_on), self.evaluations)
            # the first worker may have named a method of the other kind, and will be back
            if server.other is not None and not server.told:
                terms = replace(terms, method=server.other.method)
                server = host_for(terms)(terms, token, folder, _read, SERVER, self.host, server.port)
                well = server.run(_watch(server, tell, pass_on), self.evaluations)
            _watch(server, tell, over=True)()  # the last word, by which a launcher knows who had left
        held.close()
        for number in (signal.SIGTERM, signal.SIGINT):  # all is written; Python undoes handlers before it ends
            signal.signal(number, signal.SIG_IGN)
        return _ended(server, 0 if well else FAILED)


@dataclass(frozen=True)
class Work(Command):
    """Be a worker of a run: offbeat worker --server HOST:PORT SCRIPT [ARGUMENTS], or -m MODULE, or without either of a task."""

    server: Annotated[str, arg(metavar="HOST:PORT", help_behavior_hint="(default: $OFFBEAT_SERVER)")] = ""
    """Where the server is; of several shards all, with commas between them."""
    problem: Annotated[str | None, arg(metavar="TASK")] = None
    """A task as a value, such as "Digits(batch=16)"."""
    imports: ModuleNames = ()
    """Modules to import, those of classes that the task's method is made of."""
    number: Annotated[int | None, arg(help_behavior_hint="(default: $OFFBEAT_WORKER, or one that is free)")] = None
    """The worker's number."""
    speed: Speed | None = None
    """Seconds that a gradient of a task takes at least."""
    faults: tuple[Fault, ...] = ()
    """What slows the worker of a task."""
    script: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()

    @lines_to(Lines(STAMPED))
    def run(self, argv: Sequence[str]) -> int:
        said = {"OFFBEAT_SERVER": self.server, "OFFBEAT_WORKER": "" if self.number is None else str(self.number)}
        os.environ.update({name: value for name, value in said.items() if value})
        if not os.environ.get("OFFBEAT_SERVER"):
            raise Refused("no server is named: give --server HOST:PORT, or set OFFBEAT_SERVER")
        if self.script:
            os.execv(sys.executable, [sys.executable, *self.script])
        if self.problem is None:
            raise Refused("nothing to do: give a script, or a task such as --problem 'Digits()'")
        from ..runtime.entry import enter
        from ..runtime.exit import Member
        from ..runtime.link import LinkLost
        from ..runtime.place import Place
        from ..runtime.worker import train

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        member = Member(WORKER)
        with told():
            load(self.imports)
            problem, place = read(self.problem), Place.read()
            method = read(place.method) if place.method else None
            hello = {"problem": repr(problem), "layout": None}
            try:
                worker = enter(place, problem.x0(), method, hello, read, WORKER, member.told)
                member.joined(worker)
                train(worker, problem, self.speed, self.faults, member.told)
            except (LinkLost, Failure) as error:
                err.print(f"offbeat: {shown(error)}")
                return FAILED
            finally:
                member.forget()
        return 0


def _watch(
    server: Host, tell: Callable[[dict[str, Any]], None], pass_on: Callable[[], None] = lambda: None, over: bool = False
) -> Callable[[], None]:
    """What the server calls some times a second: it tells its status about once a second, and at once who comes and goes; and writes it
    for those that watch the folder."""
    last = 0.0
    there: Any = None

    def look() -> None:
        nonlocal last, there
        with server.lock:
            before, there = there, (sorted(server.sessions), dict(server.lives), set(server.finished))
        if there == before and time.monotonic() - last < 1.0:
            return
        last = time.monotonic()
        pass_on()
        try:
            current = server.status()
            with contextlib.suppress(OSError):  # a full disk has no room for it
                status.write(server.folder, {**current, "over": over})
            tell(current)
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
        SERVER.info(f"ended without waiting for {', '.join(server.busy)}")
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)
    return status


def _go_on(server: Host, folder: Path, again: bool) -> None:
    """Resume the run of a folder; where it cannot be resumed nothing of it is written over."""
    from ..runtime import snapshot
    from ..runtime.folder import holds_run

    if not server.resume(anew=not again) and (snapshot.found(folder / "snapshots") if again else holds_run(folder)):
        raise ValueError(f"{folder} holds a run, and no whole snapshot to go on from: choose another folder")


def _read(text: str) -> Any:
    """The method that a worker names."""
    try:
        return read(text)
    except ValueError as error:
        cure = (
            "a class of your own is read where its module is named: put it into a file such as methods.py, and start "
        )
        raise ValueError(f"{error}; {cure}`offbeat launch` or `offbeat server` with --import methods") from None


def _lines(status: dict[str, Any]) -> None:
    print(dumps({**status, "made": time.monotonic()}), flush=True)
