"""What coordinators and peers are sent that they should not be: that link is refused and the reason named, nobody else
notices, and the run ends as it would have."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from crew import heard, time_out, until
from test_fuzz import anything, files, flip, rest
from test_peers import PROBLEM, TOKEN, Run
from torch import Tensor

import offbeat as ob
from offbeat.runtime.entry import enter
from offbeat.runtime.link import Link, LinkLost, dial
from offbeat.runtime.peer import talk
from offbeat.runtime.protocol.wire import SIZE, Form, Header, Kind
from offbeat.runtime.worker import Driver

KINDS = {
    "rounds": ob.methods.DPSGD(ob.SGD(0.05)),  # whose peers take nothing with them when they go
    "pushes": ob.methods.GoSGD(ob.SGD(0.05)),
    "pairs": ob.methods.ADPSGD(ob.SGD(0.05)),
    "averages": ob.methods.LocalSGD(ob.Local(ob.SGD(0.05)), period=2),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
HELLOS, NEWCOMERS, MEMBERS, CALLS = 150, 60, 40, 150
HEALTHY = 2


class Target:
    """A coordinator and healthy peers, who go on until the fuzz is over."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.run = Run(folder, KINDS[kind], HEALTHY, None, timeout=3.0)
        self.over, self.peers, self.rng = threading.Event(), dict[int, Any](), Random(7)

    @property
    def host(self) -> Any:
        return self.run.host

    def begin(self) -> None:
        for worker in range(HEALTHY):
            self.run.start(worker, self.live)
        self.goes_on()
        self.threads, self.files = threading.active_count(), files()

    def live(self, driver: Driver) -> None:
        self.peers[driver.terms.worker] = driver
        while not (self.over.is_set() and driver.free):
            driver.use(driver.draw())
            g, loss = PROBLEM.grad(driver.x, driver.terms.worker, driver.node.step)
            time.sleep(0.002)
            driver.step(g, float(loss))
        driver.leave(done=True)

    def goes_on(self) -> None:
        """Each healthy peer takes some steps more."""
        steps = dict(self.host.steps)
        more = lambda: all(self.host.steps.get(w, 0) > steps.get(w, 0) + 4 for w in range(HEALTHY))  # noqa: E731
        until(lambda: self.run.errors or more(), "more steps of the healthy peers", 30)
        assert not self.run.errors

    def check(self) -> list[str]:
        """What was refused is gone without a trace, and the healthy end their run; why it was refused."""
        until(lambda: sorted(self.host.sessions) == list(range(HEALTHY)), "the end of all other sessions", 30)
        self.goes_on()
        until(lambda: threading.active_count() <= self.threads, "the end of their threads", 30)
        assert files() <= self.files + 8  # links and groups of the healthy may have been made since
        self.over.set()
        x, trace = self.run.end()
        assert [peer.life for peer in self.peers.values()] == [1] * HEALTHY
        for worker in range(HEALTHY):
            steps = [event.step for event in trace if event.worker == worker]
            assert steps == list(range(len(steps)))
            assert not [i.what for i in trace.incidents if i.worker == worker if i.what not in ("joined", "left")]
        assert PROBLEM.evaluate(x)["loss"] < PROBLEM.evaluate(PROBLEM.x0())["loss"]
        assert not any("Traceback" in line for line in self.run.said)
        return [line for line in self.run.said if line.startswith("refused: ")]


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Callable[[str], Target]]:
    made: list[Target] = []

    def make(kind: str) -> Target:
        made.append(Target(tmp_path / "run", kind))
        return made[-1]

    with time_out():
        yield make
    for one in made:
        one.over.set()
        one.host.stop()


def hello(target: Target, **other: Any) -> dict[str, Any]:
    about = {"worker": 7, "named": True, "parameters": PROBLEM.x0().numel(), "peer": True, "process": "me"}
    return about | {"address": "127.0.0.1:1", "machine": "elsewhere", "method": repr(target.run.method)} | other


