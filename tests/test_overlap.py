"""Workers that do not wait for the exchange, messages in half precision, and averages through memory."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import same
from crew import Serving, heard, hire, remote, time_out, until
from torch import Tensor

import offbeat as ob
from offbeat.engines.replay import replay
from offbeat.runtime.circle import SMALL, Circle, joint
from offbeat.runtime.host import Terms
from offbeat.runtime.link import Link, LinkLost
from offbeat.runtime.protocol.wire import Header, Kind
from offbeat.runtime.worker import Worker

ASGD, DanaZero, Overlap, Rounded = ob.methods.ASGD, ob.methods.DanaZero, ob.methods.Overlap, ob.methods.Rounded
PROBLEM = ob.tasks.Quadratic(d=11, noise=0.3)
Serve = Callable[..., Serving]


def terms(method: ob.ServerMethod, gradients: int | None = 60, **other: object) -> Terms:
    return Terms(method, gradients, **{"beat": 0.05, "timeout": 20.0, "transport": "shared"} | other)  # type: ignore[arg-type]


# ---------------------------------------------------------------- overlap


def test_an_overlapped_gradient_is_taken_one_reply_earlier() -> None:
    """One worker: the first two gradients at the start, each later one where the master was one update before."""
    points = [PROBLEM.x0(), PROBLEM.x0()]
    x = PROBLEM.x0()
    for step in range(30):
        x = x - 0.05 * PROBLEM.grad(points[step], 0, step)[0]
        points.append(x)
    run = ob.simulate(Overlap(ASGD(0.05)), PROBLEM, ob.Cluster(1), gradients=30)
    assert same(run.x, x)
    assert run.trace.column("lag").tolist() == [0, *[1] * 29]


def test_a_worker_goes_on_while_its_gradient_is_on_its_way(serve: Serve) -> None:
    """It waits for nobody who holds the server up, has all in the end, and a replay does the same."""
    method = Overlap(DanaZero(0.02))
    run = serve(terms(method, None))
    worker = hire(run.place(0), PROBLEM)
    for _ in range(20):
        g, loss = PROBLEM.grad(worker.x, 0, worker.node.step)
        with run.server.lock:  # nobody is served now
            before = run.server.server.version  # type: ignore[union-attr]
            worker.step(g, float(loss))
            assert run.server.server.version == before  # type: ignore[union-attr]
        until(lambda before=before: run.server.server.version == before + 1, "the visit")  # type: ignore[union-attr, misc]
    worker.leave(done=True)
    until(run.server.over, "the end")
    run.stop()
    trace = run.trace()
    assert trace.column("lag").tolist() == [0, *[1] * 19]
    assert [i.what for i in trace.incidents] == ["joined", "left"]
    assert same(replay(trace, method, PROBLEM).x, run.x())


def test_a_broken_link_loses_what_was_on_its_way_and_says_so(serve: Serve) -> None:
    said: list[str] = []
    run = serve(terms(Overlap(ASGD(0.02)), None))
    worker = hire(run.place(0), PROBLEM, heard(said))
    worker.step(PROBLEM.grad(worker.x, 0, 0)[0], 0.0)
    link = run.server.sessions[0].link
    until(lambda: link.sent_bytes == 2 * 8 * PROBLEM.d, "the reply")
    link.hang_up()
    for step in (1, 2):
        worker.step(PROBLEM.grad(worker.x, 0, step)[0], 0.0)
    assert len(said) == 1
    assert "2 gradients of this worker are lost" in said[0]  # the one that it was bringing, and the next
    worker.step(PROBLEM.grad(worker.x, 0, 3)[0], 0.0)
    worker.leave(done=True)
    run.stop()
    assert len(run.trace()) == 2


@pytest.mark.parametrize("inner", [ob.methods.EASGD(), ob.methods.SSP(), Overlap()], ids=repr)
def test_only_gradients_can_be_overlapped(inner: ob.ServerMethod) -> None:
    with pytest.raises((TypeError, ValueError), match=r"Overlap\.method"):
        Overlap(inner)  # type: ignore[arg-type]


# ---------------------------------------------------------------- half precision


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_rounded_messages_are_half_as_long_and_as_exact_as_said(dtype: str, error: float) -> None:
    inner, method = ASGD(0.05), Rounded(ASGD(0.05), dtype=dtype)  # type: ignore[arg-type]
    x, g = (10 ** (4 * torch.rand(2, 1000) - 2)).unbind()
    (s, own, start), (r, mine, begin) = (m.admit(m.init_server(x)) for m in (inner, method))
    w, v = method.init(begin), inner.init(start)
    assert method.params(w).dtype == torch.float32
    assert ((method.params(w) - x).abs() <= error * x.abs()).all()
    told, whole = method.push(method.local(w, g)), inner.push(inner.local(v, g))
    assert 2 * told.nbytes == whole.nbytes
    r, _, reply = method.serve(r, mine, told)
    s, _, _ = inner.serve(s, own, told.float())
    assert torch.equal(method.master(r), inner.master(s))  # which is kept as it is
    sent, kept = method.params(method.pull(w, reply)), method.master(r)
    assert ((sent - kept).abs() <= error * kept.abs() + 2**-25).all()  # half of float16's smallest number


def test_both_ends_must_round_alike(serve: Serve) -> None:
    run = serve(terms(Rounded(ASGD(0.05), dtype="float16")))
    exchange = remote(run.place(0), PROBLEM, repr(Rounded(ASGD(0.05))))
    with pytest.raises(ValueError, match=r"the worker's method is .*bfloat16.*, the run's is .*float16"):
        Worker(exchange, heard())


def test_what_float16_cannot_hold_is_refused(serve: Serve) -> None:
    run = serve(terms(Rounded(ASGD(1e-9), dtype="float16"), None))
    worker = hire(run.place(0), PROBLEM)
    before = run.x().clone()
    worker.step(torch.full((11,), 60000.0, dtype=torch.float64), 0.0)
    assert not torch.equal(run.x(), before)
    before = run.x().clone()
    with pytest.raises(ob.Diverged, match="not finite"):
        worker.step(torch.full((11,), 70000.0, dtype=torch.float64), 0.0)
    assert torch.equal(run.x(), before)
    worker.leave(done=False)


# ---------------------------------------------------------------- averages through memory


@pytest.fixture
def circles() -> Iterator[Callable[[int, int], list[Circle]]]:
    """Makes a circle of so many members of this process, for vectors of so many bytes."""
    made: list[Link] = []

    def circle(n: int, length: int) -> list[Circle]:
        links: list[dict[int, Link]] = [{} for _ in range(n)]
        for a in range(n):
            for b in range(a):
                ends = [Link(end, f"member {k}", 5.0) for k, end in zip((a, b), socket.socketpair(), strict=True)]
                for end in ends:
                    end.sock.settimeout(5.0)
                links[b][a] = joint(ends[0], length)
                links[a][b] = joint(ends[1], length, links[b][a].path)  # type: ignore[attr-defined]
                made.extend((links[b][a], links[a][b]))
        return [Circle(mine, rank, Header(Kind.SHARE)) for rank, mine in enumerate(links)]

    with time_out():
        yield circle
    for link in made:
        link.close()


@pytest.mark.parametrize("d", [1, 7, 1000, SMALL // 4 + 1, SMALL])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_all_members_have_the_sum_to_the_bit(n: int, d: int, circles: Callable[[int, int], list[Circle]]) -> None:
    """However the members are held up: nothing is laid over what another still reads."""
    members, turns = circles(n, 4 * d), 20
    given = torch.randn(turns, n, d, generator=torch.Generator().manual_seed(d + n))

    def work(rank: int) -> list[Tensor]:
        rng, sums = random.Random(rank), []
        for turn in range(turns):
            data = given[turn, rank].clone()
            time.sleep(rng.choice((0.0, 0.0, 0.002)))
            members[rank].sum(data)
            sums.append(data)
        return sums

    with ThreadPoolExecutor(n) as pool:
        each = list(pool.map(work, range(n)))
    for turn in range(turns):
        torch.testing.assert_close(each[0][turn], given[turn].sum(0), rtol=1e-4, atol=1e-5)
        assert all(torch.equal(sums[turn], each[0][turn]) for sums in each)


def test_who_leaves_a_circle_is_seen_at_once(circles: Callable[[int, int], list[Circle]]) -> None:
    members = circles(3, 800)
    threading.Timer(0.1, members[2].close).start()
    with pytest.raises(LinkLost, match="member"):
        members[0].sum(torch.ones(100))


@pytest.mark.parametrize("refused", [False, True])
def test_shared_memory_is_pinned_where_a_gpu_is_in_use(refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no longer than it is shared; where it cannot be, that is told by nothing that comes later."""
    pinned, launches = dict[int, int](), list[int]()

    class Runtime:
        @staticmethod
        def cudaHostRegister(address: int, size: int, flags: int) -> int:
            if not refused:
                pinned[address] = size
            return int(refused)

        @staticmethod
        def cudaHostUnregister(address: int) -> int:
            del pinned[address]
            return 0

    def launch(size: int, device: str) -> None:
        launches.append(size)
        raise RuntimeError("CUDA error: the memory cannot be pinned")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch, "zeros", launch)
    ends = [Link(end, "the other end", 5.0) for end in socket.socketpair()]
    one = joint(ends[0], 1000)
    other = joint(ends[1], 1000, one.path)
    monkeypatch.undo()
    assert len(pinned) == (0 if refused else 2)  # each end maps it at an address of its own
    assert len(launches) == 2 * refused
    assert all(size >= 4000 for size in pinned.values()), "two places each way"
    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    one.close()
    other.close()
    other.close()
    assert not pinned
