"""A launcher's processes: small programs of the standard library stand for server and worker, so that nothing imports torch."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from crew import Nursery, Processes, alive, heard, until

import offbeat as ob
from offbeat.log import Lines, lines_to
from offbeat.runtime.folder import Busy, choose, claim, holds_run, lock
from offbeat.runtime.launch import Launch
from offbeat.runtime.link import LinkLost
from offbeat.runtime.place import Place
from offbeat.runtime.processes import Log, Process
from offbeat.runtime.supervisor import Ending, Supervisor

SERVER = """
import json, os, signal, sys, time
def end(number, frame):
    open("snapshot", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
open("server.words", "a").write(" ".join(sys.argv[1:]) + "\\n")
print(json.dumps({"address": "127.0.0.1:7", "over": False}), flush=True)
while not os.path.exists("over"):
    status = {"made": time.monotonic(), "lives": {}, "steps": {}, "finished": [], "ending": "", "workers": []}
    print(json.dumps(status), flush=True)
    time.sleep(0.02)
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything is done in a folder of the test's own, and signals are the test runner's again afterwards."""
    monkeypatch.chdir(tmp_path)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and so a launcher leaves it
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    yield
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    signal.signal(signal.SIGHUP, hangup)


def launch(worker: str, meanwhile: Callable[[], Any] = lambda: None, **options: Any) -> tuple[Supervisor, list[str]]:
    """A run whose workers are the program ``worker``; how it ended, and what was said. ``meanwhile`` goes on beside it."""
    Path("server.py").write_text(SERVER)
    Path("worker.py").write_text(
        "import os, signal, subprocess, sys, time\nnumber = os.environ['OFFBEAT_WORKER']\n" + worker
    )
    said: list[str] = []
    python = [sys.executable, "-S"]
    run = Launch(Path("run"), [*python, "server.py"], [*python, "worker.py"], workers=2, log=heard(said), **options)
    beside = threading.Thread(target=meanwhile)
    beside.start()
    try:
        return run.run(), said
    finally:
        beside.join()


def test_a_worker_that_is_killed_is_started_again_and_the_server_is_ended_when_all_are_done() -> None:
    end, said = launch(
        "if number == '1' and not os.path.exists('killed'):\n"
        "    open('killed', 'w').close()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "print(number, os.environ['OFFBEAT_SERVER'], os.environ['OFFBEAT_GRACE'], flush=True)\n"
    )
    assert (end.ending, end.failed, end.whole) == (Ending.OVER, [], True)
    assert [line.partition(":")[0] for line in said] == [
        "worker 1 was killed by SIGKILL",
        "all workers have ended, not all by the end of their loops",
    ]
    assert [Path(f"run/logs/worker-{i}.log").read_text() for i in "01"] == ["0 127.0.0.1:7 10\n", "1 127.0.0.1:7 10\n"]
    assert Path("snapshot").exists()
    told = Path("run/logs/launch.log").read_text()
    assert all(line in told for line in said)


def test_what_a_script_prints_is_there_when_it_is_killed() -> None:
    launch("print('line')\nos.kill(os.getpid(), signal.SIGKILL)", restarts=0)
    assert "line" in Path("run/logs/worker-0.log").read_text()


def test_a_script_with_an_error_is_shown_and_not_tried_again_and_again() -> None:
    end, said = launch("def train():\n    undefined\ntrain()")
    text = "\n".join(said)
    assert (end.ending, end.why, end.whole) == (Ending.FAILED, "no worker is left", True)
    assert text.count("NameError: name 'undefined' is not defined") == 2  # of each worker, once
    assert Path("run/logs/worker-0.log").read_text().count("Traceback") == 2


def test_what_a_script_has_started_ends_with_it() -> None:
    """Its own children would hold its memory and its ports."""
    launch("open(number, 'w').write(str(subprocess.Popen(['sleep', '1000']).pid))")
    children = [int(Path(i).read_text()) for i in "01"]
    until(lambda: not any(map(alive, children)), "the end of the scripts' children")


def test_a_server_that_dies_goes_on_at_its_address() -> None:
    def meanwhile() -> None:
        until(lambda: Path("server.pid").exists(), "the server")
        os.kill(int(Path("server.pid").read_text()), signal.SIGKILL)
        until(lambda: Path("server.words").read_text().count("\n") == 2, "its restart")
        Path("over").touch()

    worker = (
        "place = f'/proc/{os.getppid()}/task/{os.getppid()}/children'\n"
        "for pid in open(place).read().split():\n"
        "    if b'server.py' in open(f'/proc/{pid}/cmdline', 'rb').read():\n"
        "        open('part', 'w').write(pid)\n"
        "if number == '0': os.rename('part', 'server.pid')\n"
        "while not os.path.exists('over'): time.sleep(0.01)\n"
    )
    end, said = launch(worker, meanwhile, resume=True)
    assert end.ending is Ending.OVER
    assert "server 0 was killed by SIGKILL: starting it again in 0.25 s (see run/logs/server-0.log)" in said
    first, second = Path("server.words").read_text().splitlines()
    assert first == "--out run --shard 0 1 --resume"
    assert second == "--out run --shard 0 1 --again --port 7"


STUCK = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nopen(number, 'w').write(str(os.getpid()))\ntime.sleep(1000)"


def test_two_signals_leave_no_process_and_no_handler() -> None:
    def meanwhile() -> None:
        until(lambda: Path("0").exists() and Path("1").exists(), "the workers")
        os.kill(os.getpid(), signal.SIGINT)
        log = Path("run/logs/launch.log")
        until(lambda: log.exists() and "SIGINT" in log.read_text(), "its word")
        os.kill(os.getpid(), signal.SIGTERM)

    end, said = launch(STUCK, meanwhile)
    assert (end.ending, end.whole) == (Ending.STOPPED, False)
    assert [line.partition(":")[0] for line in said] == ["SIGINT", "SIGTERM once more"]
    assert not any(alive(int(Path(i).read_text())) for i in "01")


def test_one_signal_ends_a_run_with_a_stuck_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is killed when its time is up, and then the server writes what there is."""
    monkeypatch.setattr("offbeat.runtime.supervisor.GRACE", 0.3)

    def meanwhile() -> None:
        until(lambda: Path("0").exists() and Path("1").exists(), "the workers")
        os.kill(os.getpid(), signal.SIGHUP)

    end, said = launch(STUCK, meanwhile)
    assert (end.ending, end.whole) == (Ending.STOPPED, True)
    assert Path("snapshot").exists()
    assert sum("it is killed" in line for line in said) == 2


def test_a_terminal_that_is_closed_does_not_end_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Closed())
    Path("server.py").write_text(SERVER)
    python = [sys.executable, "-SE"]
    with lines_to(Lines()):
        end = Launch(Path("run"), [*python, "server.py"], [*python, "-c", "raise SystemExit(3)"], workers=1).run()
    assert end.ending is Ending.FAILED
    assert "worker 0 ended with status 3" in Path("run/logs/launch.log").read_text()


