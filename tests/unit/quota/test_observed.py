"""Rate limits learned from headers, and the headers that are ignored."""

from __future__ import annotations

import math

import pytest

from forebay.interfaces import Charge, RateLimitHeaders
from forebay.quota import Quota, QuotaReservation, RateLimiter

ONE = Charge()


def requests_headers(
    limit: int | None = 60, remaining: int | None = 59, reset: float | None = 1.0
) -> list[RateLimitHeaders]:
    return [RateLimitHeaders(unit="requests", limit=limit, remaining=remaining, reset=reset)]


def call(limiter: RateLimiter, now: float, headers: list[RateLimitHeaders]) -> QuotaReservation:
    """Make one call that is answered at once."""
    held = limiter.reserve(now, ONE)
    limiter.update_from_headers(now, headers, held)
    limiter.settle(now, held, ONE)
    return held


def learned_level(limiter: RateLimiter, now: float) -> float:
    return next(level.remaining for level in limiter.levels(now) if level.learned)


def limiter_with_window(now: float = 0.0, *, remaining: int = 50) -> RateLimiter:
    """Return a limiter that has observed a window of 60 requests that ends at second 60."""
    limiter = RateLimiter()
    call(limiter, now, requests_headers(remaining=remaining + 1, reset=60 - now))
    call(limiter, now + 10, requests_headers(remaining=remaining, reset=50 - now))
    return limiter


def test_a_limit_is_learned_from_headers() -> None:
    limiter = RateLimiter()
    assert limiter.wait(0.0, ONE) == (0.0, None)
    call(limiter, 0.0, requests_headers(remaining=0, reset=60.0))
    assert limiter.wait(0.0, ONE).limited_by == "requests per minute"
    assert limiter.wait(0.0, Charge(requests=61)).seconds == math.inf


def test_calls_sent_after_the_answered_one_are_still_taken_off() -> None:
    limiter = RateLimiter()
    first = limiter.reserve(0.0, ONE)
    for _ in range(9):
        limiter.reserve(0.0, ONE)
    limiter.update_from_headers(0.0, requests_headers(remaining=59), first)
    assert learned_level(limiter, 0.0) == 50


def test_a_request_that_the_provider_failed_is_not_taken_as_counted_until_a_header_says_so() -> None:
    limiter = limiter_with_window(remaining=50)
    for _ in range(3):
        limiter.settle(20.0, limiter.reserve(20.0, ONE), ONE, failed=True)
    assert learned_level(limiter, 20.0) == 50
    call(limiter, 21.0, requests_headers(remaining=46, reset=39.0))
    assert learned_level(limiter, 21.0) == 46


def test_a_request_that_the_provider_failed_uses_a_given_quota() -> None:
    limiter = RateLimiter([Quota(requests=60, per="minute")])
    limiter.settle(0.0, limiter.reserve(0.0, ONE), ONE, failed=True)
    assert limiter.levels(0.0)[0].remaining == 59


def test_headers_that_our_own_calls_explain_correct_nothing() -> None:
    limiter = RateLimiter()
    call(limiter, 0.0, requests_headers(remaining=59))
    held = [limiter.reserve(0.0, ONE) for _ in range(10)]
    before = learned_level(limiter, 0.0)
    for n in (9, 0, 5, 3, 8, 1):
        limiter.update_from_headers(0.0, requests_headers(remaining=58 - n), held[n])
    assert learned_level(limiter, 0.0) == before == 49


def test_use_by_others_is_taken_off() -> None:
    limiter = RateLimiter()
    call(limiter, 0.0, requests_headers(remaining=59))
    call(limiter, 0.0, requests_headers(remaining=20, reset=40.0))
    assert learned_level(limiter, 0.0) == 20


def test_the_fraction_that_headers_leave_out_is_not_lost() -> None:
    limiter = RateLimiter()
    call(limiter, 0.0, requests_headers(limit=6, remaining=0, reset=60.0))
    call(
        limiter, 18.0, requests_headers(limit=6, remaining=0, reset=52.0)
    )  # of the 1.8 that were refilled, 0.8 is left
    assert learned_level(limiter, 18.0) == pytest.approx(0.8)


