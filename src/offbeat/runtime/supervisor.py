"""What a launcher decides: what happens to its processes goes in, what is to be done comes out.

There is no process, clock or file in here: `launch` starts, signals and kills, and tells this machine what it sees. A run goes
through these phases:

    STARTING  servers are started; workers follow when all servers listen
    RUNNING   what dies is started again, up to a limit
    CLOSING   the first server has ended by itself: the run is over, and scripts may have more to do
    STOPPING  a signal has come, no worker or no server is left, or all workers have ended: workers leave, then servers stop
    KILLING   a second signal has come
"""

from __future__ import annotations

import builtins
import math
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

GRACE = 10.0
"""Seconds that a worker has to leave when it is asked to, before it is killed."""
ONCE = 1.0
"""Seconds within which several signals are one: a scheduler signals all processes of a job, and their launcher passes it on."""
WRITING = 120.0
"""Seconds that a server has to write its snapshot and its model when it is asked to end, before it is killed."""
LISTENING = 120.0
"""Seconds within which each server must listen at the start of a run."""
SOON = 30.0
"""A process that ends with an error within so many seconds of its start has failed at once."""
HEALTHY = 60.0
"""A process that has lived for so many seconds begins again with the shortest pause before a restart."""
PAUSE, LONGEST = 0.25, 10.0
"""Seconds before the first restart, which double with each further one, and the most."""
SETTLING = 2.0
"""Seconds that a server has to see by itself that its run is over, once all workers have ended."""
FRESH = 10.0
"""Seconds for which the server's word is awaited whether a worker that has died had left the run before."""
SHOWN = 8
"""Lines that a process has said last which are shown in the terminal."""
TRIES, PROGRAM_TRIES = 3, 2
"""How often a process may fail at once in the same way, and how often with an error of the program itself."""
PROGRAM = (
    TypeError,
    ValueError,
    NameError,
    ImportError,
    SyntaxError,
    AttributeError,
    LookupError,
    AssertionError,
    NotImplementedError,
)
"""Exceptions that the same program raises again when it is started again."""


@dataclass(frozen=True)
class Exited:
    """A process has ended with ``code`` (negative: by that signal); ``lines`` are the last that it has said."""

    name: str
    code: int
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listening:
    """A server takes workers; or the run that it has resumed is ``over`` already, and it ends."""

    name: str
    over: bool = False


@dataclass(frozen=True)
class Status:
    """What the first server knows at time ``made`` of workers that have joined it: the last life, the gradients in all lives, and
    whether the loop has ended; and what it still does where the run is over."""

    made: float
    lives: Mapping[int, int] = field(default_factory=dict)
    steps: Mapping[int, int] = field(default_factory=dict)
    finished: frozenset[int] = frozenset()
    ending: str = ""


@dataclass(frozen=True)
class Signalled:
    """The launcher has got a signal that asks it to end."""

    number: int


@dataclass(frozen=True)
class Start:
    """Start the process."""

    name: str


@dataclass(frozen=True)
class Tell:
    """Send the process SIGTERM."""

    name: str


@dataclass(frozen=True)
class Kill:
    """Kill the process and all that it has started."""

    name: str


@dataclass(frozen=True)
class Say:
    """Tell the user."""

    text: str


Event = Exited | Listening | Status | Signalled
Effect = Start | Tell | Kill | Say


class Phase(Enum):
    """Where a run is."""

    STARTING = auto()
    RUNNING = auto()
    CLOSING = auto()
    STOPPING = auto()
    KILLING = auto()


class State(Enum):
    """Where a process is."""

    IDLE = auto()  # not yet started
    RUNNING = auto()
    DEAD = auto()  # it is not yet decided what follows
    WAITING = auto()  # to be started again
    ENDED = auto()  # for good


class Ending(Enum):
    """How a run ends: by itself, because it could not go on, or by a signal."""

    OVER = auto()
    FAILED = auto()
    STOPPED = auto()


