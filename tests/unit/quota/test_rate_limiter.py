"""The rate limiter of given limiter: waits, reservations, throttled calls and clocks."""

from __future__ import annotations

import math

import pytest

from forebay.errors import ReservationClosed
from forebay.interfaces import Charge, RateLimitHeaders
from forebay.quota import Quota, RateLimiter, RateScope

ONE = Charge()
PER_MINUTE = Quota(requests=60, per="minute")


def tokens(amount: int) -> Charge:
    return Charge(input_tokens=amount)


def used_up(limiter: RateLimiter, charge: Charge = ONE, *, now: float = 0.0, times: int = 60) -> RateLimiter:
    for _ in range(times):
        assert limiter.wait(now, charge).seconds == 0
        limiter.settle(now, limiter.reserve(now, charge), charge)
    return limiter


def remaining(limiter: RateLimiter, now: float) -> float:
    return limiter.levels(now)[0].remaining


def test_a_whole_amount_can_go_at_once_and_then_as_it_refills() -> None:
    limiter = used_up(RateLimiter([PER_MINUTE]))
    assert limiter.wait(0.0, ONE) == (1.0, "requests per minute")
    assert limiter.wait(0.25, ONE).seconds == pytest.approx(0.75)


def test_the_calls_under_way_when_a_limit_is_first_seen_may_return_what_they_hold_of_it() -> None:
    limiter = RateLimiter()
    under_way = [limiter.reserve(0.0, tokens(100)) for _ in range(2)]
    first = limiter.reserve(0.0, tokens(10))
    shown = RateLimitHeaders(unit="input_tokens", limit=1_000, remaining=790, reset=60.0)
    limiter.update_from_headers(0.0, [shown], first)
    (before,) = limiter.headroom(0.0, tokens(900))
    for reservation in under_way:
        limiter.settle(0.0, reservation, tokens(100))
    (after,) = limiter.headroom(0.0, tokens(900))
    # 110 tokens are missing. If 210 come back, the call may go at once, and if 10 come back, only after a refill.
    assert (before.spare, after.spare) == (-120.0, -10.0)


def test_a_call_that_waits_as_long_as_it_was_told_passes() -> None:
    limiter, now = RateLimiter([Quota(requests=7, per="minute"), Quota(input_tokens=1013, per="minute")]), 0.1
    for _ in range(500):
        now += limiter.wait(now, Charge(input_tokens=131)).seconds
        assert limiter.wait(now, Charge(input_tokens=131)).seconds == 0
        limiter.reserve(now, Charge(input_tokens=131))


def test_the_quota_with_the_longest_wait_limits_and_is_named() -> None:
    limiter = RateLimiter([PER_MINUTE, Quota(input_tokens=100, per="hour"), Quota(requests=1000, per="day")])
    limiter.reserve(0.0, tokens(100))
    assert limiter.wait(0.0, tokens(1)) == (36.0, "input tokens per hour")


def test_a_call_larger_than_a_quota_waits_forever() -> None:
    limiter = RateLimiter([PER_MINUTE, Quota(input_tokens=100, per="minute")])
    assert limiter.wait(0.0, tokens(101)) == (math.inf, "input tokens per minute")
    assert limiter.wait(0.0, tokens(101), ahead=tokens(50)).seconds == math.inf
    assert limiter.wait(0.0, tokens(100)).seconds == 0


def test_a_quota_of_another_unit_does_not_limit() -> None:
    limiter = RateLimiter([Quota(output_tokens=10, per="minute")])
    limiter.reserve(0.0, Charge(output_tokens=10))
    assert limiter.wait(0.0, tokens(1000)) == (0.0, None)


def test_an_unused_part_of_a_reservation_is_refunded() -> None:
    limiter = RateLimiter([Quota(input_tokens=100, per="minute")])
    limiter.settle(0.0, limiter.reserve(0.0, tokens(100)), tokens(30))
    assert remaining(limiter, 0.0) == 70


def test_use_beyond_the_reservation_is_a_debt() -> None:
    limiter = RateLimiter([Quota(input_tokens=60, per="minute")])
    limiter.settle(0.0, limiter.reserve(0.0, tokens(50)), tokens(90))
    assert limiter.wait(0.0, tokens(10)).seconds == pytest.approx(40.0)


def test_impossible_usage_does_not_block_forever() -> None:
    limiter = RateLimiter([Quota(input_tokens=60, per="minute")])
    limiter.settle(0.0, limiter.reserve(0.0, tokens(50)), tokens(10**18))
    assert limiter.wait(0.0, tokens(10)).seconds == pytest.approx(200_000.0 - 50.0)
    assert limiter.wait(200_000.0, tokens(10)).seconds == 0.0


