"""A small convolutional net on MNIST, in plain PyTorch."""

import argparse

import torch
from data import mnist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import offbeat as ob


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, kernel_size=5)
        self.conv2 = nn.Conv2d(16, 32, kernel_size=5)
        self.fc1 = nn.Linear(512, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def accuracy(model: nn.Module, loader: DataLoader) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    model.train()
    return right / len(loader.dataset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--examples", type=int, default=60_000, help="how many of the training set")
    parser.add_argument("--lr", type=float, default=0.02)
    args = parser.parse_args()

    torch.manual_seed(0)
    train, test = mnist(args.examples)
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    model = Net()
    optimizer = ob.Replica(model, ob.methods.DanaZero(args.lr, momentum=0.9))
    for epoch in range(args.epochs):
        for x, y in optimizer.shard(loader):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: accuracy {accuracy(model, DataLoader(test, batch_size=1000)):.2%}", flush=True)


if __name__ == "__main__":
    main()
