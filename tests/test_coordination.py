"""The coordinator's machine among peers that are machines too: no sockets, threads or clock, and any order of what happens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import offbeat as ob
from offbeat.core.topology import Ring
from offbeat.runtime.leases import Leases
from offbeat.runtime.protocol.averages import Seat
from offbeat.runtime.protocol.coordinator import Coordination
from offbeat.runtime.protocol.events import (
    Came,
    Effect,
    Event,
    HangUp,
    Log,
    Passed,
    Refuse,
    Said,
    Save,
    SendFrame,
    Unsound,
    Wake,
    Went,
)
from offbeat.runtime.protocol.states import TURNS, State
from offbeat.runtime.protocol.wire import Kind

TIMEOUT = 10.0
METHODS: dict[str, ob.Method] = {
    "rounds": ob.methods.DPSGD(topology=Ring()),
    "averages": ob.methods.LocalSGD(period=2),
    "pairs": ob.methods.ADPSGD(),
    "pushes": ob.methods.GoSGD(),
}
each_kind = pytest.mark.parametrize("kind", METHODS)
Move = Callable[[], None]


@dataclass(eq=False)
class Actor:
    """A peer as the coordinator's other end: what it was told, and what it says next."""

    world: World
    worker: int
    life: int
    up: deque[Said] = field(default_factory=deque)
    down: deque[SendFrame] = field(default_factory=deque)
    expects: str = "enter"  # the answer that it waits for
    alive: dict[int, dict[str, Any]] = field(default_factory=dict)
    donor: tuple[int, int] | None = None
    newcomers: list[tuple[int, int]] = field(default_factory=list)
    state: int | None = None  # the round that it begins with
    step: int | None = None
    end: int = 0
    members: tuple[int, ...] = ()
    reduced: bool = False  # whether it has the average of this block
    blocks: int = 0
    over: bool = False

    def say(self, kind: Kind, **note: Any) -> None:
        model = torch.zeros(1) if kind == Kind.MODEL else None
        self.up.append(Said(self.worker, self.life, kind, note, 0, model))

    def hear(self) -> None:
        """Take the next frame."""
        frame = self.down.popleft()
        note = frame.note
        if frame.kind == Kind.MODEL:
            self.state = frame.step if self.state is None else self.state
        elif frame.kind == Kind.NEWS:
            if "alive" in note:
                self.alive = {about["worker"]: about for about in note["alive"] if about["worker"] != self.worker}
            self.donor = note.get("donor", self.donor)
            self.newcomers += note.get("welcome", ())
            if self.state is None and self.donor is not None:
                about = self.alive.get(self.donor[0], {})
                if (about.get("life"), about.get("place")) != (self.donor[1], "in"):
                    donor, self.donor = self.donor, None
                    self.say(Kind.ORPHAN, donor=list(donor))
        elif frame.kind == Kind.ANSWER:
            expected, self.expects = self.expects, ""
            if expected == "begin":
                self.end, self.members = note["end"], tuple(note["members"])
                newcomers, self.newcomers = [*self.newcomers, *note["welcome"]], []
                self.world.states += [(self, *new) for new in newcomers if self.knows(*new)]
                if note["show"]:
                    self.say(Kind.MODEL)
            elif expected == "reduce":
                assert self.worker in note["ranks"] or note["holder"] is not None
            elif expected == "over":
                assert note == {"over": True}
                self.over = True
            else:
                assert expected == "enter"

    def knows(self, worker: int, life: int) -> bool:
        return bool(self.alive.get(worker, {}).get("life") == life)

    @property
    def acts(self) -> bool:
        """Whether it is its turn to say something: it waits for no answer, and for no newcomer to take its state."""
        return not self.expects and self.state is not None and all(giver is not self for giver, *_ in self.world.states)

    def act(self, how: str) -> None:
        """Take the next step: go on, ask for an average first, finish, or leave."""
        told = {}
        if self.step is not None and self.step < self.end:
            told = {"losses": [0.5] * (self.end - self.step)}
            self.step = self.end
            self.blocks += 1
            self.reduced = False
        if self.over:
            self.say(Kind.LEAVE, done=True)
            self.expects = "the end"
        elif self.step is None:
            self.step = self.end = self.state or 0
            self.say(Kind.BEGIN, round=self.state)
            self.expects = "begin"
        elif how == "finish":
            self.say(Kind.MODEL)
            self.say(Kind.LEAVE, done=True, **told)
            self.expects = "over"
        elif how == "leave":
            self.say(Kind.LEAVE, done=False, **told)
            self.expects = "the end"
        elif how == "reduce" and not self.reduced and self.world.kind == "averages":
            self.say(Kind.REDUCE, round=self.step, index=0, members=list(self.members), **told)
            self.expects, self.reduced = "reduce", True
        else:
            self.say(Kind.BEGIN, round=self.step, **told)
            self.expects = "begin"


