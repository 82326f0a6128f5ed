"""Real runs: what they compute is what the protocol says, whatever carries it, and what is wrong is told at once."""

from __future__ import annotations

import copy
import json
import random
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import by_turns, same
from crew import TOKEN, Processes, Serving, heard, hire, labour, load, remote, until
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import offbeat as ob
from offbeat.core.protocol import Ask, Node, loop
from offbeat.core.server import ParameterServer
from offbeat.core.tree import leaves
from offbeat.engines.replay import replay
from offbeat.experiment import rerun
from offbeat.runtime import replica as making
from offbeat.runtime import snapshot
from offbeat.runtime.host import Terms
from offbeat.runtime.leases import COUNTED, TASK
from offbeat.runtime.link import GREETING, LinkLost, dial, look_out
from offbeat.runtime.place import Place
from offbeat.runtime.protocol.wire import Form
from offbeat.runtime.server import RunServer
from offbeat.runtime.worker import Remote, Worker, train
from offbeat.tasks.flat import Flat

METHODS = [cls for cls in ob.methods.all_methods() if issubclass(cls, ob.ServerMethod)]
PROBLEM = ob.tasks.Quadratic(d=11, noise=0.3)
SPEEDS = (0.0, 0.001, 0.003)

each_method = pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.name)
Serve = Callable[..., Serving]


def terms(method: ob.ServerMethod | None, gradients: int | None = 60, **other: Any) -> Terms:
    return Terms(**{"method": method, "gradients": gradients, "workers": 3, "beat": 0.05, "timeout": 20.0} | other)


def finish(*running: Serving) -> None:
    """The run is over by itself."""
    for one in running:
        until(one.server.over, f"the end of the run: {one.said}")
        one.stop()


# replay


@pytest.mark.parametrize(("cls", "transport"), by_turns(METHODS, ["shared", "gloo", "tcp"]))
def test_replay_is_the_run(serve: Serve, cls: type[ob.ServerMethod], transport: str) -> None:
    """Workers of uneven speeds end where the recorded order ends when one process runs it again; nothing is refused."""
    run = serve(terms(cls(), None, transport=transport))
    labour([run.place(i) for i in range(3)], PROBLEM, SPEEDS, each=16)
    finish(run)
    trace = run.trace()
    again = replay(trace, cls(), PROBLEM)
    assert same(again.x, run.x())
    assert again.trace.column("lag").tolist() == trace.column("lag").tolist()
    assert set(trace.column("worker").tolist()) == {0, 1, 2}
    assert trace.column("lag").max() > 0
    assert run.server.refused == 0
    joined = sorted(line for line in run.said if "joined" in line)
    assert joined == [f"worker {i} has joined over {transport}" for i in range(3)]


@pytest.mark.parametrize(("method", "transport"), [("dana-zero", "shared"), ("ssp", "gloo"), ("easgd", "tcp")])
def test_replay_is_the_run_of_processes(processes: Processes, method: str, transport: str) -> None:
    """The same of `offbeat launch`, from what its folder holds; only what was begun for a next exchange is not in it."""
    argv = ["launch", "--method", method, "--task", "quadratic", "--workers", "3", "--gradients", "120", "--out", "run"]
    launch = processes.offbeat(*argv, "--transport", transport, "--speed", "Fixed((0.001, 0.002, 0.004))")
    assert processes.ends(launch) == 0, processes.said(launch)
    trace, model = ob.Trace.read(processes.folder / "run/trace.jsonl"), load(processes.folder / "run")
    assert same(rerun(trace).x, model)
    assert json.loads((processes.folder / "run/summary.json").read_text())["figures"]["gradients"] == len(trace)
    assert 0 <= 120 - len(trace) <= 3 * (ob.methods.find(method)().period - 1)  # type: ignore[attr-defined]


def test_a_server_is_told_to_stop_by_a_signal(serve: Serve) -> None:
    """Whatever lock the thread that the signal interrupts holds, the handler comes back, and the run ends."""
    run = serve(terms(ob.methods.ASGD(), None))
    with run.server.lock, run.server.stopping._cond:  # the event's own lock, which its set() would wait for
        run.server.stop()
    run.join()


# kernels


@pytest.fixture(params=[True, False], ids=["compiler", "none"])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there is one."""
    if not request.param:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    elif not shutil.which("g++"):
        pytest.skip("needs a C++ compiler")
    return bool(request.param)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, inside its compiler
def test_a_server_of_a_large_model_finds_the_fastest_way(
    compiler: bool, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says once what it found, goes on in blocks where there is no compiler, and is right in either case."""
    monkeypatch.setattr("offbeat.runtime.server.LARGE", 11)
    method = ob.methods.DanaZero(lr=0.05 * ob.Warmup(10))
    run = serve(terms(method, 60, workers=1))
    worker = hire(run.place(0), PROBLEM)
    warmed = (
        "a visit takes"
        if compiler
        else "visits stay uncompiled, as no kernel could be made (no C++ compiler was found)"
    )
    until(lambda: [line for line in run.said if line.startswith(warmed)], "the kernel", 120)
    if compiler:  # whatever the race says of so small a model
        run.server.visits.visit.way = run.server.visits.visit.fused
    train(worker, PROBLEM)
    finish(run)
    assert len([line for line in run.said if line.startswith(warmed)]) == 1
    again = replay(run.trace(), method, PROBLEM)
    torch.testing.assert_close(run.x(), again.x, rtol=1e-12, atol=1e-12)


@dataclass(frozen=True)
class Slope:
    """So many parameters, each with a bowl of its own; in float32."""

    d: int

    def x0(self) -> Tensor:
        return torch.linspace(-1, 1, self.d)

    def grad(self, x: Tensor, worker: int, step: int) -> tuple[Tensor, Tensor]:
        return x - 0.01 * step, torch.tensor(0.0)

    def evaluate(self, x: Tensor) -> dict[str, float]:
        return {"loss": 0.0}


LARGE = [ob.methods.ASGD(0.1), ob.methods.DanaZero(0.1), ob.methods.SSP(ob.methods.GEM()), ob.methods.Overlap()]  # type: ignore[attr-defined]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, inside its compiler
@pytest.mark.parametrize(("method", "transport"), by_turns(LARGE, ["shared", "tcp"]))
def test_a_large_models_reply_is_written_where_it_is_read(
    method: ob.ServerMethod, transport: str, serve: Serve
) -> None:
    """By a compiled kernel, into the memory that both ends map. The last numbers fill no register."""
    problem = Slope(600_013)
    run = serve(terms(method, 24, workers=2, transport=transport))
    workers = [hire(run.place(i), problem) for i in range(2)]
    until(lambda: [line for line in run.said if line.startswith("a visit takes")], "the kernel", 120)
    visit = run.server.visits.visit
    visit.way = visit.fused
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda worker: train(worker, problem), workers))
    finish(run)
    again = replay(run.trace(), method, problem)
    torch.testing.assert_close(run.x(), again.x, rtol=1e-4, atol=1e-5)


