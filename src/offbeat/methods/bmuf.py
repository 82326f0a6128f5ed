"""BMUF: block momentum over averages of local SGD.

classic:   S <- BM S + block_lr (G - mean_i W_i);   G <- G - S
Nesterov:  as classic, then  G <- G - BM S
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.periodic import OuterMethod
from ..core.values import require


class Block(NamedTuple):
    x: Tensor  # where the block began (G) [d]
    s: Tensor  # block momentum, in units of a step (S) [d]


@dataclass(frozen=True)
class BMUF(OuterMethod):
    """Blockwise model-update filtering, in its classic form (CBM).

    Chen, Huo. Scalable training of deep learning machines by incremental block training with intra-block parallel
    optimization and blockwise model-update filtering. ICASSP 2016.
    Differences from the paper: its text was not at hand; the form is fairseq's, on the mean over workers. CNTK's form,
    S <- eta S + (1 - eta) zeta sum_i (G - W_i), is block_momentum = eta, block_lr = (1 - eta) zeta n for n workers. S is
    not rescaled when the inner rate changes, and the peers' momentum is kept over a block's end (CNTK's program empties it:
    ``buffering="reset"``), which is where it differs from `SlowMo`.
    Weight decay is the rule's, the mean over peers is evaluated. S is the same at all peers; one that joins gets it.
    """

    block_lr: float = 1.0
    """Block learning rate (zeta), above 0."""
    block_momentum: float = 0.5
    """Block momentum (BM, eta), in [0, 1); 1 - 1/n keeps the pace of n workers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "block_lr", 0 < self.block_lr < math.inf, "must be a finite number above 0")
        require(self, "block_momentum", 0 <= self.block_momentum < 1, "must be in [0, 1)")

    def begin(self, x: Tensor, inner: Any) -> Block:
        return Block(x, torch.zeros_like(x))

    def outer(self, slow: Block, inner: Any, x: Tensor) -> tuple[Block, Tensor]:
        s = self.block_momentum * slow.s + self.block_lr * (slow.x - x)
        x = self.look(slow.x - s, s)
        return Block(x, s), x

    def look(self, x: Tensor, s: Tensor) -> Tensor:
        """Where the next block begins, the momentum step having led to ``x``. [d]"""
        return x

    def reseat(self, slow: Block, x: Tensor) -> Block:
        return slow._replace(x=x)


@dataclass(frozen=True)
class NesterovBMUF(BMUF, name="nesterov-bmuf"):
    """BMUF with Nesterov block momentum (NBM): the next block begins one momentum step further, and is measured from there.

    Chen, Huo. ICASSP 2016, in the form of fairseq and CNTK, which both keep the look-ahead as the new reference.
    Differences from the paper: as for BMUF. It is not re-parametrised Nesterov momentum.
    Weight decay is the rule's, the mean over peers is evaluated.
    """

    def look(self, x: Tensor, s: Tensor) -> Tensor:
        return x - self.block_momentum * s
