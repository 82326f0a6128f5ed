"""A run that everything happens to: workers and their host are killed at random, hang, are told to go, and the disk is full.

    python tests/chaos.py --workers 8 --kills 200 --seed 0 --out FOLDER

It launches this file as a training script, does the damage, waits for the end and says what it has found: a line for each
check, and status 1 where one fails. A seed gives the same order of events; the moments are the machine's.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

EXAMPLES, BATCH = 1600, 8
TIMEOUT = 5.0
"""Seconds after which a silent worker is taken for dead."""


class Plan(NamedTuple):
    """What is launched, and what happens to it."""

    workers: int
    kills: int
    passes: int
    seed: int
    python: str = sys.executable
    pause: float = 1.5
    """Seconds between two events at most."""
    disk: int = 0
    """Megabytes of a file system of its own for the run, which is filled for a while; 0: none."""


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))


def script(passes: int, calm: Path) -> None:
    """What a worker does: slowly, until the file ``calm`` is there."""
    import offbeat as ob

    torch.manual_seed(int(os.environ["OFFBEAT_WORKER"]))
    at_work = calm.with_name(f"at-work-{os.getpid()}")
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, 16, generator=draw)
    y = (x @ torch.randn(16, 4, generator=draw)).argmax(1)
    model = net()
    replica = ob.Replica(model)
    for _ in range(passes):
        for inputs, labels in replica.shard(DataLoader(TensorDataset(x, y), BATCH, shuffle=True)):
            if not calm.exists():
                time.sleep(0.2)
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            replica.step(loss)
            at_work.touch()


def family(mark: str) -> dict[int, str]:
    """The living processes whose environment has ``mark``, and what they are: launch, server, or a worker's number."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (folder / "environ").read_bytes().split(b"\0")
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if mark.encode() not in environment or (folder / "stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                continue
            number = [e.partition(b"=")[2].decode() for e in environment if e.startswith(b"OFFBEAT_WORKER=")]
            if number:
                found[int(folder.name)] = number[0]
            elif b"server" in words or b"launch" in words:
                found[int(folder.name)] = "server" if b"server" in words else "launch"
    return found


def digests(folder: Path) -> dict[str, str]:
    """A hash of each file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextlib.contextmanager
def disk(folder: Path, megabytes: int) -> Iterator[None]:
    """``folder`` as a small file system of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    if megabytes:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        if megabytes:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Take all room that is left."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def damage(plan: Plan, home: Path, run: subprocess.Popen[str], mark: str) -> Counter[str]:
    """Kill ``plan.kills`` processes, hang some workers, tell two of them to go, and fill the disk for a while."""
    draw, happened = random.Random(plan.seed), Counter[str]()
    hung: dict[int, float] = {}
    told, full = 0, 0.0
    while happened["killed worker"] + happened["killed host"] < plan.kills and run.poll() is None:
        time.sleep(draw.uniform(0, plan.pause))
        now = time.monotonic()
        for pid, until in list(hung.items()):
            if now > until:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                del hung[pid]
        if full and now > full:
            (home / "filler").unlink(missing_ok=True)
            full = -1.0
        there = family(mark)
        workers = [pid for pid, what in there.items() if what.isdigit() and pid not in hung]
        at_work = [pid for pid in workers if (home / f"at-work-{pid}").exists()]
        hosts = [pid for pid, what in there.items() if what == "server"]
        kills = happened["killed worker"] + happened["killed host"]
        what = draw.random()
        with contextlib.suppress(ProcessLookupError):
            if plan.disk and not full and kills >= plan.kills // 2:
                fill(home / "filler")
                full = now + 15.0
                happened["disk full"] += 1
            elif what < 0.1 and hosts:
                os.kill(hosts[0], signal.SIGKILL)
                happened["killed host"] += 1
            elif what < 0.14 and at_work and len(hung) < 2:
                pid = draw.choice(sorted(at_work))
                os.kill(pid, signal.SIGSTOP)
                hung[pid] = now + draw.uniform(1, 2 * TIMEOUT)
                happened["hung worker"] += 1
            elif what < 0.18 and at_work and told < min(2, plan.workers - 2) and kills > plan.kills // 3:
                os.kill(draw.choice(sorted(at_work)), signal.SIGTERM)
                told += 1
                happened["told worker"] += 1
            elif some := workers if what > 0.8 else at_work:  # now and then one that has not joined yet
                os.kill(draw.choice(sorted(some)), signal.SIGKILL)
                happened["killed worker"] += 1
    for pid in hung:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    (home / "filler").unlink(missing_ok=True)
    return happened


def launch(plan: Plan, home: Path, *words: str) -> subprocess.Popen[str]:
    """``offbeat launch`` of this file in ``home``, into the default folder."""
    argv = ["--workers", str(plan.workers), "--method", "dana-zero(lr=0.02)", "--timeout", str(TIMEOUT), "--every", "1"]
    argv += ["--restarts", "1000", *words, str(Path(__file__).resolve()), str(plan.passes), str(home / "calm")]
    environment = {n: v for n, v in os.environ.items() if not n.startswith("OFFBEAT_")}
    with open(home / "said", "a") as said:
        return subprocess.Popen(
            [plan.python, "-m", "offbeat", "launch", *argv],
            cwd=home,
            env=environment | {"CI": "1", "CHAOS": str(home), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            text=True,
        )


def check(plan: Plan, home: Path, limit: float = 1800.0) -> dict[str, str]:
    """Run it all; for each check "" where it holds, else what was found."""
    import offbeat as ob

    mark = f"CHAOS={home}"
    (home / "calm").touch()
    first = launch(plan._replace(passes=1, workers=1), home)
    found = {"a first run ends well": "" if first.wait(limit) == 0 else (home / "said").read_text()[-2000:]}
    (before,) = (home / "runs").iterdir()
    kept = digests(before)
    (home / "calm").unlink()
    run = launch(plan, home)
    happened = damage(plan, home, run, mark)
    (home / "calm").touch()
    print("events:", dict(happened), flush=True)
    try:
        status: int | str = run.wait(limit)
    except subprocess.TimeoutExpired:
        status = f"still running after {limit:g} s"
    left = family(mark)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    found["the run ends with status 0"] = "" if status == 0 else f"{status}: {(home / 'said').read_text()[-3000:]}"
    found["all events happened"] = (
        "" if happened["killed worker"] + happened["killed host"] == plan.kills else f"{happened}"
    )
    found["no process is left"] = "" if not left else f"{left}"
    found["nothing of the earlier run is touched"] = "" if digests(before) == kept else "its files differ"
    (folder,) = (
        path for path in (home / "runs").iterdir() if path != before and path.is_dir() and not path.is_symlink()
    )
    model = net()
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))  # strictly: all of it is there
    trace = ob.Trace.read(folder / "trace.jsonl")
    total = plan.passes * (EXAMPLES // BATCH)
    found["each minibatch is used once"] = "" if len(trace) == total else f"{len(trace)} gradients, {total} minibatches"
    # of who dies while the host is down, or before it has joined, only the launcher's log tells
    crashed = Counter(i.what for i in trace.incidents)["crashed"]
    found["the trace tells of crashes"] = "" if crashed >= plan.kills // 4 else f"{crashed} of {plan.kills}"
    last = float(trace.column("loss")[-200:].double().nanmean())
    found["it has learnt"] = "" if last < 1.0 else f"the loss ends at {last:.3f}"
    said = (home / "said").read_text()
    found["every kill was said"] = "" if said.count("SIGKILL") >= plan.kills * 0.9 else f"{said.count('SIGKILL')} times"
    print(
        f"{len(trace):,} gradients, {crashed} crashes in the trace, loss {last:.3f}, {trace[-1].seconds:.0f} s",
        flush=True,
    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--passes", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--disk", type=int, default=32, help="megabytes of a tmpfs for the run; 0: the disk is not filled"
    )
    parser.add_argument("--out", type=Path, required=True)
    said = parser.parse_args()
    plan = Plan(said.workers, said.kills, said.passes, said.seed, disk=said.disk)
    home = said.out.resolve()
    with disk(home, plan.disk):
        found = check(plan, home)
        for what, wrong in found.items():
            print(f"{'FAILS' if wrong else 'holds'}  {what}{': ' * bool(wrong)}{wrong}")
        if any(found.values()):
            subprocess.run(["cp", "-r", str(home), f"{home}.failed"], check=False)
    return int(any(found.values()))


if __name__ == "__main__":
    if "OFFBEAT_SERVER" in os.environ:
        script(int(sys.argv[1]), Path(sys.argv[2]))
    else:
        sys.exit(main())
