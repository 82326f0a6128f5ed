"""Buffers that change in training, made the same at all workers after a pass."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
import torch
from crew import Serving
from test_peers import Run, runs
from torch import Tensor, nn

import offbeat as ob
from offbeat.runtime.buffers import Meeting, average, first
from offbeat.runtime.host import Terms
from offbeat.runtime.link import Link
from offbeat.runtime.protocol.wire import Corrupt, Header, Kind
from offbeat.runtime.shared_state import StateEntry, as_bytes

__all__ = ["runs"]
Serve = Callable[..., Serving]


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()


def train(replica: ob.Replica, model: nn.Module, steps: range) -> None:
    """Steps at minibatches of this worker's own, whose means differ from others'; then a pass ends."""
    for k in steps:
        x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) + 10 * replica.id
        model(x).square().mean().backward()
        replica.step()
    for _ in replica.shard([]):
        pass


def norm(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def test_the_mean_is_of_what_has_one() -> None:
    """In the order of workers, whoever came first; of floating point."""
    one, two = {0: torch.tensor([1.0, 2.0]), 3: torch.tensor([7])}, {0: torch.tensor([3.0, 5.0])}
    for brought in ({0: one, 4: two}, {4: two, 0: one}):
        assert {k: t.tolist() for k, t in average(brought).items()} == {0: [2.0, 3.5]}
        assert first(brought) is one
    half = average({i: {0: torch.tensor([x], dtype=torch.bfloat16)} for i, x in enumerate((1.0, 2.0, 4.0))})[0]
    assert half.dtype == torch.bfloat16
    assert half.item() == torch.tensor(7 / 3).bfloat16().item()


@pytest.mark.parametrize("rule", ["average", "first"])
def test_after_a_pass_all_have_the_mean_or_the_first_ones(serve: Serve, rule: Any) -> None:
    run = serve(Terms(ob.methods.ASGD(lr=0.01), workers=2, beat=0.05, timeout=20.0))
    models = [net(), net()]
    replicas = [ob.Replica(m, place=run.place(i), buffers=rule) for i, m in enumerate(models)]
    kept: dict[int, dict[str, Tensor]] = {}
    hooks = [  # what each had of its own, at the end of its pass
        m.register_forward_hook(lambda m, *_, i=i: kept.__setitem__(i, norm(m))) for i, m in enumerate(models)
    ]
    for replica, model in zip(replicas, models, strict=True):
        train(replica, model, range(4))
    for hook in hooks:
        hook.remove()
    own, shared = kept[1], norm(models[1])
    want = {name: 0.5 * (kept[0][name] + own[name]) if own[name].is_floating_point() else own[name] for name in own}
    for name, buffer in shared.items():
        torch.testing.assert_close(buffer, want[name] if rule == "average" else kept[0][name])
    torch.testing.assert_close(norm(models[0]), kept[0])  # which came first: no other had brought any
    run.server.sessions[0].link.hang_up()
    for _ in replicas[0].shard([]):  # joins again
        pass
    for replica in replicas:
        replica.leave()
    run.join()


def test_peers_have_the_mean(runs: Callable[..., Run]) -> None:
    run = runs(ob.methods.LocalSGD(ob.Local(ob.SGD(0.01)), period=2), 2, None)
    ends: dict[int, dict[str, Tensor]] = {}

    def live(worker: int) -> None:
        model = net()
        replica = ob.Replica(model, run.method, place=replace(run.place, worker=worker), buffers="average")
        train(replica, model, range(4))
        ends[worker] = norm(model)
        replica.leave()

    for i in range(2):
        run.script(live, i)
    run.end()
    alone = 10 * (1 - 0.9**4)  # by which the two would differ in the input, times the layer's weights
    assert float((ends[0]["1.running_mean"] - ends[1]["1.running_mean"]).abs().max()) < alone


def test_where_the_host_is_not_there_they_stay(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    run = serve(Terms(ob.methods.ASGD(lr=0.01), workers=1, beat=0.05, timeout=20.0))
    model = net()
    replica = ob.Replica(model, place=run.place(0), buffers="average")
    train(replica, model, range(2))
    before = norm(model)
    replica._place = replace(replica._place, servers=("127.0.0.1:1",))
    train(replica, model, range(2, 3))
    assert "buffers stay worker 0's own after this pass: nobody answers at 127.0.0.1:1" in caplog.text
    assert not torch.equal(norm(model)["1.running_mean"], before["1.running_mean"])
    replica.leave()
    run.join()


def test_what_is_no_buffer_is_refused() -> None:
    entries = [StateEntry("a", (2,), "torch.float32", True), StateEntry("w", (2,), "torch.float32", False)]
    for note in (
        None,
        {"worker": "x", "brings": [0], "rule": "average"},
        {"worker": 0, "brings": [1], "rule": "average"},
        {"worker": 0, "brings": [2], "rule": "first"},
        {"worker": 0, "brings": [True], "rule": "first"},
        {"worker": 0, "brings": [0], "rule": "median"},
    ):
        ends = socket.socketpair()
        with (
            closing(Link(ends[0], "the worker", 5.0)) as link,
            closing(ends[1]),
            pytest.raises(Corrupt, match="no buffers"),
        ):
            Meeting().answer(link, note, entries)


def test_a_worker_that_is_lost_counts_no_more() -> None:
    meeting, entries = Meeting(), [StateEntry("a", (2,), "torch.float32", True)]

    def bring(worker: int, value: float) -> list[float]:
        ends = [Link(end, "the other", 5.0) for end in socket.socketpair()]
        with closing(ends[0]), closing(ends[1]), ThreadPoolExecutor(1) as pool:
            answer = pool.submit(meeting.answer, ends[0], {"worker": worker, "brings": [0], "rule": "average"}, entries)
            for part in (as_bytes(torch.full((2,), value)),):
                ends[1]._write(part.numpy().tobytes())
            frame = ends[1].recv({Kind.SHARED: 0}, "the mean")
            assert frame.note == {"takes": [0]}
            data = ends[1].recv_aside(8)
            answer.result()
        return data.view(torch.float32).tolist()

    assert bring(0, 1.0) == [1.0, 1.0]
    assert bring(1, 4.0) == [2.5, 2.5]
    meeting.forget(0)
    assert bring(1, 4.0) == [4.0, 4.0]
    assert Header(Kind.SHARED).length == 0


def test_what_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="buffers = 'shared': must be"):
        ob.Replica(net(), ob.methods.ASGD(), buffers="shared")  # type: ignore[arg-type]
