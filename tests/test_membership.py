"""Who takes part in which round: the laws of `Membership`, for peers that come, go and die in any order."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import offbeat as ob
from offbeat.core.membership import FreeMembership, Membership, RoundMembership, membership
from offbeat.core.topology import Members, Ring


@dataclass(eq=False)
class Peer:
    """A participant and nothing more."""

    id: int
    since: int = 0
    step: int = 0


ROUNDS = ob.methods.DPSGD(topology=Ring())
BLOCKS = ob.methods.LocalSGD(period=3)
FREE = ob.methods.GoSGD()
NUMBERS = st.integers(0, 5)


def begun(method: ob.Method, *peers: int, step: int = 0) -> Membership[Peer]:
    """The membership of a run that these have founded."""
    members: Membership[Peer] = membership(method)
    members.found([Peer(i) for i in peers], step)
    return members


def names(peers: list[Peer]) -> list[int]:
    return [peer.id for peer in peers]


# ---------------------------------------------------------------- single laws


def test_each_method_without_a_server_has_its_membership() -> None:
    for method in (ob.methods.ADPSGD(), FREE):
        assert isinstance(membership(method), FreeMembership)
    for method in (ROUNDS, BLOCKS, ob.methods.AllReduce(), ob.methods.SlowMo(ob.methods.SGP(), period=3)):
        assert isinstance(membership(method), RoundMembership)


def test_members_are_the_same_until_somebody_comes_or_goes() -> None:
    members = begun(ROUNDS, 0, 1)
    assert members.same(3, 10) == 13
    assert members.at(12) == (0, 1)
    members.enter(Peer(2))  # from 13 on
    members.leave(0)
    members.enter(Peer(3), round=20)
    assert (members.same(5, 10), members.same(13, 3), members.same(13, 10), members.same(20, 9)) == (13, 16, 20, 29)
    assert [members.at(round) for round in (12, 13, 19, 20)] == [(0, 1), (1, 2), (1, 2), (1, 2, 3)]


def test_a_newcomer_begins_with_the_first_peer_to_reach_its_round() -> None:
    members = begun(ROUNDS, 0, 1)
    assert members.at(0) == members.at(1) == (0, 1)
    newcomer = Peer(5)
    assert members.enter(newcomer) is None
    assert newcomer.since == 2
    assert members.begin(0, 1) == []
    assert members.begin(1, 2) == [newcomer]
    assert members.begin(0, 2) == []
    assert members.at(2) == (0, 1, 5)
    assert members.leave(1) == []
    assert set(members.here) == {0, 5}, "it says itself whether it has got its state"
    assert members.leave(0) == members.leave(5) == []


def test_a_newcomer_that_waits_for_no_round_takes_part_once_it_has_a_state() -> None:
    members = begun(FREE, 3, 7)
    assert [names([donor]) for turn in range(3) if (donor := members.enter(Peer(turn), turn=turn))] == [[3], [7], [3]]
    assert members.at(0) == (3, 7)
    assert members.begin(1, 4) == []
    assert members.at(0) == (1, 3, 7)
    assert set(members.coming) == {0, 2}


@pytest.mark.parametrize("method", [ROUNDS, FREE], ids=["rounds", "free"])
def test_newcomers_that_nobody_is_left_to_welcome_begin_anew(method: ob.Method) -> None:
    members = begun(method, 0)
    members.enter(Peer(1))
    members.enter(Peer(2))
    left = members.leave(0)
    assert names(left) == [1, 2]
    assert not members.coming
    members.found(left, 7)
    assert members.at(7) == (1, 2)
    assert [peer.since for peer in left] == [7, 7]


def test_a_newcomer_begins_with_a_block() -> None:
    """Whatever round it asks for: else it would be named in an average that it has no part in."""
    members = begun(BLOCKS, 0, step=1)
    assert members.here[0].step == 3
    newcomer = Peer(1)
    members.enter(newcomer, round=7)
    assert newcomer.since == 9
    members.leave(1)
    members.enter(newcomer)
    assert newcomer.since == members.open() == 6


def test_a_new_history_does_not_wait_for_rounds_that_only_the_dead_have_asked_about() -> None:
    """The fastest of them had asked about round 9 when it died, the last one was in round 4."""
    members = begun(ROUNDS, 0, 1)
    members.begin(0, 9)
    members.at(9)
    members.begin(1, 4)
    members.at(4)
    members.leave(0)
    assert members.at(9) == (0, 1), "as it was told"
    members.leave(1)
    members.found([Peer(2), Peer(3)], 4)
    assert members.at(4) == (2, 3)
    newcomer = Peer(4)
    members.enter(newcomer)
    assert newcomer.since == 5
    members.leave(3)
    assert members.at(5) == (2, 4)


def test_the_heir_is_the_first_of_those_that_take_part() -> None:
    members = begun(FREE, 4, 2)
    members.enter(Peer(1))  # has nothing that anything could be added to
    assert members.heir() is members.here[2]
    members.leave(2)
    members.leave(4)
    assert members.heir() is None


def test_what_makes_no_sense_is_refused_by_name() -> None:
    members = begun(ROUNDS, 0)
    with pytest.raises(ValueError, match=r"workers \(0,\) are there: nobody founds"):
        members.found([Peer(1)])
    with pytest.raises(ValueError, match="worker 0 enters and is there"):
        members.enter(Peer(0))
    members.enter(Peer(1))
    with pytest.raises(ValueError, match="worker 1 enters and is there"):
        members.enter(Peer(1))
    with pytest.raises(KeyError):
        members.begin(1, 5)
    empty: Membership[Peer] = membership(FREE)
    with pytest.raises(ValueError, match="worker 3 enters where nobody takes part: it founds"):
        empty.enter(Peer(3))


# ---------------------------------------------------------------- any order


class Comings(RuleBasedStateMachine):
    """Peers that found, come, begin rounds, ask who is in them, leave and die, one step at a time."""

    @initialize(method=st.sampled_from([ROUNDS, BLOCKS, FREE]), founders=st.sets(NUMBERS, min_size=1, max_size=3))
    def set_out(self, method: ob.Method, founders: set[int]) -> None:
        self.members: Membership[Peer] = membership(method)
        self.rounds = isinstance(self.members, RoundMembership)
        self.length = 3 if method is BLOCKS else 1
        self.answers: dict[int, Members] = {}  # of this history
        self.donors: dict[int, Peer] = {}  # of newcomers that wait for no round
        self.found(founders, 0)

    def found(self, founders: set[int], step: int) -> None:
        self.answers = {}
        step = self.members.found([Peer(i) for i in sorted(founders)], step)
        assert step % self.length == 0
        assert {peer.step for peer in self.members.here.values()} == {step}

    @precondition(lambda self: not self.members.here)
    @rule(founders=st.sets(NUMBERS, min_size=1, max_size=3), step=st.integers(0, 20))
    def found_anew(self, founders: set[int], step: int) -> None:
        self.found(founders, step)

    @precondition(lambda self: self.members.here)
    @rule(who=NUMBERS, turn=st.integers(0, 9), ahead=st.integers(0, 8))
    def enter(self, who: int, turn: int, ahead: int) -> None:
        if who in self.members.here or who in self.members.coming:
            return
        newcomer, open = Peer(who), self.members.open()
        donor = self.members.enter(newcomer, open + ahead if ahead > 5 else 0, turn)
        assert (donor is None) == self.rounds
        if donor is not None:
            assert self.members.here[donor.id] is donor
            self.donors[who] = donor
        else:
            assert newcomer.since >= open
            assert newcomer.since % self.length == 0

    @precondition(lambda self: self.members.here)
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        """A peer begins its next block, and asks who takes part in it."""
        peer = self.members.here[data.draw(st.sampled_from(sorted(self.members.here)))]
        step = peer.step + self.length
        waiting = {new.id for new in self.members.coming.values() if self.rounds and new.since <= step}
        ready = self.members.begin(peer.id, step)
        assert set(names(ready)) == waiting
        assert all(new.step == new.since == step for new in ready)
        for round in range(step, min(step + self.length, self.members.same(step, 100))):
            self.ask(peer, round)
        assert self.members.same(step, self.length) == step + self.length, "a block has the same members throughout"

    @precondition(lambda self: self.members.here)
    @rule(data=st.data())
    def ask_again(self, data: st.DataObject) -> None:
        """A peer asks about the round that it is in, and again about one that has been asked about."""
        peer = self.members.here[data.draw(st.sampled_from(sorted(self.members.here)))]
        self.ask(peer, peer.step)
        if self.rounds and self.answers:
            round = data.draw(st.sampled_from(sorted(self.answers)))
            assert self.members.at(round) == self.answers[round]

    def ask(self, peer: Peer, round: int) -> None:
        members = self.members.at(round)
        assert peer.id in members
        assert members == tuple(sorted(set(members)))
        if self.rounds:
            assert self.answers.setdefault(round, members) == members

    @precondition(lambda self: self.members.coming and not self.rounds)
    @rule(data=st.data())
    def be_welcomed(self, data: st.DataObject) -> None:
        """A newcomer that waits for no round has its state, or comes anew as its donor has gone."""
        who = data.draw(st.sampled_from(sorted(self.members.coming)))
        newcomer, donor = self.members.coming[who], self.donors[who]
        if self.members.here.get(donor.id) is donor:
            self.members.begin(who, donor.step)
            assert newcomer.since == newcomer.step == donor.step
        else:
            assert self.members.leave(who) == []
            again = self.members.enter(newcomer, turn=1)
            assert again is not None
            assert again is not donor
            self.donors[who] = again

    @precondition(lambda self: self.members.here)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        who = data.draw(st.sampled_from(sorted({*self.members.here, *self.members.coming})))
        coming = [new for new in self.members.coming.values() if new.id != who]
        last = set(self.members.here) == {who}
        left = self.members.leave(who)
        assert left == (coming if last else [])
        if left:
            self.found(set(names(left)), data.draw(st.integers(0, 20)))

    @invariant()
    def each_is_in_one_place(self) -> None:
        here, coming = self.members.here, self.members.coming
        assert not here.keys() & coming.keys()
        assert all(peer.id == who for who, peer in (*here.items(), *coming.items()))
        assert here or not coming, "somebody is left to wait for"

    @invariant()
    def rounds_that_nobody_has_asked_about_name_those_who_are_there(self) -> None:
        members = self.members
        if not isinstance(members, RoundMembership):
            assert members.at(0) == tuple(sorted(members.here))
            return
        asked = members.asked
        for round in range(asked + 1, asked + 20):
            there = {peer.id for peer in (*members.here.values(), *members.coming.values()) if peer.since <= round}
            assert members.at(round) == tuple(sorted(there)) or not members.here
        members.asked = asked  # as if nobody had
        assert all(new.since > asked for new in members.coming.values())

    def teardown(self) -> None:
        """Who waits for a round begins, if only one of the others goes on."""
        if not getattr(self, "rounds", False) or not self.members.here:
            return
        peer = next(iter(self.members.here.values()))
        end = max((new.since for new in self.members.coming.values()), default=0)
        while peer.step < end:
            self.members.begin(peer.id, peer.step + self.length)
        assert not self.members.coming


Comings.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestComings = Comings.TestCase
