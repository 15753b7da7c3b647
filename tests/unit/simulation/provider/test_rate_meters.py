"""Rate limits as a provider enforces them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.simulation.provider.provider_config import AccelerationLimit, SimulatedRateLimit, Unit
from forebay.simulation.provider.rate_meters import AccelerationMeter, AccountMeters, FixedWindowMeter, RateMeter

# Seconds, rounded to milliseconds: real arrivals, without effects of floating-point rounding.
moments = st.integers(0, 300_000).map(lambda ms: ms / 1000)


def bucket(amount: int = 60) -> RateMeter:
    return RateMeter(SimulatedRateLimit(unit=Unit.REQUESTS, amount=amount), 0.0)


def window(amount: int = 60, per: float = 60.0) -> FixedWindowMeter:
    return FixedWindowMeter(SimulatedRateLimit(unit=Unit.REQUESTS, amount=amount, period=per, fixed_window=True), 0.0)


def granted(meter: RateMeter, arrivals: list[float], amount: float = 1.0) -> list[float]:
    """Return the arrivals at which calls were accepted."""
    accepted = []
    for at in sorted(arrivals):
        if meter.wait_time(at, amount) == 0:
            meter.take(at, amount)
            accepted.append(at)
    return accepted


@given(
    arrivals=st.lists(moments, max_size=200),
    amount=st.integers(1, 120),
    burst=st.none() | st.integers(1, 30),
)
def test_a_bucket_grants_its_burst_and_its_rate_over_any_window(
    arrivals: list[float], amount: int, burst: int | None
) -> None:
    limit = SimulatedRateLimit(unit=Unit.REQUESTS, amount=amount, burst=burst)
    accepted = granted(RateMeter(limit, 0.0), arrivals)
    for i, begin in enumerate(accepted):
        for j in range(i, len(accepted)):
            assert j - i + 1 <= limit.size + amount / 60 * (accepted[j] - begin) + 1e-6


@given(arrivals=st.lists(moments, max_size=200), amount=st.integers(1, 50))
def test_a_window_grants_its_amount_in_each_period(arrivals: list[float], amount: int) -> None:
    accepted = granted(window(amount), arrivals)
    for period in range(6):
        assert sum(at // 60 == period for at in accepted) == min(amount, sum(at // 60 == period for at in arrivals))


@given(at=moments, taken=st.integers(0, 60), wanted=st.integers(1, 60))
def test_a_call_after_its_wait_time_is_accepted(at: float, taken: int, wanted: int) -> None:
    for meter in (bucket(), window()):
        meter.take(at, taken)
        back = at + meter.wait_time(at, wanted)
        assert meter.wait_time(back, wanted) == 0


@given(at=moments, taken=st.integers(1, 60))
def test_full_in_is_when_the_meter_is_full(at: float, taken: int) -> None:
    for meter in (bucket(), window()):
        meter.take(at, taken)
        full = at + meter.full_in(at)
        assert meter.full_in(full) == pytest.approx(0.0, abs=1e-6)
        assert meter.level(full) == pytest.approx(60)


def test_more_than_a_bucket_holds_is_never_granted() -> None:
    assert bucket(60).wait_time(0.0, 61) == math.inf
    assert window(60).wait_time(0.0, 61) == math.inf


def test_a_debt_is_repaid_before_anything_is_granted() -> None:
    meter = bucket(60)
    meter.take(0.0, 90)
    assert meter.wait_time(0.0, 0.0) == pytest.approx(30.0)
    assert meter.wait_time(0.0, 1.0) == pytest.approx(31.0)


def test_a_call_takes_from_all_rate_limits_or_from_none() -> None:
    meters = AccountMeters(
        [SimulatedRateLimit(unit=Unit.REQUESTS, amount=1), SimulatedRateLimit(unit=Unit.TOKENS, amount=1000)],
        0.0,
    )
    assert meters.shortage(0.0, {Unit.REQUESTS: 1, Unit.TOKENS: 900}) is None
    meters.take(0.0, Unit.TOKENS, 900)
    shortage = meters.shortage(0.0, {Unit.REQUESTS: 1, Unit.TOKENS: 200})
    assert shortage is not None
    assert shortage.unit is Unit.TOKENS
    assert shortage.wait == pytest.approx(6.0)
    assert meters.shortage(0.0, {Unit.REQUESTS: 1, Unit.TOKENS: 100}) is None


def test_a_shortage_reports_the_longest_wait() -> None:
    meters = AccountMeters(
        [SimulatedRateLimit(unit=Unit.REQUESTS, amount=1), SimulatedRateLimit(unit=Unit.TOKENS, amount=1000)], 0.0
    )
    meters.take(0.0, Unit.REQUESTS, 1)
    meters.take(0.0, Unit.TOKENS, 1000)
    shortage = meters.shortage(0.0, {Unit.REQUESTS: 1, Unit.TOKENS: 100})
    assert shortage is not None
    assert shortage.unit is Unit.REQUESTS
    assert shortage.wait == pytest.approx(60.0)


def test_readings_report_the_tighter_of_two_limits_of_a_unit() -> None:
    meters = AccountMeters(
        [
            SimulatedRateLimit(unit=Unit.REQUESTS, amount=600),
            SimulatedRateLimit(unit=Unit.REQUESTS, amount=10, period=1.0),
        ],
        0.0,
    )
    for _ in range(5):
        meters.take(0.0, Unit.REQUESTS, 1)
    (reading,) = meters.readings(0.0)
    assert (reading.limit, reading.remaining) == (10, 5)


def test_usage_may_grow_by_a_bounded_amount_each_minute() -> None:
    ramp = AccelerationMeter(AccelerationLimit(unit=Unit.REQUESTS, start=10, growth=5))
    admitted = []
    for minute in range(4):
        count = 0
        while ramp.shortage(minute * 60 + 1.0, {Unit.REQUESTS: 1}) is None:
            ramp.take(minute * 60 + 1.0, {Unit.REQUESTS: 1})
            count += 1
        admitted.append(count)
    assert admitted == [10, 15, 20, 25]


def test_after_a_pause_the_acceleration_limit_is_the_start_value() -> None:
    ramp = AccelerationMeter(AccelerationLimit(unit=Unit.REQUESTS, start=10, growth=100))
    ramp.take(0.0, {Unit.REQUESTS: 10})
    shortage = ramp.shortage(130.0, {Unit.REQUESTS: 11})
    assert shortage is not None
    assert shortage.wait == pytest.approx(50.0)