def test_what_lies_in_a_links_memory_is_not_copied(serve: Serve) -> None:
    """Neither a reply nor a message: they are made there. What a server keeps is elsewhere."""
    run = serve(terms(ob.methods.DanaZero(0.1), 5, workers=1, transport="shared"))
    worker = hire(run.place(0), PROBLEM)
    (session,) = run.server.sessions.values()
    room = session.link.room(session.reply.bytes)
    assert room is not None
    visits = run.server.visits
    visits.raced, visits.visit.way = True, partial(visits.visit.blocked, block=4)
    sent, pack = [], Form.pack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Form, "pack", lambda form, message, out=None: sent.append(leaves(message)) or pack(form, message, out)
        )
        worker.step(torch.ones(PROBLEM.d, dtype=torch.float64), 0.0)
    (_, (reply,)) = sent
    assert reply.data_ptr() == room.data_ptr()
    assert torch.equal(worker.x, reply)
    kept = {t.untyped_storage().data_ptr() for t in leaves((run.server.server.state, run.server.server.own))}  # type: ignore[union-attr]
    assert room.untyped_storage().data_ptr() not in kept
    train(worker, PROBLEM)
    finish(run)


# shards


def shards(serve: Serve, method: ob.ServerMethod, count: int, gradients: int, workers: int) -> list[Serving]:
    def one(k: int) -> Serving:
        shard = terms(method, gradients if k == 0 else None, workers=workers, shard=(k, count), transport="tcp")
        return serve(shard, folder=f"shard-{k}-of-{count}")

    return [one(k) for k in range(count)]


def place_of(running: list[Serving], worker: int | None) -> Place:
    return replace(running[0].place(worker), servers=tuple(run.address for run in running))


@each_method
def test_one_worker_over_shards_is_one_over_one_server(serve: Serve, cls: type[ob.ServerMethod]) -> None:
    """Bit for bit, after 40 gradients: handlers are elementwise."""

    def trained(count: int) -> Tensor:
        running = shards(serve, cls(), count, 40, 1)
        labour([place_of(running, 0)], PROBLEM)
        finish(*running)
        return torch.cat([run.x() for run in running])

    assert torch.equal(trained(1), trained(2))


def test_a_method_that_needs_sums_over_the_model_has_one_server(serve: Serve) -> None:
    """Servers of a shard each do not talk, so the worker is told at once; one server takes it."""
    method = ob.methods.GapAware(correction=ob.methods.GlobalGapPenalty())
    running = shards(serve, method, 2, 20, 1)
    text = told(lambda: labour([place_of(running, 0)], PROBLEM), Exception)
    assert "GlobalGapPenalty" in text
    assert "needs sums over the whole model, and this server has part" in text
    run = serve(terms(method, 20, workers=1))
    labour([run.place(0)], PROBLEM)
    finish(run)
    assert len(run.trace()) == 20


def test_who_looks_out_does_so_until_it_is_there_and_only_for_a_moment() -> None:
    looks: list[bool] = []
    look_out(lambda: looks.append(True) or True)
    assert len(looks) == 1
    look_out(lambda: looks.append(False))
    assert len(looks) > 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_model_may_be_cut_anywhere(serve: Serve, dtype: Any) -> None:
    """Parts that begin in the middle of a machine word travel as well as others."""
    problem = ob.tasks.Quadratic(d=11, dtype=dtype)
    running = shards(serve, ob.methods.ASGD(lr=0.1), 3, 30, 1)
    labour([place_of(running, 0)], problem)
    finish(*running)
    x = problem.x0()
    for step in range(30):
        x = torch.add(x, problem.grad(x, 0, step)[0], alpha=-0.1)
    assert torch.equal(torch.cat([run.x() for run in running]), x)


def test_many_workers_over_shards(serve: Serve) -> None:
    """Each shard has taken all gradients, in an order of its own; numbers that the first server gives are for all."""
    running = shards(serve, ob.methods.DanaZero(lr=0.02), 2, 90, 3)
    labour([place_of(running, None) for _ in range(3)], PROBLEM, SPEEDS)
    finish(*running)
    whole = torch.cat([run.x() for run in running])
    assert whole.shape == PROBLEM.x0().shape
    assert torch.isfinite(whole).all()
    counts = [Counter(run.trace().column("worker").tolist()) for run in running]
    assert counts[0] == counts[1]
    assert counts[0].total() == 90
    with pytest.raises(ValueError, match="one shard of the model"):
        replay(running[0].trace(), ob.methods.DanaZero(lr=0.02), PROBLEM)


def test_launched_shards_end_together(processes: Processes) -> None:
    """Each server leaves its part of the model, and the parts have the model's size."""
    argv = ["launch", "--task", "quadratic", "--d", "15", "--gradients", "60", "--shards", "2", "--out", "run"]
    launch = processes.offbeat(*argv)
    assert processes.ends(launch) == 0, processes.said(launch)
    parts = [load(processes.folder / f"run/shard-{k}") for k in range(2)]
    assert torch.cat(parts).shape == (15,)
    assert torch.isfinite(torch.cat(parts)).all()
    assert processes.said(launch).count("starting it again") == 0


# a Replica in a user's loop

