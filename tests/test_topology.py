"""Topologies: each round's weights are what the papers need of them, mix as fast as theory says, and refuse what cannot
work. The matrices are built here once more, from networkx's graphs and by hand."""

from __future__ import annotations

import inspect
import math
import pickle
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import networkx as nx
import pytest
import torch
from conftest import Bowl
from torch import Tensor

import offbeat as ob
from offbeat.core import topology as module
from offbeat.core.topology import (
    Complete,
    Exponential,
    Graph,
    Mixing,
    OnePeerExponential,
    RandomMatching,
    RandomPeer,
    RandomPull,
    Ring,
    Star,
    Topology,
    Torus,
)
from offbeat.methods import ADPSGD, DPSGD, OSGP, SGP, GoSGD, LocalSGD, PullGossip, SlowMo

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 16)
EPS = 1e-12


def path(n: int) -> Graph:
    return Graph(tuple(pairwise(range(n))))


def lopsided(n: int) -> Mixing:
    """A directed ring with a chord from node 0 to everybody and uneven shares: columns sum to 1, rows do not."""
    columns = []
    for i in range(n):
        to = {i: 3.0} | {(i + 1) % n: 1.0 + i} if n > 1 else {i: 1.0}
        to |= dict.fromkeys(range(2, n), 0.5) if i == 0 else {}
        columns.append([to.get(j, 0.0) / sum(to.values()) for j in range(n)])
    return Mixing(tuple(zip(*columns, strict=True)))


def lazy(n: int) -> Mixing:
    """A directed ring that keeps a quarter: doubly stochastic, not symmetric."""
    rows = [[0.25 * (i == j) + 0.75 * (i == (j + 1) % n) for j in range(n)] for i in range(n)]
    return Mixing(tuple(map(tuple, rows)))


FAMILIES: dict[str, Callable[[int], Topology]] = {
    **{
        cls.__name__: lambda n, cls=cls: cls()
        for cls in (
            Complete,
            Ring,
            Exponential,
            OnePeerExponential,
            RandomPeer,
            RandomPull,
            RandomMatching,
            Torus,
            Star,
        )
    },
    "Torus(1)": lambda n: Torus(1),
    "Torus(n)": Torus,
    "Graph path": path,
    "Mixing lopsided": lopsided,
    "Mixing lazy": lazy,
}
UNDIRECTED = ("Complete", "Ring", "RandomMatching", "Torus", "Star", "Torus(1)", "Torus(n)", "Graph path")
RANDOM = ("RandomPeer", "RandomPull", "RandomMatching")
NOT_DOUBLY = ("RandomPeer", "RandomPull", "Mixing lopsided")
CASES = [pytest.param(f, n, id=f"{f}-{n}") for f in FAMILIES for n in SIZES if n > 1 or f != "Graph path"]
each_case = pytest.mark.parametrize(("family", "n"), CASES)


def test_every_topology_is_here() -> None:
    classes = {c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Topology)}
    public = {c for c in classes if not inspect.isabstract(c) and not c.__name__.startswith("_")}
    assert public == {type(make(2)) for make in FAMILIES.values()}


# ---------------------------------------------------------------- weights


@each_case
def test_every_round_shares_out_all_mass(family: str, n: int) -> None:
    """Column stochastic; each node keeps some; rows sum to 1 too where it says so; symmetric where undirected."""
    topology = FAMILIES[family](n)
    assert topology.doubly_stochastic == (family not in NOT_DOUBLY or (n == 1 and family == "Mixing lopsided"))
    for step in range(6):
        w = topology.matrix(n, step, seed=3)
        assert w.shape == (n, n)
        assert w.dtype == torch.float64
        assert bool((w >= 0).all())
        assert bool((w.diagonal() > 0).all())
        assert bool(((w.sum(0) - 1).abs() < EPS).all())
        if topology.doubly_stochastic:
            assert bool(((w.sum(1) - 1).abs() < EPS).all())
        if family in UNDIRECTED:
            assert torch.equal(w, w.T)


@pytest.mark.parametrize("family", NOT_DOUBLY)
def test_what_is_not_doubly_stochastic_truly_is_not(family: str) -> None:
    rows = torch.stack([FAMILIES[family](5).matrix(5, step).sum(1) for step in range(6)])
    assert float((rows - 1).abs().max()) > 0.1


