"""How a worker leaves its run: its script has ended, has failed, was told to end by SIGTERM, or has dropped its replica.

A `Member` is registered with its process from before it joins until it has left. It leaves in good order in each of these cases:

- *Exit.* Python runs ``atexit`` functions in the main process and `multiprocessing.util.Finalize` ones in children that
  ``multiprocessing`` has made, so it is registered with both. A child that was forked later only has a copy of it, which does
  nothing.
- *SIGTERM.* The next step leaves. Where none comes within half of the grace period (``OFFBEAT_GRACE``, in seconds), a thread
  does so in its place, and then the signal does what it does to any program. A second SIGTERM ends the process at once.
- *Nobody refers to its owner any more.* It leaves in a thread: garbage may be collected anywhere, and leaving can take a while.
"""

from __future__ import annotations

import _thread
import atexit
import builtins
import contextlib
import functools
import logging
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawValue
from multiprocessing.util import Finalize
from types import FrameType
from typing import TYPE_CHECKING, Any

from .patience import Patient
from .supervisor import GRACE, ONCE

if TYPE_CHECKING:
    from .worker import Driver


@dataclass(frozen=True)
class ScriptEnd:
    """What is known of a script that ends without having left its run."""

    steps: int
    """Steps that it has taken."""
    unfinished: bool | None
    """Whether its last pass over a loader was broken off; None: it has begun none."""
    status: Any = None
    """What ``sys.exit`` was given since the last step: a number, a text, or nothing."""
    error: BaseException | None = None
    """What was raised since the last step, and caught by nobody."""
    told: bool = False
    """Whether SIGTERM has come."""

    @property
    def undone(self) -> str:
        """Why its work does not count as done; empty where it does."""
        if self.error is not None:
            return f"it ended with {type(self.error).__name__}"
        if self.status not in (None, 0):
            return f"it ended with status {self.status!r}"
        if self.unfinished:
            return "its last pass was broken off (call replica.leave() where that is meant to be the end)"
        if self.unfinished is None and not self.steps:
            return "it has taken no step"
        if self.unfinished is None and self.told:
            return "SIGTERM has come"
        return ""


class WorkerThread(threading.Thread):
    """A thread of a worker's life, which ends soon after that is ``over``: then `settle` waits for it."""

    def __init__(self, over: threading.Event, run: Callable[..., None], *args: Any) -> None:
        super().__init__(target=run, args=args, daemon=True)
        self.over = over


