"""Local updates and gossip: steps per second of each worker, beside PostLocalSGDOptimizer, torchft and decent-dp.

Two workers, an MLP of 5.8 k parameters, batches of 32, averages every 8 steps (gossip: each step). Every system runs in an
environment of its own, in turn, some times over; a ratio is our steps per second over its, in the same turn.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path

import torch

from .measure import Row

HERE = Path(__file__).parent / "peers"
HOMES = Path("runs/bench/environments")
REPEATS = 5


@dataclass(frozen=True)
class System:
    """Something that trains: a script in ``peers``, its argument, and the package that it needs."""

    script: str
    argument: str
    package: str = ""

    def python(self) -> str:
        """The interpreter of its environment, which is made first where it is missing; empty where that fails."""
        if not self.package:
            return sys.executable
        home = HOMES / self.package
        python = home / "bin" / "python"
        if not (home / "done").exists():
            venv.create(home, clear=True, with_pip=True)
            version = torch.__version__.partition("+")[0]
            command = [str(python), "-m", "pip", "install", "--quiet", f"torch=={version}", "numpy", self.package]
            if subprocess.run(command, capture_output=True).returncode:
                return ""
            (home / "done").touch()
        return str(python)

    def rate(self, folder: Path) -> tuple[float, str]:
        """Steps per second of a worker, and the version; not a number and why, where it does not run."""
        for old in folder.glob("*.json"):
            old.unlink()
        python = self.python()
        if not python:
            return float("nan"), f"{self.package} cannot be installed"
        environment = {**os.environ, "BENCH_OUT": str(folder), "OMP_NUM_THREADS": "1"}
        script = [str(HERE / self.script), self.argument]
        lighthouse: subprocess.Popen[bytes] | None = None
        if self.script == "ours.py":
            command = [python, "-m", "offbeat", "launch", "--workers", "2", "--out", str(folder / "run"), *script]
        else:
            place = ["--master-addr", "127.0.0.1", "--master-port", "29531"]
            command = [python, "-m", "torch.distributed.run", "--nproc-per-node", "2", *place, *script]
        if self.script == "torchft_rounds.py":
            flags = ["--bind", "127.0.0.1:29510", "--min_replicas", "2", "--join_timeout_ms", "2000"]
            environment["TORCHFT_LIGHTHOUSE"] = "http://127.0.0.1:29510"
            lighthouse = subprocess.Popen(
                [str(Path(python).with_name("torchft_lighthouse")), *flags],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            return float("nan"), "not done within 120 s"
        finally:
            if lighthouse is not None:
                lighthouse.kill()
                lighthouse.wait()
        said = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        if len(said) < 2:
            return float("nan"), (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return statistics.fmean(entry["rate"] for entry in said), said[0]["version"]


PAIRS = [
    ("LocalSGD / PostLocalSGDOptimizer", System("ours.py", "LocalSGD"), System("post_local_sgd.py", "")),
    ("LocalSGD / torchft LocalSGD", System("ours.py", "LocalSGD"), System("torchft_rounds.py", "LocalSGD", "torchft-nightly")),
    ("SlowMo / PostLocalSGDOptimizer", System("ours.py", "SlowMo"), System("post_local_sgd.py", "")),
    ("DiLoCo / torchft DiLoCo", System("ours.py", "DiLoCo"), System("torchft_rounds.py", "DiLoCo", "torchft-nightly")),
    ("D-PSGD / decent-dp", System("ours.py", "D-PSGD"), System("decent.py", "complete", "decent-dp")),
    ("SGP / decent-dp", System("ours.py", "SGP"), System("decent.py", "complete", "decent-dp")),
    ("AD-PSGD / decent-dp", System("ours.py", "AD-PSGD"), System("decent.py", "complete", "decent-dp")),
]  # fmt: skip


def run() -> list[Row]:
    systems = list(dict.fromkeys(system for _, *pair in PAIRS for system in pair))
    rates: dict[System, list[float]] = {system: [] for system in systems}
    versions: dict[System, str] = {}
    with tempfile.TemporaryDirectory() as name:
        for _ in range(REPEATS):
            for system in systems:
                rate, versions[system] = system.rate(Path(name))
                rates[system].append(rate)
    rows = [
        Row(
            f"{system.script.removesuffix('.py')} {system.argument} ({versions[system]})",
            "steps/s",
            tuple(rates[system]),
        )
        for system in systems
    ]
    return rows + [
        Row(what, "x", tuple(a / b for a, b in zip(rates[ours], rates[theirs], strict=True)))
        for what, ours, theirs in PAIRS
    ]
