"""Transformers of any size, for language models and for translation, with normalisation before each part.

Vaswani et al. Attention Is All You Need. arXiv:1706.03762; the order of normalisation, learned positions and initial
weights are GPT-2's (Radford et al. 2019): Gaussian with deviation 0.02, less where a residual branch ends.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAD, BOS, EOS, UNK = range(4)
"""Token numbers with a meaning in `Translator`: nothing, start, end, a word that is not in the vocabulary."""


class Attention(nn.Module):
    """Attention with several heads, of ``x: Tensor[n, t, dim]`` to ``memory: Tensor[n, s, dim]``."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, memory: Tensor, keep: Tensor | None = None, causal: bool = False) -> Tensor:
        """``keep: bool Tensor[n, s]`` says which of the memory is there; causal: position t sees s <= t only."""
        q, k, v = (
            m(a).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for m, a in ((self.query, x), (self.key, memory), (self.value, memory))
        )
        mask = None if keep is None else keep[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Attention to itself, to a memory (``cross``), and a net of one hidden layer with four times the width."""

    def __init__(self, dim: int, heads: int, dropout: float, cross: bool = False) -> None:
        super().__init__()
        self.norm1, self.own = nn.LayerNorm(dim), Attention(dim, heads)
        if cross:
            self.norm2, self.cross = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm3 = nn.LayerNorm(dim)
        self.wide, self.narrow = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        keep: Tensor | None = None,
        causal: bool = False,
        memory: Tensor | None = None,
        memory_keep: Tensor | None = None,
    ) -> Tensor:
        y = self.norm1(x)
        x = x + self.drop(self.own(y, y, keep, causal))
        if memory is not None:
            x = x + self.drop(self.cross(self.norm2(x), memory, memory_keep))
        return x + self.drop(self.narrow(F.gelu(self.wide(self.norm3(x)))))  # type: ignore[no-any-return]


class Embedding(nn.Module):
    """Token and learned position, added: ``Tensor[n, t]`` of integers -> ``Tensor[n, t, dim]``."""

    def __init__(self, vocabulary: int, longest: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, dim), nn.Embedding(longest, dim)
        self.drop = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        where = self.position.weight[: tokens.shape[1]]
        return self.drop(self.token(tokens) + where)  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """A decoder without encoder: tokens ``Tensor[n, t]`` in, scores of the next ``Tensor[n, t, vocabulary]`` out.

    The scores' weights are the token embedding's (tied: Press and Wolf, arXiv:1608.05859).
    """

    def __init__(self, vocabulary: int, context: int, dim: int, layers: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.embed = Embedding(vocabulary, context, dim, dropout)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        initialise(self, layers)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, causal=True)
        return F.linear(self.norm(x), self.embed.token.weight)


class Translator(nn.Module):
    """An encoder and a decoder: source and target so far in, scores of the next target token out.

    In: ``Tensor[n, 2, t]`` of integers, row 0 the source, row 1 the target that starts with `BOS`, both ended with
    `PAD`. Out: ``Tensor[n, t', vocabulary]``, t' the longest target in the batch. Output weights are tied to the
    target's embedding.
    """

    def __init__(
        self, source: int, target: int, longest: int, dim: int, layers: int, heads: int, dropout: float
    ) -> None:
        """``source`` and ``target`` are the sizes of the vocabularies, ``longest`` the greatest t."""
        super().__init__()
        self.source = Embedding(source, longest, dim, dropout)
        self.target = Embedding(target, longest, dim, dropout)
        self.encoder = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.decoder = nn.ModuleList(Block(dim, heads, dropout, cross=True) for _ in range(layers))
        self.encoded, self.decoded = nn.LayerNorm(dim), nn.LayerNorm(dim)
        initialise(self, layers)

    def forward(self, pair: Tensor) -> Tensor:
        source, target = trim(pair[:, 0]), trim(pair[:, 1])
        return self.decode(target, *self.encode(source))

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """The memory ``Tensor[n, s, dim]`` of a source ``Tensor[n, s]``, and which of it is there."""
        keep = source != PAD
        x = self.source(source)
        for block in self.encoder:
            x = block(x, keep)
        return self.encoded(x), keep

    def decode(self, target: Tensor, memory: Tensor, keep: Tensor) -> Tensor:
        """Scores ``Tensor[n, t, vocabulary]`` after each token of ``target: Tensor[n, t]``."""
        # No mask for the target's padding: it comes last, so that what is causal never sees it.
        x = self.target(target)
        for block in self.decoder:
            x = block(x, causal=True, memory=memory, memory_keep=keep)
        return F.linear(self.decoded(x), self.target.token.weight)

    def translate(self, source: Tensor) -> Tensor:
        """The most likely token at each step (greedy), ``Tensor[n, <= longest]``: ends with `EOS`, then `PAD`.

        ``source: Tensor[n, s]``; use it in evaluation mode.
        """
        memory, keep = self.encode(trim(source))
        out = torch.full((len(source), 1), BOS, dtype=source.dtype, device=source.device)
        done = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        for _ in range(self.target.position.num_embeddings):
            scores = self.decode(out, memory, keep)[:, -1]
            scores[:, [PAD, BOS, UNK]] = -math.inf
            word = scores.argmax(1).to(out.dtype).masked_fill(done, PAD)
            done = done | (word == EOS)
            out = torch.cat([out, word[:, None]], 1)
            if bool(done.all()):
                break
        return out[:, 1:]


def trim(tokens: Tensor) -> Tensor:
    """``Tensor[n, t]`` without the columns at the end that are all `PAD`; at least one stays."""
    return tokens[:, : max(1, int((tokens != PAD).sum(1).max()))]


def next_token_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats per token that is not `PAD`: ``Tensor[n, t, vocabulary]``, ``Tensor[n, >= t]``."""
    targets = targets[:, : scores.shape[1]].flatten().long()
    return F.cross_entropy(scores.flatten(0, 1), targets, ignore_index=PAD)


def initialise(module: nn.Module, layers: int) -> None:
    """GPT-2's initial weights."""
    for name, m in module.named_modules():
        if isinstance(m, nn.Linear | nn.Embedding):
            ends = name.rsplit(".")[-1] in ("out", "narrow")
            nn.init.normal_(m.weight, std=0.02 / math.sqrt(2 * layers) if ends else 0.02)
        if isinstance(m, nn.Linear):
            nn.init.zeros_(m.bias)
