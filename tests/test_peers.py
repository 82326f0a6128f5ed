"""Peers on real sockets: what goes in rounds ends where the simulator ends, what does not is what its replay is."""

from __future__ import annotations

import copy
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from conftest import by_turns
from crew import Processes, heard, until
from torch import Tensor, nn

import offbeat as ob
from offbeat.core.gossip import GossipMethod, PairGossipMethod, PushGossipMethod
from offbeat.core.method import Local
from offbeat.core.topology import Ring
from offbeat.names import read
from offbeat.runtime import snapshot
from offbeat.runtime.coordinator import Coordinator, host_for, resumed
from offbeat.runtime.entry import enter
from offbeat.runtime.host import Terms
from offbeat.runtime.incarnation import Incarnation
from offbeat.runtime.link import Frame, Link, LinkLost
from offbeat.runtime.peer import Peer
from offbeat.runtime.place import Place, first_node
from offbeat.runtime.protocol import coordinator
from offbeat.runtime.protocol.coordinator import Coordination
from offbeat.runtime.protocol.wire import Kind
from offbeat.runtime.server import RunServer
from offbeat.runtime.worker import Driver, train
from offbeat.trace import Deeds

PEERS = [cls for cls in ob.methods.all_methods() if not issubclass(cls, ob.ServerMethod | Local)]
ROUNDS = [cls for cls in PEERS if not issubclass(cls, PushGossipMethod | PairGossipMethod)]
GOSSIP = [cls for cls in PEERS if issubclass(cls, GossipMethod)]
PROBLEM = ob.tasks.Quadratic(dtype="float64")
TOKEN, LIMIT = "secret", 300.0


class Run:
    """A coordinator and peers as threads of this process, over real sockets."""

    layout: Any = None

    def __init__(self, folder: Path, method: ob.Method, workers: int, gradients: int | None, **terms: Any) -> None:
        self.method, self.workers = method, workers
        settings = {"seed": 1, "transport": "tcp", "timeout": 5.0, "beat": 0.2} | terms
        self.terms = Terms(method, gradients, workers, **settings)
        self.said: list[str] = []
        self.host = host_for(self.terms)(self.terms, TOKEN, folder, read, heard(self.said))
        self.folder = folder
        self.place = Place((f"127.0.0.1:{self.host.port}",), TOKEN, patience=10.0, timeout=5.0)
        self.errors: list[BaseException] = []
        self.threads = [threading.Thread(target=self.host.run, daemon=True)]
        self.threads[0].start()

    def enter(self, worker: int) -> Driver:
        hello = {"problem": repr(PROBLEM), "layout": self.layout}
        return enter(replace(self.place, worker=worker), PROBLEM.x0(), self.method, hello, read, heard(self.said))

    def start(self, worker: int, act: Callable[[Driver], None]) -> None:
        """``worker`` joins and does ``act``, in a thread of its own."""
        self.script(lambda: act(self.enter(worker)))

    def script(self, act: Callable[..., object], *args: Any) -> None:
        """Do ``act`` in a thread of its own. What it raises is an error of the run, which `end` shows."""

        def live() -> None:
            try:
                act(*args)
            except BaseException as error:
                self.errors.append(error)

        self.threads.append(threading.Thread(target=live, daemon=True))
        self.threads[-1].start()

    def end(self) -> tuple[Tensor, ob.Trace]:
        """Wait for the end; the model, and the trace."""
        end = time.monotonic() + LIMIT
        for thread in [*self.threads[1:], self.threads[0]]:
            thread.join(max(0.1, end - time.monotonic()))
            assert not self.errors, self.errors
            assert not thread.is_alive(), self.said[-5:]
        return self.host.x(), self.trace

    @property
    def trace(self) -> ob.Trace:
        return ob.Trace.read(self.folder / "trace.jsonl")


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    made: list[Run] = []

    def make(*args: Any, **settings: Any) -> Run:
        made.append(Run(tmp_path / str(len(made)), *args, **settings))
        return made[-1]

    yield make
    for run in made:
        run.host.stop()
        run.threads[0].join(10)


def whole(run: Run, speed: ob.Speed | None = None) -> tuple[Tensor, ob.Trace]:
    for i in range(run.workers):
        run.start(i, lambda driver: train(driver, PROBLEM, speed))
    return run.end()


def short(cls: type[ob.Method]) -> ob.Method:
    """The method with blocks so short that a short run has several."""
    names = getattr(cls, "__dataclass_fields__", {})
    return cls(**{name: value for name, value in {"period": 2, "start": 4}.items() if name in names})