@dataclass
class Child:
    """One of the run's processes, through all its restarts."""

    name: str
    number: int
    serves: bool
    log: str
    state: State = State.IDLE
    code: int = -1  # with which it has ended last
    lines: tuple[str, ...] = ()  # which it has said last
    told: bool = False  # to end
    killed: bool = False  # by us
    listening: bool = False  # of a server
    born: float = 0.0
    died: float = 0.0
    due: float = 0.0  # when it is started again
    grace: float = 0.0  # seconds that it has to end when told
    limit: float = math.inf  # when they are over
    life: int = 0  # of a worker, the last before its process was started
    steps: int = 0  # gradients until then
    joined: bool = False  # whether its process has joined the run
    stepped: bool = False  # whether its process has brought a gradient
    pause: float = 0.0  # before the last restart
    level: float = 0.0  # of the bucket: restarts, of which so many leak in an hour as it holds
    filled: float = 0.0  # when
    failure: str = ""  # the last one at once
    failures: int = 0  # how often in a row

    @property
    def how(self) -> str:
        """How it has ended last."""
        return f"was killed by {_signal(-self.code)}" if self.code < 0 else f"ended with status {self.code}"

    @property
    def last(self) -> str:
        """What it has said last, to be shown below a line of ours."""
        return (
            "".join(f"\n    {line}" for line in self.lines[-SHOWN:]) or f" (it has said nothing; its log is {self.log})"
        )


