"""What a message costs: latencies, bandwidths, and the queue at each node's network card.

A transfer goes through its sender's card, then over the link, then through its receiver's card. A card serves transfers
one after the other, in the order in which they come to it, sending and receiving apart; a transfer is passed on while it
still comes in, so an idle path costs ``latency + bytes / slowest``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..core.method import Message
from ..core.protocol import SERVER
from ..core.values import refuse, require, require_count
from .clock import Clock


@dataclass(frozen=True)
class Link:
    """An exception to a `Network`'s rule: what is between ``node`` and ``other``, both ways."""

    node: int
    """A worker 0, 1, 2, ..., or -1 for the server."""
    other: int | None = None
    """The node at the other end; None: all others, of which a link that names both is an exception."""
    latency: float | None = None
    """Seconds one way, at least 0; None: the network's."""
    bandwidth: float = math.inf
    """Bytes per second each way, above 0; the cards at its ends keep theirs."""

    def __post_init__(self) -> None:
        require(self, "other", self.other != self.node, "a link joins two nodes; None means all others")
        at_least_0 = self.latency is None or 0 <= self.latency < math.inf
        require(self, "latency", at_least_0, "must be finite and at least 0 seconds, or None for the network's")
        require(self, "bandwidth", self.bandwidth > 0, "must be above 0 bytes per second; inf costs nothing")


