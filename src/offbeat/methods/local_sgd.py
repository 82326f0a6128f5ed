"""Local SGD: every peer descends on its own, and every H steps all take the mean of their parameters."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.periodic import OuterMethod
from ..core.values import require_count


@dataclass(frozen=True)
class LocalSGD(OuterMethod):
    """Parameters averaged every ``period`` steps; ``buffering="average"`` is double averaging (Yu et al. 2019).

    Stich. Local SGD Converges Fast and Communicates Little. ICLR 2019. arXiv:1805.09767. With Adam as the rule it is
    local Adam; with a gossip method as ``inner`` it is that method with exact averages in between.
    Differences from the paper: any rule or inner method. Momentum stays at the peer unless ``buffering`` says otherwise.
    Weight decay is the rule's, the mean over peers is evaluated. A peer that dies takes its steps since the last average
    along; one that joins starts at an average, with empty buffers.
    """


@dataclass(frozen=True)
class PostLocalSGD(OuterMethod):
    """Post-local SGD: averaged every step until ``start``, then every ``period`` steps.

    Lin, Stich, Patel, Jaggi. Don't Use Large Mini-Batches, Use Local SGD. ICLR 2020. arXiv:1808.07217.
    Differences from the paper: the switch is a step of each peer and not an epoch; the paper switches at the first decay
    of the rate. As in the authors' program parameters are averaged in both phases, and momentum stays at the peer.
    Weight decay is the rule's, the mean over peers is evaluated. Members come and go as in LocalSGD.
    """

    start: int = 100
    """Steps of each peer after which it averages only every ``period``, at least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self, "start", least=0)

    def length(self, done: int) -> int:
        return self.period if done >= self.start else 1

    @property
    def settled(self) -> float:
        return self.start