class Supervisor:
    """Decides for ``servers`` and ``workers`` processes; each may be started again ``restarts`` times an hour."""

    def __init__(self, servers: int, workers: int, restarts: int, logs: str = "logs") -> None:
        def member(kind: str, number: int) -> Child:
            return Child(f"{kind} {number}", number, kind == "server", f"{logs}/{kind}-{number}.log")

        self.servers = [member("server", k) for k in range(servers)]
        self.workers = [member("worker", i) for i in range(workers)]
        self.members = {m.name: m for m in (*self.servers, *self.workers)}
        self.restarts = restarts
        self.phase = Phase.STARTING
        self.ending = Ending.OVER
        self.why = ""
        """Why the run has failed."""
        self.failed: list[str] = []
        """Workers whose last process has ended with an error."""
        self.ended = False
        """Whether no process is left, nor will be."""
        self._status = Status(-math.inf)
        self._signals = 0
        self._began = 0.0
        self._idle: float | None = None  # since when all workers have ended
        self._said = False  # that scripts still go on
        self._effects: list[Effect] = []

    @property
    def whole(self) -> bool:
        """Whether all servers have ended in good order: they have written their last snapshot, and the model."""
        return all(m.code == 0 for m in self.servers)

    def begin(self, now: float) -> list[Effect]:
        """The run begins."""
        self._began = now
        for m in self.servers:
            self._start(m, now)
        return self._done()

    def handle(self, event: Event | None, now: float) -> list[Effect]:
        """``event`` has happened, or with None only time has passed."""
        if isinstance(event, Exited):
            self._exited(event, now)
        elif isinstance(event, Listening):
            self._listens(event, now)
        elif isinstance(event, Status):
            self._heard(event)
        elif isinstance(event, Signalled):
            self._signalled(event.number, now)
        self._advance(now)
        return self._done()

    # events

    def _exited(self, event: Exited, now: float) -> None:
        m = self.members[event.name]
        m.code, m.lines, m.died, m.limit = event.code, event.lines, now, math.inf
        m.listening, first, m.state = False, not m.listening, State.ENDED
        if m.told or m.killed:
            if not m.killed and (m.code > 0 or (m.serves and m.code)):
                self._say(f"{m.name} {m.how} when it was asked to end:{m.last}")
        elif not m.serves:
            m.state = State.DEAD if m.code else State.ENDED
        elif m.code:
            if self.phase is Phase.STARTING and first:
                self._stop(now, Ending.FAILED, f"{m.name} did not start:{m.last}")
            elif self.phase is Phase.STOPPING:
                self._say(f"{m.name} {m.how} and is not started again, as the run ends:{m.last}")
            else:
                m.state = State.DEAD
        elif m is self.servers[0] and self.phase is not Phase.STOPPING:
            self.phase = Phase.CLOSING

    def _listens(self, event: Listening, now: float) -> None:
        self.members[event.name].listening = True
        if self.phase is not Phase.STARTING:
            return
        if event.over:
            self.phase = Phase.CLOSING
        elif all(m.listening for m in self.servers):
            self.phase = Phase.RUNNING
            for m in self.workers:
                self._start(m, now)

    def _heard(self, status: Status) -> None:
        self._status = status
        for m in self.workers:
            m.joined = m.joined or status.lives.get(m.number, 0) > m.life
            steps = status.steps.get(m.number, 0)
            m.stepped = m.stepped or (m.joined and steps > m.steps)
            m.steps = min(m.steps, steps) if m.joined else steps

    def _signalled(self, number: int, now: float) -> None:
        self._signals += 1
        if self._signals == 1:
            what = f"workers have {GRACE:g} s to finish their steps and leave, then a snapshot is written"
            self._say(f"{_signal(number)}: {what}; a second signal kills everything at once")
            self._stop(now, Ending.STOPPED)
            return
        if self.phase is not Phase.KILLING:
            self._say(f"{_signal(number)} once more: everything is killed")
        self.phase, self.ending = Phase.KILLING, Ending.STOPPED
        for m in self.members.values():
            if m.state is State.RUNNING:
                self._kill(m, now)
            else:
                m.state = State.ENDED

    # what follows

    def _advance(self, now: float) -> None:
        for m in self.members.values():
            if m.state is State.DEAD:
                self._judge(m, now)
            if m.state is State.WAITING and now >= m.due:
                self._start(m, now)
            if m.state is State.RUNNING and now >= m.limit:
                self._late(m, now)
        if self.phase is Phase.STARTING:
            self._starting(now)
        elif self.phase is Phase.RUNNING:
            self._running(now)
        elif self.phase is Phase.CLOSING:
            self._closing(now)
        elif self.phase is Phase.STOPPING:
            self._stopping(now)
        self.ended = all(m.state is State.ENDED for m in self.members.values())

    def _starting(self, now: float) -> None:
        late = [m.name for m in self.servers if not m.listening]
        if now - self._began > LISTENING:
            self._stop(
                now, Ending.FAILED, f"{late[0]} does not listen after {LISTENING:g} s: see {self.members[late[0]].log}"
            )

    def _running(self, now: float) -> None:
        if any(m.state is not State.ENDED for m in self.workers):
            self._idle = None
            return
        well = [m.name for m in self.workers if m.code == 0 or m.number in self._status.finished]
        if not well:
            self._stop(now, Ending.FAILED, "no worker is left")
        elif self._status.ending or not all(m.listening for m in self.servers):
            self._idle = None  # it writes the model; or is being started again, and goes on from its snapshot first
        elif self._idle is None:
            self._idle = now
        elif now - self._idle >= SETTLING:
            few = "" if len(well) == len(self.workers) else f" ({', '.join(well)} with status 0)"
            self._say(f"all workers have ended{few}, not all by the end of their loops: the run is over")
            self._stop(now, Ending.OVER)

    def _closing(self, now: float) -> None:
        for m in self.servers:  # the first one hands the minibatches out: when it is done, so are the others
            if self.servers[0].state is State.ENDED:
                self._ask(m, now, WRITING)
        for m in self.workers:
            if m.state in (State.IDLE, State.WAITING):
                m.state = State.ENDED
            elif not m.joined and self.servers[0].state is State.ENDED:
                self._ask(m, now, GRACE)  # it would dial a server that is gone
        if not self._said and now > self.servers[0].died + GRACE and self.servers[0].state is State.ENDED:
            self._said = True
            late = [m.name for m in self.workers if m.state is State.RUNNING]
            if late:
                self._say(f"the run is over, and scripts still go on ({', '.join(late)}): waiting for them")

    def _stopping(self, now: float) -> None:
        if all(m.state is State.ENDED for m in self.workers):
            for m in self.servers:
                self._ask(m, now, WRITING)

    def _stop(self, now: float, ending: Ending, why: str = "") -> None:
        """Workers are to leave; servers follow."""
        if self.phase is Phase.KILLING:
            return
        self.phase, self.ending, self.why = Phase.STOPPING, ending, why
        for m in self.members.values():
            if m.state is State.DEAD:
                self._say(f"{m.name} {m.how}, and is not started again:{m.last}")
            if m.state is not State.RUNNING:
                m.state = State.ENDED
        for m in self.workers:
            self._ask(m, now, GRACE)

    def _judge(self, m: Child, now: float) -> None:
        """A process has died by itself: is it started again?"""
        worker, over = not m.serves, self.phase is Phase.CLOSING
        if worker and not over and self._status.made <= m.died and now < m.died + FRESH:
            return  # the server says in a moment who had left
        if worker and m.number in self._status.finished:
            self._fails(m, f"{m.name} {m.how} after it had left the run: it is not started again:{m.last}")
        elif over:
            self._fails(m, f"{m.name} {m.how} when the run was over:{m.last}")
        elif why := self._hopeless(m):
            self._give_up(m, now, why)
        else:
            m.pause = PAUSE if m.died - m.born >= HEALTHY or not m.pause else min(2 * m.pause, LONGEST)
            m.due, m.state = m.died + m.pause, State.WAITING
            self._say(f"{m.name} {m.how}: starting it again in {m.pause:g} s (see {m.log})")

    def _hopeless(self, m: Child) -> str:
        """Why a process that has died is not started again; nothing where it is, which is counted."""
        error = _error(m.lines)
        program = _of_the_program(error)
        if m.code > 0 and not m.stepped and (program or m.died - m.born < SOON):
            same = re.sub(r"0x[0-9a-f]+|\d+", "#", error)
            m.failures, m.failure = (m.failures + 1 if same == m.failure else 1), same
        else:
            m.failures = 0
        if m.failures >= (PROGRAM_TRIES if program else TRIES):
            return f"{m.failures} times in the same way before its first step"
        m.level = max(0.0, m.level - (m.died - m.filled) * self.restarts / 3600) + 1
        m.filled = m.died
        return (
            f"once more; {self.restarts} restarts an hour are allowed (--restarts)" if m.level > self.restarts else ""
        )

    def _give_up(self, m: Child, now: float, why: str) -> None:
        if m.serves:
            self._stop(now, Ending.FAILED, f"{m.name} {m.how} {why}:{m.last}")
            return
        others = sum(o.state is not State.ENDED for o in self.workers if o is not m)
        rest = (
            f"the run goes on with {others} other worker{'s' * (others != 1)}" if others else "no other worker is left"
        )
        self._fails(m, f"{m.name} {m.how} {why}: it is given up, and {rest}:{m.last}")

    def _fails(self, m: Child, text: str) -> None:
        m.state = State.ENDED
        if m.code > 0:
            self.failed.append(m.name)
        self._say(text)

    def _late(self, m: Child, now: float) -> None:
        """A process that was asked to end, or killed, is still there."""
        if not m.killed:
            self._say(f"{m.name} has not ended {m.grace:g} s after it was asked to: it is killed")
            self._kill(m, now)
        else:
            self._say(f"{m.name} cannot be killed: it is left behind")
            m.state = State.ENDED

    # effects

    def _start(self, m: Child, now: float) -> None:
        m.state, m.born, m.joined, m.stepped = State.RUNNING, now, False, False
        m.life, m.steps = self._status.lives.get(m.number, 0), self._status.steps.get(m.number, 0)
        self._effects.append(Start(m.name))

    def _ask(self, m: Child, now: float, grace: float) -> None:
        """Ask a process to end, once."""
        if m.state is State.RUNNING and not m.told:
            m.told, m.grace, m.limit = True, grace, now + grace
            self._effects.append(Tell(m.name))

    def _kill(self, m: Child, now: float) -> None:
        m.killed, m.limit = True, now + GRACE
        self._effects.append(Kill(m.name))

    def _say(self, text: str) -> None:
        self._effects.append(Say(text))

    def _done(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _error(lines: Sequence[str]) -> str:
    """The line of an exception at the end of a traceback, or else the last line."""
    start = max((i for i, line in enumerate(lines) if line.startswith("Traceback (")), default=-1)
    below = [line for line in lines[start + 1 :] if line.strip() and not line[0].isspace()]
    return (below[0] if start >= 0 else below[-1]) if below else ""


def _of_the_program(error: str) -> bool:
    kind = getattr(builtins, error.partition(":")[0].strip(), None)
    return isinstance(kind, type) and issubclass(kind, PROGRAM)
