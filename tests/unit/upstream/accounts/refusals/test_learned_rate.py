"""A rate that is learned from what a provider accepted between refusals."""

from __future__ import annotations

import math

import pytest

from forebay.upstream.accounts.refusals.learned_rate import LearnedRate
from forebay.upstream.accounts.refusals.refusal_pause import Block


def send(rate: LearnedRate, since: float, until: float, *, per_second: float) -> None:
    """Send calls that are all accepted, at most as fast as the rate allows."""
    now = since
    while now < until:
        now += rate.wait(now)
        rate.record_sent(now, blocked=False)
        now += 1.0 / per_second


def block(rate: LearnedRate, began: float, ended: float, *, guess: bool = True, refusals: int = 1) -> None:
    """Refuse calls from `began` on, several until halfway to `ended`, and accept one then."""
    for _ in range(refusals):
        rate.record_sent(began, blocked=True)
        rate.record_refused(began)
    rate.record_sent(ended, blocked=True)
    refused = began if refusals == 1 else (began + ended) / 2
    rate.learn(ended, Block(began=began, refused=refused, ended=ended, refusals=refusals, paused=True), guess=guess)


def measured(per_second: float = 4.0) -> LearnedRate:
    """Return a rate that was measured at second 20."""
    rate = LearnedRate()
    send(rate, 0.0, 10.0, per_second=20.0)
    block(rate, 10.0, 10.25, guess=False)
    send(rate, 10.25, 20.0, per_second=per_second)
    block(rate, 20.0, 20.25)
    return rate


def test_at_first_calls_are_not_spaced() -> None:
    rate = LearnedRate()
    send(rate, 0.0, 1.0, per_second=1000.0)
    assert rate.wait(1.0, ahead=1000) == 0.0


def test_the_calls_accepted_between_two_refusals_are_the_rate() -> None:
    rate = measured(4.0)
    assert rate.measured
    assert rate.rate == pytest.approx(0.98 * 4.0, rel=0.03)


def test_calls_are_spaced_evenly_at_the_learned_rate() -> None:
    rate = measured(4.0)
    now = 21.0
    rate.record_sent(now, blocked=False)
    assert rate.wait(now) == pytest.approx(1 / rate.rate, rel=0.3)
    assert rate.wait(now, ahead=8) == pytest.approx(9 / rate.rate, rel=0.1)


def test_before_a_measurement_half_of_the_rate_before_is_a_guess_that_rises_each_second() -> None:
    rate = LearnedRate()
    send(rate, 0.0, 10.0, per_second=20.0)
    block(rate, 10.0, 10.25)
    assert not rate.measured
    assert rate.rate == pytest.approx(10.0, rel=0.1)
    send(rate, 11.0, 13.5, per_second=100.0)
    assert rate.rate == pytest.approx(10.0 * 1.25**2, rel=0.3)


def test_calls_expect_a_guess_to_rise_as_it_does_while_it_is_used() -> None:
    rate = LearnedRate()
    send(rate, 0.0, 10.0, per_second=2.0)
    block(rate, 10.0, 10.25)
    assert not rate.measured
    expected, sent, now = rate.wait(10.25, ahead=20), 0, 10.25
    while sent < 20:
        now += rate.wait(now)
        rate.record_sent(now, blocked=False)
        sent += 1
    assert expected == pytest.approx(now - 10.25, rel=0.3)
    assert expected < 0.7 * 20 / 1.0


def test_two_blocks_at_once_are_a_first_guess() -> None:
    rate = LearnedRate()
    send(rate, 0.0, 1.0, per_second=100.0)  # what a large bucket held
    block(rate, 1.0, 1.6, refusals=8)
    assert not rate.known
    block(rate, 1.7, 2.2, refusals=8)
    assert not rate.measured
    assert 2.0 < rate.rate < 6.0


def test_two_blocks_at_once_are_no_guess_where_a_known_quota_explains_them() -> None:
    rate = LearnedRate()
    send(rate, 0.0, 1.0, per_second=100.0)
    for began in (1.0, 1.7, 2.4):
        block(rate, began, began + 0.5, refusals=8, guess=False)
    assert not rate.known


def test_calls_that_are_refused_late_do_not_make_the_guess_lower() -> None:
    rate = LearnedRate()
    rate.record_sent(0.0, blocked=False)
    for _ in range(60):
        rate.record_sent(4.5, blocked=False)
    send(rate, 5.0, 10.2, per_second=4.0)
    for _ in range(60):
        rate.record_refused(4.5)
    block(rate, 10.2, 10.45)
    assert rate.rate == pytest.approx(2.0, rel=0.2)


