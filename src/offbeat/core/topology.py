"""Who talks to whom in which round: topologies as values, pure functions of (members, step, seed).

A topology gives, for each round, weights W[to][from] that say how much of node ``from``'s message enters node ``to``.
`Topology.matrix` shows them, `Topology.spectral_gap` says how fast they mix. Members are the living nodes; a topology
forms itself anew over whoever lives, unless it is a fixed `Graph`, of which the living part remains.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor

from .seeds import derive
from .values import refuse, require

Members = tuple[int, ...]
Edges = dict[int, tuple[int, ...]]
"""For each position its out-neighbours, itself left out."""


@dataclass(frozen=True)
class Round:
    """One round of a topology over its members."""

    out: Mapping[int, Mapping[int, float]]
    """``out[i][j]``: the share of i's mass that goes to j, itself included; sums to 1 over j (column stochastic)."""
    into: Mapping[int, Mapping[int, float]]
    """``into[j][i]``: the weight of i's message in j's average, itself included; sums to 1 over i (row stochastic)."""


@dataclass(frozen=True)
class Topology(ABC):
    """A rule for who sends to whom. Where it is undirected, ``out`` and ``into`` hold the same, doubly stochastic, weights."""

    doubly_stochastic: ClassVar[bool] = True
    """Whether every round conserves the mean of the nodes: each node's weights sum to 1 both ways."""

    def check(self, n: int) -> None:
        """Refuse a number of nodes that this topology cannot have."""
        if n < 1:
            refuse(self, "n", n, "a topology needs at least one node")

    def cycle(self, n: int) -> int:
        """After how many rounds the rounds of ``n`` nodes repeat; 0 for a random topology."""
        return 1

    @abstractmethod
    def edges(self, n: int, step: int, seed: int) -> Edges:
        """Who sends to whom among positions 0 to n - 1 in round ``step``."""

    def round(self, members: Members, step: int, seed: int = 0) -> Round:
        """The weights of round ``step`` over ``members``, by node name."""
        cycle = self.cycle(len(members))
        return _round(self, members, step % cycle if cycle else step, seed)

    def weights(self, n: int, edges: Edges) -> Mapping[int, Mapping[int, float]]:
        """``out`` for these edges, by position: an equal share to itself and each neighbour."""
        return {i: dict.fromkeys((i, *edges[i]), 1 / (1 + len(edges[i]))) for i in range(n)}

    def peer(self, node: int, members: Members, step: int, seed: int) -> int | None:
        """One neighbour of ``node`` in round ``step``, drawn evenly; None where it has none."""
        near = [j for j in self.round(members, step, seed).out[node] if j != node]
        return near[derive(seed, node, step) % len(near)] if near else None

    def matrix(self, n: int, step: int = 0, seed: int = 0) -> Tensor:
        """The mixing matrix W of round ``step`` among ``n`` nodes, W[to, from], columns summing to 1. float64 [n, n]"""
        self.check(n)
        w = torch.zeros(n, n, dtype=torch.float64)
        for i, row in self.round(tuple(range(n)), step, seed).out.items():
            for j, share in row.items():
                w[j, i] = share
        return w

    def spectral_gap(self, n: int, seed: int = 0) -> float:
        """How fast disagreement dies, in [0, 1]: 1 is the exact mean after one cycle, 0 that some never dies.

        One minus the factor per round by which disagreement shrinks in the long run: the spectral radius of one cycle's
        product off the mean. For a random topology the root of the largest eigenvalue of E[W'W] off the mean (Boyd,
        Ghosh, Prabhakar, Shah. Randomized gossip algorithms. 2006), estimated from 256 rounds.
        """
        self.check(n)
        off = torch.eye(n, dtype=torch.float64) - 1 / n
        if cycle := self.cycle(n):
            product = off
            for step in range(cycle):
                product = self.matrix(n, step, seed) @ product
            radius = float(torch.linalg.eigvals(product).abs().max()) if product.norm() > 1e-12 else 0.0
            return float(1 - min(1.0, radius) ** (1 / cycle))
        mixed = [self.matrix(n, step, seed) @ off for step in range(256)]
        square = torch.stack([off @ w.T @ w for w in mixed]).mean(0)
        return float(1 - min(1.0, float(torch.linalg.eigvalsh((square + square.T) / 2).clamp(min=0).max())) ** 0.5)


