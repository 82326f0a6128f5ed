"""Launching: a server and workers as processes of this machine; dead ones are started again, signals are passed on."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..plain import numbers

HOPELESS = 3
"""How often in a row a process may fail soon after its start, by itself, before the launch is given up."""

GRACE = 10.0
"""Seconds that a process has to end when asked to, before it is killed."""


class LaunchFailed(RuntimeError):
    """The run could not go on: who ended how, and where its log is."""


@dataclass
class Supervised:
    """A process that is started again when it dies, up to a limit, after a pause that doubles."""

    name: str
    command: Sequence[str]
    environment: dict[str, str]
    log: Path
    restarts: int
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    due: float = 0.0
    done: bool = False
    told: bool = False
    born: float = 0.0
    failures: int = 0  # in a row, each soon after its start
    output: Callable[[IO[bytes]], None] | None = None

    def start(self) -> None:
        """Start it, or start it again."""
        self.starts += 1
        self.born = time.monotonic()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self.output else log,
                stderr=log,
                start_new_session=True,  # Ctrl-C comes to the launcher alone, which passes it on
            )
        if self.output:
            assert self.process.stdout is not None
            threading.Thread(target=self.output, args=(self.process.stdout,), daemon=True).start()

    def look(self, say: Callable[[str], None]) -> None:
        """See whether it has ended, and start it again when that is due."""
        if self.done:
            return
        if self.process is None:
            if time.monotonic() >= self.due:
                self.start()
            return
        code = self.process.poll()
        if code is None:
            return
        if code == 0 or self.told:
            self.done = True
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        soon = code > 0 and time.monotonic() - self.born < 30
        self.failures = self.failures + 1 if soon else 0
        if self.failures == HOPELESS:
            raise LaunchFailed(
                f"{self.name} {how} {HOPELESS} times, each soon after its start: {_tail(self.log)} ({self.log})"
            )
        if self.starts > self.restarts:
            raise LaunchFailed(f"{self.name} {how}, and was started {self.starts} times: its log is {self.log}")
        pause = min(0.25 * 2 ** (self.starts - 1), 10.0)
        say(f"{self.name} {how}: starting it again in {pause:g} s (see {self.log})")
        self.process, self.due = None, time.monotonic() + pause

    def tell(self, number: signal.Signals) -> None:
        """Pass a signal on."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def end(self) -> None:
        """Ask it to end, and kill it when it does not."""
        if self.process is None:
            return
        self.tell(signal.SIGTERM)
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


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
    """How often each dead process is started again."""
    ranks: int = 1
    """Processes that together are one worker, as torchrun starts them; each has a server of its own then."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for workers, beside this process's own."""
    resume: bool = False
    say: Callable[[str], None] = print
    watch: Callable[[dict[str, Any]], None] = lambda status: None
    """Called with the server's status, about once a second."""

    def run(self) -> bool:
        """Start everything and stay until the run is over; False where a signal has ended it before.

        Raises `LaunchFailed` where a process could not be started often enough. However it ends, no process is left.
        """
        logs = self.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        token = os.environ.get("OFFBEAT_TOKEN") or secrets.token_urlsafe(32)
        self.asked: int | None = None
        self.stopped = False
        self.addresses: dict[int, str] = {}
        environment = {**os.environ, **self.environment, "OFFBEAT_TOKEN": token}
        self.servers = []
        for k in range(self.shards):
            folder = self.folder if self.shards == 1 else self.folder / f"shard-{k}"
            command = [*self.server, "--out", str(folder), "--shard", str(k), str(self.shards)]
            one = Supervised(f"server {k}", command, environment, logs / f"server-{k}.log", self.restarts)
            one.output = lambda pipe, k=k: self._listen(k, pipe)
            self.servers.append(one)
        self.crew: list[Supervised] = []
        handlers = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            for one in self.servers:
                if self.resume:
                    one.command = [*one.command, "--resume"]
                one.start()
            if self._await_servers():
                place = {"OFFBEAT_SERVER": ",".join(self.addresses[k] for k in range(self.shards))}
                for i in range(self.workers):
                    env = {**environment, **place, "OFFBEAT_WORKER": str(i)}
                    log = logs / f"worker-{i}.log"
                    self.crew.append(Supervised(f"worker {i}", self._command(), env, log, self.restarts))
                self._supervise()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for group in (self.crew, self.servers):  # workers first: they leave in good order
                for one in group:
                    one.tell(signal.SIGTERM)
                for one in group:
                    one.end()
        return not self._stopping()

    def _command(self) -> Sequence[str]:
        """The command of a worker, or of torchrun for its ranks."""
        if self.ranks == 1:
            return self.worker
        place = ["--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
        python, *script = self.worker
        return [python, "-m", "torch.distributed.run", "--nproc-per-node", str(self.ranks), *place, *script]

    def _await_servers(self) -> bool:
        """Wait until all servers have said where they are; False where a signal comes first."""
        end = time.monotonic() + 120
        while len(self.addresses) < self.shards:
            for k, one in enumerate(self.servers):
                assert one.process is not None
                if one.process.poll() is not None and k not in self.addresses:
                    raise LaunchFailed(f"{one.name} did not start: {_tail(one.log)}")
            if self._stopping():
                return False
            if time.monotonic() > end:
                raise LaunchFailed("the server said no address within 120 s")
            time.sleep(0.02)
        for k, one in enumerate(self.servers):  # started again, it goes on where it was, at the same address
            port = self.addresses[k].rpartition(":")[2]
            one.command = [*(c for c in one.command if c != "--resume"), "--again", "--port", port]
        return True

    def _supervise(self) -> None:
        """Until all servers have ended, or a signal has come and the workers have left."""
        idle = None
        while True:
            stopped = self._stopping()
            for one in [*self.crew, *self.servers]:
                if stopped and (one.process is None or one.process.poll() is not None):
                    one.done = True  # whoever waits to be started again is not
                one.look(self.say)
            leaving = self.crew if stopped else self.servers if self.servers[0].done else []
            for one in leaving:  # the first server hands the minibatches out: when it is done, so are the others
                if not one.told:
                    one.told = True
                    one.tell(signal.SIGTERM)
            if all(one.done for one in self.servers):
                self._await_workers()
                return
            if all(one.done for one in self.crew):
                if stopped:
                    return
                idle = idle or time.monotonic()
                if time.monotonic() - idle > GRACE:
                    raise LaunchFailed("all workers have ended, and the run is not over: see the logs of the workers")
            time.sleep(0.05)

    def _await_workers(self) -> None:
        """The run is over, and a script may have more to do: until it ends by itself, or a signal comes."""
        said = time.monotonic() + GRACE
        while not self._stopping() and any(one.process is not None and one.process.poll() is None for one in self.crew):
            if time.monotonic() > said:
                said = math.inf
                self.say("the run is over, and the scripts of workers still go on: waiting for them")
            time.sleep(0.05)

    def _listen(self, k: int, pipe: IO[bytes]) -> None:
        """A server's lines: its address first, then its status."""
        for text in pipe:
            try:
                status = json.loads(text)
            except ValueError:
                continue
            if "address" in status:
                self.addresses[k] = status["address"]
            elif k == 0:
                self.watch(status | {"workers": [numbers(worker) for worker in status["workers"]]})

    def _stop(self, number: int, frame: Any) -> None:
        if self.asked is not None:  # asked twice: now
            for one in [*self.crew, *self.servers]:
                if one.process is not None:
                    one.process.kill()
        self.asked = number

    def _stopping(self) -> bool:
        """Whether a signal has come. It is said here: its handler may have interrupted somebody who prints."""
        if self.asked is not None and not self.stopped:
            self.stopped = True
            what = "workers finish their steps and leave, and a snapshot is written"
            self.say(f"{signal.Signals(self.asked).name}: {what}")
        return self.stopped


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
    return lines[-1] if lines else f"its log {path} is empty"


def _free_port() -> int:
    """A port that nobody uses now; none of those that are given to whoever asks for any, as it is taken seconds later, and once
    more each time that a worker is started again."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