def test_a_whole_request_of_another_client_is_taken_off() -> None:
    limiter = RateLimiter()
    call(limiter, 0.0, requests_headers(limit=6, remaining=0, reset=60.0))
    call(limiter, 28.0, requests_headers(limit=6, remaining=0, reset=60.0))
    assert learned_level(limiter, 28.0) == 0.0


def test_a_higher_level_than_our_count_explains_is_followed() -> None:
    limiter = RateLimiter()
    call(limiter, 0.0, requests_headers(remaining=10, reset=50.0))
    call(limiter, 0.0, requests_headers(remaining=40, reset=20.0))
    assert 38 <= learned_level(limiter, 0.0) <= 40


def test_a_window_is_told_from_a_bucket_and_used_up_at_once() -> None:
    limiter = limiter_with_window()
    for _ in range(50):
        assert limiter.wait(10.0, ONE).seconds == 0
        limiter.reserve(10.0, ONE)
    assert 50.0 < limiter.wait(10.0, ONE).seconds <= 50.3  # a little late, because clocks differ
    assert 0.1 < limiter.wait(59.9, ONE).seconds <= 0.4, "paced calls would be refused"
    assert limiter.wait(60.3, ONE).seconds == 0
    assert learned_level(limiter, 60.0) == 60, "a reset is full again"


def test_a_reservation_of_a_past_window_is_not_refunded_into_the_next() -> None:
    limiter = limiter_with_window()
    held = [limiter.reserve(10.0, ONE) for _ in range(50)]
    assert learned_level(limiter, 61.0) == 60
    for reservation in held:
        limiter.release(61.0, reservation)
    limiter.reserve(61.0, Charge(requests=60))
    assert learned_level(limiter, 61.0) == 0


def test_rounding_does_not_turn_a_bucket_into_a_window() -> None:
    limiter = RateLimiter()
    call(limiter, 0.0, requests_headers(limit=40, remaining=1, reset=58.0))
    call(
        limiter, 60.0, requests_headers(limit=40, remaining=0, reset=58.0)
    )  # a minute later, so that it is full at the same second
    assert limiter.wait(60.0, ONE).seconds < 5.0


def test_headers_of_a_window_that_ends_late_do_not_empty_the_next() -> None:
    limiter = limiter_with_window()
    call(limiter, 60.5, requests_headers(remaining=2, reset=-0.5))
    assert learned_level(limiter, 60.5) == 59


def test_a_call_throttled_at_the_end_of_a_window_waits_a_second_not_a_minute() -> None:
    limiter = limiter_with_window()
    held = [limiter.reserve(60.5, ONE) for _ in range(5)]
    for one in held:
        limiter.record_throttled(60.6, one, 1.0, requests_headers(remaining=0, reset=-0.5))
    assert 1.0 <= limiter.wait(60.6, ONE).seconds <= 1.3
    assert limiter.wait(61.9, ONE).seconds == 0
    assert learned_level(limiter, 61.9) == 60


def test_headers_of_a_past_window_do_not_change_the_next() -> None:
    limiter = limiter_with_window()
    late = limiter.reserve(59.0, ONE)
    assert learned_level(limiter, 60.5) == 60
    limiter.update_from_headers(60.5, requests_headers(remaining=3, reset=1.0), late)
    assert learned_level(limiter, 60.5) == 60
    assert learned_level(limiter, 62.0) == 60
    assert limiter.wait(62.0, Charge(requests=60)).seconds == 0


def test_a_window_that_begins_with_its_first_call_stays_a_window() -> None:
    limiter = limiter_with_window()
    for start in (62.0, 124.0, 186.0):  # each two seconds later than the one before would have begun
        call(limiter, start, requests_headers(remaining=59, reset=60.0))
    assert limiter.wait(187.0, Charge(requests=60)).seconds == pytest.approx(246.0 - 187.0, abs=0.5)


def test_a_bucket_stays_a_bucket() -> None:
    limiter = RateLimiter()
    for now in range(0, 300, 5):
        call(limiter, float(now), requests_headers(remaining=55, reset=5.0))
    limiter.reserve(300.0, Charge(requests=60))
    assert limiter.wait(300.0, ONE).seconds < 2.0


def test_a_period_of_a_day_is_learned_from_two_headers() -> None:
    limiter = RateLimiter()
    for n in range(10):
        call(limiter, 0.1 * n, requests_headers(limit=10_000, remaining=9_990 - n, reset=8.64 * (10 + n)))
    assert [level.name for level in limiter.levels(1.0)] == ["requests per day"]


