"""Hierarchical averaging: groups average often, and all of them, as the method around this one, seldom."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.method import Local
from ..core.periodic import OuterMethod, Sound
from ..core.topology import Members
from ..core.values import require_count


@dataclass(frozen=True)
class GroupSGD(OuterMethod):
    """Local SGD within groups of ``size`` neighbours, for instance the workers of one host; never across them.

    The inner level of Lin, Stich, Patel, Jaggi. Don't Use Large Mini-Batches, Use Local SGD. ICLR 2020.
    arXiv:1808.07217 (hierarchical local SGD). Put it inside another periodic method to join the groups, as
    `HierarchicalSGD` does; by itself the groups train models apart.
    Differences from the paper: groups are cut from the sorted list of living members, so they close up when one dies.
    Weight decay is the rule's, the mean over peers is evaluated. Members come and go as in LocalSGD.
    """

    period: int = 4
    """Steps of ``inner`` between two averages of a group, at least 1."""
    size: int = 4
    """Members of a group, at least 1; the last group may be smaller."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count(self, "size")

    def group(self, node: int, members: Members) -> Members:
        first = members.index(node) // self.size * self.size
        return members[first : first + self.size]


@dataclass(frozen=True)
class HierarchicalSGD(OuterMethod):
    """Groups inside groups: ``period`` blocks of a `GroupSGD`, then an average over all.

    Lin, Stich, Patel, Jaggi. Don't Use Large Mini-Batches, Use Local SGD. ICLR 2020. arXiv:1808.07217 (hierarchical
    local SGD).
    Differences from the paper: any number of levels, by nesting ``GroupSGD(inner=GroupSGD(...))``.
    Weight decay is the rule's, the mean over peers is evaluated. Members come and go as in LocalSGD.
    """

    inner: Sound = GroupSGD(Local())
    """The inner level: averages within groups."""
    period: int = 4
    """Blocks of the inner level between two averages over all, at least 1."""
