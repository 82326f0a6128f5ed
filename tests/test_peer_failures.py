"""What goes wrong inside of a peer: its script is told, at once, and the others go on."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from crew import heard, until
from test_peers import Run, runs, some
from torch import Tensor

import offbeat as ob
from offbeat.runtime.averages import Averages
from offbeat.runtime.incarnation import Incarnation
from offbeat.runtime.link import Link, LinkLost
from offbeat.runtime.links import Links as PeerLinks
from offbeat.runtime.protocol.wire import Corrupt, Header, Kind
from offbeat.runtime.worker import Driver

__all__ = ["runs"]  # a fixture


def test_a_word_of_the_coordinator_that_makes_no_sense_ends_the_script(
    runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """News without a note raise in the thread that reads them, which says so while its link is open: else the loop may see first
    that this is closed, and begin another life."""
    fail, places = Incarnation.fail, list[int]()
    monkeypatch.setattr(
        Incarnation, "fail", lambda own, error: (places.append(own.link.sock.fileno()), fail(own, error))[1]
    )
    run = runs(ob.methods.DPSGD(), 1, None)
    waits = threading.Event()

    def act(driver: Driver) -> None:
        waits.wait(60)
        some(10**9)(driver)

    run.start(0, act)
    session = until(lambda: run.host.sessions.get(0), "the worker")
    until(lambda: run.host.running and (session.peer.welcomed or run.host.coordination.membership.here), "its state")
    session.link.send(session.head._replace(kind=Kind.NEWS))
    waits.set()
    (error,) = until(lambda: run.errors, "the error of the thread", 30)
    assert isinstance(error, TypeError)
    assert error.__notes__ == ["raised in a thread of worker 0, which cannot go on"]
    assert places[0] >= 0


def test_a_method_that_cannot_begin_ends_the_script(runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that gets the first model makes the first state."""
    init, main = ob.methods.DPSGD.init, set[int]()

    def first_only(method: Any, x: Tensor) -> Any:
        if threading.get_ident() not in main:
            raise MemoryError("no room for the state")
        return init(method, x)

    monkeypatch.setattr(ob.methods.DPSGD, "init", first_only)
    run = runs(ob.methods.DPSGD(), 1, None)
    enter = run.enter
    monkeypatch.setattr(run, "enter", lambda worker: (main.add(threading.get_ident()), enter(worker))[1])
    run.start(0, some(1))
    (error,) = until(lambda: run.errors, "the error of the thread", 30)
    assert isinstance(error, MemoryError)


@pytest.mark.parametrize(("cls", "handler"), [(ob.methods.ADPSGD, "meet"), (ob.methods.GoSGD, "inherit")])
def test_a_handler_that_raises_ends_its_own_worker_and_no_other(
    cls: type[ob.Method], handler: str, runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer that brought the message is told, and does not bring it again and again."""
    good, armed, error = getattr(cls, handler), threading.Event(), ZeroDivisionError("a mistake in a method")

    def bad_once(method: Any, *args: Any) -> Any:
        if armed.is_set():
            armed.clear()
            raise error
        return good(method, *args)

    monkeypatch.setattr(cls, handler, bad_once)
    run = runs(cls(), 3, None)
    everybody = threading.Barrier(3, armed.set)

    def act(driver: Driver) -> None:
        everybody.wait(60)
        some(8 if driver.terms.worker == 2 else 40, done=driver.terms.worker != 2)(driver)

    for worker in range(3):
        run.start(worker, act)
    until(lambda: run.errors, "the error of the handler", 30)
    for thread in run.threads[1:]:
        until(lambda thread=thread: not thread.is_alive(), "the others' end", 60)
    assert run.errors == [error]
    assert any(
        "has failed, and takes no message: ZeroDivisionError('a mistake in a method')" in text for text in run.said
    )


def test_a_first_frame_that_makes_no_sense_is_a_link_that_is_lost(
    runs: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is dialled again, as one that breaks."""
    recv, bad = Link.recv, [1]

    def once(link: Link, due: Any, what: str, *rest: Any, **how: Any) -> Any:
        if what == "its welcome" and bad:
            bad.pop()
            raise Corrupt("bytes that are no header")
        return recv(link, due, what, *rest, **how)

    monkeypatch.setattr(Link, "recv", once)
    run = runs(ob.methods.DPSGD(), 1, None)
    run.start(0, some(3, done=True))
    run.end()
    assert not bad


def test_a_link_may_be_dropped_by_two_threads_at_once() -> None:
    closed = []

    class Links(dict[int, Any]):
        """Another thread drops the link just after somebody has looked for it."""

        def __contains__(self, to: object) -> bool:
            found = super().__contains__(to)
            self.pop(to, None)
            return found

    link = type("Closing", (), {"close": lambda self: closed.append(self)})()
    peer: Any = type("Dropping", (), {"links": Links({3: (1, link)})})()
    PeerLinks.drop(peer, 3)
    PeerLinks.drop(peer, 3)
    assert closed == [link]


def test_who_comes_to_a_circle_that_has_broken_is_sent_away() -> None:
    """Its first member waits for the second, who has died, while the third has dialled: that one gets no welcome any more, and
    sees it at once."""
    own = Incarnation(threading.RLock(), heard())
    own.head, own.timeout = Header(Kind.HELLO, worker=0, incarnation=1), 30.0
    averages = Averages(own, PeerLinks(own, "token"), torch.device("cpu"), lambda note, what: {})
    for come in ("before", "after"):
        here, there = socket.socketpair()
        link, hello = Link(here, "worker 2", 30.0), Header(Kind.HELLO, worker=2, incarnation=3)
        if come == "before":
            averages.join(link, "7", hello)
            with pytest.raises(LinkLost, match="worker 1 is gone"):
                averages._circle("7", (0, 1, 2), 8)
        else:
            with pytest.raises(LinkLost, match="has broken"), contextlib.closing(link):
                averages.join(link, "7", hello)
        there.settimeout(30)
        assert there.recv(1) == b"", "it is hung up"
        there.close()
