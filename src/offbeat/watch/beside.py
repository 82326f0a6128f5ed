"""A process beside a run that watches it: whatever becomes of it, the run goes on, and it ends with the process that has started it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..plain import dumps
from ..tracking import find
from ..tracking.feed import CLOSING
from .follow import Tail
from .web import listen, url

LOG = "watch.log"


def check(
    page: str | None, track: Sequence[str], token: str
) -> Callable[[Path], contextlib.AbstractContextManager[Callable[[], None]]]:
    """What starts a watcher of the run in a folder, once it is clear that it can be: the port is taken, trackers are there.

    The context that it makes gives a function to call now and then, which passes on what the watcher says. ``ValueError`` or
    ``ImportError`` for what cannot be.
    """
    listener = None if page is None else listen(page, token)
    for name in track:
        find(name)

    @contextlib.contextmanager
    def watched(folder: Path) -> Iterator[Callable[[], None]]:
        if listener is None and not track:
            yield lambda: None
            return
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        log = logging.getLogger("offbeat.watch")
        said = Tail(folder / "logs" / LOG)
        while said.read():
            pass  # what others have said before

        def pass_on() -> None:
            for line in said.read():
                log.warning(line.decode(errors="replace"))

        with open(folder / "logs" / LOG, "ab") as file:
            files = [] if listener is None else [listener.fileno()]
            what = {"folder": str(folder), "files": files, "track": list(track), "parent": os.getpid()}
            process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.process", dumps(what)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                pass_fds=files,
                start_new_session=True,  # Ctrl-C is for the run, which ends first
            )
        if listener is not None:
            log.info(f"the page is at {url(listener)}")
            listener.close()
        try:
            yield pass_on
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(CLOSING + 10.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            pass_on()

    return watched
