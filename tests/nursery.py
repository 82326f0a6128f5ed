"""Processes that come up in milliseconds: a parent that has imported everything forks one for each request.

A process of its own would import torch for seconds, and a run that is killed twenty times starts many. The stub that this
program writes takes the place of the Python executable: it asks the parent for a child with its own arguments, environment
and open files, passes signals on, and ends as the child ends. Whoever kills the stub kills the child; and when the parent
dies, so do all. Every child writes its number and what it is into the file ``born`` first.

    python nursery.py FOLDER [MODULE ...]     # the modules are imported once, before the first fork
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import marshal
import os
import runpy
import selectors
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

STUB = """#!{python} -SE
import marshal, os, signal, socket, sys
def tell(number, frame):
    try:
        os.kill(child, number)
    except ProcessLookupError:
        pass  # it has just ended
parent = socket.socket(socket.AF_UNIX)
parent.connect({address!r})
request = marshal.dumps((sys.argv, dict(os.environ), os.getcwd()))
socket.send_fds(parent, [len(request).to_bytes(8, "little")], [0, 1, 2])
parent.sendall(request)
child = int.from_bytes(parent.recv(8, socket.MSG_WAITALL), "little")
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, tell)
said = parent.recv(8, socket.MSG_WAITALL)
code = int.from_bytes(said, "little", signed=True) if len(said) == 8 else -signal.SIGKILL
if code < 0:
    if -code in (signal.SIGTERM, signal.SIGINT):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def die_with_parent() -> None:
    """SIGKILL for this process when its parent dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


USUAL = ["offbeat.cli", "offbeat.runtime.gloo", "offbeat.runtime.replica", "torch.distributed.run"]
"""What is imported before the first fork. Importing starts no threads, which a child would lack."""


def main(folder: Path, modules: list[str]) -> list[str] | None:
    """Serve requests; returns, in each child, what it is to run, and at the end None."""
    die_with_parent()
    import torch

    torch.set_num_threads(1)
    for name in USUAL + modules:
        importlib.import_module(name)
    sys.modules["offbeat.report"] = None  # type: ignore[assignment]  # pages of pictures take seconds, and have tests
    address = str(folder / "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    stub = folder / "python"
    stub.write_text(STUB.format(python=sys.executable, address=address))
    stub.chmod(0o700)
    gc.freeze()  # what is here stays shared with the children
    print("ready", flush=True)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ, None)
    selector.register(sys.stdin, selectors.EVENT_READ, "end")
    children: dict[int, tuple[int, socket.socket]] = {}
    while True:
        for key, _ in selector.select():
            if key.data == "end":  # the tests are over
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                return None
            if key.data is None:
                stub_link, _ = listener.accept()
                request = take(stub_link)
                if request is None:
                    stub_link.close()
                    continue
                (argv, environment, place), files = request
                pid = os.fork()
                if pid == 0:
                    selector.close()
                    listener.close()
                    stub_link.close()
                    for _, other in children.values():
                        other.close()
                    return begin(folder, argv, environment, place, files)
                for file in files:
                    os.close(file)
                watch = os.pidfd_open(pid)
                children[pid] = watch, stub_link
                selector.register(watch, selectors.EVENT_READ, pid)
                selector.register(stub_link, selectors.EVENT_READ, -pid)
                with contextlib.suppress(OSError):
                    stub_link.sendall(pid.to_bytes(8, "little"))
            elif key.data < 0:  # the stub was killed
                selector.unregister(key.fileobj)
                if -key.data in children:
                    os.kill(-key.data, signal.SIGKILL)
            else:
                end(selector, children, key.data)


def take(link: socket.socket) -> tuple[Any, list[int]] | None:
    """A request and the open files that came with it."""
    head, files, _, _ = socket.recv_fds(link, 8, 3)
    size = int.from_bytes(head, "little")
    data = bytearray()
    while head and len(data) < size:
        part = link.recv(size - len(data))
        if not part:
            return None
        data += part
    return (marshal.loads(data), files) if head else None


def end(selector: selectors.BaseSelector, children: dict[int, tuple[int, socket.socket]], pid: int) -> None:
    """A child has ended: its stub ends alike."""
    watch, link = children.pop(pid)
    _, status = os.waitpid(pid, 0)
    selector.unregister(watch)
    os.close(watch)
    with contextlib.suppress(KeyError):
        selector.unregister(link)
    with contextlib.suppress(OSError):
        link.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "little", signed=True))
    link.close()


def begin(folder: Path, argv: list[str], environment: dict[str, str], place: str, files: list[int]) -> list[str]:
    """What a child does first."""
    os.setsid()
    die_with_parent()
    if host := environment.pop("OFFBEAT_NETNS", ""):  # a network namespace takes the place of another machine
        with open(f"/run/netns/{host}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
                raise OSError(ctypes.get_errno(), f"cannot enter {host}")
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(place)
    sys.executable = argv[0]
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))  # as Python does when it starts
    what = [word for word in argv[1:] if word not in ("-u", "-m", "offbeat")][:1]
    with open(folder / "born", "a") as file:
        who = " ".join(environment.get(name, "-") for name in ("OFFBEAT_WORKER", "LOCAL_RANK"))
        file.write(f"{os.getpid()} {Path(*what).stem} {who}\n")
    return argv[1:]


def run(words: list[str]) -> int:
    """Do what the words say; the exit status."""
    try:
        if words[:2] == ["-m", "offbeat"]:
            from offbeat.__main__ import main as command

            sys.argv = ["offbeat", *words[2:]]
            command()
        if words[:1] == ["-u"] or os.environ.get("PYTHONUNBUFFERED"):
            sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        words = words[words[:1] == ["-u"] :]
        if words[:1] == ["-m"]:
            sys.argv = words[1:]
            sys.modules.pop(words[1], None)  # it is run, not imported
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            return 0
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.last_value = error  # as the interpreter does
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    words = main(Path(sys.argv[1]), sys.argv[2:])
    if words:
        code = run(words)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(code)  # tearing torch down takes a second
