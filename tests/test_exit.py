"""How a worker leaves: when its work counts as done, what SIGTERM does, and that nothing keeps a replica that nobody refers to."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from crew import LIMIT, Processes, Serving, alive, until
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import offbeat as ob
from offbeat.runtime.exit import ScriptEnd, _here, _terminate, failed
from offbeat.runtime.host import Terms

Serve = Callable[..., Serving]
BOOM = RuntimeError("boom")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """A test leaves neither a handler nor a failure behind, and finds none of replicas that tests of other files have made."""
    gc.collect()
    until(lambda: not _here.dropped, "the end of replicas that nobody refers to")
    for member in list(_here.members):  # of a test that has failed, whose frames are kept
        member.forget()
    if signal.getsignal(signal.SIGTERM) is _terminate:  # the last one was forgotten by a thread, which cannot set it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    handler, real = signal.getsignal(signal.SIGTERM), sys.exit
    yield
    vars(sys).pop("last_value", None)
    gc.collect()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert sys.exit is real


# when it is done: a pure function of what is known


@pytest.mark.parametrize(
    ("ending", "why"),
    [
        (ScriptEnd(steps=9, unfinished=False), ""),
        (ScriptEnd(steps=0, unfinished=False), ""),  # started again, when its passes were over
        (ScriptEnd(steps=9, unfinished=None), ""),  # a loop without a loader
        (ScriptEnd(steps=9, unfinished=False, status=0), ""),
        (ScriptEnd(steps=9, unfinished=False, told=True), ""),
        (ScriptEnd(steps=9, unfinished=None, told=True), "SIGTERM"),
        (ScriptEnd(steps=9, unfinished=True), "broken off"),
        (ScriptEnd(steps=0, unfinished=None), "no step"),
        (ScriptEnd(steps=9, unfinished=False, status=1), "status 1"),
        (ScriptEnd(steps=9, unfinished=None, status="no data"), "'no data'"),
        (ScriptEnd(steps=9, unfinished=True, status=2), "status 2"),
        (ScriptEnd(steps=9, unfinished=False, error=BOOM), "RuntimeError"),
        (ScriptEnd(steps=9, unfinished=None, error=KeyboardInterrupt()), "KeyboardInterrupt"),
    ],
)
def test_what_counts_as_done(ending: ScriptEnd, why: str) -> None:
    assert bool(ending.undone) == bool(why)
    assert why in ending.undone


SLOW = """
import threading, time
from types import SimpleNamespace
from offbeat.log import WORKER
from offbeat.runtime.exit import Member, WorkerThread

class Driver:
    left, using, terms = False, threading.RLock(), SimpleNamespace(worker=0)
    def leave(self, done):
        self.left = True
        time.sleep(0.3)
    def __del__(self):
        time.sleep(0.3)  # as freeing much memory takes a while
        print("freed", flush=True)

class Owner:
    pass

def dropped():
    owner, member = Owner(), Member(WORKER)
    member.unfinished = False  # its passes have ended
    member.joined(Driver(), owner)

def thread():
    over = threading.Event()
    WorkerThread(over, print, Driver()).start()
    over.set()

def failed():
    WorkerThread(threading.Event(), time.sleep, 10_000).start()

