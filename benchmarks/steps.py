"""Steps per second of each worker, beside everybody else's: an MLP of 5.8 k parameters, batches of 32, two workers.

Grouped by what the workers exchange; LocalSGD and its like average every 8 steps. All descend by SGD with momentum: the
others by torch's optimizer, ours by the method's own rule, and where the row says so by torch's optimizer too. Each system
runs in an environment of its own, one thread for each process, all in turn, some times over. Ratios above 1: ours makes
more steps.
"""

from __future__ import annotations

from .measure import Row, over
from .systems import Driver, Lighted, Restless, System, in_turn

REPEATS = 5
GROUPS: dict[str, list[System]] = {
    "a gradient to a server": [
        System("ASGD", "ours_steps.py", "ASGD"),
        System("DANA-Zero", "ours_steps.py", "DANA-Zero"),
        Restless("torch.distributed.rpc", "rpc_server.py", ranks=3),
        Driver("Ray actors", "ray_server.py", package="ray[default]"),
    ],
    "an average in each step": [
        System("AllReduce", "ours_steps.py", "AllReduce"),
        System("DistributedDataParallel", "ddp.py"),
    ],
    "an average every 8 steps": [
        System("LocalSGD", "ours_steps.py", "LocalSGD"),
        System("LocalSGD, torch.optim", "ours_steps.py", "LocalSGD, torch.optim"),
        System("SlowMo", "ours_steps.py", "SlowMo"),
        System("SlowMo, torch.optim", "ours_steps.py", "SlowMo, torch.optim"),
        System("DiLoCo", "ours_steps.py", "DiLoCo"),
        System("PostLocalSGDOptimizer", "post_local_sgd.py"),
        Lighted("torchft LocalSGD", "torchft_rounds.py", "LocalSGD", "torchft-nightly"),
        Lighted("torchft DiLoCo", "torchft_rounds.py", "DiLoCo", "torchft-nightly"),
        Driver("Flower, simulated", "flower.py", package="flwr[simulation]"),
        Driver("EXO gym DiLoCo", "exo_gym.py", package="exogym @ git+https://github.com/exo-explore/gym", workers=2),
    ],
    "gossip in each step": [
        System("D-PSGD", "ours_steps.py", "D-PSGD"),
        System("SGP", "ours_steps.py", "SGP"),
        System("AD-PSGD", "ours_steps.py", "AD-PSGD"),
        System("decent-dp", "decent.py", "complete", "decent-dp"),
    ],
}
PAIRS = (
    ("ASGD", "torch.distributed.rpc"),
    ("DANA-Zero", "torch.distributed.rpc"),
    ("DANA-Zero", "Ray actors"),
    ("AllReduce", "DistributedDataParallel"),
    ("LocalSGD", "PostLocalSGDOptimizer"),
    ("LocalSGD", "torchft LocalSGD"),
    ("LocalSGD", "Flower, simulated"),
    ("LocalSGD, torch.optim", "PostLocalSGDOptimizer"),
    ("SlowMo", "PostLocalSGDOptimizer"),
    ("SlowMo, torch.optim", "PostLocalSGDOptimizer"),
    ("DiLoCo", "torchft DiLoCo"),
    ("DiLoCo", "EXO gym DiLoCo"),
    ("D-PSGD", "decent-dp"),
    ("SGP", "decent-dp"),
    ("AD-PSGD", "decent-dp"),
)
"""What is compared with what: as like as there is."""


def run() -> list[Row]:
    rows = [row for group, systems in GROUPS.items() for row in in_turn(systems, REPEATS, "steps/s", group)]
    by = {row.what: row for row in rows}
    return rows + [over(by[a], by[b], f"{a} / {b}", by[a].group, aim=1.0) for a, b in PAIRS]
