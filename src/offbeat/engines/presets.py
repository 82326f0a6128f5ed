"""Clusters that people have, with the numbers of each and where they are from.

Each is a function of the number of workers and of the seconds that one of them takes for a gradient, which depend on the
model; the result is a plain `Cluster` to change further with ``dataclasses.replace``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .cluster import Cluster
from .faults import Crashes
from .network import Network
from .speed import Gamma

GIGABIT = 1e9 / 8
"""Bytes per second."""


def nvlink_host(workers: int = 8, seconds: float = 0.25) -> Cluster:
    """GPUs of one host, joined by NVLink.

    150 GB/s for each GPU and direction: six links of 25 GB/s of a V100 (NVIDIA's NVLink page: 300 GB/s both ways; an H100
    has 450). 3 microseconds: a small peer-to-peer write, 2.3 to 3.4 as measured by p2pBandwidthLatencyTest on A100 and
    H100. Times vary by 2 % (assumed). One pair of a DGX-1 has only one or two of the six links.
    """
    return Cluster(workers, Gamma(seconds, 0.02), network=Network(3e-6, 150e9))


def ethernet_10g(workers: int = 32, seconds: float = 0.25) -> Cluster:
    """Machines on 10 Gb/s Ethernet, as SlowMo's experiments had.

    Wang, Tantia, Ballas, Rabbat (arXiv:1910.00643, section 4) used 32 DGX-1 on "commodity 10 Gbps Ethernet"; a worker here
    is such a node. 30 microseconds one way: 20 between applications on a local network (Hurwitz, Feng. Hot Interconnects
    2003), 36 within a cloud's zone. Times vary by 5 % (assumed).
    """
    return Cluster(workers, Gamma(seconds, 0.05), network=Network(30e-6, 10 * GIGABIT))


def ethernet_1g(workers: int = 8, seconds: float = 0.25) -> Cluster:
    """Machines on 1 Gb/s Ethernet: an office, a laboratory, a cheap cluster.

    50 microseconds one way: netperf's round trip of one byte through a gigabit switch is 125. Machines differ by 10 % and
    times by 10 % (assumed).
    """
    return Cluster(workers, Gamma(seconds, 0.1, 0.1), network=Network(50e-6, GIGABIT))


def spot(workers: int = 32, seconds: float = 0.25) -> Cluster:
    """Spot machines of a cloud, that are taken away and come back.

    Half a loss per machine and hour, and 22 minutes until a replacement is there: between the 0.1 and 0.6 that the traces
    published with Bamboo (Thorpe et al. NSDI 2023) and "Can't be late" (Wu et al. NSDI 2024) come to, on bad days; a
    vendor's months average four orders of magnitude less. 10 Gb/s, 50 microseconds, times vary by 10 % (all assumed).
    Here machines are lost one at a time; in those traces two on average go at once.
    """
    return Cluster(
        workers,
        Gamma(seconds, 0.1),
        network=Network(50e-6, 10 * GIGABIT),
        faults=(Crashes(_within(seconds, 0.5), 22 * 60),),
    )


def home(workers: int = 16, seconds: float = 0.5) -> Cluster:
    """Volunteers' machines behind home connections, and a server in a data centre.

    100 Mb/s down and 50 up: the median of fixed connections worldwide is 97.6 and 52.8 (Ookla, January 2025). A session
    lasts 4 hours on average, as in sahajBERT's open training (40 volunteers, 600 sessions), and 10 hours pass until the
    next. 25 ms one way, 1 Gb/s at the server, machines that differ by 50 % and times by 20 % are assumed.
    """
    return Cluster(
        workers,
        Gamma(seconds, 0.2, 0.5),
        network=Network(25e-3, 50e6 / 8, download=100e6 / 8, server=GIGABIT),
        faults=(Crashes(_within(seconds, 0.25), 10 * 3600),),
    )


def _within(seconds: float, hourly: float) -> float:
    """The probability that what happens ``hourly`` times an hour happens within ``seconds``."""
    return -math.expm1(-hourly * seconds / 3600)


PRESETS: dict[str, Callable[..., Cluster]] = {
    "ethernet-10g": ethernet_10g,
    "ethernet-1g": ethernet_1g,
    "home": home,
    "nvlink-host": nvlink_host,
    "spot": spot,
}
"""The presets by their name on the command line."""