def call(target: Target, note: Any) -> Link:
    """A link to the coordinator on which a hello has been said."""
    link = dial(target.run.place.servers[0], TOKEN, "the coordinator", 20.0)
    link.send(Header(Kind.HELLO, 1), None, note)
    return link


def frames(link: Link) -> Iterator[tuple[Header, Any]]:
    """All that comes, until the other end hangs up."""
    while True:
        try:
            header = Header.unpack(link._read(SIZE, "an answer"))
            note = link._note(header)
            link._read(header.length, "a payload")
        except LinkLost:
            return
        yield header, note


def refusal(link: Link) -> str:
    """Why the link is refused, as it is told."""
    whys = [note["why"] for header, note in frames(link) if header.kind == Kind.REFUSED]
    link.close()
    assert len(whys) == 1
    return str(whys[0])


def payload(rng: Random, size: int) -> Tensor:
    return torch.tensor(list(rng.randbytes(size)), dtype=torch.uint8)


# ---------------------------------------------------------------- the coordinator


@each_kind
def test_hellos_to_a_coordinator(kind: str, target: Callable[[str], Target]) -> None:
    """Whoever cannot be a peer of this run is refused, and told what is wrong with the value that it has said."""
    one = target(kind)
    one.begin()
    bad = {
        "address": (lambda v: True, r"a peer that listens at .*: it must be a numeric address and a port, as in 10\.0"),
        "parameters": (lambda v: v != PROBLEM.x0().numel(), r"a model of .* parameters|the worker's model has"),
        "worker": (
            lambda v: v is not None and not (type(v) is int and 0 <= v < 2**31),
            "its number must be a whole one",
        ),
        "method": (bool, r"the worker's method is .*name it in one place only"),
    }
    for _ in range(HELLOS):
        name = one.rng.choice(list(bad))
        wrong, why = bad[name]
        value = anything(one.rng)
        while not wrong(value):
            value = anything(one.rng)
        link = call(one, hello(one, **{name: value}))
        said = refusal(link)
        assert re.search(why, said), (name, value, said)
    for address in ("127.0.0.1", ":5", "127.0.0.1:0", "127.0.0.1:65536", "host:80", "1.2.3.4:8_0", "1.2.3.4:", None):
        assert "listens at" in refusal(call(one, hello(one, address=address))), address
    for k in range(NEWCOMERS):  # what is right where it must be, and anything elsewhere
        odd = {name: anything(one.rng) for name in ("machine", "process", "named", "layout", "unknown")}
        link = call(one, hello(one, worker=10 + k, **odd))  # a number twice is refused while the first is alive
        header, note = next(frames(link))
        assert header.kind == Kind.WELCOME, (note, odd)
        assert note["worker"] > 1
        link.close()
    assert len(one.check()) == HELLOS + 8


def words(rng: Random, life: int) -> tuple[Header, Tensor | None, Any]:
    """A frame that a peer might send, and something is wrong with it, or it is not its turn."""
    kind = rng.choice([k for k in Kind if k not in (Kind.BEAT, Kind.LEAVE)])
    members = rng.choice([["0", 1], [-1, 7], [7] * 9, list(range(90_000)), [7, 0], "07", None, {}])
    names = (
        "round",
        "want",
        "more",
        "members",
        "index",
        "used",
        "sent",
        "losses",
        "deeds",
        "group",
        "key",
        "value",
        "welcome",
    )
    note = {name: anything(rng) for name in rng.sample(names, rng.randrange(len(names)))}
    if rng.random() < 0.3:
        note["members"] = members
    step = rng.choice([0, 1, 2**31, 2**63, rng.randrange(100)])
    head = Header(kind, 1, 7, life, step, rng.getrandbits(63), gradients=rng.choice([0, 1, 9, 2**31]))
    match rng.randrange(4):
        case 0:
            head = head._replace(worker=rng.choice([-1, 0, 1, 8]))
        case 1:
            head = head._replace(incarnation=life + rng.choice([-1, 1, 5]))
    sizes = [0, 8, 8 * PROBLEM.x0().numel(), 4096]
    data = payload(rng, rng.choice(sizes)) if rng.random() < 0.4 else None
    return head, data, note if rng.random() < 0.9 else anything(rng)


