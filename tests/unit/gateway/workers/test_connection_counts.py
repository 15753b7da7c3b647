"""Connection counts of a gateway's workers, in memory that they share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from forebay.gateway.workers.connection_counts import ConnectionCounts, most_to_accept


@pytest.fixture
def counts() -> Iterator[ConnectionCounts]:
    made = ConnectionCounts(3)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("open_", "most"), [([0], 1), ([0, 7], 1), ([3, 5, 4], 4), ([15, 90], 16), ([16, 90], 18), ([1_000, 1_001], 1_125)]
)
def test_a_worker_accepts_with_one_more_than_the_least_or_an_8th_more(open_: list[int], most: int) -> None:
    assert most_to_accept(open_) == most


def test_a_worker_that_has_published_nothing_or_has_withdrawn_is_none_of_the_others(counts: ConnectionCounts) -> None:
    assert counts.others(0) == {}
    counts.publish(1, 5)
    counts.publish(2, 0)
    assert counts.others(0) == {1: 5, 2: 0}
    counts.withdraw(1)
    assert counts.others(0) == {2: 0}


def test_a_worker_shows_that_it_lives_though_its_count_stays(counts: ConnectionCounts) -> None:
    counts.publish(1, 5)
    before = counts.turns(1)
    counts.publish(1, 5)
    assert counts.turns(1) != before


def is_woken(counts: ConnectionCounts, number: int) -> bool:
    """Return whether a worker has been woken; it is not any more then."""
    try:
        return bool(os.read(counts.waker(number), 1))
    except BlockingIOError:
        return False


def test_only_a_worker_that_waits_and_whose_turn_it_is_is_woken(counts: ConnectionCounts) -> None:
    counts.publish(0, 4)
    counts.publish(1, 5)
    counts.wake(4, [0])
    assert not is_woken(counts, 0)  # it does not wait
    counts.wait(0)
    counts.wait(1)
    counts.wait(2)
    counts.wake(4, [0, 1, 2])
    assert [is_woken(counts, number) for number in range(3)] == [True, False, False]  # 1 has more, 2 accepts none
    counts.end_wait(0)
    counts.wake(4, [0])
    assert not is_woken(counts, 0)


def test_a_worker_that_dies_while_it_waits_is_not_woken_any_more(counts: ConnectionCounts) -> None:
    counts.publish(1, 0)
    counts.wait(1)
    counts.withdraw(1)
    counts.publish(1, 0)  # the one that replaces it
    counts.wake(4, [1])
    assert not is_woken(counts, 1)


def test_a_worker_that_is_woken_many_times_while_it_hangs_holds_up_nobody(counts: ConnectionCounts) -> None:
    counts.publish(1, 0)
    counts.wait(1)
    for _ in range(100_000):  # more than a pipe holds
        counts.wake(4, [1])
    assert is_woken(counts, 1)
