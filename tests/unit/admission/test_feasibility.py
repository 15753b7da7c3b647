"""Whether a deadline can be made: on what it is judged, and that a bad estimate cannot lock the door."""

from __future__ import annotations

import math
from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay import clock
from forebay.admission import EstimateBypass, ServiceTimes

SECONDS = st.floats(0.001, 1000.0)


@given(st.lists(SECONDS, max_size=7))
def test_on_fewer_than_eight_successes_nothing_is_claimed(services: list[float]) -> None:
    times = ServiceTimes()
    for seconds in services:
        times.record(seconds, success=True)
    for _ in range(20):
        times.record(1.0, success=False)
    assert times.optimistic() == 0.0


@given(st.lists(SECONDS, min_size=8, max_size=60))
def test_the_optimistic_estimate_is_a_low_one_of_the_last_twenty_successes(services: list[float]) -> None:
    times = ServiceTimes()
    for seconds in services:
        times.record(seconds, success=True)
    last = sorted(services[-20:])
    assert times.optimistic() in last
    assert sum(seconds <= times.optimistic() for seconds in last) >= len(last) / 4
    assert sum(seconds < times.optimistic() for seconds in last) <= len(last) / 4


@given(st.lists(SECONDS, min_size=1, max_size=60))
def test_the_median_is_in_the_middle_of_the_last_twenty_successes(services: list[float]) -> None:
    times = ServiceTimes()
    for seconds in services:
        times.record(seconds, success=True)
    assert times.median() == sorted(services[-20:])[len(services[-20:]) // 2]


def test_failures_count_for_the_drain_rate_and_not_for_the_service() -> None:
    times = ServiceTimes()
    for _ in range(20):
        times.record(4.0, success=True)
    for _ in range(200):
        times.record(1.0, success=False)
    assert times.optimistic() == 4.0
    assert times.drain_rate(6) == pytest.approx(6.0, rel=0.01)


def test_what_was_cut_off_counts_as_half_as_long_again() -> None:
    times = ServiceTimes(samples=10)
    for _ in range(9):
        times.record(1.0, success=True)
    times.record_timeout(4.0)
    assert times.quantile(0.95) == 6.0
    assert times.quantile(0.5) == 1.0
    for _ in range(10):
        times.record(2.0, success=True)
    assert times.quantile(0.95) == times.optimistic() == 2.0  # of the latest ten


def mixed() -> ServiceTimes:
    """Most took a second, a third four, and one in twenty eight."""
    times = ServiceTimes()
    for seconds in (*(1.0,) * 12, *(4.0,) * 7, 8.0):
        times.record(seconds, success=True)
    return times


def test_one_may_wait_as_long_as_nearly_any_fits_into_the_rest_with_some_to_spare() -> None:
    assert mixed().max_wait(30.0) == 20.0
    assert mixed().max_wait(8.0) == 1.0  # an eighth in any case
    assert ServiceTimes().max_wait(8.0) == math.inf  # nothing is known


def test_where_others_wait_who_have_more_time_it_has_to_be_likely() -> None:
    assert mixed().required_time(10.0) == 4.0
    assert mixed().required_time(9.9) == mixed().optimistic() == 1.0  # its time was short from the first
    assert ServiceTimes().required_time(10.0) == 0.0


def test_before_the_first_ending_the_rate_is_unknown() -> None:
    assert ServiceTimes().drain_rate(5) is None
    assert ServiceTimes().median() is None


def test_endings_that_took_no_time_say_nothing_of_a_rate() -> None:
    times = ServiceTimes()
    times.record(0.0, success=False)
    assert times.drain_rate(5) is None


@given(st.lists(st.floats(0, 5), min_size=1, max_size=200))
def test_one_in_every_ten_seconds_is_let_through_and_no_more(gaps: list[float]) -> None:
    door = EstimateBypass(10.0)
    now = 0.0
    let = []
    for gap in gaps:
        now += gap
        if not door.should_reject(now, needed=9.0, remaining=1.0):
            let.append(now)
    assert let[0] == gaps[0]
    assert all(later - earlier >= 10.0 for earlier, later in pairwise(let))
    assert now - let[-1] < 10.0


@given(st.floats(0, 100), st.floats(0, 100))
def test_what_can_be_made_is_never_hopeless_and_uses_up_no_exception(needed: float, spare: float) -> None:
    door = EstimateBypass(10.0)
    assert not door.should_reject(0.0, needed=needed, remaining=needed + spare)
    assert not door.should_reject(0.0, needed=9.0, remaining=1.0)
    assert door.should_reject(0.0, needed=9.0, remaining=1.0)


@pytest.mark.parametrize("seed", range(40))
def test_after_a_slow_spell_the_door_opens_again(seed: int) -> None:
    chance = clock.new_random(seed)
    times, door = ServiceTimes(), EstimateBypass()
    for _ in range(20):  # the spell: a minute each
        times.record(60.0 * chance.uniform(0.8, 1.2), success=True)
    last_refusal = 0.0
    for second in range(600):  # now a second each, and every caller has ten
        if door.should_reject(float(second), needed=times.optimistic(), remaining=10.0):
            last_refusal = second
        else:
            times.record(chance.uniform(0.8, 1.2), success=True)
    assert last_refusal < 120
