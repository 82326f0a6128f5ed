"""How fast is the event core? A time-only asynchronous run against simpy on the same problem.

The problem: workers draw gamma times for their gradients and bring each to a server, which is where the order of all is
made and written down. Free: messages cost nothing. Cards: a message of 4 MB queues at the server's card on its way in and
out, and every way has a latency. In simpy, whose processes are generators as well, a worker is one process, a card is a
resource of capacity one; it writes down what it must to tell who was where when, a tenth of what a trace holds.
The bare core is a heap of callbacks that schedule themselves again.
"""

from __future__ import annotations

from array import array
from dataclasses import replace
from functools import partial

import simpy

import offbeat as ob
from benchmarks.measure import Row, ratio, seconds
from offbeat.engines.clock import Clock

EVENTS = 200_000
GRADIENTS = 50_000
WORKERS = (16, 1_024, 10_000)
SPEED = ob.Gamma(1.0, 0.1)
CARDS = ob.Network(latency=50e-6, bandwidth=1.25e9)
BYTES = 4_000_000


def tick(processes: int) -> None:
    """``EVENTS`` events of ``processes`` processes with different periods."""
    clock, left = Clock(), EVENTS

    def act(period: float) -> None:
        nonlocal left
        left -= 1
        if left >= processes:
            clock.at(clock.now + period, 1, act, period)

    for i in range(processes):
        clock.at(0.0, 1, act, 1.0 + i / processes)
    while clock.step():
        pass


def ours(workers: int, network: ob.Network, gradients: int = GRADIENTS) -> None:
    ob.simulate(
        ob.methods.ASGD(), ob.tasks.TimeOnly(), ob.Cluster(workers, SPEED, network=network), gradients=gradients
    )


def theirs(workers: int, network: ob.Network) -> None:
    environment = simpy.Environment()
    cards = [simpy.Resource(environment) for _ in range(2 * workers + 2)]  # in and out of each worker and the server
    rows, left, version = array("d"), GRADIENTS, 0

    def pass_through(card: simpy.Resource) -> object:
        with card.request() as turn:
            yield turn
            yield environment.timeout(BYTES / network.bandwidth)

    def transfer(out: int, into: int) -> object:
        """Through both cards at once, as a message is passed on while it comes in."""
        first = environment.process(pass_through(cards[out]))
        yield environment.timeout(network.latency)
        yield environment.process(pass_through(cards[into]))
        yield first

    def worker(k: int) -> object:
        nonlocal left, version
        times = SPEED.stream(0, k)
        while left:
            left -= 1
            seen, took = version, next(times)
            yield environment.timeout(took)
            if network.bandwidth < float("inf"):
                yield from transfer(2 * k, 2 * workers)
            rows.extend((environment.now, k, version - seen, took))
            version += 1
            if network.bandwidth < float("inf"):
                yield from transfer(2 * workers + 1, 2 * k + 1)

    for k in range(workers):
        environment.process(worker(k))  # type: ignore[arg-type]
    environment.run()
    assert len(rows) == 4 * GRADIENTS


def run() -> list[Row]:
    rows = [
        Row(
            f"{n} processes",
            "events/s",
            tuple(EVENTS / seconds(lambda n=n: tick(n)) for _ in range(5)),
            "the bare core",
        )
        for n in WORKERS
    ]
    for what, network in (("messages cost nothing", ob.Network()), ("messages queue at cards", CARDS)):
        for n in WORKERS:
            a, b = partial(ours, n, network), partial(theirs, n, network)
            each = ratio(f"{n} workers", a, b, 5)
            rows.append(replace(each, group=f"{what}: our time over simpy's", aim=1.0, less=True))
    whole = tuple(seconds(lambda: ours(10_000, ob.Network(), 1_000_000)) for _ in range(3))
    return [*rows, Row("10,000 workers, 1 M gradients", "s", whole, "a large run", aim=15.0, less=True)]
