"""Doubt about a quota that headers show: when trial calls go, and when it is believed no more."""

from __future__ import annotations

import math

from forebay.quota.quota_doubt import QuotaDoubt


def doubt_of(amount: float = 60.0) -> QuotaDoubt:
    return QuotaDoubt(0.0, amount, rate=amount / 6.0)


def accept_trials(doubt: QuotaDoubt, now: float, count: int, amount: float = 1.0) -> None:
    for _ in range(count):
        assert doubt.trial_wait(now, math.inf) == 0.0
        doubt.record_sent()
        doubt.record_trial_accepted(now, amount)


def test_a_trial_goes_after_five_periods_or_minutes_and_one_at_a_time() -> None:
    doubt = doubt_of()
    assert doubt.trial_wait(0.0, math.inf) == 30.0
    assert doubt.trial_wait(31.0, math.inf) == 0.0
    doubt.record_sent()
    assert doubt.trial_wait(40.0, math.inf) == math.inf
    assert QuotaDoubt(0.0, 10_000.0, rate=10_000.0 / 86_400.0).trial_wait(0.0, math.inf) == 300.0


def test_a_trial_goes_soon_if_the_headers_do_not_fit_unless_one_was_refused() -> None:
    doubt = doubt_of()
    doubt.suspect(1.0)
    assert doubt.trial_wait(1.0, math.inf) == 5.0
    doubt.begin(2.0, 1_000.0, 0.01)
    assert doubt.trial_wait(2.0, math.inf) == 4.0
    doubt.record_sent()
    doubt.record_refused(6.0)
    doubt.suspect(6.0)
    assert doubt.trial_wait(6.0, math.inf) == 600.0


def test_a_trial_goes_when_the_quota_should_be_full_by_its_headers() -> None:
    doubt = doubt_of()
    assert doubt.trial_wait(1.0, promised=3.0) == 2.0
    doubt.record_sent()
    doubt.record_refused(3.0)
    assert doubt.trial_wait(4.0, promised=5.0) > 30.0, "they were wrong"


def test_each_refused_trial_makes_the_next_one_rarer_up_to_one_an_hour() -> None:
    doubt, now, trials = doubt_of(), 0.0, 0
    waits = []
    while trials < 20:
        waits.append(doubt.trial_wait(now, math.inf))
        now += waits[-1]
        doubt.record_sent()
        doubt.record_refused(now)
        trials += 1
    assert waits == sorted(waits)
    assert waits[:3] == [30.0, 60.0, 120.0]
    assert waits[-1] == 3600.0


def test_a_refusal_while_no_trial_is_open_says_nothing_about_trials() -> None:
    doubt = doubt_of()
    doubt.record_refused(1.0)
    assert doubt.trial_wait(1.0, math.inf) == 29.0


def test_a_quota_whose_trials_are_accepted_again_and_again_is_not_believed() -> None:
    doubt = doubt_of()
    accept_trials(doubt, 30.0, 3)
    assert doubt.is_believed(30.0)
    accept_trials(doubt, 30.0, 1)
    assert not doubt.is_believed(30.0)


def test_a_few_small_calls_beyond_a_large_quota_do_not_disprove_it() -> None:
    doubt = doubt_of(amount=100_000.0)
    accept_trials(doubt, 30.0, 6)
    assert doubt.is_believed(30.0)
    accept_trials(doubt, 30.0, 1, amount=6_000.0)
    assert not doubt.is_believed(30.0)


def test_a_refusal_makes_a_quota_believed_again() -> None:
    doubt = doubt_of()
    accept_trials(doubt, 30.0, 4)
    doubt.record_refused(31.0)
    assert doubt.is_believed(31.0)
    assert doubt.trial_wait(31.0, math.inf) == 60.0


def test_a_refusal_is_not_for_a_quota_that_was_exceeded_twice() -> None:
    doubt = doubt_of()
    accept_trials(doubt, 30.0, 4)
    for _ in range(1_000):
        doubt.record_accepted(1.0)
    doubt.record_refused(60.0)
    assert not doubt.is_believed(60.0)


def test_a_refuted_quota_is_believed_after_ten_minutes_whatever_is_refused() -> None:
    doubt = doubt_of()
    doubt.refute(0.0)
    doubt.begin(1.0, 20.0, 1.0)
    doubt.record_refused(2.0)
    assert not doubt.is_believed(599.0)
    assert doubt.is_believed(600.0)
    accept_trials(doubt, 640.0, 4)
    doubt.record_refused(641.0)
    assert doubt.is_believed(641.0)


def test_a_trial_that_says_nothing_goes_once_more() -> None:
    doubt = doubt_of()
    doubt.record_sent()
    doubt.cancel(30.0)
    assert doubt.trial_wait(30.0, math.inf) == 5.0


def test_a_trial_that_says_nothing_is_not_repeated_at_once_because_the_quota_should_be_full() -> None:
    doubt = doubt_of()
    for end in (doubt.cancel, doubt.record_unanswered):
        doubt.record_sent()
        end(30.0)
        assert doubt.trial_wait(30.0, promised=3.0) >= 5.0
    doubt.record_trial_accepted(30.0, 1.0)
    assert doubt.trial_wait(30.0, promised=3.0) == 0.0, "the next one is due"


def test_accepted_trials_between_others_that_were_left_are_no_row() -> None:
    doubt, now = doubt_of(), 30.0
    for _ in range(20):
        accept_trials(doubt, now, 1)
        assert doubt.is_believed(now)
        doubt.record_sent()
        doubt.record_unanswered(now)
        now += doubt.trial_wait(now, math.inf)


def test_each_trial_that_was_left_before_its_answer_makes_the_next_one_rarer() -> None:
    doubt, now = doubt_of(), 30.0
    waits = []
    for _ in range(8):
        doubt.record_sent()
        doubt.record_unanswered(now)
        waits.append(doubt.trial_wait(now, math.inf))
        now += waits[-1]
    assert waits == [10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0, 300.0]
    doubt.record_sent()
    doubt.record_trial_accepted(now, 1.0)
    doubt.record_sent()
    doubt.record_unanswered(now)
    assert doubt.trial_wait(now, math.inf) == 10.0


def test_a_clock_that_goes_back_keeps_the_times() -> None:
    doubt = doubt_of()
    doubt.refute(0.0)
    doubt.shift_clock(-100.0)
    assert doubt.is_believed(500.0)
    assert doubt.trial_wait(-100.0, math.inf) == 30.0
