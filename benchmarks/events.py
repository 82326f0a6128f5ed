"""How fast is the bare event core? Processes that do nothing but schedule themselves again, no tensor touched."""

from __future__ import annotations

from benchmarks.measure import Row, seconds
from offbeat.engines.clock import Clock

EVENTS = 200_000


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


def run() -> list[Row]:
    return [
        Row(
            f"bare event core, {n} processes",
            "events/s",
            tuple(EVENTS / seconds(lambda n=n: tick(n)) for _ in range(5)),
        )
        for n in (16, 1_024, 10_000)
    ]
