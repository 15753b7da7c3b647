"""What a provider's headers teach, and what they cannot talk us into."""

from __future__ import annotations

import math

import pytest

from forebay.interfaces import Charge, RateLimitHeaders
from forebay.quota import Quota, QuotaReservation, RateLimiter

ONE = Charge()


def told(limit: int | None = 60, remaining: int | None = 59, reset: float | None = 1.0) -> list[RateLimitHeaders]:
    return [RateLimitHeaders(unit="requests", limit=limit, remaining=remaining, reset=reset)]


def call(quotas: RateLimiter, now: float, notices: list[RateLimitHeaders]) -> QuotaReservation:
    """One call, answered at once."""
    held = quotas.reserve(now, ONE)
    quotas.update_from_headers(now, notices, held)
    quotas.settle(now, held, ONE)
    return held


def left(quotas: RateLimiter, now: float) -> float:
    return next(level.remaining for level in quotas.levels(now) if level.learned)


def windowed(now: float = 0.0, *, remaining: int = 50) -> RateLimiter:
    """Quotas that have seen a window of 60 requests that ends at second 60."""
    quotas = RateLimiter()
    call(quotas, now, told(remaining=remaining + 1, reset=60 - now))
    call(quotas, now + 10, told(remaining=remaining, reset=50 - now))
    return quotas


def test_a_limit_that_was_not_given_is_learned() -> None:
    quotas = RateLimiter()
    assert quotas.wait(0.0, ONE) == (0.0, None)
    call(quotas, 0.0, told(remaining=0, reset=60.0))
    assert quotas.wait(0.0, ONE).limited_by == "requests per minute"
    assert quotas.wait(0.0, Charge(requests=61)).seconds == math.inf


def test_calls_sent_after_the_one_that_the_header_answers_are_still_taken_off() -> None:
    quotas = RateLimiter()
    first = quotas.reserve(0.0, ONE)
    for _ in range(9):
        quotas.reserve(0.0, ONE)
    quotas.update_from_headers(0.0, told(remaining=59), first)
    assert left(quotas, 0.0) == 50


def test_headers_that_our_own_calls_explain_correct_nothing() -> None:
    quotas = RateLimiter()
    call(quotas, 0.0, told(remaining=59))
    held = [quotas.reserve(0.0, ONE) for _ in range(10)]
    before = left(quotas, 0.0)
    for n in (9, 0, 5, 3, 8, 1):
        quotas.update_from_headers(0.0, told(remaining=58 - n), held[n])
    assert left(quotas, 0.0) == before == 49


def test_what_a_neighbour_took_is_taken_off() -> None:
    quotas = RateLimiter()
    call(quotas, 0.0, told(remaining=59))
    call(quotas, 0.0, told(remaining=20, reset=40.0))
    assert left(quotas, 0.0) == 20


def test_the_fraction_that_headers_leave_out_is_not_lost() -> None:
    quotas = RateLimiter()
    call(quotas, 0.0, told(limit=6, remaining=0, reset=60.0))
    call(quotas, 18.0, told(limit=6, remaining=0, reset=52.0))  # of the 1.8 that have come back, 0.8 is left
    assert left(quotas, 18.0) == pytest.approx(0.8)


def test_a_whole_one_that_a_neighbour_took_is_no_fraction() -> None:
    quotas = RateLimiter()
    call(quotas, 0.0, told(limit=6, remaining=0, reset=60.0))
    call(quotas, 28.0, told(limit=6, remaining=0, reset=60.0))
    assert left(quotas, 28.0) == 0.0


def test_what_is_left_beyond_all_that_we_know_is_believed() -> None:
    quotas = RateLimiter()
    call(quotas, 0.0, told(remaining=10, reset=50.0))
    call(quotas, 0.0, told(remaining=40, reset=20.0))
    assert 38 <= left(quotas, 0.0) <= 40


