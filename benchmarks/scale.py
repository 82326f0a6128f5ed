"""Does a simulated event cost more with more workers? One method of each kind on a problem that costs only time."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import offbeat as ob
from benchmarks.measure import Row

EVENTS = 100_000
METHODS = {
    "server": ob.methods.ASGD(),
    "rounds with an exact average": ob.methods.AllReduce(),
    "rounds of gossip": ob.methods.SGP(),
    "pushing gossip": ob.methods.PushGossip(),
    "pairwise gossip": ob.methods.ADPSGD(),
    "local steps with a slow average": ob.methods.SlowMo(),
}
NETWORK = ob.Network(50e-6, 1.25e9)


def measure(kind: str, workers: int, link: Connection) -> None:
    """Microseconds of processor per event and growth of memory in MiB, in a process of its own."""
    torch.set_num_threads(1)
    method, cluster = METHODS[kind], ob.Cluster(workers, network=NETWORK)
    ob.simulate(method, ob.tasks.TimeOnly(), cluster, gradients=workers)
    before = peak()
    start = time.process_time()
    ob.simulate(method, ob.tasks.TimeOnly(), cluster, gradients=EVENTS)
    seconds = time.process_time() - start
    link.send((1e6 * seconds / EVENTS, peak() - before))


def peak() -> float:
    """The most memory that this process has had, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux what a process inherits counts for its resource usage
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def run() -> list[Row]:
    rows = []
    context = multiprocessing.get_context("spawn")
    for kind in METHODS:
        for workers in (16, 128, 1024):
            here, there = context.Pipe()
            process = context.Process(target=measure, args=(kind, workers, there))
            process.start()
            there.close()  # so that its death is an EOFError here
            microseconds, memory = here.recv()
            process.join()
            rows += [
                Row(f"{workers} workers", "us per gradient", (microseconds,), kind, less=True),
                Row(f"{workers} workers", f"MiB more for {EVENTS:,}", (memory,), kind, less=True),
            ]
    return rows
