"""What is reserved, settled and released, one promise a test."""

from __future__ import annotations

import math

import pytest

from forebay.errors import ReservationClosed
from forebay.interfaces import Charge
from forebay.quota import Quota, RateLimiter

ONE = Charge()
PER_MINUTE = Quota(requests=60, per="minute")


def tokens(amount: int) -> Charge:
    return Charge(input_tokens=amount)


def spent(quotas: RateLimiter, charge: Charge = ONE, *, now: float = 0.0, times: int = 60) -> RateLimiter:
    for _ in range(times):
        assert quotas.wait(now, charge).seconds == 0
        quotas.settle(now, quotas.reserve(now, charge), charge)
    return quotas


def left(quotas: RateLimiter, now: float) -> float:
    return quotas.levels(now)[0].remaining


def test_a_whole_amount_can_go_at_once_and_then_as_it_refills() -> None:
    quotas = spent(RateLimiter([PER_MINUTE]))
    assert quotas.wait(0.0, ONE) == (1.0, "requests per minute")
    assert quotas.wait(0.25, ONE).seconds == pytest.approx(0.75)


def test_who_waits_as_long_as_it_was_told_gets_in() -> None:
    quotas, now = RateLimiter([Quota(requests=7, per="minute"), Quota(input_tokens=1013, per="minute")]), 0.1
    for _ in range(500):
        now += quotas.wait(now, Charge(input_tokens=131)).seconds
        assert quotas.wait(now, Charge(input_tokens=131)).seconds == 0
        quotas.reserve(now, Charge(input_tokens=131))


def test_of_several_quotas_the_slowest_binds_and_is_named() -> None:
    quotas = RateLimiter([PER_MINUTE, Quota(input_tokens=100, per="hour"), Quota(requests=1000, per="day")])
    quotas.reserve(0.0, tokens(100))
    assert quotas.wait(0.0, tokens(1)) == (36.0, "input tokens per hour")


def test_a_call_larger_than_a_bucket_never_goes() -> None:
    quotas = RateLimiter([PER_MINUTE, Quota(input_tokens=100, per="minute")])
    assert quotas.wait(0.0, tokens(101)) == (math.inf, "input tokens per minute")
    assert quotas.wait(0.0, tokens(101), ahead=tokens(50)).seconds == math.inf
    assert quotas.wait(0.0, tokens(100)).seconds == 0


def test_a_quota_of_something_else_does_not_bind() -> None:
    quotas = RateLimiter([Quota(output_tokens=10, per="minute")])
    quotas.reserve(0.0, Charge(output_tokens=10))
    assert quotas.wait(0.0, tokens(1000)) == (0.0, None)


def test_what_was_reserved_too_much_comes_back() -> None:
    quotas = RateLimiter([Quota(input_tokens=100, per="minute")])
    quotas.settle(0.0, quotas.reserve(0.0, tokens(100)), tokens(30))
    assert left(quotas, 0.0) == 70


def test_what_was_used_too_much_is_a_debt() -> None:
    quotas = RateLimiter([Quota(input_tokens=60, per="minute")])
    quotas.settle(0.0, quotas.reserve(0.0, tokens(50)), tokens(90))
    assert quotas.wait(0.0, tokens(10)).seconds == pytest.approx(40.0)


def test_usage_beyond_belief_does_not_lock_for_ever() -> None:
    quotas = RateLimiter([Quota(input_tokens=60, per="minute")])
    quotas.settle(0.0, quotas.reserve(0.0, tokens(50)), tokens(10**18))
    assert quotas.wait(0.0, tokens(60)).seconds == pytest.approx(120.0)


def test_negative_numbers_from_the_wire_refill_nothing() -> None:
    quotas = RateLimiter([Quota(input_tokens=100, per="minute")])
    quotas.reserve(0.0, tokens(100))
    quotas.settle(0.0, quotas.reserve(0.0, Charge(requests=-5, input_tokens=-100)), tokens(-100))
    assert left(quotas, 0.0) == 0


def test_a_call_that_never_left_gives_everything_back() -> None:
    quotas = RateLimiter([PER_MINUTE, Quota(tokens=100, per="minute")])
    quotas.release(0.0, quotas.reserve(0.0, Charge(tokens=70)))
    assert [level.remaining for level in quotas.levels(0.0)] == [60, 100]


