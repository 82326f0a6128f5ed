"""How much of its machine's processors a process of a real run has had: `trace.Load`, for who predicts other runs from this one."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..cpus import cpus
from ..trace import Load
from .link import machine

EVERY = 1.0
"""Seconds between two readings."""


class Growth:
    """The sum of what counters have grown by, each of which has a key, and may come and go."""

    def __init__(self) -> None:
        self.total = 0.0
        self._last: dict[Any, float] = {}

    def add(self, now: Mapping[Any, float]) -> float:
        """The sum so far, with the counters as they are ``now``; one that is new counts whole."""
        self.total += sum(max(0.0, value - self._last.get(key, 0.0)) for key, value in now.items())
        self._last = dict(now)
        return self.total


class Meter:
    """Reads the processor time of this process, and how much of it goes into exchanges: between `stop` and `go`."""

    def __init__(self) -> None:
        self.exchange = self._from = 0.0
        self._due = 0.0
        self._children, self._queued = Growth(), Growth()
        self._machine = sha256(machine().encode()).hexdigest()[:12]

    def stop(self) -> None:
        """A gradient is done, and an exchange begins."""
        self._from = time.process_time()

    def go(self) -> None:
        """The exchange is over."""
        self.exchange += time.process_time() - self._from

    def read(self, gradients: int) -> dict[str, Any] | None:
        """The fields of a `Load` but for its first two, after so many ``gradients``; None until a second after the last one."""
        now = time.monotonic()
        if now < self._due:
            return None
        self._due = now + EVERY
        return {
            "gradients": gradients,
            "wall": now,
            "processor": time.process_time()
            + self._children.add({child: _used(child) for child in _children(os.getpid())}),
            "exchange": self.exchange,
            "queued": self._queued.add(waits) if (waits := _queued()) else math.nan,
            "busy": _busy(),
            "cores": cpus(),
            "machine": self._machine,
        }


def load(seconds: float, worker: int, said: Any) -> Load | None:
    """The `Load` of what a ``worker`` has said of itself; None where that makes no sense."""
    if not isinstance(said, dict) or {"seconds", "worker", *said} != set(Load._fields):
        return None
    given = Load(**{**said, "seconds": seconds, "worker": worker})
    numbers = [*given[2:8], given.cores]
    if not all(type(n) in (int, float) for n in numbers) or not isinstance(given.machine, str):
        return None
    sound = all(math.isnan(n) or 0 <= n < 1e15 for n in numbers) and len(given.machine) <= 64
    return given if sound and type(given.gradients) is type(given.cores) is int else None


def _children(process: int) -> list[int]:
    """The processes that a process has started, and those that these have; none where the system does not tell."""
    found: list[int] = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, _text(file).split()):
            found += [child, *_children(child)]
    return found


def _used(process: int) -> float:
    """Processor seconds of a process and of its children that have ended."""
    words = _text(Path(f"/proc/{process}/stat")).rpartition(")")[2].split()
    return sum(map(int, words[11:15])) / os.sysconf("SC_CLK_TCK") if len(words) > 14 else 0.0


def _queued() -> dict[str, float]:
    """Seconds for which each thread of this process was ready and had no core; of none where the system does not tell."""
    words = {file.parent.name: _text(file).split() for file in Path("/proc/self/task").glob("*/schedstat")}
    return {thread: int(said[1]) / 1e9 for thread, said in words.items() if len(said) == 3}


def _busy() -> float:
    """Seconds for which cores of this machine were at work, or were taken by a host of virtual machines (user to steal, proc_stat(5))."""
    words = _text(Path("/proc/stat")).partition("\n")[0].split()
    return sum(int(words[k]) for k in (1, 2, 3, 6, 7, 8)) / os.sysconf("SC_CLK_TCK") if len(words) > 8 else math.nan


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError:
        return ""
