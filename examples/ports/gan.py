"""A DCGAN on images of 8 x 8 digits: two nets with an optimizer each, which step by turns."""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import offbeat as ob

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--seed", type=int, default=999)
args = parser.parse_args()
nz, width = 16, 16

images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
loader = DataLoader(TensorDataset(images), batch_size=16, shuffle=True, drop_last=True)


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, 2 * width, 2, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(True),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
            nn.ConvTranspose2d(width, 1, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.main(z)


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(2 * width, 1, 2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.main(x).flatten()


@torch.no_grad()
def distance() -> float:
    """The Frechet distance of 1,024 generated images to the real ones, as normal distributions of 64 pixels."""
    netG.eval()
    fake, real = netG(torch.randn(1024, nz, 1, 1)).flatten(1).double(), images.flatten(1).double()
    netG.train()
    a, b = torch.cov(fake.T), torch.cov(real.T)
    cross = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    return float((fake.mean(0) - real.mean(0)).square().sum() + a.trace() + b.trace() - 2 * cross)


torch.manual_seed(args.seed)
netG, netD = Generator(), Discriminator()
criterion = nn.BCEWithLogitsLoss()
optimizerD = torch.optim.Adam(netD.parameters(), lr=args.lr, betas=(0.5, 0.999))
optimizerG = torch.optim.Adam(netG.parameters(), lr=args.lr, betas=(0.5, 0.999))
replica = ob.Replica([netD, netG], default=ob.methods.DiLoCo(period=5), optimizer=[optimizerD, optimizerG])
for epoch in replica.epochs(args.epochs):
    for (real,) in replica.shard(loader):
        ones, zeros = torch.ones(len(real)), torch.zeros(len(real))
        # D: real images are real, and generated ones are not
        netD.zero_grad()
        errD_real = criterion(netD(real), ones)
        errD_real.backward()
        fake = netG(torch.randn(len(real), nz, 1, 1))
        errD_fake = criterion(netD(fake.detach()), zeros)
        errD_fake.backward()
        optimizerD.step()
        # G: D takes what is generated for real
        netG.zero_grad()
        errG = criterion(netD(fake), ones)
        errG.backward()
        optimizerG.step()
        replica.exchange()
    print(f"[{epoch}/{args.epochs}] Loss_D {errD_real + errD_fake:.3f} Loss_G {errG:.3f}", flush=True)

print(f"distance {distance():.4f}")
