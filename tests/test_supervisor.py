"""What a launcher decides, event by event, on a clock of the test's own: no process is started."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offbeat.runtime.supervisor import (
    GRACE,
    HEALTHY,
    LISTENING,
    PAUSE,
    SETTLING,
    WRITING,
    Effect,
    Ending,
    Event,
    Exited,
    Kill,
    Listening,
    Phase,
    Say,
    Signalled,
    Start,
    Status,
    Supervisor,
    Tell,
)

KILLED = -signal.SIGKILL
TYPO = ("Traceback (most recent call last):", '  File "train.py", line 3, in <module>', "TypeError: no such thing")
DISK = (
    "Traceback (most recent call last):",
    '  File "train.py", line 9, in <module>',
    "RuntimeError: disk 7 at 0x7f3a",
)


@dataclass
class World:
    """A run whose processes do what a test says; time passes in steps that a launcher's loop would take."""

    servers: int = 1
    workers: int = 2
    restarts: int = 10
    now: float = 1000.0
    running: set[str] = field(default_factory=set)
    did: list[Effect] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = Supervisor(self.servers, self.workers, self.restarts)
        self.lives = dict.fromkeys(range(self.workers), 0)
        self.steps = dict.fromkeys(range(self.workers), 0)
        self.finished: set[int] = set()
        self._do(self.machine.begin(self.now))

    @classmethod
    def begun(cls, **fields: int) -> World:
        """A run whose workers have all joined."""
        world = cls(**fields)
        for k in range(world.servers):
            world(Listening(f"server {k}"))
        for i in range(world.workers):
            world.join(i)
        return world

    def __call__(self, event: Event | None = None, after: float = 0.0) -> None:
        self.now += after
        self._do(self.machine.handle(event, self.now))

    def exits(self, name: str, code: int = 0, lines: tuple[str, ...] = (), after: float = 0.0) -> None:
        """A process ends, and the server's next word comes."""
        self.running.discard(name)
        self(Exited(name, code, lines), after)
        if "server 0" in self.running:
            self.status()

    def status(self) -> None:
        self.now += 0.001
        self(Status(self.now, dict(self.lives), dict(self.steps), frozenset(self.finished)))

    def join(self, i: int, steps: int = 0) -> None:
        """A worker joins, and brings so many gradients."""
        self.lives[i] += 1
        self.status()
        self.steps[i] += steps
        self.status()

    def passes(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end and not self.machine.ended:
            self(after=min(0.25, end - self.now))

    def obey(self) -> None:
        """Workers and servers end at once when they are told to."""
        for effect in list(self.did):
            if isinstance(effect, Tell) and effect.name in self.running:
                self.exits(effect.name)

    def said(self) -> str:
        return "\n".join(effect.text for effect in self.did if isinstance(effect, Say))

    def starts(self, name: str) -> int:
        return self.did.count(Start(name))

    def _do(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Start):
                assert effect.name not in self.running, f"{effect.name} is started twice"
                self.running.add(effect.name)
            elif isinstance(effect, Tell | Kill):
                assert effect.name in self.running, f"{effect} is not there"
        self.did.extend(effects)


def end(world: World, ending: Ending, seconds: float = 60.0) -> None:
    """The launcher asks all that are left to end, and they do; the run has that ending."""
    stop = world.now + seconds
    while world.now < stop and not world.machine.ended:
        world.obey()
        world(after=0.25)
    assert world.machine.ended
    assert world.running == set()
    assert world.machine.ending is ending, world.said()


# restarts


def test_workers_follow_when_all_servers_listen() -> None:
    world = World(servers=2)
    assert world.running == {"server 0", "server 1"}
    world(Listening("server 1"), after=5)
    assert world.running == {"server 0", "server 1"}
    world(Listening("server 0"), after=5)
    assert world.running == {"server 0", "server 1", "worker 0", "worker 1"}


def test_restarts_are_counted_by_the_hour() -> None:
    """Fifty crashes in two days are no reason to give up; the eleventh in a few minutes is, and of one worker only."""
    world = World.begun()
    for _ in range(50):
        world.exits("worker 1", KILLED, after=3600)
        world.passes(20)
        world.join(1, steps=5)
    assert world.starts("worker 1") == 51
    world.passes(3600)
    for _ in range(11):
        world.exits("worker 1", KILLED, after=5)
        world.passes(20)
    assert world.starts("worker 1") == 61
    assert world.running == {"server 0", "worker 0"}
    assert (
        "10 restarts an hour are allowed (--restarts): it is given up, and the run goes on with 1 other" in world.said()
    )
    world.exits("worker 0", after=4000)
    end(world, Ending.OVER)
    assert world.machine.failed == []  # its machine has failed, no script


def test_restarts_leak_evenly() -> None:
    """Two an hour: after half an hour there is one to be had again, and not two."""
    world = World.begun(restarts=2)
    for _ in range(2):
        world.exits("worker 1", KILLED, after=1)
        world.passes(20)
    world.exits("worker 1", KILLED, after=1801)
    world.passes(20)
    assert world.starts("worker 1") == 4
    world.exits("worker 1", KILLED, after=600)
    world.passes(20)
    assert world.starts("worker 1") == 4


def test_pauses_double_and_begin_again_after_healthy_time() -> None:
    world = World.begun(restarts=100)

    def pause() -> float:
        world.exits("worker 1", KILLED)
        began = world.now
        while "worker 1" not in world.running:
            world(after=0.125)
        return world.now - began

    assert [pause() for _ in range(8)] == [0.25, 0.5, 1, 2, 4, 8, 10, 10]
    world.passes(HEALTHY)
    assert pause() == PAUSE


def test_no_restarts_at_all() -> None:
    world = World.begun(restarts=0)
    world.exits("worker 0", KILLED)
    assert "0 restarts an hour are allowed" in world.said()
    world.exits("worker 1")
    end(world, Ending.OVER)
    assert world.starts("worker 0") == 1


def test_a_program_error_before_the_first_step_is_tried_twice_however_late() -> None:
    """And the terminal has the end of the traceback, not only a path."""
    world = World.begun()
    world.join(0, steps=1)
    for _ in range(2):
        world.exits("worker 1", 1, TYPO, after=900)
        world.passes(1)
        world.join(1)
    assert world.starts("worker 1") == 2
    assert "ended with status 1 2 times in the same way before its first step: it is given up" in world.said()
    assert "TypeError: no such thing" in world.said()
    world.exits("worker 0")
    end(world, Ending.OVER)
    assert world.machine.failed == ["worker 1"]


def test_a_program_error_after_a_step_is_a_crash_like_another() -> None:
    world = World.begun()
    for _ in range(4):
        world.join(1, steps=1)
        world.exits("worker 1", 1, TYPO, after=900)
        world.passes(11)
    assert world.starts("worker 1") == 5


def test_another_error_at_once_is_tried_three_times() -> None:
    """The same but for numbers and addresses; one that comes later may be the machine's."""
    world = World.begun()
    for n in range(3):
        world.exits("worker 1", 1, (*DISK[:-1], f"RuntimeError: disk {n} at 0x7f3{n}"), after=5)
        world.passes(2)
    assert world.starts("worker 1") == 3
    later = World.begun()
    for _ in range(4):
        later.exits("worker 1", 1, DISK, after=400)
        later.passes(11)
    assert later.starts("worker 1") == 5


def test_failures_of_another_kind_each_are_not_the_same_one() -> None:
    world = World.begun()
    for name in ("Runtime", "OS", "Memory", "Runtime"):
        world.exits("worker 1", 1, (f"{name}Error: no",), after=1)
        world.passes(11)
    assert world.starts("worker 1") == 5


def test_a_run_without_workers_left_ends_with_its_model() -> None:
    """The server is asked to end, not killed: what there is is kept."""
    world = World.begun()
    for i in (0, 1):
        for _ in range(2):
            world.exits(f"worker {i}", 1, TYPO, after=1)
            world.passes(1)
    assert world.did[-1] == Tell("server 0")
    end(world, Ending.FAILED)
    assert world.machine.why == "no worker is left"
    assert world.machine.whole
    assert world.machine.failed == ["worker 0", "worker 1"]
    assert Kill("server 0") not in world.did


# the end by itself


def test_a_run_that_is_over_waits_for_scripts_that_go_on() -> None:
    world = World.begun()
    world.finished = {0, 1}
    world.status()
    world.exits("worker 0")
    world.exits("server 0")
    world.passes(500)
    assert "scripts still go on (worker 1): waiting for them" in world.said()
    assert Tell("worker 1") not in world.did
    world.exits("worker 1")
    end(world, Ending.OVER)


def test_a_worker_that_comes_when_the_run_is_over_is_told_to_end() -> None:
    """It was being started again; the server that it would dial is gone."""
    world = World.begun()
    world.exits("worker 1", KILLED)
    world.passes(1)
    world.exits("server 0")
    assert world.did[-1] == Tell("worker 1")
    world.exits("worker 1", -signal.SIGTERM)
    world.exits("worker 0")
    end(world, Ending.OVER)
    assert world.machine.failed == []


def test_who_fails_after_it_has_left_is_not_started_again() -> None:
    """The run and its model are whole; what the script had to do besides is not."""
    world = World.begun(workers=1)
    world.finished = {0}
    world.running.discard("worker 0")
    world(Exited("worker 0", 1, DISK))
    assert world.starts("worker 0") == 1
    world.status()  # the server says so a moment later
    world.exits("server 0")
    end(world, Ending.OVER)
    assert world.starts("worker 0") == 1
    assert "worker 0 ended with status 1 after it had left the run: it is not started again" in world.said()
    assert "RuntimeError: disk 7" in world.said()
    assert world.machine.failed == ["worker 0"]
    assert world.machine.whole


def test_who_fails_as_the_server_ends_is_not_started_again() -> None:
    """The last status may be older than the worker's end."""
    world = World.begun(workers=1)
    world.running.discard("worker 0")
    world(Exited("worker 0", 1, DISK))
    world.exits("server 0", after=0.1)
    end(world, Ending.OVER)
    assert world.machine.failed == ["worker 0"]
    assert world.starts("worker 0") == 1


def test_a_crash_is_mended_although_the_server_says_nothing() -> None:
    world = World.begun()
    world.running.discard("worker 1")
    world(Exited("worker 1", KILLED))
    world.passes(15)
    assert "worker 1" in world.running


def test_a_server_that_writes_the_model_is_waited_for() -> None:
    """However long it tries to, as on a full disk: it ends by itself, and its status is how the run has ended."""
    world = World.begun()
    world.finished = {0, 1}
    world.exits("worker 0")
    world.exits("worker 1")
    world(Status(world.now, dict(world.lives), dict(world.steps), frozenset(world.finished), "the model is written"))
    world.passes(100)
    assert Tell("server 0") not in world.did
    world.exits("server 0")
    end(world, Ending.OVER)
    assert "all workers have ended" not in world.said()


def test_all_workers_have_ended_well_though_the_run_does_not_count_as_over() -> None:
    """Their loops ended by a break: the launcher ends the server, and the run is over."""
    world = World.begun()
    world.exits("worker 0")
    world.exits("worker 1")
    assert Tell("server 0") not in world.did
    world.passes(SETTLING + 1)
    assert world.did[-1] == Tell("server 0")
    end(world, Ending.OVER)
    assert "all workers have ended" in world.said()
    assert world.machine.failed == []


def test_a_resumed_run_that_is_over_starts_no_worker() -> None:
    world = World()
    world(Listening("server 0", over=True))
    world.exits("server 0")
    end(world, Ending.OVER)
    assert world.starts("worker 0") == 0


def test_shards_end_together() -> None:
    world = World.begun(servers=3)
    world.exits("server 0")
    assert {Tell("server 1"), Tell("server 2")} <= set(world.did)
    for name in ("worker 0", "worker 1"):
        world.exits(name)
    end(world, Ending.OVER)


# servers


def test_a_server_that_dies_is_started_again_before_anything_else_is_decided() -> None:
    """Its workers have ended meanwhile: it goes on from its snapshot, and ends by itself."""
    world = World.begun()
    world.exits("server 0", KILLED)
    world.exits("worker 0")
    world.exits("worker 1")
    world.passes(20)
    assert world.starts("server 0") == 2
    assert Tell("server 0") not in world.did
    world(Listening("server 0"))
    world.exits("server 0")
    end(world, Ending.OVER)
    assert world.machine.whole


def test_a_server_that_cannot_be_kept_alive_ends_the_run() -> None:
    world = World.begun(restarts=3)
    for _ in range(4):
        world.exits("server 0", KILLED, after=1)
        world.passes(5)
    assert {Tell("worker 0"), Tell("worker 1")} <= set(world.did)
    end(world, Ending.FAILED)
    assert "3 restarts an hour" in world.machine.why
    assert not world.machine.whole


def test_a_server_that_does_not_start_is_not_tried_again() -> None:
    world = World()
    world.exits("server 0", 2, ("offbeat: runs/x is in use by another offbeat server, process 7",))
    end(world, Ending.FAILED)
    assert world.machine.why.startswith("server 0 did not start:")
    assert "in use by another" in world.machine.why
    assert world.starts("server 0") == 1


def test_a_server_that_never_listens() -> None:
    world = World()
    world.passes(LISTENING + 1)
    end(world, Ending.FAILED)
    assert "server 0 does not listen after 120 s" in world.machine.why


# signals


def test_one_signal() -> None:
    """Workers leave, the stuck one is killed after the grace period, and only then the server ends."""
    world = World.begun()
    world(Signalled(signal.SIGINT))
    assert world.did[-2:] == [Tell("worker 0"), Tell("worker 1")]
    assert "SIGINT: workers have 10 s to finish their steps and leave" in world.said()
    world.exits("worker 0")
    world.passes(GRACE - 1)
    assert Tell("server 0") not in world.did
    world.passes(1.5)
    assert Kill("worker 1") in world.did
    assert "worker 1 has not ended 10 s after it was asked to: it is killed" in world.said()
    world.exits("worker 1", KILLED)
    assert world.did[-1] == Tell("server 0")
    world.passes(WRITING / 2)
    assert not world.machine.ended
    world.exits("server 0")
    end(world, Ending.STOPPED)
    assert world.machine.whole


def test_a_server_that_does_not_end_is_killed() -> None:
    world = World.begun(workers=1)
    world(Signalled(signal.SIGTERM))
    world.exits("worker 0")
    world.passes(WRITING + 1)
    assert world.did[-1] == Kill("server 0")
    world.exits("server 0", KILLED)
    end(world, Ending.STOPPED)
    assert not world.machine.whole


def test_nothing_is_started_after_a_signal() -> None:
    """Neither a worker that waits for its restart, nor one that dies, nor workers of a server that has just come up."""
    world = World.begun(workers=3)
    world.exits("worker 2", KILLED)
    world(Signalled(signal.SIGTERM))
    world.exits("worker 1", KILLED)
    world.passes(5)
    assert world.running == {"server 0", "worker 0"}
    end(world, Ending.STOPPED)
    early = World()
    early(Signalled(signal.SIGTERM))
    early(Listening("server 0"))
    end(early, Ending.STOPPED)
    assert early.starts("worker 0") == 0


@pytest.mark.parametrize("when", ["at once", "while the server writes", "while scripts go on"])
def test_a_second_signal_kills_everything(when: str) -> None:
    world = World.begun()
    if when == "while scripts go on":
        world.exits("server 0")
    world(Signalled(signal.SIGINT))
    if when == "while the server writes":
        world.exits("worker 0")
        world.exits("worker 1")
    left = set(world.running)
    world(Signalled(signal.SIGINT), after=1)
    assert {effect.name for effect in world.did if isinstance(effect, Kill)} == left
    for name in left:
        world.exits(name, KILLED)
    end(world, Ending.STOPPED)


def test_what_cannot_be_killed_is_said() -> None:
    world = World.begun(workers=1)
    world(Signalled(signal.SIGINT))
    world(Signalled(signal.SIGINT))
    world.exits("server 0", KILLED)
    world.passes(GRACE + 1)
    assert world.machine.ended
    assert "worker 0 cannot be killed: it is left behind" in world.said()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_run_ends(data: st.DataObject) -> None:
    """Whatever dies when: nothing is started while it runs or after a signal, and two signals end everything within seconds."""
    servers, workers = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    world = World(servers=servers, workers=workers, restarts=data.draw(st.integers(0, 3)))
    for _ in range(data.draw(st.integers(0, 40))):
        what = data.draw(st.sampled_from(["passes", "listens", "joins", "exits", "finishes", "signal"]))
        if what == "passes":
            world.passes(data.draw(st.sampled_from([0.25, 3.0, 50.0])))
        elif what == "listens":
            k = data.draw(st.integers(0, servers - 1))
            if f"server {k}" in world.running:
                world(Listening(f"server {k}"))
        elif what == "joins":
            world.join(data.draw(st.integers(0, workers - 1)), data.draw(st.integers(0, 2)))
        elif what == "finishes":
            world.finished.add(data.draw(st.integers(0, workers - 1)))
        elif what == "exits" and world.running:
            name = data.draw(st.sampled_from(sorted(world.running)))
            world.exits(name, data.draw(st.sampled_from([0, 1, KILLED])), data.draw(st.sampled_from([(), TYPO, DISK])))
        elif what == "signal":
            world(Signalled(signal.SIGTERM))
        for name in sorted(world.running & {effect.name for effect in world.did if isinstance(effect, Kill)}):
            world.exits(name, KILLED)
        assert not (world.machine.ended and world.running)
    asked = world.machine.phase in (Phase.STOPPING, Phase.KILLING)
    before = sum(isinstance(effect, Start) for effect in world.did)
    world(Signalled(signal.SIGTERM))
    world(Signalled(signal.SIGTERM))
    for name in sorted(world.running):
        assert Kill(name) in world.did
        world.exits(name, KILLED)
    world.passes(1)
    assert world.machine.ended
    assert world.machine.ending is Ending.STOPPED or asked or world.running == set()
    assert before == sum(isinstance(effect, Start) for effect in world.did)
