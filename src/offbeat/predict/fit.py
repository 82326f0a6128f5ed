"""What a recorded run shows of its cluster: a pure function of its trace.

Seconds per gradient are recorded as they passed. Where more threads were at work than the machine has cores, a part of them is
waiting for a core. It is told apart by what the processes themselves say of their processor time (`trace.Load`), so that the fit
holds what a gradient takes alone, and the simulator adds the waiting for as many workers as are asked for.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from statistics import fmean, median

import torch

from ..engines.cluster import Cluster
from ..engines.network import Network
from ..engines.processors import Machines
from ..engines.speed import Recorded
from ..names import read
from ..trace import Incident, Load, Trace

LEAST = 20
"""Gradients of each worker that a record must have, after its beginning."""
SHORT = 30.0
"""Seconds of a real record below which its figures are called uncertain."""
BEGINNING = 0.25
"""Part of a record that is left out, as workers start and kernels are compiled then."""
LONGEST_BEGINNING = 15.0
"""Seconds of a real record that are left out at most."""
BINS, RISING = 40, 0.2
"""Parts of a record of which the speed is looked at, and by what part the next ones may be slower than all that follow them."""
QUIET = 0.1
"""Cores of load by other processes that are not told from none."""
SMALL = 65_536
"""Bytes up to which a message's time on the way is taken for latency, and from which on for bandwidth."""


@dataclass(frozen=True)
class Fit:
    """What a record shows. Processor seconds are means, of the server's visits medians."""

    method: str
    """The recorded method, as its ``repr``."""
    kind: str
    """Its messages: ``server``, ``gossip`` or ``reduce``."""
    workers: int
    """Workers that were there for the most part of the record."""
    seconds: float
    """Of the record, without its beginning and while so many workers were there."""
    gradients: int
    """Taken in these seconds."""
    waiting: float
    """Share of the workers' time between gradients, 0 to 1: for the server, for others, and for their own part in it."""
    speed: Recorded
    """Seconds that a gradient takes alone on its cores."""
    machines: Machines | None
    """The machines, and what messages cost their processors; None where the record does not say."""
    network: Network
    """Latency and bandwidth."""
    message: float
    """Bytes that a worker sends at an exchange."""
    parameters: int
    """Of the model, all shards together."""
    known: Cluster | None
    """The cluster of a simulated record."""
    notes: tuple[str, ...]
    """What the record lacks, and what makes it uncertain."""
    correction: float = 1.0
    """By what the rates of the model are multiplied on the recorded cluster: see `calibrated`."""

    @property
    def rate(self) -> float:
        """Gradients per second, all workers together, as recorded."""
        return self.gradients / self.seconds

    @property
    def alone(self) -> float:
        """Mean seconds that a gradient takes alone on its cores."""
        return fmean(map(fmean, self.speed.seconds))


def fit(trace: Trace, shards: Sequence[Trace] = ()) -> Fit:
    """What ``trace`` shows; ``shards`` are those of the other servers of the same run.

    ``ValueError`` where it has no times, or too few gradients.
    """
    if not len(trace):
        raise ValueError("the record has no gradients: record a run for a minute, with two workers or more")
    compute = trace.column("compute")
    if not bool((compute > 0).any()) or not bool(compute.isfinite().all()):
        raise ValueError("the record has no seconds per gradient: record the run again with this version")
    notes: list[str] = []
    real = trace.header.get("engine") == "runtime"
    begin, settled = _settled(trace) if real else (BEGINNING * trace[-1].seconds, True)
    workers, windows, lost = _windows(trace, begin)
    moments = trace.column("seconds")
    begun = moments - compute  # a life's first gradient begins with the script, and may take long
    inside = torch.stack([(begun > a) & (moments <= b) for a, b in windows]).any(0)
    taken = sum(int(((moments > a) & (moments <= b)).sum()) for a, b in windows)
    names = trace.column("worker")
    seconds = {w: compute[inside & (names == w)] for w in sorted(set(names[inside].tolist()))}
    fewest = min(map(len, seconds.values()), default=0)
    if fewest < LEAST:
        raise ValueError(
            f"the record is too short: after its beginning one of {workers} workers has {fewest} gradients, and {LEAST} are needed; "
            "record a minute"
        )
    span = sum(b - a for a, b in windows)
    if real and span < SHORT:
        notes.append(f"the record is short ({span:.0f} s after its beginning): a minute is more certain")
    if not settled:
        notes.append(
            "the record's speed still rose in its second half: record for longer, as kernels are compiled at first"
        )
    if workers == 1:
        notes.append("one worker was recorded: what workers cost each other is not in the record; record two")
    if lost:
        notes.append(
            f"workers were lost {lost} times in the record: its figures are of the {span:.0f} s with {workers} workers, and the "
            "predictions are without losses"
        )
    sent = trace.column("sent")[inside]
    exchanges = float((sent > 0).double().mean()) or 1.0
    message = float(sent[sent > 0].mean()) if exchanges and bool((sent > 0).any()) else 0.0
    waited = trace.column("waited")[inside].clamp(min=0)
    of = max(1, int(trace.header.get("shard", [0, 1])[1]))
    loads = _Loads(trace.loads, windows)
    hosts = [_Loads(other.loads, windows) for other in shards]
    machines, factors = _machines(loads, hosts, {w: float(s.mean()) for w, s in seconds.items()}, exchanges, trace)
    if machines is None and real:
        notes.append(
            "the record has no processor times (column `load`): each worker is taken to have a processor of its own; record it "
            "again with this version"
        )
    if machines and machines.others:
        notes.append(
            f"other processes kept {machines.others:.1f} of {machines.cores:g} cores' worth of threads at work during the record: "
            "the predictions are made with the same load"
        )
    if real and math.isnan(loads.queued):
        notes.append("this system does not say how long threads wait for a core: that part is a guess")
    network = (
        _wire(trace, waited[waited > 0], machines, message * of, of) if real else Cluster.from_trace(trace).network
    )
    speed = Recorded(tuple(_mixed((s * factors.get(w, 1.0)).clamp(min=1e-9).tolist(), w) for w, s in seconds.items()))
    known = None
    if not real and "cluster" in trace.header:
        with contextlib.suppress(ValueError):  # a speed of the user's own
            known = read(trace.header["cluster"])
    return Fit(
        method=str(trace.header.get("method", "")),
        kind=str(trace.header.get("messages", "server")),
        workers=workers,
        seconds=span,
        gradients=taken,
        waiting=float(waited.sum() / (waited.sum() + compute[inside].sum())),
        speed=speed,
        machines=machines,
        network=network,
        message=message * of,
        parameters=int(trace.header.get("parameters", 1)) + sum(int(t.header.get("parameters", 0)) for t in shards),
        known=known,
        notes=tuple(notes),
    )


