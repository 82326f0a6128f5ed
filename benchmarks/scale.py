"""Does a simulated event cost more with more workers? One method of each kind on a problem that costs only time."""

from __future__ import annotations

import multiprocessing
import resource
import time
from multiprocessing.connection import Connection

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
    """Microseconds per event and growth of memory in MiB, in a process of its own."""
    torch.set_num_threads(1)
    method, cluster = METHODS[kind], ob.Cluster(workers, network=NETWORK)
    ob.simulate(method, ob.tasks.TimeOnly(), cluster, gradients=workers)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    ob.simulate(method, ob.tasks.TimeOnly(), cluster, gradients=EVENTS)
    seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    link.send((1e6 * seconds / EVENTS, grown / 1024))


def run() -> list[Row]:
    rows = []
    context = multiprocessing.get_context("spawn")
    for kind in METHODS:
        for workers in (16, 128, 1024):
            here, there = context.Pipe()
            process = context.Process(target=measure, args=(kind, workers, there))
            process.start()
            microseconds, memory = here.recv()
            process.join()
            rows += [
                Row(f"{kind}, {workers} workers: time per event", "us", (microseconds,)),
                Row(f"{kind}, {workers} workers: memory for {EVENTS:,} events", "MiB", (memory,)),
            ]
    return rows