LR = 0.05
SGD = ob.methods.ASGD(lr=LR)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A Replica answers SIGTERM; this process does not after a test."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data(step: int, size: int = 8, columns: int = 3) -> Tensor:
    return torch.randn(size, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


class Both:
    """Two copies of a model: one with a Replica that is a worker of a run, one with the optimizer that it should equal."""

    def __init__(self, serve: Serve, model: nn.Module, method: ob.ServerMethod = SGD) -> None:
        self.plain = copy.deepcopy(model)
        self.optimizer = torch.optim.SGD(self.plain.parameters(), lr=LR)
        self.run = serve(terms(method, None, workers=1))
        self.model = model
        self.replica = ob.Replica(model, place=self.run.place(0))

    @property
    def visits(self) -> int:
        assert self.run.server.server is not None
        return self.run.server.server.version

    def end(self) -> None:
        """Both have walked the same way, and the server has it."""
        assert same(vector(self.model), vector(self.plain))
        self.replica.leave()
        finish(self.run)
        assert same(self.run.x(), vector(self.plain))
        assert self.run.server.refused == 0


@pytest.fixture
def both(serve: Serve) -> Both:
    return Both(serve, net())


@each_method
def test_a_script_without_a_launcher_is_the_method_on_one_worker(
    cls: type[ob.ServerMethod], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started by itself, a script takes the same steps as the method served by hand."""
    for name in ("SERVER", "METHOD", "WORKER", "TOKEN"):
        monkeypatch.delenv(f"OFFBEAT_{name}", raising=False)
    method, model, copied = cls(), net(), net()
    other = Flat(copied)
    server = ParameterServer.start(method, other.data.clone())
    life = loop(method, Node(0, method, method.init(server.join(0))))
    request = next(life)
    replica = ob.Replica(model, method)
    for step in range(24):
        other.data.copy_(request.x)
        assert torch.equal(vector(model), other.data)
        for module in (model, copied):
            module(data(step)).square().mean().backward()
        replica.step()
        request = life.send(other.take_gradient())
        if isinstance(request, Ask):
            request = life.send(server.visit(0, request.msg)[0])

    def diverge() -> None:
        for _ in range(9 * 8):  # some methods visit only at every eighth gradient
            model(data(0)).mul(torch.inf).sum().backward()
            replica.step()

    with pytest.raises(ob.Diverged, match=r"\d+: (the|its) gradient is not finite.* 9 gradients in a row"):
        diverge()
    replica.leave()


def test_a_replica_is_the_optimizer(both: Both) -> None:
    """One worker with plain ASGD walks as torch.optim.SGD, whether the user drops gradients or not."""
    for step in range(12):
        for model in (both.model, both.plain):
            if step % 3 < 2:
                model.zero_grad(set_to_none=step % 3 == 0)
            model(data(step)).square().mean().backward()
        both.optimizer.step()
        both.optimizer.zero_grad()
        both.replica.step()
        if step % 2:
            both.replica.zero_grad()
    assert both.visits == 12
    both.end()


def test_gradients_may_be_clipped(both: Both) -> None:
    """What is clipped between backward and step is what the server gets."""
    for step in range(6):
        for model in (both.model, both.plain):
            model(data(step)).square().sum().backward()
            assert nn.utils.clip_grad_norm_(model.parameters(), 0.1) > 0.1
        before = vector(both.model)
        both.optimizer.step()
        both.optimizer.zero_grad()
        both.replica.step()
        assert float((vector(both.model) - before).norm()) == pytest.approx(LR * 0.1)
    both.end()


def test_gradients_may_be_accumulated(both: Both) -> None:
    """Four backward passes for each step are one big batch, and one exchange."""
    for step in range(6):
        batch = data(step, 32)
        for part in batch.split(8):
            (both.model(part).square().mean() / 4).backward()
        both.plain(batch).square().mean().backward()
        both.optimizer.step()
        both.optimizer.zero_grad()
        both.replica.step()
    assert both.visits == 6
    both.end()


def test_autocast(serve: Serve) -> None:
    """Forward in bfloat16, parameters and gradients as they are."""
    both = Both(serve, net().float())
    for step in range(6):
        for model in (both.model, both.plain):
            with torch.autocast("cpu", torch.bfloat16):
                output = model(data(step).float())
            assert output.dtype == torch.bfloat16
            output.float().square().mean().backward()
        both.optimizer.step()
        both.optimizer.zero_grad()
        both.replica.step()
        assert torch.equal(vector(both.model), vector(both.plain))
    both.replica.leave()
    finish(both.run)
    assert torch.equal(both.run.x(), vector(both.plain))


@pytest.mark.parametrize("clipped", [False, True])
def test_a_gradient_scaler(serve: Serve, clipped: bool) -> None:
    """``scaler.step(replica)`` is that of an optimizer, with `unscale_` and without.

    A step that overflows is skipped there; here it is an exchange with a gradient of 0, and the scale falls alike.
    """
    both = Both(serve, net().float())
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3) for _ in range(2)]
    for step in range(9):
        before = vector(both.model)
        for model, optimizer, scaler in zip(
            (both.model, both.plain), (both.replica, both.optimizer), scalers, strict=True
        ):
            loss = model(data(step).float()).square().mean()
            scaler.scale(loss * 1e38 if step == 4 else loss).backward()
            if clipped:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
        assert both.visits == step + 1
        assert scalers[0].get_scale() == scalers[1].get_scale()
        assert torch.equal(vector(both.model), before) == (step == 4)
        assert torch.allclose(vector(both.model), vector(both.plain), rtol=1e-6, atol=1e-7)
    both.model(data(9).float()).square().mean().backward()
    both.replica.step()  # without the scaler
    assert both.visits == 10
    both.replica.leave()
    finish(both.run)
    assert both.run.server.refused == 0


def test_buffers_stay_the_worker_s_own(serve: Serve) -> None:
    """The parameters of two workers are the run's, frozen ones the first worker's; running statistics come from what each has seen."""
    run = serve(terms(SGD, None, workers=2))
    models = [
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2)).double() for _ in "ab"
    ]
    for i, model in enumerate(models):
        model[2].requires_grad_(i < 0)
    frozen = models[0][2].weight.clone()
    replicas = [ob.Replica(model, place=run.place(i)) for i, model in enumerate(models)]
    assert torch.equal(vector(models[0]), vector(models[1]))
    for step in range(6):
        for i, (model, replica) in enumerate(zip(models, replicas, strict=True)):
            model(data(step) + 10 * i).square().mean().backward()
            replica.step(loss=1.0)
    assert run.x().shape == vector(models[0]).shape == (3 * 4 + 4 + 4 + 4 + 4 * 2 + 2,)
    assert [torch.equal(model[2].weight, frozen) for model in models] == [True, True]
    assert not torch.allclose(models[0][1].running_mean, models[1][1].running_mean, atol=0.5)
    for replica in replicas:
        replica.leave()
    finish(run)
    shipped = torch.load(run.folder / "model.pt", weights_only=True)
    assert {name: tuple(t.shape) for name, t in shipped.items()} == {
        name: tuple(t.shape) for name, t in models[0].state_dict().items()
    }
    assert torch.equal(shipped["1.running_mean"], models[1][1].running_mean)  # of who left last
    assert run.trace().column("loss").tolist() == [1.0] * 12


# minibatches for a user's loop

SCRIPT = """
import sys, time
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset
import offbeat as ob

kind, passes, ahead, pause = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
model = torch.nn.Linear(1, 1)
replica = ob.Replica(model)
numbers = TensorDataset(torch.arange(62.0)[:, None])
sampler = RandomSampler(numbers, generator=torch.Generator().manual_seed(replica.id))
loader = {
    "shuffle": lambda: DataLoader(numbers, 4, shuffle=True, num_workers=ahead),
    "generator": lambda: DataLoader(numbers, 4, shuffle=True, generator=torch.Generator(), num_workers=ahead),
    "sampler": lambda: DataLoader(numbers, 4, sampler=sampler, num_workers=ahead),
    "batch sampler": lambda: DataLoader(numbers, batch_sampler=BatchSampler(sampler, 4, False), num_workers=ahead),
}[kind]()
with open(f"seen-{replica.id}", "a") as file:
    for number in range(passes):
        for (x,) in replica.shard(loader):
            time.sleep(pause * (1 + replica.id))
            (1e-3 * model(x)).square().mean().backward()
            replica.step()
            print(number, *x[:, 0].int().tolist(), file=file, flush=True)
"""


def seen(folder: Path) -> list[list[tuple[int, ...]]]:
    """The minibatches of each pass, over all workers."""
    passes: list[list[tuple[int, ...]]] = []
    for file in folder.glob("seen-*"):
        for line in file.read_text().splitlines():
            number, *numbers = map(int, line.split())
            passes.extend([] for _ in range(number + 1 - len(passes)))
            passes[number].append(tuple(numbers))
    return passes


@pytest.mark.parametrize(
    ("kind", "ahead"),
    [("shuffle", 2), ("generator", 0), ("sampler", 0), ("batch sampler", 2)]
    + [pytest.param(kind, 0, marks=pytest.mark.matrix) for kind in ("shuffle", "batch sampler")],
)
def test_each_minibatch_of_a_pass_is_used_once(processes: Processes, serve: Serve, kind: str, ahead: int) -> None:
    """Over workers of uneven speeds, whatever draws the order, and however far workers load ahead."""
    run = serve(terms(SGD, None, seed=7))
    script = processes.folder / "script.py"
    script.write_text(SCRIPT)
    environment = {"OFFBEAT_SERVER": run.address, "OFFBEAT_TOKEN": TOKEN}
    argv = [str(script), kind, "2", str(ahead), "0.002"]
    crew = [processes.start(*argv, OFFBEAT_WORKER=str(i), **environment) for i in range(3)]
    for process in crew:
        assert processes.ends(process) == 0, processes.said(process)
    finish(run)
    passes = seen(processes.folder)
    for batches in passes:
        assert sorted(n for batch in batches for n in batch) == list(range(62))
        assert sorted(map(len, batches)) == [2] + [4] * 15
    assert sorted(passes[0]) != sorted(passes[1])
    assert len(run.trace()) == 32


def test_minibatches_loaded_ahead_in_an_earlier_life_are_not_used(processes: Processes, serve: Serve) -> None:
    """When a link breaks, what was drawn goes back: each minibatch of the pass is delivered once for all that."""
    run = serve(terms(SGD, None, workers=1))
    script = processes.folder / "script.py"
    script.write_text(SCRIPT)
    environment = {"OFFBEAT_SERVER": run.address, "OFFBEAT_TOKEN": TOKEN, "OFFBEAT_WORKER": "0"}
    process = processes.start(str(script), "shuffle", "1", "2", "0.01", **environment)
    until(lambda: run.server.steps.get(0, 0) >= 4, "the first steps")
    run.server.sessions[0].link.hang_up()
    assert processes.ends(process) == 0, processes.said(process)
    finish(run)
    assert len(run.trace()) == 16
    assert "dialling again" in processes.said(process)
    (batches,) = seen(processes.folder)
    assert len(set(batches)) == 16
    assert len(batches) <= 17  # the one whose step met the broken link comes twice


def loader(rows: int = 24, batch: int = 4, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(data(0, rows)), batch, shuffle=True, **options)


def test_a_worker_that_comes_back_goes_on_where_the_run_is(serve: Serve) -> None:
    """For each pass that is over it does one minibatch of the pass that the run is in; then its rest, and all those after it."""
    run = serve(terms(SGD, None, workers=1))

    def batches(replica: ob.Replica, stop: int | None = None) -> list[Tensor]:
        taken = []
        for (x,) in replica.shard(loader()):
            replica.model(x).square().mean().backward()
            replica.step()
            taken.append(x)
            if len(taken) == stop:
                break
        return taken

    first = ob.Replica(net(), place=run.place(0))
    assert len(batches(first)) == 6
    begun = batches(first, stop=4)
    assert len(begun) == 4
    first.worker.exchange._hang_up()  # as SIGKILL does
    making._LIVE.clear()
    second = ob.Replica(net(), place=run.place(0))
    rest = batches(second)
    assert len(rest) == 1
    rest += batches(second)
    assert len(rest) == 2
    rows = sorted(row.tolist() for x in begun + rest for row in x)
    assert rows == sorted(data(0, 24).tolist())
    assert len(batches(second)) == 6
    second.leave()
    finish(run)
    first.leave()
    assert len(run.trace()) == 18


@pytest.mark.parametrize("transport", ["shared", "tcp"])
def test_a_replicas_gradients_are_made_where_the_server_reads_them(serve: Serve, transport: str) -> None:
    """In the memory of the link, of a new life's in that of the new one; where there is none, in their own."""
    run = serve(terms(SGD, None, workers=1, transport=transport))
    model = net()
    replica = ob.Replica(model, place=run.place(0))
    seen, memory = set(), []
    step = replica.worker.step
    replica.worker.step = lambda g, loss: (memory.append(g), step(g, loss))  # type: ignore[method-assign]
    for number in range(8):
        if number == 4:
            replica.worker.exchange.shards[0].link.hang_up()
        x, before = data(number), vector(model)
        room = replica.worker.room()
        model(x).square().mean().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])  # type: ignore[union-attr]
        assert (room is not None) == (transport == "shared")
        wanted = before - LR * grads
        memory.clear()
        replica.step()
        assert torch.equal(memory[0], grads)
        if room is not None:
            assert memory[0].data_ptr() == room.data_ptr()
        seen.add(memory[0].data_ptr())
        if number != 4:  # whose gradient is lost
            assert same(vector(model), wanted)
        assert same(run.x(), vector(model))
        assert all(p.grad is None for p in model.parameters())
    assert len(seen) <= 2, "one for each life"
    replica.leave()
    finish(run)


