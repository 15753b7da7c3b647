"""Telling a rate from a limit on the calls in flight."""

from __future__ import annotations

from forebay.upstream.accounts.refusals.refusal_cause import RefusalCause


def accept(cause: RefusalCause, at: float, in_flight: int, *, times: int = 1) -> None:
    for _ in range(times):
        cause.record_accepted(at + 0.5, at, in_flight, decays=True)


def refuse(cause: RefusalCause, at: float, in_flight: int, *, rising: bool = False) -> None:
    cause.record_refused(at + 0.1, at, in_flight, rising=rising)


def is_rate(cause: RefusalCause, *, named: bool = False, measured: bool = False) -> bool:
    return cause.is_rate(named=named, measured=measured)


def test_refusals_with_no_more_calls_in_flight_than_were_accepted_speak_for_a_rate() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 20)
    for second in range(1, 6):
        refuse(cause, second, 20)
        assert is_rate(cause) == (second == 5)
        accept(cause, second + 0.5, 5)


def test_a_limit_that_falls_by_half_is_not_taken_for_a_rate() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 20)
    for in_flight in range(20, 10, -1):  # calls end, and each new one is refused
        refuse(cause, 1.0 + 0.1 * (20 - in_flight), in_flight)
    assert not is_rate(cause)
    accept(cause, 3.0, 10)
    assert not is_rate(cause)


def test_refusals_go_on_counting_in_a_row_once_few_calls_are_in_flight() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 20)
    for in_flight in (20, 18, 15, 12):
        refuse(cause, 1.0, in_flight)
    assert not is_rate(cause)
    refuse(cause, 2.0, 9)
    assert is_rate(cause)


def test_words_that_name_the_calls_in_flight_ask_for_more_evidence_of_a_rate() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 20)
    for second in range(1, 7):
        assert not cause.is_rate(measured=False, says_concurrency=True)
        refuse(cause, second, 5)
    assert is_rate(cause)
    refuse(cause, 7.0, 5)
    assert cause.is_rate(measured=False, says_concurrency=True)


def test_refusals_with_more_calls_in_flight_than_were_accepted_speak_against_a_rate() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 20)
    for second in range(1, 9):
        accept(cause, second, 20)
        refuse(cause, second + 0.5, 21)
    assert not is_rate(cause)
    assert not is_rate(cause, measured=True)


def test_a_refusal_that_a_later_call_contradicts_speaks_for_a_rate() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 10)
    for second in range(1, 9):
        refuse(cause, second, 11)
        accept(cause, second + 0.5, 11)
    assert is_rate(cause)


def test_refusals_that_one_accepted_call_contradicts_are_one_piece_of_evidence() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 6)
    for tenth in range(10, 20):
        refuse(cause, tenth / 5, 7)
    accept(cause, 5.0, 7)  # one call ended in the same moment as this one began
    assert not is_rate(cause)


def test_calls_that_were_refused_do_not_count_as_in_flight_at_the_provider() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 8)
    for second in range(1, 9):
        refuse(cause, second, 9)
        refuse(cause, second, 10)
        cause.record_accepted(second + 0.6, second + 0.05, 10, decays=True)  # 8 without the two above
    assert cause.peak == 8
    assert not is_rate(cause)


def test_what_was_accepted_half_a_minute_ago_says_nothing() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 50)
    accept(cause, 30.0, 10)
    for second in range(31, 39):
        accept(cause, second, 10)
        refuse(cause, second + 0.5, 11)
    assert not is_rate(cause)


def test_a_few_stray_refusals_in_a_hundred_are_no_rate() -> None:
    cause = RefusalCause()
    for second in range(200):
        accept(cause, second, 20, times=25)
        refuse(cause, second + 0.5, 20)
        assert not is_rate(cause)


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


def test_in_a_row_of_refusals_that_may_be_a_penalty_fewer_calls_in_flight_say_nothing() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 20)
    for second in range(1, 20):
        cause.record_refused(second + 0.1, second, 15, penalty=True)
    assert not is_rate(cause)


def test_while_a_rate_rises_more_calls_in_flight_say_nothing() -> None:
    cause = RefusalCause()
    accept(cause, 0.0, 20)
    for second in range(1, 20):
        refuse(cause, second, 20 + second, rising=True)
    assert is_rate(cause, measured=True)