def test_a_window_is_told_from_a_bucket_and_spent_before_it_is_paced() -> None:
    quotas = windowed()
    for _ in range(50):
        assert quotas.wait(10.0, ONE).seconds == 0
        quotas.reserve(10.0, ONE)
    assert 50.0 < quotas.wait(10.0, ONE).seconds <= 50.3  # a little late, for clocks differ
    assert 0.1 < quotas.wait(59.9, ONE).seconds <= 0.4, "pacing would be refused"
    assert quotas.wait(60.3, ONE).seconds == 0
    assert left(quotas, 60.0) == 60, "a reset is full again"


def test_what_was_reserved_in_a_window_that_has_passed_does_not_come_back_into_the_next() -> None:
    quotas = windowed()
    held = [quotas.reserve(10.0, ONE) for _ in range(50)]
    assert left(quotas, 61.0) == 60
    for reservation in held:
        quotas.release(61.0, reservation)
    quotas.reserve(61.0, Charge(requests=60))
    assert left(quotas, 61.0) == 0


def test_what_rounding_explains_makes_no_window_of_a_bucket() -> None:
    quotas = RateLimiter()
    call(quotas, 0.0, told(limit=40, remaining=1, reset=58.0))
    call(quotas, 60.0, told(limit=40, remaining=0, reset=58.0))  # a minute on, so that it is full at the same second
    assert quotas.wait(60.0, ONE).seconds < 5.0


def test_a_window_that_ends_later_by_the_providers_clock_does_not_empty_the_next() -> None:
    quotas = windowed()
    call(quotas, 60.5, told(remaining=2, reset=-0.5))
    assert left(quotas, 60.5) == 59


def test_who_is_refused_at_the_very_end_of_a_window_waits_for_a_second_not_for_a_minute() -> None:
    quotas = windowed()
    held = [quotas.reserve(60.5, ONE) for _ in range(5)]
    for one in held:
        quotas.record_throttled(60.6, one, 1.0, told(remaining=0, reset=-0.5))
    assert 1.0 <= quotas.wait(60.6, ONE).seconds <= 1.3
    assert quotas.wait(61.9, ONE).seconds == 0
    assert left(quotas, 61.9) == 60


def test_a_header_from_a_window_that_has_passed_says_nothing_of_the_next() -> None:
    quotas = windowed()
    late = quotas.reserve(59.0, ONE)
    assert left(quotas, 60.5) == 60
    quotas.update_from_headers(60.5, told(remaining=3, reset=1.0), late)
    assert left(quotas, 60.5) == 60
    assert left(quotas, 62.0) == 60
    assert quotas.wait(62.0, Charge(requests=60)).seconds == 0


def test_a_bucket_stays_one() -> None:
    quotas = RateLimiter()
    for now in range(0, 300, 5):
        call(quotas, float(now), told(remaining=55, reset=5.0))
    quotas.reserve(300.0, Charge(requests=60))
    assert quotas.wait(300.0, ONE).seconds < 2.0


def test_a_day_is_told_from_a_minute_if_it_is_said_twice() -> None:
    quotas = RateLimiter()
    for n in range(10):
        call(quotas, 0.1 * n, told(limit=10_000, remaining=9_990 - n, reset=8.64 * (10 + n)))
    assert [level.name for level in quotas.levels(1.0)] == ["requests per day"]


@pytest.mark.parametrize("late", [0.0, 0.1, 1.5], ids=["at once", "soon", "with an answer"])
@pytest.mark.parametrize("step", [1, 4, 30])
def test_a_bucket_that_holds_less_than_a_minutes_worth_is_not_taken_for_one_of_a_second(late: float, step: int) -> None:
    quotas = RateLimiter()
    for spent in range(1, 120, step):
        held = quotas.reserve(0.0, ONE)
        quotas.update_from_headers(late, told(limit=720, remaining=120 - spent, reset=spent / 12), held)
        assert [level.name for level in quotas.levels(late)] == ["requests per minute"]


def test_a_second_is_told_from_a_minute() -> None:
    quotas = RateLimiter()
    for spent in (100, 300):
        call(quotas, 0.0, told(limit=720, remaining=720 - spent, reset=spent / 720))
    assert [level.name for level in quotas.levels(0.0)] == ["requests per second"]


