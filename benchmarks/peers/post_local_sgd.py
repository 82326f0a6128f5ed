"""torch's own PostLocalSGDOptimizer: local SGD with a periodic average by all-reduce."""

import torch
import torch.distributed as dist
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from work import PERIOD, batches, loss, model, optimizer, timed

dist.init_process_group("gloo")
rank = dist.get_rank()
net, batch = model(), batches(rank)
mine = PostLocalSGDOptimizer(optimizer(net), PeriodicModelAverager(period=PERIOD, warmup_steps=0))


def step() -> None:
    mine.zero_grad()
    loss(net, batch()).backward()
    mine.step()


timed(step, rank, torch.__version__)
dist.destroy_process_group()