@pytest.mark.parametrize("late", [0.0, 0.1, 1.5], ids=["at once", "soon", "with an answer"])
@pytest.mark.parametrize("step", [1, 4, 30])
def test_a_bucket_that_holds_less_than_a_minutes_amount_is_not_taken_for_one_of_a_second(
    late: float, step: int
) -> None:
    limiter = RateLimiter()
    for spent in range(1, 120, step):
        held = limiter.reserve(0.0, ONE)
        limiter.update_from_headers(late, requests_headers(limit=720, remaining=120 - spent, reset=spent / 12), held)
        assert [level.name for level in limiter.levels(late)] == ["requests per minute"]


def test_resets_that_a_late_clock_makes_too_long_do_not_turn_a_minute_into_an_hour() -> None:
    limiter = RateLimiter()
    for remaining in (1, 0, 0, 0):  # a Date header that is ten seconds old
        call(limiter, 0.1, requests_headers(limit=50, remaining=remaining, reset=69.9))
    assert [level.name for level in limiter.levels(0.1)] == ["requests per minute"]


def test_a_period_of_a_second_is_learned() -> None:
    limiter = RateLimiter()
    for spent in (100, 300):
        call(limiter, 0.0, requests_headers(limit=720, remaining=720 - spent, reset=spent / 720))
    assert [level.name for level in limiter.levels(0.0)] == ["requests per second"]


def test_windows_of_a_second_are_learned() -> None:
    limiter = RateLimiter()
    for now, remaining in ((0.0, 4), (2.0, 2)):
        call(limiter, now, requests_headers(limit=10, remaining=remaining, reset=1.0))
    assert [level.name for level in limiter.levels(2.0)] == ["requests per second"]


@pytest.mark.parametrize("limit", [2, 4, 20])
def test_more_calls_than_a_minute_grants_show_that_a_small_limit_is_one_of_a_second(limit: int) -> None:
    limiter = RateLimiter()
    for second in range(8):
        for sent in range(limit):
            call(limiter, second + sent / limit, requests_headers(limit, limit - sent - 1, 1 - sent / limit))
    assert [level.name for level in limiter.levels(8.0)] == ["requests per second"]


def test_calls_at_the_end_of_one_window_and_the_begin_of_the_next_do_not_shorten_its_period() -> None:
    limiter = RateLimiter()
    for at in (59.0, 60.0, 119.0, 120.0):
        for sent in range(20):
            call(limiter, at, requests_headers(20, 20 - sent - 1, 60 - at % 60))
    assert [level.name for level in limiter.levels(120.0)] == ["requests per minute"]


def test_no_period_is_shorter_than_a_reset_that_was_reported() -> None:
    limiter = RateLimiter()
    for sent in range(1_000):
        call(limiter, sent / 10, requests_headers(20, sent % 3, 50.0))
    assert [level.name for level in limiter.levels(100.0)] == ["requests per minute"]
    assert not limiter.wait(100.0, ONE).seconds, "it is not believed"


def test_limits_that_come_and_go_are_not_believed() -> None:
    limiter = RateLimiter()
    for at in range(12):
        call(limiter, at / 10, requests_headers(20, 0, 60.0) if at % 3 else requests_headers(10_000, 9_990, 0.1))
    assert not limiter.wait(1.2, ONE).seconds
    assert not limiter.wait(1.2, Charge(requests=21)).seconds


def test_a_limit_that_falls_and_one_that_changes_a_little_are_believed() -> None:
    limiter = RateLimiter()
    for at in range(12):
        call(limiter, at / 10, requests_headers(20 if at % 3 else 24, at % 2, 60.0))
    assert limiter.wait(1.2, Charge(requests=5)).seconds
    for _ in range(2):
        call(limiter, 2.1, requests_headers(5, 0, 60.0))
    assert limiter.wait(2.1, ONE).seconds


