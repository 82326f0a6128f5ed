"""Peers as real processes that are killed, stopped and told to go: the others go on, and nothing hangs."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter

import pytest
from conftest import some
from crew import Processes, Run, alive, heard, until

import offbeat as ob
from offbeat.runtime import snapshot

KINDS = {
    "gossip in rounds": ob.methods.SGP(ob.SGD(0.2)),
    "pushes": ob.methods.GoSGD(ob.SGD(0.2)),
    "pairs": ob.methods.ADPSGD(ob.SGD(0.2)),
    "an average of each gradient": ob.methods.AllReduce(ob.SGD(0.2)),
    "averages": ob.methods.LocalSGD(ob.Local(ob.SGD(0.2)), period=4),
    "averages of groups": ob.methods.HierarchicalSGD(
        ob.methods.GroupSGD(ob.Local(ob.SGD(0.2)), size=2, period=2), period=2
    ),
    "gossip and averages": ob.methods.SlowMo(ob.methods.SGP(ob.SGD(0.2)), period=4, beta=0.5),
}
"""A method of each kind that has no server."""


@pytest.mark.parametrize("kind", some(KINDS, "gossip and averages"))
def test_peers_killed_twenty_times_at_random_moments(kind: str, processes: Processes) -> None:
    """Each is started again and welcomed by a living one. The run does all of its minibatches, each once, nobody waits for
    the dead, and the loss is that of runs that nobody disturbs.
    """
    method, gradients, workers = KINDS[kind], 800, 4
    words = ["--restarts", "25", "--timeout", "1000", "--method", repr(method)]  # who waited would do so for ever
    run = Run(processes, *words, gradients=gradients, workers=workers, seconds=0.02)
    rng = random.Random(3)
    for kill in range(20):
        run.reaches(32 * kill + rng.randrange(32))
        victim = rng.choice(until(lambda: processes.living("worker"), "a worker that is alive"))
        os.kill(victim, signal.SIGKILL)
        until(lambda pid=victim: not alive(pid), "its end")  # else it might be killed again
    trace = whole(run, gradients)
    assert run.said().count("was killed by SIGKILL") == 20
    count = Counter(incident.what for incident in trace.incidents)
    assert 0 < count["crashed"] <= 20  # others had not joined yet
    assert count["joined"] == count["crashed"] + count["left"]
    calm = [  # of all, and of one alone, who may have to end the run while the launcher makes the others wait
        ob.simulate(
            method, ob.tasks.Quadratic(seed=seed), ob.Cluster(n, ob.Gamma(cv=0.3)), gradients=gradients, seed=seed
        ).figures
        for n in (1, workers)
        for seed in range(3)
    ]
    settled(trace, [figures["loss"] for figures in calm])


def whole(run: Run, gradients: int, status: int = 0) -> ob.Trace:
    """The run ends, and all minibatches were taken, each once, by workers who count their steps through."""
    trace = run.ends(status, replays=False)
    steps = {w: [event.step for event in trace if event.worker == w] for w in range(run.workers)}
    assert [own == list(range(len(own))) for own in steps.values()] == [True] * run.workers
    found = snapshot.newest(run.folder / "snapshots", heard())
    assert found
    done = gradients if status == 0 else len(trace)
    assert len(trace) == sum(found[1]["steps"].values()) == found[1]["leases"]["done"] == done
    (one,) = found[1]["leases"]["passes"]
    assert one["next"] - len(one["returned"]) == done
    return trace


FEW = ["gossip in rounds", "pushes", "pairs", "gossip and averages"]
"""Kinds that differ in who waits for whom."""


@pytest.mark.parametrize("kind", some(FEW, "gossip and averages"))
def test_the_coordinator_killed_in_the_middle(kind: str, processes: Processes) -> None:
    """It goes on from its snapshot, at the same address; peers join again, and the run does all of its minibatches."""
    run = launched(processes, kind, "--every", "0.5", gradients=400, seconds=0.02)
    run.reaches(3)
    first = run.snapshots()
    until(lambda: run.snapshots() >= first + 2, "snapshots")
    run.reaches(run.counts().total() + 20)
    os.kill(run.pid("server"), signal.SIGKILL)
    trace = whole(run, 400)
    assert run.log("server-0").count("resumed from") == 1
    assert all("dialling again, as a new life" in run.log(f"worker-{i}") for i in range(3))
    assert "server 0 was killed by SIGKILL: starting it again" in run.said()
    assert "starting it again" not in run.said().replace("server 0 was killed by SIGKILL: starting it again", "")
    sane(trace, kind)


@pytest.mark.parametrize("kind", some(FEW, "gossip in rounds"))
def test_a_peer_stopped_for_longer_than_the_time_out_joins_anew(kind: str, processes: Processes) -> None:
    """It is taken for dead, and the others go on without it, at the latest after the time-out; woken, it joins anew."""
    run = launched(processes, kind, "--timeout", "1.5", gradients=400, seconds=0.03)
    run.reaches(20)
    os.kill(worker := run.pid("worker", "0"), signal.SIGSTOP)
    until(lambda: "worker 0 is lost" in run.log("server-0"), "its being given up")
    assert "worker 0 was silent for 1.5 s while" in run.log("server-0")
    asleep = run.counts()
    run.reaches(asleep.total() + 30)
    assert run.counts()[0] == asleep[0]
    os.kill(worker, signal.SIGCONT)
    trace = whole(run, 400)
    assert [i.what for i in trace.incidents if i.worker == 0] == ["joined", "crashed", "joined", "left"]
    assert "dialling again, as a new life" in run.log("worker-0")
    assert run.counts()[0] > asleep[0]
    assert "starting it again" not in run.said()
    sane(trace, kind)


def test_who_pushes_waits_for_nobody(processes: Processes) -> None:
    """A peer is stopped, for far less than the time-out: all others go on meanwhile, and woken it goes on in its life."""
    run = launched(processes, "pushes", "--timeout", "60", gradients=500, seconds=0.03)
    run.reaches(20)
    os.kill(worker := run.pid("worker", "0"), signal.SIGSTOP)
    asleep = run.counts()
    until(lambda: all(run.counts()[w] > asleep[w] + 50 for w in (1, 2)), "steps of the others")
    os.kill(worker, signal.SIGCONT)
    trace = whole(run, 500)
    assert [i.what for i in trace.incidents if i.worker == 0] == ["joined", "left"]
    assert run.counts()[0] > asleep[0] + 1
    sane(trace, "pushes")


@pytest.mark.parametrize("kind", some(FEW, "pairs"))
def test_sigterm_at_a_peer(kind: str, processes: Processes) -> None:
    """It delivers, leaves in good order with status 0 and is not started again; the others do the rest."""
    run = launched(processes, kind, gradients=300, seconds=0.02)
    run.reaches(20)
    os.kill(run.pid("worker", "1"), signal.SIGTERM)
    trace = whole(run, 300)
    (left,) = (i for i in trace.incidents if i.worker == 1 and i.what != "joined")
    assert (left.what, left.lost) == ("left", 0)
    assert left.seconds < trace[-1].seconds
    assert "worker 1" not in run.processes.said(run.process)
    sane(trace, kind)


@pytest.mark.parametrize("kind", some(FEW, "pushes"))
def test_sigterm_at_the_launcher_of_peers(kind: str, processes: Processes) -> None:
    """All leave in good order, a snapshot is written, and nobody is left; --resume does the rest."""
    run = launched(processes, kind, gradients=300, seconds=0.02)
    run.reaches(40)
    run.process.send_signal(signal.SIGTERM)
    trace = whole(run, 300, status=130)
    done = len(trace)
    assert 40 <= done < 300
    assert [i.what for i in trace.incidents] == ["joined"] * 3 + ["left"] * 3
    run.resume()
    trace = whole(run, 300)
    assert f"at {done} gradients; lost since then: 0 gradients" in run.log("server-0")
    sane(trace, kind)


def launched(processes: Processes, kind: str, *words: str, gradients: int, seconds: float) -> Run:
    """A run of three peers."""
    words = ("--method", repr(KINDS[kind]), *words)
    return Run(processes, *words, gradients=gradients, workers=3, seconds=seconds)


def sane(trace: ob.Trace, kind: str) -> None:
    """The loss is about that of a run of one worker that nobody disturbs, or of three."""
    calm = [
        ob.simulate(KINDS[kind], ob.tasks.Quadratic(), ob.Cluster(n), gradients=len(trace)).figures["loss"]
        for n in (1, 3)
    ]
    settled(trace, calm)


def settled(trace: ob.Trace, calm: list[float]) -> None:
    """The loss has come down to that of calm runs, far below the first one. It is noise of few numbers then, other ones each
    time, as it happens who is killed when: ten times as much is still it.
    """
    problem = ob.tasks.Quadratic()
    first, noise = problem.evaluate(problem.x0())["loss"], 10 * max(calm)
    assert noise < first / 10
    assert trace.evaluations[-1].figures["loss"] < noise, calm