@lru_cache(maxsize=64)
def _round(topology: Topology, members: Members, step: int, seed: int) -> Round:
    n = len(members)
    edges = topology.edges(n, step, seed)
    out = topology.weights(n, edges)
    arrives: dict[int, dict[int, float]] = {j: {} for j in range(n)}
    for i, row in out.items():
        for j, share in row.items():
            arrives[j][i] = share
    if not topology.doubly_stochastic:
        arrives = {j: dict.fromkeys(row, 1 / len(row)) for j, row in arrives.items()}
    name = members.__getitem__
    return Round(
        {name(i): {name(j): share for j, share in row.items()} for i, row in out.items()},
        {name(j): {name(i): share for i, share in sorted(row.items())} for j, row in arrives.items()},
    )


@dataclass(frozen=True)
class Complete(Topology):
    """Everybody with everybody: one round is the exact mean."""

    def edges(self, n: int, step: int, seed: int) -> Edges:
        return {i: tuple(j for j in range(n) if j != i) for i in range(n)}


@dataclass(frozen=True)
class Ring(Topology):
    """Each node with its two neighbours on a ring."""

    def edges(self, n: int, step: int, seed: int) -> Edges:
        return {i: tuple(sorted({(i - 1) % n, (i + 1) % n} - {i})) for i in range(n)}


@dataclass(frozen=True)
class Exponential(Topology):
    """Each node sends to those 1, 2, 4, ... places further round (directed, regular, so doubly stochastic).

    Assran, Loizou, Ballas, Rabbat. Stochastic Gradient Push for Distributed Deep Learning. ICML 2019. arXiv:1811.10792.
    """

    def edges(self, n: int, step: int, seed: int) -> Edges:
        hops = [1 << k for k in range((n - 1).bit_length())]
        return {i: tuple(sorted({(i + h) % n for h in hops} - {i})) for i in range(n)}


@dataclass(frozen=True)
class OnePeerExponential(Topology):
    """In round k each node sends to the one 2**k places further, k cycling: the exact mean in log2 n rounds if n = 2**m.

    Assran, Loizou, Ballas, Rabbat. Stochastic Gradient Push for Distributed Deep Learning. ICML 2019. arXiv:1811.10792.
    """

    def cycle(self, n: int) -> int:
        return max(1, (n - 1).bit_length())

    def edges(self, n: int, step: int, seed: int) -> Edges:
        hop = 1 << step % self.cycle(n)
        return {i: ((i + hop) % n,) if n > 1 else () for i in range(n)}


@dataclass(frozen=True)
class RandomPeer(Topology):
    """Each node draws one other node, evenly, and sends to it: nobody may hear from nobody, so the mean is conserved only
    by push-sum, and otherwise in expectation."""

    doubly_stochastic = False

    def cycle(self, n: int) -> int:
        return 0

    def edges(self, n: int, step: int, seed: int) -> Edges:
        if n == 1:
            return {0: ()}
        return {i: ((i + 1 + derive(seed, i, step) % (n - 1)) % n,) for i in range(n)}


@dataclass(frozen=True)
class RandomPull(RandomPeer):
    """Each node draws one other node, evenly, and hears from it: the same draw as `RandomPeer`, arrows turned round."""

    def edges(self, n: int, step: int, seed: int) -> Edges:
        sends: dict[int, list[int]] = {i: [] for i in range(n)}
        for i, drawn in super().edges(n, step, seed).items():
            for j in drawn:
                sends[j].append(i)
        return {i: tuple(js) for i, js in sends.items()}


@dataclass(frozen=True)
class RandomMatching(Topology):
    """In each round the nodes are paired at random; of an odd number one stays alone."""

    def cycle(self, n: int) -> int:
        return 0

    def edges(self, n: int, step: int, seed: int) -> Edges:
        order = list(range(n))
        Random(derive(seed, step)).shuffle(order)
        pairs = zip(order[::2], order[1::2], strict=False)
        found: Edges = dict.fromkeys(range(n), ())
        for i, j in pairs:
            found[i], found[j] = (j,), (i,)
        return found