class World:
    """A coordinator and its peers. Whatever can happen next is a move."""

    def __init__(self, kind: str, workers: int) -> None:
        self.kind, self.now, self.wake, self.lives = kind, 0.0, float("inf"), 0
        self.leases = Leases()
        self.run = Coordination(METHODS[kind], torch.zeros(1), self.leases, 0.0, workers, TIMEOUT)
        self.actors: dict[int, Actor] = {}
        self.states: list[tuple[Actor, int, int]] = []  # on their way: who gives it, to whom, in which life
        self.log: list[str] = []
        self.effects: list[Effect] = []

    def feed(self, event: Event) -> list[Effect]:
        """Give the coordinator an event, and carry out what follows."""
        effects = self.run.handle(event, self.now)
        self.effects += effects
        for effect in effects:
            match effect:
                case SendFrame(worker):
                    self.actors[worker].down.append(effect)
                case Wake(at):
                    self.wake = at
                case Log(what):
                    self.log.append(what)
                case HangUp(worker):
                    self.die(worker)
                case Refuse(_, why):
                    raise AssertionError(why)
        return effects

    def come(self, worker: int) -> Actor:
        self.lives += 1
        actor = self.actors[worker] = Actor(self, worker, self.lives)
        self.leases.join(worker)
        self.feed(Came(Seat(worker, self.lives, f"h:{worker}", "here")))
        actor.say(Kind.ENTER, round=self.run.open())
        return actor

    def die(self, worker: int) -> None:
        actor = self.actors.pop(worker)
        self.states = [entry for entry in self.states if entry[0] is not actor]
        self.leases.part(worker)
        self.feed(Went(worker, actor.life))

    def moves(self, how: str = "go on") -> list[Move]:
        """All that can happen next, but for time to pass."""
        moves: list[Move] = []
        for actor in self.actors.values():
            if actor.up:
                moves.append(lambda actor=actor: self.feed(actor.up.popleft()))  # type: ignore[misc]
            if actor.down:
                moves.append(actor.hear)
            if actor.acts:
                moves.append(lambda actor=actor: actor.act(how))  # type: ignore[misc]
        for entry in self.states:
            giver, worker, life = entry
            to = self.actors.get(worker)
            if not giver.knows(worker, life):  # or its link says so, and the news are on their way
                moves.append(lambda entry=entry: self.states.remove(entry))  # type: ignore[misc]
            elif to is None or to.life != life:
                continue  # it is tried again until the news come
            elif to.state is not None or to.donor == (giver.worker, giver.life):
                moves.append(lambda entry=entry, to=to: self.bring(entry, to))  # type: ignore[misc]
        return moves

    def bring(self, entry: tuple[Actor, int, int], to: Actor) -> None:
        """A newcomer gets a state, or has one already."""
        self.states.remove(entry)
        if to.state is None:
            to.state = entry[0].step

    def settle(self, how: str = "go on", until: Callable[[], bool] = lambda: False, most: int = 10_000) -> None:
        """Let things happen, in an order of chance, until nothing can or ``until`` is true."""
        rng = Random(most)
        for _ in range(most):
            if until():
                return
            moves = self.moves(how)
            if not moves:
                return
            rng.choice(moves)()
        raise AssertionError("no end")

    def pass_time(self) -> list[Effect]:
        """The time comes that the coordinator has asked for."""
        assert self.wake < float("inf"), "nobody waits, or with no deadline"
        self.now, self.wake = max(self.now, self.wake), float("inf")
        return self.feed(Passed())

    def begun(self) -> set[int]:
        return {worker for worker, actor in self.actors.items() if actor.blocks}

    def end(self, rng: Random) -> None:
        """Nobody dies any more: all go on for a block, finish, and leave; nobody waits for ever."""
        target, silent = {worker: actor.blocks + 1 for worker, actor in self.actors.items()}, 0
        for _ in range(20_000):
            if not self.actors:
                return
            moves = self.moves(rng.choice(("go on", "reduce")))
            if moves:
                silent = 0
                for actor in self.actors.values():
                    if actor.acts and actor.blocks >= target[actor.worker]:
                        moves = [lambda actor=actor: actor.act("finish")]  # type: ignore[misc]
                rng.choice(moves)()
            else:
                effects = self.pass_time()
                silent = silent + 1 if all(isinstance(effect, Log | Wake) for effect in effects) else 0
                assert silent < 5, f"these wait for ever: {self.log[-3:]}"
        raise AssertionError("no end")


