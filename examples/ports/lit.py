"""A convolutional net on digits, by the Trainer of Lightning."""

import argparse

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import offbeat as ob
from offbeat.integrations.lightning import OffbeatStrategy


class Net(L.LightningModule):
    def __init__(self, epochs: int, steps: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean() * 100)

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.05, total_steps=self.hparams.epochs * self.hparams.steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def digits() -> tuple[TensorDataset, TensorDataset]:
    found = load_digits()
    x, y = torch.from_numpy(found.images).float()[:, None] / 16, torch.from_numpy(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1408], order[1408:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    L.seed_everything(args.seed)
    train, test = digits()
    loader, validation = DataLoader(train, 32, shuffle=True), DataLoader(test, 400)
    model = Net(args.epochs, len(loader))
    best = L.pytorch.callbacks.ModelCheckpoint(
        "checkpoints", monitor="accuracy", mode="max", enable_version_counter=False
    )
    strategy = OffbeatStrategy(default=ob.methods.LocalSGD(period=4))
    trainer = L.Trainer(
        strategy=strategy, max_epochs=args.epochs, callbacks=[best], logger=False, enable_progress_bar=False
    )
    trainer.fit(model, loader, validation)
    (figures,) = trainer.validate(model, validation, verbose=False)
    print(f"accuracy {figures['accuracy']:.2f}", flush=True)


if __name__ == "__main__":
    main()
