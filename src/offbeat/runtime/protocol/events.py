"""What the coordinator's machine is told, and what it wants done: events and effects. See `coordinator`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..leases import Lease
from .averages import Seat
from .wire import Kind

# events


@dataclass(frozen=True)
class Came:
    """A peer has said hello, with what others must know of it."""

    seat: Seat


@dataclass(frozen=True)
class Said:
    """A peer says something; with a `Kind.MODEL` comes the model that it shows, None where that is not finite."""

    worker: int
    life: int
    kind: Kind
    note: dict[str, Any]
    step: int = 0
    model: Tensor | None = None


@dataclass(frozen=True)
class Went:
    """A peer's link is over."""

    worker: int
    life: int


@dataclass(frozen=True)
class Passed:
    """Time has passed."""


Event = Came | Said | Went | Passed


# effects


@dataclass(frozen=True)
class SendFrame:
    """Send a peer a frame."""

    worker: int
    kind: Kind
    note: Any = None
    model: Tensor | None = None
    step: int = 0


@dataclass(frozen=True)
class HangUp:
    """A peer's life is over, as it has said itself; ``orderly``: what it began is nobody's loss."""

    worker: int
    orderly: bool


@dataclass(frozen=True)
class Refuse:
    """What a peer has said is not its turn: tell it ``why``, and hang up."""

    worker: int
    why: str


@dataclass(frozen=True)
class Unsound:
    """What a peer shows is not finite: record it, tell it, and hang up."""

    worker: int
    step: int
    what: str


@dataclass(frozen=True)
class Decline:
    """A peer is not given what it has asked for; it is told so already."""

    worker: int
    why: str


@dataclass(frozen=True)
class Log:
    """Say in the log."""

    what: str


@dataclass(frozen=True)
class Wake:
    """Come with `Passed` at this time."""

    at: float


@dataclass(frozen=True)
class Save:
    """Write a snapshot."""


@dataclass(frozen=True)
class RecordSteps:
    """Record so many gradients of a peer, of which ``note`` tells."""

    worker: int
    count: int
    note: dict[str, Any]


@dataclass(frozen=True)
class RecordDeeds:
    """Record what a peer has done."""

    worker: int
    life: int
    deeds: list[Any]


@dataclass(frozen=True)
class RecordSetAside:
    """Record that minibatches are not tried again."""

    worker: int
    leases: list[Lease]


@dataclass(frozen=True)
class RecordDiverged:
    """Record that a peer goes as its numbers are not finite, and of which minibatches they were."""

    worker: int
    step: int
    what: str
    leases: list[Lease]


Effect = (
    SendFrame
    | HangUp
    | Refuse
    | Unsound
    | Decline
    | Log
    | Wake
    | Save
    | RecordSteps
    | RecordDeeds
    | RecordSetAside
    | RecordDiverged
)