@each_kind
def test_words_of_newcomers_to_a_coordinator(kind: str, target: Callable[[str], Target]) -> None:
    """They have not begun: nothing of what they say is for them to say, but that they are orphans, and that they go."""
    one = target(kind)
    one.begin()
    for _ in range(NEWCOMERS):
        link = call(one, hello(one))
        header, note = next(frames(link))
        assert header.kind == Kind.WELCOME, note
        try:
            for _ in range(one.rng.randrange(4)):
                link.send(*words(one.rng, note["incarnation"]))
            link.send(header._replace(kind=Kind.PUSH))  # at the latest now
        except LinkLost:
            pass
        refusal(link)
    whys = one.check()
    assert len(whys) == NEWCOMERS
    causes = ("has not begun", "speaks on another one's link", "bytes of", "is due", "no JSON", "is no buffer")
    assert all(any(cause in why for cause in causes) for why in whys), [
        w for w in whys if not any(c in w for c in causes)
    ]


def member(target: Target) -> Any:
    """A peer that has begun."""
    place = replace(target.run.place, worker=7)
    return enter(
        place, PROBLEM.x0(), target.run.method, {"problem": "", "layout": None}, ob.names.read, heard(target.run.said)
    )


@each_kind
def test_words_of_members_to_a_coordinator(kind: str, target: Callable[[str], Target]) -> None:
    """A peer that has begun, and then says what is not its turn: it is as good as dead, and told why."""
    one = target(kind)
    one.begin()
    for _ in range(MEMBERS):
        peer = member(one)
        with peer.monitor:  # it does not hear of it before all is said
            try:
                for _ in range(one.rng.randrange(4)):
                    peer.incarnation.link.send(*words(one.rng, peer.incarnation.head.incarnation))
                peer.incarnation.link.send(peer.incarnation.head._replace(kind=Kind.PUSH))
            except LinkLost:
                pass
        until(lambda peer=peer: peer.incarnation.lost, "the refusal")
        assert (
            "the coordinator refused the last message: " in peer.incarnation.lost
            or "hung up" in peer.incarnation.lost
            or "gone" in peer.incarnation.lost
        )
        peer._hang_up()
    assert len(one.check()) == MEMBERS


@pytest.mark.parametrize(
    ("kind", "head", "note", "why"),
    [
        ("rounds", {"kind": Kind.BEGIN}, {"round": 10**9}, r"begins round 1000000000, and is at step \d+ of a block"),
        ("pushes", {"kind": Kind.BEGIN}, {"round": "3"}, "begins round 3, and is at step"),
        ("rounds", {"kind": Kind.BEGIN}, {"round": -1}, "begins round -1, and is at step"),
        ("pairs", {"kind": Kind.STEP}, {"losses": [0.0] * 9}, "takes 9 steps, and is at step"),
        ("pairs", {"kind": Kind.STEP}, {"losses": {"0": 1}}, "takes no steps, and is at step"),
        ("averages", {"kind": Kind.REDUCE}, {"round": 10**9, "members": [0, 1, 7]}, "names round 1000000000"),
        ("averages", {"kind": Kind.REDUCE}, {"members": [0, 1]}, r"wants an average of workers \(0, 1\)"),
        ("averages", {"kind": Kind.REDUCE}, {"members": [7, 99]}, r"wants an average of workers \(7, 99\)"),
        ("averages", {"kind": Kind.REDUCE}, {"members": ["7"]}, r"wants an average of workers \(\)"),
        ("averages", {"kind": Kind.ENTER}, {"round": 0}, "asks in, and is at step"),
        ("pushes", {"kind": Kind.ORPHAN}, {}, "wants a state to begin with, and is at step"),
        ("pushes", {"kind": Kind.LEAVE}, {"deeds": [["step", 1], 7]}, "tells what is no deed"),
        ("pairs", {"kind": Kind.STEP, "worker": 0}, {}, "of worker 0 speaks on another one's link: refused"),
        ("pairs", {"kind": Kind.SEND}, {}, "sent SEND where"),
    ],
)
def test_each_word_is_checked(kind: str, head: Any, note: Any, why: str, target: Callable[[str], Target]) -> None:
    one = target(kind)
    one.begin()
    peer = member(one)
    step = peer.node.step
    if head["kind"] in (Kind.REDUCE,) and "round" not in note:
        peer.incarnation.link.send(peer.incarnation.head._replace(kind=Kind.STEP), None, {"losses": [0.0]})
        note = note | {"round": step + 1}
    peer.incarnation.link.send(peer.incarnation.head._replace(**head), None, note)
    until(lambda: peer.incarnation.lost, "the refusal")
    peer._hang_up()
    assert re.search(why, peer.incarnation.lost), peer.incarnation.lost
    one.check()


