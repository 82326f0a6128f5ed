"""Real exchanges: a worker's push and pull through the server, against the bare transport of as many bytes.

Ratios are bare seconds over ours, so 1 would be an exchange that costs nothing but the transport. The bare counterpart of
gloo is a ping-pong between two processes over a process group of two; that of shared memory, a copy into memory that both
map and a copy out of it, each way, told by a byte over a socket. The server takes a plain ASGD step at each visit, compiled
before the clock starts where the model is large enough for that.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

import offbeat as ob
from offbeat.log import WORKER
from offbeat.names import read
from offbeat.runtime.gloo import GlooLink
from offbeat.runtime.host import Terms
from offbeat.runtime.place import Place
from offbeat.runtime.server import LARGE, RunServer
from offbeat.runtime.shared_memory import SharedLink
from offbeat.runtime.worker import Remote, Worker

from .measure import Row

SIZES = {"6 k": 6_000, "1 M": 1_000_000, "25 M": 25_000_000}
WORKERS = (1, 2, 4)
TOKEN, TIMEOUT, REPEATS = "bench", 120.0, 5
Put, Take = Callable[[Tensor], None], Callable[[], Tensor]


def exchange(address: str, me: int, d: int, count: int, told: Any) -> None:
    """A worker that does nothing but exchange; puts the seconds of ``count`` exchanges, some times."""
    torch.set_num_threads(1)
    place = Place((address,), TOKEN, me, repr(ob.methods.ASGD(lr=1e-6)), timeout=TIMEOUT)
    worker = Worker(Remote(place, torch.zeros(d), {"method": "", "layout": None}, read), WORKER)
    g = torch.full((d,), 1e-3)
    for _ in range(3):
        worker.step(g, 0.0)
    for _ in range(REPEATS):
        told[0].wait()
        start = time.perf_counter()
        for _ in range(count):
            worker.step(g, 0.0)
        told[1].put(time.perf_counter() - start)
    worker.leave(done=True)


def ours(transport: str, d: int, workers: int, count: int) -> list[float]:
    """Seconds of one exchange of all workers together, in each repeat."""
    with tempfile.TemporaryDirectory() as folder:
        terms = Terms(ob.methods.ASGD(lr=1e-6), None, workers, transport=transport, timeout=TIMEOUT, every=1e9)
        compiled = threading.Event()

        def look(line: logging.LogRecord) -> bool:
            if "visit" in line.getMessage():  # which way is faster, or why it is not compiled
                compiled.set()
            return False

        log = logging.Logger("bench")
        log.addFilter(look)
        server = RunServer(terms, TOKEN, Path(folder), read, log)
        thread = threading.Thread(target=server.run)
        thread.start()
        context = mp.get_context("spawn")
        told = context.Barrier(workers + 1), context.Queue()
        address = f"127.0.0.1:{server.port}"
        crew = [context.Process(target=exchange, args=(address, i, d, count, told)) for i in range(workers)]
        for process in crew:
            process.start()
        try:
            if d >= LARGE and not compiled.wait(120):
                raise RuntimeError("the server did not say within 120 s whether visits are compiled")
            seconds = []
            for _ in range(REPEATS):
                told[0].wait(60)
                seconds.append(max(told[1].get(timeout=120) for _ in crew))
        finally:
            for process in crew:
                process.join(30)
                process.kill()
            server.stop()
            thread.join()
    return [s / (count * workers) for s in seconds]


def echo(port: int, transport: str, size: int) -> None:
    """The other end of a bare transport."""
    torch.set_num_threads(1)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        put, take = bare(sock, transport, size, accepts=False)
        with contextlib.suppress(ConnectionError):
            while True:
                put(take())


def bare(sock: socket.socket, transport: str, size: int, accepts: bool) -> tuple[Put, Take]:
    """The way for payloads alone: no header, checksum, server or handler."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if transport == "gloo":
        pair = GlooLink(sock, "the other end", TIMEOUT, accepts)
        pair.meet()
        group = pair.pair
        assert group is not None

        def came() -> Tensor:
            data = torch.empty(size, dtype=torch.uint8)
            group.recv(data, pair.other)
            return data

        return pair.put, came
    path = "" if accepts else sock.recv(64).decode().strip()
    link = SharedLink(sock, "the other end", TIMEOUT, (size, size), path)
    if accepts:
        sock.sendall(f"{link.path:<64}".encode())

    def put(data: Tensor) -> None:
        next(link.put_at).part(size).copy_(data)
        link._write(b"!")

    def take() -> Tensor:
        link._read(1, "a byte")
        return next(link.take_at).part(size).clone()

    return put, take


def theirs(transport: str, d: int, count: int) -> list[float]:
    """Seconds of one round trip over the bare transport, in each repeat."""
    size = 4 * d
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = mp.get_context("spawn").Process(target=echo, args=(listener.getsockname()[1], transport, size))
        process.start()
        sock, _ = listener.accept()
    data, seconds = torch.full((size,), 1, dtype=torch.uint8), []
    try:
        with sock:
            put, take = bare(sock, transport, size, accepts=True)
            for repeat in range(REPEATS + 1):
                start = time.perf_counter()
                for _ in range(count if repeat else 3):
                    put(data)
                    take()
                seconds.append((time.perf_counter() - start) / count)
    finally:
        process.join(30)
        process.kill()
    return seconds[1:]


def run() -> list[Row]:
    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for transport in ("shared", "gloo"):
        for name, d in SIZES.items():
            count = max(3, min(400, 100_000_000 // d))
            alone = theirs(transport, d, count)
            group = f"{transport}, {name} parameters"
            rows.append(Row("the bare transport", "round trips/s", tuple(1 / s for s in alone), group, peer=True))
            for workers in WORKERS:
                each = ours(transport, d, workers, max(2, count // workers))
                crowd = f"{workers} worker{'s' * (workers > 1)}"
                rows.append(Row(crowd, "exchanges/s", tuple(1 / s for s in each), group))
                pairs = zip(sorted(alone), sorted(each), strict=True)
                rows.append(Row(f"{crowd} / bare", "x", tuple(a / s for a, s in pairs), group))
    torch.set_num_threads(threads)
    return rows


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for row in run():
        print(row.what, row.unit, row.median)