@dataclass(frozen=True)
class Network:
    """Latency and bandwidth, the same for all nodes but for the exceptions in ``links``.

    With the full duplex that cards have, a server that receives and sends messages of S bytes serves at most
    ``bandwidth / S`` visits a second; with half duplex, the model in which a visit costs both messages one after the
    other, ``bandwidth / (2 S)``.
    """

    latency: float = 0.0
    """Seconds one way between any two nodes, at least 0."""
    bandwidth: float = math.inf
    """Bytes per second that a node's card sends, and receives unless ``download`` says otherwise; above 0."""
    download: float | None = None
    """Bytes per second that a worker's card receives, where that is another number than it sends."""
    server: float | None = None
    """Bytes per second of the server's card, each way; None: as the workers'."""
    shards: int = 1
    """Over how many machines the server is sharded, at least 1: each has a card, and an equal part of every message."""
    duplex: Literal["full", "half"] = "full"
    """Whether a card sends and receives at the same time (full) or takes turns (half)."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    """What the floats of a message are sent as; None, or where a method has rounded them to half precision: as they are. It
    changes what messages cost, not their values."""
    links: tuple[Link, ...] = ()
    """Exceptions: links that differ."""

    def __post_init__(self) -> None:
        require(self, "latency", 0 <= self.latency < math.inf, "must be finite and at least 0 seconds")
        for name in ("bandwidth", "download", "server"):
            value = getattr(self, name)
            fine = name != "bandwidth" if value is None else value > 0
            require(self, name, fine, "must be above 0 bytes per second; inf costs nothing")
        require_count(self, "shards")
        require(self, "duplex", self.duplex in ("full", "half"), "must be 'full' or 'half'")
        known = ("float64", "float32", "bfloat16", "float16", None)
        require(self, "dtype", self.dtype in known, f"must be one of {known}")
        tuple_of_links = isinstance(self.links, tuple) and all(isinstance(link, Link) for link in self.links)
        require(self, "links", tuple_of_links, "must be a tuple of links such as (Link(0, 1, latency=0.1),)")
        ends = [frozenset((link.node, link.other)) for link in self.links]
        require(self, "links", len(set(ends)) == len(ends), "two of them join the same nodes: leave one out")

    def check(self, nodes: Iterable[int]) -> None:
        """Refuse a link to a node that is neither the server (-1) nor in ``nodes``."""
        known = {SERVER, None, *nodes}
        for link in self.links:
            for node in (link.node, link.other):
                if node not in known:
                    refuse(self, "links", link, f"there is no node {node}: workers are {span(known)}, the server is -1")

    def size(self, message: Message, scale: float = 1.0) -> float:
        """How many bytes ``message`` has; ``scale`` is how many numbers each entry of a vector stands for."""
        if isinstance(message, Tensor):
            wide = message.element_size()
            if self.dtype and message.is_floating_point() and wide > 2:
                wide = getattr(torch, self.dtype).itemsize
            return message.numel() * (scale if message.dim() else 1.0) * wide
        return sum(self.size(part, scale) for part in message)


def span(nodes: Iterable[int | None]) -> str:
    """The names of the workers among ``nodes``, to be read."""
    workers = sorted(n for n in nodes if n is not None and n >= 0)
    return f"0 to {workers[-1]}" if workers == list(range(len(workers))) else ", ".join(map(str, workers))


class _Wire(NamedTuple):
    latency: float
    bandwidth: float


class Traffic:
    """The transfers of a run: what is under way, and until when each card is busy."""

    def __init__(self, network: Network, clock: Clock, healed: Callable[[int, int, float], float]) -> None:
        """``healed(a, b, now)`` is when the nodes ``a`` and ``b`` can next talk: ``now`` unless something parts them."""
        self.network, self.clock, self.healed = network, clock, healed
        self.busy: dict[Any, float] = {}  # until when a card or a link serves what has come to it
        self.rule = _Wire(network.latency, math.inf)
        self.wires = {
            frozenset((link.node, link.other)): _Wire(
                network.latency if link.latency is None else link.latency, link.bandwidth
            )
            for link in network.links
        }
        self.free = network == Network(shards=network.shards, duplex=network.duplex, dtype=network.dtype)

    def send(self, source: int, to: int, size: float, act: Callable[..., None], *args: Any) -> None:
        """Call ``act(*args)`` once ``size`` bytes have come from ``source`` to ``to``: at once where that costs nothing."""
        start = self.healed(source, to, self.clock.now)
        if start > self.clock.now:
            self.clock.at(start, 1, self.send, source, to, size, act, *args)
            return
        if self.free:
            act(*args)
            return
        out, link = self._card(source, "out"), self._wire(source, to)
        first, last = self._through(*out, size, start, start)
        if link.bandwidth < math.inf:
            first, last = self._through((source, to), link.bandwidth, size, first, last)
        first, last = first + link.latency, last + link.latency
        if first > self.clock.now:
            self.clock.at(first, 1, self._arrive, source, to, size, last, act, args)
        else:
            self._arrive(source, to, size, last, act, args)

    def _arrive(
        self, source: int, to: int, size: float, last: float, act: Callable[..., None], args: tuple[Any, ...]
    ) -> None:
        """The first byte has come to the receiver's card, and the last one will at ``last``, when all is well."""
        _, last = self._through(*self._card(to, "in"), size, self.clock.now, last)
        last = self.healed(source, to, last)
        if last > self.clock.now:
            self.clock.at(last, 1, act, *args)
        else:
            act(*args)

    def _through(self, place: Any, rate: float, size: float, first: float, last: float) -> tuple[float, float]:
        """When the first and the last byte leave a place that they reach at ``first`` and ``last``."""
        begin = max(first, self.busy.get(place, 0.0))
        self.busy[place] = end = begin + size / rate
        return begin, max(last, end)

    def _card(self, node: int, way: Literal["out", "in"]) -> tuple[Any, float]:
        """What a transfer queues for at ``node``, and its bytes per second."""
        network = self.network
        place = (node, way if network.duplex == "full" else "both")
        if node == SERVER:
            return place, network.shards * (network.bandwidth if network.server is None else network.server)
        return place, network.bandwidth if way == "out" or network.download is None else network.download

    def _wire(self, a: int, b: int) -> _Wire:
        """What is between two nodes: the link that names both, else the worst of those that name one, else the rule."""
        if not self.wires:
            return self.rule
        both = self.wires.get(frozenset((a, b)))
        ends = [both] if both else [wire for node in (a, b) if (wire := self.wires.get(frozenset((node, None))))]
        if len(ends) < 2:
            return ends[0] if ends else self.rule
        return _Wire(max(wire.latency for wire in ends), min(wire.bandwidth for wire in ends))

    def _whole(self, ring: Sequence[tuple[int, int]], now: float) -> float:
        """When all on the ring can next talk to the one after them."""
        while (then := max(self.healed(a, b, now) for a, b in ring)) > now:
            now = then
        return now

    def ping(self) -> float:
        """Seconds one way of an empty message, between nodes that no exception names."""
        return self.rule.latency

    def reduce(self, members: Sequence[int], size: float) -> float:
        """When a ring all-reduce of ``size`` bytes over ``members``, begun now, is done.

        Each of the ``2 (n - 1)`` steps passes one n-th of the message to the next on the ring, in rising order, and takes
        as long as on the slowest link (Patarasuk, Yuan. Bandwidth optimal all-reduce algorithms. 2009). The cards are
        busy with it until then.
        """
        n, now = len(members), self.clock.now
        if n == 1:
            return now
        ring = list(zip(members, [*members[1:], members[0]], strict=True))
        wires = [self._wire(a, b) for a, b in ring]
        cards = [(self._card(m, "out"), self._card(m, "in")) for m in members]
        join = max if self.network.duplex == "full" else sum
        slowest = max(join((1 / up, 1 / down)) for (_, up), (_, down) in cards)  # seconds per byte
        slowest = max(slowest, *(1 / wire.bandwidth for wire in wires))
        places = [place for card in cards for place, _ in card]
        begin = max(now, *(self.busy.get(place, 0.0) for place in places))
        seconds = 2 * (n - 1) * (size / n * slowest + max(wire.latency for wire in wires))
        end = self._whole(ring, self._whole(ring, begin) + seconds)
        self.busy.update(dict.fromkeys(places, end))
        return end
