"""The scheduler: whatever comes and goes, in whatever order, clients take turns and nothing is lost."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_jax.errors import Busy
from paligemma_jax.serving import scheduler
from paligemma_jax.serving.scheduler import Entry

CLIENTS = "abc"
ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.sampled_from(CLIENTS), st.sampled_from([1, 3, math.inf])),
    st.tuples(st.just("admit"), st.integers(1, 4)),
    st.tuples(st.just("remove"), st.integers(0, 30)),
    st.tuples(st.just("tick")),
)


def ids(entries) -> list[int]:
    return [entry.id for entry in entries]


def filled(*requests: str, num_slots: int = 1) -> scheduler.Schedule:
    """Waiting requests of these clients, in the order in which they came."""
    schedule = scheduler.idle(num_slots, 100)
    for id_, client in enumerate(requests):
        schedule = scheduler.submit(schedule, Entry(id_, client))
    return schedule


def order(schedule: scheduler.Schedule) -> list[int]:
    """Who gets the slots, when each is given back at once."""
    found = []
    while schedule.waiting:
        schedule, admitted = scheduler.admit(schedule, 1)
        found += [entry.id for _, entry in admitted]
        schedule = scheduler.remove(schedule, found)
    return found


@given(st.lists(ACTIONS, max_size=60), st.integers(1, 4), st.integers(1, 6))
def test_nothing_is_lost_doubled_or_beyond_its_bounds(actions, num_slots, max_waiting):
    schedule, now, known, count = scheduler.idle(num_slots, max_waiting), 0, set(), 0
    for action, *arguments in actions:
        if action == "submit":
            client, seconds = arguments
            is_full = schedule.waiting == max_waiting
            try:
                schedule = scheduler.submit(schedule, Entry(count, client, now + seconds))
                known.add(count)
            except Busy:
                assert is_full
            else:
                assert not is_full
            count += 1
        elif action == "admit":
            before = schedule
            schedule, admitted = scheduler.admit(schedule, *arguments)
            free = before.slots.count(None)
            assert len(admitted) == min(free, before.waiting, *arguments)  # no slot stays free while somebody waits
            assert all(before.slots[slot] is None and schedule.slots[slot] == entry for slot, entry in admitted)
        elif action == "remove":
            schedule = scheduler.remove(schedule, set(arguments))
            known.discard(*arguments)
        else:
            now += 1
            late = set(scheduler.expired(schedule, now))
            assert late == {entry.id for entry in schedule.entries if entry.deadline <= now}
            schedule = scheduler.remove(schedule, late)
            known -= late
            assert schedule.next_deadline > now
        assert sorted(ids(schedule.entries)) == sorted(known)
        assert len(schedule.slots) == num_slots and schedule.waiting <= max_waiting
        assert all(queue and len({entry.client for entry in queue}) == 1 for queue in schedule.queues)
        assert len({queue[0].client for queue in schedule.queues}) == len(schedule.queues)


@given(st.lists(st.sampled_from(CLIENTS), min_size=1, max_size=30))
def test_clients_take_turns_and_nobody_starves(requests):
    found = order(filled(*requests))
    assert sorted(found) == list(range(len(requests)))
    for client in CLIENTS:  # each client's own requests keep their order
        own = [id_ for id_ in found if requests[id_] == client]
        assert own == sorted(own)
        # Between two of its requests everybody else has one turn at most.
        turns = [found.index(id_) for id_ in own]
        for a, b in zip([-1, *turns], turns, strict=False):
            others = [requests[id_] for id_ in found[a + 1 : b]]
            assert len(others) == len(set(others))


@pytest.mark.parametrize(
    "requests, expected",
    [
        ("aaab", [0, 3, 1, 2]),  # one who comes late waits for one answer of a crowd
        ("abab", [0, 1, 2, 3]),
        ("aabbc", [0, 2, 4, 1, 3]),
    ],
)
def test_turns_by_hand(requests, expected):
    assert order(filled(*requests)) == expected


def test_one_who_comes_back_goes_to_the_end_of_the_line():
    schedule, _ = scheduler.admit(filled("a", "b", "c"), 1)
    schedule = scheduler.remove(scheduler.submit(schedule, Entry(3, "a")), {0})
    assert order(schedule) == [1, 2, 3]


def test_what_is_over_when_it_should_be_is_over():
    schedule = scheduler.idle(1, 5)
    for id_, deadline in enumerate((2.0, math.inf, 1.0)):
        schedule = scheduler.submit(schedule, Entry(id_, str(id_), deadline))
    schedule, _ = scheduler.admit(schedule, 1)
    assert schedule.next_deadline == 1.0
    assert [scheduler.expired(schedule, now) for now in (0.9, 1.0, 2.0)] == [[], [2], [0, 2]]


def test_a_full_queue_says_how_many_wait():
    schedule = scheduler.submit(scheduler.idle(1, 1), Entry(0))
    with pytest.raises(Busy, match="1 requests are waiting"):
        scheduler.submit(schedule, Entry(1))


@given(st.lists(st.integers(0, 3), max_size=40), st.sampled_from([(1,), (2, 1), (4, 1), (8, 4, 2, 1)]))
def test_batches_are_of_one_bucket_and_of_the_sizes_of_programs(items, sizes):
    numbered = list(enumerate(items))
    found = scheduler.batches(numbered, lambda item: item[1], lambda bucket: sizes)
    assert sorted(item for batch in found for item in batch) == numbered
    assert all(len({bucket for _, bucket in batch}) == 1 and len(batch) in sizes for batch in found)


@pytest.mark.parametrize("count, expected", [(0, []), (3, [1, 1, 1]), (9, [4, 4, 1])])
def test_the_largest_batches_come_first(count, expected):
    assert scheduler.split(count, (4, 1)) == expected