def test_a_link_that_is_mended_between_steps_brings_its_parameters(serve: Serve) -> None:
    """The next gradient is taken where the new life begins, and its minibatches are the new life's."""
    run = serve(terms(ob.methods.ASGD(lr=0.5), None, workers=1))
    replica = ob.Replica(net(), place=run.place(0))
    for number, (x,) in enumerate(replica.shard(loader())):
        held = list(run.server.leases.held[0])
        assert held[1:] == list(replica.worker.leases[COUNTED, 0])  # but for the one in use
        assert torch.equal(vector(replica.model), replica.worker.x)
        replica.model(x).square().mean().backward()
        if number == 2:  # the server moves on, and the link breaks while nobody looks
            run.server.sessions[0].link.hang_up()
            until(lambda: not run.server.sessions, "the end of the life")
            state = run.server.server.state
            run.server.server.state = state._replace(x=state.x + 1)
            continue
        replica.step()
    assert replica.worker.life == 2
    replica.leave()
    finish(run)
    assert len(run.trace()) == 6


class Numbers(IterableDataset[Any]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(11))


def test_other_iterables_are_dealt_by_turns(serve: Serve) -> None:
    """Worker i of n takes items i, i + n, ... of what has no length."""
    run = serve(terms(SGD, None, workers=2))
    replicas = [ob.Replica(net(), place=run.place(i)) for i in range(2)]
    loaded = DataLoader(Numbers(), batch_size=2)
    assert [list(replica.shard(iter("abcde"))) for replica in replicas] == [["a", "c", "e"], ["b", "d"]]
    dealt = [[x.tolist() for x in replica.shard(loaded)] for replica in replicas]
    assert dealt == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10]]]
    for replica in replicas:
        replica.leave()
    finish(run)