def founded(kind: str, workers: int) -> World:
    """All are there, and have begun."""
    world = World(kind, workers)
    for worker in range(workers):
        world.come(worker)
    world.settle(until=lambda: len(world.begun()) == workers)
    return world


# ---------------------------------------------------------------- founding


@each_kind
def test_the_run_begins_when_all_are_there(kind: str) -> None:
    world = World(kind, 3)
    for worker in range(3):
        assert not [e for e in world.effects if isinstance(e, SendFrame) and e.kind == Kind.MODEL]
        actor = world.come(worker)
        world.feed(actor.up.popleft())
    models = [e for e in world.effects if isinstance(e, SendFrame) and e.kind == Kind.MODEL]
    assert [(e.worker, e.step) for e in models] == [(0, 0), (1, 0), (2, 0)]
    assert set(world.run.membership.here) == {0, 1, 2}
    assert world.now == 0.0


@each_kind
def test_the_run_begins_at_the_deadline_with_those_who_are_there(kind: str) -> None:
    world = World(kind, 3)
    for worker in range(2):
        world.come(worker)
    world.settle()
    assert {peer.state for peer in world.run.peers.values()} == {State.FOUNDING}
    assert world.wake == TIMEOUT
    world.pass_time()
    assert set(world.run.membership.here) == {0, 1}
    world.settle(until=lambda: world.begun() == {0, 1})
    assert world.begun() == {0, 1}


@each_kind
def test_founders_that_go_are_not_waited_for(kind: str) -> None:
    world = World(kind, 3)
    for worker in range(2):
        world.come(worker)
    world.settle()
    world.die(0)
    world.die(1)
    world.pass_time()
    assert not world.run.membership.here
    world.come(2)
    world.settle()
    assert world.wake == TIMEOUT + TIMEOUT
    world.pass_time()
    assert set(world.run.membership.here) == {2}


# ---------------------------------------------------------------- newcomers


@each_kind
def test_a_newcomer_begins(kind: str) -> None:
    world = founded(kind, 2)
    world.come(5)
    world.settle(until=lambda: 5 in world.begun())
    assert set(world.run.membership.here) == {0, 1, 5}
    assert world.run.peers[5].state == State.COMPUTING


@each_kind
@pytest.mark.parametrize("seed", range(3))
def test_a_newcomer_whose_donor_goes_at_any_moment_begins(kind: str, seed: int) -> None:
    """With another donor's state, or with what it has got; nobody else waits for the donor."""
    for moment in range(60):
        world, rng = founded(kind, 3), Random(f"{seed} {moment}")
        world.come(5)
        for _ in range(moment):
            rng.choice(world.moves("reduce"))()
        donor = world.run.peers[5].donor
        world.die(donor[0] if donor is not None and donor[0] in world.actors else 0)
        world.settle("reduce", until=lambda world=world: 5 in world.begun())  # type: ignore[misc]
        assert 5 in world.begun()
        world.end(rng)


@each_kind
@pytest.mark.parametrize("how", ["dies", "leaves", "finishes"])
def test_newcomers_begin_anew_when_the_last_one_goes(how: str, kind: str) -> None:
    for moment in range(40):
        world, rng = founded(kind, 1), Random(moment)
        world.come(5)
        world.come(6)
        for _ in range(moment):
            rng.choice(world.moves())()
        if how == "dies":
            world.die(0)
        else:
            world.settle(until=lambda world=world: world.actors[0].acts)  # type: ignore[misc]
            world.actors[0].act({"leaves": "leave", "finishes": "finish"}[how])
        for _ in range(9):
            world.settle(until=lambda world=world: world.begun() >= {5, 6})  # type: ignore[misc]
            if world.begun() >= {5, 6}:
                break
            world.pass_time()
        assert world.begun() >= {5, 6}
        world.end(rng)


