"""Names: the values of the library that can be written as text, on the command line or in the header of a trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .core.descent import Rule
from .core.master import Correction
from .core.method import Method
from .core.schedule import Schedule
from .core.topology import Topology
from .core.values import parse
from .engines.cluster import Cluster, MemberEvent
from .engines.faults import Fault
from .engines.network import Link, Network
from .engines.processors import Machines
from .engines.speed import Speed
from .tasks import TASKS

KINDS = (Method, Correction, Rule, Schedule, Topology, Speed, MemberEvent, Fault)
"""The base classes of what can be named; a class under one of them is found, if it is the library's or has been imported."""


def names() -> dict[str, Callable[..., Any]]:
    """Every constructor by its class name; the library's come before a user's own of the same name."""
    found = sorted((cls for kind in KINDS for cls in _concrete(kind)), key=_ours)
    return {cls.__name__: cls for cls in (*found, Cluster, Network, Link, Machines, *TASKS.values())}


def read(text: str, known: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """The value that ``text`` describes, of the constructors in ``known`` (None: of the library); else ``ValueError``."""
    try:
        return parse(text, names() if known is None else known)
    except (TypeError, RecursionError) as error:  # a constructor's arguments, or brackets beyond reason
        raise ValueError(f"cannot read the value {text[:200]!r}: {error}") from None


def _concrete(kind: type[Any]) -> Iterator[type[Any]]:
    for cls in kind.__subclasses__():
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_"):
            yield cls
        yield from _concrete(cls)


def _ours(cls: type[Any]) -> bool:
    return cls.__module__.partition(".")[0] == __package__
