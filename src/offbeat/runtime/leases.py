"""Which minibatches a run hands out: passes over data, and leases of their minibatches. No input or output.

A *pass* is one walk over a loader's data, known by its series and its number in that series. The worker that opens it first
says how long it is and how its order begins; who opens it with another length or order is refused. A *lease* gives one worker
one minibatch, an index into the pass. It is used, given back, or fails (its gradient is not finite); a minibatch that has
failed twice is set aside.

What a worker gets when it asks for minibatches of a pass:

1. of that pass, those that came back first, then new ones. The last ones are kept for workers that are in the run and have
   had none of this pass, until the run is two passes on. (But not of later passes within an epoch for workers that have made
   none of them: one worker alone may evaluate.)
2. where that pass has none left: those that are left of an earlier pass, because somebody died with them.
3. where it has had nothing of its pass, and others are further on: one minibatch of the first pass that is not over. So the
   body of a loop runs for a worker that comes late, and still each minibatch is used once.

Memory: a number for each pass that is over and out of order, a few for each that is not, and the leases that are out.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Key = tuple[int, int]
"""Series and number of a pass. Series from 0 on are the passes within one epoch, and their numbers epochs."""
COUNTED = -1
"""The series of passes that are numbered by how many a worker has opened before."""
KEPT = 100
"""A pass that was broken off stays open for workers that come late, until the run is this many passes further on."""


class Opening(NamedTuple):
    """A pass as a worker opens it."""

    series: int
    number: int
    length: int | None  # minibatches; None: not known before the end
    order: str  # a digest of how its order begins

    @property
    def key(self) -> Key:
        return self.series, self.number


TASK = Opening(-2, 0, None, "a task")
"""What the workers of a task draw from: it has no data to be divided, so that minibatches are only counted."""


class Lease(NamedTuple):
    """One minibatch for one worker."""

    series: int
    number: int
    place: int  # which of the pass's minibatches

    @property
    def key(self) -> Key:
        return self.series, self.number

    def __str__(self) -> str:
        where = f"pass {self.number}" if self.series == COUNTED else f"epoch {self.number}"
        return f"minibatch {self.place} of {where}" + (f", pass {self.series} within it" if self.series > 0 else "")


class Grant(NamedTuple):
    """What a worker gets."""

    leases: list[Lease]
    order: str = ""  # of the pass that they are of
    wait: bool = False  # nothing now, but others are still at this pass or further on, so that there may be some soon


@dataclass
class Pass:
    """A pass that is not over."""

    length: int | None  # as workers open it
    order: str
    end: float = (
        math.inf
    )  # how many minibatches it has; unknown where it has no length, and less than that where a sampler errs
    next: int = 0  # the first minibatch that was never given
    returned: list[int] = field(default_factory=list)  # given back: a heap
    again: list[int] = field(default_factory=list)  # that have failed once and wait to be tried again
    failed: set[int] = field(default_factory=set)  # that have failed once
    had: set[int] = field(default_factory=set)  # workers that have had some of it
    out: int = 0  # leases that are with workers
    drained: bool = False  # a worker has gone on, as nothing was left for it

    def __post_init__(self) -> None:
        if self.length is not None:
            self.end = min(self.end, self.length)

    @property
    def new(self) -> float:
        """How many were never given."""
        return self.end - self.next

    @property
    def over(self) -> bool:
        return not (self.new or self.returned or self.again or self.out)

    def draw(self, worker: int, count: int, kept: int) -> Iterator[int]:
        """Up to ``count`` indices; but for its first one, the worker leaves ``kept`` of those that have not failed."""
        for _ in range(count):
            if len(self.returned) + self.new > (kept if worker in self.had else 0):
                if self.returned:
                    index = heapq.heappop(self.returned)
                else:
                    index, self.next = self.next, self.next + 1
            elif self.again:  # last, so that other points and other workers try them
                index = self.again.pop(0)
            else:
                return
            self.out += 1
            self.had.add(worker)
            yield index


class Leases:
    """All passes of one run, and who has which of their minibatches. ``total`` bounds how many are used, over all passes."""

    def __init__(self, total: int | None = None) -> None:
        self.total, self.done, self.out = total, 0, 0
        self.stopped = False  # a worker has ended the run for all: nothing more is given
        self.skipped = 0  # minibatches that count as done from before the run
        self.epochs: int | None = None  # that the scripts make, as far as a worker has said so
        self.lengths: dict[int, int] = {}  # minibatches in the last pass of each series of an epoch
        self.passes: dict[Key, Pass] = {}
        self.first: dict[int, int] = {}  # all passes of a series before this one are over
        self.over: dict[int, set[int]] = {}  # others that are
        self.held: dict[int, dict[Lease, None]] = {}  # of each worker that is there
        self.at: dict[int, Opening] = {}  # the pass that a worker draws from
        self.reached: dict[int, dict[int, int]] = {}  # the last pass of each series that a worker has opened
        self.starved: set[int] = set()  # workers that have asked in vain, and had nothing of their pass

    # workers

    def join(self, worker: int) -> None:
        """A worker comes; what it had in an earlier life is given back."""
        self.part(worker)
        self.held[worker], self.reached[worker] = {}, {}

    def part(self, worker: int) -> int:
        """A worker goes; how many minibatches it gives back."""
        leases = list(self.held.get(worker, ()))
        self.give_back(worker, leases)
        for known in (self.held, self.reached, self.at):
            known.pop(worker, None)
        self.starved.discard(worker)
        for one in self.passes.values():
            one.had.discard(worker)
        return len(leases)

    def open(self, worker: int, opening: Opening) -> None:
        """A worker draws from a pass from now on. ``ValueError`` where others have it with another length or order."""
        key = series, number = opening.key
        if not self.is_over(key):
            there = self.passes.get(key)
            if there is None:
                self.passes[key] = Pass(opening.length, opening.order)
                if opening.length is not None and series >= 0:
                    self.lengths[series] = opening.length
                self._forget(series, number)
            elif (there.length, there.order) != (opening.length, opening.order):
                raise ValueError(_differs(opening, there))
            elif self.passes[key].over:  # an empty one
                self._close(key)
        self.at[worker] = opening
        reached = self.reached.setdefault(worker, {})
        reached[series] = max(number, reached.get(series, number))

    def end(self, key: Key, length: int) -> None:
        """A pass has only so many minibatches, as a worker has found."""
        there = self.passes.get(key)
        if there is not None and 0 <= length < there.end:
            there.end = length
            there.next = min(there.next, length)
            there.returned = [i for i in there.returned if i < length]
            heapq.heapify(there.returned)
            self._close(key)

    def skip(self, key: Key, count: int) -> None:
        """The first ``count`` minibatches of a pass were used before the run, if it has given none of it."""
        there = self.passes.get(key)
        if there is not None and there.next == 0:
            there.next = int(min(count, there.end))
            self.skipped += there.next
            self._close(key)

    # leases

    def take(self, worker: int, count: int, fed: bool = True, own: bool = False) -> Grant:
        """Up to ``count`` minibatches for a worker, of the pass that it has opened; ``fed``: it has had some of it; ``own``:
        it takes none of another pass.
        """
        opening = self.at.get(worker)
        if self.total is not None:
            count = min(count, self.total - self.done - self.out)
        if self.stopped or opening is None or worker not in self.held or count < 1:
            return Grant([])
        mine = self.passes.get(opening.key)
        if mine is not None and (taken := self._draw(worker, opening.key, count)):
            self.starved.discard(worker)
            return Grant(taken, mine.order)
        if mine is not None:
            mine.drained = True
        alike = sorted(
            number
            for (series, number), there in self.passes.items()
            if series == opening.series and number != opening.number and there.length == opening.length is not None
        )
        for number in [] if own else alike:
            key, there = (opening.series, number), self.passes[opening.series, number]
            late = number > opening.number
            if (not fed if late else there.drained) and (taken := self._draw(worker, key, 1 if late else count)):
                self.starved.discard(worker)
                return Grant(taken, there.order)
        if fed:
            return Grant([])
        self.starved.add(worker)
        series, number = opening.key
        others = (w for w in self.held if w != worker and w not in self.starved)
        return Grant([], wait=any(self.reached[w].get(series, -1) >= number for w in others))

    def use(self, worker: int, leases: Iterable[Lease]) -> None:
        """A worker has used minibatches."""
        for _, _, key in self._take_in(worker, leases):
            self.done += 1
            self._close(key)

    def give_back(self, worker: int, leases: Iterable[Lease]) -> None:
        """A worker does not use minibatches that it was given."""
        for there, index, key in self._take_in(worker, leases):
            if there is None:
                continue
            if index in there.failed:
                there.again.append(index)
            elif index < there.end:
                heapq.heappush(there.returned, index)
            self._close(key)

    def fail(self, worker: int, leases: Iterable[Lease]) -> list[Lease]:
        """What a worker has made of minibatches was not finite. Those that are set aside for that, as it is the second time."""
        aside = []
        for there, index, key in self._take_in(worker, leases):
            if there is None:
                continue
            if key == TASK.key:
                heapq.heappush(there.returned, index)
            elif index in there.failed:
                there.failed.discard(index)
                aside.append(Lease(*key, index))
                self._close(key)
            else:
                there.failed.add(index)
                there.again.append(index)
        return aside

    def is_over(self, key: Key) -> bool:
        """Whether a pass is over."""
        series, number = key
        return number < self.first.get(series, 0) or number in self.over.get(series, ())

    def epoch(self) -> int:
        """The epoch that the run is in."""
        there = {number for series, number in self.passes if series >= 0}
        over = {max([first - 1, *self.over.get(series, ())]) for series, first in self.first.items() if series >= 0}
        last = max(there | over, default=-1)
        return last if last in there else last + 1

    @property
    def expected(self) -> int | None:
        """How many minibatches the whole run uses, as far as that is known: all of ``total``, or of the epochs."""
        epochs = None
        if self.epochs is not None and self.lengths:
            epochs = self.epochs * sum(self.lengths.values()) - self.skipped
        return min((n for n in (self.total, epochs) if n is not None), default=None)

    # what is said over links, and kept

    def hear(self, worker: int, note: dict[str, Any]) -> dict[str, Any]:
        """What a worker says of its minibatches, and the answer. ``ValueError`` where it makes no sense."""
        self.give_back(worker, leases_in(note.get("back")))
        end, want = note.get("end"), note.get("want", 0)
        if note.get("open") is not None:
            opening = _opening(note["open"])
            try:
                self.open(worker, opening)
            except ValueError as differs:
                return {"leases": [], "refused": str(differs)}
        if end is not None and worker in self.at:
            if type(end) is not int:
                raise ValueError(f"a pass of {str(end)[:100]} minibatches")
            self.end(self.at[worker].key, end)
        if type(skip := note.get("skip")) is int and skip > 0 and worker in self.at:
            self.skip(self.at[worker].key, skip)
        self.stopped |= note.get("stop") is True
        if note.get("epoch"):
            if type(epochs := note.get("of")) is int and epochs > 0:
                self.epochs = max(epochs, self.epochs or 0)  # a script that goes on by its own checkpoint makes fewer
            return {"epoch": self.epoch(), "stopped": self.stopped}
        want = want if type(want) is int and 0 <= want <= 10_000 else 1
        grant = self.take(worker, want, note.get("fed") is not False, bool(note.get("own")))
        here = self.at.get(worker)
        other = {"order": grant.order} if grant.leases and here is not None and grant.order != here.order else {}
        return {"leases": grant.leases, **other, **({"wait": True} if grant.wait else {})}

    def state(self) -> dict[str, Any]:
        """All of it, for a snapshot; what is with workers counts as given back."""
        held = [lease for leases in self.held.values() for lease in leases]
        passes = [
            {
                "key": list(key),
                "length": there.length,
                "order": there.order,
                "end": None if there.end == math.inf else there.end,
                "next": there.next,
                "returned": there.returned + [i for *k, i in held if tuple(k) == key and i not in there.failed],
                "again": there.again + [i for *k, i in held if tuple(k) == key and i in there.failed],
                "failed": sorted(there.failed),
                "drained": there.drained,
            }
            for key, there in self.passes.items()
        ]
        over = {series: sorted(numbers) for series, numbers in self.over.items()}
        return {
            "done": self.done,
            "passes": passes,
            "first": dict(self.first),
            "over": over,
            "skipped": self.skipped,
            "stopped": self.stopped,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`, with nobody there."""
        self.done, self.first = state["done"], dict(state["first"])
        self.skipped, self.stopped = state.get("skipped", 0), state.get("stopped", False)
        self.over = {series: set(numbers) for series, numbers in state["over"].items()}
        for about in state["passes"]:
            there = self.passes[about["key"][0], about["key"][1]] = Pass(about["length"], about["order"])
            there.end, there.next = math.inf if about["end"] is None else about["end"], about["next"]
            there.returned, there.again = sorted(about["returned"]), list(about["again"])
            there.failed, there.drained = set(about["failed"]), about["drained"]

    def _draw(self, worker: int, key: Key, count: int) -> list[Lease]:
        """Up to ``count`` leases of a pass that is not over, but for those that are kept for others."""
        (series, number), there = key, self.passes[key]
        on = max(reached.get(series, -1) for reached in self.reached.values()) > number + 1
        at = {w: reached.get(series, math.inf if series > 0 else -1) for w, reached in self.reached.items()}
        kept = sum(w not in there.had and at[w] <= number for w in self.held if w != worker)
        leases = [Lease(series, number, index) for index in there.draw(worker, count, 0 if on else kept)]
        self.held[worker].update(dict.fromkeys(leases))
        self.out += len(leases)
        return leases

    def _take_in(self, worker: int, leases: Iterable[Lease]) -> Iterator[tuple[Pass | None, int, Key]]:
        """Leases of a worker that end: the pass, if it is not over, the index and the pass's key."""
        held = self.held.get(worker, {})
        for lease in leases:
            if lease not in held:
                continue
            del held[lease]
            self.out -= 1
            there = self.passes.get(lease.key)
            if there is not None:
                there.out -= 1
            yield there, lease.place, lease.key

    def _close(self, key: Key) -> None:
        """A pass of which nothing is left is over."""
        series, number = key
        if key in self.passes and self.passes[key].over:
            del self.passes[key]
            over, first = self.over.setdefault(series, set()), self.first.get(series, 0)
            over.add(number)
            while first in over:
                over.discard(first)
                first += 1
            self.first[series] = first

    def _forget(self, series: int, newest: int) -> None:
        """Passes that were left long ago are over."""
        here = {opening.key for opening in self.at.values()}
        for key, there in list(self.passes.items()):
            if key[0] == series and key[1] < newest - KEPT and key not in here and not there.out:
                del self.passes[key]
                self.over.setdefault(series, set()).add(key[1])
        if len(self.over.get(series, ())) > KEPT:
            self.first[series] = first = min(number for other, number in self.passes if other == series)
            self.over[series] = {number for number in self.over[series] if number > first}