# ---------------------------------------------------------------- averages


@pytest.mark.parametrize("seed", range(3))
def test_an_average_whose_member_dies_at_any_moment_is_taken_by_the_others(seed: int) -> None:
    for moment in range(60):
        world, rng = founded("averages", 3), Random(f"{seed} {moment}")
        for _ in range(moment):
            rng.choice(world.moves("reduce"))()
        world.die(1)
        before = {worker: actor.blocks for worker, actor in world.actors.items()}
        world.settle("reduce", until=lambda w=world, b=before: all(w.actors[i].blocks > b[i] for i in b))  # type: ignore[misc]
        assert {peer.state for peer in world.run.peers.values()} <= {State.COMPUTING, State.AVERAGING}
        world.end(rng)


def test_it_is_said_who_waits_for_whom() -> None:
    world = founded("averages", 3)
    world.settle(until=lambda: all(actor.acts for actor in world.actors.values()))
    world.actors[0].act("reduce")
    world.feed(world.actors[0].up.popleft())
    assert world.run.peers[0].state == State.AVERAGING
    start = world.now
    world.pass_time()
    assert world.log == [
        f"worker 0 waits for an average for 10 s: of round {world.actors[0].step} workers 1, 2 have not asked for it"
    ]
    world.pass_time()
    assert world.now == start + 2 * TIMEOUT
    assert len(world.log) == 2


# ---------------------------------------------------------------- the end


@each_kind
def test_one_that_finishes_stays_until_all_have(kind: str) -> None:
    world = founded(kind, 2)
    world.settle(until=lambda: all(actor.acts for actor in world.actors.values()))
    first = world.actors[0]
    first.act("finish")
    while first.up:
        world.feed(first.up.popleft())
    assert Save() in world.effects
    assert world.run.finished == {0}
    assert world.run.peers[0].state == State.DONE
    assert [(a["worker"], a["place"]) for a in world.actors[1].down[-1].note["alive"]] == [(0, "done"), (1, "in")]
    world.settle(until=lambda: world.actors[1].blocks >= 4)
    assert not first.over
    world.settle(until=lambda: world.actors[1].acts)
    world.actors[1].act("finish")
    world.settle()
    assert not world.actors
    overs = [e.worker for e in world.effects if isinstance(e, SendFrame) and e.note == {"over": True}]
    assert sorted(overs) == [0, 1]
    assert {e for e in world.effects if isinstance(e, HangUp)} == {HangUp(0, True), HangUp(1, True)}


# ---------------------------------------------------------------- what is refused


def in_state(state: State) -> World:
    """A world in which worker 3 is in this state, among others."""
    world = World("averages", 2)
    if state == State.FOUNDING:
        world.feed(world.come(3).up.popleft())
        return world
    world = founded("averages", 2)
    actor = world.come(3)
    if state == State.ENTERING:
        return world
    world.feed(actor.up.popleft())
    if state == State.WAITING:
        return world
    world.settle(until=lambda: 3 in world.begun() and actor.acts)
    if state == State.AVERAGING:
        actor.act("reduce")
    elif state == State.DONE:
        actor.act("finish")
    while actor.up:
        world.feed(actor.up.popleft())
    return world


STATES = [state for state in State if state != State.GONE]


@pytest.mark.parametrize("kind", [k for k in Kind if k != Kind.BEAT], ids=lambda k: k.name)
@pytest.mark.parametrize("state", STATES, ids=lambda s: s.name)
def test_a_word_out_of_turn_is_refused_by_name(state: State, kind: Kind) -> None:
    world = in_state(state)
    peer = world.run.peers[3]
    assert peer.state == state
    if kind not in TURNS[state]:
        (refusal,) = world.run.handle(Said(3, peer.seat.life, kind, {"round": 0}), world.now)
        assert isinstance(refusal, Refuse)
        assert refusal.why.startswith("worker 3 ")
        assert refusal.why.endswith(": its link is refused, and it may join anew")
        assert peer.state == state


