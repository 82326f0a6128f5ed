"""Milliseconds of a push and pull: 40 MB go to a server, which takes ``x - lr g`` and returns all of x; one worker.

One thread for each process, each system in an environment of its own, all in turn, some times over. Ours are whole exchanges:
headers, checksums, the look at what is not finite, and a state that stays as it was if anything is wrong. In shared memory
the gradient is made where the server reads it, as a `Replica` does, and x is used where the server writes it.
"""

from __future__ import annotations

from .measure import Row, over
from .systems import Driver, Mpi, Restless, System, in_turn

REPEATS = 5
GROUPS: dict[str, list[System]] = {
    "memory that both map": [
        System("offbeat, shared memory", "ours_exchange.py", "shared", workers=1),
        Mpi("MPI, a window, copied into and out of", "mpi_exchange.py", "window", "mpi4py", workers=1),
        Mpi("MPI, a window, nothing copied or kept", "mpi_exchange.py", "in-place", "mpi4py", workers=1),
    ],
    "messages": [
        System("offbeat, gloo", "ours_exchange.py", "gloo", workers=1),
        System("offbeat, TCP", "ours_exchange.py", "tcp", workers=1),
        System("torch.distributed, gloo, send and recv", "gloo_exchange.py", workers=1),
        Mpi("MPI, send and receive", "mpi_exchange.py", "messages", "mpi4py", workers=1),
        Restless("torch.distributed.rpc", "rpc_exchange.py", workers=1),
        Driver("Ray actors", "ray_exchange.py", package="ray[default]"),
    ],
}


def run() -> list[Row]:
    rows = []
    for group, systems in GROUPS.items():
        rows += in_turn(systems, REPEATS, "ms", group, lambda rate: 1e3 / rate)
    ours, group = rows[0], "their time over that of offbeat, shared memory"
    return rows + [over(row, ours, row.what, group, aim=1.0) for row in rows if row.peer]
