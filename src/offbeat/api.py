"""The public names: what ``offbeat.NAME`` is."""

from . import methods, tasks
from .core.descent import SGD, Adam, AdamW, Rule
from .core.gossip import AveragingGossipMethod, GossipMethod, PairGossipMethod, PushGossipMethod, RoundGossipMethod
from .core.master import Correction, Master, Uncorrected
from .core.method import GradientServer, Local, Method, ServerMethod
from .core.periodic import OuterMethod, PeriodicMethod
from .core.problem import Problem
from .core.schedule import Constant, Cosine, MultiStep, Product, Schedule, Sequence, Warmup
from .core.topology import (
    Complete,
    Exponential,
    Graph,
    Mixing,
    OnePeerExponential,
    RandomMatching,
    RandomPeer,
    RandomPull,
    Ring,
    Star,
    Topology,
    Torus,
)
from .engines import presets
from .engines.cluster import Cluster, Crash, Join, Leave
from .engines.faults import Crashes, Fault, Loss, Partition, Straggler
from .engines.network import Link, Network
from .engines.processors import Machines
from .engines.simulator import Run, simulate
from .engines.speed import Fixed, Gamma, LogNormal, Recorded, Speed
from .experiment import Comparison, Grid, compare, rerun
from .failure import Deadlock, Diverged, Failure, WorkerLost
from .runtime.link import LinkLost
from .runtime.replica import Replica
from .tasks import Supervised
from .trace import Event, Incident, Trace

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "AveragingGossipMethod",
    "Cluster",
    "Comparison",
    "Complete",
    "Constant",
    "Correction",
    "Cosine",
    "Crash",
    "Crashes",
    "Deadlock",
    "Diverged",
    "Event",
    "Exponential",
    "Failure",
    "Fault",
    "Fixed",
    "Gamma",
    "GossipMethod",
    "GradientServer",
    "Graph",
    "Grid",
    "Incident",
    "Join",
    "Leave",
    "Link",
    "LinkLost",
    "Local",
    "LogNormal",
    "Loss",
    "Machines",
    "Master",
    "Method",
    "Mixing",
    "MultiStep",
    "Network",
    "OnePeerExponential",
    "OuterMethod",
    "PairGossipMethod",
    "Partition",
    "PeriodicMethod",
    "Problem",
    "Product",
    "PushGossipMethod",
    "RandomMatching",
    "RandomPeer",
    "RandomPull",
    "Recorded",
    "Replica",
    "Ring",
    "RoundGossipMethod",
    "Rule",
    "Run",
    "Schedule",
    "Sequence",
    "ServerMethod",
    "Speed",
    "Star",
    "Straggler",
    "Supervised",
    "Topology",
    "Torus",
    "Trace",
    "Uncorrected",
    "Warmup",
    "WorkerLost",
    "compare",
    "methods",
    "presets",
    "rerun",
    "simulate",
    "tasks",
]
