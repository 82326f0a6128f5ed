"""Real runs for tests: a server and its workers as threads with real sockets, or as processes that nobody outlives."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

import offbeat as ob
from offbeat.experiment import rerun
from offbeat.names import read
from offbeat.runtime import snapshot
from offbeat.runtime.coordinator import host_for
from offbeat.runtime.host import Terms
from offbeat.runtime.place import Place
from offbeat.runtime.worker import Remote, Worker, train

TOKEN = "only these know it"
LIMIT = 400.0
"""Seconds after which a test that hangs is ended: far more than any test takes on a machine that eight others use, too."""


def until(true: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    """Wait until ``true()``, and return it; ``what`` is waited for."""
    end = time.monotonic() + seconds
    while not (value := true()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.005)
    return value


class Heard(logging.Handler):
    """Adds all lines that it gets to ``said``."""

    def __init__(self, said: list[str]) -> None:
        super().__init__()
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def heard(said: list[str] | None = None) -> logging.Logger:
    """A logger of one's own, whose lines are added to ``said``."""
    log = logging.Logger("test")
    log.addHandler(Heard([] if said is None else said))
    return log


def at_work() -> set[int]:
    """The other threads that are inside of this project's code. Some of torch's compiler stay for good, idle."""
    here = str(Path(ob.__file__).parent)
    found = set[int]()
    for thread, frame in (sys._current_frames() | {threading.get_ident(): None}).items():
        below: FrameType | None = frame
        while below is not None:
            if below.f_code.co_filename.startswith(here):
                found.add(thread)
            below = below.f_back
    return found


def rest(before: set[int]) -> None:
    """Wait until no thread is at work but those of ``before``; else say where they are."""
    try:
        until(lambda: at_work() <= before, "the end of all threads of the run")
    except TimeoutError as late:
        stacks = ["".join(traceback.format_stack(sys._current_frames().get(thread))) for thread in at_work() - before]
        raise TimeoutError("\n".join([f"{late}; still at work:", *stacks])) from None


class Serving:
    """A server that runs in a thread of this process."""

    def __init__(
        self,
        terms: Terms,
        folder: Path,
        resume: bool = False,
        port: int = 0,
        token: str = TOKEN,
        anew: bool = False,
        evaluations: int = 0,
        parse: Callable[[str], Any] = read,
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        self.said: list[str] = []
        self.folder = folder
        self.well: bool | None = None  # what the server's run returns
        self.server: Any = host_for(terms)(terms, token, folder, parse, heard(self.said), port=port)
        try:
            self.resumed = resume and self.server.resume(anew)
        except BaseException:
            self.server.close()
            raise

        def run() -> None:
            self.well = self.server.run(watch, evaluations)

        self.thread = threading.Thread(target=run)
        self.thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def place(self, worker: int | None = None, **other: Any) -> Place:
        """Where the run is, for a worker."""
        return Place(**{"servers": (self.address,), "token": TOKEN, "worker": worker, "patience": 10.0} | other)

    def join(self) -> None:
        """Wait until the run is over."""
        self.thread.join(120)
        assert not self.thread.is_alive(), f"the run is not over: {self.said}"

    def stop(self) -> None:
        self.server.stop()
        self.join()

    def trace(self) -> ob.Trace:
        with self.server.lock:
            self.server.journal.flush()
        return ob.Trace.read(self.folder / "trace.jsonl")

    def x(self) -> Tensor:
        assert self.server.server is not None
        return self.server.server.x()


def remote(place: Place, problem: ob.Problem, method: str = "") -> Remote:
    """A worker's links, for a problem."""
    return Remote(place, problem.x0(), {"method": method, "layout": None, "problem": repr(problem)}, read)


def hire(place: Place, problem: ob.Problem, log: logging.Logger | None = None) -> Worker:
    return Worker(remote(place, problem), log or heard())


def labour(
    places: list[Place],
    problem: ob.Problem,
    seconds: tuple[float, ...] = (0.0,),
    each: int | None = None,
    done: bool = True,
) -> None:
    """Workers in threads, one for each place, at these speeds, who all begin when everybody has joined.

    They go on until all minibatches are handed out, or take ``each`` gradients, and say that they are ``done``.
    """
    everybody = threading.Barrier(len(places))

    def work(i: int) -> None:
        pace = seconds[i % len(seconds)]
        try:
            worker = hire(places[i], problem)
        except BaseException:
            everybody.abort()
            raise
        everybody.wait(LIMIT)
        if each is None:
            train(worker, problem, ob.Fixed(pace) if pace else None)
        else:
            for _ in range(each):
                g, loss = problem.grad(worker.x, worker.terms.worker, worker.node.step)
                time.sleep(pace)
                worker.step(g, float(loss))
            worker.leave(done)

    with ThreadPoolExecutor(len(places)) as pool:
        tasks = [pool.submit(work, i) for i in range(len(places))]
    errors = [error for task in tasks if (error := task.exception())]
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])


