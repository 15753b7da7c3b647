"""Telling a rate from a limit on the calls in flight, and from chance."""

from __future__ import annotations

from forebay.upstream.accounts.refusals.refusal_cause import RefusalCause


def accept(cause: RefusalCause, at: float, in_flight: int, *, times: int = 1) -> None:
    for _ in range(times):
        cause.record_accepted(at + 1.0, at, in_flight)


def refuse(cause: RefusalCause, at: float, in_flight: int, *, rising: bool = False) -> bool:
    return cause.record_refused(at + 0.1, at, in_flight, rising=rising)


def is_rate(cause: RefusalCause, *, named: bool = False, measured: bool = False) -> bool:
    return cause.is_rate(named=named, measured=measured)


def test_trials_whose_calls_are_refused_speak_for_a_rate() -> None:
    cause = RefusalCause()
    for second in range(1, 4):
        cause.record_limit(second)
        assert is_rate(cause) == (second == 3)


def test_a_dip_of_the_capacity_now_and_then_is_no_rate() -> None:
    cause = RefusalCause()
    for second in range(0, 600, 20):
        cause.record_limit(second)
        assert not is_rate(cause)


def test_a_trial_whose_calls_are_accepted_takes_back_two_whose_calls_were_refused() -> None:
    cause = RefusalCause()
    for second in range(20):
        cause.record_limit(second)
        cause.record_limit(second)
        cause.record_chance()
        assert not is_rate(cause)


def test_refused_trial_calls_of_a_pause_speak_for_a_rate() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 20)
    cause.record_limit(1.0)
    for _ in range(4):
        cause.record_silent_refusal(5)
    assert is_rate(cause)


def test_refused_trial_calls_of_a_pause_with_more_calls_in_flight_than_were_accepted_say_nothing() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 20)
    cause.record_limit(1.0)
    for _ in range(20):
        cause.record_silent_refusal(21)
    assert not is_rate(cause)


def test_refusals_with_more_calls_in_flight_than_were_accepted_speak_against_a_rate() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 20)
    for second in range(1, 9):
        accept(cause, second, 20)
        assert refuse(cause, second + 0.5, 21)
    assert not is_rate(cause, measured=True)
    assert not refuse(cause, 9.0, 20)


def test_a_refusal_that_a_later_call_contradicts_does_not_speak_against_a_rate() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 10)
    for second in range(1, 9):
        refuse(cause, second, 11)
        accept(cause, second + 0.5, 11)
    assert is_rate(cause, measured=True)


def test_calls_that_were_refused_do_not_count_as_in_flight_at_the_provider() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 8)
    for second in range(1, 9):
        refuse(cause, second, 9)
        refuse(cause, second, 10)
        cause.record_accepted(second + 0.6, second + 0.05, 10)  # 8 without the two above
    assert cause.peak == 8
    assert not is_rate(cause, measured=True)


def test_what_was_accepted_half_a_minute_ago_says_nothing() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 50)
    accept(cause, 30.0, 10)
    assert cause.peak == 10


def test_words_decide_until_two_refusals_speak_against_them() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 20)
    refuse(cause, 1.0, 21)
    assert is_rate(cause, named=True)
    refuse(cause, 2.0, 22)
    assert not is_rate(cause, named=True)


def test_calls_sent_at_once_are_one_piece_of_evidence_against_words() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 20)
    for in_flight in range(21, 40):
        refuse(cause, 1.0, in_flight)
    assert is_rate(cause, named=True)


def test_while_a_rate_rises_more_calls_in_flight_say_nothing() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 20)
    for second in range(1, 20):
        assert not refuse(cause, second, 20 + second, rising=True)
    assert is_rate(cause, measured=True)


def test_a_rate_that_was_disproved_needs_twice_the_evidence() -> None:
    cause = RefusalCause()
    cause.record_limit(0.0)
    cause.disprove_rate()
    for _ in range(3):
        cause.record_limit(0.0)
        assert not is_rate(cause)
    cause.record_limit(0.0)
    assert is_rate(cause)


def test_a_call_that_is_refused_after_a_later_one_was_accepted_was_not_in_flight_with_it() -> None:
    cause = RefusalCause()
    cause.record_accepted(1.05, 0.05, 11)
    cause.record_refused(1.2, 0.02, 10)
    assert cause.peak == 10
    assert cause.record_refused(1.0, 0.9, 11)


def test_a_pause_makes_nothing_older() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 40)
    cause.record_limit(1.0)
    cause.record_refused(30.0, 29.9, 5, paused=True)
    cause.leave_out(30.0)
    cause.record_accepted(31.5, 31.0, 1)
    cause.record_limit(31.0)
    assert cause.peak == 40
    assert is_rate(cause)


def test_a_call_that_is_accepted_at_once_contradicts_nothing_before_the_refusals_beside_it_are_known() -> None:
    cause = RefusalCause()
    cause.record_accepted(0.0, 0.0, 8)
    for row in (1.0, 4.0, 7.0):
        assert refuse(cause, row, 9)
        cause.record_accepted(row + 1.0, row + 1.0, 9)  # beside a call that was refused, as is known later
        refuse(cause, row + 0.95, 9, rising=True)
    assert not is_rate(cause, named=True)


def test_of_calls_sent_in_one_moment_a_refused_one_was_not_in_flight_with_the_next() -> None:
    cause = RefusalCause()
    cause.record_accepted(0.0, 0.0, 9)
    cause.record_accepted(2.0, 2.0, 11)
    refuse(cause, 2.0, 9, rising=True)
    refuse(cause, 2.0, 10, rising=True)
    assert refuse(cause, 4.0, 10)
