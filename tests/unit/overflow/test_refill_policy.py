"""What comes back from the overflow next: the best, but nobody starves."""

from __future__ import annotations

from collections import Counter

import pytest

from forebay.overflow import RefillPolicy
from forebay.task import Priority

CRITICAL, HIGH, NORMAL, LOW = Priority
NOBODY = (0, 0, 0, 0)


def waiting(critical: int = 0, high: int = 0, normal: int = 0, low: int = 0) -> dict[Priority, int]:
    return dict(zip(Priority, (critical, high, normal, low), strict=True))


def wish(
    outside: dict[Priority, int], *, seats: int = 5, room: int = 100, inside: tuple[int, ...] = NOBODY
) -> tuple[Priority, int] | None:
    return RefillPolicy().next_batch(slots=seats, capacity=room, queued=inside, stored=outside)


def test_the_best_rung_outside_comes_first() -> None:
    assert wish(waiting(high=2, normal=9)) == (HIGH, 2)
    assert wish(waiting(normal=9, low=9)) == (NORMAL, 5)


def test_as_many_as_there_are_seats_room_and_rows() -> None:
    assert wish(waiting(normal=9), seats=3) == (NORMAL, 3)
    assert wish(waiting(normal=9), room=2) == (NORMAL, 2)
    assert wish(waiting(normal=1)) == (NORMAL, 1)


@pytest.mark.parametrize(("seats", "room"), [(0, 9), (9, 0), (-1, 9), (9, -1)])
def test_without_a_seat_or_room_nothing_comes(seats: int, room: int) -> None:
    assert wish(waiting(critical=9), seats=seats, room=room) is None


def test_with_nothing_outside_nothing_comes() -> None:
    assert wish(waiting()) is None


def test_seats_that_others_inside_will_take_are_not_given_twice() -> None:
    assert wish(waiting(normal=9), inside=(0, 1, 2, 0)) == (NORMAL, 2)
    assert wish(waiting(normal=9), inside=(0, 0, 5, 0)) is None


def test_a_better_task_outside_does_not_wait_for_a_line_of_worse_ones() -> None:
    assert wish(waiting(critical=9), inside=(0, 0, 50, 0)) == (CRITICAL, 5)
    assert wish(waiting(critical=9), seats=0, inside=(0, 0, 50, 0)) == (CRITICAL, 1)  # it heads the line, then
    assert wish(waiting(critical=9), seats=0, inside=(1, 0, 50, 0)) is None
    assert wish(waiting(normal=9), seats=0, inside=(0, 0, 50, 0)) is None


def test_under_a_flood_of_better_work_every_rung_still_moves() -> None:
    pacing, outside = RefillPolicy(max_skipped=20), waiting(critical=10_000, normal=1_000, low=1_000)
    came = Counter[Priority]()
    for _ in range(1_000):
        wished = pacing.next_batch(slots=4, capacity=9, queued=NOBODY, stored=outside)
        assert wished is not None
        rung, count = wished
        pacing.record_fetch(rung, count, outside)
        came[rung] += count
    assert came[LOW] == pytest.approx(came[CRITICAL] / 20, rel=0.3)
    assert came[NORMAL] == pytest.approx(came[CRITICAL] / 20, rel=0.3)
    assert came[HIGH] == 0


def test_who_has_just_come_has_not_been_passed_over_yet() -> None:
    pacing, alone = RefillPolicy(max_skipped=2), waiting(critical=9)
    for _ in range(10):
        pacing.record_fetch(CRITICAL, 1, alone)
    assert pacing.next_batch(slots=1, capacity=1, queued=NOBODY, stored=waiting(critical=9, low=1)) == (CRITICAL, 1)