@pytest.mark.parametrize(
    ("amount", "reserved", "most"),
    [(20_000, 2, 200_000), (1_000_000, 2, 1_000_000), (100_000, 50_000, 500_000)],
    ids=["more than models make", "a whole amount", "ten times the reservation"],
)
def test_one_call_counts_at_most_as_much_as_a_call_can_use(amount: int, reserved: int, most: int) -> None:
    limiter = RateLimiter([Quota(input_tokens=amount, per="minute")])
    limiter.settle(0.0, limiter.reserve(0.0, tokens(reserved)), tokens(10**18))
    assert remaining(limiter, 0.0) == amount - most


def test_the_debt_of_many_calls_is_paid_back_in_full() -> None:
    limiter = RateLimiter([Quota(output_tokens=20_000, per="minute")])
    held = [limiter.reserve(0.0, Charge(output_tokens=2)) for _ in range(80)]
    for each in held:
        limiter.settle(1.0, each, Charge(output_tokens=4_000))
    assert remaining(limiter, 1.0) == pytest.approx(20_000 - 80 * 4_000, abs=200)
    seconds = limiter.wait(1.0, Charge(output_tokens=2)).seconds
    assert seconds == pytest.approx(900.0, abs=1.0)
    assert limiter.wait(1.0 + seconds, Charge(output_tokens=2)).seconds == 0.0


def test_a_refusal_does_not_deepen_a_debt() -> None:
    limiter = RateLimiter([Quota(output_tokens=100, per="minute")])
    limiter.settle(0.0, limiter.reserve(0.0, Charge(output_tokens=10)), Charge(output_tokens=1_000))
    refused = limiter.reserve(0.0, Charge(output_tokens=10))
    limiter.record_throttled(0.0, refused, 5.0)
    assert remaining(limiter, 0.0) == -900


def test_the_debt_of_a_learned_quota_is_one_amount_at_most() -> None:
    limiter = RateLimiter()
    held = [limiter.reserve(0.0, Charge(output_tokens=1)) for _ in range(10)]
    header = RateLimitHeaders(unit="output_tokens", limit=100, remaining=100, reset=None)
    limiter.update_from_headers(0.0, [header], held[0])
    for each in held:
        limiter.settle(0.0, each, Charge(output_tokens=90))
    assert remaining(limiter, 0.0) == -100


def test_negative_usage_refills_nothing() -> None:
    limiter = RateLimiter([Quota(input_tokens=100, per="minute")])
    limiter.reserve(0.0, tokens(100))
    limiter.settle(0.0, limiter.reserve(0.0, Charge(requests=-5, input_tokens=-100)), tokens(-100))
    assert remaining(limiter, 0.0) == 0


def test_a_released_call_is_refunded_in_full() -> None:
    limiter = RateLimiter([PER_MINUTE, Quota(tokens=100, per="minute")])
    limiter.release(0.0, limiter.reserve(0.0, Charge(tokens=70)))
    assert [level.remaining for level in limiter.levels(0.0)] == [60, 100]


@pytest.mark.parametrize("first", ["settle", "release", "record_throttled"])
@pytest.mark.parametrize("second", ["settle", "release", "record_throttled"])
def test_a_reservation_is_closed_once(first: str, second: str) -> None:
    limiter = RateLimiter([PER_MINUTE])
    held = limiter.reserve(0.0, ONE)
    for name, again in ((first, False), (second, True)):
        arguments = (0.0, held, ONE) if name == "settle" else (0.0, held)
        if again:
            before = remaining(limiter, 0.0)
            with pytest.raises(ReservationClosed):
                getattr(limiter, name)(*arguments)
            assert remaining(limiter, 0.0) == before
        else:
            getattr(limiter, name)(*arguments)


def test_a_reservation_of_another_limiter_is_rejected() -> None:
    one, other = RateLimiter([PER_MINUTE]), RateLimiter([PER_MINUTE])
    held = one.reserve(0.0, ONE)
    other.reserve(0.0, ONE)
    with pytest.raises(ReservationClosed):
        other.release(0.0, held)


def test_the_wait_counts_calls_ahead_even_beyond_a_whole_amount() -> None:
    limiter = RateLimiter([PER_MINUTE])
    assert limiter.wait(0.0, ONE, ahead=Charge(requests=59)).seconds == 0
    assert limiter.wait(0.0, ONE, ahead=Charge(requests=119)).seconds == pytest.approx(60.0)


# --- throttled -------------------------------------------------------------------------------------------------------


def test_a_throttled_call_is_refunded() -> None:
    limiter = RateLimiter([Quota(requests=60, per="hour")])
    limiter.record_throttled(0.0, limiter.reserve(0.0, ONE), 5.0)
    assert limiter.levels(0.0)[0].remaining == 60


