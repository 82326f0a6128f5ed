"""torch.distributed.rpc: a call with the gradient, which returns the parameters."""

import os

import torch
import torch.distributed.rpc as rpc
from torch import Tensor
from work import LR, SIZE, timed

torch.set_num_threads(1)
rank = int(os.environ["RANK"])
x = torch.zeros(SIZE)


def exchange(g: Tensor) -> Tensor:
    return x.sub_(g, alpha=LR)


rpc.init_rpc(f"process-{rank}", rank=rank, world_size=2)
if rank == 0:
    g = torch.full((SIZE,), 1e-3)
    timed(lambda: rpc.rpc_sync("process-1", exchange, (g,)), rank, torch.__version__, warm=5, count=20)
rpc.shutdown()
