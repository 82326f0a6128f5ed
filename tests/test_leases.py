"""Leases of minibatches: each minibatch of each pass is used once, whoever stops, dies, breaks off or comes late."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offbeat.runtime.leases import COUNTED, KEPT, TASK, Grant, Lease, Leases, Opening, leases_in


def pass_(number: int, length: int | None = 4, order: str = "loader a", series: int = COUNTED) -> Opening:
    return Opening(series, number, length, order)


def crew(*workers: int, total: int | None = None) -> Leases:
    leases = Leases(total)
    for worker in workers:
        leases.join(worker)
    return leases


def got(leases: Leases, worker: int, opening: Opening, count: int = 1, **how: bool) -> list[tuple[int, int]]:
    """The passes and places of what a worker gets."""
    leases.open(worker, opening)
    return [(lease.number, lease.place) for lease in leases.take(worker, count, **how).leases]


def use(leases: Leases, worker: int) -> None:
    """It uses all that it has."""
    leases.use(worker, list(leases.held[worker]))


def test_minibatches_are_handed_out_in_order_and_what_comes_back_first() -> None:
    leases = crew(0, 1, total=7)
    assert got(leases, 0, TASK, 3) == [(0, 0), (0, 1), (0, 2)]
    assert got(leases, 0, TASK, 0) == []
    assert got(leases, 1, TASK, 2) == [(0, 3), (0, 4)]
    leases.use(0, [Lease(*TASK.key, 0)])
    assert leases.part(0) == 2
    assert got(leases, 1, TASK, 9) == [(0, 1), (0, 2), (0, 5), (0, 6)]
    assert got(leases, 1, TASK, 1) == []
    use(leases, 1)
    assert leases.done == 7


def test_a_pass_that_was_broken_off_leaves_the_next_one_whole() -> None:
    leases = crew(0)
    assert got(leases, 0, pass_(0), 3) == [(0, 0), (0, 1), (0, 2)]
    leases.use(0, [Lease(COUNTED, 0, 0)])
    leases.give_back(0, [Lease(COUNTED, 0, 1), Lease(COUNTED, 0, 2)])
    assert got(leases, 0, pass_(1), 9) == [(1, k) for k in range(4)]
    leases.join(1)
    assert got(leases, 1, pass_(0), 9) == [(0, 1), (0, 2), (0, 3)]  # who comes late has the rest of the other


def test_each_worker_that_is_there_is_kept_one() -> None:
    leases = crew(0, 1, 2)
    assert got(leases, 0, pass_(0), 9) == [(0, 0), (0, 1)]
    assert got(leases, 0, pass_(0)) == []
    assert got(leases, 1, pass_(0), 9) == [(0, 2)]
    assert got(leases, 0, pass_(1), 9) == [(1, 0), (1, 1)]
    assert got(leases, 2, pass_(0), 9) == [(0, 3)]
    assert got(leases, 0, pass_(0, series=1), 9) == [(0, k) for k in range(4)]  # one worker alone may evaluate
    short = crew(0, 1, 2)
    assert got(short, 0, pass_(0, 1), 9) == [(0, 0)]  # where there are not enough, the first to come gets it


def test_a_worker_that_does_not_come_is_waited_for_until_the_run_is_two_passes_on() -> None:
    leases = crew(0, 1)
    for number in range(2):
        assert got(leases, 0, pass_(number), 9) == [(number, k) for k in range(3)]
        assert got(leases, 0, pass_(number)) == []
        use(leases, 0)
    assert got(leases, 0, pass_(2), 9) == [(2, k) for k in range(3)]
    assert got(leases, 0, pass_(2), 9) == [(0, 3)]
    use(leases, 0)
    assert leases.is_over((COUNTED, 0))


def test_what_a_worker_dies_with_goes_along_with_a_later_pass() -> None:
    leases = crew(0, 1)
    assert got(leases, 1, pass_(0), 2) == [(0, 0), (0, 1)]
    assert got(leases, 0, pass_(0), 9) == [(0, 2), (0, 3)]
    assert got(leases, 0, pass_(0)) == []
    use(leases, 0)
    leases.part(1)
    assert got(leases, 0, pass_(1, 5), 9) == [(1, k) for k in range(5)]
    assert got(leases, 0, pass_(1, 5), 9) == []  # of another length, so of other data
    assert got(leases, 0, pass_(2), 9, own=True) == [(2, k) for k in range(4)]
    assert got(leases, 0, pass_(2), 9, own=True) == []
    assert got(leases, 0, pass_(2), 9) == [(0, 0), (0, 1)]


def test_a_worker_that_comes_late_gets_one_minibatch_of_where_the_run_is() -> None:
    leases = crew(0)
    got(leases, 0, pass_(0), 4)
    use(leases, 0)
    got(leases, 0, pass_(1), 2)
    leases.join(1)
    assert got(leases, 1, pass_(0), fed=False) == [(1, 2)]
    assert got(leases, 1, pass_(0), fed=True) == []
    assert got(leases, 1, pass_(1), 9, fed=False) == [(1, 3)]
    assert leases.take(1, 1, fed=True) == ([], "", False)


def test_a_worker_that_has_had_nothing_waits_for_those_further_on_and_they_not_for_it() -> None:
    leases = crew(0)
    assert got(leases, 0, pass_(0), 9) == [(0, k) for k in range(4)]
    leases.join(1)
    for worker, wait in ((1, True), (0, False)):
        leases.open(worker, pass_(0))
        assert leases.take(worker, 1, fed=False) == ([], "", wait)
    got(leases, 0, pass_(1))
    leases.open(1, pass_(0))
    assert leases.take(1, 1, fed=False).leases == [Lease(COUNTED, 1, 1)]
    leases.part(0)
    leases.open(1, pass_(1))
    assert not leases.take(1, 1, fed=False).wait


@pytest.mark.parametrize(
    ("opening", "why"),
    [
        (pass_(3, 8), "pass 3 has 8 minibatches at this worker and 4 at others: all workers need .* same batch_size"),
        (pass_(3, None), "pass 3 has None minibatches"),
        (pass_(3, 4, "loader b"), "pass 3 begins with other minibatches at this worker .* Draw from those"),
        (pass_(3, 4, "sequence a"), "pass 3 is over a sequence at this worker and over a loader at others"),
    ],
)
def test_another_pass_than_others_have_is_refused(opening: Opening, why: str) -> None:
    leases = crew(0, 1)
    leases.open(0, pass_(3))
    with pytest.raises(ValueError, match=why):
        leases.open(1, opening)
    assert "begins with another item" in leases.hear(0, {"open": pass_(9, None, "stream a")}).get(
        "refused", leases.hear(1, {"open": pass_(9, None, "stream b")})["refused"]
    )


def test_the_end_of_a_pass_that_one_worker_finds_is_that_of_all() -> None:
    leases = crew(0, 1)
    assert got(leases, 0, pass_(0, None), 3) == [(0, 0), (0, 1), (0, 2)]
    assert got(leases, 1, pass_(0, None), 3) == [(0, 3), (0, 4), (0, 5)]
    leases.hear(1, {"open": pass_(0, None), "end": 4, "want": 0})
    leases.give_back(1, [Lease(COUNTED, 0, 4), Lease(COUNTED, 0, 5)])
    assert leases.hear(0, {"open": pass_(0, None), "want": 5})["leases"] == []
    again = Leases()
    again.load(leases.state())
    assert again.passes[COUNTED, 0].end == 4
    use(leases, 0)
    use(leases, 1)
    assert leases.is_over((COUNTED, 0))
    assert leases.done == 4
    assert got(leases, 1, pass_(1, None), 1) == [(1, 0)]


def test_what_has_failed_twice_is_set_aside() -> None:
    leases = crew(0)
    bad = Lease(COUNTED, 0, 1)
    assert got(leases, 0, pass_(0), 2) == [(0, 0), (0, 1)]
    assert leases.fail(0, [bad]) == []
    assert got(leases, 0, pass_(0), 9) == [(0, 2), (0, 3), (0, 1)]  # last
    leases.give_back(0, [bad])  # which is no failure
    assert got(leases, 0, pass_(0), 9) == [(0, 1)]
    assert leases.fail(0, [bad]) == [bad]
    assert got(leases, 0, pass_(0), 9) == []
    use(leases, 0)
    assert leases.is_over((COUNTED, 0))
    assert leases.done == 3
    got(leases, 0, TASK)
    for _ in range(3):
        assert leases.fail(0, [Lease(*TASK.key, 0)]) == []  # a task has no data that could be at fault
        assert got(leases, 0, TASK) == [(0, 0)]


def test_the_epoch_where_the_run_is() -> None:
    leases = crew(0)
    assert leases.epoch() == 0
    leases.open(0, pass_(3, series=0))
    assert leases.epoch() == 3
    leases.take(0, 4)
    use(leases, 0)
    assert leases.epoch() == 4
    leases.open(0, pass_(3, series=1))
    assert leases.epoch() == 3
    leases.open(0, pass_(9))  # which belongs to no epoch
    assert leases.hear(0, {"epoch": True}) == {"epoch": 3, "stopped": False}


@pytest.mark.parametrize("note", [{"open": [0, "1", 2, ""]}, {"open": [1, -1, 2, ""]}, {"end": ""}])
def test_words_that_make_no_sense_are_an_error(note: dict[str, object]) -> None:
    leases = crew(0)
    leases.open(0, pass_(0))
    with pytest.raises(ValueError, match="a pass"):
        leases.hear(0, note)
    assert leases_in([[-1, 2, 3], [1, 2], "abc", [1, 2, None]]) == [Lease(-1, 2, 3)]
    assert leases_in(3) == []


def test_memory_does_not_grow_with_minibatches_or_with_passes() -> None:
    leases = crew(0)
    for number in range(3 * KEPT):  # each is broken off
        got(leases, 0, pass_(number), 2)
        use(leases, 0)
    for number in range(3 * KEPT, 6 * KEPT):  # each is whole
        got(leases, 0, pass_(number), 4)
        use(leases, 0)
    assert len(leases.passes) <= KEPT + 1
    assert sum(map(len, leases.over.values())) <= KEPT + 1
    assert leases.is_over((COUNTED, 0))
    for _ in range(1000):
        got(leases, 0, TASK)
        use(leases, 0)
    assert len(str(leases.state())) < 200 * KEPT
    assert not leases.held[0]


LENGTH, PASSES = 7, 5


def schedule(seed: int, breaks: float) -> Counter[tuple[int, int]]:
    """A run of some workers that do anything at any time; how often each minibatch counts, by its pass and place."""
    rng, leases = random.Random(seed), Leases()
    counts: Counter[tuple[int, int]] = Counter()
    at: dict[int, int] = {}  # the pass of each living worker
    fed: dict[int, bool] = {}
    failing = {(rng.randrange(PASSES), rng.randrange(LENGTH)) for _ in range(2)}
    ended = False
    while not ended:
        worker = rng.randrange(4)
        if worker not in at:
            at[worker], fed[worker] = 0, False
            leases.join(worker)
            continue
        if at[worker] == PASSES:
            ended = all(number == PASSES for number in at.values()) and len(at) == 4
            continue
        held = list(leases.held[worker])
        match rng.choices(["take", "use", "die", "snapshot", "break"], [6, 6, 0.15, 0.1, breaks])[0]:
            case "take":
                leases.open(worker, pass_(at[worker], LENGTH))
                grant = leases.take(worker, rng.randint(1, 3), fed[worker])
                fed[worker] |= bool(grant.leases)
                if not grant.leases and not held and not grant.wait:
                    at[worker], fed[worker] = at[worker] + 1, False
            case "use" if held:
                some = held[: rng.randint(1, len(held))]
                bad = [lease for lease in some if (lease.number, lease.place) in failing]
                good = [lease for lease in some if lease not in bad]
                counts.update((lease.number, lease.place) for lease in leases.fail(worker, bad) + good)
                leases.use(worker, good)
            case "die":
                assert leases.part(worker) == len(held)
                del at[worker]
            case "snapshot":  # all lives end, and a new host goes on
                state = leases.state()
                leases = Leases()
                leases.load(state)
                at.clear()
            case "break":
                leases.give_back(worker, held)
                at[worker], fed[worker] = at[worker] + 1, False
        assert leases.out == sum(map(len, leases.held.values()))
    return counts


@given(st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_each_minibatch_of_each_pass_counts_once(seed: int) -> None:
    """For any order of workers that come, go on, die and come again, and of hosts that are killed."""
    assert schedule(seed, 0.0) == {(number, place): 1 for number in range(PASSES) for place in range(LENGTH)}


@given(st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_where_passes_are_broken_off_none_counts_twice(seed: int) -> None:
    assert set(schedule(seed, 1.0).values()) == {1}


def test_how_many_minibatches_a_run_will_use_is_known_with_its_epochs() -> None:
    """All passes of an epoch together; of passes without epochs it is not known, nor of one that has no length."""
    leases = Leases()
    leases.join(0)
    assert leases.expected is None
    leases.hear(0, {"epoch": True, "of": 3})
    assert leases.expected is None
    leases.open(0, Opening(0, 0, 10, "order"))
    assert leases.expected == 30
    leases.open(0, Opening(1, 0, 4, "order"))
    assert leases.expected == 42
    leases.hear(0, {"epoch": True, "of": 5})  # of a run that goes on for longer
    assert leases.expected == 70
    for bad in (0, -1, "9", None, True, 2.5):
        leases.hear(0, {"epoch": True, "of": bad})
    assert leases.expected == 70
    bounded, counted = Leases(25), Leases()
    for one in (bounded, counted):
        one.join(0)
        one.open(0, Opening(-1, 0, 10, "order"))
    assert (bounded.expected, counted.expected) == (25, None)
    bounded.hear(0, {"epoch": True, "of": 3})
    bounded.open(0, Opening(0, 0, 10, "order"))
    assert bounded.expected == 25


def test_what_was_done_before_the_run_is_skipped_by_the_first_and_by_nobody_else() -> None:
    leases = Leases()
    for worker in (0, 1):
        leases.join(worker)
    leases.hear(0, {"epoch": True, "of": 2})
    opening = Opening(0, 3, 10, "order")
    leases.hear(0, {"open": opening, "skip": 4})
    assert leases.expected == 16
    assert [lease.place for lease in leases.take(0, 2).leases] == [4, 5]
    leases.hear(1, {"open": opening, "skip": 7})
    assert [lease.place for lease in leases.take(1, 1).leases] == [6]
    whole = Leases()
    whole.join(0)
    whole.hear(0, {"open": Opening(0, 0, 10, "order"), "skip": 99})
    assert whole.is_over((0, 0))
    assert whole.epoch() == 1
    for bad in (-1, "4", None, True, 2.5):
        leases.hear(0, {"open": Opening(0, 4, 10, "order"), "skip": bad})
    assert leases.passes[0, 4].next == 0


def test_a_run_that_is_stopped_gives_nothing_more_and_stays_so() -> None:
    leases, later = Leases(), Leases()
    for worker in (0, 1):
        leases.join(worker)
        leases.open(worker, Opening(0, 0, 10, "order"))
    held = leases.take(1, 2).leases
    assert leases.hear(0, {"epoch": True})["stopped"] is False
    leases.hear(0, {"stop": True})
    leases.use(1, held)
    assert leases.done == 2
    assert leases.take(1, 2) == Grant([])
    assert leases.hear(1, {"epoch": True})["stopped"] is True
    later.load(leases.state())
    later.join(0)
    later.open(0, Opening(0, 0, 10, "order"))
    assert later.take(0, 1) == Grant([])
