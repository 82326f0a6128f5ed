"""A table as a file."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import Tracker


class CSV(Tracker):
    """``metrics.csv`` in the run's folder: a row each time, a column for each figure; ``parameters.csv`` beside it."""

    def __init__(self, folder: Path, name: str, parameters: Mapping[str, Any]) -> None:
        self._path, self._columns = folder / "metrics.csv", ["gradients", "seconds"]
        with open(folder / "parameters.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("parameter", "value"), ("name", name), *parameters.items()])
        self._write([])

    def log(self, figures: Mapping[str, float], gradients: int, seconds: float) -> None:
        row = {"gradients": gradients, "seconds": seconds, **figures}
        if new := [name for name in row if name not in self._columns]:  # such as those of the first evaluation
            with open(self._path, newline="", encoding="utf-8") as file:
                before = list(csv.DictReader(file))
            self._columns += new
            self._write(before)
        with open(self._path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _write(self, rows: list[dict[str, str]]) -> None:
        with open(self._path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