def remedy(leases: Iterable[Lease]) -> str:
    """What to do about something that is not finite and was made of minibatches."""
    named = [str(lease) for lease in leases if lease.key != TASK.key]
    rate = "lower the learning rate or lengthen the warm-up"
    if not named:
        return f"{rate}, or look for what is not finite in the data"
    more = f" and {len(named) - 8} more" if len(named) > 8 else ""
    return f"look for what is not finite in the data of {', '.join(named[:8])}{more}, or {rate}"


def leases_in(note: Any) -> list[Lease]:
    """The leases in a note; what is none is left out."""
    found = note if isinstance(note, list) else []
    return [Lease(*n) for n in found if isinstance(n, list | tuple) and len(n) == 3 and all(type(k) is int for k in n)]


def _opening(note: Any) -> Opening:
    if isinstance(note, list | tuple) and len(note) == 4:
        opening = Opening(*note)
        whole = all(type(n) is int for n in opening[:2]) and opening.number >= 0
        if whole and type(opening.length) in (int, type(None)) and isinstance(opening.order, str):
            return opening
    raise ValueError(f"a pass {str(note)[:100]}")


def _differs(opening: Opening, there: Pass) -> str:
    """Why a worker's pass is refused, and what to write instead."""
    what = f"pass {opening.number}" if opening.series == COUNTED else f"the pass of epoch {opening.number}"
    kind, theirs = opening.order.partition(" ")[0], there.order.partition(" ")[0]
    if kind != theirs:
        return f"shard: {what} is over a {kind} at this worker and over a {theirs} at others: start the same script everywhere"
    if opening.length != there.length:
        return (
            f"shard: {what} has {opening.length} minibatches at this worker and {there.length} at others: all workers need the "
            "same data set and the same batch_size (a slower worker gets fewer minibatches anyway), and the same passes in the "
            "same order"
        )
    if kind == "stream":
        return (
            f"shard: {what} begins with another item at this worker than at others, so that every n-th item is not a part of "
            "one order: give shard the DataLoader itself, or items in the same order everywhere; where each worker has data of "
            "its own, go over them without shard"
        )
    return (
        f"shard: {what} begins with other minibatches at this worker than at others. All workers must list the same order: "
        "shard seeds the global random numbers of torch, Python and numpy, and generators that loader and samplers have as "
        "attributes. Draw from those, and let the order not depend on time, process, worker or the passes before"
    )
