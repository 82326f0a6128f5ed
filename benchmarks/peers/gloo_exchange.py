"""Bare ``torch.distributed``: send and recv over gloo."""

import os

import torch
import torch.distributed as dist
from work import LR, SIZE, timed

WARM, COUNT = 5, 20
torch.set_num_threads(1)
dist.init_process_group("gloo")
x, g = torch.zeros(SIZE), torch.full((SIZE,), 1e-3)
if dist.get_rank() == 0:

    def exchange() -> None:
        dist.send(g, 1)
        dist.recv(x, 1)

    timed(exchange, 0, torch.__version__, WARM, COUNT)
else:
    for _ in range(WARM + int(os.environ["BENCH_REPEATS"]) * COUNT):
        dist.recv(g, 0)
        x.sub_(g, alpha=LR)
        dist.send(x, 0)
dist.destroy_process_group()