def test_the_model_holds_what_would_be_shipped_after_a_pass(serve: Serve) -> None:
    """A look-ahead is for gradients only: between passes the model is the master's, in a pass the worker's again."""
    run = serve(terms(ob.methods.DanaZero(lr=0.1), None, workers=1))
    replica = ob.Replica(net(), place=run.place(0))
    for _ in range(2):
        for (x,) in replica.shard(loader()):
            assert torch.equal(vector(replica.model), replica.worker.x)
            replica.model(x).square().mean().backward()
            replica.step()
        assert torch.equal(vector(replica.model), run.x())
        assert not torch.equal(vector(replica.model), replica.worker.x)
    replica.leave()
    finish(run)


def test_loaders_that_cannot_be_shared_are_refused(serve: Serve) -> None:
    run = serve(terms(SGD, None, workers=1))
    with ob.Replica(net(), place=run.place(0)) as replica:
        dataset = TensorDataset(data(0))
        sampler = DistributedSampler(dataset, num_replicas=2, rank=0)
        with pytest.raises(ValueError, match="has a DistributedSampler: give one without"):
            replica.shard(DataLoader(dataset, 4, sampler=sampler))
        with pytest.raises(ValueError, match=r"no minibatch \(8 examples\): choose a smaller batch"):
            replica.shard(DataLoader(dataset, 16, drop_last=True))
    with pytest.raises(RuntimeError, match="has left its run"):
        replica.step()
    finish(run)


# how many are taken


def test_a_run_takes_exactly_the_gradients_asked_for(serve: Serve) -> None:
    """Those that a dead worker held are taken by others, and its number of gradients goes on where it was."""
    run = serve(terms(SGD, 50))
    dead = remote(run.place(0), PROBLEM)
    worker = Worker(dead, heard(run.said))
    for _ in range(3):
        worker.use(worker.draw())
        worker.step(PROBLEM.grad(worker.x, 0, worker.node.step)[0], 0.0)
    assert worker.draw().place == 3
    kill(dead)
    until(lambda: not run.server.sessions, "the end of its life")
    labour([run.place(i) for i in range(3)], PROBLEM, SPEEDS)
    finish(run)
    trace = run.trace()
    assert (len(trace), run.server.leases.done, run.server.leases.passes[TASK.key].next) == (50, 50, 50)
    assert [i.lost for i in trace.incidents if i.what == "crashed"] == [1]
    steps = [event.step for event in trace if event.worker == 0]
    assert steps == list(range(len(steps)))
    assert same(replay(trace, SGD, PROBLEM).x, run.x())


def kill(worker: Remote) -> None:
    """What the server sees of a SIGKILL; no thread stays."""
    worker.silent.set()
    worker._hang_up()


def test_a_run_without_a_number_ends_with_the_workers_loops(serve: Serve) -> None:
    """It waits for as many workers as were launched, whoever comes and goes meanwhile."""
    run = serve(terms(SGD, None, workers=2))
    for worker, done in ((0, True), (0, False), (1, False)):
        hire(run.place(worker), PROBLEM).leave(done=done)
        until(lambda: not run.server.sessions, "its leaving")
        assert not run.server.over()
    hire(run.place(1), PROBLEM).leave(done=True)
    run.join()
    assert [i.what for i in run.trace().incidents] == ["joined", "left"] * 4


# numbers and lives


def test_workers_without_a_number_get_one_each(serve: Serve) -> None:
    """Though they come at once; and one that dials again takes nobody's place."""
    run = serve(terms(SGD, None, workers=8))
    with ThreadPoolExecutor(8) as pool:
        workers = list(pool.map(lambda _: hire(run.place(), PROBLEM), range(8)))
    assert sorted(worker.terms.worker for worker in workers) == list(range(8))
    gone = next(worker for worker in workers if worker.terms.worker == 3)
    assert isinstance(gone.exchange, Remote)
    gone.exchange._hang_up()
    until(lambda: 3 not in run.server.sessions, "the end of its life")
    other = hire(run.place(), PROBLEM)
    assert other.terms.worker == 3
    gone._begin(gone.exchange.join())
    assert gone.terms.worker == 8
    assert run.server.sessions[3].process == other.exchange.process  # type: ignore[attr-defined]
    for worker in (*workers, other):
        worker.leave(done=True)
    finish(run)
    assert not [line for line in run.said if "is back" in line]


def test_a_number_that_the_launcher_gave_is_its_owner_s(serve: Serve) -> None:
    """A process that was started again has its number as soon as the one before is silent, though its link is not dead yet."""
    run = serve(terms(SGD, None, workers=1))
    before = hire(run.place(5), PROBLEM)
    before.exchange.silent.set()  # type: ignore[attr-defined]
    after = hire(run.place(5), PROBLEM)
    assert [worker.terms.worker for worker in (before, after)] == [5, 5]
    lives = [worker.exchange.shards[0].head.incarnation for worker in (before, after)]  # type: ignore[attr-defined]
    assert lives[0] < lives[1]
    after.leave(done=True)
    finish(run)
    kill(before.exchange)  # type: ignore[arg-type]
    assert "worker 5 is back: its link before is dead" in run.said
    assert [i.what for i in run.trace().incidents] == ["joined", "crashed", "joined", "left"]


