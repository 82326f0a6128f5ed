"""What a host outlives: full disks, power cuts, models that it cannot evaluate, strangers, and workers with one number."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import resource
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import TOKEN, Serving, heard, hire, remote, until
from test_peers import PROBLEM as QUADRATIC
from test_peers import Run, runs  # noqa: F401
from torch import Tensor

import offbeat as ob
from offbeat.cli.run import _ended
from offbeat.log import SERVER, Lines, lines_to
from offbeat.runtime import host, journal, snapshot
from offbeat.runtime.coordinator import Coordinator
from offbeat.runtime.host import Terms
from offbeat.runtime.journal import Journal, beyond, whole
from offbeat.runtime.leases import Leases
from offbeat.runtime.protocol.coordinator import Coordination
from offbeat.runtime.worker import Worker, train

PROBLEM = ob.tasks.Quadratic(d=11)
SGD = ob.methods.ASGD(lr=0.1)
Serve = Callable[..., Serving]


def terms(gradients: int | None = None, **other: Any) -> Terms:
    return Terms(**{"method": SGD, "gradients": gradients, "beat": 0.05, "timeout": 20.0} | other)


def step(worker: Worker, times: int = 1) -> None:
    for _ in range(times):
        g, loss = PROBLEM.grad(worker.x, 0, worker.node.step)
        worker.step(g, float(loss))


# a full disk


class Disk:
    """A disk that may be full: what is written to a file in ``folder`` fails then, after some bytes have been taken."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.full, self.refused = folder, False, 0

    def open(self, path: Any, mode: str = "r", *args: Any, **named: Any) -> Any:
        file = _open(path, mode, *args, **named)
        return Full(file, self) if mode != "rb" and str(path).startswith(str(self.folder)) else file


_open = builtins.open


class Full:
    """A file on such a disk."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self.file, self.disk = file, disk

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        if not self.disk.full:
            return int(self.file.write(data))
        self.disk.refused += 1
        if len(data) > 7 and self.disk.refused == 1:
            return int(self.file.write(data[:7]))  # as much as there was room for
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(tmp_path)
    for module in (journal, snapshot):
        monkeypatch.setattr(module, "open", disk.open, raising=False)
    monkeypatch.setattr(host, "AGAIN", 0.05)
    monkeypatch.setattr(host, "SOON", 0.2)
    return disk


def count(run: Serving, *words: str) -> int:
    """How many lines of the log have all these words."""
    return len([line for line in run.said if all(word in line for word in words)])


def test_a_full_disk_is_said_once_and_training_goes_on(serve: Serve, disk: Disk) -> None:
    """When there is room again that is said, a snapshot is written, and every gradient is in the trace."""
    run = serve(terms(every=0.05))
    worker = hire(run.place(0), PROBLEM)
    step(worker, 5)
    until(lambda: snapshot.found(run.folder / "snapshots"), "a snapshot")
    disk.full = True
    step(worker, 5)
    until(lambda: disk.refused > 5, "more attempts")
    step(worker, 5)
    assert (
        count(run, "the trace cannot be written", str(run.folder), "No space left on device", "training goes on") == 1
    )
    before = max(int(path.stem) for path in snapshot.found(run.folder / "snapshots"))
    disk.full = False
    until(lambda: count(run, "the trace is written to", "again"), "the trace")
    newer = until(
        lambda: [p for p in snapshot.found(run.folder / "snapshots") if int(p.stem) > before], "another snapshot"
    )
    worker.leave(done=True)
    run.join()
    assert len(run.trace()) == 15
    assert ob.experiment.rerun(run.trace(), PROBLEM).x.equal(run.x())
    assert newer
    assert not list(run.folder.rglob("*.part"))


def test_a_snapshot_that_cannot_be_written_is_tried_again(
    serve: Serve, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the trace can be written: so a snapshot's own failure is said, with the folder, and that it is over."""
    run = serve(terms(every=0.05))
    worker = hire(run.place(0), PROBLEM)
    step(worker)
    write, tries = snapshot.write, list[int]()

    def fails(folder: Path, number: int, content: dict[str, Any]) -> Path:
        tries.append(number)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(snapshot, "write", fails)
    until(lambda: len(tries) > 3, "more attempts")
    step(worker)
    monkeypatch.setattr(snapshot, "write", write)
    until(lambda: count(run, "a snapshot is written to", "again"), "a snapshot")
    assert count(run, "a snapshot cannot be written", str(run.folder), "Read-only file system") == 1
    worker.leave(done=True)
    run.join()
    assert len(run.trace()) == 2


