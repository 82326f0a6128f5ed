"""A problem that costs time and nothing else: for questions about clusters, not about learning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.values import require, require_count


@dataclass(frozen=True)
class TimeOnly:
    """Nothing is learnt: gradients are 0, and only what they and their messages take on the cluster counts.

    The model is one number that stands for ``parameters`` of them, so messages cost what those of such a model would,
    and a run of a thousand workers takes seconds. It has no figures. Raises ``ValueError`` for bad fields.
    """

    parameters: int = 1_000_000
    """How many float32 parameters the model is taken to have, at least 1."""
    seed: int = 0
    """Any integer; there is nothing for it to decide."""

    def __post_init__(self) -> None:
        require_count(self, "parameters")
        require(self, "seed", isinstance(self.seed, int), "choose an integer")

    def x0(self) -> Tensor:
        """One zero, ``Tensor[1]``."""
        return torch.zeros(1)

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        """One zero ``Tensor[1]``, and a loss of 0 ``Tensor[]``."""
        return torch.zeros(1), torch.zeros(())

    def evaluate(self, x: Tensor) -> dict[str, float]:
        """Nothing."""
        return {}
