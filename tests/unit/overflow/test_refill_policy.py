"""Which stored tasks come back next: those of the best priority, but no priority starves."""

from __future__ import annotations

from collections import Counter

import pytest

from forebay.overflow import RefillPolicy
from forebay.task import Priority

CRITICAL, HIGH, NORMAL, LOW = Priority
NONE_QUEUED = (0, 0, 0, 0)


def waiting(critical: int = 0, high: int = 0, normal: int = 0, low: int = 0) -> dict[Priority, int]:
    return dict(zip(Priority, (critical, high, normal, low), strict=True))


def next_batch(
    stored: dict[Priority, int], *, slots: int = 5, capacity: int = 100, queued: tuple[int, ...] = NONE_QUEUED
) -> tuple[Priority, int] | None:
    return RefillPolicy().next_batch(slots=slots, capacity=capacity, queued=queued, stored=stored)


def test_the_best_stored_priority_comes_first() -> None:
    assert next_batch(waiting(high=2, normal=9)) == (HIGH, 2)
    assert next_batch(waiting(normal=9, low=9)) == (NORMAL, 5)


def test_a_batch_is_bounded_by_slots_capacity_and_stored_records() -> None:
    assert next_batch(waiting(normal=9), slots=3) == (NORMAL, 3)
    assert next_batch(waiting(normal=9), capacity=2) == (NORMAL, 2)
    assert next_batch(waiting(normal=1)) == (NORMAL, 1)


@pytest.mark.parametrize(("slots", "capacity"), [(0, 9), (9, 0), (-1, 9), (9, -1)])
def test_without_a_slot_or_capacity_nothing_comes_back(slots: int, capacity: int) -> None:
    assert next_batch(waiting(critical=9), slots=slots, capacity=capacity) is None


def test_with_nothing_stored_nothing_comes_back() -> None:
    assert next_batch(waiting()) is None


def test_slots_that_queued_tasks_will_take_are_not_used_twice() -> None:
    assert next_batch(waiting(normal=9), queued=(0, 1, 2, 0)) == (NORMAL, 2)
    assert next_batch(waiting(normal=9), queued=(0, 0, 5, 0)) is None


def test_a_better_stored_task_does_not_wait_for_a_queue_of_worse_ones() -> None:
    assert next_batch(waiting(critical=9), queued=(0, 0, 50, 0)) == (CRITICAL, 5)
    assert next_batch(waiting(critical=9), slots=0, queued=(0, 0, 50, 0)) == (
        CRITICAL,
        1,
    )  # it becomes the head of the queue
    assert next_batch(waiting(critical=9), slots=0, queued=(1, 0, 50, 0)) is None
    assert next_batch(waiting(normal=9), slots=0, queued=(0, 0, 50, 0)) is None


def test_under_a_flood_of_better_work_every_priority_still_makes_progress() -> None:
    policy, stored = RefillPolicy(max_skipped=20), waiting(critical=10_000, normal=1_000, low=1_000)
    came = Counter[Priority]()
    for _ in range(1_000):
        batch = policy.next_batch(slots=4, capacity=9, queued=NONE_QUEUED, stored=stored)
        assert batch is not None
        priority, count = batch
        policy.record_fetch(priority, count, stored)
        came[priority] += count
    assert came[LOW] == pytest.approx(came[CRITICAL] / 20, rel=0.3)
    assert came[NORMAL] == pytest.approx(came[CRITICAL] / 20, rel=0.3)
    assert came[HIGH] == 0


def test_a_priority_that_has_just_been_stored_has_not_been_skipped_yet() -> None:
    policy, alone = RefillPolicy(max_skipped=2), waiting(critical=9)
    for _ in range(10):
        policy.record_fetch(CRITICAL, 1, alone)
    stored = waiting(critical=9, low=1)
    assert policy.next_batch(slots=1, capacity=1, queued=NONE_QUEUED, stored=stored) == (CRITICAL, 1)


@pytest.mark.parametrize("priority", [CRITICAL, NORMAL])
def test_queued_tasks_that_are_never_stored_do_not_starve_those_in_the_store(priority: Priority) -> None:
    policy, stored = RefillPolicy(max_skipped=20), waiting(normal=9)
    queued = tuple(8 if each is priority else 0 for each in Priority)
    came = []
    for _ in range(210):
        batch = policy.next_batch(slots=0, capacity=2, queued=queued, stored=stored)
        assert batch in (None, (NORMAL, 1))
        if batch is not None:
            assert policy.next_batch(slots=0, capacity=2, queued=queued, stored=stored) == batch, (
                "asking changes nothing"
            )
            policy.record_fetch(NORMAL, 1, stored)
        came.append(batch is not None)
    assert sum(came) == 10
    assert policy.next_batch(slots=0, capacity=0, queued=queued, stored=stored) is None
