"""The command that watches a run from outside."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..log import Lines, lines_to
from ..plain import numbers
from ..tracking import find
from ..watch.status import Status
from ..watch.watcher import Watcher, check
from ..watch.web import listen, url
from .command import Command, told
from .display import board, err, shown


@dataclass(frozen=True)
class Attach(Command):
    """Watch a run that goes on, or is over, from its folder: in the terminal, as a page, in a tracker. The run does not notice."""

    folder: Positional[Path]
    """Where `offbeat launch` or `offbeat server` writes to, its --out."""
    page: Annotated[str | None, arg(metavar="[HOST:]PORT", help_behavior_hint="(default: none)")] = None
    """Serve a live page, and metrics, at this port of this machine (0: any that is free) until Ctrl-C; beyond it with OFFBEAT_TOKEN set."""
    track: Annotated[tuple[str, ...], arg(metavar="TRACKER [TRACKER ...]")] = ()
    """Where figures go, any of csv, tensorboard, wandb, mlflow, or MODULE:CLASS of your own; from the beginning of the run."""

    @lines_to(Lines())
    def run(self, argv: Sequence[str]) -> int:
        token = os.environ.get("OFFBEAT_TOKEN", "")
        with told():
            check(self.folder)
            trackers = {name: find(name) for name in self.track}
            listener = None if self.page is None else listen(self.page, token)
        if listener is not None:
            err.print(f"offbeat: the page is at {url(listener)}; Ctrl-C ends it, and not the run")
        watcher = Watcher(self.folder, listener, token, trackers)
        try:
            with board() as tell:
                watcher.run(
                    lambda: listener is not None or not watcher.status.over or watcher.look(),
                    lambda status: None if status.over else tell(_numbers(status)),
                )
        except KeyboardInterrupt:
            pass  # as it was said
        view = watcher.view
        how = "is over" if watcher.status.over else f"goes on ({watcher.status.phase})"
        lasted = timedelta(seconds=round(view.seconds))
        err.print(
            f"offbeat: the run in {shown(self.folder)} {how}: {view.gradients:,} gradients in {lasted}, {view.crashes} crashes"
        )
        return 0


def _numbers(status: Status) -> dict[str, object]:
    return status.said | {"workers": [numbers(worker) for worker in status.said["workers"]]}