def test_a_log_that_cannot_be_written_does_not_end_the_run() -> None:
    """The disk may be full, or the folder be gone."""
    Path("run/logs/launch.log").mkdir(parents=True)
    end, said = launch("sys.exit(3)", restarts=0)
    assert end.ending is Ending.FAILED
    assert "worker 0 ended with status 3" in "\n".join(said)


def test_a_log_that_cannot_be_written_does_not_end_a_script() -> None:
    """It would, where the script prints to it: so a script prints to the launcher."""
    Path("run/logs/worker-0.log").mkdir(parents=True)
    end, said = launch(
        "for i in range(9999): print('line', i, flush=True)\nif number == '0': sys.exit('why')", restarts=0
    )
    assert end.ending is Ending.OVER
    assert end.failed == ["worker 0"]
    assert "\n    why" in "\n".join(said)
    assert Path("run/logs/worker-1.log").read_text() == "".join(f"line {i}\n" for i in range(9999))


def test_what_workers_print_is_heard() -> None:
    heard: list[tuple[int, str]] = []
    launch(
        "print('a [line]'); sys.stderr.write('1 %\\r99 %\\r100 %\\n'); sys.stdout.write('no end')",
        hear=lambda worker, text: heard.append((worker, text)),
        restarts=0,
    )
    assert [text for worker, text in heard if worker == 0] == ["a [line]", "100 %", "no end"]
    assert {worker for worker, _ in heard} == {0, 1}
    assert "no end" in Path("run/logs/worker-0.log").read_text()


