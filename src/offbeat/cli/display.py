"""What the terminal shows: tables, progress, the board of a real run; and the page."""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from ..trace import Event

out = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def shown(what: object) -> str:
    """A text or a path as the terminal can show it: no markup, and bytes that are no UTF-8 written out."""
    return escape(printable(str(what)))


def printable(text: str) -> str:
    """``text`` without the surrogates that stand for bytes which are no UTF-8: they are written out."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def table(titles: Sequence[str], lines: Sequence[Sequence[str]], right: Sequence[int] | None = None) -> Table:
    """A table; the columns ``right`` are aligned there (None: all but the first)."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for i, title in enumerate(titles):
        aligned = i > 0 if right is None else i in right
        table.add_column(escape(title), justify="right" if aligned else "left")
    for line in lines:
        table.add_row(*map(escape, line))
    return table


def page(result: Any, folder: Path) -> None:
    try:
        from .. import report
    except ImportError as error:
        err.print(f"no page: {shown(error)}, then offbeat report {shown(shlex.quote(str(folder)))}")
        return
    out.print(f"page: {shown(report.page(result, folder))}", soft_wrap=True)


def command_line(argv: Sequence[str]) -> str:
    return printable(shlex.join(["offbeat", *argv]))


Tell = Callable[[int, str], None]


@contextmanager
def progress(total: int) -> Iterator[Tell]:
    """A function to call with the gradients that are done and a remark that follows: a bar, or lines where there is no
    terminal."""
    start = time.monotonic()
    due = 0.0
    if not err.is_terminal or os.environ.get("CI"):

        def line(done: int, remark: str) -> None:
            nonlocal due
            if done >= due:
                due = total * (10 * done // total + 1) / 10
                rate = done / max(1e-9, time.monotonic() - start)
                err.print(f"{done:,} of {total:,} gradients, {rate:,.0f}/s{escape(remark)}")

        due = total / 10
        yield line
        return

    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=err, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("", total=total)

        def move(done: int, remark: str) -> None:
            nonlocal due
            now = time.monotonic()
            if now >= due or done >= total:
                due = now + 0.25
                rate = done / max(1e-9, now - start)
                bar.update(task, completed=done, description=f"{done:,} of {total:,}, {rate:,.0f}/s{escape(remark)}")
                bar.refresh()

        yield move


def watching(tell: Tell) -> Callable[[Event], None]:
    """Tells how many events there were, and their running mean loss if they have one."""
    done, loss = 0, 0.0

    def watch(event: Event) -> None:
        nonlocal done, loss
        done += 1
        if math.isfinite(event.loss):
            loss += (event.loss - loss) * max(1 / done, 0.02)
        tell(done, f", loss {loss:.3g}" if loss else "")

    return watch


def headline(status: dict[str, Any]) -> str:
    """A run's status in a line: what is done of what there is, how fast, how long it will take, and by how many workers."""
    done, total, alive = status["minibatches"], status["total"], len(status["workers"])
    rate = sum(w["rate"] for w in status["workers"] if w["rate"] == w["rate"])
    parts = [f"{done:,} of {total:,} minibatches" if total else f"{status['gradients']:,} gradients", f"{rate:,.3g}/s"]
    if total and rate and done < total:
        ahead = (total - done) / (rate * max(1.0, done / max(1, status["gradients"])))
        parts.append(f"{timedelta(seconds=round(ahead))} left")
    parts.append(f"{alive} of {max(alive, status['launched'])} workers")
    return ", ".join(parts + ([status["ending"]] if status["ending"] else []))


@contextmanager
def board() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A function to call with a run's status: a live table, or lines where there is no terminal."""
    from ..experiment import show  # brings torch

    if not err.is_terminal or os.environ.get("CI"):
        due = 0.0

        def line(status: dict[str, Any]) -> None:
            nonlocal due
            if time.monotonic() >= due:
                due = time.monotonic() + 5
                err.print(headline(status))

        yield line
        return
    with Live(console=err, auto_refresh=False, transient=True) as live:

        def draw(status: dict[str, Any]) -> None:
            titles = ["worker", "life", "gradients", "per second", "lag", "gap", "loss", "last seen, s"]
            names = ("worker", "life", "gradients", "rate", "lag", "gap", "loss", "seen")
            lines = [[show(name, float(w[name])) for name in names] for w in status["workers"]]
            refused = f", {status['refused']} refused" if status["refused"] else ""
            head = f"{headline(status)}, {timedelta(seconds=round(status['seconds']))} so far{refused}"
            live.update(Group(head, table(titles, lines)), refresh=True)

        yield draw
