"""What a benchmark leaves: its rows, and what they were measured with; as JSON, as a table of text."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import torch

import offbeat

from .measure import Row

OUT = Path("runs/bench")


@dataclass(frozen=True)
class Record:
    """The answer to one question."""

    name: str
    question: str
    rows: tuple[Row, ...]
    seconds: float
    """How long it took."""
    command: str
    date: str
    """The day, as year-month-day."""
    machine: Mapping[str, str]
    versions: Mapping[str, str]

    @classmethod
    def new(cls, name: str, question: str, rows: Sequence[Row], seconds: float) -> Self:
        """What was measured just now, here."""
        versions = {"offbeat": offbeat.__version__, "torch": torch.__version__, "python": platform.python_version()}
        day = datetime.now(UTC).date().isoformat()
        return cls(name, question, tuple(rows), seconds, f"python -m benchmarks {name}", day, machine(), versions)

    @classmethod
    def read(cls, path: Path) -> Self:
        """What `write` has left."""
        said = json.loads(path.read_text(encoding="utf-8"))
        rows = (
            {**row, "values": tuple(math.nan if value is None else value for value in row["values"])}
            for row in said.pop("rows")
        )
        return cls(rows=tuple(Row(**row) for row in rows), **said)

    def write(self, folder: Path) -> None:
        """As ``NAME.json``; null is what is not a number."""
        said = asdict(self)
        for row in said["rows"]:
            row["values"] = [None if math.isnan(value) else value for value in row["values"]]
        text = json.dumps(said, indent=1, allow_nan=False)
        (folder / f"{self.name}.json").write_text(text + "\n", encoding="utf-8")

    def table(self) -> list[tuple[str, ...]]:
        """A line for each row, after the titles; columns in which nobody says anything are left out."""
        lines = [("", "what", "unit", "min", "median", "max", "aim", "note")]
        group = ""
        for row in self.rows:
            head, group = row.group if row.group != group else "", row.group
            values = (show(row.low), show(row.median), show(row.high))
            lines.append((head, row.what, row.unit, *values, "" if row.aim is None else show(row.aim), row.note))
        said = [any(line[i] for line in lines[1:]) for i in range(len(lines[0]))]
        return [tuple(text for text, there in zip(line, said, strict=True) if there) for line in lines]


def show(value: float) -> str:
    """A figure to three digits; a dash where it is not a number."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        said = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = said[0] if said else model
    found = {"processor": model, "cores": str(os.cpu_count()), "system": f"{platform.system()} {platform.machine()}"}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