@dataclass(frozen=True)
class _Undirected(Topology):
    """Edges both ways with Metropolis-Hastings weights, which are doubly stochastic on any undirected graph.

    Xiao, Boyd. Fast linear iterations for distributed averaging. Systems & Control Letters 53 (2004).
    """

    def weights(self, n: int, edges: Edges) -> Mapping[int, Mapping[int, float]]:
        out: dict[int, dict[int, float]] = {}
        for i in range(n):
            row = {j: 1 / (1 + max(len(edges[i]), len(edges[j]))) for j in edges[i]}
            out[i] = {i: 1 - math.fsum(row.values())} | row
        return out


@dataclass(frozen=True)
class Torus(_Undirected):
    """A grid whose borders meet, as square as the number of nodes allows, or of given rows."""

    rows: int | None = None
    """Rows of the grid, at least 1, dividing the number of nodes; None: the divisor nearest to its root."""

    def __post_init__(self) -> None:
        require(self, "rows", self.rows is None or self.rows >= 1, "must be at least 1, or None")

    def check(self, n: int) -> None:
        super().check(n)
        if self.rows and n % self.rows:
            refuse(self, "rows", self.rows, f"does not divide {n} nodes: choose a divisor, or None")

    def edges(self, n: int, step: int, seed: int) -> Edges:
        rows = (
            self.rows if self.rows and n % self.rows == 0 else max(r for r in range(1, math.isqrt(n) + 1) if n % r == 0)
        )
        columns = n // rows
        found = {}
        for i in range(n):
            r, c = divmod(i, columns)
            near = {r * columns + (c + 1) % columns, r * columns + (c - 1) % columns}
            near |= {(r + 1) % rows * columns + c, (r - 1) % rows * columns + c}
            found[i] = tuple(sorted(near - {i}))
        return found


@dataclass(frozen=True)
class Star(_Undirected):
    """Everybody with the first living node only."""

    def edges(self, n: int, step: int, seed: int) -> Edges:
        return {0: tuple(range(1, n)), **dict.fromkeys(range(1, n), (0,))}


@dataclass(frozen=True)
class Graph(_Undirected):
    """Any undirected graph over nodes 0 to n - 1; `Graph.of` takes one from networkx.

    When a node dies its edges go; what then is no longer connected averages in parts. A node beyond the graph, that
    joined later, is linked to all others.
    """

    links: tuple[tuple[int, int], ...] = ((0, 1),)
    """The edges, each once, as pairs of nodes."""

    def __post_init__(self) -> None:
        nodes = sorted({i for link in self.links for i in link})
        pairs = all(len(link) == 2 and link[0] != link[1] for link in self.links)
        require(self, "links", bool(self.links) and pairs, "must be pairs of different nodes")
        if nodes != list(range(len(nodes))):
            refuse(
                self,
                "links",
                self.links,
                "its nodes must be 0 to n - 1; networkx.convert_node_labels_to_integers does it",
            )
        if not _connected(len(nodes), self.links):
            refuse(
                self, "links", self.links, "is not connected, so its parts would never agree; add an edge between them"
            )

    @classmethod
    def of(cls, graph: Any) -> Graph:
        """The topology of an undirected ``networkx.Graph`` whose nodes are the integers 0 to n - 1."""
        if set(graph.nodes) != set(range(len(graph))):
            cure = "its nodes must be 0 to n - 1; networkx.convert_node_labels_to_integers does it"
            raise ValueError(f"Graph.of: nodes {sorted(map(str, graph.nodes))[:5]} ...: {cure}")
        if graph.is_directed():
            raise ValueError(
                "Graph.of: the graph is directed: give graph.to_undirected(), or use Exponential or Mixing"
            )
        touched = {i for link in graph.edges if link[0] != link[1] for i in link}
        if len(touched) < len(graph):
            raise ValueError(
                f"Graph.of: nodes {sorted(set(graph.nodes) - touched)} have no edge: connect or remove them"
            )
        return cls(tuple(sorted((min(i, j), max(i, j)) for i, j in graph.edges if i != j)))

    def check(self, n: int) -> None:
        super().check(n)
        nodes = 1 + max(i for link in self.links for i in link)
        if n != nodes:
            refuse(self, "links", f"{nodes} nodes", f"cannot have {n} workers: give it {nodes}, or another graph")

    def round(self, members: Members, step: int, seed: int = 0) -> Round:
        return _induced(self, members)

    def edges(self, n: int, step: int, seed: int) -> Edges:
        near: dict[int, set[int]] = {i: set() for i in range(n)}
        known = 1 + max(i for link in self.links for i in link)
        for i, j in self.links:
            if i < n and j < n:
                near[i].add(j)
                near[j].add(i)
        for new in range(known, n):
            near[new] = set(range(n)) - {new}
            for other in near[new]:
                near[other].add(new)
        return {i: tuple(sorted(js)) for i, js in near.items()}


