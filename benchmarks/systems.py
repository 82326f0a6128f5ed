"""Systems that do the same work, ours and others', each in an environment of its own.

A system is a script in ``peers`` and the package that it needs. Its processes are started as torchrun would, without
torchrun's own. All systems that are compared are started first; each gets warm, and then waits until it is its turn. So
the start of processes does not count, what the machine does meanwhile meets all of them, and idle ones only sleep.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import torch

from .measure import Row

SCRIPTS = Path(__file__).parent / "peers"
HOMES = Path("runs/bench/environments")
TIMEOUT = 120.0
"""Seconds after which a system is taken to hang."""
GRACE = 10.0
"""Seconds that a process has to end when asked to."""


class Failed(Exception):
    """A system that does not run: why."""


class Start(NamedTuple):
    """A process to be started: its command, and variables beside this process's own."""

    command: list[str]
    variables: dict[str, str]


@dataclass(frozen=True)
class System:
    """A script that is started as ``ranks`` processes, which find each other as under torchrun."""

    name: str
    script: str
    argument: str = ""
    package: str = ""
    """What pip installs for it, beside torch and numpy; empty: it runs in this environment."""
    ranks: int = 2
    """Its processes."""
    workers: int = 2
    """Those of its processes that measure."""

    @property
    def ours(self) -> bool:
        """Whether it is offbeat."""
        return self.script.startswith("ours")

    def python(self) -> Path:
        """The interpreter of its environment, which is made first where it is missing."""
        if not self.package:
            return Path(sys.executable)
        home = HOMES / "".join(c for c in self.package.partition(" ")[0] if c.isalnum() or c in "-_")
        python = home.absolute() / "bin" / "python"
        if not (home / "done").exists():
            venv.create(home, clear=True, with_pip=True)
            version = torch.__version__.partition("+")[0]
            command = [str(python), "-m", "pip", "install", "--quiet", f"torch=={version}", "numpy", self.package]
            pip = subprocess.run(command, capture_output=True, text=True)
            if pip.returncode:
                raise Failed(f"pip cannot install {self.package}: {last(pip.stderr)}")
            (home / "done").touch()
        return python

    def starts(self, python: Path, port: int) -> list[Start]:
        """The processes that measure; they may use ``port`` and the one after."""
        command = [str(python), str(SCRIPTS / self.script), *([self.argument] if self.argument else [])]
        place = {"WORLD_SIZE": str(self.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [Start(command, {**place, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(self.ranks)]

    def beside(self, python: Path, port: int) -> list[Start]:
        """Processes that run until those which measure have ended."""
        return []


class Restless(System):
    """A system whose processes keep the processors busy while they wait: it is started anew for each of its turns."""


@dataclass(frozen=True)
class Driver(System):
    """A script that starts the processes it needs by itself, and measures for all of them."""

    ranks: int = 1
    workers: int = 1


@dataclass(frozen=True)
class Lighted(System):
    """torchft: a lighthouse beside, which decides who takes part, and lives at the port after the others'."""

    def beside(self, python: Path, port: int) -> list[Start]:
        flags = ["--bind", f"127.0.0.1:{port + 1}", "--min_replicas", "2", "--join_timeout_ms", "2000"]
        return [Start([str(python.with_name("torchft_lighthouse")), *flags], {})]


@dataclass(frozen=True)
class Mpi(Restless):
    """A script whose processes ``mpirun`` starts."""

    def starts(self, python: Path, port: int) -> list[Start]:
        flags = ["-np", str(self.ranks), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none"]
        return [Start(["mpirun", *flags, *super().starts(python, port)[0].command], {})]


class Running:
    """The processes of a system, warm, from ``with`` on; raises `Failed` where they do not get there."""

    def __init__(self, system: System, repeats: int) -> None:
        self.system, self.repeats = system, repeats

    def __enter__(self) -> Self:
        python, port = self.system.python(), free_ports()
        self.home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.folder = Path(self.home.name)
        self.beside: list[subprocess.Popen[bytes]] = []
        self.working: list[subprocess.Popen[bytes]] = []
        try:
            self.beside += [self._begin(start, "beside") for start in self.system.beside(python, port)]
            self.working += [self._begin(start, str(i)) for i, start in enumerate(self.system.starts(python, port))]
            self._await("ready")
        except BaseException:
            self.end(patience=0.0)
            raise
        return self

    def turn(self, number: int) -> tuple[float, str]:
        """How often in a second each worker does its work, in its repeat ``number``, and the version."""
        go = self.folder / "go"
        go.write_text(str(time.time() + 0.5))  # by then all have looked
        go.rename(self.folder / f"{number}.go")
        said = [json.loads(text) for text in self._await(f"{number}.rate")]
        return statistics.fmean(entry["rate"] for entry in said), said[0]["version"]

    def __exit__(self, *error: object) -> None:
        self.end(patience=0.0 if any(error) else GRACE)

    def end(self, patience: float) -> None:
        """End what does not end by itself within so many seconds, politely at first."""
        (self.folder / "end.go").write_text("0")
        limit = time.monotonic() + patience
        while any(process.poll() is None for process in self.working) and time.monotonic() < limit:
            time.sleep(0.05)
        for process in self.working + self.beside:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.working + self.beside:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it has started
            process.wait()
        self.home.cleanup()

    def _begin(self, start: Start, name: str) -> subprocess.Popen[bytes]:
        """Start a process, in a group of its own."""
        every = {"BENCH_OUT": str(self.folder), "BENCH_REPEATS": str(self.repeats), "OMP_NUM_THREADS": "1"}
        every |= {
            "OFFBEAT_OUT": str(self.folder / "run"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "FLWR_TELEMETRY_ENABLED": "0",
        }
        with open(self.folder / f"{name}.err", "wb") as err:
            try:
                return subprocess.Popen(
                    start.command,
                    env={**os.environ, **every, **start.variables},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=err,
                    start_new_session=True,
                )
            except FileNotFoundError:
                raise Failed(f"there is no program {Path(start.command[0]).name}") from None

    def _await(self, what: str) -> list[str]:
        """What all workers have written under a name, once they have; `Failed` where one ends badly or takes too long."""
        limit = time.monotonic() + TIMEOUT
        while len(files := sorted(self.folder.glob(f"*.{what}"))) < self.system.workers:
            for i, process in enumerate(self.working):
                if process.poll():
                    raise Failed(last((self.folder / f"{i}.err").read_text(errors="replace")))
            if time.monotonic() > limit:
                raise Failed(f"it was not done within {TIMEOUT:g} s")
            time.sleep(0.1)
        return [file.read_text() for file in files]


def in_turn(
    systems: Sequence[System], repeats: int, unit: str, group: str, figure: Callable[[float], float] = lambda rate: rate
) -> list[Row]:
    """A row for each system: the ``figure`` of its rate in each repeat, where all take their turns, each time in another
    order: what a system still does when its turn is over must not always meet the same one.

    One that fails is left out from then on: its row is not a number, and says why.
    """
    values: dict[System, list[float]] = {system: [] for system in systems}
    notes: dict[System, str] = {}
    lost = set()
    with contextlib.ExitStack() as stack:
        warm: dict[System, Running] = {}
        for number in range(repeats):
            order = [system for system in systems if system not in lost]
            random.Random(number).shuffle(order)
            for system in order:
                try:
                    if isinstance(system, Restless):
                        with Running(system, 1) as once:
                            rate, notes[system] = once.turn(0)
                    else:
                        if system not in warm:
                            warm[system] = stack.enter_context(Running(system, repeats))
                        rate, notes[system] = warm[system].turn(number)
                    values[system].append(figure(rate))
                except Failed as failed:
                    notes[system], values[system] = f"did not run: {failed}", [math.nan]
                    lost.add(system)
    return [Row(s.name, unit, tuple(values[s]), group, notes[s], peer=not s.ours) for s in systems]


def last(text: str) -> str:
    """The line of an error that says most: the last one that is no indented part of a trace."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(" ")]
    return lines[-1][:160] if lines else "it ended without a word"


def free_ports() -> int:
    """A port that nobody uses now, nor the one after it; none of those that are given to whoever asks for any."""
    while True:
        port = random.randrange(10_000, 30_000, 2)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            socket.create_server(("127.0.0.1", port + 1)).close()
            return port
