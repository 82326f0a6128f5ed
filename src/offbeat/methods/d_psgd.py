"""D-PSGD: in every round a step, then the weighted mean with the neighbours, weights doubly stochastic."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from ..core.gossip import AveragingGossipMethod
from ..core.topology import Ring, Topology
from ..core.values import refuse


@dataclass(frozen=True)
class DPSGD(AveragingGossipMethod, name="d-psgd"):
    """Decentralised parallel SGD: x_i <- sum_j W_ij (x_j after its step).

    Lian et al. Can Decentralized Algorithms Outperform Centralized Algorithms? NIPS 2017. arXiv:1705.09056.
    Differences from the paper: the local step comes before the mixing (the paper's takes the gradient at x_i and adds it
    to the mixed model; both conserve the mean of the models), and any rule may take it, its buffers staying at the peer.
    Weight decay is the rule's, the mean over peers is evaluated. On the complete graph it is large-batch SGD. Mixing
    conserves the mean among the living; when a neighbour dies in the middle of a round the others' weights are scaled up
    and the mean of that round shifts; one that joins copies a peer's model.
    """

    _: KW_ONLY
    topology: Topology = Ring()
    """Who mixes with whom in which round; its weights must be doubly stochastic."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.topology.doubly_stochastic:
            refuse(
                self,
                "topology",
                self.topology,
                "does not conserve the mean: take Ring(), RandomMatching(), ..., or SGP",
            )
