"""Frozen parameters and buffers: the first worker's go to all, and into the model that a run leaves."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from crew import TOKEN, heard, until
from torch import Tensor, nn

import offbeat as ob
from offbeat.names import read
from offbeat.runtime import shared_state
from offbeat.runtime.coordinator import host_for
from offbeat.runtime.host import Host, Terms
from offbeat.runtime.link import Link
from offbeat.runtime.place import Place
from offbeat.runtime.protocol.wire import Corrupt, Header, Kind
from offbeat.runtime.shared_state import BLOCK, Kept, Shared, Told, digest, greeted
from offbeat.runtime.team import Team

SERVER, PEERS = ob.methods.ASGD(lr=0.01), ob.methods.LocalSGD(period=2)


class Net(nn.Module):
    """All kinds of what is not trained: frozen, counted, masked, not in the state_dict, without elements, and tied twice."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
        self.features = nn.Linear(3, 4, dtype=torch.float64)
        for p in self.features.parameters():
            p.data.copy_(draw(*p.shape))
            p.requires_grad_(False)
        self.norm = nn.BatchNorm1d(4, dtype=torch.float64)
        self.head = nn.Linear(4, 4, dtype=torch.float64)
        self.tied = self.head
        self.register_buffer("mask", draw(7) > 0)
        self.register_buffer("order", torch.randperm(9, generator=g))
        self.register_buffer("phase", draw(4, 4).t(), persistent=False)
        self.register_buffer("short", draw(3).bfloat16())
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("none", None)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.head(self.norm(self.features(x)) @ self.phase)