def test_a_late_message_of_a_life_that_is_over_is_refused(serve: Serve) -> None:
    """It came before its sender was taken for dead, and is looked at after that: the model stays; the sender joins anew."""
    run = serve(terms(SGD, None, workers=1))
    said: list[str] = []
    worker = hire(run.place(0), PROBLEM, heard(said))
    session = run.server.sessions[0]
    with run.server.lock:
        sender = threading.Thread(target=worker.step, args=(torch.ones(11, dtype=torch.float64), 0.0))
        sender.start()
        until(lambda: session.link.waiting(0) or time.sleep(0.1) is None, "the message")
        time.sleep(0.1)  # the server's thread has it, and waits for the lock
        run.server._gone(session, False)
    sender.join(30)
    assert torch.equal(run.x(), PROBLEM.x0())
    assert "refused: a late message of a life of worker 0 that is over: refused" in run.said
    assert worker.life == 2
    assert "1 gradients of this worker are lost" in said[0]
    worker.leave(done=True)
    finish(run)
    assert len(run.trace()) == 0


# snapshots


def test_a_snapshot_is_what_was_written(tmp_path: Path) -> None:
    """Of several, the newest three stay; a kill while one is written leaves the others."""
    for number in range(1, 6):
        content = {"x": [data(number)], "own": {3: [], 0: [data(0)]}, "text": "ü", "none": None, "number": 2**70}
        path = snapshot.write(tmp_path / "snapshots", number, content)
        again = snapshot.read(path)
        assert torch.equal(again.pop("x")[0], content.pop("x")[0])
        assert list(again["own"]) == [3, 0]
        del again["own"], content["own"]
        assert again == content
    (tmp_path / "snapshots/000000000006.part").write_bytes(b"begun")
    assert [int(path.stem) for path in snapshot.found(tmp_path / "snapshots")] == [5, 4, 3]
    assert snapshot.newest(tmp_path / "nowhere", heard()) is None


def flipped(whole: bytes, bit: int) -> bytes:
    place = bit // 8 % len(whole)
    return whole[:place] + bytes([whole[place] ^ 1 << bit % 8]) + whole[place + 1 :]


HURT: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda whole: whole[: len(whole) // 2],
    "without its last byte": lambda whole: whole[:-1],
    "only its head": lambda whole: whole[: len(snapshot.MAGIC) + 65],
    "empty": lambda whole: b"",
    "zeros": lambda whole: bytes(len(whole)),
    "garbage": lambda whole: random.Random(0).randbytes(len(whole)),
    "longer": lambda whole: whole + b"\0",
    "two": lambda whole: whole + whole,
} | {f"bit {bit} flipped": partial(flipped, bit=bit) for bit in random.Random(1).sample(range(1 << 20), 40)}


@pytest.mark.parametrize("hurt", HURT.values(), ids=HURT)
def test_a_hurt_snapshot_is_refused(tmp_path: Path, hurt: Callable[[bytes], bytes]) -> None:
    """It is named, and the one before is taken."""
    for number in (1, 2):
        path = snapshot.write(tmp_path, number, {"number": number, "x": data(number)})
    path.write_bytes(hurt(path.read_bytes()))
    with pytest.raises(snapshot.Damaged):
        snapshot.read(path)
    said: list[str] = []
    found = snapshot.newest(tmp_path, heard(said))
    assert found is not None
    assert found[1]["number"] == 1
    assert len(said) == 1
    assert said[0].startswith(str(path))
    assert said[0].endswith("; trying the one before")


def crash(run: Serving, to: Path) -> None:
    """What SIGKILL would leave now of a server's folder: copied, for a thread cannot be killed."""
    shutil.copytree(run.folder / "snapshots", to / "snapshots")
    shutil.copy(run.folder / "trace.jsonl", to)


@each_method
def test_a_resumed_run_replays(serve: Serve, tmp_path: Path, cls: type[ob.ServerMethod]) -> None:
    """What was done since the snapshot is lost and said; the trace, cut to it, still tells all that the model is."""
    run = serve(terms(cls(), None))
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(labour, [run.place(i) for i in range(3)], PROBLEM, SPEEDS, 24, False)
        until(lambda: sum(run.server.steps.values()) >= 24, "the first gradients")
        assert run.server.save()
        kept = snapshot.newest(run.folder / "snapshots", heard())
        until(lambda: sum(run.server.steps.values()) >= 40, "more gradients")
        with run.server.lock:
            run.server.journal.flush()
            crash(run, tmp_path / "again")
            done = sum(run.server.steps.values())
        work.result(60)
    run.stop()
    again = serve(terms(cls(), None), folder="again", resume=True)
    assert again.resumed
    assert kept is not None
    before = sum(kept[1]["steps"].values())
    (said,) = (line for line in again.said if "resumed" in line)
    assert f"at {before:,} gradients; lost since then: {done - before:,} gradients" in said
    labour([again.place(i) for i in range(3)], PROBLEM, SPEEDS, each=16)
    finish(again)
    trace = again.trace()
    assert len(trace) > before
    assert same(replay(trace, cls(), PROBLEM).x, again.x())
    assert [i.what for i in trace.incidents].count("crashed") == len(kept[1]["there"])
    assert same(load(again.folder), again.x())


def test_a_server_resumes_from_the_snapshot_before_a_hurt_one(serve: Serve, tmp_path: Path) -> None:
    """Minibatches that were held then are handed out again: the whole run takes exactly what was asked for."""
    run = serve(terms(SGD, 60))
    worker = hire(run.place(0), PROBLEM)
    for count in range(20):
        if count in (10, 15):
            run.server.save()
        worker.use(worker.draw())
        worker.step(PROBLEM.grad(worker.x, 0, count)[0], 0.0)
    with run.server.lock:
        crash(run, tmp_path / "again")
    kill(worker.exchange)  # type: ignore[arg-type]
    newest = snapshot.found(tmp_path / "again/snapshots")[0]
    newest.write_bytes(newest.read_bytes()[:-9])
    again = serve(terms(SGD, 60), folder="again", resume=True)
    assert any("does not meet its hash" in line for line in again.said)
    assert any("000000000001.snapshot at 10 gradients" in line for line in again.said)
    labour([again.place(i) for i in range(3)], PROBLEM)
    finish(again)
    assert len(again.trace()) == again.server.leases.done == 60
    assert same(replay(again.trace(), SGD, PROBLEM).x, again.x())


