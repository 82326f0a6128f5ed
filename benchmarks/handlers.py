"""How near is a handler to the memory's speed? Each method's update of 25 M float32 parameters against a triad.

The bytes that must move are those of each vector that the handler reads, once, and of each that it makes, once; what it
passes on unchanged (GEM's old centre, which becomes the worker's copy) need not move. They are divided by the time, and that
by what a triad ``a = b + s c`` on vectors of the same kind makes of its three streams, measured right before:
by inductor and by ``torch.add(out=)``, the faster counts. Both first read the lines that they overwrite; a fused handler may
store past the cache, and so be faster: the first row says what that makes of the triad itself. Fused, in the fastest blocks,
eager.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

import offbeat as ob
from benchmarks.measure import Row, seconds
from offbeat.core.tree import leaves, rebuild
from offbeat.cpus import cpus
from offbeat.engines.kernel import BLOCKS, Kernel, Visits, vector

SIZE = int(os.environ.get("SIZE", "25_000_000"))
REPEATS = int(os.environ.get("REPEATS", "7"))
CPU = torch.device("cpu")
UNIT = "% of triad"


def filled() -> torch.Tensor:
    return vector(SIZE, torch.float32, CPU).uniform_(0.1, 1.0)


def cases() -> Iterator[tuple[str, Callable[[], Kernel]]]:
    """The triad itself, then ``serve`` of the server methods, with all that a server does beside it, ``absorb`` of the periodic
    ones, ``merge`` of those that gossip in rounds."""
    small = torch.ones(2)
    yield "a triad as a handler", lambda: Kernel(lambda b, c, s: b + s * c, small, small, torch.tensor(3.0))
    for cls in ob.methods.all_methods():
        schedule = {"lr": 0.1 * ob.Warmup(100)} if "lr" in cls.__dataclass_fields__ else {}
        method = cls(**schedule)
        if isinstance(method, ob.ServerMethod):
            yield f"{cls.__name__}.serve", lambda method=method: Visits(method, small).visit
            continue
        w = method.init(small)
        if isinstance(method, ob.PeriodicMethod):
            args = w, method.contribute(w)
            yield f"{cls.__name__}.absorb", lambda method=method, args=args: Kernel(method.absorb, *args)
        elif isinstance(method, ob.RoundGossipMethod):
            w, messages = method.send(w, {1: 0.5}, 0.5)
            args = w, messages, {1: 0.5}, 0.5
            yield f"{cls.__name__}.merge", lambda method=method, args=args: Kernel(method.merge, *args)


class Triad:
    """What this machine's memory gives to three streams."""

    def __init__(self) -> None:
        self.a, self.b, self.c = filled(), filled(), filled()
        self.s = torch.tensor(3.0)
        self.compiled = torch.compile(self.into, fullgraph=True, dynamic=False)
        self.compiled(self.a, self.b, self.c, self.s)

    @staticmethod
    def into(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> None:
        a.copy_(b + s * c)

    def seconds(self) -> float:
        """How long it takes now, the faster way."""
        return min(
            seconds(lambda: self.compiled(self.a, self.b, self.c, self.s)),
            seconds(lambda: torch.add(self.b, self.c, alpha=3.0, out=self.a)),
        )


def measure(name: str, kernel: Kernel, triad: Triad) -> Row:
    raced = kernel.warm(SIZE)
    streams = kernel.reads + sum(t.dim() for t in kernel.new)
    if not streams:
        return Row(name, UNIT, (math.nan,), "what moves nothing", "it passes on what it is given")
    args: Any = rebuild(kernel.args, [filled() if t.dim() else t + 5 for t in leaves(kernel.args)])
    block = min(BLOCKS, key=lambda b: raced.get(f"in blocks of {b}", float("inf")))
    ways: dict[str, Callable[[], Any]] = {
        "fused": lambda: kernel.fused(*args),
        "in blocks": lambda: kernel.blocked(*args, block=block),
        "eager": lambda: kernel.eager(*args),
    }

    def share(roof: float, took: float) -> float:
        return 100 * streams / 3 * roof / took  # the triad has three streams

    shares: dict[str, list[float]] = {way: [] for way in ways}
    rates = []
    for _ in range(REPEATS):
        # each next to a triad, as what the memory gives changes within seconds
        pairs = [(triad.seconds(), seconds(ways["fused"])) for _ in range(4)]
        shares["fused"].append(statistics.median(share(*pair) for pair in pairs))
        rates.append(4 * SIZE * streams / min(took for _, took in pairs) / 1e9)
        for way in ("in blocks", "eager"):
            shares[way].append(share(triad.seconds(), seconds(ways[way])))
    middle = {way: statistics.median(values) for way, values in shares.items()}
    rate = statistics.median(rates)
    note = f"{kernel.reads} read, {streams - kernel.reads} written, {rate:.0f} GB/s; "
    note += f"in blocks {middle['in blocks']:.0f} %, eager {middle['eager']:.0f} %"
    return Row(name, UNIT, tuple(shares["fused"]), "fused", note, aim=85.0)


def run() -> list[Row]:
    torch.set_num_threads(cpus())
    triad = Triad()
    rows = [measure(name, kernel(), triad) for name, kernel in cases()]
    return sorted(rows, key=lambda row: math.isnan(row.median))
