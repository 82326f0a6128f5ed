"""A small transformer learns to write Shakespeare by characters: your own AdamW at each worker, DiLoCo between them.

    offbeat launch --workers 2 examples/chars.py

Each worker takes ``--period`` steps by itself; then all average what they have moved, and go on from the same model.
"""

import argparse

import torch
from data import shakespeare
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

import offbeat as ob


class Chars(nn.Module):
    def __init__(self, vocabulary: int, context: int, dim: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, dim)
        self.place = nn.Embedding(context, dim)
        layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(dim, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.token(x) + self.place.weight
        return self.head(self.blocks(h, mask=self.mask, is_causal=True))


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        scores = model(x)
    return F.cross_entropy(scores.flatten(0, 1).float(), y.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--examples", type=int, help="how many windows of the text; default: all")
    parser.add_argument("--period", type=int, default=20, help="steps between two averages")
    parser.add_argument("--warmup", type=int, default=20, help="steps over which the learning rate rises")
    args = parser.parse_args()

    torch.manual_seed(0)
    train, test, vocabulary = shakespeare(context=64)
    loader = DataLoader(Subset(train, range(args.examples or len(train))), 32, shuffle=True, drop_last=True)
    model = Chars(vocabulary, context=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / args.warmup))
    replica = ob.Replica(model, ob.methods.DiLoCo(period=args.period), optimizer=optimizer)

    def report(when: str) -> None:
        with torch.no_grad():
            print(f"{when}: loss {loss_of(model, *test[:200]):.6f}", flush=True)

    report("start")
    for epoch in range(args.epochs):
        for x, y in replica.shard(loader):
            loss = loss_of(model, x, y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            replica.step(loss)
            scheduler.step()
        report(f"epoch {epoch}")


if __name__ == "__main__":
    main()
