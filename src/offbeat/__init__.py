"""offbeat trains PyTorch models without lockstep: asynchronous, gossiping and rarely talking workers.

    import offbeat as ob
    run = ob.simulate(ob.methods.DanaZero(lr=0.05), ob.tasks.Digits(), ob.Cluster(workers=32), gradients=4000)
"""

__version__ = "0.1.0"

from . import core, methods
from .core.descent import SGD, Adam, AdamW, Rule
from .core.method import GradientServer, Local, Method, ServerMethod
from .core.master import Correction, Master, Uncorrected
from .core.problem import Problem
from .core.schedule import Constant, Cosine, MultiStep, Product, Schedule, Sequence, Warmup
from .engines.cluster import Cluster, Crash, Join, Leave
from .engines.simulator import Run, simulate
from .engines.speed import Fixed, Gamma, LogNormal, Recorded, Speed
from .failure import Deadlock, Diverged, Failure, WorkerLost
from .trace import Event, Incident, Trace
