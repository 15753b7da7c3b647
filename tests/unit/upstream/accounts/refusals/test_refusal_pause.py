"""The pause after refusals, and its trial calls."""

from __future__ import annotations

import itertools

import pytest

from forebay.upstream.accounts.refusals.refusal_pause import Block, RefusalPause

TRIP = 0.1  # seconds until a refusal arrives


def refuse(pause: RefusalPause, at: float, *, retry_after: float = 0.0, certain: bool = True) -> None:
    pause.record_sent(at)
    pause.record_refused(at + TRIP, at, retry_after=retry_after, certain=certain)


def trials(pause: RefusalPause, until: float, *, retry_after: float = 0.0, ends: float | None = None) -> list[float]:
    """Refuse a call at second 0 and each call that may be sent until `until`; return when these were sent.

    Args:
        pause: under test.
        until: seconds.
        retry_after: that each refusal asks for.
        ends: when the Retry-After of each refusal ends instead.
    """
    refuse(pause, 0.0, retry_after=retry_after if ends is None else ends)
    now, sent = TRIP, []
    while (now := now + pause.wait(now)) < until:
        sent.append(now)
        refuse(pause, now, retry_after=retry_after if ends is None else max(0.0, ends - now - TRIP))
        now += TRIP
    return sent


def gaps(times: list[float]) -> list[float]:
    return [round(later - earlier - TRIP, 6) for earlier, later in itertools.pairwise(times)]


def test_each_refused_trial_call_doubles_the_silence_to_a_few_seconds() -> None:
    assert gaps(trials(RefusalPause(), 40.0)) == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_after_a_minute_the_silence_goes_on_doubling_to_two_minutes() -> None:
    assert gaps(trials(RefusalPause(), 500.0))[-5:] == [16.0, 32.0, 64.0, 120.0, 120.0]


def test_one_trial_call_goes_at_a_time() -> None:
    pause = RefusalPause()
    refuse(pause, 0.0)
    assert pause.wait(0.2) == pytest.approx(0.15)
    assert pause.wait(0.35) == 0.0
    pause.record_sent(0.35)
    assert pause.wait(0.35) == 1.0, "until it counts as accepted"
    pause.record_refused(0.45, 0.35, retry_after=0.0, certain=True)
    assert pause.wait(0.45) == pytest.approx(0.5)


def test_a_trial_call_that_was_not_answered_makes_room_for_the_next() -> None:
    pause = RefusalPause()
    refuse(pause, 0.0)
    pause.record_sent(1.0)
    assert pause.wait(2.0) == 0.0


def test_an_accepted_trial_call_ends_the_pause() -> None:
    pause = RefusalPause()
    refuse(pause, 0.0)
    refuse(pause, 1.0)
    pause.record_sent(5.0)
    assert pause.record_accepted(5.0) == Block(began=TRIP, refused=1.0, ended=5.0, refusals=2, paused=True)
    assert not pause.blocked
    assert pause.wait(5.0) == 0.0


def test_a_call_sent_before_the_refusal_does_not_end_the_pause() -> None:
    pause = RefusalPause()
    refuse(pause, 0.0)
    assert pause.record_accepted(0.05) is None
    assert pause.wait(TRIP) > 0


def test_calls_refused_together_begin_one_silence() -> None:
    pause = RefusalPause()
    for _ in range(20):
        pause.record_sent(0.0)
    for _ in range(20):
        pause.record_refused(TRIP, 0.0, retry_after=0.0, certain=True)
    assert pause.wait(TRIP) == pytest.approx(0.25)


def test_a_rate_that_only_the_last_of_several_refusals_shows_begins_a_silence() -> None:
    pause = RefusalPause()
    for _ in range(5):
        pause.record_sent(0.0)
    for number in range(5):
        pause.record_refused(TRIP, 0.0, retry_after=0.0, certain=number == 4)
    assert pause.wait(TRIP) == pytest.approx(0.25)


def test_without_a_cause_only_the_eighth_refusal_in_a_row_begins_a_silence() -> None:
    pause = RefusalPause()
    for second in range(8):
        refuse(pause, second, certain=False)
        assert pause.wait(second + TRIP) == 0.0
    refuse(pause, 8.0, certain=False)
    assert pause.wait(8.0 + TRIP) == 0.25


