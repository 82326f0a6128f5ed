"""The examples run, and the one that trains on many workers is the plain one with a few lines changed."""

from __future__ import annotations

import difflib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from crew import Nursery

import offbeat as ob

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run() -> Iterator[object]:
    """Runs a command to its end, or kills it and all that it has started."""
    started: list[subprocess.Popen[str]] = []

    def run(*command: str, timeout: float = 600) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(process)
        output, _ = process.communicate(timeout=timeout)
        assert process.returncode == 0, output
        return output

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_at_most_four_lines_make_a_plain_script_one_of_many_workers() -> None:
    plain, ours = ((EXAMPLES / name).read_text().splitlines() for name in ("mnist_plain.py", "mnist.py"))
    changes = [line for line in difflib.ndiff(plain, ours) if line[0] in "+-"]
    docstring = [line for line in changes if '"""' in line]
    assert not docstring, "the files differ in what matters only"
    assert 0 < sum(line.startswith("+") for line in changes) <= 4
    assert sum(line.startswith("-") for line in changes) <= 4


def test_both_learn_mnist(run, nursery: Nursery, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    if not ob.tasks.Mnist.data().present:
        pytest.skip("MNIST's files were not found: set OFFBEAT_DATA")
    few = ("--examples", "3200", "--epochs", "2")
    plain = run(nursery.python, "examples/mnist_plain.py", *few)
    launch = (nursery.python, "-m", "offbeat", "launch", "--workers", "2", "--out", str(tmp_path))
    run(*launch, "examples/mnist.py", *few)
    ours = (tmp_path / "logs" / "worker-0.log").read_text()
    for text in (plain, ours):
        last = [line for line in text.splitlines() if line.startswith("epoch 1: accuracy")]
        assert len(last) == 1, text
        assert float(last[0].split()[-1].rstrip("%")) > 80
    trace = ob.Trace.read(tmp_path / "trace.jsonl")
    assert len(trace) == 2 * 50
    assert {event.worker for event in trace} == {0, 1}
    model = torch.load(tmp_path / "model.pt", weights_only=True)
    assert model["conv1.weight"].shape == (16, 1, 5, 5)


def test_the_example_runs_alone(run) -> None:  # type: ignore[no-untyped-def]
    if not ob.tasks.Mnist.data().present:
        pytest.skip("MNIST's files were not found: set OFFBEAT_DATA")
    text = run(sys.executable, "examples/mnist.py", "--examples", "1280", "--epochs", "1")
    assert "epoch 0: accuracy" in text


def test_the_demo_compares_both(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    text = run(sys.executable, "examples/demo.py", "--task", "digits", "--gradients", "120", "--out", str(tmp_path))
    assert "dana-zero" in text
    assert "DistributedDataParallel" in text
    comparison = ob.Comparison.read(tmp_path)
    assert [len(cell.trace) for cell in comparison.cells] == [120, 120]
    assert (tmp_path / "index.html").stat().st_size > 10_000
