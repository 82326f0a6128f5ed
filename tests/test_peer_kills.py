"""Peers as real processes that are killed, stopped and told to go: the others go on, and nothing hangs."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
from crew import Processes, Run, until

import offbeat as ob

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


@pytest.mark.parametrize("kind", KINDS)
def test_peers_killed_twenty_times_at_random_moments(kind: str, processes: Processes) -> None:
    """Each is started again and welcomed by a living one. The run does all of its minibatches, each once, nobody waits for
    the dead beyond the time-out, and the loss is that of runs that nobody disturbs.
    """
    method, time_out, gradients, workers = KINDS[kind], 6.0, 800, 4
    words = ["--restarts", "25", "--timeout", str(time_out), "--method", repr(method)]
    run = Run(processes, *words, gradients=gradients, workers=workers, seconds=0.02)
    rng = random.Random(3)
    for kill in range(20):
        run.reaches(32 * kill)
        time.sleep(rng.uniform(0, 0.2))
        victims = until(lambda: processes.living("worker"), "a worker that is alive")
        os.kill(rng.choice(victims), signal.SIGKILL)
    trace = run.ends(replays=False)
    assert len(trace) == gradients
    steps = {w: [event.step for event in trace if event.worker == w] for w in range(workers)}
    assert [own == list(range(len(own))) for own in steps.values()] == [True] * workers
    assert run.said().count("was killed by SIGKILL") == 20
    crashes = [incident for incident in trace.incidents if incident.what == "crashed"]
    assert 5 < len(crashes) <= 20  # others had not joined yet
    assert trace.column("waited").max() < 2 * time_out
    problem = ob.tasks.Quadratic()
    calm = [
        ob.simulate(method, problem, ob.Cluster(workers, ob.Gamma(cv=0.3)), gradients=gradients, seed=seed).figures
        for seed in range(6)
    ]
    losses = [figures["loss"] for figures in calm]
    loss = trace.evaluations[-1].figures["loss"]
    assert min(losses) / 3 < loss < 3 * max(losses), (loss, losses)
