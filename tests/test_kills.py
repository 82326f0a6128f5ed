"""Real processes that are killed, stopped and told to go: the run goes on, and says what it has lost."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import same, some
from crew import TOKEN, Processes, Run, alive, descendants, heard, load, until

import offbeat as ob
from offbeat.experiment import rerun
from offbeat.runtime import snapshot


def test_workers_killed_twenty_times_at_random_moments(processes: Processes) -> None:
    """Each is started again. The run does all of its minibatches, each once, nobody waits for the dead, and the loss is
    that of runs that nobody disturbs.
    """
    gradients, workers = 800, 4
    words = ["--restarts", "25", "--timeout", "1000", "--lr", "0.02"]  # who waited for the dead would do so for ever
    run = Run(processes, *words, gradients=gradients, workers=workers, seconds=0.02)
    rng = random.Random(3)
    for kill in range(20):
        run.reaches(32 * kill + rng.randrange(32))
        victim = rng.choice(until(lambda: processes.living("worker"), "a worker that is alive"))
        os.kill(victim, signal.SIGKILL)
        until(lambda pid=victim: not alive(pid), "its end")  # else it might be killed again
    trace = run.ends()
    assert len(trace) == gradients
    steps = {w: [event.step for event in trace if event.worker == w] for w in range(workers)}
    assert [own == list(range(len(own))) for own in steps.values()] == [True] * workers
    assert run.said().count("was killed by SIGKILL") == 20
    count = Counter(incident.what for incident in trace.incidents)
    assert 0 < count["crashed"] <= 20  # others had not joined yet
    assert count["joined"] == count["crashed"] + count["left"]
    method, problem = ob.methods.DanaZero(lr=0.02), ob.tasks.Quadratic()
    calm = [
        ob.simulate(method, problem, ob.Cluster(workers, ob.Gamma(cv=0.3)), gradients=gradients, seed=seed).figures
        for seed in range(3)
    ]
    noise = 10 * max(
        figures["loss"] for figures in calm
    )  # of few numbers: other ones each time, as it happens who is killed when
    assert noise < problem.evaluate(problem.x0())["loss"] / 10
    assert trace.evaluations[-1].figures["loss"] < noise


def test_a_process_that_imports_everything_itself(processes: Processes) -> None:
    """No fork of ours: `python -m offbeat launch`, one of whose workers is killed."""
    argv = ["launch", "--task", "quadratic", "--gradients", "150", "--workers", "2", "--speed", "Fixed(0.03)"]
    process = processes.start("-m", "offbeat", *argv, "--out", "run", forked=False, OMP_NUM_THREADS="1")
    trace = processes.folder / "run/trace.jsonl"
    until(lambda: trace.exists() and trace.read_text().count('"step"') > 20, "some gradients")
    family = descendants(process.pid)
    victim = next(
        pid for pid in family if b"OFFBEAT_WORKER=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )
    os.kill(victim, signal.SIGKILL)
    assert processes.ends(process) == 0, processes.said(process)
    assert "worker 1 was killed by SIGKILL: starting it again" in processes.said(process)
    assert len(ob.Trace.read(trace)) == 150
    assert same(rerun(ob.Trace.read(trace)).x, load(processes.folder / "run"))
    assert not any(map(alive, family))


@pytest.mark.parametrize("transport", some(["shared", "gloo", "tcp"], "shared"))
def test_the_server_killed_in_the_middle(processes: Processes, transport: str) -> None:
    """It goes on from its snapshot, at the same address, and workers dial again. Its log says what was lost: all that the
    trace had beyond the snapshot, which is at most what an interval brings. The trace still replays.
    """
    every = 0.5
    run = Run(processes, "--every", str(every), "--transport", transport, gradients=900, workers=3, seconds=0.01)
    run.reaches(3)
    first = run.snapshots()
    until(lambda: run.snapshots() >= first + 2, "snapshots")
    run.reaches(run.counts().total() + 30)
    os.kill(run.pid("launch"), signal.SIGSTOP)  # while we look
    os.kill(run.pid("server"), signal.SIGKILL)
    until(lambda: not processes.living("server"), "its end")
    done = run.counts().total()
    os.kill(run.pid("launch"), signal.SIGCONT)
    trace = run.ends()
    assert len(trace) == 900
    (line,) = (line for line in run.log("server-0").splitlines() if "resumed from" in line)
    kept, lost = (int(part.split()[0].replace(",", "")) for part in (line.split(" at ")[1], line.split("then: ")[1]))
    assert kept + lost == done
    assert lost > 0
    assert float(line.split()[-2]) < every + 2  # two seconds to write a snapshot on a busy machine
    assert all("dialling again" in run.log(f"worker-{i}") for i in range(3))
    assert "server 0 was killed by SIGKILL: starting it again" in run.said()
    assert [i.what for i in trace.incidents].count("crashed") == 3


def test_a_worker_that_is_stopped_holds_nobody_up(processes: Processes) -> None:
    """While it sleeps, each of the others takes as many gradients as a run without it would have; woken, it goes on in its life."""
    run = Run(processes, "--timeout", "600", gradients=480, workers=4, seconds=0.02)
    run.reaches(40)
    worker = run.pid("worker", "0")
    os.kill(worker, signal.SIGSTOP)
    stopped = run.counts()

    def others(gradients: int) -> bool:
        return all(run.counts()[w] >= stopped[w] + gradients for w in (1, 2, 3))

    until(lambda: others(5), "steps of the others")  # what it had sent is taken by then
    asleep = run.counts()
    until(lambda: others(60), "steps of the others")
    assert run.counts()[0] == asleep[0] <= stopped[0] + 1
    os.kill(worker, signal.SIGCONT)
    trace = run.ends()
    assert len(trace) == 480
    assert run.counts()[0] > asleep[0] + 1
    assert [i.what for i in trace.incidents if i.worker == 0] == ["joined", "left"]


def test_a_worker_stopped_for_longer_than_the_time_out_joins_anew(processes: Processes) -> None:
    """It is taken for dead, its minibatch goes to others, and what it brings when it wakes is not taken."""
    run = Run(processes, "--timeout", "1", gradients=300, workers=3, seconds=0.05)
    run.reaches(20)
    worker = run.pid("worker", "0")
    os.kill(worker, signal.SIGSTOP)
    until(lambda: "worker 0 is lost" in run.log("server-0"), "its being given up")
    assert "worker 0 was silent for 1 s while its next message was waited for" in run.log("server-0")
    asleep = run.counts()
    run.reaches(asleep.total() + 10)
    assert run.counts()[0] == asleep[0]
    os.kill(worker, signal.SIGCONT)
    trace = run.ends()
    assert len(trace) == 300
    assert [i.what for i in trace.incidents if i.worker == 0] == ["joined", "crashed", "joined", "left"]
    (crash,) = (i for i in trace.incidents if i.what == "crashed")
    assert crash.lost == 1
    assert "dialling again (1 gradients of this worker are lost)" in run.log("worker-0")
    assert Counter(trace.column("worker").tolist())[0] > asleep[0]
    assert "starting it again" not in run.said()


SCRIPT = """
import torch, offbeat as ob
model = torch.nn.Linear(3, 1)
replica = ob.Replica(model)
while True:
    model(torch.randn(4, 3)).square().mean().backward()
    replica.step()