def test_who_has_finished_is_not_waited_for_after_a_resume(serve: Serve, tmp_path: Path) -> None:
    """A snapshot is written when a worker's loop ends, for it does not come again."""
    run = serve(terms(SGD, None, workers=2))
    hire(run.place(0), PROBLEM).leave(done=True)
    until(lambda: snapshot.found(run.folder / "snapshots"), "a snapshot")
    crash(run, tmp_path / "again")
    again = serve(terms(SGD, None, workers=2), folder="again", resume=True)
    hire(again.place(1), PROBLEM).leave(done=True)
    again.join()


def test_all_start_anew_when_a_finished_run_is_resumed_for_more(serve: Serve) -> None:
    """Workers that had ended their loops are waited for again, each once, whatever its number was before."""
    run = serve(terms(SGD, None, workers=2))
    for i in range(2):
        hire(run.place(i), PROBLEM).leave(done=True)
    run.join()
    more = serve(terms(SGD, None, workers=2), resume=True, anew=True)
    assert not more.server.over()
    for _ in range(2):
        hire(more.place(0), PROBLEM).leave(done=True)
    until(lambda: more.server.status()["finished"] == [0], "the worker's end")
    assert not more.server.over()
    hire(more.place(), PROBLEM).leave(done=True)
    more.join()
    assert more.server.status()["finished"] == [0, 1]


def test_a_new_run_does_not_begin_over_an_old_one_s_snapshots(serve: Serve, tmp_path: Path) -> None:
    run = serve(terms(SGD, 20))
    labour([run.place(0)], PROBLEM)
    finish(run)
    files = snapshot.found(tmp_path / "run/snapshots")
    new = RunServer(terms(SGD, 20), TOKEN, tmp_path / "run", ob.names.read, heard())
    with pytest.raises(FileExistsError, match="is of an earlier run: resume it, or choose another folder"):
        new.run()
    assert snapshot.found(tmp_path / "run/snapshots") == files


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (terms(ob.methods.ASGD(lr=0.1), 20), r"is of ASGD\(lr=0\.05.*resume with the same method"),
        (terms(SGD, 20, shard=(1, 2)), r"is of shard \[0, 1\], not of \[1, 2\]"),
    ],
    ids=["method", "shard"],
)
def test_a_resume_of_another_run_is_refused(serve: Serve, other: Terms, message: str) -> None:
    run = serve(terms(SGD, 20))
    labour([run.place(0)], PROBLEM)
    finish(run)
    with pytest.raises(ValueError, match=message):
        serve(other, resume=True)


# bad input