def test_windows_of_a_second_are_told_from_a_minute() -> None:
    quotas = RateLimiter()
    for now, remaining in ((0.0, 4), (2.0, 2)):
        call(quotas, now, told(limit=10, remaining=remaining, reset=1.0))
    assert [level.name for level in quotas.levels(2.0)] == ["requests per second"]


def test_who_stands_behind_others_waits_also_for_what_is_never_drained() -> None:
    quotas = RateLimiter()
    for _ in range(2):
        call(quotas, 0.0, told(limit=600, remaining=0, reset=60.0))
    alone, behind = (quotas.wait(0.0, ONE, ahead=Charge(requests=n)).seconds for n in (0, 10))
    assert behind == pytest.approx(alone + 1.0)


def test_a_given_quota_stays_beside_a_wider_one_of_the_provider() -> None:
    quotas = RateLimiter([Quota(requests=5, per="minute")])
    for _ in range(5):
        assert quotas.wait(0.0, ONE).seconds == 0
        call(quotas, 0.0, told(limit=500, remaining=400, reset=12.0))
    assert quotas.wait(0.0, ONE).seconds == pytest.approx(12.0)


# --- lies ----------------------------------------------------------------------------------------------------------


def test_one_slip_in_a_limit_changes_nothing_twice_the_same_does() -> None:
    quotas = RateLimiter()
    call(quotas, 0.0, told())
    call(quotas, 0.0, told(limit=1, remaining=58, reset=2.0))
    assert quotas.levels(0.0)[0].amount == 60
    call(quotas, 0.0, told(limit=120, remaining=100))
    call(quotas, 0.0, told(limit=120, remaining=99))
    assert quotas.levels(0.0)[0].amount == 120


def test_a_limit_that_shrinks_leaves_a_debt_of_one_whole_amount_at_most() -> None:
    quotas = RateLimiter()
    call(quotas, 0.0, told(limit=60, remaining=0))
    quotas.reserve(0.0, Charge(requests=60))
    for _ in range(2):
        held = quotas.reserve(0.0, Charge(requests=0))
        quotas.update_from_headers(0.0, told(limit=6, remaining=None), held)
    assert left(quotas, 0.0) == -6


def test_a_limit_that_was_a_lie_does_not_lock_for_ever() -> None:
    quotas = RateLimiter()
    held = quotas.reserve(0.0, Charge(input_tokens=1))
    quotas.update_from_headers(0.0, [RateLimitHeaders(unit="input_tokens", limit=1, remaining=1, reset=0.0)], held)
    large = Charge(input_tokens=500)
    assert quotas.wait(1.0, large).seconds == math.inf
    assert quotas.wait(121.0, large).seconds == 0, "nothing was heard for two periods: this call will tell"


def test_a_first_limit_that_the_very_call_has_passed_is_none() -> None:
    quotas, large = RateLimiter(), Charge(input_tokens=900)
    told = [RateLimitHeaders(unit="input_tokens", limit=1, remaining=1, reset=60.0)]
    quotas.update_from_headers(0.0, told, quotas.reserve(0.0, large))
    assert quotas.levels(0.0) == []
    assert quotas.wait(0.0, large).seconds == 0.0
    quotas.record_throttled(0.0, quotas.reserve(0.0, large), None, told)
    assert quotas.wait(0.0, large).seconds == math.inf, "it was refused, so it may well be too large"


def test_a_limit_that_nobody_can_reach_is_none_and_what_is_left_still_counts() -> None:
    quotas = RateLimiter()
    call(quotas, 0.0, [RateLimitHeaders(unit="requests", limit=10**12, remaining=10**12, reset=60.0)])
    assert quotas.levels(0.0) == []
    call(quotas, 0.0, told(remaining=30))
    for _ in range(3):
        call(quotas, 0.1, [RateLimitHeaders(unit="requests", limit=10**12, remaining=2, reset=60.0)])
    (level,) = quotas.levels(0.1)
    assert level.amount == 60
    assert level.remaining <= 2


