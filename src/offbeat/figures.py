"""Figures of a run as lines of a table: those that say something of this run, by the names that readers know."""

from __future__ import annotations

from collections.abc import Mapping

from .experiment import show
from .trace import Trace

COUNTS = ("crashes", "lost_gradients", "undone_gradients", "lost_messages", "megabytes")
"""What a run without them need not say."""


def entries(figures: Mapping[str, float], trace: Trace) -> list[list[str]]:
    """Name and value of each of ``figures`` (see `Run.summary`) that ``trace`` has measured, and of what has happened."""
    return [
        [name.replace("_", " "), show(name, value)]
        for name, value in figures.items()
        if value == value
        and (value or name not in COUNTS)
        and (name != "mean_consensus" or "consensus" in trace.columns)
        and (name not in ("train_loss", "mean_gap") or learns(trace))
        and (name != "mean_lag" or counts_lag(trace))
    ]


def counts_lag(trace: Trace) -> bool:
    """Whether the run has counted lag: peers of a real run do not."""
    return trace.header.get("engine") != "runtime" or trace.header.get("messages", "server") == "server"


def learns(trace: Trace) -> bool:
    """Whether the run has losses: a script need not tell them, and a simulation of time alone has none."""
    loss = trace.column("loss")
    return bool((loss.isfinite() & (loss != 0)).any())