def test_calls_that_are_refused_after_a_block_has_ended_do_not_make_the_measurement_lower() -> None:
    rate = LearnedRate()
    send(rate, 0.0, 9.0, per_second=4.0)
    for _ in range(60):
        rate.record_sent(9.9, blocked=False)
    block(rate, 10.0, 10.25, guess=False)
    for _ in range(60):
        rate.record_refused(9.9)
    send(rate, 10.25, 20.0, per_second=4.0)
    block(rate, 20.0, 20.25)
    assert rate.measured
    assert rate.rate == pytest.approx(0.98 * 4.0, rel=0.03)


def test_a_guess_that_nothing_refuses_is_forgotten() -> None:
    rate = LearnedRate()
    send(rate, 0.0, 10.0, per_second=20.0)
    block(rate, 10.0, 10.25)
    send(rate, 11.0, 25.0, per_second=200.0)
    assert rate.rate == math.inf


def test_no_guess_is_made_where_a_known_quota_explains_the_refusal() -> None:
    rate = LearnedRate()
    send(rate, 0.0, 10.0, per_second=20.0)
    block(rate, 10.0, 10.25, guess=False)
    assert not rate.known


def test_a_rate_that_is_used_rises_by_growing_steps() -> None:
    rate = measured(4.0)
    before = rate.rate
    send(rate, 20.25, 42.0, per_second=1000.0)
    assert before < rate.rate < 1.2 * before
    send(rate, 42.0, 80.0, per_second=1000.0)
    assert rate.rate > 10 * before


def test_a_rate_that_is_not_used_does_not_rise() -> None:
    rate = measured(4.0)
    before = rate.rate
    send(rate, 20.25, 300.0, per_second=2.0)
    assert rate.rate == before


def test_a_refused_step_brings_back_the_rate_before_it() -> None:
    rate = measured(4.0)
    now = 20.25
    while not rate.rising:
        now += rate.wait(now)
        rate.record_sent(now, blocked=False)
    before = rate.rate
    block(rate, now, now + 0.25)
    assert 0.9 * before < rate.rate <= before
    send(rate, now + 0.25, now + 50.0, per_second=1000.0)
    assert not rate.rising


def test_a_single_refusal_among_many_calls_does_not_lower_the_rate() -> None:
    rate = measured(4.0)
    send(rate, 20.25, 28.0, per_second=1000.0)
    block(rate, 28.0, 28.25)
    before = rate.rate
    send(rate, 28.25, 70.0, per_second=1000.0)
    block(rate, 70.0, 70.5)
    assert rate.rate == before


def test_a_tier_that_falls_far_is_found_within_seconds() -> None:
    rate = measured(40.0)
    assert rate.rate > 35.0
    now = 20.25
    for _ in range(8):  # the new limit lets six calls through in a second and a half
        send(rate, now, now + 0.1, per_second=60.0)
        block(rate, now + 0.2, now + 1.5, refusals=3)
        now += 1.5
    assert rate.rate < 8.0


def test_a_long_block_makes_the_next_step_wait_longer() -> None:
    rate = measured(4.0)
    send(rate, 20.25, 75.0, per_second=1000.0)
    block(rate, 75.0, 95.0, refusals=7)
    learned = rate.rate
    send(rate, 95.0, 600.0, per_second=1000.0)
    assert rate.rate == learned, "thirty times as long as it has blocked"


def test_after_a_row_of_refusals_for_another_cause_calls_begin_again_at_the_rate_before() -> None:
    rate = LearnedRate()
    send(rate, 0.0, 10.0, per_second=20.0)
    rate.record_sent(40.0, blocked=True)
    rate.resume(41.0, Block(began=10.0, refused=32.0, ended=40.0, refusals=9, paused=True))
    assert rate.rate == pytest.approx(20.0, rel=0.1)
    assert not rate.measured
    send(rate, 41.0, 50.0, per_second=200.0)
    assert not rate.known


def test_what_was_accepted_before_a_time_without_calls_measures_nothing() -> None:
    rate = LearnedRate()
    send(rate, 0.0, 10.0, per_second=20.0)
    block(rate, 10.0, 10.25, guess=False)
    send(rate, 60.0, 65.0, per_second=20.0)
    block(rate, 65.0, 65.25, guess=False)
    assert not rate.known


