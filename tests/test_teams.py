"""Workers of several ranks: DDP or FSDP2 inside, parts of the model between counterparts, and exactly what one rank would do."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from crew import Nursery, Processes, heard, until
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import offbeat as ob

SCRIPT = """
import os, sys, time
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
import offbeat as ob
from test_teams import data, net

inside, method, optimizer, pause, passes = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = net()
if inside == "FSDP2":
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
else:
    model = DistributedDataParallel(model)
mine = torch.optim.AdamW(model.parameters(), lr=0.01) if optimizer == "AdamW" else None
replica = ob.Replica(model, eval(method, {"ob": ob}), optimizer=mine, group=dist.group.WORLD)
for _ in range(int(passes)):
    for x, y in replica.shard(DataLoader(data(), batch_size=8)):
        time.sleep(float(pause))
        (model(x) - y).square().mean().backward()
        replica.step()
whole = [p.full_tensor() if inside == "FSDP2" else p for p in model.parameters()]
torch.save(torch.cat([p.detach().reshape(-1) for p in whole]), f"{replica.id}-{replica.team.rank}.pt")
replica.leave()
dist.destroy_process_group()
"""


def data() -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(96, 5).double(), torch.randn(96, 3).double())


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """One that has imported what the script does."""
    nursery = Nursery(
        tmp_path_factory.mktemp("nursery"), "pytest", "torch.distributed.fsdp", "torch.distributed.tensor"
    )
    yield nursery
    nursery.close()


def start(
    processes: Processes,
    inside: str,
    method: str,
    *words: str,
    optimizer: str = "none",
    pause: float = 0,
    passes: int = 2,
) -> subprocess.Popen[str]:
    """Launches the script with these arguments and options."""
    (processes.folder / "teams.py").write_text(SCRIPT)
    script = ("teams.py", inside, method, optimizer, str(pause), str(passes))
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return processes.offbeat("launch", *words, "--ranks", "2", "--out", "run", *script, **environment)


def ends(processes: Processes, process: subprocess.Popen[str]) -> str:
    """What a launch has said, once it has ended well."""
    assert processes.ends(process) == 0, processes.said(process) + logs(processes.folder)
    return processes.said(process)


def logs(folder: Path) -> str:
    """What the workers have said."""
    return "".join(f"\n{file.name}:\n{file.read_text()}" for file in sorted(folder.glob("run/logs/*")))


def alone(method: ob.Method, optimizer: str) -> Tensor:
    """Where one worker of one rank ends."""
    model = net()
    mine = torch.optim.AdamW(model.parameters(), lr=0.01) if optimizer == "AdamW" else None
    replica = ob.Replica(model, method, optimizer=mine)
    for _ in range(2):
        for x, y in replica.shard(DataLoader(data(), batch_size=8)):
            (model(x) - y).square().mean().backward()
            replica.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(
    ("inside", "method", "optimizer"),
    [
        ("DDP", "ob.methods.DanaZero(0.05)", "none"),
        ("FSDP2", "ob.methods.DanaZero(0.05)", "none"),
        ("DDP", "ob.methods.SlowMo(period=4, beta=0.5, buffering='average')", "AdamW"),
        ("FSDP2", "ob.methods.SlowMo(period=4, beta=0.5, buffering='average')", "AdamW"),
        ("FSDP2", "ob.methods.SGP()", "none"),
    ],
)
def test_two_ranks_do_what_one_does(
    inside: str, method: str, optimizer: str, processes: Processes, tmp_path: Path
) -> None:
    ends(processes, start(processes, inside, method, "--workers", "1", "--restarts", "0", optimizer=optimizer))
    wanted = alone(eval(method, {"ob": ob}), optimizer)
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"0-{rank}.pt"), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("inside", "method"), [("DDP", "ob.methods.DanaZero(0.02)"), ("FSDP2", "ob.methods.LocalSGD(period=4)")]
)
def test_a_rank_is_killed(inside: str, method: str, processes: Processes, tmp_path: Path) -> None:
    """Its worker is started again as a whole, the other one goes on, and the ranks of each end with the same model."""
    process = start(processes, inside, method, "--workers", "2", "--timeout", "6", pause=0.03, passes=20)
    trace = tmp_path / "run/shard-0/trace.jsonl"

    def brought() -> bool:
        """Whether both have come, one perhaps seconds after the other, and have brought something."""
        text = trace.read_text() if trace.exists() else ""
        return all(text.count(f'"worker": {worker}') > 5 for worker in range(2))

    until(brought, "some gradients of each")
    ranks = processes.living("teams", rank="1")
    assert len(ranks) == 2
    os.kill(ranks[0], signal.SIGKILL)
    said = ends(processes, process)
    assert said.count("starting it again") == 1, said + logs(tmp_path)
    assert len(ob.Trace.read(trace)) == 20 * 12
    for worker in range(2):
        a, b = (torch.load(tmp_path / f"{worker}-{rank}.pt") for rank in range(2))
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_gossip_needs_shards() -> None:
    """What would come to one rank and not to the other cannot be put together."""
    from offbeat.runtime.entry import enter
    from offbeat.runtime.place import Place
    from offbeat.runtime.team import Team

    team = Team()
    team.size = 2
    place = Place(("127.0.0.1:1", "127.0.0.1:2"))
    with pytest.raises(ValueError, match="gossip does not come to all ranks at once"):
        enter(place, torch.zeros(3), ob.methods.SGP(), {}, ob.names.read, heard(), team=team)
    with pytest.raises(ValueError, match=r"a worker of 2 ranks, and 1 servers .* offbeat launch --ranks 2"):
        enter(Place(("127.0.0.1:1",)), torch.zeros(3), ob.methods.ASGD(), {}, ob.names.read, heard(), team=team)