@pytest.mark.parametrize(
    ("cls", "over"),
    by_turns(ROUNDS, [(workers, transport) for transport in ("shared", "gloo") for workers in (2, 4)]),
)
def test_rounds_end_where_the_simulator_ends(
    cls: type[ob.Method], over: tuple[int, str], runs: Callable[..., Run]
) -> None:
    workers, transport = over
    method, gradients = short(cls), 16 * workers
    run = runs(method, workers, None, transport=transport)
    for i in range(workers):
        run.start(i, some(16, done=True))
    x, trace = run.end()
    wanted = ob.simulate(method, PROBLEM, ob.Cluster(workers), gradients=gradients, seed=1)
    assert len(trace) == gradients
    torch.testing.assert_close(x, wanted.x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("cls", "transport"), by_turns(GOSSIP, ["shared", "gloo"]))
def test_gossip_over_shared_memory_and_gloo(cls: type[ob.Method], transport: str, runs: Callable[..., Run]) -> None:
    run = runs(short(cls), 2, 24, transport=transport)
    x, trace = whole(run)
    print("\n".join(run.said))
    assert len(trace) == 24
    torch.testing.assert_close(x, ob.rerun(trace).x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("cls", PEERS, ids=lambda cls: cls.__name__)
def test_a_replay_is_the_run(cls: type[ob.Method], runs: Callable[..., Run]) -> None:
    """With uneven speeds, so that those who do not wait meet in an order of their own."""
    x, trace = whole(runs(short(cls), 3, 48), ob.Gamma(0.002, 0.5, 0.8))
    again = ob.rerun(trace)
    assert len(trace) == len(again.trace) == 48
    torch.testing.assert_close(x, again.x, rtol=0, atol=1e-9)


def some(count: int, done: bool = False) -> Callable[[Driver], None]:
    """Take ``count`` gradients, deliver them, and leave in good order, before the run is over unless ``done``."""

    def act(driver: Driver) -> None:
        taken = 0
        while (taken < count or not driver.free) and (lease := driver.draw()) is not None:
            driver.use(lease)
            g, loss = PROBLEM.grad(driver.x, driver.terms.worker, driver.node.step)
            time.sleep(0 if done else 0.005)
            driver.step(g, float(loss))
            taken += 1
        driver.leave(done)

    return act


def dies(count: int) -> Callable[[Driver], None]:
    """Take ``count`` gradients and be gone without a word."""

    def act(driver: Any) -> None:
        for _ in range(count):
            driver.use(driver.draw())
            g, loss = PROBLEM.grad(driver.x, driver.terms.worker, driver.node.step)
            time.sleep(0.005)
            driver.step(g, float(loss))
        driver._hang_up()

    return act


def late(act: Callable[[Driver], None], gradients: int, run: Run, worker: int) -> None:
    """``worker`` comes once so many gradients are done."""
    until(lambda: run.errors or run.host.leases.done >= gradients, f"{gradients} gradients")
    run.start(worker, act)


def test_a_visited_peer_may_keep_what_was_brought(runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it was brought in memory that the next message comes to: two who swap their models have each other's."""
    swap = lambda _, w, msg: (w._replace(x=msg), w.x)  # noqa: E731
    monkeypatch.setattr(ob.methods.ADPSGD, "meet", swap)
    monkeypatch.setattr(ob.methods.ADPSGD, "settle", lambda _, w, reply: w._replace(x=reply))
    run = runs(ob.methods.ADPSGD(ob.SGD(1.0)), 2, None, transport="shared")
    over = threading.Event()
    had: list[float] = []

    def visits(driver: Driver) -> None:
        try:
            for step in range(6):
                driver.step(torch.full_like(driver.x, float(step == 0)), 0.0)
                had.append(float((PROBLEM.x0() - driver.x).mean()))
        finally:
            over.set()
        driver.leave(True)

    def waits(driver: Driver) -> None:
        over.wait(LIMIT)
        driver.leave(True)

    run.start(0, visits)
    run.start(1, waits)
    run.end()
    assert had == pytest.approx([1, 0, 1, 0, 1, 0])  # each step after a swap


@pytest.mark.parametrize("cls", PEERS, ids=lambda cls: cls.__name__)
def test_peers_come_leave_and_die(cls: type[ob.Method], runs: Callable[..., Run]) -> None:
    """Two stay, one leaves, one dies, one comes late and one comes back: the run ends, with every minibatch used once."""
    run = runs(short(cls), 4, 300)
    stay = lambda driver: train(driver, PROBLEM, ob.Fixed(0.005))  # noqa: E731
    run.start(0, stay)
    run.start(1, stay)
    run.start(2, some(10))
    run.start(3, dies(14))
    late(stay, 80, run, 4)
    late(stay, 140, run, 2)
    x, trace = run.end()
    what = [(i.worker, i.what) for i in trace.incidents]
    assert (2, "left") in what
    assert (3, "crashed") in what
    assert what.count((2, "joined")) == 2, run.said
    assert (4, "joined") in what
    assert run.host.leases.done == 300
    assert torch.isfinite(x).all()
    assert PROBLEM.evaluate(x)["loss"] < PROBLEM.evaluate(PROBLEM.x0())["loss"]


@pytest.mark.parametrize("founding", ["waits for more", "is over"])
@pytest.mark.parametrize("cls", [ob.methods.ADPSGD, ob.methods.GoSGD, ob.methods.PushGossip], ids=lambda c: c.__name__)
def test_newcomers_who_have_states_begin_with_them_though_their_donor_has_finished(
    cls: type[ob.Method], founding: str, runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator, which does not know yet, lets them begin anew; it takes their word that they have begun."""
    forget, born, over = Peer._forget, list[int](), threading.Event()

    def forgets(peer: Any) -> None:
        """Between its state and its first word of it."""
        if peer.worker:
            born.append(peer.worker)
            over.wait(LIMIT)
        forget(peer)

    monkeypatch.setattr(Peer, "_forget", forgets)
    founders = 1 if founding == "is over" else 4
    run = runs(short(cls), founders, None, timeout=3.0)

    def gives(driver: Any) -> None:
        until(lambda: len(driver.incarnation.alive) == 2, "two newcomers")
        while len(born) < 2:
            steps(driver, 1)
        driver.leave(True)

    def steps(driver: Driver, count: int) -> None:
        for _ in range(count):
            g, loss = PROBLEM.grad(driver.x, driver.terms.worker, driver.node.step)
            driver.step(g, float(loss))

    def comes(driver: Any) -> None:
        steps(driver, 8)
        driver.leave(True)

    run.start(0, gives)
    until(
        lambda: run.errors or (0 in run.host.sessions and run.host.sessions[0].peer.step is not None), "the first one"
    )
    run.start(1, comes)
    run.start(2, comes)
    until(lambda: run.errors or 0 in run.host.finished, "the end of the donor")
    until(lambda: len(run.host.coordination.founders) == (2 if founders > 1 else 0), "the newcomers' turn")
    over.set()
    for worker in range(3, founders):
        run.start(worker, comes)
    x, trace = run.end()
    joined = [i.worker for i in trace.incidents if i.what == "joined"]
    assert sorted(joined) == list(range(max(3, founders))), run.said
    if founders == 1:  # else the last one may have begun from what the coordinator had kept, which no trace has
        torch.testing.assert_close(x, ob.rerun(trace).x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", [ob.methods.PushGossip(), ob.methods.DPSGD(topology=Ring())], ids=type)
def test_a_peer_whose_link_breaks_once_its_loop_has_ended_joins_again_to_say_so(
    method: ob.Method, runs: Callable[..., Run]
) -> None:
    """Else the run would wait for it for ever."""
    run = runs(method, 2, None)

    def breaks(driver: Any) -> None:
        for _ in range(3):
            g, loss = PROBLEM.grad(driver.x, driver.terms.worker, driver.node.step)
            driver.step(g, float(loss))
        driver.incarnation.link.hang_up()
        driver.leave(True)

    run.start(0, breaks)
    run.start(1, some(3, done=True))
    x, trace = run.end()
    assert [i.what for i in trace.incidents if i.worker == 0] == ["joined", "crashed", "joined", "left"], run.said
    assert torch.isfinite(x).all()


def test_a_state_that_a_newcomer_does_not_take_is_its_donors_again(runs: Callable[..., Run]) -> None:
    """A peer is told to welcome one that has a state already, and goes on with the weight that it has offered."""
    run = runs(ob.methods.GoSGD(), 2, None)
    ready = threading.Barrier(2)

    def gives(driver: Any) -> None:
        driver.newcomers.append((1, driver.incarnation.alive[1]["life"]))
        ready.wait(LIMIT)
        some(4, done=True)(driver)

    def has(driver: Driver) -> None:
        ready.wait(LIMIT)
        some(8, done=True)(driver)

    run.start(0, gives)
    run.start(1, has)
    x, trace = run.end()
    deeds = [deed for entry in trace.entries() if isinstance(entry, Deeds) for deed in entry.deeds]
    assert sum(deed[0] == "welcomed" for deed in deeds) == 1
    assert [deed[1][0] for deed in deeds if deed[0] == "heir"] == [0], "it came back"
    assert sum(event.worker == 0 for event in trace) >= 4
    torch.testing.assert_close(x, ob.rerun(trace).x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("cls", [ob.methods.DPSGD, ob.methods.SGP, ob.methods.ADPSGD, ob.methods.GoSGD])
def test_peers_go_on_for_a_moment_without_asking(
    cls: type[ob.Method], runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that is, comers and goers are in their rounds, and all steps are told."""
    asked: list[int] = []
    go_on = Coordination._go_on

    def count(self: Coordination, session: Any, note: dict[str, Any]) -> Any:
        asked.extend([1] if "more" not in note else [])
        return go_on(self, session, note)

    def own(steps: int) -> Callable[[Driver], None]:
        """Steps of a loop that draws minibatches of its own."""

        def act(driver: Any) -> None:
            for _ in range(steps):
                g, loss = PROBLEM.grad(driver.x, driver.terms.worker, driver.node.step)
                time.sleep(0.002)
                driver.step(g, float(loss))
            driver._hang_up() if steps < 100 else driver.leave(done=True)

        return act

    monkeypatch.setattr(coordinator, "MOMENT", 1e9)
    monkeypatch.setattr(coordinator, "MOST", 25)
    monkeypatch.setattr(Coordination, "_go_on", count)
    run = runs(cls(), 3, None)
    for worker, steps in enumerate((300, 300, 40)):
        run.start(worker, own(steps))
    until(lambda: run.errors or sum(run.host.steps.values()) >= 200, "200 gradients")
    run.start(3, own(100))
    x, trace = run.end()
    assert torch.isfinite(x).all()
    assert {(2, "crashed"), (3, "joined")} <= {(i.worker, i.what) for i in trace.incidents}
    assert [int((trace.column("worker") == worker).sum()) for worker in (0, 1, 3)] == [300, 300, 100]
    assert len(asked) < len(trace) / 4
    assert not trace.column("waited").isnan().any()


def test_a_peer_whose_lives_all_end_in_vain_gives_up(runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that answers no request is not dialled for ever."""

    def none(*about: Any) -> None:
        raise LinkLost("the link is broken")

    monkeypatch.setattr("offbeat.runtime.worker.LIVES", 3)
    monkeypatch.setattr(Coordination, "_go_on", none)
    run = runs(ob.methods.LocalSGD(period=2), 1, None)
    run.start(0, lambda driver: train(driver, PROBLEM))
    (error,) = until(lambda: run.errors, "its giving up", 30)
    assert isinstance(error, LinkLost)
    assert "3 lives in a row have ended before anything that they brought was taken" in str(error)


def test_a_coordinator_starts_again_from_its_snapshot(runs: Callable[..., Run], tmp_path: Path) -> None:
    """Peers dial again and go on from the mean that was kept last."""
    run = runs(ob.methods.LocalSGD(period=2), 2, 400, every=0.2)
    for i in range(2):
        run.start(i, lambda driver: train(driver, PROBLEM, ob.Fixed(0.004)))
    until(
        lambda: snapshot.found(run.folder / "snapshots") and run.host.leases.done > 20,
        "a snapshot in the middle of the run",
    )
    port = run.host.port
    run.host.stop()
    run.threads[0].join(60)
    again = Coordinator(run.terms, TOKEN, run.folder, read, heard(run.said), port=port)
    assert again.resume()
    assert again.leases.done > 0
    run.host = again
    run.threads[0] = threading.Thread(target=again.run, daemon=True)
    run.threads[0].start()
    x, _ = run.end()
    assert again.leases.done == 400
    assert PROBLEM.evaluate(x)["loss"] < PROBLEM.evaluate(PROBLEM.x0())["loss"]
    assert any("resumed from" in text for text in run.said)


@pytest.mark.parametrize(
    ("method", "kind"),
    [(ob.methods.DPSGD(), Coordinator), (ob.methods.DiLoCo(), Coordinator), (ob.methods.ASGD(), RunServer)],
)
def test_a_host_is_of_the_kind_that_its_snapshot_needs(tmp_path: Path, method: ob.Method, kind: type) -> None:
    """Its method may have been named by a worker, which does not name it again."""
    snapshot.write(tmp_path / "snapshots", 1, {"method": repr(method)})
    again = resumed(Terms(None, 100), tmp_path, read, heard())
    assert again == Terms(method, 100)
    assert host_for(again) is kind
    assert resumed(Terms(None, 100), tmp_path / "none", read, heard()) == Terms(None, 100)


# ---------------------------------------------------------------- what is conserved


class Ledger:
    """Follows the weights of push-sum and of GoSGD through all lives of all peers, while links break.

    What a life has when it ends is its estate: its state, and what had come and was not taken. A message is in one of these,
    but for those whose sender or receiver died meanwhile: ``limbo`` are those that nobody has, ``twice`` those that somebody
    has beside one who is dead. What moves a weight is seen under the monitor of the peer that has it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: ob.Method, faults: float) -> None:
        self.lock, self.rng, self.faults = threading.Lock(), Random(5), faults
        self.peers: set[Peer] = set()
        self.founders, self.created, self.again = 0, 0.0, 0  # created: by welcomes; again: messages that came once more
        self.estates: dict[tuple[int, int], float] = {}
        self.stayed: set[tuple[int, int]] = set()  # lives that were there when the run was done
        self.cut: set[int] = set()  # workers of whom a life was ended
        self.sent: dict[tuple[int, int, int], tuple[Kind, float]] = {}
        self.came: set[tuple[int, int, int]] = set()  # messages that were acknowledged
        self.kept: set[tuple[int, int, int]] = set()  # those that their senders have again
        self.had: dict[tuple[int, int, int], set[tuple[int, int]]] = {}  # who has taken a message
        cls, welcome = type(method), type(method).welcome
        bring, post, confirmed = Peer._bring, Peer._post, Peer._confirmed
        exchange, take, did, hang_up = Peer._exchange, Peer._take, Incarnation.did, Peer._hang_up
        ledger = self

        class Taken(dict[tuple[int, int], tuple[int, Any]]):
            """`Peer.taken` of one life, which is written when a message is taken."""

            def __init__(self, peer: Any) -> None:
                super().__init__()
                self.peer = peer

            def __setitem__(self, key: tuple[int, int], last: tuple[int, Any]) -> None:
                if last[0] > self.get(key, (0, None))[0]:
                    taker = tuple(self.peer.incarnation.head[2:4])
                    ledger.had.setdefault((*key, last[0]), set()).add(taker)
                super().__setitem__(key, last)

        def welcomes(method: Any, w: Any) -> Any:
            kept, new = welcome(method, w)
            with self.lock:
                self.created += float(kept.weight + new.weight - w.weight)
            return kept, new

        def exchanges(peer: Any, kind: Kind, to: int, msg: Any, *rest: Any) -> Any:
            self.sent[(*peer.incarnation.head[2:4], peer.numbers + 1)] = kind, float(msg[1])
            return exchange(peer, kind, to, msg, *rest)

        def brings(peer: Any, own: Any, links: Any, number: int, kind: Kind, to: int, msg: Any, *rest: Any) -> Any:
            self.sent[(*own.head[2:4], number)] = kind, float(msg[1])
            frame = bring(peer, own, links, number, kind, to, msg, *rest)
            if frame is not None and frame.header.kind == Kind.ANSWER:
                self.came.add((*own.head[2:4], number))
            return frame

        def posts(peer: Any, to: int, msg: Any, note: Any) -> bool:
            going = post(peer, to, msg, note)
            which = (*peer.incarnation.head[2:4], peer.numbers)
            self.sent[which] = Kind.SEND, float(msg[1])
            if not going:
                self.kept.add(which)
            return going

        def is_confirmed(peer: Any, posted: Any) -> bool:
            came = confirmed(peer, posted)
            if came:
                self.came.add((*posted.head[2:4], posted.head.version))
            return came

        def takes(peer: Any, own: Any, link: Link, frame: Frame) -> None:
            """The acknowledgement is lost now and then."""
            with self.lock:
                self.again += peer.taken.get(frame.header[2:4], (0, None))[0] >= frame.header.version
                if self.rng.random() < self.faults:
                    link.hang_up()
            take(peer, own, link, frame)

        def does(own: Any, *deed: Any) -> None:
            if deed[0] == "kept":
                self.kept.update(deed[1])
            elif deed[0] == "heir" and tuple(deed[1][:2]) == own.head[2:4]:  # its own, which no newcomer took
                self.kept.add(tuple(deed[1]))
            did(own, *deed)

        def hangs_up(peer: Any) -> None:
            own = peer.incarnation
            with peer.monitor:
                if own.head.incarnation and not own.over.is_set():
                    life = own.head[2:4]
                    held = [entry.message[1] for entry in peer.inbox]
                    if peer.state is not None:
                        held.append((peer.node.state if peer.born else peer.state[0]).weight)
                        self.founders += peer.donor is None
                    self.estates[life] = float(sum(held))
                    if peer.done:
                        self.stayed.add(life)
                hang_up(peer)

        def starts(peer: Any, taken: Any) -> None:
            peer.__dict__["taken"] = Taken(peer)

        monkeypatch.setattr(cls, "welcome", welcomes)
        monkeypatch.setattr(Peer, "_exchange", exchanges)
        monkeypatch.setattr(Peer, "_bring", brings)
        monkeypatch.setattr(Peer, "_post", posts)
        monkeypatch.setattr(Peer, "_confirmed", is_confirmed)
        monkeypatch.setattr(Peer, "_take", takes)
        monkeypatch.setattr(Incarnation, "did", does)
        monkeypatch.setattr(Peer, "_hang_up", hangs_up)
        monkeypatch.setattr(Peer, "taken", property(lambda peer: peer.__dict__["taken"], starts), raising=False)

    def breaks(self, over: threading.Event, lives: int) -> None:
        """Break links between peers, and ``lives`` times one to the coordinator, until it is over."""
        while not over.wait(0.004):
            peer = self.rng.choice(list(self.peers) or [None])
            if peer is None or peer.incarnation.over.is_set() or not peer.incarnation.head.incarnation:
                continue
            for link in (
                self.rng.sample(
                    [
                        *(link for _, link in list(peer.links.links.values())),
                        *(caller.link for caller in list(peer.callers.incoming)),
                    ],
                    1,
                )
                if peer.links.links
                else ()
            ):
                link.hang_up()
            if lives and self.rng.random() < 0.02:
                lives -= 1
                self.cut.add(peer.incarnation.head.worker)
                peer.incarnation.link.hang_up()

    def check(self) -> None:
        limbo = twice = 0.0
        heirs = {which[:2] for which, (kind, _) in self.sent.items() if kind == Kind.HEIR and which in self.had}
        total = sum(estate for life, estate in self.estates.items() if life not in heirs)
        for which, (kind, weight) in self.sent.items():
            had = self.had.get(which, set())
            assert len(had) <= 1 or kind == Kind.HEIR, (
                f"{which} was taken by {had}"
            )  # an heir may die before it says so
            assert had or which not in self.came, f"{which} was acknowledged, and nobody has it"
            holders = len(had) + (which in self.kept)
            assert len(had & self.stayed) + (which in self.kept and which[:2] in self.stayed) <= 1, f"{which}: {had}"
            if kind == Kind.HEIR:  # where nobody has it, it is its sender's estate
                holders = max(1, holders)
            limbo += weight * (holders == 0)
            twice += weight * max(0, holders - 1)
        expected = self.founders + self.created
        assert abs(total + limbo - twice - expected) < 1e-9, (total, limbo, twice, expected)


@pytest.mark.parametrize("lives", [0, 3], ids=["links break", "lives end, too"])
@pytest.mark.parametrize("cls", [ob.methods.SGP, ob.methods.OSGP, ob.methods.GoSGD], ids=lambda cls: cls.__name__)
def test_no_weight_is_lost_or_doubled_among_the_living(
    cls: type[ob.Method], lives: int, runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peers come, leave and die, links break at any moment, acknowledgements are lost: what all have in the end, and what the
    dead had, is 1 for each founder and what welcomes have made.
    """
    method = cls()
    ledger, over = Ledger(monkeypatch, method, 0.05), threading.Event()
    run = runs(method, 4, 400)

    def known(act: Callable[[Driver], None]) -> Callable[[Driver], None]:
        def live(driver: Any) -> None:
            ledger.peers.add(driver)
            act(driver)

        return live

    stay = known(lambda driver: train(driver, PROBLEM, ob.Fixed(0.005)))
    breaker = threading.Thread(target=ledger.breaks, args=(over, lives), daemon=True)
    try:
        for worker, act in enumerate((stay, stay, known(some(20)), known(dies(30)))):
            run.start(worker, act)
        breaker.start()
        late(stay, 120, run, 4)
        late(stay, 200, run, 2)
        run.end()
    finally:
        over.set()
        breaker.join(10)
    ledger.check()
    assert ledger.founders >= 4
    assert ledger.again > 5
    left = [i.seconds for i in run.trace.incidents if (i.worker, i.what) == (2, "left")]
    if 2 not in ledger.cut and left[0] < run.trace[-1].seconds:  # it has left, and somebody was there to take over
        assert any(ledger.sent[which][0] == Kind.HEIR for which in ledger.came)


# ---------------------------------------------------------------- the user's own optimizer


OPTIMIZERS: dict[str, tuple[Callable[..., Any], ob.Rule]] = {
    "SGD": (
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
        ob.SGD(0.05, momentum=0.9, nesterov=True),
    ),
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=0.01), ob.AdamW(0.01)),
}


@pytest.mark.parametrize("buffering", ["maintain", "reset", "average"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_users_optimizer_takes_the_steps_of_the_rule_of_its_name(name: str, buffering: str) -> None:
    torch.manual_seed(0)
    make, rule = OPTIMIZERS[name]
    mine = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    theirs = copy.deepcopy(mine)
    slow = {"period": 4, "beta": 0.5, "buffering": buffering}
    a = ob.Replica(mine, ob.methods.SlowMo(**slow), optimizer=make(mine.parameters()))
    b = ob.Replica(theirs, ob.methods.SlowMo(ob.Local(rule), **slow))
    for _ in range(30):
        x = torch.randn(8, 5).double()
        for model, replica in ((mine, a), (theirs, b)):
            model(x).square().mean().backward()
            replica.step()
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_the_users_optimizer_gets_gradients_as_they_are_made() -> None:
    """Sparse ones stay sparse, and a parameter without one is left alone, as in plain torch."""
    ours = nn.ModuleList([nn.Embedding(6, 4, sparse=True), nn.Embedding(6, 4, sparse=True)])
    theirs = copy.deepcopy(ours)
    optimizers = [torch.optim.SparseAdam(list(m.parameters()), lr=0.1) for m in (ours, theirs)]
    replica = ob.Replica(ours, ob.methods.LocalSGD(period=2), optimizer=optimizers[0])
    for step in range(6):
        words = torch.tensor([step % 3, 4])
        for model in (ours, theirs):
            model[step == 4](words).square().sum().backward()
        assert ours[step == 4].weight.grad.is_sparse
        replica.step()
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert ours[0].weight.grad is None
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)


def test_an_optimizer_that_cannot_take_the_steps_is_refused() -> None:
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"ASGD has no local rule .* leave the optimizer out"):
        ob.Replica(model, ob.methods.ASGD(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="BackupWorkers has no local rule"):
        ob.Replica(model, ob.methods.BackupWorkers(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="the optimizer has 2 trainable parameters, of which 0 are the model's"):
        ob.Replica(model, ob.methods.LocalSGD(), optimizer=torch.optim.SGD(other.parameters(), lr=0.1))


def test_replicas_are_equal_after_an_average_though_a_scaler_skips_steps(runs: Callable[..., Run]) -> None:
    """One of two workers has an overflow in each block: it skips the step, not the average."""
    run = runs(ob.methods.LocalSGD(period=3), 2, None)
    models: dict[int, list[Tensor]] = {0: [], 1: []}

    def live(worker: int) -> None:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        place = replace(run.place, worker=worker)
        replica = ob.Replica(model, run.method, optimizer=optimizer, place=place)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1000)
        for k in range(12):
            x = torch.full((3, 4), 0.1 * (k + 1) * (worker + 1))
            loss = model(x).square().mean() * (float("inf") if worker == 1 and k % 3 == 1 else 1.0)
            scaler.scale(loss).backward()
            scaler.step(replica)
            scaler.update()
            if k % 3 == 2:
                models[worker].append(replica.flat.held.clone())
        replica.leave()

    for i in range(2):
        run.script(live, i)
    run.end()
    assert len(models[0]) == len(models[1]) == 4
    for a, b in zip(models[0], models[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    assert not torch.equal(models[0][0], models[0][1])


# ---------------------------------------------------------------- where a run is


def test_torchrun_and_slurm_say_where_a_run_is() -> None:
    torchrun = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000"}
    assert Place.read(torchrun) == Place(("10.0.0.1:5001",), worker=2)
    assert Place.read({**torchrun, "RANK": "0"}) == Place(("10.0.0.1:5001",), worker=0, hosts=4)
    slurm = {"SLURM_PROCID": "1", "SLURM_NTASKS": "3", "SLURM_JOB_NODELIST": "gpu[03-05,09],x", "SLURM_JOB_ID": "70001"}
    assert Place.read(slurm) == Place(("gpu03:29401",), worker=1)
    ours = {"OFFBEAT_SERVER": "h:1", "OFFBEAT_WORKER": "7", "OFFBEAT_TOKEN": "t", "OFFBEAT_PATIENCE": "3"}
    place = Place.read({**torchrun, **ours, "OFFBEAT_TOKEN": "a secret"})
    assert place == Place(("h:1",), "a secret", 7, patience=3.0)
    assert "a secret" not in repr(place)
    alone = {**slurm, "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    assert Place.read(alone) == Place.read({**torchrun, "RANK": "0", "WORLD_SIZE": "1"}) == Place()
    assert Place.read({}) == Place()
    with pytest.raises(ValueError, match="OFFBEAT_WORKER = 'x': must be a number"):
        Place.read({"OFFBEAT_WORKER": "x"})


@pytest.mark.parametrize(("nodes", "first"), [("a", "a"), ("a,b", "a"), ("n[1-4]", "n1"), ("n[007,9],m", "n007")])
def test_the_first_node_of_a_slurm_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


SCRIPT = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import offbeat as ob
torch.set_num_threads(1)
torch.manual_seed(0)
data = TensorDataset(torch.randn(64, 5), torch.randn(64, 2))
model = nn.Linear(5, 2)
replica = ob.Replica(model, METHOD)
count = 0
for _ in range(2):
    for x, y in replica.shard(DataLoader(data, batch_size=4)):
        nn.functional.mse_loss(model(x), y).backward()
        replica.step()
        count += 1
print(f"took {count}\\n", end="", flush=True)
"""


@pytest.mark.parametrize("method", ["ob.methods.SGP()", "ob.methods.ADPSGD()", "ob.methods.DanaZero(0.01)"])
def test_a_script_under_torchrun(method: str, processes: Processes, tmp_path: Path) -> None:
    """Nothing is said but the method, in the script; rank 0 hosts the run."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("METHOD", method))
    port = str(20_000 + os.getpid() % 10_000)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, str(script)]
    done = processes.start(*command, OFFBEAT_OUT=str(tmp_path / "out"), OMP_NUM_THREADS="1")
    assert processes.ends(done) == 0, processes.said(done)
    counts = [int(line.split()[1]) for line in processes.said(done).splitlines() if line.startswith("took")]
    assert len(counts) == 2, processes.said(done)
    assert sum(counts) == 2 * 16
    assert (tmp_path / "out" / "model.pt").exists()


# ---------------------------------------------------------------- the user's own schedule


PERIOD, BLOCKS, WORKERS = 3, 4, 2


def slow_mo_by_hand(model: nn.Module, data: Tensor, gammas: Callable[[list[float]], float]) -> Tensor:
    """Where workers end who all take the steps of `Paced`, and then SlowMo's: alpha = 0.8, beta = 0.5, buffers emptied."""
    x = nn.utils.parameters_to_vector(model.parameters()).detach()
    u = torch.zeros_like(x)
    crew = [Paced(copy.deepcopy(model)) for _ in range(WORKERS)]
    for block in range(BLOCKS):
        steps = range(block * PERIOD, (block + 1) * PERIOD)
        rates = [[one.step(data[i, k], one.optimizer.step) for k in steps] for i, one in enumerate(crew)]
        assert rates[0] == rates[1]
        gamma = gammas(rates[0])
        ends = [nn.utils.parameters_to_vector(one.model.parameters()).detach() for one in crew]
        u = 0.5 * u + (x - torch.stack(ends).mean(0)) / gamma
        x = x - 0.8 * gamma * u
        for one in crew:
            nn.utils.vector_to_parameters(x.clone(), one.model.parameters())
            one.optimizer.state.clear()
    return x


class Paced:
    """A model with momentum, a rate that changes at each step, gradients of two minibatches, and clipping."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda k: min(k + 1, 5) / 5 / (1 + 0.1 * k))

    def step(self, minibatches: Tensor, take: Callable[[], object]) -> float:
        """One step, and its rate."""
        for x in minibatches:
            (self.model(x).square().mean() / len(minibatches)).backward()
        assert nn.utils.clip_grad_norm_(self.model.parameters(), 0.05) > 0.05
        rate = self.scheduler.get_last_lr()[0]
        take()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return rate


def test_slow_mo_takes_the_rates_of_the_users_scheduler(runs: Callable[..., Run]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    data = 1 + torch.randn(WORKERS, PERIOD * BLOCKS, 2, 4, 5, dtype=torch.float64)  # two minibatches of 4 for each step
    run = runs(ob.methods.SlowMo(alpha=0.8, beta=0.5, period=PERIOD), WORKERS, None)
    ends: dict[int, Tensor] = {}

    def live(worker: int, mine: nn.Module) -> None:
        one = Paced(mine)
        place = replace(run.place, worker=worker)
        replica = ob.Replica(mine, run.method, optimizer=one.optimizer, place=place)
        for minibatches in data[worker]:
            one.step(minibatches, replica.step)
        ends[worker] = nn.utils.parameters_to_vector(mine.parameters()).detach().clone()
        replica.leave()

    for i in range(WORKERS):
        run.script(live, i, copy.deepcopy(model))
    run.end()
    wanted = slow_mo_by_hand(model, data, lambda rates: sum(rates) / len(rates))
    for i in range(WORKERS):
        torch.testing.assert_close(ends[i], wanted, rtol=0, atol=1e-9)
    assert (slow_mo_by_hand(model, data, lambda rates: rates[0]) - wanted).abs().max() > 1e-4, "or nothing is shown"


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "remote"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_users_optimizer_steps_between_visits_to_a_server(name: str, alone: bool, runs: Callable[..., Run]) -> None:
    make, rule = OPTIMIZERS[name]
    torch.manual_seed(0)
    mine = nn.Linear(5, 3).double()
    theirs = copy.deepcopy(mine)
    method = ob.methods.AsyncLocalSGD(rule, period=3)
    run = None if alone else runs(method, 1, None)
    place = Place() if run is None else replace(run.place, worker=0)
    optimizer = make(mine.parameters())
    a = ob.Replica(mine, method, optimizer=optimizer, place=place)
    b = ob.Replica(theirs, method, place=Place())
    for _ in range(12):
        x = torch.randn(8, 5).double()
        for model, replica in ((mine, a), (theirs, b)):
            model(x).square().mean().backward()
            replica.step()
    a.leave()
    if run is not None:
        run.end()
    torch.testing.assert_close(mine.weight, theirs.weight, rtol=0, atol=1e-12)
    assert optimizer.state, "it has taken the steps"