def test_founders_that_are_none(target: Callable[[str], Target]) -> None:
    """Whoever brings the first model and is refused leaves nothing behind; nor does who waits for the others."""
    one = target("rounds")
    d = PROBLEM.x0().numel()
    for bad in (payload(one.rng, 8), torch.full((d,), torch.nan, dtype=torch.float64).view(torch.uint8), None):
        link = call(one, hello(one))
        header, note = next(frames(link))
        assert note["model"]
        link.send(header._replace(kind=Kind.MODEL), bad)
        refusal(link)
    for _ in range(20):
        link = call(one, hello(one))
        header, note = next(frames(link))
        if note["model"]:
            link.send(header._replace(kind=Kind.MODEL), Form.of(PROBLEM.x0()).pack(PROBLEM.x0()))
        try:
            for _ in range(one.rng.randrange(4)):
                link.send(*words(one.rng, note["incarnation"]))
            link.send(header._replace(kind=Kind.PUSH))
        except LinkLost:
            pass
        refusal(link)
    one.begin()
    one.check()


@pytest.mark.parametrize("entry", [{}, {"key": 5, "value": "00"}, {"key": "k", "value": "no hex"}])
def test_a_member_of_a_group_that_does_not_say_where_it_listens(entry: Any, target: Callable[[str], Target]) -> None:
    """The average breaks and is taken again, without who has gone by then."""
    one = target("averages")
    one.begin()
    peer = member(one)
    peer.averages._call_out = lambda name, _: peer.incarnation.link.send(
        peer.incarnation.head._replace(kind=Kind.MEET), None, {"group": name} | entry
    )
    peer.log.addFilter(lambda line: peer._hang_up())  # when it has to say that the average has broken
    peer._mend = lambda lost: None
    while not peer.incarnation.lost:
        peer.step(torch.zeros_like(peer.x), 0.0)
    one.check()
    assert any("an average with workers (0, 1, 7) broke" in line for line in one.run.said)


# ---------------------------------------------------------------- peers


def visit(target: Target, **head: Any) -> tuple[Link, Header]:
    """A link to worker 0, on which somebody has said who it is."""
    link = dial(target.host.coordination.membership.here[0].address, TOKEN, "worker 0", 20.0)
    header = Header(Kind.HELLO, 1, 7, 10**6)._replace(**head)
    link.send(header, None, {"machine": "elsewhere"})
    return link, header


