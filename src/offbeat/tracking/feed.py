"""Rows of figures from a run, and their way to trackers, none of which can end the run or hold anything up."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..watch.curve import Sums
from ..watch.view import View
from . import Tracker

OFTEN = 500
"""A row is made each time the gradients have grown by a part of this many: some thousand rows for a million of gradients."""
WAITING = 10_000
"""Rows that wait for a tracker, at most; later ones are dropped."""
CLOSING = 60.0
"""Seconds that trackers may take at the end, to upload what they have."""
LOG = logging.getLogger("offbeat.tracking")


class Row(NamedTuple):
    """Figures of a run after so many gradients and seconds of it."""

    figures: dict[str, float]
    gradients: int
    seconds: float


class Rows:
    """Makes rows of a trace's lines. A trace that begins anew, as a server has gone on from a snapshot, is passed over up to where
    rows have been made."""

    def __init__(self) -> None:
        self._view, self._sums, self._since = View(), Sums(), 0.0
        self._last = 0  # gradients at the last row
        self._due = 1

    def again(self) -> None:
        """The trace begins anew."""
        self._view, self._sums, self._since = View(), Sums(), 0.0

    def take(self, entries: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
        """The rows that the next lines give."""
        view = self._view
        for entry in entries:
            view.take(entry)
            if "step" in entry:
                if view.gradients <= self._last:  # it was told before
                    self._since = view.seconds
                    continue
                self._sums.add(entry["loss"], entry["lag"], entry["gap"])
                if view.gradients >= self._due:
                    yield self._row()
            elif "evaluation" in entry and (told := entry["evaluation"])["gradients"] >= self._last:
                figures = {f"evaluation/{name}": value for name, value in told["figures"].items()}
                yield Row(_finite(figures), max(self._last, told["gradients"]), told["seconds"])

    def rest(self) -> Iterator[Row]:
        """What the last gradients give, when the trace has ended."""
        if self._sums.gradients and self._view.gradients > self._last:
            yield self._row()

    def _row(self) -> Row:
        view, took = self._view, self._view.seconds - self._since
        figures = {
            **self._sums.means(),
            **view.extra,
            "gradients_per_second": self._sums.gradients / took if took > 0 else math.nan,
            "workers_alive": len(view.alive),
            "crashes": view.crashes,
        }
        self._sums, self._since, self._last = Sums(), view.seconds, view.gradients
        self._due = view.gradients + max(1, view.gradients // OFTEN)
        return Row(_finite(figures), view.gradients, view.seconds)


class Feed:
    """Passes rows on to trackers, each of which has a thread of its own."""

    def __init__(
        self, trackers: Mapping[str, type[Tracker]], folder: Path, name: str, parameters: Mapping[str, Any]
    ) -> None:
        self.rows = Rows()
        self._ways = [_Way(which, cls, folder, name, parameters) for which, cls in trackers.items()]

    def take(self, entries: Sequence[Mapping[str, Any]], again: bool = False) -> None:
        """The next lines of the trace, which begins anew where it does so ``again``."""
        if again:
            self.rows.again()
        self._send(self.rows.take(entries))

    def close(self) -> None:
        """The run is over: wait until all trackers have what they were sent, but not for ever."""
        self._send(self.rows.rest())
        until = time.monotonic() + CLOSING
        for way in self._ways:
            way.send(None)
        for way in self._ways:
            way.join(max(0.0, until - time.monotonic()))
            if way.is_alive():
                LOG.warning(
                    f"tracker {way.which} is not done after {CLOSING:g} s: it is left, and may lack the last figures"
                )

    def _send(self, rows: Iterator[Row]) -> None:
        for row in rows:
            for way in self._ways:
                way.send(row)


class _Way(threading.Thread):
    """The way to one tracker: what it raises is told once."""

    def __init__(self, which: str, cls: type[Tracker], folder: Path, name: str, parameters: Mapping[str, Any]) -> None:
        super().__init__(name=f"tracker {which}", daemon=True)
        self.which = which
        self._make: Callable[[], Tracker] = lambda: cls(folder, name, parameters)
        self._rows: queue.Queue[Row | None] = queue.Queue(WAITING)
        self._failed = self._full = False
        self.start()

    def send(self, row: Row | None) -> None:
        """Hand a row over, or with None the end."""
        try:
            self._rows.put(row, block=row is None, timeout=CLOSING)
        except queue.Full:
            if not self._full and self.is_alive():
                LOG.warning(f"tracker {self.which} is too slow: {WAITING:,} rows wait for it, and others are dropped")
            self._full = True

    def run(self) -> None:
        try:
            tracker = self._make()
        except BaseException as error:
            LOG.warning(f"tracker {self.which} could not begin ({_short(error)}): it gets nothing, and the run goes on")
            return
        while (row := self._rows.get()) is not None:
            try:
                tracker.log(*row)
            except Exception as error:
                self._fails(error)
        try:
            tracker.close()
        except Exception as error:
            self._fails(error)

    def _fails(self, error: Exception) -> None:
        if not self._failed:
            LOG.warning(f"tracker {self.which} fails ({_short(error)}): it may lack figures, and the run goes on")
        self._failed = True


def _short(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:300]


def _finite(figures: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float(value) for name, value in figures.items() if value is not None and math.isfinite(value)}