def test_what_a_log_has_no_room_for_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offbeat.runtime.processes.MOST", 10)
    path = Path("log")
    path.mkdir()
    log = Log(path)
    for word in ("one ", "two ", "three ", "four "):
        log.add(word.encode())
    assert log.tail(0) == "hree four "
    path.rmdir()
    log.add(b"five")
    assert path.read_text() == log.tail(0) == "hree four five"
    assert log.tail(log.size()) == ""


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's word that a parent has died")
def test_a_process_is_told_when_its_launcher_dies() -> None:
    launcher = os.fork()
    if launcher == 0:
        process = Process(Path("log"))
        code = "import os, signal, time; signal.signal(15, lambda *_: os._exit(0)); open('pid', 'w').write(str(os.getpid())); time.sleep(99)"
        process.start([sys.executable, "-SE", "-c", code], dict(os.environ))
        while not Path("pid").exists() or not Path("pid").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(launcher, 0)
    until(lambda: not alive(int(Path("pid").read_text())), "the end of the launcher's child")


def test_a_launch_shows_no_secret() -> None:
    run = Launch(Path("run"), [], [], 1, environment={"OFFBEAT_TOKEN": "a secret"})
    assert "a secret" not in repr(run)


LATE = """
import os, sys
from offbeat.cli import main

class Late:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, 15)

late = Late()  # freed when Python has undone its handlers of signals
sys.exit(main(["server", "--status", "--workers", "1", "--method", "asgd(lr=0.1)"]))
"""


