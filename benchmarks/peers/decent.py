"""decent-dp: gossip after each backward pass, over the complete graph or a ring."""

import importlib.metadata

import torch
import torch.distributed as dist
from decent_dp.ddp import DecentralizedDataParallel
from work import batches, loss, model, said, timed

dist.init_process_group("gloo")
rank = dist.get_rank()
batch = batches(rank)
net = DecentralizedDataParallel(
    model(),
    optim_fn=lambda named: torch.optim.SGD([p for _, p in named], lr=0.01, momentum=0.9),
    topology=said(),
)


def step() -> None:
    net.zero_grad()
    loss(net, batch()).backward()


net.train()
timed(step, rank, importlib.metadata.version("decent-dp"))
dist.destroy_process_group()
