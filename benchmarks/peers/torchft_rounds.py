"""torchft's LocalSGD and DiLoCo: each worker a replica group of one, with a lighthouse that decides who takes part."""

import importlib.metadata
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torchft import Manager, ProcessGroupGloo
from torchft.local_sgd import DiLoCo, LocalSGD
from work import PERIOD, batches, loss, model, optimizer, said, timed

kind, rank = said(), int(os.environ["RANK"])
os.environ["TORCHFT_LIGHTHOUSE"] = f"http://127.0.0.1:{int(os.environ['MASTER_PORT']) + 1}"
net, batch = model(), batches(rank)
mine = optimizer(net)
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
limit = timedelta(seconds=20)
manager = Manager(
    pg=ProcessGroupGloo(timeout=limit),
    load_state_dict=lambda state: net.load_state_dict(state["model"]),
    state_dict=lambda: {"model": net.state_dict()},
    min_replica_size=2,
    use_async_quorum=False,
    timeout=limit,
    quorum_timeout=limit,
    connect_timeout=limit,
    rank=0,
    world_size=1,
    store_addr="127.0.0.1",
    store_port=store.port,
    replica_id=f"worker-{rank}",
    hostname="127.0.0.1",
)
outer = torch.optim.SGD(net.parameters(), lr=0.7, momentum=0.9, nesterov=True)


def step() -> None:
    mine.zero_grad()
    loss(net, batch()).backward()
    mine.step()


rounds = {
    "LocalSGD": lambda: LocalSGD(manager, net, mine, sync_every=PERIOD),
    "DiLoCo": lambda: DiLoCo(manager, [net], mine, outer, sync_every=PERIOD, pin_memory=False),
}
with rounds[kind]():
    timed(step, rank, importlib.metadata.version("torchft-nightly"))
manager.shutdown(wait=False)
os._exit(0)  # its threads would keep the process