def test_a_used_up_window_gets_no_refund_of_what_was_estimated_too_high() -> None:
    limiter, end = RateLimiter(), 60.0

    def headers(remaining: int, reset: float) -> list[RateLimitHeaders]:
        return [RateLimitHeaders(unit="input_tokens", limit=1_000, remaining=remaining, reset=reset)]

    small = Charge(input_tokens=10)
    for at, remaining in ((0.0, 990), (10.0, 980)):
        held = limiter.reserve(at, small)
        limiter.update_from_headers(at, headers(remaining, end - at), held)
        limiter.settle(at, held, small)
    under_way = limiter.reserve(20.0, Charge(input_tokens=900))
    refused = limiter.reserve(20.0, Charge(input_tokens=60))
    limiter.record_throttled(20.1, refused, 40.0, headers(40, 39.9))
    limiter.settle(21.0, under_way, Charge(input_tokens=800))
    assert limiter.wait(21.0, small).seconds > 30.0


def exhausted_limiter() -> RateLimiter:
    """Return a limiter that has observed a used-up limit of 20 requests a minute."""
    limiter = RateLimiter()
    for at in (0.0, 5.0, 10.0):
        call(limiter, at, requests_headers(20, 0, 60.0 - at))
    return limiter


def test_a_call_that_a_learned_quota_does_not_allow_goes_as_a_trial_now_and_then() -> None:
    limiter = exhausted_limiter()
    assert limiter.wait(10.0, ONE).seconds > 30.0
    seconds = limiter.wait(10.0, ONE, trial=True).seconds
    assert seconds == pytest.approx(0.0), "it was used up at first sight"
    trial = limiter.reserve(10.0, ONE, trial=True)
    assert trial.trial_of == ("requests",)
    assert limiter.wait(11.0, ONE, trial=True).seconds > 40.0, "one at a time"
    limiter.record_throttled(12.0, trial, headers=requests_headers(20, 0, 48.0))
    assert limiter.wait(32.0, ONE, trial=True).seconds > 20.0


def test_a_limit_that_falls_as_its_calls_explain_is_doubted_after_minutes_only() -> None:
    limiter = RateLimiter()
    for sent in range(20):
        call(limiter, sent / 10, requests_headers(20, 19 - sent, 60.0 - sent / 10))
    call(limiter, 10.0, requests_headers(20, 0, 50.0))
    assert limiter.wait(10.0, ONE, trial=True).seconds > 40.0


def test_a_paced_bucket_that_is_always_empty_is_not_suspected() -> None:
    limiter, now = RateLimiter(), 0.0
    for sent in range(20):
        call(limiter, now, requests_headers(20, 19 - sent, 3.0 * sent))
    for _ in range(30):
        now += 3.1
        call(limiter, now, requests_headers(20, 0, 59.5))
    limiter.reserve(now, Charge(requests=5))
    assert limiter.wait(now, ONE, trial=True).seconds > 3.0
    assert limiter.wait(now + 6.0, ONE, trial=True).seconds > 3.0


def test_a_remaining_amount_that_rises_again_and_again_is_doubted_within_seconds() -> None:
    limiter = RateLimiter()
    for sent in range(20):
        call(limiter, sent / 10, requests_headers(1_000, 999 - sent, 86_400.0))
    for sent in range(20):
        call(limiter, 2 + sent / 10, requests_headers(1_000, sent % 3, 86_400.0))
    assert limiter.wait(4.0, ONE, trial=True).seconds <= 5.0 < limiter.wait(4.0, ONE).seconds


def test_a_given_quota_is_not_doubted() -> None:
    limiter = RateLimiter([Quota(requests=1, per="hour")])
    limiter.reserve(0.0, ONE)
    assert limiter.wait(0.0, ONE, trial=True).seconds > 3000.0


@pytest.mark.parametrize("ends", ["settled", "released", "failed"])
def test_a_quota_that_says_empty_while_trials_are_accepted_is_not_believed(ends: str) -> None:
    limiter, now, trials = exhausted_limiter(), 10.0, 0
    for _ in range(4):
        now += min(limiter.wait(now, ONE, trial=True).seconds, 100.0)
        held = limiter.reserve(now, ONE, trial=True)
        trials += bool(held.trial_of)
        if ends == "released":
            limiter.release(now, held)
        else:
            if ends == "settled":
                limiter.update_from_headers(now, requests_headers(20, trials % 2, 58.0), held)
            limiter.settle(now, held, ONE, failed=ends == "failed")
    assert trials == 4
    assert (limiter.wait(now, ONE).seconds == 0.0) == (ends == "settled")


