"""A small GPT that draws its minibatches itself, at random places of one long text."""

import argparse
import math

import torch
from torch import nn
from torch.nn import functional as F

import offbeat as ob

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--iters", type=int, default=600)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--lr", type=float, default=3e-3)
parser.add_argument("--seed", type=int, default=1337)
args = parser.parse_args()
block_size, warmup, eval_interval = 32, 20, 200


def write(length: int, generator: torch.Generator) -> torch.Tensor:
    """A text in which each letter follows from the one before it, but for noise."""
    table = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    noise, letters = torch.rand(length, generator=generator), torch.randint(0, 16, (length,), generator=generator)
    text = letters.tolist()
    for i in range(1, length):
        if noise[i] < 0.8:
            text[i] = int(table[text[i - 1]])
    return torch.tensor(text)


data = {"train": write(20_000, torch.Generator().manual_seed(1)), "val": write(4_000, torch.Generator().manual_seed(2))}


def get_batch(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    text = data[split]
    ix = torch.randint(len(text) - block_size, (args.batch_size,))
    x = torch.stack([text[i : i + block_size] for i in ix])
    y = torch.stack([text[i + 1 : i + 1 + block_size] for i in ix])
    return x, y


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, width = x.shape
        q, k, v = (part.view(b, t, 2, width // 2).transpose(1, 2) for part in self.qkv(self.ln_1(x)).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, width))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(16, width), nn.Embedding(block_size, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, 16, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
        return F.cross_entropy(self.head(self.ln_f(self.blocks(h))).flatten(0, 1), y.flatten())


@torch.no_grad()
def estimate_loss() -> float:
    model.eval()
    losses = [model(*get_batch("val")).item() for _ in range(20)]
    model.train()
    return sum(losses) / len(losses)


def get_lr(it: int) -> float:
    """Linear warm-up, then half a cosine."""
    if it < warmup:
        return args.lr * (it + 1) / warmup
    return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (it - warmup) / (args.iters - warmup))))


torch.manual_seed(args.seed)
model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1, betas=(0.9, 0.95))
replica = ob.Replica(model, default=ob.methods.DiLoCo(period=10), optimizer=optimizer)
for iter_num in replica.steps(args.iters):
    for group in optimizer.param_groups:
        group["lr"] = get_lr(iter_num)
    if iter_num % eval_interval == 0:
        print(f"step {iter_num}: val loss {estimate_loss():.4f}", flush=True)
    X, Y = get_batch("train")
    loss = model(X, Y)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    replica.step()
    optimizer.zero_grad(set_to_none=True)

print(f"val loss {estimate_loss():.4f}")
