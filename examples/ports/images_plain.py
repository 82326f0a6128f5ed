"""A residual net on images, with all that such scripts have: a schedule, --resume, --evaluate, and the best checkpoint."""

import argparse
import os
import shutil

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("-b", "--batch-size", type=int, default=32)
parser.add_argument("--lr", type=float, default=0.05)
parser.add_argument("--momentum", type=float, default=0.9)
parser.add_argument("--wd", "--weight-decay", dest="wd", type=float, default=1e-4)
parser.add_argument("--resume", default="", help="a checkpoint to go on from")
parser.add_argument("-e", "--evaluate", action="store_true", help="evaluate the checkpoint only")
parser.add_argument("--folder", default=".", help="where checkpoints go")
parser.add_argument("--seed", type=int, default=0)


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.shortcut = nn.Conv2d(inputs, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.shortcut(x)).relu()


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.layers = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layers(self.bn(self.conv(x)).relu()).mean((2, 3)))


class AverageMeter:
    """The mean of what it was given."""

    def __init__(self) -> None:
        self.sum, self.count = 0.0, 0

    def update(self, value: float, n: int) -> None:
        self.sum, self.count = self.sum + n * value, self.count + n

    @property
    def avg(self) -> float:
        return self.sum / self.count


def train(loader, model, criterion, optimizer, epoch) -> None:
    losses = AverageMeter()
    model.train()
    for i, (images, target) in enumerate(loader):
        loss = criterion(model(images), target)
        losses.update(loss.item(), len(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 20 == 0:
            print(f"Epoch: [{epoch}][{i}/{len(loader)}] Loss {losses.avg:.4f}", flush=True)


def validate(loader, model) -> float:
    top1 = AverageMeter()
    model.eval()
    with torch.no_grad():
        for images, target in loader:
            top1.update(100.0 * (model(images).argmax(1) == target).float().mean().item(), len(images))
    print(f" * Acc@1 {top1.avg:.3f}", flush=True)
    return top1.avg


def save_checkpoint(state, is_best: bool, folder: str) -> None:
    path = os.path.join(folder, "checkpoint.pth.tar")
    torch.save(state, path)
    if is_best:
        shutil.copyfile(path, os.path.join(folder, "model_best.pth.tar"))


def main() -> None:
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    digits = load_digits()
    images, labels = torch.tensor(digits.images).float()[:, None] / 8 - 1, torch.tensor(digits.target)
    train_loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), args.batch_size, shuffle=True)
    val_loader = DataLoader(TensorDataset(images[1400:], labels[1400:]), batch_size=200)

    model = ResNet()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, momentum=args.momentum, weight_decay=args.wd, nesterov=True
    )
    scheduler = MultiStepLR(optimizer, milestones=[args.epochs // 2, args.epochs * 3 // 4], gamma=0.1)
    start_epoch, best_acc1 = 0, 0.0

    if args.resume:
        checkpoint = torch.load(args.resume)
        start_epoch, best_acc1 = checkpoint["epoch"], checkpoint["best_acc1"]
        model.load_state_dict(checkpoint["state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        print(f"=> resumed at epoch {start_epoch}")
    if args.evaluate:
        validate(val_loader, model)
        return

    for epoch in range(start_epoch, args.epochs):
        train(train_loader, model, criterion, optimizer, epoch)
        acc1 = validate(val_loader, model)
        scheduler.step()
        is_best, best_acc1 = acc1 > best_acc1, max(acc1, best_acc1)
        state = {
            "epoch": epoch + 1,
            "state_dict": model.state_dict(),
            "best_acc1": best_acc1,
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
        }
        save_checkpoint(state, is_best, args.folder)
    print(f"best {best_acc1:.3f}")


if __name__ == "__main__":
    main()