def test_a_signal_after_its_last_word_is_nothing_to_a_server() -> None:
    """As the launcher's, when all workers have ended while the server does so too."""
    process = subprocess.Popen([sys.executable, "-c", LATE], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        assert b"address" in process.stdout.readline()
        process.terminate()
        process.stdout.read()
    assert process.wait(300) == 0


# folders


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def take(named: str | None = None, **options: Any) -> str:
    """The folder that a run gets, which it fills and leaves."""
    folder, held = claim(Path(named) if named else None, Path("runs/launch"), "launch", made, **options)
    (folder / "trace.jsonl").write_text(str(folder))
    held.close()
    return str(folder)


def test_default_folders_are_numbered() -> None:
    assert [take(), take(), take()] == ["runs/launch", "runs/launch-2", "runs/launch-3"]
    assert take(resume=True) == "runs/launch-3"
    assert Path("runs/launch/trace.jsonl").read_text() == "runs/launch"
    second = choose(None, Path("runs/launch"), same=lambda folder: folder.name == "launch-2")
    assert second == Path("runs/launch-2")


def test_a_folder_that_was_named_and_holds_a_run_is_refused() -> None:
    take("mine")
    with pytest.raises(
        ValueError, match="mine holds a run already: name another folder with --out, or go on with it by --resume"
    ):
        take("mine")
    assert take("mine", resume=True) == "mine"


@pytest.mark.parametrize(
    ("name", "holds"),
    [
        ("logs/worker-0.log", False),
        ("notes.txt", False),
        ("snapshots/x.part", False),
        ("snapshots/01.snapshot", True),
        ("model.pt", True),
        ("shard-0/model.pt", True),
    ],
)
def test_what_makes_a_run(name: str, holds: bool) -> None:
    path = Path("mine") / name
    path.parent.mkdir(parents=True)
    path.touch()
    assert holds_run(Path("mine")) is holds


def test_a_folder_in_use_is_refused_by_name_and_a_default_one_is_passed_by() -> None:
    folder, held = claim(None, Path("runs/launch"), "launch", made)
    with pytest.raises(Busy, match=f"launch is in use by another offbeat launch, process {os.getpid()}"):
        lock(folder, "launch")
    assert take() == "runs/launch-2"
    held.close()
    assert take() == "runs/launch"


# whole runs

TRAIN = """
import sys
import torch
import offbeat as ob
from torch.utils.data import DataLoader, TensorDataset

epochs, then = int(sys.argv[1]), sys.argv[2]
model = torch.nn.Linear(4, 1)
replica = ob.Replica(model, ob.methods.DanaZero(lr=0.01))
for epoch in range(epochs):
    for (x,) in replica.shard(DataLoader(TensorDataset(torch.ones(40, 4)), 2)):
        model(x).square().mean().backward()
        replica.step()
if "leaves" in then:
    replica.leave()
if "fails" in then:
    torch.save(model.state_dict(), "/nowhere/model.pt")
"""


def trains(processes: Processes, *words: str, out: str | None = "run") -> tuple[int, str]:
    """A launch of a script with two workers: its status, and what it has said."""
    (processes.folder / "train.py").write_text(TRAIN)
    argv = ["launch", "--workers", "2", *(["--out", out] if out else []), *words]
    process = processes.offbeat(*argv)
    return processes.ends(process), processes.said(process)


@pytest.mark.parametrize("leaves", [True, False])
def test_a_script_that_fails_at_its_end(processes: Processes, leaves: bool) -> None:
    """The model is there all the same. After `leave` there is nothing to be tried again; else the end is, without its training."""
    status, said = trains(processes, "train.py", "1", "leaves fails" if leaves else "fails")
    assert status == (1 if leaves else 3), said
    assert "Parent directory /nowhere does not exist." in said
    tries = said.count("starting it again")
    assert tries == 0 if leaves else 4 <= tries <= 6  # a first end after a step does not count
    if leaves:
        for i in range(2):
            assert f"worker {i} ended with status 1 after it had left the run" in said
        assert " failed: the model is whole, what the scripts had to do besides is not" in said
    assert "model: run/model.pt" in said
    assert len(ob.Trace.read(processes.folder / "run/trace.jsonl")) == 20


def test_a_folder_holds_one_run_which_is_resumed_for_more(processes: Processes) -> None:
    status, said = trains(processes, "train.py", "1", "ends")
    assert status == 0, said
    before = {str(p): p.read_bytes() for p in (processes.folder / "run").rglob("*") if p.is_file()}
    status, said = trains(processes, "train.py", "1", "ends")
    assert (status, "run holds a run already" in said) == (2, True), said
    assert before == {str(p): p.read_bytes() for p in (processes.folder / "run").rglob("*") if p.is_file()}
    status, said = trains(processes, "--resume", "train.py", "2", "ends")
    assert status == 0, said
    assert len(ob.Trace.read(processes.folder / "run/trace.jsonl")) == 40
    status, said = trains(processes, "--resume", "train.py", "2", "ends")
    assert (status, "no gradient was taken since: the run was over before, with 40" in said) == (0, True), said


def test_a_run_without_a_gradient_presents_no_model(processes: Processes) -> None:
    trains(processes, "train.py", "1", "ends", out=None)
    status, said = trains(processes, "train.py", "0", "ends", out=None)
    assert status == 3, said
    assert "the run's folder is runs/launch-2" in said
    assert "no gradient was taken" in said
    assert "model: " not in said.replace("no model: ", "")
    assert len(ob.Trace.read(processes.folder / "runs/launch/trace.jsonl")) == 20


def test_a_port_that_is_taken_is_said_at_once(
    tmp_path: Path, nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the process that is to host the run there."""
    monkeypatch.setattr(sys, "executable", nursery.python)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        place = Place((address,), worker=0, hosts=2)
        with pytest.raises(LinkLost, match=f"the run cannot be hosted at {address}: .*cannot listen at {address}"):
            place.host()
    assert not holds_run(Path("runs/job"))


def test_a_method_of_one_s_own_is_trained_with_where_its_module_is_named(processes: Processes) -> None:
    """The module lies beside the script, in another folder than the one of the launch; without its name the cure is told."""
    folder = processes.folder / "project"
    folder.mkdir()
    mine = "import dataclasses, offbeat as ob\n@dataclasses.dataclass(frozen=True)\nclass MyOwn(ob.methods.ASGD):\n    '''Mine.'''\n"
    (folder / "my_own.py").write_text(mine)
    (folder / "train.py").write_text("from my_own import MyOwn\n" + TRAIN.replace("ob.methods.DanaZero", "MyOwn"))
    words = ["launch", "--workers", "1", "--out"]
    process = processes.offbeat(*words, "run", "--import", "my_own", "project/train.py", "1", "ends")
    assert processes.ends(process) == 0, processes.said(process)
    assert ob.Trace.read(processes.folder / "run/trace.jsonl").header["method"].startswith("MyOwn(lr=0.01")
    process = processes.offbeat(*words, "other", "project/train.py", "1", "ends")
    assert processes.ends(process) == 3
    assert "start `offbeat launch` or `offbeat server` with --import methods" in processes.said(process)