"""


def test_sigterm_at_a_worker(processes: Processes) -> None:
    """It delivers, leaves in good order with status 0 and is not started again; the others do the rest."""
    run = Run(processes, gradients=200, workers=3, seconds=0.02)
    run.reaches(20)
    os.kill(run.pid("worker", "1"), signal.SIGTERM)
    trace = run.ends()
    assert len(trace) == 200
    (left,) = (i for i in trace.incidents if i.worker == 1 and i.what != "joined")
    assert (left.what, left.lost) == ("left", 0)
    assert left.seconds < trace[-1].seconds
    assert "worker 1" not in run.processes.said(run.process)


@pytest.mark.parametrize("method", some(["asgd", "async-local-sgd"], "async-local-sgd"))
def test_sigterm_at_a_script(processes: Processes, method: str) -> None:
    """A Replica does so by itself, when all of its gradients are delivered: nothing that it worked for is lost."""
    (processes.folder / "endless.py").write_text(SCRIPT)
    argv = ["launch", "--method", method, "--workers", "2", "--out", "run", "endless.py"]
    process = processes.offbeat(*argv)
    workers = [until(lambda i=i: processes.living("endless", i), f"worker {i}")[0] for i in ("0", "1")]
    log = processes.folder / "run/logs/server-0.log"
    trace = processes.folder / "run/trace.jsonl"  # a worker that has joined may still import what its first step needs
    until(
        lambda: trace.exists() and all(f'"worker": {i}, "step": 1,' in trace.read_text() for i in (0, 1)), "their steps"
    )
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
        until(lambda: not alive(worker), "its end")  # noqa: B023
    assert log.read_text().count("has left") == 2
    assert "is lost" not in log.read_text()
    assert processes.ends(process) == 0, processes.said(
        process
    )  # the server would wait for workers that end their loops
    assert "all workers have ended, not all by the end of their loops: the run is over" in processes.said(process)
    for i in range(2):
        assert f"worker {i} leaves, as SIGTERM asks" in (processes.folder / f"run/logs/worker-{i}.log").read_text()
    counts = Counter(ob.Trace.read(processes.folder / "run/trace.jsonl").column("worker").tolist())
    assert all(count % (8 if method == "async-local-sgd" else 1) == 0 for count in counts.values())


EPOCHS = """
import sys, time
import torch
from torch.utils.data import DataLoader, TensorDataset
import offbeat as ob