def _mixed(seconds: list[float], worker: int) -> tuple[float, ...]:
    """The same in another order: a processor's speed changes over minutes, and a simulation takes only the first of them."""
    Random(worker).shuffle(seconds)
    return tuple(seconds)


def _windows(trace: Trace, begin: float) -> tuple[int, list[tuple[float, float]], int]:
    """How many workers were there for the longest time, when that was, and how many were lost."""
    end = float(trace[-1].seconds)
    steps = [i for i in trace.incidents if i.what in ("joined", "left", "crashed")]
    comers = {i.worker for i in _firsts(steps) if i.what == "joined"}
    there = set(trace.column("worker").tolist()) - comers
    times = [(0.0, len(there))]
    for incident in steps:
        there = there | {incident.worker} if incident.what == "joined" else there - {incident.worker}
        times.append((incident.seconds, len(there)))
    stretches = [(max(a, begin), b, n) for (a, n), (b, _) in pairwise([*times, (end, 0)]) if b > max(a, begin)]
    total: Counter[int] = Counter()
    for a, b, n in stretches:
        total[n] += b - a  # type: ignore[assignment]
    workers = max(total, key=lambda n: (total[n], n))
    return workers, [(a, b) for a, b, n in stretches if n == workers], sum(i.what == "crashed" for i in steps)