@pytest.mark.parametrize("family", ["Exponential", "OnePeerExponential", "RandomPeer", "Mixing lazy"])
def test_what_is_directed_truly_is(family: str) -> None:
    matrices = [FAMILIES[family](5).matrix(5, step) for step in range(6)]
    assert any(not torch.allclose(w, w.T) for w in matrices)


@each_case
def test_a_round_says_the_same_to_senders_and_receivers(family: str, n: int) -> None:
    """By name, for members with gaps: ``out`` is the matrix's columns; ``into`` are weights of an average over the same
    senders, the same weights where those already sum to 1, and even ones otherwise."""
    topology = FAMILIES[family](n)
    members = (
        tuple(range(n)) if family in ("Graph path", "Mixing lopsided", "Mixing lazy") else tuple(range(3, 3 + 2 * n, 2))
    )
    for step in range(4):
        w, round = topology.matrix(n, step, seed=5), topology.round(members, step, seed=5)
        assert set(round.out) == set(round.into) == set(members)
        for i, name in enumerate(members):
            column = {members[j]: float(w[j, i]) for j in range(n) if w[j, i] > 0}
            assert dict(round.out[name]) == column
            into = round.into[name]
            assert sum(into.values()) == pytest.approx(1, abs=EPS)
            assert set(into) == {members[j] for j in range(n) if w[i, j] > 0}
            if topology.doubly_stochastic:
                assert dict(into) == {members[j]: float(w[i, j]) for j in range(n) if w[i, j] > 0}
            else:
                assert len(set(into.values())) == 1


def metropolis(graph: nx.Graph) -> Tensor:
    """Xiao & Boyd 2004: 1 / (1 + the larger degree) on each edge, the rest on the diagonal."""
    nodes = sorted(graph.nodes)
    w = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
    for a, i in enumerate(nodes):
        for b, j in enumerate(nodes):
            if i != j and graph.has_edge(i, j):
                w[a, b] = 1 / (1 + max(graph.degree[i], graph.degree[j]))
    return w + torch.diag(1 - w.sum(1))


