"""The record of a run: a header that reproduces it, one event for each gradient, and what happened to the workers.

On disk a trace is JSON lines: the header, then events and incidents as they occurred. What is no finite number is null
there, and nan when it is read. A method's own figures stand beside the columns; one that is named as something else
in a line is in an object ``extra``.
"""

from __future__ import annotations

import json
import math
import struct
import warnings
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from . import formats
from .plain import dumps, numbers


class Event(NamedTuple):
    """One gradient at the moment it took effect."""

    seconds: float  # virtual (or real) seconds since the start
    worker: int
    step: int  # this worker's gradients before this one
    lag: int  # updates of the master between what the worker read and now
    gap: float  # RMSE between the master's point and the point the gradient was taken at
    normalised_gap: float  # mean over parameters of |master - point| / root-mean-square update of that parameter
    loss: float  # minibatch loss at that point
    compute: float = 0.0  # seconds that the gradient took
    waited: float = 0.0  # seconds for which the worker had waited, since its last gradient, before it began this one
    sent: float = 0.0  # bytes that the worker has sent since its last event
    transit: float = 0.0  # mean seconds from sending to arrival of what has come to the worker since its last event
    extra: dict[str, float] = {}  # noqa: RUF012 - the method's own figures; nobody writes into it


class Incident(NamedTuple):
    """Something that happened to a worker."""

    seconds: float
    worker: int
    what: str  # joined, left, crashed, diverged, set aside (minibatches of which no gradient was finite)
    lost: int = 0  # gradients that it was at, or was bringing: somebody else takes them
    undone: int = 0  # gradients that were taken, and whose effect nobody else had yet


class Evaluation(NamedTuple):
    """The problem's figures for the model that would have been shipped then."""

    seconds: float
    gradients: int
    figures: dict[str, float]


class Deeds(NamedTuple):
    """What a peer of a real run did and met, in its order: enough to do it again. See `engines.replay`."""

    worker: int
    life: int
    deeds: list[list[Any]]


class Load(NamedTuple):
    """What a process of a real run has had of its machine's processors, all in seconds since some time of its own: what counts
    is what two of them that follow each other differ by."""

    seconds: float
    worker: int  # -1: the server, or the coordinator
    gradients: int  # the worker's own; at a server all that were brought to it
    wall: float
    processor: float  # of the process, all its threads and its children
    exchange: float  # of these, those between gradients
    queued: float  # in which one of its threads was ready to run and had no core; nan: the system does not say
    busy: float  # of the whole machine, all processes; nan: the system does not say
    cores: int  # that the process may use
    machine: str  # the same for all processes of a machine


Note = Incident | Evaluation | Deeds | Load

_COLUMNS = {name: k for k, name in enumerate(Event._fields[:-1])}
_ROW = struct.Struct(f"{len(_COLUMNS)}d")
_WHOLE = ("worker", "step", "lag")  # columns of whole numbers, which a double holds exactly up to 2**53
_TAKEN = (*Event._fields, "incident", "evaluation", "deeds", "load", "format")  # names that mean something in a line


def line(what: Event | Note | dict[str, Any]) -> str:
    """One line of a trace file: an event, a note, or the header."""
    if isinstance(what, dict):
        return dumps({"format": formats.TRACE, **what})
    fields = what._asdict()
    if isinstance(what, Event):
        extra = fields.pop("extra")
        apart = {name: value for name, value in extra.items() if name in _TAKEN}
        fields |= {name: value for name, value in extra.items() if name not in apart}
        return dumps(fields | ({"extra": apart} if apart else {}))
    return dumps({type(what).__name__.lower(): fields})


