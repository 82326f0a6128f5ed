"""Where the lines of a run go: to `logging`, and to the standard error where a script has configured nothing."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from offbeat.log import SERVER, STAMPED, TREE, WORKER, Lines, Unconfigured, lines_to, seen


@contextmanager
def bare() -> Iterator[None]:
    """Inside, nothing is configured, as in a script: a test runner has handlers of its own."""
    root = logging.getLogger()
    before = root.handlers[:], TREE.handlers[:], TREE.level
    root.handlers.clear()
    TREE.handlers.clear()
    try:
        yield
    finally:
        root.handlers[:], TREE.handlers[:] = before[:2]
        TREE.setLevel(before[2])


def test_a_script_that_configures_nothing_sees_all_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with bare():
        seen()
        seen()  # of a second replica
        WORKER.info("worker 0 has joined: %s")
        WORKER.warning("worker 1 is lost")
        assert not logging.getLogger().handlers
    assert capsys.readouterr().err == "offbeat: worker 0 has joined: %s\noffbeat: worker 1 is lost\n"


@pytest.mark.parametrize("late", [False, True])
def test_what_a_script_configures_is_what_counts(capsys: pytest.CaptureFixture[str], late: bool) -> None:
    """Before its replica is made or after: its handlers, its format, its level."""
    said = io.StringIO()
    with bare():
        if late:
            seen()
        logging.basicConfig(stream=said, format="%(levelname)s %(name)s %(message)s", level=logging.WARNING)
        seen()
        WORKER.warning("one")
        WORKER.info("two")
        SERVER.warning("three")
        assert not any(isinstance(handler, Unconfigured) for handler in TREE.handlers)
    assert said.getvalue() == "WARNING offbeat.worker one\nWARNING offbeat.server three\n"
    assert capsys.readouterr().err == ""


def test_a_script_can_turn_them_off(capsys: pytest.CaptureFixture[str]) -> None:
    with bare():
        TREE.setLevel(logging.ERROR)
        seen()
        WORKER.warning("one")
    assert capsys.readouterr().err == ""


def test_a_command_shows_lines_its_own_way_and_only_inside(capsys: pytest.CaptureFixture[str]) -> None:
    before = TREE.handlers[:], TREE.level, TREE.propagate
    with lines_to(Lines(STAMPED)):
        SERVER.info("worker 0 has joined")
        SERVER.debug("nothing")
    line = capsys.readouterr().err
    assert line[2:3] + line[5:6] + line[8:] == ":: offbeat: worker 0 has joined\n"
    assert (TREE.handlers, TREE.level, TREE.propagate) == before


@pytest.mark.parametrize("end", [OSError(28, "No space left on device"), ValueError("I/O operation on closed file")])
def test_a_line_that_cannot_be_written_is_dropped(monkeypatch: pytest.MonkeyPatch, end: Exception) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise end

    monkeypatch.setattr(sys, "stderr", Broken())
    with lines_to(Lines()):
        WORKER.warning("nobody hears this")


def test_logging_needs_nothing_of_the_library() -> None:
    """A process that only watches must not import torch for it."""
    code = "import logging; logging.basicConfig(); from offbeat import log; log.WORKER.warning('one')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stderr == "WARNING:offbeat.worker:one\n"