@lru_cache(maxsize=64)
def _induced(graph: Graph, members: Members) -> Round:
    place = {name: k for k, name in enumerate(members)}
    whole = graph.edges(1 + max(members), 0, 0)
    edges = {place[i]: tuple(place[j] for j in whole[i] if j in place) for i in members}
    out = graph.weights(len(members), edges)
    named = {members[i]: {members[j]: share for j, share in sorted(row.items())} for i, row in out.items()}
    return Round(named, named)  # Metropolis-Hastings weights are symmetric


def _connected(n: int, links: tuple[tuple[int, int], ...]) -> bool:
    group = list(range(n))

    def root(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    for i, j in links:
        group[root(i)] = root(j)
    return len({root(i) for i in range(n)}) == 1


@dataclass(frozen=True)
class Mixing(Topology):
    """A mixing matrix of one's own, the same in every round: ``Mixing(((0.5, 0.5), (0.5, 0.5)))``.

    Column i says where node i's mass goes and must sum to 1, so that push-sum works; where rows sum to 1 too it is
    doubly stochastic, which D-PSGD needs. The number of nodes is fixed: nobody may join or leave.
    """

    shares: tuple[tuple[float, ...], ...] = ((1.0,),)
    """The matrix W[to][from], square, entries at least 0, columns summing to 1, a positive diagonal."""

    def __post_init__(self) -> None:
        n = len(self.shares)
        require(self, "shares", n > 0 and all(len(row) == n for row in self.shares), "must be a square matrix")
        require(self, "shares", all(w >= 0 for row in self.shares for w in row), "must have no negative entry")
        for i in range(n):
            total = math.fsum(row[i] for row in self.shares)
            require(
                self, "shares", abs(total - 1) < 1e-9, f"column {i} sums to {total:.9g}: a node's shares must sum to 1"
            )
            require(self, "shares", self.shares[i][i] > 0, f"node {i} keeps nothing: make the diagonal positive")
        whole = torch.matrix_power((torch.tensor(self.shares) > 0).double(), n) > 0  # the diagonal keeps shorter paths
        require(self, "shares", bool(whole.all()), "is not connected both ways, so its parts would never agree")

    @property
    def doubly_stochastic(self) -> bool:  # type: ignore[override]
        return all(abs(math.fsum(row) - 1) < 1e-9 for row in self.shares)

    def check(self, n: int) -> None:
        super().check(n)
        if n != len(self.shares):
            refuse(self, "shares", f"{len(self.shares)} nodes", f"cannot have {n} workers: give it {len(self.shares)}")

    def edges(self, n: int, step: int, seed: int) -> Edges:
        self.check(n)
        return {i: tuple(j for j in range(n) if j != i and self.shares[j][i] > 0) for i in range(n)}

    def weights(self, n: int, edges: Edges) -> Mapping[int, Mapping[int, float]]:
        return {i: {i: self.shares[i][i]} | {j: self.shares[j][i] for j in edges[i]} for i in range(n)}