def odd(rng: Random, method: ob.Method) -> tuple[dict[str, Any], Tensor | None, Any]:
    """What a peer should not send to another: fields of the header, payload, note."""
    message, _, state = talk(method, PROBLEM.x0())
    sizes = {Kind.SEND: message.bytes, Kind.ASK: message.bytes, Kind.STATE: state.bytes, Kind.HEIR: state.bytes}
    nans = lambda n: torch.full((max(1, n // 8),), torch.nan, dtype=torch.float64).view(torch.uint8)  # noqa: E731
    kind = rng.choice(list(sizes))
    match rng.randrange(5):
        case 0:  # another kind
            kind = rng.choice([k for k in Kind if k not in (*sizes, Kind.BEAT)])
            return {"kind": kind}, payload(rng, rng.choice([0, 8, 64])), anything(rng)
        case 1:  # another length
            size = rng.choice([n for n in (0, 8, 64, 512, 4096) if n != sizes[kind]])
            return {"kind": kind}, payload(rng, size), {"round": 0}
        case 2:  # another's name
            return {"kind": kind, "worker": rng.choice([-1, 2, 99, 2**31 - 1])}, nans(sizes[kind]), {"round": 0}
        case 3:  # no numbers
            return {"kind": kind}, nans(sizes[kind]), {"round": 0}
    return {"kind": kind, "version": 0}, nans(sizes[kind]), anything(rng)  # anything, and no numbers


@each_kind
def test_frames_to_a_peer(kind: str, target: Callable[[str], Target]) -> None:
    """From somebody unknown, or in another peer's name: all of it is refused, and the peer goes on."""
    one = target(kind)
    one.begin()
    for _ in range(CALLS):
        other = one.host.coordination.membership.here[1]
        names = {} if one.rng.random() < 0.5 else {"worker": 1, "incarnation": other.life}
        link, header = visit(one, **names)
        fields, data, note = odd(one.rng, one.run.method)
        match one.rng.randrange(8):
            case 0:
                link._write(one.rng.randbytes(SIZE))
            case 1:
                link._write(flip(one.rng, header._replace(kind=Kind.SEND).pack()))
            case 2:
                link.close()  # in the middle of it
                continue
            case _:
                link.send(header._replace(**fields), data, note)
        assert [h.kind for h, _ in frames(link)] in ([Kind.WELCOME], [])
        link.close()
    assert all(entry.which[0] < HEALTHY for peer in one.peers.values() for entry in list(peer.inbox))
    whys = one.check()
    assert whys


@each_kind
def test_good_messages_of_the_unknown_are_not_taken(kind: str, target: Callable[[str], Target]) -> None:
    """Who is no peer of the run, or is one no more, is not believed; nor is a peer that is another one than was dialled."""
    one = target(kind)
    one.begin()
    message, _, state = talk(one.run.method, PROBLEM.x0())
    huge = {
        form: torch.full((form.bytes // 8,), 1e6, dtype=torch.float64).view(torch.uint8) for form in (message, state)
    }
    links = []
    seat = one.host.coordination.membership.here[1]
    for who in ({}, {"worker": 1, "incarnation": seat.life - 1}, {"worker": 1, "incarnation": 10**6}):
        for what, form in ((Kind.SEND, message), (Kind.ASK, message), (Kind.STATE, state), (Kind.HEIR, state)):
            if form.bytes:
                link, header = visit(one, **who)
                link.send(header._replace(kind=what, version=5), huge[form], {"round": one.peers[0].node.step + 1})
                links.append(link)
    for link in links:
        assert [h.kind for h, _ in frames(link)] in ([Kind.WELCOME], [])
        link.close()
    assert set(one.peers[0].taken) <= {(1, seat.life)}
    one.check()


def test_strangers_get_no_link_to_a_peer(target: Callable[[str], Target]) -> None:
    """Who does not know the token, or says anything, or nothing, is sent away; the others notice nothing."""
    one = target("pushes")
    one.begin()
    host, _, port = one.host.coordination.membership.here[0].address.rpartition(":")
    for k in range(200):
        with socket.create_connection((host, int(port)), timeout=20) as sock:
            if k % 4 == 0:
                continue
            sock.sendall(one.rng.randbytes(one.rng.randrange(50, 200)))
            assert len(rest(sock)) <= 200
        if k % 10 == 0:
            with pytest.raises(PermissionError):
                dial(f"{host}:{port}", "guess", "worker 0", 20.0)
    assert len(one.check()) >= 100