{what}()
"""


@pytest.mark.parametrize("what", ["dropped", "thread"])
def test_python_ends_when_threads_have_freed_what_they_had(what: str) -> None:
    """An owner that goes at the very end leaves in a thread, and so does what a thread is at: it may be a tensor."""
    done = subprocess.run(
        [sys.executable, "-c", SLOW.replace("{what}", what)], capture_output=True, text=True, timeout=LIMIT
    )
    assert (done.returncode, done.stdout.split()[-1]) == (0, "freed"), done


def test_python_does_not_wait_for_threads_of_a_worker_that_has_not_left() -> None:
    """As one whose training has failed: its threads would go on."""
    code = SLOW.replace("{what}", "failed")
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OFFBEAT_GRACE": "10000"}, check=True, timeout=LIMIT
    )


# in this process


def worker(run: Serving) -> tuple[nn.Module, ob.Replica]:
    model = nn.Linear(2, 1).double()
    return model, ob.Replica(model, place=run.place(0))


def serving(serve: Serve) -> Serving:
    return serve(Terms(ob.methods.ASGD(lr=0.01), workers=2, beat=0.05))


def step(model: nn.Module, replica: ob.Replica) -> None:
    model(torch.ones(3, 2, dtype=torch.float64)).sum().backward()
    replica.step()


def left(run: Serving) -> int:
    """How many workers were done, when the one has left in good order."""
    until(lambda: "worker 0 has left" in run.said or "worker 0 is lost" in run.said, "its end")
    assert "worker 0 has left" in run.said
    return len(run.server.finished)


def typo_before(model: nn.Module, replica: ob.Replica) -> None:
    sys.last_value = NameError("modle")
    step(model, replica)


def typo_after(model: nn.Module, replica: ob.Replica) -> None:
    step(model, replica)
    sys.last_value = NameError("modle")


def exits(*status: Any) -> Callable[[nn.Module, ob.Replica], None]:
    def script(model: nn.Module, replica: ob.Replica) -> None:
        step(model, replica)
        with pytest.raises(SystemExit):
            sys.exit(*status)
        assert failed() == bool(status and status[0])

    return script


def quits(model: nn.Module, replica: ob.Replica) -> None:
    step(model, replica)
    before = sys.stdin
    with open(os.devnull) as sys.stdin, pytest.raises(SystemExit):  # which it closes
        exit(3)
    sys.stdin = before


def caught(model: nn.Module, replica: ob.Replica) -> None:
    exits(2)(model, replica)  # as a parser of options does, and the script goes on
    step(model, replica)


def passes(broken: bool) -> Callable[[nn.Module, ob.Replica], None]:
    def script(model: nn.Module, replica: ob.Replica) -> None:
        for _ in replica.shard(DataLoader(TensorDataset(torch.ones(6, 1)), 2)):
            step(model, replica)
            if broken:
                break

    return script


@pytest.mark.parametrize(
    ("script", "done"),
    [
        (step, True),
        (typo_before, True),
        (typo_after, False),
        (exits(), True),
        (exits(0), True),
        (exits(1), False),
        (exits("no data"), False),
        (quits, False),
        (caught, True),
        (passes(False), True),
        (passes(True), False),
        (lambda model, replica: None, False),
    ],
)
def test_the_end_of_a_script(serve: Serve, script: Callable[[nn.Module, ob.Replica], None], done: bool) -> None:
    run = serving(serve)
    model, replica = worker(run)
    script(model, replica)
    replica._member._exit()  # as Python calls it
    assert left(run) == done


@pytest.mark.parametrize(
    ("error", "done"),
    [(None, True), (SystemExit(0), True), (SystemExit(), True), (SystemExit(1), False), (BOOM, False)],
)
def test_the_end_of_a_with(serve: Serve, error: BaseException | None, done: bool) -> None:
    run = serving(serve)
    model, replica = worker(run)
    with contextlib.suppress(BaseException), replica:
        step(model, replica)
        if error is not None:
            raise error
    assert left(run) == done


def test_a_replica_that_nobody_refers_to_leaves(serve: Serve) -> None:
    """As where it was made in a function: it is not kept until the process ends."""

    def script() -> None:
        model, replica = worker(run)
        step(model, replica)

    run = serving(serve)
    handler = signal.getsignal(signal.SIGTERM)
    script()
    assert left(run) == 1
    signal.signal(signal.SIGTERM, handler)  # only the main thread may, and what is left there does what it did


@pytest.mark.parametrize("optimizer", [False, True])
def test_nothing_keeps_a_model(optimizer: bool) -> None:
    """Neither what is called at exit, nor what puts an optimizer into the method."""
    model = nn.Linear(2, 1)
    sgd = torch.optim.SGD(model.parameters(), 0.1) if optimizer else None
    replica = ob.Replica(model, ob.methods.LocalSGD() if optimizer else ob.methods.DanaZero(), optimizer=sgd)
    for _ in replica.shard(DataLoader(TensorDataset(torch.ones(6, 1)), 2)):
        model(torch.ones(3, 2)).sum().backward()
        replica.step()
    replica.leave()
    seen = weakref.ref(model), weakref.ref(replica), weakref.ref(replica.worker)
    del model, replica, sgd
    gc.collect()
    assert [one() for one in seen] == [None] * 3


def test_a_worker_that_has_left_takes_no_step(serve: Serve) -> None:
    run = serving(serve)
    model, replica = worker(run)
    minibatches = iter(replica.shard(DataLoader(TensorDataset(torch.ones(6, 1)), 2)))
    next(minibatches)
    replica.leave(done=False)
    replica.leave()  # nothing more
    assert left(run) == 0
    with pytest.raises(RuntimeError, match="has left its run"):
        step(model, replica)
    with pytest.raises(RuntimeError, match="has left its run"):
        list(minibatches)


def test_a_forked_child_is_not_the_worker() -> None:
    """It has neither the handler of SIGTERM nor the replica, which goes on in the parent."""
    model = nn.Linear(2, 1)
    with ob.Replica(model, ob.methods.ASGD()) as replica:
        told, tell = multiprocessing.Pipe(duplex=False)

        def child() -> None:
            try:
                replica.step()
            except RuntimeError as error:
                tell.send((str(error), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL))

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(LIMIT)
        assert told.poll(LIMIT)
        why, default = told.recv()
        assert "forked after its replica was made" in why
        assert default
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        model(torch.ones(1, 2)).sum().backward()
        replica.step()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# processes of their own

SCRIPT = """
import sys, time
import torch
import offbeat as ob

model = torch.nn.Linear(2, 1).double()
replica = ob.Replica(model, ob.methods.ASGD(lr=0.01))
for _ in range(3):
    model(torch.ones(3, 2, dtype=torch.float64)).sum().backward()
    replica.step()