@pytest.mark.parametrize(
    "notice",
    [
        RateLimitHeaders(unit="requests", limit=0, remaining=0, reset=60.0),
        RateLimitHeaders(unit="requests", limit=-4, remaining=-4, reset=-1.0),
        RateLimitHeaders(unit="requests", limit=None, remaining=None, reset=5.0),
        RateLimitHeaders(unit="bananas", limit=5, remaining=0, reset=60.0),
    ],
)
def test_what_cannot_be_meant_teaches_nothing(notice: RateLimitHeaders) -> None:
    quotas = RateLimiter()
    call(quotas, 0.0, [notice])
    assert quotas.levels(0.0) == []
    assert quotas.wait(0.0, ONE) == (0.0, None)


@pytest.mark.parametrize("reset", [0.0, -3.0, math.inf, math.nan, 1e12, None])
def test_a_reset_that_cannot_be_meant_is_passed_over(reset: float | None) -> None:
    quotas = RateLimiter()
    for _ in range(5):
        call(quotas, 0.0, told(remaining=0, reset=reset))
    assert quotas.wait(0.0, ONE).seconds < 10.0


def test_more_left_than_the_limit_is_the_limit() -> None:
    quotas = RateLimiter()
    call(quotas, 0.0, told(remaining=10**12))
    assert left(quotas, 0.0) == 60


def test_one_long_reset_does_not_lock_for_its_length() -> None:
    quotas = RateLimiter()
    call(quotas, 0.0, told(remaining=0, reset=86_000.0))
    assert quotas.wait(0.0, ONE).seconds < 10.0


def test_a_refusal_with_headers_empties_what_they_say_is_empty() -> None:
    quotas = RateLimiter([Quota(requests=60, per="minute")])
    quotas.record_throttled(0.0, quotas.reserve(0.0, ONE), None, told(remaining=0, reset=60.0))
    assert quotas.wait(0.0, ONE).seconds == pytest.approx(1.0, rel=0.7)
    assert quotas.wait(0.0, ONE).seconds > 0


def test_a_clock_that_goes_back_keeps_a_window_as_long() -> None:
    quotas = windowed(now=1000.0 - 1000.0)
    for _ in range(50):
        quotas.reserve(10.0, ONE)
    wait = quotas.wait(10.0, ONE).seconds
    assert quotas.wait(-5000.0, ONE).seconds == pytest.approx(wait)


# --- when headers need not be read ---


def test_where_nothing_is_known_every_header_matters() -> None:
    quotas = RateLimiter([Quota(requests=60, per="minute")])
    assert quotas.needs_headers(0.0)
    quotas.update_from_headers(0.0, [], quotas.reserve(0.0, ONE))
    assert quotas.needs_headers(0.0)


def test_a_moment_after_headers_that_left_much_the_next_need_not_be_read() -> None:
    quotas = RateLimiter()
    call(quotas, 0.0, told(remaining=31))
    assert not quotas.needs_headers(0.09)
    assert quotas.needs_headers(0.1)


def test_once_half_of_one_quota_is_used_every_header_matters() -> None:
    quotas = RateLimiter()
    call(quotas, 0.0, [*told(remaining=59), RateLimitHeaders(unit="tokens", limit=1000, remaining=499, reset=30.0)])
    assert quotas.needs_headers(0.0)


def test_the_moment_is_as_short_as_the_period() -> None:
    quotas = RateLimiter([Quota(requests=60, per="second")])
    call(quotas, 0.0, told(remaining=59, reset=0.02))
    assert not quotas.needs_headers(0.0016)
    assert quotas.needs_headers(0.0017)


def test_answers_without_headers_do_not_make_the_moment_longer() -> None:
    quotas = RateLimiter()
    call(quotas, 0.0, told(remaining=50))
    call(quotas, 0.08, [])
    assert quotas.needs_headers(0.1)


def test_after_a_clock_that_went_back_headers_are_read_at_once() -> None:
    quotas = RateLimiter()
    call(quotas, 1000.0, told(remaining=50))
    quotas.wait(10.0, ONE)
    assert quotas.needs_headers(10.0)