@contextlib.contextmanager
def time_out(seconds: float = LIMIT) -> Iterator[None]:
    """`TimeoutError` in the main thread when the time is up, and where all threads are then."""

    def late(number: int, frame: Any) -> None:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file)
            file.seek(0)
            print(file.read(), file=sys.stderr)
        raise TimeoutError(f"the test has lasted {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Nursery:
    """Where processes of tests come from: `nursery.py` says how. They have these ``modules`` from the start."""

    def __init__(self, folder: Path, *modules: str) -> None:
        self.folder, self.python = folder, str(folder / "python")
        self.parent = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nursery.py")), str(folder), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.parent.stdout
        assert self.parent.stdout.readline() == b"ready\n"

    def born(self) -> list[tuple[int, str, str, str]]:
        """Every child so far: its number, what it is, and the worker's number and the rank in it, or "-"."""
        file = self.folder / "born"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        words = [line.split() for line in lines if line.endswith("\n")]
        return [(int(pid), what, worker, rank) for pid, what, worker, rank in words]

    def close(self) -> None:
        assert self.parent.stdin
        assert self.parent.stdout
        self.parent.stdin.close()
        self.parent.stdout.close()
        self.parent.wait(120)


class Processes:
    """The processes of one test."""

    def __init__(self, nursery: Nursery, folder: Path) -> None:
        self.nursery, self.folder = nursery, folder
        self.before = {pid for pid, *_ in nursery.born()}
        self.started: list[subprocess.Popen[str]] = []
        self.environment = {n: v for n, v in os.environ.items() if not n.startswith(("OFFBEAT_", "SLURM_"))} | {
            "CI": "1"
        }

    def start(self, *words: str, forked: bool = True, **environment: str) -> subprocess.Popen[str]:
        """A process with these arguments for Python; not ``forked`` is one from the start, which takes seconds."""
        number = len(self.started)
        with open(self.folder / f"{number}.out", "w") as out, open(self.folder / f"{number}.err", "w") as err:
            process = subprocess.Popen(
                [self.nursery.python if forked else sys.executable, *words],
                cwd=self.folder,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                text=True,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def offbeat(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        return self.start("-m", "offbeat", *words, **environment)

    def said(self, process: subprocess.Popen[str]) -> str:
        """What it has written so far."""
        number = self.started.index(process)
        return "".join((self.folder / f"{number}.{end}").read_text() for end in ("out", "err"))

    def ends(self, process: subprocess.Popen[str], seconds: float = 300.0) -> int:
        """Its exit status."""
        return process.wait(seconds)

    def living(self, what: str, worker: str | None = None, rank: str | None = None) -> list[int]:
        """The processes of this test that are ``what``, and still there."""
        return [
            pid
            for pid, is_, *who in self.nursery.born()
            if pid not in self.before
            and is_ == what
            and worker in (None, who[0])
            and rank in (None, who[1])
            and alive(pid)
        ]

    def end(self) -> None:
        """Kill what is left."""
        for process in self.started:
            family = [process.pid, *descendants(process.pid)] if process.poll() is None else []
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(120)
        for pid, *_ in self.nursery.born():
            if pid not in self.before and alive(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                until(lambda pid=pid: not alive(pid), f"the end of process {pid}")


def load(folder: Path) -> Tensor:
    """The model that a run has left, as one vector."""
    return torch.cat([t.reshape(-1) for t in torch.load(folder / "model.pt", weights_only=True).values()])


class Run:
    """`offbeat launch` of a small problem, whose trace can be watched while it grows."""

    def __init__(self, processes: Processes, *words: str, gradients: int, workers: int, seconds: float) -> None:
        self.processes, self.folder, self.workers = processes, processes.folder / "run", workers
        argv = ["--task", "quadratic", "--gradients", str(gradients), "--workers", str(workers), "--out", "run"]
        self.argv = ["launch", *argv, "--speed", f"Fixed({seconds})", "--evaluations", "1", *words]
        self.process = processes.offbeat(*self.argv)

    def resume(self) -> None:
        """The same again, going on where it was."""
        self.process = self.processes.offbeat(*self.argv, "--resume")

    def lines(self) -> list[dict[str, object]]:
        """What the trace has so far, but for its header."""
        path = self.folder / "trace.jsonl"
        lines = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def counts(self) -> Counter[int]:
        """Gradients of each worker so far."""
        return Counter(line["worker"] for line in self.lines() if "step" in line)  # type: ignore[misc]

    def reaches(self, gradients: int) -> None:
        """All workers are at it, and so many gradients are done."""

        def there() -> bool:
            assert self.process.poll() is None, self.said()
            counts = self.counts()
            return len(counts) == self.workers and counts.total() >= gradients

        until(there, f"{gradients} gradients")

    def snapshots(self) -> int:
        """How many have been written."""
        return max((int(path.stem) for path in snapshot.found(self.folder / "snapshots")), default=0)

    def pid(self, what: str, worker: str | None = None) -> int:
        """The process that is ``what``, once it is there."""
        found: list[int] = until(lambda: self.processes.living(what, worker), f"{what} {worker or ''}")
        return found[0]

    def said(self) -> str:
        files = sorted(self.folder.glob("logs/*-*.log"))  # the launcher's own has only what it has said
        logs = "".join(f"\n{file.name}:\n{file.read_text()}" for file in files)
        return self.processes.said(self.process) + logs

    def log(self, name: str) -> str:
        return (self.folder / "logs" / f"{name}.log").read_text()

    def ends(self, status: int = 0, replays: bool = True) -> ob.Trace:
        """It ends with this status, and leaves no process; its trace, which replays to the model that it has left."""
        assert self.processes.ends(self.process) == status, self.said()
        assert not self.processes.living("server")
        assert not self.processes.living("worker")
        trace = ob.Trace.read(self.folder / "trace.jsonl")
        if replays:
            torch.testing.assert_close(rerun(trace).x, load(self.folder), rtol=1e-9, atol=0)
        assert "Traceback" not in self.said()
        return trace


def alive(pid: int) -> bool:
    """Whether the process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that these have."""
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [one for child in children for one in (child, *descendants(child))]


def shared_memory() -> set[str]:
    """Names that a killed process would have left behind."""
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir() if path.name.startswith("offbeat")} if folder.is_dir() else set()