def told(action: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


def test_a_worker_of_another_run_is_refused(serve: Serve) -> None:
    """Each is told what it brings, what the run has and what to do; all are counted; the run goes on."""
    run = serve(terms(SGD, 20, workers=1))
    good = hire(run.place(0), PROBLEM)
    small, single = ob.tasks.Quadratic(d=5), ob.tasks.Quadratic(d=11, dtype="float32")
    again = "start the same script everywhere"
    text = told(lambda: hire(run.place(1), small))
    assert "5 parameters of torch.float64, the run's has 11 of torch.float64" in text
    assert again in text
    text = told(lambda: hire(run.place(1), single))
    assert "11 parameters of torch.float32, the run's has 11 of torch.float64" in text
    assert again in text
    text = told(lambda: ob.Replica(net(), ob.methods.DanaZero(lr=0.3), place=run.place(1)))
    assert "method is DanaZero(lr=0.3" in text
    assert f"the run's is {SGD!r}: name it in one place only" in text
    text = told(lambda: hire(replace(run.place(1), servers=(run.address, run.address)), PROBLEM))
    assert "this server has shard (0, 1), and the worker wants [0, 2]" in text
    assert "-7" in told(lambda: hire(run.place(-7), PROBLEM))
    assert run.server.refused == 5
    train(good, PROBLEM)
    finish(run)
    assert len(run.trace()) == 20


def test_a_run_needs_a_method(serve: Serve) -> None:
    """The first worker may name it, and must where nobody else does."""
    run = serve(terms(None, None, workers=1))
    assert "give --method, or one to Replica" in told(lambda: hire(run.place(), PROBLEM))
    assert "Dana" in told(lambda: Worker(remote(run.place(), PROBLEM, "DanaZeor()"), heard()))
    replica = ob.Replica(net(), SGD, place=run.place())  # whoever was refused has left nothing
    assert run.server.method == SGD
    replica.leave()
    finish(run)


def test_a_first_model_that_is_not_finite_is_refused(serve: Serve) -> None:
    """And decides nothing: the next worker, of another size, begins the run."""
    run = serve(terms(SGD, None, workers=1))
    model = nn.Linear(2, 1)
    nn.init.constant_(model.weight, torch.nan)
    assert "the model that the worker brings is not finite" in told(lambda: ob.Replica(model, place=run.place()))
    ob.Replica(net(), place=run.place()).leave()
    finish(run)
    assert run.server.refused == 1


def test_what_is_no_method_is_refused() -> None:
    assert told(lambda: ob.Replica(net(), ob.SGD(0.1)), TypeError).startswith("method = SGD(lr=0.1")  # type: ignore[arg-type]


def test_a_method_is_named_in_one_place() -> None:
    place = Place(method=repr(SGD))
    text = told(lambda: ob.Replica(net(), ob.methods.DanaZero(lr=0.05), place=place))
    assert "the script says DanaZero(lr=0.05" in text
    assert "the launcher says ASGD(lr=0.05" in text
    assert "name the method in one place" in text
    assert "start the script with `offbeat launch --method NAME`" in told(lambda: ob.Replica(net(), place=Place()))
    assert "give one, or the default" in told(lambda: ob.Replica(net(), SGD, default=SGD, place=Place()))


def test_a_default_gives_way_to_the_launcher_and_to_the_run(serve: Serve) -> None:
    other = ob.methods.DanaZero(lr=0.05)

    def taken(place: Place) -> str:
        with ob.Replica(net(), default=other, place=place) as replica:
            return repr(replica.worker.terms.method)

    assert taken(Place()) == repr(other)
    assert taken(Place(method=repr(SGD))) == repr(SGD)
    assert taken(serve(terms(SGD, None, workers=1)).place()) == repr(SGD)
    assert taken(serve(terms(None, None, workers=1), folder="free").place()) == repr(other)
    peers = serve(terms(ob.methods.LocalSGD(), None, workers=1), folder="peers")
    assert taken(peers.place()) == repr(ob.methods.LocalSGD())


@pytest.mark.parametrize("token", ["", "wrong", TOKEN + " "])
def test_a_wrong_token_gets_no_link(serve: Serve, token: str) -> None:
    """It is told at once, for dialling again would not help; nobody has joined."""
    run = serve(terms(SGD, None))
    text = told(lambda: hire(run.place(token=token), PROBLEM), PermissionError)
    assert f"{run.address} refuses the token: check OFFBEAT_TOKEN at both ends" in text
    assert not run.server.sessions
    until(lambda: run.server.refused == 1 and run.said, "the server's word")
    assert run.said[0].endswith("does not know the token: no link is made")


def test_a_server_without_the_token_is_not_believed() -> None:
    """Who answers must prove that it knows the token too."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def impostor() -> None:
            sock, _ = listener.accept()
            with sock:
                size = len(GREETING) + 32
                sock.sendall(sock.recv(size, socket.MSG_WAITALL))  # all that comes goes back
                sock.sendall(sock.recv(32, socket.MSG_WAITALL))

        pool.submit(impostor)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        text = told(lambda: dial(address, TOKEN, "the server", 5.0), PermissionError)
    assert text == f"the server at {address} does not know this run's token: check OFFBEAT_TOKEN"


@pytest.mark.parametrize("host", ["0.0.0.0", "", "::", "10.0.0.1"])
@pytest.mark.parametrize("token", ["", "fifteen bytes.."])
def test_beyond_the_machine_only_with_a_token(tmp_path: Path, host: str, token: str) -> None:
    text = told(lambda: RunServer(terms(SGD), token, tmp_path, print, heard(), host))
    assert text.startswith(
        f"host {host!r} can be reached from other machines: set OFFBEAT_TOKEN to a secret of 16 bytes"
    )


@pytest.mark.parametrize(
    ("variable", "value", "cure"),
    [("WORKER", "abc", "must be a number"), ("PATIENCE", "long", "must be a number")],
)
def test_a_bad_variable_is_named(variable: str, value: str, cure: str) -> None:
    text = told(lambda: Place.read({f"OFFBEAT_{variable}": value}))
    assert text == f"OFFBEAT_{variable} = {value!r}: {cure}"


@pytest.mark.parametrize("address", ["localhost", ":5000", "10.0.0.1:", "10.0.0.1:http", "10.0.0.1:99999", "h:0"])
def test_a_bad_address_is_named(address: str) -> None:
    text = told(lambda: hire(Place((address,), patience=5.0), PROBLEM))
    assert text == f"OFFBEAT_SERVER = {address!r}: must be HOST:PORT, with a port from 1 to 65535"


def test_a_worker_whose_lives_all_end_in_vain_gives_up(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes nothing, however often it is dialled, is not dialled for ever; one that took something is."""
    monkeypatch.setattr("offbeat.runtime.worker.LIVES", 3)
    run = serve(terms(ob.methods.ASGD(), None))
    worker = hire(run.place(0), PROBLEM)
    visit, taken = RunServer._visit, [0]

    def one_in_three(self: RunServer, *about: Any) -> None:
        taken[0] += 1
        if taken[0] % 3:
            raise LinkLost("the link is broken")
        visit(self, *about)

    def none(*about: Any) -> None:
        raise LinkLost("the link is broken")

    def step() -> None:
        g, loss = PROBLEM.grad(worker.x, 0, worker.node.step)
        worker.step(g, float(loss))

    monkeypatch.setattr(RunServer, "_visit", one_in_three)
    while taken[0] < 12:
        step()
    monkeypatch.setattr(RunServer, "_visit", none)
    lives = worker.life
    text = told(lambda: [step() for _ in range(12)], ob.LinkLost)
    assert "the link is broken" not in text  # the server's own trouble, which its log has
    assert "3 lives in a row have ended before anything that they brought was taken: see the other end's log" in text
    assert worker.life == lives + 3


def test_a_server_that_does_not_answer_is_dialled_for_so_long() -> None:
    """Where nobody listens, where somebody listens and is silent, and where another program answers."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nobody = f"127.0.0.1:{gone.getsockname()[1]}"
    text = told(lambda: hire(Place((nobody,), patience=0.3), PROBLEM), ob.LinkLost)
    assert text.startswith(f"nobody answers at {nobody}")
    assert text.endswith("nobody came back within 0.3 s")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        silent = f"127.0.0.1:{listener.getsockname()[1]}"
        text = told(lambda: hire(Place((silent,), patience=0.3, timeout=0.2), PROBLEM), ob.LinkLost)
        assert f"the server at {silent} was silent for 0.2 s while its greeting was waited for" in text
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def web() -> None:
            for _ in range(2):
                sock, _ = listener.accept()
                with sock:
                    sock.sendall(b"HTTP/1.1 400 Bad Request\r\n" + bytes(100))
                    sock.recv(100)

        pool.submit(web)
        place = Place((f"127.0.0.1:{listener.getsockname()[1]}",), patience=0.08)
        text = told(lambda: hire(place, PROBLEM), ob.LinkLost)
        assert "is no offbeat the server" in text


@pytest.mark.parametrize(
    ("field", "value", "cure"),
    [
        ("transport", "rdma", "choose one of auto, shared, gloo, tcp"),
        ("gradients", 0, "at least 1"),
        ("workers", 0, "at least 1"),
        ("timeout", -1.0, "above 0 seconds"),
        ("every", float("inf"), "must be finite"),
        ("beat", 30.0, "below the timeout, 20 s"),
        ("shard", (2, 2), "how many there are"),
    ],
)
def test_bad_terms_are_named(field: str, value: Any, cure: str) -> None:
    text = told(lambda: terms(SGD, **{field: value}))
    assert text.startswith(f"Terms.{field} = {value!r}: ")
    assert cure in text


def test_a_port_that_is_taken_is_named(serve: Serve, tmp_path: Path) -> None:
    run = serve(terms(SGD))
    text = told(lambda: RunServer(terms(SGD), "", tmp_path, print, heard(), port=run.server.port), OSError)
    assert text.startswith(f"cannot listen at {run.address} (")
    assert text.endswith("choose another host or port")


def test_more_servers_than_parameters_are_refused() -> None:
    place = Place(("127.0.0.1:1",) * 12)
    assert "12 servers for a model of 11 parameters" in told(lambda: hire(place, PROBLEM))


def test_a_model_of_integers_is_refused() -> None:
    place = Place(("127.0.0.1:1",))
    text = told(lambda: Remote(place, torch.zeros(3, dtype=torch.int64), {}, heard()))
    assert text.startswith("the model is of torch.int64: a real run takes torch.float32, ")
