"""torch's DistributedDataParallel over gloo: gradients are averaged in each step."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from work import batches, loss, model, optimizer, timed

dist.init_process_group("gloo")
rank = dist.get_rank()
net, batch = DistributedDataParallel(model(), gradient_as_bucket_view=True), batches(rank)
mine = optimizer(net)


def step() -> None:
    mine.zero_grad()
    loss(net, batch()).backward()
    mine.step()


timed(step, rank, torch.__version__)
dist.destroy_process_group()
