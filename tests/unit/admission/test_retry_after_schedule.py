"""The schedule of retry slots."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay.admission import RetryAfterSchedule, TenantRetrySchedules

RATES = st.floats(0.01, 1000.0)
DRAWS = st.floats(0, 1, exclude_max=True)


@given(RATES, st.lists(DRAWS, min_size=2, max_size=100))
def test_each_slot_is_given_once_and_not_before_it_is_free(rate: float, draws: list[float]) -> None:
    schedule = RetryAfterSchedule()
    waits = [schedule.reserve(50.0, rate, draw) or 0.0 for draw in draws]
    for number, wait in enumerate(waits, start=1):
        slot = number / (0.97 * rate)
        assert slot <= wait * (1 + 1e-9)
        assert wait <= 1.1 * slot * (1 + 1e-9)


def test_without_jitter_slots_are_one_drain_interval_apart() -> None:
    schedule = RetryAfterSchedule()
    waits = [schedule.reserve(0.0, 2.0, 0.0) for _ in range(3)]
    assert waits == [pytest.approx(n / 1.94) for n in (1, 2, 3)]


def test_slots_that_nobody_reserved_are_not_kept() -> None:
    schedule = RetryAfterSchedule()
    schedule.reserve(0.0, 2.0, 0.0)
    assert schedule.reserve(1000.0, 2.0, 0.0) == pytest.approx(1 / 1.94)


def test_a_later_caller_gets_a_later_slot() -> None:
    schedule = RetryAfterSchedule()
    first = schedule.reserve(0.0, 1.0, 0.0) or 0.0
    second = schedule.reserve(0.5, 1.0, 0.0) or 0.0
    assert 0.5 + second == pytest.approx(first + 1 / 0.97)


@pytest.mark.parametrize("rate", [None, 0, 0.0])
def test_without_a_drain_rate_no_slot_is_reserved(rate: float | None) -> None:
    schedule = RetryAfterSchedule()
    assert schedule.reserve(0.0, rate, 0.5) is None
    assert schedule.reserve(0.0, 1.0, 0.0) == pytest.approx(1 / 0.97)


def test_the_callers_of_one_tenant_do_not_come_back_after_the_flood_of_another() -> None:
    schedules = TenantRetrySchedules(lambda tenant: 3.0 if tenant == "acme" else 1.0)
    for _ in range(1000):
        schedules.reserve("big", 0.0, 10.0, 0.0)
    alone = schedules.reserve("big", 0.0, 10.0, 0.0)
    assert alone == pytest.approx(1001 / 9.7)
    small, acme = (schedules.reserve(tenant, 0.0, 10.0, 0.0) for tenant in ("small", "acme"))
    assert small == pytest.approx(2 / 9.7)  # it has half of the rate
    assert acme == pytest.approx(5 / 9.7 / 3)


def test_tenants_whose_slots_are_past_leave_their_share_to_the_others() -> None:
    schedules = TenantRetrySchedules(lambda _: 1.0)
    for number in range(5000):
        schedules.reserve(f"tenant {number}", 0.0, 100.0, 0.0)
    assert len(schedules._by_tenant) <= 1025
    assert schedules.reserve("late", 1e6, 1.0, 0.0) == pytest.approx(1 / 0.97)
    assert len(schedules._by_tenant) == 1


def test_an_unknown_rate_of_a_tenant_gives_no_slot() -> None:
    assert TenantRetrySchedules(lambda _: 1.0).reserve("a", 0.0, None, 0.0) is None
