"""What the package needs to start: no torch for a word of help, and nothing that only some systems have."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest
import torch

import offbeat as ob
from offbeat import cli
from offbeat.runtime.folder import require_posix
from offbeat.runtime.place import Place


def python(code: str) -> str:
    """What ``code`` prints, in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", [["--version"], ["--help"], []])
def test_a_word_of_help_imports_no_torch(words: list[str]) -> None:
    heavy = ("torch", "numpy", "matplotlib", "sklearn", "scipy")
    code = f"""
import sys
from offbeat.__main__ import main
sys.argv[1:] = {words}
try:
    main()
except SystemExit as end:
    print("status", end.code)
print([name for name in {heavy} if name in sys.modules])
"""
    lines = python(code).splitlines()
    assert lines[-1] == "[]"
    assert lines[-2] == f"status {0 if words else 2}"
    assert (f"offbeat {ob.__version__}" if words == ["--version"] else "  simulate  ") in "  ".join(lines)


def test_the_package_names_what_it_has() -> None:
    """A first use of any name, a star import, a module and a name that is not there, each in a fresh interpreter."""
    begin = "import sys, offbeat\nassert 'torch' not in sys.modules\n"
    python(
        begin
        + "assert offbeat.trace.Trace is offbeat.Trace\nfrom offbeat import *\nassert simulate is offbeat.simulate"
    )
    python(begin + "assert {'DanaZero', 'simulate', '__version__'} <= {*dir(offbeat)}")
    with pytest.raises(AttributeError, match="module 'offbeat' has no attribute 'nonsense'"):
        ob.nonsense  # noqa: B018


def test_the_overview_says_what_commands_say_of_themselves() -> None:
    for name, entry in cli.COMMANDS.items():
        assert inspect.getdoc(entry.load()) == entry.about, name


ELSEWHERE = """
import os, select, signal, sys
import multiprocessing.connection, multiprocessing.sharedctypes, torch, sklearn.datasets, tyro, rich.live  # which take care of themselves
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "posix", "readline"):
    sys.modules[name] = None
lacking = ("fork", "forkpty", "register_at_fork", "sched_getaffinity", "sched_yield", "getuid", "geteuid", "getpgid", "killpg", "setsid",
           "memfd_create", "posix_fallocate", "mkfifo")
for where, names in ((os, lacking), (signal, ("SIGKILL", "SIGHUP", "SIGCHLD", "SIGALRM", "pthread_sigmask", "setitimer")), (select, ("poll", "epoll"))):
    for name in {*names} & {*vars(where)}:
        delattr(where, name)
sys.platform = "win32"

import offbeat as ob
run = ob.simulate(ob.methods.DanaZero(lr=0.05), ob.tasks.Digits(), ob.Cluster(workers=4), gradients=40)
assert len(run.trace) == 40
ob.simulate(ob.LocalSGD(), ob.tasks.Quadratic(), ob.Cluster(workers=2), gradients=20)
from offbeat import cli
assert cli.main(["methods"]) == 0
assert cli.main(["simulate", "--task", "quadratic", "--gradients", "20", "--out", sys.argv[1]]) == 0
"""


def test_the_simulator_runs_on_a_system_without_posix(tmp_path: object) -> None:
    """As on Windows: what only POSIX systems have is taken away from the standard library first."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, f"{tmp_path}/run"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="there they are refused already")
def test_real_runs_are_refused_where_they_do_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    require_posix()
    with monkeypatch.context() as there:
        there.setattr(os, "name", "nt")
        for start in (require_posix, lambda: Place.read({}), lambda: ob.Replica(torch.nn.Linear(1, 1), ob.ASGD())):
            with pytest.raises(OSError, match="real runs need Linux or macOS, and this is 'nt'") as refused:
                start()
            assert "the simulator" in str(refused.value)
