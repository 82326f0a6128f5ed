"""What a server says of its run once a second, in a file of the run's folder: for all that watch."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..plain import dumps

FILE = "status.json"
STALE = 10.0
"""Seconds without a new status after which a run counts as silent."""


def write(folder: Path, status: dict[str, Any]) -> None:
    """Replace the file at once, so that no reader sees a part of it. Raises ``OSError``."""
    part = folder / f".{FILE}.part"
    part.write_text(dumps(status), encoding="utf-8")
    os.replace(part, folder / FILE)


@dataclass(frozen=True)
class Status:
    """The last status of a run, with what follows from its age."""

    said: dict[str, Any] = field(default_factory=dict)
    """What the server has said; empty where there is no file: of a simulation, or of a run that has not begun."""
    recorded: bool = False
    """Whether there is a trace."""
    age: float = 0.0
    """Seconds since then."""

    @classmethod
    def read(cls, folder: Path) -> Status:
        path, recorded = folder / FILE, (folder / "trace.jsonl").exists()
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            age = max(0.0, time.time() - path.stat().st_mtime)
        except (OSError, ValueError):
            said = None
        return cls(said, recorded, age) if isinstance(said, dict) else cls({}, recorded)

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return bool(self.said.get("over")) if self.said else self.recorded

    @property
    def phase(self) -> str:
        """What the run does, in words."""
        if self.over:
            return "over"
        if not self.said:
            return "starting"
        if self.age > STALE:
            return f"silent: the server has said nothing for {self.age:.0f} s"
        return f"ending: {self.said['ending']}" if self.said.get("ending") else "running"

    @property
    def seconds(self) -> float | None:
        """The run's clock now; None where nothing is known of it, or it stands still."""
        seconds = self.said.get("seconds")
        return None if self.over or not isinstance(seconds, int | float) else seconds + min(self.age, STALE)

    @property
    def total(self) -> int | None:
        """Minibatches of the whole run, as far as that is known."""
        total = self.said.get("total")
        return total if isinstance(total, int) else None
