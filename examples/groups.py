"""Two workers of two processes each: within a worker DDP or FSDP2 keeps step, between workers nobody waits.

offbeat launch --workers 2 --ranks 2 examples/groups.py             # DistributedDataParallel
offbeat launch --workers 2 --ranks 2 examples/groups.py --shard     # FSDP2: each rank has a part of the model
"""

import argparse

import torch
import torch.distributed as dist
from data import mnist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import offbeat as ob


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=20_000, help="how many of the training set")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--shard", action="store_true", help="FSDP2 in the place of DDP")
    args = parser.parse_args()

    dist.init_process_group("gloo")  # the ranks of this worker
    torch.manual_seed(0)
    train, test = mnist(args.examples)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    if args.shard:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        model = DistributedDataParallel(model)
    replica = ob.Replica(model, ob.methods.DanaZero(args.lr), group=dist.group.WORLD)
    for x, y in replica.shard(DataLoader(train, batch_size=64, shuffle=True, drop_last=True)):
        F.cross_entropy(model(x), y).backward()  # each rank has its half of the 64
        replica.step()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(test, batch_size=1000))
    print(f"rank {dist.get_rank()} of worker {replica.id}: accuracy {right / len(test):.2%}\n", end="", flush=True)
    replica.leave()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