def test_a_throttled_call_lowers_the_tightest_quota() -> None:
    limiter = RateLimiter([PER_MINUTE, Quota(input_tokens=10**6, per="minute")])
    limiter.record_throttled(0.0, limiter.reserve(0.0, ONE), 5.0, scope=RateScope(period=60.0))
    limiter.reserve(5.0, ONE)
    assert limiter.wait(5.0, ONE).seconds == pytest.approx(1.0), "calls go on at the rate, not in a burst"


@pytest.mark.parametrize("retry_after", [5.0, 60.0])
def test_a_refusal_that_names_no_rate_lowers_no_given_quota(retry_after: float) -> None:
    limiter = RateLimiter([Quota(requests=2, per="minute")])
    first = limiter.reserve(0.0, tokens(10))
    header = RateLimitHeaders(unit="input_tokens", limit=100, remaining=90, reset=None)
    limiter.update_from_headers(0.0, [header], first)
    limiter.record_throttled(0.0, limiter.reserve(0.0, tokens(10)), retry_after)
    given, learned = limiter.levels(0.0)
    assert given.remaining == 1
    assert learned.remaining == 90, "nor a learned one that is less tight"


PER_DAY = Quota(requests=10_000, per="day")


@pytest.mark.parametrize("retry_after", [None, 0.12, 5.0, 60.0, 86_400.0 * 400, math.inf])
@pytest.mark.parametrize("scope", [None, RateScope(period=60.0), RateScope(unit="requests", period=60.0)])
def test_a_refusal_that_can_be_for_a_minute_leaves_the_quota_of_a_day(
    retry_after: float | None, scope: RateScope | None
) -> None:
    limiter = RateLimiter([PER_DAY])
    limiter.record_throttled(0.0, limiter.reserve(0.0, ONE), retry_after, scope=scope)
    assert limiter.levels(0.0)[0].remaining == 10_000


def test_a_refusal_that_names_the_day_empties_the_quota_of_a_day_alone() -> None:
    limiter = RateLimiter([PER_MINUTE, PER_DAY, Quota(tokens=10**6, per="day")])
    scope = RateScope(unit="requests", period=86_400.0)
    limiter.record_throttled(0.0, limiter.reserve(0.0, Charge(requests=1, tokens=9)), 8.64, scope=scope)
    assert [round(level.remaining) for level in limiter.levels(0.0)] == [60, 0, 10**6]


def test_a_refusal_longer_than_a_minute_leaves_the_quota_of_a_minute() -> None:
    limiter = RateLimiter([PER_MINUTE])
    limiter.record_throttled(0.0, limiter.reserve(0.0, ONE), 3600.0)
    assert limiter.levels(0.0)[0].remaining == 60


@pytest.mark.parametrize("retry_after", [None, 0.0, -5.0, math.nan])
def test_a_throttled_call_without_retry_after_holds_no_other(retry_after: float | None) -> None:
    limiter = RateLimiter()
    limiter.record_throttled(0.0, limiter.reserve(0.0, ONE), retry_after)
    assert limiter.wait(0.0, ONE) == (0.0, None)


# --- clocks ----------------------------------------------------------------------------------------------------------


def test_a_clock_that_goes_back_neither_refills_nor_blocks() -> None:
    day = 86_400.0
    limiter = used_up(RateLimiter([PER_MINUTE]), now=day)
    assert limiter.wait(0.0, ONE).seconds == pytest.approx(1.0)
    assert limiter.wait(1.0, ONE).seconds == 0


def test_a_clock_that_leaps_a_day_fills_one_amount_and_no_more() -> None:
    limiter = used_up(RateLimiter([PER_MINUTE]))
    used_up(limiter, now=86_400.0)
    assert limiter.wait(86_400.0, ONE).seconds == pytest.approx(1.0)


def test_a_trial_call_that_was_left_before_its_answer_does_not_disprove_a_quota() -> None:
    limiter = RateLimiter(())
    first = limiter.reserve(0.0, Charge())
    headers = [RateLimitHeaders(unit="requests", limit=30, remaining=0, reset=60.0)]
    limiter.update_from_headers(0.5, headers, first)
    limiter.settle(0.5, first, Charge())
    sent, at = 0, 1.0
    while at < 1_000.0:
        if limiter.wait(at, Charge()).seconds <= 0.0:
            sent += 1
            left = limiter.reserve(at, Charge())
            limiter.settle(at + 0.1, left, Charge(), answered=False)
        at += 0.2
    assert sent <= 1.5 * 30 * 1_000 / 60
