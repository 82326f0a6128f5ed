"""torch.distributed.rpc: trainers call the server with a gradient and get the parameters, both as one vector."""

import os
import threading

import torch
import torch.distributed.rpc as rpc
from torch import Tensor
from work import Server, batches, flat, loss, model, timed

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
lock = threading.Lock()


def exchange(g: Tensor) -> Tensor:
    with lock:
        return server.exchange(g).clone()  # it is sent outside of the lock


if rank == 0:
    server = Server()
    rpc.init_rpc("server", rank=rank, world_size=size)
else:
    rpc.init_rpc(f"trainer-{rank}", rank=rank, world_size=size)
    net, batch = model(), batches(rank)
    x, g = flat(net)

    def step() -> None:
        g.zero_()
        loss(net, batch()).backward()
        x.copy_(rpc.rpc_sync("server", exchange, (g,)))

    timed(step, rank, torch.__version__)
rpc.shutdown()