def _settled(trace: Trace) -> tuple[float, bool]:
    """The seconds from which on a real run goes at the speed that it keeps, and whether it does: workers start first, and a server
    looks for the fastest way to serve a large model, beside training, for half a minute."""
    moments = trace.column("seconds")
    end = float(moments[-1])
    begin, width = min(BEGINNING * end, LONGEST_BEGINNING), end / BINS
    counts = torch.histc(moments, BINS, 0.0, end)
    for first in range(math.ceil(begin / width), BINS // 2 + 1):
        if counts[first : first + BINS // 10].mean() >= (1 - RISING) * counts[first:].mean():
            return max(begin, first * width), True
    return end / 2, False


def _firsts(steps: Sequence[Incident]) -> list[Incident]:
    """What happened first to each worker."""
    seen: dict[int, Incident] = {}
    for incident in steps:
        seen.setdefault(incident.worker, incident)
    return list(seen.values())


class _Loads:
    """What processes have had, per node: differences of readings that follow each other in one process."""

    def __init__(self, loads: Sequence[Load], windows: Sequence[tuple[float, float]]) -> None:
        self.pairs: dict[int, list[tuple[Load, Load]]] = defaultdict(list)
        for begin, end in windows:
            last: dict[int, Load] = {}
            for load in loads:
                if begin <= load.seconds <= end:
                    before = last.get(load.worker, load)
                    grown = load.gradients > before.gradients
                    if grown and load.processor >= before.processor:
                        self.pairs[load.worker].append((before, load))
                    if grown or load.worker not in last or load.processor < before.processor:
                        last[load.worker] = load

    def per_gradient(self, node: int, name: str) -> float:
        """The mean over time of one quantity per gradient; 0 where it is not known."""
        pairs = self.pairs.get(node, ())
        gradients = sum(b.gradients - a.gradients for a, b in pairs)
        return sum(getattr(b, name) - getattr(a, name) for a, b in pairs) / gradients if gradients else 0.0

    def of_a_visit(self) -> float:
        """Processor seconds of the host per gradient: the median over time, as snapshots and evaluations are no part of a visit."""
        found = [(b.processor - a.processor) / (b.gradients - a.gradients) for a, b in self.pairs.get(-1, ())]
        return median(found) if found else 0.0

    def rate(self, node: int, name: str) -> float:
        """One quantity per second, over all time."""
        pairs = self.pairs.get(node, ())
        wall = sum(b.wall - a.wall for a, b in pairs)
        return sum(getattr(b, name) - getattr(a, name) for a, b in pairs) / wall if wall > 0 else 0.0

    def share(self, node: int) -> float:
        """How fast its threads went when they were ready to run, at most 1: their share of a core."""
        used, queued = self.rate(node, "processor"), self.rate(node, "queued")
        return used / (used + queued) if used > 0 and queued >= 0 else 1.0

    @property
    def queued(self) -> float:
        return sum(self.rate(node, "queued") for node in self.pairs)

    def machine(self, node: int) -> str:
        return self.pairs[node][0][0].machine


def _machines(
    loads: _Loads, shards: Sequence[_Loads], wall: dict[int, float], exchanges: float, trace: Trace
) -> tuple[Machines | None, dict[int, float]]:
    """The machines, and by what factor each worker's gradients take less than recorded where it has its cores for itself."""
    workers = [w for w in wall if w in loads.pairs]
    if not workers or (-1 not in loads.pairs and trace.header.get("messages") == "server"):
        return None, {}
    alone, factors, processor = {}, {}, {}
    for w in workers:
        share = loads.share(w)
        used = max(0.0, loads.per_gradient(w, "processor") - loads.per_gradient(w, "exchange"))
        ready = used / share  # seconds for which it had a core, or waited for one
        asleep = max(0.0, wall[w] - ready)
        alone[w] = used + asleep if ready <= wall[w] else wall[w] * share  # else several of its threads are at work
        factors[w], processor[w] = alone[w] / wall[w], used
    exchange = fmean(loads.per_gradient(w, "exchange") for w in workers)
    servers = [loads, *shards]
    service = fmean(one.of_a_visit() for one in servers)
    places = Counter(loads.machine(w) for w in workers)
    here = -1 not in loads.pairs or loads.machine(-1) in places
    if trace.header.get("messages") == "server":
        handling, service = exchange / exchanges, service / exchanges
    else:  # a coordinator's part is the workers' who ask it
        handling, service = (exchange + (service if here else 0.0)) / exchanges, 0.0
    cores = loads.pairs[workers[0]][0][0].cores
    machine = loads.machine(workers[0])
    nodes = [n for n in loads.pairs if loads.machine(n) == machine]
    ours = sum(loads.rate(n, "processor") for n in nodes)
    ours += sum(one.rate(-1, "processor") for one in shards if one.pairs and one.machine(-1) == machine)
    queued = sum(max(0.0, loads.rate(n, "queued")) for n in nodes if not math.isnan(loads.rate(n, "queued")))
    busy = loads.rate(nodes[0], "busy")
    foreign = max(0.0, busy - ours) if busy == busy else 0.0
    others = foreign * (ours + queued) / ours if ours > 0 and foreign > QUIET else 0.0
    return (
        Machines(
            cores=cores,
            workers=None if here and len(places) == 1 else max(places.values()),
            load=max(1e-3, fmean(processor[w] / alone[w] for w in workers)),
            handling=handling,
            service=service,
            shards=len(servers),
            others=round(others, 2),
        ),
        factors,
    )


def _wire(trace: Trace, waited: torch.Tensor, machines: Machines | None, size: float, shards: int) -> Network:
    """What an exchange takes that nobody's processor is at: the network, and waking who waits. Of a real run."""
    dtype = str(trace.header.get("dtype", "")).removeprefix("torch.")
    floats = dtype if dtype in ("float64", "bfloat16", "float16") else None
    if not len(waited):
        return Network(shards=shards, dtype=floats)  # type: ignore[arg-type]
    quick = float(waited.quantile(0.2))  # of those that waited for nobody
    way = max(0.0, quick - (machines.handling + machines.service if machines else 0.0)) / 2
    if machines is not None and machines.workers is not None and size > SMALL and way > 0:
        return Network(bandwidth=size / way / shards, shards=shards, dtype=floats)  # type: ignore[arg-type]
    return Network(latency=way, shards=shards, dtype=floats)  # type: ignore[arg-type]
