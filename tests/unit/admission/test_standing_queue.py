"""Standing queues: long waits over half of a task's time, and not a burst."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from forebay.admission import StandingQueue

TIME = 20.0  # seconds that tasks have; an interval is half of it
BOUND = 3.0


def observed(*waits: tuple[float, float]) -> StandingQueue:
    """Return a queue from which tasks were served at these times after these waits."""
    queue = StandingQueue()
    for now, wait in waits:
        queue.observe(now, wait, bound=BOUND, time=TIME)
    return queue


def test_a_queue_stands_once_all_waits_of_an_interval_were_too_long() -> None:
    assert not observed((0.0, 4.0), (5.0, 4.0), (9.9, 4.0)).stands(9.9)
    assert observed((0.0, 4.0), (5.0, 4.0), (10.0, 4.0)).stands(10.0)


def test_one_short_wait_says_that_it_does_not_stand() -> None:
    assert not observed((0.0, 4.0), (5.0, 3.0), (10.0, 4.0), (14.9, 4.0)).stands(14.9)


def test_waits_of_an_earlier_burst_do_not_count() -> None:
    assert not observed((0.0, 4.0), (5.0, 4.0), (60.0, 4.0), (65.0, 4.0)).stands(65.0)


def test_it_stands_until_no_wait_was_too_long_for_an_interval() -> None:
    queue = observed((0.0, 4.0), (5.0, 4.0), (10.0, 4.0))
    assert queue.stands(19.9)
    assert not queue.stands(20.0)
    queue.observe(12.0, 4.0, bound=BOUND, time=TIME)
    assert queue.stands(21.9)


def test_it_stands_while_tasks_are_rejected() -> None:
    queue = observed((0.0, 4.0), (5.0, 4.0), (10.0, 4.0))
    for now in range(11, 100):
        queue.observe(float(now), 1.0, bound=BOUND, time=TIME)
        assert queue.stands(now)
        queue.rejected(now, TIME)
    assert not queue.stands(109.0)


@given(st.lists(st.tuples(st.floats(0.0, 3.0), st.floats(0.0, 100.0)), max_size=50))
def test_short_waits_never_make_it_stand(steps: list[tuple[float, float]]) -> None:
    queue, now = StandingQueue(), 0.0
    for seconds, wait in steps:
        now += seconds
        queue.observe(now, wait, bound=BOUND, time=TIME)
        queue.observe(now, 0.0, bound=BOUND, time=TIME)
        assert not queue.stands(now)


@given(st.lists(st.floats(0.01, 5.0), min_size=1, max_size=50))
def test_waits_that_are_all_too_long_make_it_stand_within_an_interval_and_a_gap(gaps: list[float]) -> None:
    queue, now = StandingQueue(), 0.0
    queue.observe(now, 4.0, bound=BOUND, time=TIME)
    for gap in gaps:
        now += gap
        queue.observe(now, 4.0, bound=BOUND, time=TIME)
        assert queue.stands(now) is (now >= 10.0)
