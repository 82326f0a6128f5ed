"""The process that `beside` starts."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path

from ..log import Lines, lines_to
from ..tracking import find
from .watcher import Watcher


def main(what: str) -> None:
    about = json.loads(what)
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    listener = socket.socket(fileno=about["files"][0]) if about["files"] else None
    with lines_to(Lines("%(message)s")):
        trackers = {name: find(name) for name in about["track"]}
        watcher = Watcher(Path(about["folder"]), listener, os.environ.get("OFFBEAT_TOKEN", ""), trackers)
        try:
            watcher.run(lambda: not told and os.getppid() == about["parent"])
        except Exception as error:
            logging.getLogger("offbeat.watch").exception(f"the watcher failed ({error!r}): the run goes on without it")


if __name__ == "__main__":
    main(sys.argv[1])
