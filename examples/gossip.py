"""Workers that talk to a few others: SGP, AD-PSGD, or SlowMo over SGP, on the digits that come with scikit-learn.

    torchrun --nproc-per-node 2 examples/gossip.py --method sgp
    offbeat launch --workers 2 examples/gossip.py --method slowmo

Under torchrun nothing else is to be started: rank 0 hosts the run.
"""

import argparse

import torch
from data import digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import offbeat as ob

METHODS = {
    "sgp": ob.methods.SGP(),  # in rounds, each sends half of its model to one other
    "ad-psgd": ob.methods.ADPSGD(),  # no rounds: each visits one other, and they meet in the middle
    "slowmo": ob.methods.SlowMo(ob.methods.SGP(), period=7),  # every 7 rounds all average, with slow momentum
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="sgp")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.05)
    args = parser.parse_args()

    torch.manual_seed(0)
    train, test = digits()
    loader = DataLoader(train, batch_size=20, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, nesterov=True)
    replica = ob.Replica(model, METHODS[args.method], optimizer=optimizer)
    for epoch in range(args.epochs):
        for x, y in replica.shard(loader):
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            replica.step(loss)
        with torch.no_grad():
            x, y = test[:]
            accuracy = (model(x).argmax(1) == y).double().mean()
        print(f"worker {replica.id}, epoch {epoch}: accuracy {accuracy:.2%}", flush=True)


if __name__ == "__main__":
    main()
