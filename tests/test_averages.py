"""Averages that members could not take in the group that they had: pure bookkeeping."""

from __future__ import annotations

import offbeat as ob
from offbeat.core.membership import Membership, membership
from offbeat.runtime.protocol.averages import Averages, Seat


def averages(*workers: int) -> tuple[Membership[Seat], Averages]:
    """Of a run that these have founded."""
    members: Membership[Seat] = membership(ob.methods.AllReduce())
    members.found([Seat(worker, worker + 1, f"h:{worker}", "here") for worker in workers])
    return members, Averages(members)


def leave(members: Membership[Seat], among: Averages, worker: int) -> None:
    members.leave(worker)
    among.gone(worker)


def begin(members: Membership[Seat], among: Averages, worker: int, step: int) -> None:
    members.begin(worker, step)
    among.begun(worker, step)


def test_an_average_that_a_death_breaks_is_taken_again_without_the_dead() -> None:
    members, among = averages(0, 1, 2)
    first = [among.ask(worker, (0, 1, 2), (1, 0)) for worker in (0, 1, 2)]
    assert first[0] is first[1] is first[2]
    assert first[0].ranks == (0, 1, 2)
    again = among.ask(0, (0, 1, 2), (1, 0))
    assert again is not first[0]
    assert again.group != first[0].group
    leave(members, among, 2)
    assert not again.settled
    assert among.ask(1, (0, 1, 2), (1, 0)).ranks == again.ranks == (0, 1)
    assert not among.open


def test_one_that_could_not_take_an_average_gets_it_from_one_that_has_it() -> None:
    members, among = averages(0, 1, 2)
    average = among.ask(1, (0, 1, 2), (1, 0))
    leave(members, among, 2)
    assert not average.settled
    begin(members, among, 0, 1)
    assert average.holder == 0
    later = among.ask(1, (0, 1), (2, 0))
    assert later.holder is None
    among.ask(0, (0, 1), (2, 1))  # the second one of that round
    assert later.holder == 0


def test_nobody_waits_for_the_dead_to_average() -> None:
    members, among = averages(0, 1)
    average = among.ask(0, (0, 1), (1, 0))
    assert not average.settled
    leave(members, among, 1)
    assert average.ranks == (0,)


def test_one_that_asked_and_went_has_not_asked_when_it_comes_back() -> None:
    """The others wait for the one that is there now, which takes no part in that average."""
    members, among = averages(0, 1, 2)
    among.ask(0, (0, 1, 2), (1, 0))
    leave(members, among, 0)
    members.enter(Seat(0, 9, "h:0", "here"))
    average = among.ask(1, (0, 1, 2), (1, 0))
    assert not average.settled
    assert among.ask(2, (0, 1, 2), (1, 0)) is average
    assert average.ranks == (1, 2)