def test_a_call_behind_others_waits_for_the_margin_too() -> None:
    limiter = RateLimiter()
    for _ in range(2):
        call(limiter, 0.0, requests_headers(limit=600, remaining=0, reset=60.0))
    alone, behind = (limiter.wait(0.0, ONE, ahead=Charge(requests=n)).seconds for n in (0, 10))
    assert behind == pytest.approx(alone + 1.0)


def test_a_given_quota_holds_beside_a_wider_one_of_the_provider() -> None:
    limiter = RateLimiter([Quota(requests=5, per="minute")])
    for _ in range(5):
        assert limiter.wait(0.0, ONE).seconds == 0
        call(limiter, 0.0, requests_headers(limit=500, remaining=400, reset=12.0))
    assert limiter.wait(0.0, ONE).seconds == pytest.approx(12.0)


# --- impossible headers ----------------------------------------------------------------------------------------------


def test_a_new_limit_must_be_seen_twice() -> None:
    limiter = RateLimiter()
    call(limiter, 0.0, requests_headers())
    call(limiter, 0.0, requests_headers(limit=1, remaining=58, reset=2.0))
    assert limiter.levels(0.0)[0].amount == 60
    call(limiter, 0.0, requests_headers(limit=120, remaining=100))
    call(limiter, 0.0, requests_headers(limit=120, remaining=99))
    assert limiter.levels(0.0)[0].amount == 120


def test_a_limit_that_shrinks_leaves_a_debt_of_at_most_one_amount() -> None:
    limiter = RateLimiter()
    call(limiter, 0.0, requests_headers(limit=60, remaining=0))
    limiter.reserve(0.0, Charge(requests=60))
    for _ in range(2):
        held = limiter.reserve(0.0, Charge(requests=0))
        limiter.update_from_headers(0.0, requests_headers(limit=6, remaining=None), held)
    assert learned_level(limiter, 0.0) == -6


def test_a_wrong_limit_does_not_block_calls_forever() -> None:
    limiter = RateLimiter()
    held = limiter.reserve(0.0, Charge(input_tokens=1))
    limiter.update_from_headers(0.0, [RateLimitHeaders(unit="input_tokens", limit=1, remaining=1, reset=0.0)], held)
    large = Charge(input_tokens=500)
    assert limiter.wait(1.0, large).seconds == math.inf
    assert limiter.wait(121.0, large).seconds == 0, "the limit is stale after two periods without headers"


def test_a_first_limit_below_the_accepted_call_is_ignored() -> None:
    limiter, large = RateLimiter(), Charge(input_tokens=900)
    headers = [RateLimitHeaders(unit="input_tokens", limit=1, remaining=1, reset=60.0)]
    limiter.update_from_headers(0.0, headers, limiter.reserve(0.0, large))
    assert limiter.levels(0.0) == []
    assert limiter.wait(0.0, large).seconds == 0.0
    limiter.record_throttled(0.0, limiter.reserve(0.0, large), None, headers)
    assert limiter.wait(0.0, large).seconds == math.inf, "it was throttled, so it may be too large"


def test_an_impossible_limit_is_ignored_but_its_remaining_counts() -> None:
    limiter = RateLimiter()
    call(limiter, 0.0, [RateLimitHeaders(unit="requests", limit=10**12, remaining=10**12, reset=60.0)])
    assert limiter.levels(0.0) == []
    call(limiter, 0.0, requests_headers(remaining=30))
    for _ in range(3):
        call(limiter, 0.1, [RateLimitHeaders(unit="requests", limit=10**12, remaining=2, reset=60.0)])
    (level,) = limiter.levels(0.1)
    assert level.amount == 60
    assert level.remaining <= 2


@pytest.mark.parametrize(
    "header",
    [
        RateLimitHeaders(unit="requests", limit=0, remaining=0, reset=60.0),
        RateLimitHeaders(unit="requests", limit=-4, remaining=-4, reset=-1.0),
        RateLimitHeaders(unit="requests", limit=None, remaining=None, reset=5.0),
        RateLimitHeaders(unit="bananas", limit=5, remaining=0, reset=60.0),
    ],
)
def test_impossible_headers_are_ignored(header: RateLimitHeaders) -> None:
    limiter = RateLimiter()
    call(limiter, 0.0, [header])
    assert limiter.levels(0.0) == []
    assert limiter.wait(0.0, ONE) == (0.0, None)