def beside(model: nn.Module) -> dict[str, Tensor]:
    """What is not trained, as it is."""
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    return frozen | {name: buffer.clone() for name, buffer in model.named_buffers()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# digests


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("length", [0, 1, 7, 3 * BLOCK + 5])
def test_a_digest_is_of_all_bytes_in_their_order(dtype: torch.dtype, length: int) -> None:
    t = (torch.arange(length) % 251 > 100).to(dtype) if dtype == torch.bool else torch.arange(length).to(dtype)
    assert digest(t) == digest(t.clone()) == digest(torch.stack([t, t])[1])
    assert digest(t) != digest(torch.cat([t, t[:1] if length else torch.zeros(1, dtype=dtype)]))
    for k in {0, length // 2, length - 1} if length else ():
        other = t.clone()
        other[k] = 1 - other[k] if dtype != torch.bool else ~other[k]
        assert digest(t) != digest(other) or torch.equal(t, other)
    if length > 1 and dtype != torch.bool:
        assert digest(t) != digest(t.flip(0))  # a permutation has the same sum


def test_a_digest_does_not_hang_on_the_memory_format() -> None:
    t = torch.randn(5, 7)
    assert digest(t.t()) == digest(t.t().contiguous()) != digest(t)


# one host and workers over a pair of sockets


class Pair:
    """What a host keeps, and a worker that says hello to it."""

    def __init__(self) -> None:
        self.kept = Kept()

    def join(self, model: nn.Module, whole: bool = True, buffers: bool = True) -> Shared:
        shared, ends = Shared(model, buffers, whole), socket.socketpair()
        host, worker = (Link(end, name, 20.0) for end, name in zip(ends, ("the worker", "the host"), strict=True))

        def welcome() -> None:
            try:
                told = Told.read(host.recv({Kind.HELLO: 0}, "its hello").note["state"])
                self.kept.meet(host, Header(Kind.WELCOME), told, self.kept.agree(told))
                host.send(Header(Kind.WELCOME), None, {})
            except ValueError:
                host.hang_up()
                raise

        with ThreadPoolExecutor(1) as pool, ends[0], ends[1]:
            hosting = pool.submit(welcome)
            try:
                greeted(worker, Header(Kind.HELLO), {}, shared)
            finally:
                ends[1].shutdown(socket.SHUT_RDWR)
                hosting.result()
        shared.joined(Team())
        return shared


def test_the_first_workers_go_to_all() -> None:
    pair, first, second = Pair(), Net(1), Net(2)
    before = beside(first)
    assert not equal(before, beside(second))
    assert pair.join(first).took == []
    took = pair.join(second).took
    assert equal(beside(first), before)
    assert equal(beside(second), before)
    assert len(took) == 6  # and not what was equal: what batch norm has, what is empty, the counter
    assert pair.join(second).took == []


def test_what_differs_in_shape_or_name_is_refused() -> None:
    pair, other = Pair(), Net(2)
    pair.join(Net(1))
    other.register_buffer("mask", torch.zeros(8) > 0)
    with pytest.raises(
        ValueError, match=r"buffer mask \[8\] of bool in the worker's model and buffer mask \[7\] of bool in"
    ):
        pair.join(other)
    with pytest.raises(ValueError, match=r"is none in the worker's model and buffer mask"):
        pair.join(nn.Linear(3, 1))


@pytest.mark.parametrize("large", [True, False])
def test_what_is_not_sent_is_compared(large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too large, and what the ranks of a worker have a part of each."""
    monkeypatch.setattr(shared_state, "LIMIT", 100 if large else 1 << 30)
    pair = Pair()
    pair.join(Net(1), whole=large)
    pair.join(Net(1), whole=large)
    with pytest.raises(ValueError, match=r"buffer mask \[7\] of bool differs .*\(6 of 11 do\)"):
        pair.join(Net(2), whole=large)
    assert pair.kept.large == large
    assert not pair.kept.data


def test_buffers_of_its_own() -> None:
    """They stay, and frozen parameters do not."""
    pair, first, second = Pair(), Net(1), Net(2)
    pair.join(first)
    mask = second.mask.clone()
    pair.join(second, buffers=False)
    assert torch.equal(second.features.weight, first.features.weight)
    assert torch.equal(second.mask, mask)


def test_who_joins_again_has_trained_since() -> None:
    """Its buffers are not taken from it."""
    pair, model = Pair(), Net(1)
    shared = pair.join(model)
    model.steps += 5
    assert all(d is None for d in shared.told().digests)
    assert int(model.steps) == 5


@pytest.mark.parametrize(
    "note", [None, {}, {"changed": 3}, {"changed": [99]}, {"changed": [-1]}, {"changed": [True]}, {"changed": [6]}]
)
def test_what_is_no_buffer_is_refused(note: object) -> None:
    """Number 6 is a frozen parameter."""
    kept = Kept()
    kept.agree(told := Told.read(Shared(Net(1)).told().json()))
    assert not told.entries[6].buffer
    ends = socket.socketpair()
    with ends[0], ends[1], pytest.raises(Corrupt, match="no buffer"):
        kept.take(Link(ends[0], "the worker", 5.0), note)


@pytest.mark.parametrize(
    "given",
    [
        None,
        7,
        [],
        [[], [], []],
        [[["a", [1], "torch.float32"]], [], [None], True],
        [[["a", [-1], "torch.int8", 1]], [], [1], 1],
    ],
)
def test_what_makes_no_sense_is_nothing(given: object) -> None:
    assert Told.read(given) == Told([], [], [], True)


# whole runs in this process


class Hosted:
    """A host in a thread."""

    def __init__(self, folder: Path, method: ob.Method, resume: bool = False) -> None:
        self.said: list[str] = []
        self.terms = Terms(method, workers=2, timeout=20.0, beat=0.05)
        self.host: Host = host_for(self.terms)(self.terms, TOKEN, folder, read, heard(self.said))
        if resume:
            assert self.host.resume()
        self.thread = threading.Thread(target=self.host.run)
        self.thread.start()

    def place(self, worker: int) -> Place:
        return Place((f"127.0.0.1:{self.host.port}",), TOKEN, worker, patience=10.0)

    def end(self) -> None:
        self.thread.join(60)
        assert not self.thread.is_alive(), self.said


@pytest.fixture
def hosted(tmp_path: Path) -> Iterator[Callable[..., Hosted]]:
    made: list[Hosted] = []

    def host(method: ob.Method, resume: bool = False) -> Hosted:
        made.append(Hosted(tmp_path, method, resume))
        return made[-1]

    yield host
    for one in made:
        one.host.stop()
        one.end()


def train(model: Net, replica: ob.Replica, steps: int = 4) -> None:
    for k in range(steps):
        model(
            torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        ).square().sum().backward()
        replica.step()


@pytest.mark.parametrize("method", [SERVER, PEERS], ids=["server", "peers"])
def test_a_run_leaves_a_model_that_loads_strictly(
    hosted: Callable[..., Hosted], tmp_path: Path, method: ob.Method
) -> None:
    """With the frozen parameters that all had, and the buffers of who left last."""
    run, models = hosted(method), [Net(1), Net(2)]
    starts = [beside(model) for model in models]
    joined = threading.Barrier(2)

    def work(i: int) -> dict[str, Tensor]:
        replica = ob.Replica(models[i], method, place=run.place(i))
        joined.wait(60)
        begun = beside(models[i])
        joined.wait(60)
        train(models[i], replica)
        replica.leave()
        return begun

    with ThreadPoolExecutor(2) as pool:
        begun = list(pool.map(work, range(2)))
    run.end()
    assert equal(*begun)
    assert any(equal(begun[0], start) for start in starts)
    left = Net(3)
    left.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    for name in ("features.weight", "features.bias", "mask", "order", "short"):
        assert torch.equal(beside(left)[name], begun[0][name])
    assert "phase" not in torch.load(tmp_path / "model.pt", weights_only=True)
    assert any(equal({**beside(left), "phase": begun[0]["phase"]}, beside(model)) for model in models)
    assert int(left.steps) == 4


def test_a_resumed_run_has_them(hosted: Callable[..., Hosted], tmp_path: Path) -> None:
    """A worker that joins after the host was started again gets those of the first one."""
    run, first = hosted(SERVER), Net(1)
    before = beside(first)
    replica = ob.Replica(first, SERVER, place=run.place(0))
    train(first, replica)
    replica.leave(done=False)
    until(lambda: "worker 0 has left" in run.said, "its end")
    run.host.stop()
    run.end()
    again, second = hosted(SERVER, resume=True), Net(2)
    replica = ob.Replica(second, SERVER, place=again.place(1))
    assert equal(beside(second), before)
    replica.leave(done=False)
    again.host.stop()
    again.end()
    model = torch.load(tmp_path / "model.pt", weights_only=True)
    assert int(model["steps"]) == 4  # of the worker that had trained
    assert torch.equal(model["order"], before["order"])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_weight_norms_train_in_a_run(hosted: Callable[..., Hosted]) -> None:
    """They make the weight anew at each call, out of a parameter and buffers."""

    def net() -> nn.Module:
        torch.manual_seed(2)
        first = nn.utils.weight_norm(nn.Linear(3, 4, dtype=torch.float64))
        return nn.Sequential(first, nn.utils.spectral_norm(nn.Linear(4, 1, dtype=torch.float64)))

    model, plain = net(), net()
    sgd = torch.optim.SGD(plain.parameters(), 0.01)
    run = hosted(SERVER)
    replica = ob.Replica(model, place=run.place(0))
    for k in range(4):
        x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k))
        model(x).square().sum().backward()
        plain(x).square().sum().backward()
        replica.step()
        sgd.step()
        sgd.zero_grad()
    replica.leave()
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