@pytest.mark.parametrize(
    ("state", "kind", "note", "why"),
    [
        (State.COMPUTING, Kind.BEGIN, {"round": 10**9}, "begins round 1000000000, and is at step"),
        (State.COMPUTING, Kind.STEP, {"losses": [0.0] * 9}, "takes 9 steps, and is at step"),
        (State.COMPUTING, Kind.STEP, {"deeds": [["step"], 7]}, "tells what is no deed, and is at step"),
        (State.COMPUTING, Kind.REDUCE, {"round": 10**9}, "names round 1000000000, and is at step"),
        (State.WAITING, Kind.BEGIN, {"round": 0}, "begins round 0, and has not begun"),
        (State.WAITING, Kind.STEP, {"losses": [0.0]}, "takes 1 steps, and has not begun"),
        (State.ENTERING, Kind.ENTER, {"round": 10**9}, "asks in from round 1000000000 on, where"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(state: State, kind: Kind, note: dict[str, Any], why: str) -> None:
    world = in_state(state)
    effects = world.run.handle(Said(3, world.run.peers[3].seat.life, kind, note), world.now)
    (refusal,) = [effect for effect in effects if isinstance(effect, Refuse)]
    assert refusal.why.startswith(f"worker 3 {why}")


def test_a_model_that_is_not_finite_is_not_shown() -> None:
    world = in_state(State.COMPUTING)
    before = dict(world.run.shown)
    effects = world.run.handle(Said(3, world.run.peers[3].seat.life, Kind.MODEL, {}, 7, None), world.now)
    assert effects == [Unsound(3, 7, "its model is not finite")]
    assert world.run.shown == before


def test_a_life_that_is_over_is_not_heard() -> None:
    world = in_state(State.COMPUTING)
    life = world.run.peers[3].seat.life
    assert world.run.handle(Said(3, life - 1, Kind.LEAVE, {"done": True}), world.now) == []
    assert world.run.handle(Went(3, life - 1), world.now) == []
    assert world.run.peers[3].state == State.COMPUTING
    assert 3 in world.run.membership.here


# ---------------------------------------------------------------- any order


class AnyOrder(RuleBasedStateMachine):
    """Peers come, go on, leave, finish and die, and frames arrive, in any order. In the end nobody waits for ever."""

    @initialize(kind=st.sampled_from(list(METHODS)), workers=st.integers(1, 3))
    def set_out(self, kind: str, workers: int) -> None:
        self.world = World(kind, workers)
        for worker in range(workers):
            self.world.come(worker)

    @rule(
        data=st.data(), how=st.sampled_from(["go on", "reduce", "reduce", "leave", "finish"]), count=st.integers(1, 8)
    )
    def move(self, data: st.DataObject, how: str, count: int) -> None:
        for _ in range(count):
            if moves := self.world.moves(how):
                moves[data.draw(st.integers(0, len(moves) - 1))]()
                how = "go on" if how in ("leave", "finish") else how

    @precondition(lambda self: len(self.world.actors) < 5)
    @rule(worker=st.integers(0, 5))
    def come(self, worker: int) -> None:
        if worker not in self.world.actors:
            self.world.come(worker)

    @precondition(lambda self: self.world.actors)
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        self.world.die(data.draw(st.sampled_from(sorted(self.world.actors))))

    @precondition(lambda self: self.world.wake < float("inf"))
    @rule()
    def pass_time(self) -> None:
        self.world.pass_time()

    @invariant()
    def an_average_waits_for_one_that_may_still_ask(self) -> None:
        peers, here = self.world.run.peers, self.world.run.membership.here
        for peer in peers.values():
            if peer.state == State.AVERAGING and peer.average is not None:
                round, others = peer.average.turn[0], set(peer.average.members) - peer.average.asked
                assert any(m in here and here[m].since < round and peers[m].end <= round for m in others)

    @invariant()
    def each_that_waits_has_a_deadline(self) -> None:
        for peer in self.world.run.peers.values():
            waits = peer.state in (State.FOUNDING, State.WAITING, State.AVERAGING)
            assert waits == (peer.waits[1] < float("inf"))
            assert not waits or self.world.wake <= peer.waits[1]

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.end(Random(0))


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
