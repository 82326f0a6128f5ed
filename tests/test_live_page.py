"""The page of a run that goes on, in a real browser."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from crew import Processes, until

pytest.importorskip("websocket")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")

STATES = "[...document.querySelectorAll('#workers tr')].map(row => row.dataset.state)"
PATHS = "Object.fromEntries([...document.querySelectorAll('#charts section')].map(s => [s.id, s.querySelectorAll('path').length]))"


def number_of(worker: int, parent: int) -> int:
    """The process that is this worker, among all of the launcher ``parent``."""
    for place in Path("/proc").glob("[0-9]*"):
        try:
            variables = (place / "environ").read_bytes().split(b"\0")
            mine = int((place / "stat").read_text().rpartition(")")[2].split()[1]) == parent
        except (OSError, ValueError):
            continue
        if mine and b"OFFBEAT_WORKER=%d" % worker in variables:
            return int(place.name)
    raise LookupError(f"worker {worker} has no process")


def test_a_workers_death_is_seen_on_the_page(processes: Processes, tmp_path: Path) -> None:
    """With four workers, one of which is killed and started again; then the run is over, and the page goes with its launcher."""
    argv = [
        "launch",
        "--task",
        "quadratic",
        "--workers",
        "4",
        "--gradients",
        "1000000",
        "--speed",
        "Fixed(0.02)",
        "--page",
        "0",
        "--track",
        "csv",
        "--out",
        "run",
    ]
    process = processes.start("-m", "offbeat", *argv, forked=False)
    url: Any = until(lambda: re.search(r"the page is at (\S+)", processes.said(process)), "its address", 90)
    with Browser(tmp_path) as browser:
        browser.open(url[1])
        until(lambda: browser.ask(STATES) == ["alive"] * 4, "four workers on the page", 90)
        until(
            lambda: browser.ask(PATHS) == {"chart-loss": 1, "chart-rate": 4, "chart-lag": 4, "chart-gap": 4}, "curves"
        )
        titles = browser.ask("[...document.querySelectorAll('#charts h2')].map(title => title.textContent)")
        assert titles[1] == "Gradients per second each worker"
        os.kill(number_of(2, process.pid), signal.SIGKILL)
        until(lambda: "worker 2 is lost" in browser.ask("document.getElementById('happened').textContent"), "the loss")
        until(
            lambda: "worker 2 was killed by SIGKILL" in browser.ask("document.getElementById('log').textContent"), "why"
        )
        until(lambda: browser.ask(STATES) == ["alive"] * 4, "its second life", 90)
        assert browser.ask("document.querySelectorAll('.death').length") == 4
        assert browser.ask("document.querySelectorAll('#workers tr')[2].lastChild.textContent") == "1"
        browser.shape(390, 800, dark=True)
        until(lambda: browser.ask("document.documentElement.scrollWidth") == 390, "a page that fits a phone")
        assert browser.problems == []
        process.send_signal(signal.SIGINT)
        assert processes.ends(process) == 130
        until(
            lambda: "no connection" in browser.ask("document.getElementById('phase').textContent"),
            "that nothing answers",
        )
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("gradients,seconds,loss,lag")
    assert len(rows) > 100
