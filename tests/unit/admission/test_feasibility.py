"""Deadline feasibility: the estimates, and the bypass that corrects a bad one."""

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
def test_with_fewer_than_eight_successes_the_estimate_is_zero(durations: list[float]) -> None:
    times = ServiceTimes()
    for seconds in durations:
        times.record(seconds, success=True)
    for _ in range(20):
        times.record(1.0, success=False)
    assert times.optimistic() == 0.0


@given(st.lists(SECONDS, min_size=8, max_size=60))
def test_the_optimistic_estimate_is_the_lower_quartile_of_the_last_twenty_successes(durations: list[float]) -> None:
    times = ServiceTimes()
    for seconds in durations:
        times.record(seconds, success=True)
    last = sorted(durations[-20:])
    assert times.optimistic() in last
    assert sum(seconds <= times.optimistic() for seconds in last) >= len(last) / 4
    assert sum(seconds < times.optimistic() for seconds in last) <= len(last) / 4


@given(st.lists(SECONDS, min_size=1, max_size=60))
def test_the_median_is_that_of_the_last_twenty_successes(durations: list[float]) -> None:
    times = ServiceTimes()
    for seconds in durations:
        times.record(seconds, success=True)
    assert times.median() == sorted(durations[-20:])[len(durations[-20:]) // 2]


def test_failures_count_for_the_drain_rate_and_not_for_the_service_time() -> None:
    times = ServiceTimes()
    for _ in range(20):
        times.record(4.0, success=True)
    for _ in range(200):
        times.record(1.0, success=False)
    assert times.optimistic() == 4.0
    assert times.drain_rate(6) == pytest.approx(6.0, rel=0.01)


def test_a_timeout_counts_as_one_and_a_half_times_as_long() -> None:
    times = ServiceTimes(samples=10)
    for _ in range(9):
        times.record(1.0, success=True)
    times.record_timeout(4.0)
    assert times.quantile(0.95) == 6.0
    assert times.quantile(0.5) == 1.0
    for _ in range(10):
        times.record(2.0, success=True)
    assert times.quantile(0.95) == times.optimistic() == 2.0  # the latest ten


def mixed() -> ServiceTimes:
    """Return service times of mostly one second, a third of four, and one in twenty of eight."""
    times = ServiceTimes()
    for seconds in (*(1.0,) * 12, *(4.0,) * 7, 8.0):
        times.record(seconds, success=True)
    return times


def test_the_longest_wait_leaves_nearly_every_task_enough_time() -> None:
    assert mixed().max_wait(30.0) == 20.0
    assert mixed().max_wait(8.0) == 1.0  # an eighth in any case
    assert ServiceTimes().max_wait(8.0) == math.inf  # nothing is known


def test_a_task_needs_time_for_three_quarters_if_others_wait_that_have_more() -> None:
    assert mixed().required_time(10.0) == 4.0
    assert mixed().required_time(9.9) == mixed().optimistic() == 1.0  # its time was short from the start
    assert ServiceTimes().required_time(10.0) == 0.0


def test_a_task_needs_time_for_nearly_all_while_others_are_not_admitted() -> None:
    assert mixed().required_time(10.0, crowded=True) == mixed().nearly_all() == 8.0
    assert mixed().required_time(8.0, crowded=True) == 7.0  # an eighth may pass
    assert mixed().required_time(7.9, crowded=True) == mixed().optimistic()  # its time was short from the start
    assert ServiceTimes().required_time(10.0, crowded=True) == 0.0


def test_the_drain_rate_is_unknown_before_the_first_task_ends() -> None:
    assert ServiceTimes().drain_rate(5) is None
    assert ServiceTimes().median() is None


def test_tasks_that_took_no_time_give_no_drain_rate() -> None:
    times = ServiceTimes()
    times.record(0.0, success=False)
    assert times.drain_rate(5) is None


@given(st.lists(st.floats(0, 5), min_size=1, max_size=200))
def test_one_task_in_ten_seconds_bypasses_the_estimate(gaps: list[float]) -> None:
    bypass = EstimateBypass(10.0)
    now = 0.0
    passed = []
    for gap in gaps:
        now += gap
        if not bypass.should_reject(now, needed=9.0, remaining=1.0):
            passed.append(now)
    assert passed[0] == gaps[0]
    assert all(later - earlier >= 10.0 for earlier, later in pairwise(passed))
    assert now - passed[-1] < 10.0


@given(st.floats(0, 100), st.floats(0, 100))
def test_a_task_that_fits_is_never_rejected_and_uses_up_no_bypass(needed: float, spare: float) -> None:
    bypass = EstimateBypass(10.0)
    assert not bypass.should_reject(0.0, needed=needed, remaining=needed + spare)
    assert not bypass.should_reject(0.0, needed=9.0, remaining=1.0)
    assert bypass.should_reject(0.0, needed=9.0, remaining=1.0)


@pytest.mark.parametrize("seed", range(40))
def test_tasks_are_admitted_again_after_a_slow_spell(seed: int) -> None:
    random = clock.new_random(seed)
    times, bypass = ServiceTimes(), EstimateBypass()
    for _ in range(20):  # the slow spell: a minute each
        times.record(60.0 * random.uniform(0.8, 1.2), success=True)
    last_rejection = 0.0
    for second in range(600):  # now a second each, and every task has ten
        if bypass.should_reject(float(second), needed=times.optimistic(), remaining=10.0):
            last_rejection = second
        else:
            times.record(random.uniform(0.8, 1.2), success=True)
    assert last_rejection < 120