def test_a_rate_without_refusals_is_forgotten_after_ten_minutes() -> None:
    rate = measured(4.0)
    send(rate, 20.25, 700.0, per_second=1.0)
    assert not rate.known


def test_refusals_that_go_on_however_slowly_calls_are_sent_show_that_no_rate_is_the_cause() -> None:
    rate, now = measured(4.0), 20.25
    for _ in range(8):  # a capacity that comes and goes: now and then a call is refused, at any rate
        send(rate, now, now + 15.0, per_second=1000.0)
        block(rate, now + 15.0, now + 20.0, refusals=3)
        now += 20.0
        if rate.is_disproved():
            break
    assert rate.is_disproved()


def test_a_rate_that_rises_and_is_refused_again_and_again_is_not_disproved() -> None:
    rate, now = measured(4.0), 20.25
    for _ in range(8):
        send(rate, now, now + 90.0, per_second=1000.0)
        block(rate, now + 90.0, now + 91.0)
        now += 91.0
        assert not rate.is_disproved()


def test_a_block_whose_first_trial_call_was_accepted_was_no_long_one() -> None:
    rate = measured(0.5)
    send(rate, 20.25, 300.0, per_second=1000.0)
    block(rate, 300.0, 306.0)
    learned = rate.rate
    send(rate, 306.0, 480.0, per_second=1000.0)
    assert rate.rate > learned, "six seconds of silence were ours"


def test_a_row_of_refusals_that_began_when_the_rate_before_was_last_noted_has_no_rate_before() -> None:
    rate = LearnedRate()
    send(rate, 0.0, 20.0, per_second=1.0)
    rate.resume(30.0, Block(began=10.0, refused=29.0, ended=30.0, refusals=9, paused=True))
    assert not rate.known


def test_spaced_calls_that_are_refused_for_long_twice_disprove_a_bucket() -> None:
    rate, now = measured(4.0), 20.25
    for times in (1, 2):
        send(rate, now, now + 9.0, per_second=1000.0)
        block(rate, now + 9.0, now + 12.0, refusals=3)
        now += 12.0
        assert rate.is_disproved() == (times == 2)


def sink(rate: LearnedRate, now: float) -> float:
    """Refuse calls however slow they are until a check of the rate begins, and return when."""
    for _ in range(8):
        before = rate.rate
        send(rate, now, now + 7.0, per_second=0.6 * before)
        block(rate, now + 7.0, now + 7.3)
        now += 7.3
        if rate.rate > before:
            return now
    pytest.fail("no check begins")


def check(rate: LearnedRate, now: float, *, per_second: float) -> float:
    """Accept calls for six seconds, then refuse some, and return when one is accepted again."""
    send(rate, now, now + 6.0, per_second=per_second)
    block(rate, now + 6.0, now + 7.0)
    return now + 7.0


def test_a_rate_that_falls_though_it_has_not_risen_is_checked_by_far_faster_calls() -> None:
    rate, before = measured(4.0), measured(4.0).rate
    sink(rate, 20.3)
    assert rate.rate > 2 * before


def test_a_first_fall_is_a_better_measurement_and_not_checked() -> None:
    rate, before = measured(4.0), measured(4.0).rate
    send(rate, 20.3, 27.0, per_second=2.0)
    block(rate, 27.0, 27.3)
    assert rate.rate < before


def test_a_check_that_accepts_far_more_raises_the_rate_to_that() -> None:
    rate = measured(4.0)
    check(rate, sink(rate, 20.3), per_second=8.0)
    assert 5.0 < rate.rate < 8.0


def test_a_check_that_accepts_few_calls_brings_back_the_rate() -> None:
    rate, before = measured(4.0), measured(4.0).rate
    check(rate, sink(rate, 20.3), per_second=0.5)
    assert 0.3 * before < rate.rate <= 0.8 * before
    assert not rate.rising


def test_a_check_that_accepts_few_calls_takes_back_the_falls_before() -> None:
    rate, now = measured(4.0), 20.25
    for _ in range(40):  # another process takes more and more of the rate: what is left is refused at any speed
        send(rate, now, now + 9.0, per_second=0.9 * rate.rate)
        block(rate, now + 9.0, now + 9.25)
        now += 9.25
        if rate.rate > 4.0:  # a check
            block(rate, now + 0.5, now + 1.0)
            now += 1.0
    assert rate.known
    assert not rate.is_disproved()