def test_the_last_model_waits_for_room(serve: Serve, disk: Disk) -> None:
    run = serve(terms())
    worker = hire(run.place(0), PROBLEM)
    step(worker, 3)
    disk.full = True
    worker.leave(done=True)
    until(lambda: count(run, "the model cannot be written"), "the end")
    assert run.server.status()["ending"] == "the model is written"
    assert run.thread.is_alive()
    assert not (run.folder / "model.pt").exists()
    disk.full = False
    run.join()
    assert run.well
    assert torch.load(run.folder / "model.pt", weights_only=True)["x"].equal(run.x())
    assert snapshot.newest(run.folder / "snapshots", heard())[1]["steps"] == {0: 3}  # type: ignore[index]
    assert len(run.trace()) == 3


@pytest.mark.parametrize("stopped", [True, False])
def test_a_model_that_cannot_be_written_is_told(
    stopped: bool, serve: Serve, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server gives up after a while, and says so to whoever has started it."""
    if not stopped:
        monkeypatch.setattr(host, "LAST", 0.2)
    run = serve(terms())
    worker = hire(run.place(0), PROBLEM)
    step(worker, 3)
    disk.full = True
    if stopped:
        run.server.stop()
    else:
        worker.leave(done=True)
    run.join()
    worker.leave(done=False)
    assert not run.well
    assert count(run, "the model could not be written for", "make room, and resume the run") == 1
    disk.full = False


def test_a_second_signal_ends_what_cannot_be_written(serve: Serve, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that comes with the first, as a launcher and a scheduler both send it, does not."""
    monkeypatch.setattr(host, "SOON", 60.0)
    run = serve(terms())
    worker = hire(run.place(0), PROBLEM)
    step(worker)
    disk.full = True
    run.server.stop()
    run.server.stop()
    until(lambda: disk.refused > 1, "attempts")
    assert run.thread.is_alive()
    monkeypatch.setattr(host, "ONCE", 0.0)
    run.stop()
    worker.leave(done=False)
    assert not run.well


def test_a_run_goes_on_after_a_full_disk(serve: Serve, disk: Disk) -> None:
    """`--resume` starts from the last snapshot that had room, and the trace goes with it."""
    run = serve(terms())
    worker = hire(run.place(0), PROBLEM)
    step(worker, 4)
    assert run.server.save()
    disk.full = True
    step(worker, 4)
    assert not run.server.save()
    with run.server.lock:  # as a kill leaves it: nothing more is written
        run.server.journal.close()
    files = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    run.stop()
    worker.leave(done=False)
    disk.full = False
    for path in run.folder.rglob("*"):
        if path.is_file():
            path.unlink()
    for path, data in files.items():
        path.write_bytes(data)
    again = serve(terms(), folder="run", resume=True)
    assert again.resumed
    other = hire(again.place(0), PROBLEM)
    assert other.terms.step == 4
    step(other, 2)
    other.leave(done=True)
    again.join()
    assert [event.step for event in again.trace()] == list(range(6))
    assert ob.experiment.rerun(again.trace(), PROBLEM).x.equal(again.x())


def test_the_trace_that_waits_in_memory_has_a_bound(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "WAITING", 200)
    said: list[str] = []
    kept = Journal(tmp_path / "trace.jsonl", 0, heard(said))
    disk.full = True
    for k in range(100):
        kept.add({"k": k})
        assert not kept.flush()
    disk.full = False
    assert kept.flush()
    lines = (tmp_path / "trace.jsonl").read_text().splitlines()
    assert 3 <= len(lines) < 10
    assert f"{100 - len(lines)} entries are missing in the trace" in said[-1]
    kept.add({"k": 100})
    assert kept.close()
    assert (tmp_path / "trace.jsonl").read_text().splitlines()[-1].endswith('"k": 100}')


# a power cut


def test_what_is_whole_of_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    assert whole(path, 7) == 0
    lines = b'{"a": 1}\n{"b": 2}\n'
    for data, place, due in (
        (lines, 18, 18),
        (lines, 9, 9),
        (lines, 12, 9),
        (lines, 300, 18),
        (lines + b'{"c"', 22, 18),
        (lines + bytes(300), 318, 18),
        (b'{"a": 1}\n' + bytes(9) + b'{"c": 3}\n', 27, 9),
        (bytes(40), 40, 0),
        (b"", 40, 0),
        (b"x" * 3_000_000 + b"\n" + lines, 3_000_019, 3_000_019),
    ):
        path.write_bytes(data)
        assert whole(path, place) == due


def test_what_is_beyond_a_place_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(
        b'{"format": 1}\n{"step": 0, "seconds": 2}\n7\n{"step": 1, "seconds": 3}\n\xff\x00{"step": 2, "sec'
    )
    assert beyond(path, 14) == (2, 3.0)
    assert beyond(path, 41) == (1, 3.0)
    assert beyond(tmp_path / "none", 3) == (0, 0.0)


@pytest.mark.parametrize("cut", [lambda data: data[:-400], lambda data: data[:-400] + bytes(400), lambda data: b""])
def test_a_trace_that_a_power_cut_has_shortened(serve: Serve, cut: Callable[[bytes], bytes]) -> None:
    """A resume goes on after its last whole line, says so, and never fills it up with NUL bytes."""
    run = serve(terms())
    worker = hire(run.place(0), PROBLEM)
    step(worker, 10)
    run.stop()
    worker.leave(done=False)
    path = run.folder / "trace.jsonl"
    data = path.read_bytes()[: snapshot.newest(run.folder / "snapshots", heard())[1]["trace"]]  # type: ignore[index]
    path.write_bytes(cut(data))
    again = serve(terms(), folder="run", resume=True)
    other = hire(again.place(0), PROBLEM)
    step(other, 2)
    other.leave(done=True)
    again.join()
    assert b"\0" not in path.read_bytes()
    steps = [event.step for event in again.trace()]
    assert steps == [*range(len(steps) - 2), 10, 11]
    assert len(steps) < 12
    assert again.trace().header["method"] == repr(SGD)
    assert count(again, "bytes of the trace are missing, as after a power cut") == 1


def test_the_trace_is_on_the_disk_before_the_snapshot_that_names_its_place(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = serve(terms())
    worker = hire(run.place(0), PROBLEM)
    step(worker, 3)
    synced: list[tuple[int, int]] = []
    fsync = os.fsync

    def sync(fd: int) -> None:
        synced.append((os.fstat(fd).st_ino, os.fstat(fd).st_size))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", sync)
    assert run.server.save()
    place = snapshot.newest(run.folder / "snapshots", heard())[1]["trace"]  # type: ignore[index]
    assert synced[0] == ((run.folder / "trace.jsonl").stat().st_ino, place)
    worker.leave(done=True)
    run.join()


# evaluation


class Hard:
    """A problem that cannot be evaluated as wished."""

    def __init__(self) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.times = 0

    def evaluate(self, x: Tensor) -> dict[str, float]:
        self.times += 1
        self.begun.set()
        assert self.go_on.wait(60)
        return {"loss": 1.0}


def test_a_task_that_cannot_be_evaluated_is_said_once(serve: Serve) -> None:
    """Of a name that is not known here, or data that are not there, the run does not end."""
    for problem in ("TaskOfMine()", "Cifar10()"):
        run = serve(terms(20), folder=problem, evaluations=10, parse=_without_data)
        worker = hire(run.place(0), PROBLEM)
        run.server.problem = problem
        train(worker, PROBLEM)
        run.join()
        assert run.well
        assert count(run, "the model is not evaluated", problem, "training goes on") == 1
        assert len(run.trace()) == 20


def _without_data(text: str) -> Any:
    if text == "Cifar10()":
        raise FileNotFoundError("CIFAR-10 is not there")
    return ob.names.read(text)


def test_evaluations_stop_neither_snapshots_nor_signals(serve: Serve) -> None:
    hard = Hard()
    run = serve(terms(1000, every=0.05), evaluations=1000, parse=lambda text: hard if text == "Hard()" else SGD)
    worker = hire(run.place(0), PROBLEM)
    run.server.problem = "Hard()"
    step(worker, 3)
    worker.use(worker.draw())
    step(worker, 1)
    assert hard.begun.wait(60)
    before = run.server.snapshots
    until(lambda: run.server.snapshots > before + 1, "snapshots")
    run.stop()  # which waits for its end
    assert hard.times == 1
    assert count(run, "an evaluation is broken off, as the run ends") == 1
    assert (run.folder / "model.pt").exists()
    assert run.server.busy == ["an evaluation"]
    hard.go_on.set()
    worker.leave(done=False)


def test_a_model_is_evaluated_at_the_end(serve: Serve) -> None:
    """And as often as asked, if it is fast enough."""
    run = serve(terms(40), evaluations=4)
    train(hire(run.place(0), PROBLEM), PROBLEM, ob.Fixed(0.01))
    run.join()
    found = run.trace().evaluations
    assert found[-1].figures == pytest.approx(PROBLEM.evaluate(run.x()))
    assert 2 <= len(found) <= 5


# workers with one number


def test_two_living_workers_with_one_number(serve: Serve) -> None:
    """The second is refused for as long as the first is there, and told what to do; the first goes on undisturbed."""
    run = serve(terms(timeout=1.0))
    first, said = hire(run.place(3), PROBLEM), list[str]()
    second = remote(run.place(3), PROBLEM)
    second.log = heard(said)
    with pytest.raises(
        ValueError, match="worker 3 is another process, which is alive: unset OFFBEAT_WORKER, or give each"
    ):
        second.join()
    assert len(said) == 1
    assert count(run, "refused", "worker 3 is another process") == 1
    step(first, 5)
    assert first.life == 1
    first.leave(done=True)
    run.join()
    assert [i.what for i in run.trace().incidents] == ["joined", "left"]


def test_a_dead_workers_number_is_free_at_once(serve: Serve) -> None:
    """Its connection is closed by the kernel, which is seen although nobody has read it yet."""
    run = serve(terms(timeout=60.0, beat=2.0))
    first = hire(run.place(3), PROBLEM)
    session = run.server.sessions[3]
    with run.server.lock:
        for shard in first.exchange.shards:  # type: ignore[attr-defined]
            shard.link.sock.shutdown(socket.SHUT_RDWR)
        until(lambda: not session.link.living(60.0), "the end of its link")
    second = hire(run.place(3), PROBLEM)
    first.leave(done=False)
    assert second.terms.worker == 3
    lives = {w["worker"]: w["life"] for w in run.server.status()["workers"]}
    assert lives == {3: 2}
    second.leave(done=True)
    run.join()


def test_lives_are_a_workers_own(serve: Serve) -> None:
    """And go on after a resume."""
    run = serve(terms(workers=2))
    workers = [hire(run.place(k), PROBLEM) for k in range(2)]
    assert [w["life"] for w in run.server.status()["workers"]] == [1, 1]
    run.stop()
    again = serve(terms(workers=2), folder="run", resume=True, port=0)
    workers += [hire(again.place(1), PROBLEM)]
    assert [w["life"] for w in again.server.status()["workers"]] == [2]
    for worker in workers:
        worker.leave(done=False)


def test_two_living_peers_with_one_number(runs: Callable[..., Run]) -> None:  # noqa: F811
    run = runs(ob.methods.AllReduce(ob.SGD(0.1)), 1, None, timeout=1.0, beat=0.1)
    first = run.enter(0)
    with pytest.raises(ValueError, match="worker 0 is another process, which is alive"):
        run.enter(0)
    first.step(QUADRATIC.grad(first.x, 0, 0)[0], 0.0)
    assert first.life == 1
    first.leave(True)
    run.threads[0].join(60)


# threads


def test_workers_join_after_a_thread_could_not_be_started(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    run = serve(terms())
    start, failed = threading.Thread.start, threading.Event()

    def fails(thread: threading.Thread) -> None:
        if not failed.is_set() and thread.name.startswith("the session of"):
            failed.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fails)
    worker = hire(run.place(0), PROBLEM)
    assert failed.is_set()
    assert count(run, "a worker could not be accepted (can't start new thread)") == 1
    worker.leave(done=True)
    run.join()


def test_strangers_who_say_nothing_are_few(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest are hung up on, and a worker joins although they are there."""
    monkeypatch.setattr(host, "STRANGERS", 8)
    run = serve(terms())
    with contextlib.ExitStack() as stack:
        address = "127.0.0.1", run.server.port
        strangers = [stack.enter_context(socket.create_connection(address, 60)) for _ in range(40)]
        worker = hire(run.place(0), PROBLEM)
        assert strangers[0].recv(1) == b""
        until(lambda: len(run.server.strangers) <= 8, "the end of most of them")
        worker.leave(done=True)
    run.join()


def test_a_thread_of_the_host_that_fails_ends_the_run(
    runs: Callable[..., Run],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What fails is said, with where it was, and whoever has started the host hears of it."""
    monkeypatch.setattr(Coordinator, "_clock", lambda *about: 1 / 0)
    run = runs(ob.methods.AllReduce(ob.SGD(0.1)), 1, None)
    run.start(0, lambda driver: None)
    run.threads[0].join(60)
    assert run.host.failure == "the coordinator's clock failed (ZeroDivisionError('division by zero'))"
    assert "in <lambda>" in "".join(run.said)


def test_a_watcher_that_fails_ends_the_run_with_a_snapshot(serve: Serve) -> None:
    broken = threading.Event()

    def watch() -> None:
        if broken.is_set():
            raise KeyError("mine")

    run = serve(terms(), watch=watch)
    worker = hire(run.place(0), PROBLEM)
    step(worker, 2)
    broken.set()
    run.join()
    worker.leave(done=False)
    assert not run.well
    assert count(run, "the host failed (KeyError('mine'))") == 1
    assert snapshot.newest(run.folder / "snapshots", heard())[1]["steps"] == {0: 2}  # type: ignore[index]


def test_a_log_that_cannot_be_written_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stderr", Full())
    with lines_to(Lines()):
        run = ob.runtime.server.RunServer(terms(), TOKEN, tmp_path, ob.names.read, SERVER)
        run.log.warning("anything")
        run.close()


# memory


@contextlib.contextmanager
def within(size: int) -> Iterator[None]:
    """Whatever needs more than so many bytes beside those that this process has now fails."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs Linux's /proc")
    has = next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmSize"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (has + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_snapshot_is_in_memory_once(tmp_path: Path) -> None:
    """It is written from where it lies, and read into the tensors that it becomes."""
    content = {"x": [torch.ones(4_000_000) for _ in range(4)]}
    size = 64_000_000
    snapshot.write(tmp_path, 1, {"x": torch.ones(3)})  # whatever torch loads for that
    with within(size // 4):
        path = snapshot.write(tmp_path, 2, content)
    with within(5 * size // 4):
        read = snapshot.read(path)
    assert all(torch.equal(a, b) for a, b in zip(read["x"], content["x"], strict=True))


def test_a_snapshot_is_as_large_as_the_state_without_workers(serve: Serve) -> None:
    """However many there are: a resume takes them for dead, so it would only drop what the server keeps for them."""
    run = serve(terms(method=ob.methods.DanaZero(lr=0.01), workers=3))
    workers = [hire(run.place(k), PROBLEM) for k in range(3)]
    for worker in workers:
        step(worker, 2)
    assert run.server.save()
    content = snapshot.newest(run.folder / "snapshots", heard())[1]  # type: ignore[index]
    assert content["there"] == [0, 1, 2]
    assert sum(t.numel() for t in content["state"] if t.dim()) == 2 * PROBLEM.d
    assert sum(w["gradients"] for w in run.server.status()["workers"]) == 6
    assert content["state"][0].equal(run.x())
    for worker in workers:
        worker.leave(done=True)
    run.join()


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 20_000_000), (torch.bfloat16, 50_000_000)])
def test_the_mean_of_shown_models_is_taken_one_by_one(dtype: torch.dtype, most: int) -> None:
    """So it needs one model more, and of short numbers the sum and one of them as float32."""
    made = Coordination(ob.methods.DPSGD(), torch.zeros(1), Leases(), 0.0)
    made.shown = {k: torch.full((4_000_000,), 1.0 + k % 3, dtype=dtype) for k in range(6)}
    with within(most):
        x = made.x()
    assert torch.equal(x, torch.full((4_000_000,), 2.0, dtype=dtype))


# the end


def test_a_visit_that_compiles_is_not_waited_for(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by the run, nor by the process: Python's own end would abort it inside of the compiler."""
    compiles, ends = threading.Event(), threading.Event()

    def race(visits: Any) -> dict[str, float]:
        compiles.set()
        assert ends.wait(60)
        return {}

    monkeypatch.setattr("offbeat.runtime.server.LARGE", 11)
    monkeypatch.setattr("offbeat.engines.kernel.Visits.race", race)
    run = serve(terms())
    worker = hire(run.place(0), PROBLEM)
    assert compiles.wait(60)
    step(worker, 2)
    worker.leave(done=True)
    run.join()
    assert run.well
    assert (run.folder / "model.pt").exists()
    assert run.server.busy == ["the search for the fastest way of a visit"]
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    assert _ended(run.server, 3) == 3
    assert left == [3]
    ends.set()
    until(lambda: not run.server.busy, "the end of the compiler")
    assert _ended(run.server, 0) == 0
    assert left == [3]