def test_calls_accepted_in_between_begin_the_row_again() -> None:
    pause = RefusalPause()
    for second in range(40):
        refuse(pause, second, certain=False)
        pause.record_mixed(second + 0.5)
        assert pause.wait(second + 0.5) == 0.0


@pytest.mark.parametrize("retry_after", [30.0, 3600.0, 86_400.0 * 32])
def test_a_retry_after_that_is_not_checked_yet_does_not_delay_the_first_trial_call(retry_after: float) -> None:
    assert trials(RefusalPause(), 20.0, retry_after=retry_after) == trials(RefusalPause(), 20.0)


def test_a_trial_call_goes_when_a_retry_after_has_passed() -> None:
    assert 20.0 in [pytest.approx(at) for at in trials(RefusalPause(), 25.0, ends=20.0)]


def test_until_a_retry_after_that_was_right_has_passed_calls_count_as_refused() -> None:
    pause = RefusalPause()
    trials(pause, 19.0, ends=20.0)
    pause.record_sent(20.1)
    block = pause.record_accepted(20.1)
    assert block is not None
    assert block.refused == pytest.approx(20.0)


def test_a_retry_after_that_was_right_is_kept() -> None:
    pause = RefusalPause()
    trials(pause, 19.0, ends=20.0)
    pause.record_sent(20.1)
    pause.record_accepted(20.1)
    refuse(pause, 100.0, retry_after=30.0)
    assert pause.wait(100.0 + TRIP) == 30.0
    assert pause.expected_wait(100.0 + TRIP) == 30.0


def test_a_retry_after_that_was_right_is_kept_for_a_minute_at_most() -> None:
    pause = RefusalPause()
    trials(pause, 19.0, ends=20.0)
    pause.record_sent(20.1)
    pause.record_accepted(20.1)
    refuse(pause, 100.0, retry_after=86_400.0)
    assert pause.wait(100.0 + TRIP) == 60.0


def test_a_retry_after_that_was_wrong_is_ignored() -> None:
    pause = RefusalPause()
    refuse(pause, 0.0, retry_after=3600.0)
    assert pause.expected_wait(TRIP) == 30.0, "it may be right"
    pause.record_sent(1.0)
    pause.record_accepted(1.0)
    refuse(pause, 100.0, retry_after=3600.0)
    assert pause.expected_wait(100.0 + TRIP) == pause.wait(100.0 + TRIP) == 0.25


def test_a_penalty_that_each_call_extends_is_waited_for_sooner_the_next_time() -> None:
    pause = RefusalPause()
    assert gaps(trials(pause, 200.0))[-1] == 64.0
    pause.record_sent(300.0)
    pause.record_accepted(300.0)
    refuse(pause, 400.0)
    now = 400.0 + TRIP
    sent = []
    while now < 600.0:
        now += pause.wait(now)
        sent.append(now - 400)
        refuse(pause, now)
        now += TRIP
    assert any(gap > 60.0 for gap in gaps(sent[:6]))


def test_a_block_is_forgotten_when_nobody_calls() -> None:
    pause = RefusalPause()
    refuse(pause, 0.0)
    pause.record_sent(3600.0)
    assert not pause.blocked
    assert pause.wait(3600.0) == 0.0


def test_a_silence_as_long_as_a_penalty_ends_when_calls_are_accepted() -> None:
    pause = RefusalPause()
    trials(pause, 130.0)
    at = 200.0
    pause.record_sent(at)
    block = pause.record_accepted(at)
    assert block is not None
    assert block.refused == at


@pytest.mark.parametrize("first_silence", [0.5, 5.0, 30.0])
def test_the_first_silence_is_a_few_seconds_at_most(first_silence: float) -> None:
    pause = RefusalPause()
    pause.record_sent(0.0)
    pause.record_refused(TRIP, 0.0, retry_after=0.0, certain=True, first_silence=first_silence)
    assert pause.wait(TRIP) == min(8.0, first_silence)
