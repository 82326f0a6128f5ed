"""Two hosts, each a network namespace with a wire between them: all kinds of methods run across it, and outlive a cut."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from conftest import some
from crew import TOKEN, Processes, Run, heard, until

import offbeat as ob
from offbeat.runtime import snapshot

METHODS = {
    "server": ob.methods.DanaZero(lr=0.05),
    "rounds": ob.methods.SGP(ob.SGD(0.2)),
    "pushes": ob.methods.GoSGD(ob.SGD(0.2)),
    "pairs": ob.methods.ADPSGD(ob.SGD(0.2)),
    "gradients": ob.methods.AllReduce(ob.SGD(0.2)),
    "averages": ob.methods.LocalSGD(ob.Local(ob.SGD(0.2)), period=4),
    "both": ob.methods.SlowMo(ob.methods.SGP(ob.SGD(0.2)), period=4, beta=0.5),
}
"""A method of each kind."""
PROBLEM = ob.tasks.Quadratic(d=2000)
NEAR, FAR = "10.77.0.1", "10.77.0.2"


class Hosts:
    """Two network namespaces and a wire."""

    def __init__(self) -> None:
        self.near, self.far = (f"offbeat-{os.getpid()}-{end}" for end in ("near", "far"))

    def join(self) -> None:
        for host in (self.near, self.far):
            ip("netns", "add", host)
        ip("link", "add", "wire", "netns", self.near, "type", "veth", "peer", "name", "wire", "netns", self.far)
        for host, address in ((self.near, NEAR), (self.far, FAR)):
            ip("-n", host, "address", "add", f"{address}/24", "dev", "wire")
            for device in ("lo", "wire"):
                ip("-n", host, "link", "set", device, "up")

    def wire(self, state: str) -> None:
        ip("-n", self.far, "link", "set", "wire", state)

    @property
    def carried(self) -> int:
        """Bytes that have gone over the wire, both ways."""
        (wire,) = json.loads(ip("-json", "-statistics", "-n", self.near, "link", "show", "wire"))
        return sum(wire["stats64"][way]["bytes"] for way in ("rx", "tx"))

    def part(self) -> None:
        for host in (self.near, self.far):  # the wire goes with them
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "delete", host)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=20).stdout


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    try:
        try:
            made.join()
        except FileNotFoundError:
            pytest.skip("there is no program ip to make network namespaces with")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield made
    finally:
        with contextlib.suppress(FileNotFoundError):
            made.part()


class Across(Run):
    """A run whose server or coordinator and worker 0 are at the near host, and workers 1 and 2 at the far one."""

    def __init__(
        self, processes: Processes, hosts: Hosts, kind: str, transport: str, *words: str, gradients: int
    ) -> None:
        self.processes, self.hosts, self.method, self.workers = processes, hosts, METHODS[kind], 3
        self.folder, self.gradients = processes.folder / kind, gradients
        words = ("--workers", "3", "--transport", transport, "--status", "--out", kind, *words)
        words = ("--method", repr(self.method), "--gradients", str(gradients), "--evaluations", "1", *words)
        self.process = processes.offbeat(
            "server", "--host", NEAR, *words, OFFBEAT_NETNS=hosts.near, OFFBEAT_TOKEN=TOKEN
        )
        self.crew: list[subprocess.Popen[str]] = []

    def hire(self, seconds: float) -> None:
        """Workers, once the server says where it is."""
        first = until(lambda: self.processes.said(self.process).partition("\n")[0], "the server's address")
        words = ("worker", "--server", json.loads(first)["address"], "--problem", repr(PROBLEM))
        for number, host in enumerate((self.hosts.near, self.hosts.far, self.hosts.far)):
            its = ("--speed", f"Fixed({seconds})", "--number", str(number))
            self.crew.append(self.processes.offbeat(*words, *its, OFFBEAT_NETNS=host, OFFBEAT_TOKEN=TOKEN))

    def said(self) -> str:
        return "\n".join(f"{self.folder.name} {k}:\n{self.processes.said(p)}" for k, p in enumerate(self.all))

    @property
    def all(self) -> list[subprocess.Popen[str]]:
        return [self.process, *self.crew]

    def ends(self, status: int = 0, replays: bool = False) -> ob.Trace:
        """All end well, and all minibatches were taken, each once, to a loss as that of runs of one to three workers."""
        codes = [self.processes.ends(process) for process in self.all]
        assert codes == [status] * len(codes), self.said()
        assert "Traceback" not in self.said(), self.said()
        trace = ob.Trace.read(self.folder / "trace.jsonl")
        assert len(trace) == self.gradients
        for worker in range(3):
            steps = [event.step for event in trace if event.worker == worker]
            assert steps == list(range(len(steps)))
        found = snapshot.newest(self.folder / "snapshots", heard())
        assert found
        (one,) = found[1]["leases"]["passes"]
        assert (found[1]["leases"]["done"], one["next"], one["returned"]) == (self.gradients, self.gradients, [])
        calm = [
            ob.simulate(self.method, PROBLEM, ob.Cluster(workers), gradients=self.gradients).figures["loss"]
            for workers in (1, 3)
        ]
        loss = trace.evaluations[-1].figures["loss"]
        assert loss < 3 * max(calm), (self.folder.name, loss, calm)
        return trace


def begun(
    processes: Processes, hosts: Hosts, transports: list[str], seconds: float, *words: str, gradients: int
) -> list[Across]:
    """A run of each kind, all at once, over these transports by turns."""
    over = zip(METHODS, itertools.cycle(transports))
    runs = [Across(processes, hosts, kind, transport, *words, gradients=gradients) for kind, transport in over]
    for run in runs:
        run.hire(seconds)
    return runs


@pytest.mark.parametrize("transport", some(["auto", "gloo", "tcp"], "tcp"))
def test_all_kinds_of_methods_run_across_two_hosts(transport: str, processes: Processes, hosts: Hosts) -> None:
    """Over the wire, or through memory: two namespaces are still one machine, so `auto` shares its memory."""
    for run in begun(processes, hosts, [transport], 0.02, gradients=120):
        trace = run.ends()
        assert [i.what for i in trace.incidents] == ["joined"] * 3 + ["left"] * 3, run.said()
        assert len(run.counts()) == 3
    everything = 120 * 4 * 8 * PROBLEM.d  # were all messages of the four kinds without averages to cross the wire once
    assert (hosts.carried > everything) == (transport != "auto")


def far(counts: Counter[int]) -> list[int]:
    """Gradients of the workers at the far host."""
    return [counts[worker] for worker in (1, 2)]


@pytest.mark.parametrize("time_out", some([300.0, 2.0], 2.0))
def test_the_wire_is_cut(time_out: float, processes: Processes, hosts: Hosts) -> None:
    """Who waits for longer than the cut goes on as if nothing had happened. Else the far workers are taken for dead, the
    near one goes on alone, and they join again as new lives.
    """
    short = time_out < 300
    transports = ["tcp", "gloo"] if short else ["gloo", "tcp"]
    runs = begun(processes, hosts, transports, 0.1, "--timeout", str(time_out), gradients=240)
    for run in runs:
        run.reaches(30)
    hosts.wire("down")
    if short:
        for run in runs:
            until(lambda run=run: all(f"worker {w} is lost" in run.said() for w in (1, 2)), "their being given up")
        before = [run.counts() for run in runs]
        for run, count in zip(runs, before, strict=True):
            until(lambda run=run, count=count: run.counts()[0] >= count[0] + 5, "steps of the near one")
        assert [far(run.counts()) for run in runs] == [far(count) for count in before], "who is lost brings nothing"
    else:

        def stands() -> list[Counter[int]] | None:
            """What all have brought, if nothing comes from the far ones for a while: what was under way has come."""
            counts = [run.counts() for run in runs]
            time.sleep(3)
            return counts if [far(run.counts()) for run in runs] == [far(count) for count in counts] else None

        before = until(stands, "an end of what comes from the far workers")
    hosts.wire("up")
    for run, count in zip(runs, before, strict=True):
        trace = run.ends()
        what = {worker: [i.what for i in trace.incidents if i.worker == worker] for worker in range(3)}
        assert what[0] == ["joined", "left"], run.said()
        again = ["joined", "crashed", "joined", "left"] if short else ["joined", "left"]
        assert what[1] == what[2] == again, run.said()
        assert all(run.counts()[worker] > count[worker] for worker in range(3))