def grid(n: int) -> nx.Graph:
    rows = max(r for r in range(1, n + 1) if n % r == 0 and r * r <= n)
    return nx.grid_2d_graph(rows, n // rows, periodic=True)


@pytest.mark.parametrize("n", SIZES[1:])
def test_undirected_weights_are_metropolis_hastings(n: int) -> None:
    wheel = nx.wheel_graph(n) if n > 3 else nx.path_graph(n)
    for topology, graph in (
        (Complete(), nx.complete_graph(n)),
        (Ring(), nx.cycle_graph(n)),
        (Star(), nx.star_graph(n - 1)),
        (Torus(), grid(n)),
        (Torus(1), nx.cycle_graph(n)),
        (path(n), nx.path_graph(n)),
        (Graph.of(wheel), wheel),
    ):
        assert torch.allclose(topology.matrix(n), metropolis(graph), rtol=0, atol=EPS), topology


@pytest.mark.parametrize("n", SIZES)
def test_exponential_graphs(n: int) -> None:
    """To those 1, 2, 4, ... places on: all at once, or one in each round, in turn."""
    hops = [h for h in (1, 2, 4, 8) if h < n]
    w = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        for h in (0, *hops):
            w[(i + h) % n, i] += 1 / (1 + len(hops))
    assert torch.allclose(Exponential().matrix(n), w, rtol=0, atol=EPS)
    for k in range(2 * len(hops)):
        one = torch.zeros(n, n, dtype=torch.float64)
        for i in range(n):
            one[i, i] += 0.5
            one[(i + hops[k % len(hops)]) % n, i] += 0.5
        assert torch.equal(OnePeerExponential().matrix(n, k), one)


def test_a_mixing_matrix_is_itself() -> None:
    assert torch.equal(lopsided(5).matrix(5), torch.tensor(lopsided(5).shares, dtype=torch.float64))


# ---------------------------------------------------------------- rounds


@each_case
def test_rounds_repeat_after_the_cycle(family: str, n: int) -> None:
    topology = FAMILIES[family](n)
    cycle = topology.cycle(n)
    assert (cycle == 0) == (family in RANDOM)
    for step in range(cycle):
        assert torch.equal(topology.matrix(n, step), topology.matrix(n, step + cycle))
        assert torch.equal(topology.matrix(n, step, seed=0), topology.matrix(n, step, seed=1))
    if cycle > 1:
        assert not torch.equal(topology.matrix(n, 0), topology.matrix(n, 1))


@pytest.mark.parametrize("family", RANDOM)
def test_random_rounds_are_a_function_of_seed_and_step(family: str) -> None:
    topology = FAMILIES[family](8)
    runs = [torch.stack([topology.matrix(8, step, seed) for step in range(20)]) for seed in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert len({tuple(w.flatten().tolist()) for w in runs[0]}) > 15


def even(counts: Counter[Any], kinds: int) -> bool:
    """Whether draws look even among ``kinds`` outcomes: chi squared within five sigma of its mean."""
    total = sum(counts.values())
    assert len(counts) == kinds
    chi = sum((c - total / kinds) ** 2 / (total / kinds) for c in counts.values())
    return abs(chi - (kinds - 1)) < 5 * math.sqrt(2 * (kinds - 1))


def test_random_peers_are_drawn_evenly() -> None:
    drawn = Counter((i, j) for step in range(800) for i, (j,) in RandomPeer().edges(5, step, seed=7).items() if i != j)
    assert sum(drawn.values()) == 800 * 5
    assert even(drawn, 5 * 4)


def test_two_nodes_draws_do_not_depend_on_each_other() -> None:
    drawn = Counter(tuple(RandomPeer().edges(4, step, seed=1)[i][0] for i in (0, 1)) for step in range(1800))
    assert even(drawn, 3 * 3)


@pytest.mark.parametrize("n", SIZES)
def test_random_pull_is_random_peer_turned_round(n: int) -> None:
    """Each hears from exactly one other, the one that it drew."""
    for step in range(10):
        drawn, pulled = RandomPeer().edges(n, step, seed=2), RandomPull().edges(n, step, seed=2)
        assert {(j, i) for i, js in drawn.items() for j in js} == {(i, j) for i, js in pulled.items() for j in js}
        into = RandomPull().round(tuple(range(n)), step, seed=2).into
        assert all(len(into[i]) == min(2, n) for i in range(n))


@pytest.mark.parametrize("n", SIZES)
def test_a_random_matching_pairs_all_but_one_at_most(n: int) -> None:
    for step in range(10):
        edges = RandomMatching().edges(n, step, seed=4)
        partner = {i: js[0] for i, js in edges.items() if js}
        assert all(len(js) <= 1 for js in edges.values())
        assert all(partner[j] == i != j for i, j in partner.items())
        assert len(partner) == n - n % 2


def test_random_matchings_are_even() -> None:
    pairs = Counter(
        (i, j) for step in range(1500) for i, js in RandomMatching().edges(5, step, 0).items() for j in js if i < j
    )
    assert even(pairs, 10)


@each_case
def test_a_peer_is_a_neighbour_of_the_round(family: str, n: int) -> None:
    topology = FAMILIES[family](n)
    members = tuple(range(n))
    for step in range(5):
        near = topology.round(members, step, seed=6).out
        for i in members:
            peer = topology.peer(i, members, step, seed=6)
            others = set(near[i]) - {i}
            assert peer in others if others else peer is None
            assert peer == topology.peer(i, members, step, seed=6)


def test_a_peer_is_drawn_evenly_among_neighbours() -> None:
    members = (2, 4, 5, 9)
    for topology, near in ((Complete(), (2, 4, 9)), (Ring(), (4, 9)), (RandomPeer(), (2, 4, 9))):
        assert even(Counter(topology.peer(5, members, step, seed=1) for step in range(900)), len(near))


# ---------------------------------------------------------------- how fast they mix


@pytest.mark.parametrize("n", SIZES)
def test_the_complete_graph_is_the_mean_at_once(n: int) -> None:
    assert torch.allclose(Complete().matrix(n), torch.full((n, n), 1 / n, dtype=torch.float64), rtol=0, atol=EPS)
    assert Complete().spectral_gap(n) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("n", SIZES[2:])
def test_gap_of_the_ring(n: int) -> None:
    """Eigenvalues (1 + 2 cos(2 pi k / n)) / 3."""
    gap = 1 - max(abs(1 + 2 * math.cos(2 * math.pi * k / n)) / 3 for k in range(1, n))
    assert Ring().spectral_gap(n) == pytest.approx(gap, abs=1e-9)
    assert n < 4 or gap < 0.9


@pytest.mark.parametrize("n", SIZES[2:])
def test_gap_of_the_star(n: int) -> None:
    """Eigenvalues 1, 0 and, n - 2 times, 1 - 1/n (two leaves that differ)."""
    assert Star().spectral_gap(n) == pytest.approx(1 / n, abs=1e-9)


@pytest.mark.parametrize(("n", "rows"), [(9, 3), (12, 3), (15, 3), (16, 4), (20, 4)])
def test_gap_of_the_torus(n: int, rows: int) -> None:
    """Eigenvalues (1 + 2 cos a + 2 cos b) / 5."""
    columns = n // rows
    waves = [(2 * math.pi * k / rows, 2 * math.pi * m / columns) for k in range(rows) for m in range(columns)][1:]
    gap = 1 - max(abs(1 + 2 * math.cos(a) + 2 * math.cos(b)) / 5 for a, b in waves)
    assert Torus(rows).spectral_gap(n) == pytest.approx(gap, abs=1e-9)
    assert Torus(rows) == Torus() or Torus().spectral_gap(n) == pytest.approx(gap, abs=1e-9)


@pytest.mark.parametrize("n", SIZES)
def test_gap_of_the_exponential_graph(n: int) -> None:
    """A circulant: its eigenvalues are a Fourier transform of the hops."""
    hops = [0] + [h for h in (1, 2, 4, 8) if h < n]
    waves = [
        sum(complex(math.cos(a * h), math.sin(a * h)) for h in hops) for a in (2 * math.pi * k / n for k in range(1, n))
    ]
    gap = 1 - max((abs(w) / len(hops) for w in waves), default=0.0)
    assert Exponential().spectral_gap(n) == pytest.approx(gap, abs=1e-7)


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_the_one_peer_exponential_graph_is_the_exact_mean_in_log2_n_rounds(n: int) -> None:
    product = torch.eye(n, dtype=torch.float64)
    for step in range(n.bit_length() - 1):
        assert not torch.allclose(product, torch.full_like(product, 1 / n))  # not a round earlier
        product = OnePeerExponential().matrix(n, step) @ product
    assert torch.equal(product, torch.full_like(product, 1 / n))
    assert OnePeerExponential().spectral_gap(n) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("n", [3, 5, 6, 7, 9])
def test_gap_of_the_one_peer_exponential_graph_for_other_numbers(n: int) -> None:
    """Rounds commute: a cycle's eigenvalues are products of |cos(pi hop k / n)|; the gap is per round."""
    hops = [h for h in (1, 2, 4, 8) if h < n]
    radius = max(math.prod(abs(math.cos(math.pi * h * k / n)) for h in hops) for k in range(1, n))
    assert OnePeerExponential().spectral_gap(n) == pytest.approx(1 - radius ** (1 / len(hops)), abs=1e-7)
    assert radius > 1e-3


@pytest.mark.parametrize("n", [4, 8, 16])
def test_gap_of_random_matchings(n: int) -> None:
    """A round is a projection, so E[W'W] = E[W], and off the mean that is 1/2 - 1/(2 (n - 1))."""
    gap = 1 - math.sqrt(0.5 - 0.5 / (n - 1))
    assert RandomMatching().spectral_gap(n) == pytest.approx(gap, rel=0.2)  # from 256 rounds


@each_case
def test_everybody_agrees_in_the_end(family: str, n: int) -> None:
    """Push-sum on any of them: mass over weight goes to the mean of the starts, at the rate the gap promises or faster."""
    topology = FAMILIES[family](n)
    gap = topology.spectral_gap(n)
    assert 0 < gap <= 1
    rounds = [topology.matrix(n, step) for step in range(topology.cycle(n) or 100)]
    mass = torch.stack((torch.arange(n, dtype=torch.float64) ** 2, torch.ones(n, dtype=torch.float64)), 1)
    mean = mass[:, 0].mean()
    for step in range(math.ceil(25 / gap)):
        mass = rounds[step % len(rounds)] @ mass
    assert torch.allclose(mass[:, 0] / mass[:, 1], mean.expand(n), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- graphs from networkx


@pytest.mark.parametrize("n", SIZES[1:])
def test_a_cycle_from_networkx_is_the_ring(n: int) -> None:
    graph = Graph.of(nx.cycle_graph(n))
    assert torch.allclose(graph.matrix(n), Ring().matrix(n), rtol=0, atol=EPS)
    assert graph.spectral_gap(n) == pytest.approx(Ring().spectral_gap(n), abs=1e-9)
    assert graph == Graph.of(nx.cycle_graph(n))


def test_the_order_of_edges_does_not_matter() -> None:
    edges = [(0, 1), (1, 2), (2, 3), (0, 3), (0, 2)]
    turned = [(j, i) for i, j in reversed(edges)]
    assert Graph.of(nx.Graph(edges)) == Graph.of(nx.Graph(turned))
    assert torch.equal(Graph(tuple(edges)).matrix(4), Graph(tuple(turned)).matrix(4))


@pytest.mark.parametrize("gone", [0, 1, 4])
def test_the_living_part_of_a_graph_remains(gone: int) -> None:
    """A dead node's edges go, and the weights are those of the graph that is left."""
    graph = nx.lollipop_graph(4, 2)
    graph.remove_node(gone)
    members = tuple(sorted(graph.nodes))
    w, out = metropolis(graph), Graph.of(nx.lollipop_graph(4, 2)).round(members, 0).out
    for a, i in enumerate(members):
        assert out[i] == pytest.approx({members[b]: float(w[b, a]) for b in range(len(members)) if w[b, a] > 0})


def test_a_newcomer_to_a_graph_is_linked_to_all() -> None:
    graph = nx.path_graph(4)
    graph.add_edges_from((7, i) for i in range(4))
    members = (0, 1, 2, 3, 7)
    w, out = metropolis(graph), path(4).round(members, 0).out
    for a, i in enumerate(members):
        assert out[i] == pytest.approx({members[b]: float(w[b, a]) for b in range(5) if w[b, a] > 0})


# ---------------------------------------------------------------- what is refused

CURE = r"must|cannot|does not divide|connect|needs"


def columns(*columns: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    return tuple(zip(*columns, strict=True))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Graph(()), r"Graph\.links = \(\): must be pairs of different nodes"),
        (lambda: Graph(((0, 0),)), r"Graph\.links .* must be pairs of different nodes"),
        (lambda: Graph(((0, 1, 2),)), r"Graph\.links .* must be pairs of different nodes"),
        (lambda: Graph(((0, 1), (2, 3))), r"Graph\.links .* is not connected.*add an edge"),
        (lambda: Graph(((0, 2),)), r"Graph\.links .* must be 0 to n - 1; networkx\.convert_node_labels_to_integers"),
        (lambda: Graph(((-1, 0),)), r"Graph\.links .* must be 0 to n - 1"),
        (lambda: Graph.of(nx.Graph([("a", "b")])), r"must be 0 to n - 1; networkx\.convert_node_labels_to_integers"),
        (lambda: Graph.of(nx.path_graph(range(1, 4))), r"must be 0 to n - 1"),
        (lambda: Graph.of(nx.DiGraph([(0, 1), (1, 2)])), r"directed: .*to_undirected\(\).*Exponential"),
        (lambda: Graph.of(nx.empty_graph(3)), r"nodes \[0, 1, 2\] have no edge: connect or remove"),
        (lambda: Graph.of(nx.Graph({0: [1], 1: [], 2: []})), r"nodes \[2\] have no edge: connect or remove"),
        (lambda: Graph.of(nx.Graph([(0, 1), (2, 3)])), r"is not connected.*add an edge"),
        (lambda: Mixing(()), r"Mixing\.shares = \(\): must be a square matrix"),
        (lambda: Mixing(((1.0, 0.0),)), r"must be a square matrix"),
        (lambda: Mixing(((0.5, 0.5), (0.5,))), r"must be a square matrix"),
        (lambda: Mixing(((1.2, 0.5), (-0.2, 0.5))), r"must have no negative entry"),
        (lambda: Mixing(((0.5, 0.5), (0.4, 0.5))), r"column 0 sums to 0\.9: a node's shares must sum to 1"),
        (lambda: Mixing(((0.5, 0.5), (0.5, 0.6))), r"column 1 sums to 1\.1"),
        (lambda: Mixing(((0.3, 0.7), (0.3, 0.7))), r"column 0 sums to 0\.6"),  # rows do, columns do not
        (lambda: Mixing(((math.nan, 0.5), (0.5, 0.5))), r"Mixing\.shares"),
        (lambda: Mixing(((0.0, 0.5), (1.0, 0.5))), r"node 0 keeps nothing: make the diagonal positive"),
        (lambda: Mixing(((1.0, 0.0), (0.0, 1.0))), r"is not connected"),
        (lambda: Torus(0), r"Torus\.rows = 0: must be"),
        (lambda: Torus(-2), r"Torus\.rows = -2: must be"),
    ],
)
def test_a_topology_that_cannot_work_is_refused_with_the_cure(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_node_whose_only_edge_is_a_loop_is_refused() -> None:
    """It would be dropped in silence, and the graph be one node smaller."""
    with pytest.raises(ValueError, match="connect"):
        Graph.of(nx.Graph([(0, 1), (2, 2)]))


def test_a_mixing_matrix_that_only_drains_a_node_is_refused() -> None:
    """Node 0 gives to 1 and never hears from anybody: its weight runs out and it never agrees."""
    with pytest.raises(ValueError, match="connected"):
        Mixing(columns((0.5, 0.5), (0.0, 1.0)))


IMPOSSIBLE = [
    (Torus(3), 4, r"Torus\.rows = 3: does not divide 4 nodes"),
    (Torus(8), 4, r"Torus\.rows = 8: does not divide 4 nodes"),
    (path(3), 4, r"Graph\.links = '3 nodes': cannot have 4 workers: give it 3"),
    (path(5), 4, r"Graph\.links = '5 nodes': cannot have 4 workers: give it 5"),
    (lazy(3), 4, r"Mixing\.shares = '3 nodes': cannot have 4 workers: give it 3"),
]


@pytest.mark.parametrize(("topology", "n", "message"), [*IMPOSSIBLE, (Complete(), 0, r"needs at least one node")])
@pytest.mark.parametrize("ask", ["check", "matrix", "spectral_gap"])
def test_a_number_of_nodes_that_cannot_be_is_refused(topology: Topology, n: int, message: str, ask: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(topology, ask)(n)


@pytest.mark.parametrize(("topology", "n", "message"), IMPOSSIBLE)
@pytest.mark.parametrize(
    "method",
    [
        *(lambda t, cls=cls: cls(topology=t) for cls in (DPSGD, SGP, OSGP, ADPSGD, PullGossip, GoSGD)),
        lambda t: SlowMo(SGP(topology=t)),
        lambda t: LocalSGD(SlowMo(DPSGD(topology=t))),
    ],
    ids=["DPSGD", "SGP", "OSGP", "ADPSGD", "PullGossip", "GoSGD", "SlowMo", "LocalSGD of SlowMo"],
)
def test_a_run_is_refused_before_its_first_gradient(method: Any, topology: Topology, n: int, message: str) -> None:
    class Untouched(Bowl):
        def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
            raise AssertionError("the run has begun")

    with pytest.raises(ValueError, match=message):
        ob.simulate(method(topology), Untouched(), ob.Cluster(n), gradients=20)


@pytest.mark.parametrize("topology", [RandomPeer(), RandomPull(), lopsided(4)], ids=lambda t: type(t).__name__)
def test_d_psgd_wants_a_doubly_stochastic_topology(topology: Topology) -> None:
    with pytest.raises(ValueError, match=r"DPSGD\.topology = .*: does not conserve the mean: take .*, or SGP"):
        DPSGD(topology=topology)
    SGP(topology=topology)


def test_nobody_may_leave_a_fixed_matrix() -> None:
    cluster = ob.Cluster(4, ob.Fixed(1.0), (ob.Crash(2, 5.5),))
    with pytest.raises(ValueError, match=r"Mixing\.shares = '4 nodes': cannot have 3 workers"):
        ob.simulate(SGP(topology=lopsided(4)), Bowl(), cluster, gradients=100)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("family", FAMILIES)
def test_a_topology_is_a_value(family: str) -> None:
    make = FAMILIES[family]
    topology, names = make(5), {cls.__name__: cls for cls in vars(module).values() if inspect.isclass(cls)}
    assert topology == make(5)
    assert hash(topology) == hash(make(5))
    assert pickle.loads(pickle.dumps(topology)) == topology
    assert eval(repr(topology), names) == topology
    assert len({t for make in FAMILIES.values() for t in (make(5), make(5))}) == len(FAMILIES)
    with pytest.raises(AttributeError):
        topology.rows = 3  # type: ignore[attr-defined]


def test_kinds_that_do_the_same_are_not_the_same_value() -> None:
    assert RandomPeer() != RandomPull()
    assert Graph.of(nx.cycle_graph(4)) != Ring()
