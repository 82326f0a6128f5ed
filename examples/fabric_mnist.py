"""MNIST with Lightning Fabric: Fabric looks after the device and precision of each worker, offbeat after the workers.

    offbeat launch --workers 2 examples/fabric_mnist.py

A worker is a Fabric of one device. Call what Fabric wraps; give offbeat the module and the loader that are inside.
"""

import argparse

import torch
from data import mnist
from lightning_fabric import Fabric
from mnist_plain import Net, accuracy
from torch.nn import functional as F
from torch.utils.data import DataLoader

import offbeat as ob


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--examples", type=int, default=60_000, help="how many of the training set")
    parser.add_argument("--lr", type=float, default=0.05)
    args = parser.parse_args()

    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")  # no strategy, and no fabric.launch()
    train, test = mnist(args.examples)
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)  # `shard` deals its minibatches out
    tests = fabric.setup_dataloaders(DataLoader(test, batch_size=1000))
    net = Net()
    model = fabric.setup_module(net)  # moves net to its device: before the optimizer and the replica are made
    optimizer = torch.optim.SGD(net.parameters(), lr=args.lr, momentum=0.9)
    replica = ob.Replica(net, ob.methods.LocalSGD(period=5), optimizer=optimizer)
    for epoch in range(args.epochs):
        for batch in replica.shard(loader):
            x, y = fabric.to_device(batch)
            loss = F.cross_entropy(model(x), y)
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            replica.step(loss)
        print(f"epoch {epoch}: accuracy {accuracy(model, tests):.2%}", flush=True)


if __name__ == "__main__":
    main()
