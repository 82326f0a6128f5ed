"""What other runs would do on a cluster that a record shows: their time alone, by the simulator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..core.method import Method, ServerMethod
from ..engines.cluster import Cluster
from ..engines.simulator import Simulation, messages
from ..tasks.time_only import TimeOnly
from .fit import BEGINNING, Fit

KINDS = ("dana-zero", "ssp", "backup-workers", "all-reduce", "local-sgd", "sgp", "ad-psgd")
"""One method of each kind, which has the times of all of its kind."""
EACH, LEAST, MOST = 60, 600, 12_000
"""Gradients of each worker that are simulated, and of all of them together at least and at most."""
WORKERS = 0.25
"""A worker's part of what an exchange with a server costs processors, where the record is of a method without one."""
FULL = 0.95
"""From which share of its time on something is said to be saturated."""


@dataclass(frozen=True)
class Prediction:
    """What a run with a method and so many workers would do."""

    method: str
    """Its name, with the settings that were given."""
    workers: int
    rate: float
    """Gradients per second, all workers together."""
    bytes: float
    """Bytes per second that the workers send, all together."""
    waiting: float
    """Share of the workers' time between gradients, 0 to 1."""
    lag: float
    """Mean updates of the model between a gradient's reading and its effect; of peers, visits by others meanwhile."""
    limit: str
    """What would have to be faster for the run to be."""
    known: float | None = None
    """Gradients per second on the cluster of a simulated record, which is known."""


def calibrated(fit: Fit, method: Method) -> tuple[Fit, Prediction]:
    """``fit`` with the correction that makes the recorded ``method`` as fast as it was, and what the model gives without it.

    What is left out of the model (snapshots, caches, a scheduler that is not quite fair) slows other runs on the same machines as well.
    """
    plain = predict(replace(fit, correction=1.0), "recorded", method, fit.workers)
    return replace(fit, correction=fit.rate / plain.rate), plain


def predict(
    fit: Fit, name: str, method: Method, workers: int, preset: Callable[..., Cluster] | None = None
) -> Prediction:
    """What ``method``, called ``name``, would do with so many ``workers`` on the recorded cluster, or on one like ``preset`` with
    the recorded gradients. ``ValueError`` where the method cannot have so many."""
    cluster = cluster_of(fit, method, workers, preset)
    simulation = _run(cluster, method, fit)
    known = None
    if fit.known is not None and preset is None:
        known = _rate(_run(replace(fit.known, workers=workers, events=(), faults=()), method, fit))
    correction = fit.correction if preset is None else 1.0
    sent, waiting, lag = _shares(simulation)
    limit = _limit(simulation, cluster, method)
    return Prediction(name, workers, correction * _rate(simulation), correction * sent, waiting, lag, limit, known)


def cluster_of(fit: Fit, method: Method, workers: int, preset: Callable[..., Cluster] | None = None) -> Cluster:
    """The cluster of ``fit`` for so many ``workers`` and the messages of ``method``; or the ``preset``'s network and faults with
    the fit's gradients, a machine for each worker."""
    machines = fit.machines
    if machines is not None and (messages(method) == "server") != (fit.kind == "server"):
        both = machines.handling + machines.service  # a peer does by itself what a server does for a worker
        mine = WORKERS * both if messages(method) == "server" else both
        machines = replace(machines, handling=mine, service=both - mine)
    if preset is None:
        return Cluster(workers, fit.speed, network=fit.network, machines=machines)
    like = preset(workers, fit.alone)
    network = replace(like.network, shards=fit.network.shards, dtype=fit.network.dtype)
    return replace(
        like, speed=fit.speed, network=network, machines=machines and replace(machines, workers=1, others=0.0)
    )


def _run(cluster: Cluster, method: Method, fit: Fit) -> Simulation:
    """A run's time alone."""
    each = EACH * max(1, _period(method))
    gradients = max(LEAST, min(MOST, each * cluster.workers))
    simulation = Simulation(method, TimeOnly(fit.parameters), cluster, gradients)
    simulation.run()
    return simulation


def _period(method: Method) -> int:
    return int(getattr(method, "period", 1))


def _rate(simulation: Simulation) -> float:
    """Gradients per second, without the beginning."""
    seconds = simulation.trace.column("seconds")
    first = int(BEGINNING * len(seconds))
    return (len(seconds) - 1 - first) / float(seconds[-1] - seconds[first])


def _shares(simulation: Simulation) -> tuple[float, float, float]:
    """Bytes per second, the share of waiting, and the mean lag, without the beginning."""
    trace = simulation.trace
    first = int(BEGINNING * len(trace))
    seconds, sent, waited, compute, lag = (
        trace.column(name)[first:].double() for name in ("seconds", "sent", "waited", "compute", "lag")
    )
    return (
        float(sent[1:].sum() / (seconds[-1] - seconds[0])),
        float(waited.sum() / (waited.sum() + compute.sum())),
        float(lag.mean()),
    )


def _limit(simulation: Simulation, cluster: Cluster, method: Method) -> str:
    """What is always at work in a run; else what most of the waiting is for."""
    now, processors, network, machines = (
        simulation.clock.now,
        simulation.processors,
        cluster.network,
        cluster.machines,
    )
    sent, waiting, _ = _shares(simulation)
    server = messages(method) == "server"
    serving = processors.serving / now if processors is not None else 0.0
    if processors is not None and machines is not None:
        if max(machine.busy / machine.cores for machine in processors.each.values()) > FULL * now:
            return "the machine's cores" if machines.workers is None else "a machine's cores"
        if serving > FULL:
            return "the server's processor"
    card = network.bandwidth if network.server is None else network.server
    if server and sent > FULL * card * network.shards:
        return "the server's wire"
    if waiting < 0.1:
        return "the workers' compute"
    waited, transit = (float(simulation.trace.column(name).sum()) for name in ("waited", "transit"))
    wire = waiting * min(
        1.0, transit * (2 if server else 1) / waited
    )  # a server's reply is as long on the way as the message
    served = serving / cluster.workers
    waits = not server or (isinstance(method, ServerMethod) and method.gated)
    rest = waiting - wire - served
    parts = {
        "the wire": wire,
        "the server's processor": served,
        "the slowest worker" if waits else "the server's queue": rest,
    }
    return max(parts, key=lambda name: parts[name])