@pytest.mark.parametrize("reset", [0.0, -3.0, math.inf, math.nan, 1e12, None])
def test_an_impossible_reset_is_ignored(reset: float | None) -> None:
    limiter = RateLimiter()
    for _ in range(5):
        call(limiter, 0.0, requests_headers(remaining=0, reset=reset))
    assert limiter.wait(0.0, ONE).seconds < 10.0


def test_remaining_is_bounded_by_the_limit() -> None:
    limiter = RateLimiter()
    call(limiter, 0.0, requests_headers(remaining=10**12))
    assert learned_level(limiter, 0.0) == 60


def test_one_long_reset_does_not_block_for_its_length() -> None:
    limiter = RateLimiter()
    call(limiter, 0.0, requests_headers(remaining=0, reset=86_000.0))
    assert limiter.wait(0.0, ONE).seconds < 10.0


def test_headers_of_a_throttled_call_lower_the_level() -> None:
    limiter = RateLimiter([Quota(requests=60, per="minute")])
    limiter.record_throttled(0.0, limiter.reserve(0.0, ONE), None, requests_headers(remaining=0, reset=60.0))
    assert limiter.wait(0.0, ONE).seconds == pytest.approx(1.0, rel=0.7)
    assert limiter.wait(0.0, ONE).seconds > 0


def test_a_clock_that_goes_back_keeps_the_time_until_the_window_resets() -> None:
    limiter = limiter_with_window(now=1000.0 - 1000.0)
    for _ in range(50):
        limiter.reserve(10.0, ONE)
    wait = limiter.wait(10.0, ONE).seconds
    assert limiter.wait(-5000.0, ONE).seconds == pytest.approx(wait)


# --- when headers need not be parsed ---------------------------------------------------------------------------------


def test_headers_are_needed_while_no_limit_is_known() -> None:
    limiter = RateLimiter([Quota(requests=60, per="minute")])
    assert limiter.needs_headers(0.0)
    limiter.update_from_headers(0.0, [], limiter.reserve(0.0, ONE))
    assert limiter.needs_headers(0.0)


def test_shortly_after_headers_that_left_much_the_next_are_not_needed() -> None:
    limiter = RateLimiter()
    call(limiter, 0.0, requests_headers(remaining=31))
    assert not limiter.needs_headers(0.09)
    assert limiter.needs_headers(0.1)


def test_headers_are_needed_once_half_of_a_quota_is_used() -> None:
    limiter = RateLimiter()
    call(
        limiter,
        0.0,
        [*requests_headers(remaining=59), RateLimitHeaders(unit="tokens", limit=1000, remaining=499, reset=30.0)],
    )
    assert limiter.needs_headers(0.0)


def test_the_moment_without_headers_shortens_with_the_period() -> None:
    limiter = RateLimiter([Quota(requests=60, per="second")])
    call(limiter, 0.0, requests_headers(remaining=59, reset=0.02))
    assert not limiter.needs_headers(0.0016)
    assert limiter.needs_headers(0.0017)


def test_answers_without_headers_do_not_prolong_the_moment() -> None:
    limiter = RateLimiter()
    call(limiter, 0.0, requests_headers(remaining=50))
    call(limiter, 0.08, [])
    assert limiter.needs_headers(0.1)


def test_headers_are_needed_after_the_clock_went_back() -> None:
    limiter = RateLimiter()
    call(limiter, 1000.0, requests_headers(remaining=50))
    limiter.wait(10.0, ONE)
    assert limiter.needs_headers(10.0)


# --- headers that contradict what is accepted ---


def test_a_remaining_amount_that_never_changes_while_calls_are_accepted_is_not_believed() -> None:
    limiter = RateLimiter()
    under_way = [limiter.reserve(0.0, ONE) for _ in range(10)]
    for held in under_way:
        limiter.update_from_headers(5.0, requests_headers(remaining=0, reset=55.0), held)
        limiter.settle(5.0, held, ONE)
    assert learned_level(limiter, 5.0) == pytest.approx(50, abs=6)
    call(limiter, 6.0, requests_headers(remaining=0, reset=54.0))
    assert limiter.wait(6.0, ONE).seconds == 0.0


