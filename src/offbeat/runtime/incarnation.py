"""One life of a peer, from its word with the coordinator until it leaves, fails or is lost: what all its threads share."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from .exit import WorkerThread
from .link import LinkLost
from .protocol.wire import Header, Kind


class Incarnation:
    """Who a peer is in one of its lives, who else lives, what it has done, and whether it is over. ``monitor`` guards all of it,
    and the state of the method's loop; `changed` tells of every change."""

    def __init__(self, monitor: threading.RLock, log: logging.Logger) -> None:
        self.monitor, self.log = monitor, log
        self.changed = threading.Condition(monitor)
        self.over = threading.Event()
        self.lost = ""  # why it cannot go on
        self.failure: BaseException | None = None  # of a thread or a handler: another life would not cure it
        self.head = Header(Kind.HELLO)  # of its frames
        self.link: Any = None  # to the coordinator
        self.host, self.timeout, self.transport = "", 0.0, ""
        self.alive: dict[int, dict[str, Any]] = {}  # the others: see `Seat.about`
        self.replies: deque[Any] = deque()  # of the coordinator
        self.deeds: list[list[Any]] = []  # for a replay, since the coordinator was last told
        self.sent = 0  # bytes of payload, since then
        self._ends: list[Callable[[], None]] = []

    def did(self, *deed: Any) -> None:
        """Remember what it did, for a replay."""
        with self.monitor:
            self.deeds.append(list(deed))

    def place(self, worker: int) -> str | None:
        """Where another peer is: "in" where it takes part; None where it does not live."""
        about = self.alive.get(worker)
        return None if about is None else str(about["place"])

    def check(self, what: str) -> None:
        """Raise `LinkLost` where this life cannot go on; ``what`` was about to be done, for the message."""
        if self.lost:
            raise LinkLost(f"{self.lost}; {what}")

    def wait(self, what: str, seconds: float = 1.0) -> None:
        """Wait for a change; raises `LinkLost` where the coordinator is gone. Under the monitor."""
        self.check(f"{what} was waited for")
        self.changed.wait(seconds)

    def answered(self, what: str) -> Any:
        """The coordinator's next answer, which is called ``what`` in the message of `LinkLost`."""
        with self.changed:
            while not self.replies:
                self.wait(what)
            return self.replies.popleft()

    def spawn(self, run: Callable[..., None], *about: Any) -> None:
        """Run in a thread of its own, which ends with this life. The peer's loop raises what it raises."""

        def guarded() -> None:
            try:
                run(*about)
            except BaseException as error:
                self.fail(error)

        WorkerThread(self.over, guarded).start()

    def fail(self, error: BaseException) -> None:
        """End the worker, if this life is not over: its loop raises ``error`` as soon as it waits or sends."""
        with self.changed:
            if self.over.is_set():
                return
            error.add_note(f"raised in a thread of worker {self.head.worker}, which cannot go on")
            self.failure = self.failure or error
            self.lost = self.lost or f"worker {self.head.worker} has failed ({error!r})"
            self.changed.notify_all()
        self.link.hang_up()

    def at_end(self, act: Callable[[], None]) -> None:
        """Have ``act`` done when this life ends. It must not raise."""
        self._ends.append(act)

    def end(self) -> None:
        """End this life: its threads see it."""
        with self.changed:
            self.over.set()
            self.lost = self.lost or "this life is over"
            while self._ends:
                self._ends.pop()()
            self.changed.notify_all()

    def beat(self, pause: float) -> None:
        """Tell the coordinator every ``pause`` seconds that this peer lives, until it does not."""
        with contextlib.suppress(LinkLost, ValueError):
            while not self.over.wait(pause):
                self.link.beat(self.head)