"""
EVALUATES = 'print("evaluates", flush=True)\nwhile True: time.sleep(0.01)\n'


def start(processes: Processes, text: str, run: Serving | None = None, **environment: str) -> Any:
    (processes.folder / "script.py").write_text(SCRIPT + text)
    place = {} if run is None else {"OFFBEAT_SERVER": run.address, "OFFBEAT_TOKEN": run.place().token}
    process = processes.start("script.py", **place, **environment)
    until(lambda: "evaluates" in processes.said(process) or process.poll() is not None, "an evaluation")
    return process


def test_sigterm_outside_of_a_step(processes: Processes, serve: Serve) -> None:
    """No step comes: it leaves in good order all the same, and the signal ends it."""
    run = serving(serve)
    process = start(processes, EVALUATES, run, OFFBEAT_GRACE="1")
    os.kill(processes.living("script")[0], signal.SIGTERM)
    assert processes.ends(process) == -signal.SIGTERM
    assert left(run) == 0
    assert "no step that could do so has come within 0.5 s" in processes.said(process)


def test_a_second_sigterm(processes: Processes, serve: Serve) -> None:
    """It ends the process at once, where the grace period has long to go."""
    run = serving(serve)
    process = start(processes, EVALUATES, run, OFFBEAT_GRACE="10000")
    while process.poll() is None:  # in the first second, several are one
        for pid in processes.living("script"):
            os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    assert processes.ends(process) == -signal.SIGTERM
    until(lambda: "worker 0 is lost" in run.said, "its end")


def test_sigterm_after_leaving(processes: Processes) -> None:
    process = start(processes, "replica.leave()\n" + EVALUATES, OFFBEAT_GRACE="10000")
    os.kill(processes.living("script")[0], signal.SIGTERM)
    assert processes.ends(process) == -signal.SIGTERM


CHILDREN = """
import multiprocessing
children = [multiprocessing.get_context("fork").Process(target=time.sleep, args=(10_000,), daemon=True) for _ in range(2)]
for child in children:
    child.start()
print(*(child.pid for child in children), flush=True)
"""


def test_children_do_not_hold_up_the_exit(processes: Processes) -> None:
    """Python ends daemons by SIGTERM, and waits for their end."""
    process = start(processes, CHILDREN)
    assert processes.ends(process) == 0, processes.said(process)
    children = [int(word) for word in processes.said(process).split()]
    assert len(children) == 2
    assert not any(alive(child) for child in children)


FORKS = """
import torch.multiprocessing as mp

def train(number, status):
    torch.set_num_threads(1)
    model = torch.nn.Linear(2, 1).double()
    replica = ob.Replica(model, ob.methods.ASGD(lr=0.01))
    model(torch.ones(3, 2, dtype=torch.float64)).sum().backward()
    replica.step()
    sys.exit(status)

replica.leave(done=False)
children = [mp.get_context("fork").Process(target=train, args=(i, i)) for i in range(2)]
for child in children:
    child.start()
for child in children:
    child.join()
print([child.exitcode for child in children])
"""


def test_forked_workers_leave(processes: Processes, serve: Serve) -> None:
    """Python runs no atexit functions in them. One fails, and is not done."""
    run = serving(serve)
    process = start(processes, FORKS, run)
    assert processes.ends(process) == 0, processes.said(process)
    assert "[0, 1]" in processes.said(process)
    until(lambda: sum("has left" in line for line in run.said) == 3, f"the end of all: {run.said}")
    assert len(run.server.finished) == 1


LOADS = """
from torch.utils.data import DataLoader, TensorDataset

if __name__ == "__main__":
    loader = DataLoader(TensorDataset(torch.ones(10_000, 3, 2, dtype=torch.float64)), 1, num_workers=2)
    for n, (x,) in enumerate(replica.shard(loader)):
        model(x).sum().backward()
        replica.step()
        time.sleep(0.01)
        if n == 10:
            print("evaluates", flush=True)
"""


def test_sigterm_for_a_whole_job(processes: Processes, serve: Serve) -> None:
    """The processes of the loader have it too, and do not fail the training loop before it has left."""
    run = serving(serve)
    process = start(processes, LOADS, run)
    (script,) = processes.living("script")
    os.killpg(script, signal.SIGTERM)
    assert processes.ends(process) == 0, processes.said(process)
    assert "leaves, as SIGTERM asks" in processes.said(process)
    assert "Traceback" not in processes.said(process)
    assert left(run) == 0


def test_a_failing_script_does_not_wait_for_its_loader(processes: Processes, serve: Serve) -> None:
    """The loader's processes end with it, though Python asks them by SIGTERM, which they bear for a while."""
    run = serving(serve)
    process = start(processes, LOADS + "            raise RuntimeError('boom')\n", run, OFFBEAT_GRACE="10000")
    assert processes.ends(process) == 1
    assert left(run) == 0