class Member:
    """One worker of a run, for the process that it is in."""

    def __init__(self, log: logging.Logger) -> None:
        """From now on SIGTERM is answered, where it would have ended the process and this is the main thread."""
        self.log = log
        self.driver: Driver | None = None
        self.steps = 0
        self.unfinished: bool | None = None
        """Whether the script is in the middle of a pass, or has broken off its last one; None: it has begun none."""
        self.forked = False
        self.over: Any = None  # a byte that a loader's processes share with this one: whether it has left
        self._owner: weakref.ref[Any] | None = None
        self._seen = _last_error()
        self._finalizer: Finalize | None = None
        _here.add(self)

    def joined(self, driver: Driver, owner: Any = None) -> None:
        """It has joined, and leaves at exit, or when ``owner`` is no longer referred to."""
        self.driver = driver
        if owner is not None:
            self._owner = weakref.ref(owner, self._drop)
        atexit.register(self._exit)
        self._finalizer = Finalize(None, self._exit, exitpriority=10)

    def patient(self, init: Callable[[int], None] | None) -> Patient:
        """What lets processes of a loader with this ``worker_init_fn`` outlive SIGTERM until this member has left."""
        if self.over is None:
            self.over = RawValue("b", 0)
        return Patient(init, self.over, _grace())

    def told(self) -> bool:
        """Whether SIGTERM has come."""
        return _here.told is not None

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A use of the driver, which does not leave meanwhile. Where it has left, ``RuntimeError``, or SystemExit after SIGTERM."""
        assert self.driver is not None
        with self.driver.using:
            self.check()
            yield

    def check(self) -> None:
        """Raise, unless this process is the worker and has not left: see `turn`."""
        assert self.driver is not None
        if self.forked:
            raise RuntimeError(
                "this process was forked after its replica was made, which belongs to the parent: make a replica in each process"
            )
        if self.driver.left:
            if self.told():
                raise SystemExit(0)
            raise RuntimeError("this replica has left its run: make a new one to go on")

    def stepped(self) -> None:
        """A step was taken: what went wrong before it has not ended the script."""
        self.steps += 1
        self._seen, _here.status = _last_error(), None

    def leave(self, done: bool) -> None:
        """Leave, once; ``done`` says that the worker has nothing more to do."""
        try:
            if self.driver is not None:
                self.driver.leave(done)
        finally:
            self.forget()

    def end(self, error: BaseException | None = None) -> None:
        """Leave, as the script has ended, with ``error`` or without: done where its loops have ended."""
        if self.driver is None or self.forked:
            return
        with self.driver.using:
            if not self.driver.left:
                undone = self._ending(error).undone
                if undone:
                    self.log.warning(f"worker {self.driver.terms.worker} leaves, and is not done: {undone}")
                self.leave(done=not undone)

    def forget(self) -> None:
        """The process has nothing more to do with it."""
        if self.over is not None:
            self.over.value = 1
        atexit.unregister(self._exit)
        self._owner = None
        if self._finalizer is not None:
            self._finalizer.cancel()
        _here.remove(self)

    def _ending(self, error: BaseException | None) -> ScriptEnd:
        last, status = _last_error(), _here.status
        if error is None and last is not self._seen:
            error = last
        if isinstance(error, SystemExit):
            status, error = error.code, None
        return ScriptEnd(self.steps, self.unfinished, status, error, self.told())

    def _exit(self) -> None:
        self.end(sys.exc_info()[1])  # which a child of multiprocessing ends with

    def _drop(self, owner: object) -> None:
        if self.driver is not None and not self.driver.left and not self.forked:
            key = object()
            _here.dropped[key] = self
            _thread.start_new_thread(_here.drop, (key,))  # which takes no lock: garbage may be collected under any


class _Process:
    """The members of this process, and what has come to it: a status to exit with, or SIGTERM."""

    def __init__(self) -> None:
        self.exits = _Exits()
        self.begin()

    def begin(self) -> None:
        self.members: list[Member] = []
        self.status: Any = None
        self.told: float | None = None  # when SIGTERM came
        self.ending = False
        self.dropped: dict[object, Member | None] = {}  # whose owners are gone; None where a thread has taken it

    def add(self, member: Member) -> None:
        self.status = None
        self.members.append(member)
        self.exits.record()
        if _main() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            self.told = None
            signal.signal(signal.SIGTERM, _terminate)

    def remove(self, member: Member) -> None:
        if member in self.members:
            self.members.remove(member)
        if not self.members:
            self.exits.forget()
            if _main() and signal.getsignal(signal.SIGTERM) is _terminate:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def forked(self) -> None:
        """This process is a child of the one with the members."""
        for member in self.members:
            member.forked = True
        with contextlib.suppress(ValueError):  # another thread's child has another main thread, in an old Python
            if signal.getsignal(signal.SIGTERM) is _terminate:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.begin()

    def drop(self, key: object) -> None:
        """Let a member leave whose owner is gone; in a thread, for which `settle` waits."""
        member, self.dropped[key] = self.dropped[key], None
        assert member is not None
        try:
            member._exit()
        finally:
            del member
            del self.dropped[key]

    def settle(self) -> None:
        """The last function at exit: a thread that frees a tensor while Python is taken down would abort the process."""
        until = time.monotonic() + _grace()
        _wait(lambda: not self.dropped, until)
        for thread in threading.enumerate():
            if isinstance(thread, WorkerThread) and thread.over.is_set():  # else it goes on, and waits for something
                thread.join(max(0.0, until - time.monotonic()))

    def insist(self) -> None:
        """Half of the grace period after SIGTERM: let those leave who did not come to a step, and end."""
        assert self.told is not None
        grace = _grace()
        _wait(lambda: not self.members, self.told + grace / 2)
        if not self.members:
            return  # and the script ends by itself
        for member in list(self.members):
            _thread.start_new_thread(self._leave, (member, grace / 2))
        _wait(lambda: not self.members, self.told + 0.9 * grace)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        self.ending = True
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)  # the main thread is inside of other code, and answers no signal

    @staticmethod
    def _leave(member: Member, seconds: float) -> None:
        who = "a worker" if member.driver is None else f"worker {member.driver.terms.worker}"
        member.log.warning(f"{who} leaves, as SIGTERM asks: no step that could do so has come within {seconds:g} s")
        member.leave(done=False)


def _grace() -> float:
    return float(os.environ.get("OFFBEAT_GRACE") or GRACE)


def failed() -> bool:
    """Whether this process ends with an error, as far as can be seen."""
    return _here.status not in (None, 0) or _last_error() is not None


def _terminate(number: int, frame: FrameType | None) -> None:
    """Answer SIGTERM. It may have interrupted anything, so it takes no lock, prints nothing, and starts its thread by the function
    that takes none."""
    now = time.monotonic()
    if _here.members and not _here.ending:
        if _here.told is None:
            _here.told = now
            _thread.start_new_thread(_here.insist, ())
            return
        if now - _here.told < ONCE:
            return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


class _Exits:
    """What the script last asked to exit with: Python tells nobody, so its own functions are made to."""

    def __init__(self) -> None:
        quitter = type(getattr(builtins, "exit", None))  # of exit() and quit()
        self.places: list[tuple[Any, str]] = [(sys, "exit")]
        if quitter.__module__ == "_sitebuiltins":
            self.places.append((quitter, "__call__"))
        self.made: dict[tuple[Any, str], tuple[Any, Any]] = {}  # the function before, and ours

    def record(self) -> None:
        for place, name in self.places:
            if (place, name) not in self.made:
                real = getattr(place, name)
                self.made[place, name] = real, self._recorded(real, place is not sys)
                setattr(place, name, self.made[place, name][1])

    def forget(self) -> None:
        for (place, name), (real, ours) in list(self.made.items()):
            if getattr(place, name) is ours:  # else somebody relies on it
                setattr(place, name, real)
                del self.made[place, name]

    @staticmethod
    def _recorded(real: Any, method: bool) -> Any:
        @functools.wraps(real)
        def exit(*args: Any, **named: Any) -> Any:
            if _main():
                _here.status = next(iter([*args[method:], *named.values()]), None)
            return real(*args, **named)

        return exit


def _last_error() -> BaseException | None:
    """The last exception that nobody has caught: of the script, or of a line in an interactive session."""
    return getattr(sys, "last_value", None)


def _main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _wait(true: Callable[[], bool], until: float) -> None:
    while not true() and time.monotonic() < until:
        time.sleep(0.02)


_here = _Process()
atexit.register(_here.settle)
if hasattr(os, "register_at_fork"):  # where processes fork
    os.register_at_fork(after_in_child=_here.forked)