def test_a_remaining_amount_that_changes_is_believed_again() -> None:
    limiter = RateLimiter()
    for held in [limiter.reserve(0.0, ONE) for _ in range(10)]:
        limiter.update_from_headers(5.0, requests_headers(remaining=0, reset=55.0), held)
    call(limiter, 6.0, requests_headers(remaining=3, reset=54.0))
    assert learned_level(limiter, 6.0) <= 4


def test_a_refusal_makes_an_unchanged_remaining_amount_credible() -> None:
    limiter = RateLimiter()
    for held in [limiter.reserve(0.0, ONE) for _ in range(10)]:
        limiter.update_from_headers(5.0, requests_headers(remaining=0, reset=55.0), held)
    limiter.record_throttled(6.0, limiter.reserve(6.0, ONE), None, requests_headers(remaining=0, reset=54.0))
    assert limiter.wait(6.0, ONE).seconds > 0.5


def limiter_with_a_made_up_remaining() -> RateLimiter:
    """Return a limiter in a window of 60 that ends at second 60. Its headers have shown 0 after nine calls."""
    limiter = limiter_with_window()
    for held in [limiter.reserve(19.0, ONE) for _ in range(9)]:
        limiter.update_from_headers(20.0, requests_headers(remaining=0, reset=40.0), held)
        limiter.settle(20.0, held, ONE)
    return limiter


def test_a_refusal_does_not_make_a_made_up_remaining_amount_credible_in_the_next_window() -> None:
    limiter = limiter_with_a_made_up_remaining()
    limiter.record_throttled(30.0, limiter.reserve(30.0, ONE), None, requests_headers(remaining=0, reset=30.0))
    assert limiter.wait(30.0, ONE).seconds == pytest.approx(30, abs=1)
    call(limiter, 61.0, requests_headers(remaining=0, reset=59.0))
    assert learned_level(limiter, 61.0) == 59


def test_input_tokens_that_are_left_may_be_made_up_too() -> None:
    def headers(remaining: int, reset: float) -> list[RateLimitHeaders]:
        return [RateLimitHeaders(unit="input_tokens", limit=6000, remaining=remaining, reset=reset)]

    limiter, charge = RateLimiter(), Charge(input_tokens=100, output_tokens=10)
    for at in (0.0, 10.0):
        limiter.update_from_headers(at, headers(5000, 60 - at), limiter.reserve(at, charge))
    for held in [limiter.reserve(19.0, charge) for _ in range(9)]:
        limiter.update_from_headers(20.0, headers(0, 40.0), held)
    limiter.record_throttled(30.0, limiter.reserve(30.0, charge), None, headers(0, 30.0))
    limiter.update_from_headers(61.0, headers(0, 59.0), limiter.reserve(61.0, charge))
    assert learned_level(limiter, 61.0) == 5900


def test_a_remaining_amount_that_changes_is_believed_again_after_a_refusal() -> None:
    limiter = limiter_with_a_made_up_remaining()
    limiter.record_throttled(30.0, limiter.reserve(30.0, ONE), None, requests_headers(remaining=0, reset=30.0))
    call(limiter, 61.0, requests_headers(remaining=5, reset=59.0))
    assert learned_level(limiter, 61.0) == 5


def test_what_a_refusal_took_off_is_not_returned_in_the_next_window() -> None:
    limiter = limiter_with_window(remaining=50)
    limiter.record_throttled(30.0, limiter.reserve(30.0, ONE), None, requests_headers(remaining=0, reset=30.0))
    under_way = [limiter.reserve(61.0, ONE) for _ in range(40)]
    for held in under_way[:9]:
        limiter.update_from_headers(62.0, requests_headers(remaining=0, reset=58.0), held)
    assert learned_level(limiter, 62.0) == 20


def test_what_headers_took_off_a_window_is_not_returned_in_the_next() -> None:
    limiter = limiter_with_window(remaining=50)
    for held in [limiter.reserve(20.0, ONE) for _ in range(5)]:
        limiter.update_from_headers(21.0, requests_headers(remaining=0, reset=39.0), held)
    under_way = [limiter.reserve(61.0, ONE) for _ in range(40)]
    for held in under_way[:9]:
        limiter.update_from_headers(62.0, requests_headers(remaining=0, reset=58.0), held)
    assert learned_level(limiter, 62.0) == 20