def test_checks_that_accept_far_more_twice_in_a_row_disprove_the_rate() -> None:
    rate, now = measured(4.0), 20.3
    for per_second in (8.0, 16.0):
        now = check(rate, sink(rate, now), per_second=per_second)
        assert rate.is_disproved() == (per_second == 16.0)


def test_a_check_that_accepts_few_calls_makes_it_two_again() -> None:
    rate, now = measured(4.0), 20.3
    for per_second in (8.0, 0.5, 8.0):
        now = check(rate, sink(rate, now), per_second=per_second)
        assert not rate.is_disproved()


def test_a_check_that_nothing_refuses_ends_the_rate_after_a_minute() -> None:
    rate = measured(4.0)
    now = sink(rate, 20.3)
    send(rate, now, now + 62.0, per_second=1000.0)
    assert not rate.known


def test_a_check_with_too_few_calls_to_tell_brings_back_the_rate_after_a_minute() -> None:
    rate, before = measured(4.0), measured(4.0).rate
    now = sink(rate, 20.3)
    send(rate, now, now + 62.0, per_second=1.0)
    assert 0.3 * before < rate.rate < before


def test_after_a_long_row_of_refusals_no_check_is_made() -> None:
    rate, before, now = measured(4.0), measured(4.0).rate, 20.25
    for _ in range(2):
        send(rate, now, now + 7.0, per_second=2.0)
        block(rate, now + 7.0, now + 27.0, refusals=7)
        now += 27.0
        assert rate.rate < before, "faster calls would begin a penalty again"


def test_long_refusals_that_a_known_quota_explains_disprove_nothing() -> None:
    rate, now = measured(4.0), 20.25
    for _ in range(5):
        send(rate, now, now + 9.0, per_second=1000.0)
        block(rate, now + 9.0, now + 12.0, refusals=3, guess=False)
        now += 12.0
    assert not rate.is_disproved()


def test_small_steps_up_between_long_refusals_do_not_speak_for_the_rate() -> None:
    rate, now = measured(4.0), 20.25
    for _ in range(2):
        send(rate, now, now + 9.0, per_second=1000.0)
        block(rate, now + 9.0, now + 12.0, refusals=3)
        learned, now = rate.rate, now + 12.0
        while rate.rate == learned:
            send(rate, now, now + 1.0, per_second=1000.0)
            now += 1.0
        block(rate, now, now + 0.25)
        now += 0.25
    assert rate.is_disproved()


def test_a_trial_knows_the_fastest_rate_of_the_last_minute() -> None:
    rate = LearnedRate()
    send(rate, 0.0, 20.0, per_second=10.0)
    send(rate, 20.0, 60.0, per_second=1.0)
    assert rate.recent(60.0) == pytest.approx(10.0, rel=0.1)
    send(rate, 60.0, 150.0, per_second=1.0)
    assert rate.recent(150.0) == pytest.approx(1.0, rel=0.1)


def test_no_rate_is_learned_from_a_few_refusals_that_a_known_quota_explains() -> None:
    rate = LearnedRate()
    for second in range(0, 100, 10):
        send(rate, second, second + 9.0, per_second=10.0)
        block(rate, second + 9.0, second + 9.25, guess=False)
    assert not rate.known


def test_the_refused_calls_of_a_trial_do_not_delay_the_next_rise() -> None:
    rate = measured(4.0)
    send(rate, 20.25, 27.0, per_second=1000.0)
    for _ in range(8):
        rate.record_sent(27.0, blocked=True)
        rate.record_refused(27.0)
    rate.record_sent(27.3, blocked=True)
    rate.learn(27.3, Block(began=27.0, refused=27.1, ended=27.3, refusals=8, paused=True), guess=True)
    learned = rate.rate
    send(rate, 27.3, 150.0, per_second=1000.0)
    assert rate.rate > learned


def test_a_raised_rate_that_is_refused_twice_at_once_falls_to_the_one_before_it_rose() -> None:
    rate = measured(4.0)
    learned, now = rate.rate, 20.5
    while rate.rate < 1.4 * learned:  # a large bucket has saved what the rate left of it
        rate.record_sent(now, blocked=False)
        now += rate.wait(now)
    block(rate, now, now + 0.25)
    assert rate.rate > 1.2 * learned
    block(rate, now + 1.0, now + 2.0, refusals=8)
    assert rate.rate == learned
    send(rate, now + 2.0, now + 30.0, per_second=100.0)
    assert rate.rate == learned, "as after any step that was refused"
