"""Real exchanges: a worker's push and pull through the server, against the bare transport of as many bytes.

Ratios are bare seconds over ours, so 1 would be an exchange that costs nothing but the transport. The bare counterpart of
gloo is a ping-pong between two processes over a process group of two; that of shared memory, a copy into memory that both
map and a copy out of it, each way, told by a byte over a socket. The server takes a plain ASGD step at each visit. Then
gradients per second of four workers beside DistributedDataParallel on the same net, all alike and one four times slower.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

import offbeat as ob
from offbeat.names import read
from offbeat.runtime.gloo import GlooLink
from offbeat.runtime.host import Terms
from offbeat.runtime.link import Link, SharedLink
from offbeat.runtime.place import Place
from offbeat.runtime.server import RunServer
from offbeat.runtime.worker import Remote, Worker

from .measure import Row

SIZES = {"6 k": 6_000, "1 M": 1_000_000, "25 M": 25_000_000}
WORKERS = (1, 2, 4)
TOKEN, TIMEOUT, REPEATS = "bench", 120.0, 5


def exchange(address: str, me: int, d: int, count: int, told: Any) -> None:
    """A worker that does nothing but exchange; puts the seconds of ``count`` exchanges, some times."""
    torch.set_num_threads(1)
    place = Place((address,), TOKEN, me, repr(ob.methods.ASGD(lr=1e-6)), timeout=TIMEOUT)
    worker = Worker(Remote(place, torch.zeros(d), {"method": "", "layout": None}, read), print)
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
        server = RunServer(terms, TOKEN, Path(folder), read, lambda text: None)
        thread = threading.Thread(target=server.run)
        thread.start()
        context = mp.get_context("spawn")
        told = context.Barrier(workers), context.Queue()
        address = f"127.0.0.1:{server.port}"
        crew = [context.Process(target=exchange, args=(address, i, d, count, told)) for i in range(workers)]
        for process in crew:
            process.start()
        try:
            seconds = [max(told[1].get(timeout=600) for _ in crew) for _ in range(REPEATS)]
        finally:
            for process in crew:
                process.join(30)
                process.kill()
            server.stop()
            thread.join()
    return [s / (count * workers) for s in seconds]


def echo(port: int, transport: str, size: int, way: dict[str, Any]) -> None:
    """The other end of a bare transport."""
    torch.set_num_threads(1)
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link = bare(sock, transport, size, way)
    link.meet()
    try:
        while True:
            if link.ahead:
                link._read(1, "a byte")
            link.put(link.take(size))
            if link.ahead:
                link._write(b"!")
    except ConnectionError:
        pass


def bare(sock: socket.socket, transport: str, size: int, way: dict[str, Any]) -> Link:
    """A link of which only the way for payloads is used: no header, checksum, server or handler."""
    if transport == "shared":
        return SharedLink(sock, "echo", TIMEOUT, (size, size), way.get("path", ""))
    return GlooLink(sock, "echo", TIMEOUT, accepts=not way)


def theirs(transport: str, d: int, count: int) -> list[float]:
    """Seconds of one round trip over the bare transport, in each repeat."""
    size = 4 * d
    listener = socket.create_server(("127.0.0.1", 0))
    ends = socket.socketpair()
    link = bare(ends[0], transport, size, {})
    way = {"dials": True, **link.offer()}
    process = mp.get_context("spawn").Process(target=echo, args=(listener.getsockname()[1], transport, size, way))
    process.start()
    link.sock, _ = listener.accept()
    link.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.meet()
    data = torch.full((size,), 1, dtype=torch.uint8)
    seconds = []
    try:
        for repeat in range(REPEATS + 1):
            start = time.perf_counter()
            for _ in range(count if repeat else 3):
                link.put(data)
                if link.ahead:
                    link._write(b"!")
                    link._read(1, "a byte")
                link.take(size)
            seconds.append((time.perf_counter() - start) / count)
    finally:
        link.close()
        process.join(30)
        process.kill()
        for end in ends:
            end.close()
        listener.close()
    return seconds[1:]


def run() -> list[Row]:
    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for transport in ("shared", "gloo"):
        for name, d in SIZES.items():
            count = max(3, min(400, 20_000_000 // d))
            alone = theirs(transport, d, count)
            rows.append(Row(f"bare {transport}, {name}", "round trips/s", tuple(1 / s for s in alone)))
            for workers in WORKERS:
                each = ours(transport, d, workers, max(2, count // workers))
                rows.append(Row(f"{transport}, {name}, {workers} workers", "exchanges/s", tuple(1 / s for s in each)))
                pairs = zip(sorted(alone), sorted(each), strict=True)
                rows.append(Row(f"{transport}, {name}, {workers} workers / bare", "x", tuple(a / s for a, s in pairs)))
    torch.set_num_threads(threads)
    return rows + gradients()


def gradients(repeats: int = 3) -> list[Row]:
    """Four workers beside DistributedDataParallel: gradients per second, with and without a slow worker."""
    spec = importlib.util.spec_from_file_location("demo", Path(__file__).parent.parent / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    task = ob.tasks.Digits()
    rows = []
    for slow in (1.0, 4.0):
        ratios = []
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as folder:
                a = demo.asynchronous("digits", 800, 0.02, slow, Path(folder) / "ours")
                b = demo.synchronous(task, 800, 0.02, slow, Path(folder) / "theirs")
            ratios.append(b[-1].seconds / a[-1].seconds)
        what = "all alike" if slow == 1 else f"one {slow:g} times slower"
        rows.append(Row(f"4 workers, {what}: gradients/s / DistributedDataParallel's", "x", tuple(ratios)))
    return rows


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for row in run():
        print(row.what, row.unit, row.median)
