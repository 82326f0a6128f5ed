"""Launching: a server and workers as processes of this machine. `supervisor` decides what happens to them, this does it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..log import LAUNCH
from ..plain import numbers
from .processes import Log, Process
from .supervisor import GRACE, Effect, Event, Exited, Kill, Listening, Say, Signalled, Start, Status, Supervisor, Tell

TICK = 0.02
"""Seconds between two looks at the processes."""


@dataclass
class Launch:
    """A run on this machine: one server (or several, each with a shard of the model) and ``workers`` workers."""

    folder: Path
    """Where logs, trace, snapshots and the model go."""
    server: Sequence[str]
    """The command of a server, to which its port, folder and shard are added."""
    worker: Sequence[str]
    """The command of a worker."""
    workers: int
    shards: int = 1
    restarts: int = 10
    """How often an hour each process that dies is started again."""
    ranks: int = 1
    """Processes that together are one worker, as torchrun starts them; each has a server of its own then."""
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    """Variables for all, beside this process's own."""
    resume: bool = False
    log: logging.Logger = LAUNCH
    watch: Callable[[dict[str, Any]], None] = lambda status: None
    """Called with the server's status, about once a second."""
    hear: Callable[[int, str], None] = lambda worker, text: None
    """Called with each line that a worker has printed."""

    def run(self) -> Supervisor:
        """Start everything and stay until no process is left; what has decided, which knows how it ended.

        SIGINT, SIGTERM and SIGHUP end the run in good order, a second one at once. However it ends, no process is left: not
        even where this one is killed, as far as the system tells its children.
        """
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self._file = Log(logs / "launch.log")
        self._token = os.environ.get("OFFBEAT_TOKEN") or secrets.token_urlsafe(32)
        self._addresses: dict[str, str] = {}
        machine = Supervisor(self.shards, self.workers, self.restarts, str(logs))
        self._processes = {name: Process(Path(m.log)) for name, m in machine.members.items()}
        self._servers = [m.name for m in machine.servers]
        self._commands = {m.name: self._command() for m in machine.workers}
        signals: list[int] = []  # a handler takes no lock: it may have interrupted what holds it
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
            numbers.append(signal.SIGHUP)
        handlers = {n: signal.signal(n, lambda number, frame: signals.append(number)) for n in numbers}
        try:
            self._do(machine.begin(time.monotonic()))
            while not machine.ended:
                for event in (*self._events(), None):
                    self._do(machine.handle(event, time.monotonic()))
                while signals:
                    self._do(machine.handle(Signalled(signals.pop(0)), time.monotonic()))
            return machine
        finally:
            for process in self._processes.values():
                process.kill()
            until = time.monotonic() + GRACE
            while any(p.running for p in self._processes.values()) and time.monotonic() < until:
                for process in self._processes.values():
                    process.poll()
                time.sleep(TICK)
            for process in self._processes.values():
                process.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _events(self) -> Iterator[Event]:
        """Wait for a moment; what has happened."""
        time.sleep(TICK)
        for name, process in self._processes.items():
            code = process.poll()
            yield from self._hear(name, process.lines())
            if code is not None:
                yield Exited(name, code, process.tail())

    def _hear(self, name: str, lines: Iterable[bytes]) -> Iterator[Event]:
        """A server's lines: its address first, then its status. A worker's are only passed on."""
        for text in lines:
            if name not in self._servers:
                with contextlib.suppress(OSError):  # the terminal is closed
                    self.hear(int(name.split()[1]), _seen(text))
                continue
            try:
                note = json.loads(text)
            except ValueError:
                continue
            if not isinstance(note, dict):
                continue
            if "address" in note:
                self._addresses[name] = note["address"]
                yield Listening(name, bool(note.get("over")))
            elif name == self._servers[0]:
                lives, steps = ({int(i): n for i, n in note[part].items()} for part in ("lives", "steps"))
                yield Status(note["made"], lives, steps, frozenset(note["finished"]), note["ending"])
                with contextlib.suppress(OSError):  # the terminal is closed
                    self.watch(note | {"workers": [numbers(worker) for worker in note["workers"]]})

    def _do(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Say):
                line = f"{time.strftime('%H:%M:%S')} {effect.text}\n"
                self._file.add(line.encode(errors="backslashreplace"))
                self.log.warning(effect.text)
                continue
            process = self._processes[effect.name]
            if isinstance(effect, Start):
                self._start(effect.name, process)
            elif isinstance(effect, Tell):
                process.tell()
            elif isinstance(effect, Kill):
                process.kill()

    def _start(self, name: str, process: Process) -> None:
        environment = {**os.environ, **self.environment, "OFFBEAT_TOKEN": self._token}
        number = name.split()[1]
        if name in self._servers:
            folder = self.folder if self.shards == 1 else self.folder / f"shard-{number}"
            command = [*self.server, "--out", str(folder), "--shard", number, str(self.shards)]
            if name in self._addresses:  # it goes on where it was, at the same address
                command += ["--again", "--port", self._addresses[name].rpartition(":")[2]]
            elif self.resume:
                command += ["--resume"]
            process.start(command, environment, heard=True)
            return
        servers = ",".join(self._addresses[server] for server in self._servers)
        environment |= {"OFFBEAT_SERVER": servers, "OFFBEAT_WORKER": number, "OFFBEAT_GRACE": f"{GRACE:g}"}
        environment.setdefault("PYTHONUNBUFFERED", "1")  # what a script prints is in its log at once
        process.start(self._commands[name], environment)

    def _command(self) -> Sequence[str]:
        """The command of a worker, or of torchrun for its ranks."""
        if self.ranks == 1:
            return self.worker
        place = ["--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
        python, *script = self.worker
        return [python, "-m", "torch.distributed.run", "--nproc-per-node", str(self.ranks), *place, *script]


def _seen(line: bytes) -> str:
    """A line as a terminal would leave it there: of one that was written over, as a progress bar is, what came last."""
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2]


def _free_port() -> int:
    """A port that nobody uses now; none of those that are given to whoever asks for any, as it is taken seconds later, and once
    more each time that a worker is started again."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
