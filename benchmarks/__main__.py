"""Run the benchmarks: ``python -m benchmarks [NAME ...]``; all of them without a name.

Each is a module of this folder with a function ``run`` that gives rows. Prints a table, and leaves ``NAME.json`` and
``NAME.png`` in ``runs/bench``.
"""

from __future__ import annotations

import importlib
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table

from offbeat.report import LIGHT, png

from .picture import draw
from .record import OUT, Record


def benchmarks() -> dict[str, ModuleType]:
    """All of them by name."""
    stems = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("__"))
    modules = {stem: importlib.import_module(f"{__package__}.{stem}") for stem in stems}
    return {stem: module for stem, module in modules.items() if hasattr(module, "run")}


def main(names: Sequence[str]) -> None:
    known = benchmarks()
    for name in names:
        if name not in known:
            raise SystemExit(f"{name!r} is no benchmark: choose among {', '.join(known)}")
    OUT.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 140)
    for name in names or known:
        question = (known[name].__doc__ or name).splitlines()[0]
        console.print(f"[bold]{name}[/]: {question}")
        start = time.perf_counter()
        record = Record.new(name, question, known[name].run(), time.perf_counter() - start)
        record.write(OUT)
        (OUT / f"{name}.png").write_bytes(png(partial(draw, record), LIGHT))
        console.print(tabled(record))
        console.print(f"{record.seconds:.0f} s; {OUT / name}.json and .png\n")


def tabled(record: Record) -> Table:
    """The record for the terminal."""
    titles, *lines = record.table()
    table = Table()
    for title in titles:
        table.add_column(title, justify="right" if title in ("min", "median", "max", "aim") else "left")
    for line in lines:
        table.add_row(*line)
    return table


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that whatever was started is ended
    main(sys.argv[1:])
