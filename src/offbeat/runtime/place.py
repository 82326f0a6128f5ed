"""Where a worker's run is: as `offbeat launch`, torchrun or SLURM say it in the environment."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from .exit import failed
from .folder import claim, require_posix
from .link import LinkLost

PORT = 29_400
"""Where rank 0 of a job hosts the run, where nothing else is said: this, or the port after ``MASTER_PORT``."""


@dataclass(frozen=True)
class Place:
    """Where a worker's run is."""

    servers: tuple[str, ...] = ()
    """Addresses (host:port) of the server, or of its shards in order; empty: the worker is alone, and its own server."""
    token: str = field(default="", repr=False)
    """The secret that all of a run know."""
    worker: int | None = None
    """The worker's number; None: the server gives one."""
    method: str = ""
    """The method's ``repr``, where the launcher names it."""
    patience: float = 60.0
    """Seconds for which a worker dials a server that does not answer."""
    timeout: float = 30.0
    """Seconds of silence after which a link is taken for dead, before the server has said its own."""
    hosts: int = 0
    """How many workers the run has that this one is to host, as rank 0 of a job; 0: somebody else hosts it."""

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ, launchers: bool = True) -> Place:
        """What ``OFFBEAT_SERVER``, ``OFFBEAT_TOKEN``, ``OFFBEAT_WORKER``, ``OFFBEAT_METHOD`` and ``OFFBEAT_PATIENCE`` say.

        Without a server, and with more than one process: what torchrun says (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``), or SLURM
        (``SLURM_PROCID``, ``SLURM_NTASKS``, ``SLURM_JOB_NODELIST``, ``SLURM_JOB_ID``); rank 0 hosts the run then. Not so
        without ``launchers``: what they say is of the ranks of one worker. ``OSError`` on a system where real runs do not work.
        """
        require_posix()

        def number(name: str, kind: type[int] | type[float]) -> int | float | None:
            text = environment.get(name, "")
            try:
                return kind(text) if text else None
            except ValueError:
                raise ValueError(f"{name} = {text!r}: must be a number") from None

        worker, patience = number("OFFBEAT_WORKER", int), number("OFFBEAT_PATIENCE", float)
        place = cls(
            tuple(filter(None, environment.get("OFFBEAT_SERVER", "").split(","))),
            environment.get("OFFBEAT_TOKEN", ""),
            None if worker is None else int(worker),
            environment.get("OFFBEAT_METHOD", ""),
            cls.patience if patience is None else patience,
        )
        if place.servers or not launchers:
            return place
        if "RANK" in environment and "MASTER_ADDR" in environment:
            rank, size = number("RANK", int), number("WORLD_SIZE", int)
            host, port = environment["MASTER_ADDR"], (number("MASTER_PORT", int) or PORT - 1) + 1
        elif "SLURM_PROCID" in environment and "SLURM_JOB_NODELIST" in environment:
            rank, size = number("SLURM_PROCID", int), number("SLURM_NTASKS", int)
            host, port = (
                first_node(environment["SLURM_JOB_NODELIST"]),
                PORT + (number("SLURM_JOB_ID", int) or 0) % 10_000,
            )
        else:
            return place
        if (size or 1) == 1 and not rank:
            return place  # alone: its own server
        return replace(
            place, servers=(f"{host}:{int(port)}",), worker=int(rank or 0), hosts=int(size or 1) if not rank else 0
        )

    def host(self) -> None:
        """Start the run's server or coordinator, which ends with the run, if this worker is to host it.

        Raises ``ValueError`` where the folder that ``OFFBEAT_OUT`` names holds another run (``OFFBEAT_RESUME=1`` goes on with
        it), and `LinkLost` where the server does not start, such as at a port that is taken.
        """
        if not self.hosts:
            return
        address, port = self.servers[0].rsplit(":", 1)
        named, resume = os.environ.get("OFFBEAT_OUT"), os.environ.get("OFFBEAT_RESUME") == "1"
        cure = "set OFFBEAT_OUT to another folder, or OFFBEAT_RESUME=1 to go on with it"
        out, held = claim(Path(named) if named else None, Path("runs/job"), "job", _made, resume, cure=cure)
        command = [sys.executable, "-m", "offbeat", "server", "--host", address, "--port", port, "--status"]
        command += ["--workers", str(self.hosts), "--out", str(out)]
        command += ["--method", self.method] if self.method else []
        command += ["--resume"] if resume else []
        with open(out / "server.log", "ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log)
        hosted = Hosted(process, self.patience, held)
        if not hosted.listens.wait(max(self.patience, 60.0)) or process.poll() is not None:
            process.kill()
            held.close()
            said = (out / "server.log").read_text(errors="replace").strip().splitlines()[-3:]
            raise LinkLost(f"the run cannot be hosted at {self.servers[0]}: " + "\n".join(said))
        atexit.register(hosted.wait)  # before the worker's own leave is registered, so done after it


class Hosted:
    """The process that hosts a job's run, and says as JSON lines who is there."""

    def __init__(self, process: subprocess.Popen[bytes], patience: float, held: IO[Any] | None = None) -> None:
        self.process, self.patience, self.owner = process, patience, os.getpid()
        self.held = held  # the lock of its folder
        self.listens = threading.Event()  # or has ended
        self.seen = time.monotonic()  # when a worker was there last
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for text in lines:
                with contextlib.suppress(ValueError):
                    note = json.loads(text)
                    if note.get("workers"):
                        self.seen = time.monotonic()
                    if "address" in note:
                        self.listens.set()
        self.process.wait()
        self.listens.set()

    def wait(self) -> None:
        """Stay until the run is over; one to which nobody comes back is ended, as is one whose own script has failed."""
        began = time.monotonic()
        while self.owner == os.getpid() and self.process.poll() is None:  # a forked child has nobody to wait for
            since = began if failed() else max(began, self.seen)
            if time.monotonic() - since > self.patience:
                self.process.terminate()
                return
            time.sleep(0.05)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def first_node(nodes: str) -> str:
    """The first host of a SLURM list such as ``gpu[03-05,09],login1``: ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[(\d+))?", nodes)
    if match is None:
        raise ValueError(f"SLURM_JOB_NODELIST = {nodes!r}: must begin with the name of a host")
    return match[1] + (match[2] or "")
