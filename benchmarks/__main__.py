"""Run the benchmarks: ``python -m benchmarks [NAME ...]``. Prints a table and writes ``runs/bench/NAME.json``."""

from __future__ import annotations

import importlib
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
OUT = Path("runs/bench")


def main() -> None:
    names = sys.argv[1:] or sorted(
        p.stem for p in HERE.glob("*.py") if p.stem not in ("__init__", "__main__", "measure")
    )
    OUT.mkdir(parents=True, exist_ok=True)
    console = Console()
    machine = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    for name in names:
        module = importlib.import_module(f"benchmarks.{name}")
        console.print(f"[bold]{name}[/]: {(module.__doc__ or '').splitlines()[0]}")
        rows = module.run()
        table = Table()
        for column in ("what", "unit", "min", "median", "max"):
            table.add_column(column, justify="left" if column in ("what", "unit") else "right")
        for row in rows:
            table.add_row(
                row.what, row.unit, *(f"{v:,.0f}" if v >= 1000 else f"{v:.3g}" for v in (row.low, row.median, row.high))
            )
        console.print(table)
        (OUT / f"{name}.json").write_text(
            json.dumps({"versions": machine, "rows": [asdict(r) for r in rows]}, indent=1)
        )


if __name__ == "__main__":
    main()
