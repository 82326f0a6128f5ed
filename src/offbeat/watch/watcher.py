"""Watches one run: reads its folder a few times a second, serves its page, and feeds trackers."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..plain import dumps
from ..tracking import Tracker
from ..tracking.feed import Feed
from . import picture
from .follow import Follower, Tail
from .status import Status
from .view import View
from .web import Web

PAUSE = 0.25
"""Seconds between two looks into the folder."""
KEPT = 0.5
"""Seconds for which what was made for one page is good enough for the others."""
PARAMETERS = ("method", "problem", "gradients", "seed", "parameters", "dtype", "transport", "engine", "shard")
"""What the header of a trace says of a run that trackers get as its parameters."""


def check(folder: Path) -> None:
    """``ValueError`` unless a run is in ``folder``, or begins there."""
    if any((folder / name).exists() for name in ("trace.jsonl", "shard-0", "status.json", "logs")):
        return
    what = "has no trace.jsonl" if folder.is_dir() else "is not there"
    raise ValueError(
        f"{folder} holds no run: it {what}; give the folder that `offbeat launch` or `offbeat server` writes to (--out, or the last of "
        "runs/launch, runs/launch-2, ...)"
    )


class Watcher:
    """Watches the run in ``folder``; a page is served at ``listener``, trackers by name are fed."""

    def __init__(
        self,
        folder: Path,
        listener: socket.socket | None = None,
        token: str = "",
        trackers: Mapping[str, type[Tracker]] | None = None,
    ) -> None:
        self.folder, self.trackers = folder, trackers or {}
        self.view, self.status = View(), Status()
        self._guard = threading.Lock()  # of the view, which requests read
        self._log: deque[str] = deque(maxlen=picture.SHOWN)  # the launcher's last lines
        self._launcher = Tail(folder / "logs" / "launch.log")
        self._place = folder
        self._follower = Follower(folder)
        self._feed: Feed | None = None
        self._made = -1.0, ""  # when, and what a page was told last
        self._web = None if listener is None else Web(listener, self._state, self._metrics, token)

    def run(self, go_on: Callable[[], bool], tell: Callable[[Status], None] = lambda status: None) -> None:
        """Watch for as long as ``go_on`` says so, then read what has come, and close trackers. ``tell`` gets the status about four
        times a second."""
        web = self._web
        if web is not None:
            threading.Thread(target=web.serve_forever, name="the page", daemon=True).start()
        try:
            while go_on():
                if not self.look():
                    tell(self.status)
                    time.sleep(PAUSE)
            while self.look():
                pass
        finally:
            if self._feed is not None:
                self._feed.close()
            if web is not None:
                web.shutdown()
                web.server_close()

    def look(self) -> bool:
        """Read what is new; whether there may be more at once."""
        if not self.view.header and (shard := self.folder / "shard-0").is_dir() and self._place != shard:
            self._place, self._follower = shard, Follower(shard)
        status = Status.read(self._place)  # before the trace, so that one that is over has all of it
        entries = self._follower.read()
        lines = self._launcher.read()
        with self._guard:
            if self._follower.again:
                self.view = View()
            for entry in entries:
                self.view.take(entry)
            self._log.extend(line.decode(errors="replace") for line in lines)
            self.status = status
        if self.trackers:
            self._track(entries, self._follower.again)
        return bool(entries)

    def _track(self, entries: list[dict[str, Any]], again: bool) -> None:
        if self._feed is None:
            if not self.view.header:
                return
            about = {name: self.view.header[name] for name in PARAMETERS if self.view.header.get(name) is not None}
            launched = self.status.said.get("launched")
            about |= {} if launched is None else {"workers": launched}
            self._feed = Feed(self.trackers, self.folder, self.folder.resolve().name, about)
        self._feed.take(entries, again)

    def _state(self) -> str:
        with self._guard:
            made, text = self._made
            if time.monotonic() - made > KEPT:
                text = dumps(picture.picture(self.view, self.status, str(self.folder), list(self._log)))
                self._made = time.monotonic(), text
            return text

    def _metrics(self) -> str:
        with self._guard:
            return picture.metrics(self.view, self.status)