model = torch.nn.Linear(1, 1)
replica = ob.Replica(model, ob.methods.DanaZero(lr=1e-6))
loader = DataLoader(TensorDataset(torch.arange(80.0)[:, None]), 2, shuffle=True, num_workers=int(sys.argv[1]))
for epoch in range(3):
    for (x,) in replica.shard(loader):
        time.sleep(0.03)
        model(x).square().mean().backward()
        replica.step()
"""


@pytest.mark.parametrize("ahead", some([0, 2], 2))
def test_scripts_killed_in_their_loops(processes: Processes, ahead: int) -> None:
    """Workers and the server die in the middle of a pass: each minibatch of each pass is delivered once for all that."""
    (processes.folder / "epochs.py").write_text(EPOCHS)
    argv = ["launch", "--workers", "3", "--every", "0.3", "--out", "run", "epochs.py", str(ahead)]
    process = processes.offbeat(*argv)
    trace = processes.folder / "run/trace.jsonl"
    for count, what, worker in ((10, "epochs", "0"), (25, "epochs", "2"), (45, "server", None), (70, "epochs", "1")):
        until(lambda n=count: trace.exists() and trace.read_text().count('"step"') >= n, f"{count} gradients")
        os.kill(until(lambda w=(what, worker): processes.living(*w), "the victim")[0], signal.SIGKILL)
    assert processes.ends(process) == 0, processes.said(process)
    assert len(ob.Trace.read(trace)) == 3 * 40
    assert processes.said(process).count("was killed by SIGKILL") == 4
    assert not processes.living("epochs")


@pytest.mark.parametrize("number", some([signal.SIGTERM, signal.SIGINT], signal.SIGINT))
def test_a_signal_at_the_launcher(processes: Processes, number: signal.Signals) -> None:
    """All leave in good order, a snapshot is written, and nobody is left; --resume does the rest."""
    run = Run(processes, gradients=240, workers=3, seconds=0.02)
    run.reaches(20)
    run.process.send_signal(number)
    trace = run.ends(status=130)
    done = len(trace)
    assert 20 <= done < 240
    assert [i.what for i in trace.incidents] == ["joined"] * 3 + ["left"] * 3
    found = snapshot.newest(run.folder / "snapshots", heard())
    assert found
    assert sum(found[1]["steps"].values()) == done
    assert found[1]["there"] == []
    run.resume()
    assert len(run.ends()) == 240
    assert f"at {done} gradients; lost since then: 0 gradients" in run.log("server-0")


def test_a_signal_at_the_launcher_while_a_worker_waits_to_be_started(processes: Processes) -> None:
    """It is not: the run ends, and without it."""
    run = Run(processes, gradients=2000, workers=2, seconds=0.02)
    for life in range(3):  # the pause is a second then
        run.reaches(10 * (life + 1))
        os.kill(run.pid("worker", "1"), signal.SIGKILL)
        until(lambda n=life + 1: run.processes.said(run.process).count("starting it again") == n, "the launcher's word")
    run.process.send_signal(signal.SIGTERM)
    run.ends(status=130)
    assert run.log("server-0").count("worker 1 has joined") <= 3


def test_a_second_signal_kills(processes: Processes) -> None:
    """Who does not wait for the end of steps has it at once."""
    run = Run(processes, gradients=2000, workers=2, seconds=60.0)
    until(lambda: (run.folder / "logs/server-0.log").exists() and run.log("server-0").count("joined") == 2, "both")
    run.process.send_signal(signal.SIGTERM)
    until(lambda: "finish their steps" in run.processes.said(run.process), "the launcher's word")
    assert run.process.poll() is None
    assert len(processes.living("worker")) == 2
    run.process.send_signal(signal.SIGTERM)
    assert processes.ends(run.process) == 130
    assert not processes.living("worker")
    assert not processes.living("server")


def test_nobody_outlives_a_launcher_that_is_killed(processes: Processes) -> None:
    """The server and the workers are told by the system: it writes a snapshot, they leave, and all end."""
    run = Run(processes, gradients=100_000, workers=2, seconds=0.02)
    run.reaches(10)
    os.kill(run.pid("launch"), signal.SIGKILL)
    until(lambda: not processes.living("server") and not processes.living("worker"), "the end of all")
    trace = ob.Trace.read(run.folder / "trace.jsonl")
    found = snapshot.newest(run.folder / "snapshots", heard())
    assert found
    assert sum(found[1]["steps"].values()) == len(trace)
    assert same(rerun(trace).x, load(run.folder))


def test_a_server_told_to_stop_leaves_all_that_is_needed(processes: Processes) -> None:
    """SIGTERM at a server of its own: snapshot, model, and a trace that replays; workers dial until it is back."""
    token = {"OFFBEAT_TOKEN": TOKEN}
    argv = ["server", "--method", "dana-zero(lr=0.02)", "--gradients", "150", "--status", "--out", "run"]
    server = processes.offbeat(*argv, **token)
    address = json.loads(until(lambda: processes.said(server).partition("\n")[0], "its address"))["address"]
    speed = ["--problem", "Quadratic()", "--speed", "Fixed(0.02)"]
    worker = processes.offbeat("worker", "--server", address, *speed, **token)
    path = processes.folder / "run/trace.jsonl"
    until(lambda: path.exists() and path.read_text().count('"step"') > 20, "some gradients")
    server.send_signal(signal.SIGTERM)
    assert processes.ends(server) == 0, processes.said(server)
    trace = ob.Trace.read(path)
    assert same(rerun(trace).x, load(processes.folder / "run"))
    assert [i.what for i in trace.incidents] == ["joined", "crashed"]
    again = processes.offbeat(*argv, "--resume", "--port", address.rpartition(":")[2], **token)
    assert processes.ends(worker) == 0, processes.said(worker)
    assert processes.ends(again) == 0, processes.said(again)
    trace = ob.Trace.read(path)
    assert len(trace) == 150
    assert same(rerun(trace).x, load(processes.folder / "run"))


@pytest.fixture(autouse=True)
def _nothing_is_left(processes: Processes) -> Iterator[None]:
    """Whatever a test starts is gone when it ends, by itself and not because it was killed in the end."""
    yield
    left = until(lambda: not (processes.living("server") or processes.living("worker")) or None, "the end of all")
    assert left