@pytest.mark.parametrize("first", ["settle", "release", "refused"])
@pytest.mark.parametrize("second", ["settle", "release", "refused"])
def test_a_reservation_is_closed_once(first: str, second: str) -> None:
    quotas = RateLimiter([PER_MINUTE])
    held = quotas.reserve(0.0, ONE)
    for name, again in ((first, False), (second, True)):
        arguments = (0.0, held, ONE) if name == "settle" else (0.0, held)
        if again:
            before = left(quotas, 0.0)
            with pytest.raises(ReservationClosed):
                getattr(quotas, name)(*arguments)
            assert left(quotas, 0.0) == before
        else:
            getattr(quotas, name)(*arguments)


def test_a_reservation_of_other_quotas_is_not_taken() -> None:
    one, other = RateLimiter([PER_MINUTE]), RateLimiter([PER_MINUTE])
    held = one.reserve(0.0, ONE)
    other.reserve(0.0, ONE)
    with pytest.raises(ReservationClosed):
        other.release(0.0, held)


def test_the_expected_wait_counts_those_ahead_also_beyond_a_whole_bucket() -> None:
    quotas = RateLimiter([PER_MINUTE])
    assert quotas.wait(0.0, ONE, ahead=Charge(requests=59)).seconds == 0
    assert quotas.wait(0.0, ONE, ahead=Charge(requests=119)).seconds == pytest.approx(60.0)


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_refusal_holds_everything_until_then_and_gives_the_reservation_back() -> None:
    quotas = RateLimiter([PER_MINUTE])
    quotas.record_throttled(0.0, quotas.reserve(0.0, ONE), 5.0)
    assert quotas.wait(0.0, ONE) == (5.0, "retry-after")
    assert quotas.wait(5.0, ONE).seconds == 0


def test_a_refusal_says_that_there_is_less_than_we_thought() -> None:
    quotas = RateLimiter([PER_MINUTE, Quota(input_tokens=10**6, per="minute")])
    quotas.record_throttled(0.0, quotas.reserve(0.0, ONE), 5.0)
    quotas.reserve(5.0, ONE)
    assert quotas.wait(5.0, ONE).seconds == pytest.approx(1.0), "it goes on at the rate, not with a burst"


@pytest.mark.parametrize("retry_after", [86_400.0 * 400, math.inf])
def test_a_retry_after_beyond_the_longest_period_is_not_believed(retry_after: float) -> None:
    quotas = RateLimiter([PER_MINUTE])
    quotas.record_throttled(0.0, quotas.reserve(0.0, ONE), retry_after)
    assert quotas.wait(0.0, ONE).seconds == 60.0


@pytest.mark.parametrize("retry_after", [None, 0.0, -5.0, math.nan])
def test_a_refusal_without_a_time_holds_nobody(retry_after: float | None) -> None:
    quotas = RateLimiter()
    quotas.record_throttled(0.0, quotas.reserve(0.0, ONE), retry_after)
    assert quotas.wait(0.0, ONE) == (0.0, None)


# --- clocks --------------------------------------------------------------------------------------------------------


def test_a_clock_that_goes_back_neither_refills_nor_locks() -> None:
    day = 86_400.0
    quotas = spent(RateLimiter([PER_MINUTE]), now=day)
    assert quotas.wait(0.0, ONE).seconds == pytest.approx(1.0)
    assert quotas.wait(1.0, ONE).seconds == 0


def test_a_hold_is_as_long_when_the_clock_goes_back() -> None:
    quotas = RateLimiter([PER_MINUTE])
    quotas.record_throttled(86_400.0, quotas.reserve(86_400.0, ONE), 5.0)
    assert quotas.wait(10.0, ONE) == (5.0, "retry-after")


def test_a_clock_that_leaps_a_day_fills_one_bucket_and_no_more() -> None:
    quotas = spent(RateLimiter([PER_MINUTE]))
    spent(quotas, now=86_400.0)
    assert quotas.wait(86_400.0, ONE).seconds == pytest.approx(1.0)