class Trace(Sequence[Event]):
    """A sequence of events; ``trace.column("loss")`` is one quantity of all of them as a tensor."""

    def __init__(self, header: dict[str, Any] | None = None) -> None:
        self.header: dict[str, Any] = header or {}
        self.cut = ""  # what was left out of the file that it was read from; empty: nothing
        self._notes: list[tuple[int, Note]] = []  # and after how many events
        self._rows = array("d")  # events one after the other, without their own figures
        self._extra: dict[str, array[float]] = {}

    def add(self, event: Event) -> None:
        self.extend(event[:-1])
        extra = event.extra
        if extra or self._extra:
            for name in extra:
                if name not in self._extra:
                    self._extra[name] = array("d", [math.nan] * (len(self) - 1))
            for name, figures in self._extra.items():
                figures.append(extra.get(name, math.nan))

    def extend(self, row: tuple[float, ...]) -> None:
        """`add` an event of a run whose method has no figures of its own, which ``row`` leaves out."""
        self._rows.frombytes(_ROW.pack(*row))

    def note(self, note: Note) -> None:
        """Record something that is no gradient."""
        self._notes.append((len(self), note))

    @property
    def incidents(self) -> list[Incident]:
        """What happened to workers, in order."""
        return [note for _, note in self._notes if isinstance(note, Incident)]

    @property
    def evaluations(self) -> list[Evaluation]:
        """How good the shipped model was, in order."""
        return [note for _, note in self._notes if isinstance(note, Evaluation)]

    @property
    def loads(self) -> list[Load]:
        """What processes have had of their processors, about once a second each, in order."""
        return [note for _, note in self._notes if isinstance(note, Load)]

    @property
    def columns(self) -> tuple[str, ...]:
        """The names that `column` knows: the fields of `Event`, and the method's own figures (``extra.loss`` for one that
        is named like a field)."""
        return (*_COLUMNS, *(f"extra.{name}" if name in _COLUMNS else name for name in self._extra))

    def column(self, name: str) -> Tensor:
        """One quantity of all events: int64 for worker, step and lag, else float64. [events]"""
        if name not in self.columns:
            raise KeyError(f"the trace has no column {name!r}; it has {', '.join(self.columns)}")
        if name in _COLUMNS:
            data = self._rows[_COLUMNS[name] :: len(_COLUMNS)]
        else:
            data = self._extra[name if name in self._extra else name.removeprefix("extra.")]
        return torch.tensor(data, dtype=torch.float64).to(torch.int64 if name in _WHOLE else torch.float64)

    def __len__(self) -> int:
        return len(self._rows) // len(_COLUMNS)

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> list[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | list[Event]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = range(len(self))[index] * len(_COLUMNS)
        values: dict[str, Any] = dict(zip(_COLUMNS, self._rows[start : start + len(_COLUMNS)], strict=True))
        values |= {name: int(values[name]) for name in _WHOLE}
        return Event(**values, extra={name: column[index] for name, column in self._extra.items()})

    def __iter__(self) -> Iterator[Event]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        """Same header, same incidents, and bit for bit the same events."""
        return isinstance(other, Trace) and list(self._lines()) == list(other._lines())

    __hash__ = None  # type: ignore[assignment]

    def entries(self) -> Iterator[Event | Note]:
        """Events and notes, as they occurred."""
        notes = list(reversed(self._notes))
        for count, event in enumerate(self):
            while notes and notes[-1][0] <= count:
                yield notes.pop()[1]
            yield event
        yield from (note for _, note in reversed(notes))

    def _lines(self) -> Iterator[str]:
        yield line(self.header)
        yield from map(line, self.entries())

    def write(self, path: str | Path) -> None:
        """Write the trace as JSON lines; floats keep every bit."""
        with open(path, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in self._lines())

    @classmethod
    def read(cls, path: str | Path) -> Trace:
        """The trace in the file ``path``; ``ValueError`` with the line where it is none, `OtherVersion` where another offbeat wrote it.

        A file whose last line is cut, or that has NUL bytes, as after a power cut or on a full disk, is read up to its last
        whole line: `Trace.cut` says so, and a ``UserWarning``.
        """
        trace = cls()
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    trace._take(json.loads(line.decode("utf-8", "surrogateescape")), first=number == 1)
                except formats.OtherVersion as other:
                    raise formats.OtherVersion(f"{path}: {other}") from None
                except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
                    nul, open_end = b"\0" in line, not line.endswith(b"\n")
                    if number > 1 and isinstance(error, json.JSONDecodeError) and (nul or open_end):
                        trace.cut = (
                            f"{path}: line {number} {'has NUL bytes' if nul else 'is cut'}, as after a power cut or on a full "
                            f"disk; the {len(trace)} gradients before it are read, it and {sum(1 for _ in file)} lines after "
                            "it are left out"
                        )
                        warnings.warn(trace.cut, stacklevel=2)
                        return trace
                    raise ValueError(
                        f"{path}, line {number} is no line of an {formats.TRACE!r} file ({error}); "
                        "give a file that `offbeat simulate --out` has written"
                    ) from None
        if not trace.header:
            raise ValueError(f"{path} is empty: it is no {formats.TRACE!r} file")
        return trace

    def _take(self, line: Any, first: bool) -> None:
        if not isinstance(line, dict):
            raise TypeError("it is no object")
        if first:
            versions = line.get("versions")
            writer = str(versions.get("offbeat", "")) if isinstance(versions, dict) else ""
            if not formats.check(line.pop("format", None), formats.TRACE, "it", writer):
                raise ValueError(f"the header does not say {formats.TRACE!r}")
            self.header = line
        elif "incident" in line:
            self.note(Incident(**line["incident"]))
        elif "evaluation" in line:
            about = line["evaluation"]
            self.note(Evaluation(**about | {"figures": numbers(about["figures"])}))
        elif "load" in line:
            self.note(Load(**numbers(line["load"])))  # type: ignore[arg-type]
        elif "deeds" in line:
            self.note(Deeds(**line["deeds"]))
        else:
            extra = line.pop("extra", {}) | {name: line.pop(name) for name in list(line) if name not in _COLUMNS}
            known: dict[str, Any] = numbers(line) | {name: line[name] for name in _WHOLE}  # where null is an error
            self.add(Event(**known, extra=numbers(extra)))
