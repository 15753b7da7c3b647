"""The reaction of an account to 429s as a whole; scenarios are in tests/simulation/test_refusals.py."""

from __future__ import annotations

import pytest

from forebay.upstream.accounts.refusals import RefusalControl


def refuse(control: RefusalControl, at: float, in_flight: int, *, named: bool = False) -> bool:
    control.record_sent(at)
    return control.record_refused(at + 0.1, at, in_flight, named=named)


def accept(control: RefusalControl, at: float, in_flight: int) -> None:
    control.record_sent(at)
    control.record_accepted(at + 0.5, at, in_flight)


def test_a_refusal_beyond_what_was_accepted_is_left_to_the_limit() -> None:
    control = RefusalControl()
    accept(control, 0.0, 20)
    assert not refuse(control, 1.0, 21)
    assert control.wait(1.1) == 0.0


def burst(control: RefusalControl, at: float, in_flight: int, *, named: bool = False) -> int:
    """Refuse a call, and all that may be sent right after it; return how many were refused."""
    refuse(control, at, in_flight, named=named)
    refused = 1
    while control.wait(at + 0.1) == 0.0 and refused < 20:
        refuse(control, at + 0.1, in_flight, named=named)
        refused += 1
    return refused


def test_a_refusal_that_names_a_rate_pauses_once_the_calls_right_after_it_are_refused_too() -> None:
    control = RefusalControl()
    accept(control, 0.0, 20)
    assert refuse(control, 1.0, 21, named=True), "it is not left to the limit"
    assert control.wait(1.1) == 0.0
    control = RefusalControl()
    accept(control, 0.0, 20)
    assert burst(control, 1.0, 20, named=True) == 7
    assert control.paused(1.2)


@pytest.mark.parametrize("named", [True, False])
def test_a_rate_is_learned_from_refusals_too_late_for_a_trial_if_they_name_it(*, named: bool) -> None:
    control = RefusalControl()
    for call in range(100):
        accept(control, call / 5, 20)
    control.record_sent(20.0)
    control.record_refused(22.0, 20.0, 20, named=named)
    accept(control, 24.0, 20)
    assert (control.rate.rate < 3.0) is named, "else it goes on as before, at five a second"


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_process_of_which_no_call_was_accepted_finds_no_rate_where_others_may_have_all_slots(share: float) -> None:
    control = RefusalControl()
    control.rate.share = share
    burst(control, 1.0, 20)
    assert (control.export(1.2).score > 0.0) is (share == 1.0)


def test_refusals_at_random_begin_no_pause_and_are_no_rate() -> None:
    control = RefusalControl()
    accept(control, 0.0, 20)
    for second in range(1, 200):
        rate = refuse(control, second, 20)
        for tenth in range(1, 5):
            control.record_sent(second + 0.1 + tenth / 100)
        for tenth in range(1, 5):
            control.record_accepted(second + 0.6, second + 0.1 + tenth / 100, 20)
        assert not rate
        assert control.wait(second + 0.9) == 0.0
    assert not control.rate.known


def test_calls_that_are_refused_again_and_again_for_what_they_ask_begin_no_pause() -> None:
    control = RefusalControl()
    accept(control, 0.0, 20)
    for second in range(1, 100):
        control.record_sent(second)
        control.record_refused(second + 0.1, second, 5, named=True, repeated=True)
        assert not control.blocked


def test_a_known_quota_that_is_used_up_is_the_cause() -> None:
    control = RefusalControl()
    accept(control, 0.0, 20)
    control.record_sent(1.0)
    assert control.record_refused(1.1, 1.0, 21, quota_explains=True)


def test_after_a_penalty_for_calls_in_flight_their_number_stays_below_for_a_time() -> None:
    control = RefusalControl()
    accept(control, 0.0, 50)
    refuse(control, 1.0, 51)
    at = 1.2
    while at < 10.0:
        refuse(control, at, 40)
        at += 0.1 + control.wait(at + 0.1)
    accept(control, 20.0, 10)
    assert control.limit(21.0, 60) == 50
    assert control.limit(21.0, 30) == 30
    assert control.limit(20.0 + 600.0, 60) == 60


def test_a_short_row_of_refusals_at_a_limit_on_calls_in_flight_is_no_penalty() -> None:
    control = RefusalControl()
    accept(control, 0.0, 8)
    for second in range(1, 4):
        refuse(control, second, 9)
    accept(control, 5.0, 8)
    assert control.limit(6.0, 60) == 60


def test_a_pause_is_over_when_the_clock_goes_back() -> None:
    control = RefusalControl()
    burst(control, 1000.0, 1, named=True)
    assert control.wait(1000.3) > 0.0
    assert control.wait(0.0) == 0.0


def test_a_call_that_is_refused_again_and_again_is_not_in_flight_with_those_that_are_accepted() -> None:
    control = RefusalControl()
    accept(control, 0.0, 8)
    for row in (1.0, 5.0):
        control.record_sent(row)
        control.record_sent(row + 0.05)
        control.record_refused(row + 0.1, row, 9, repeated=True)
        control.record_accepted(row + 0.55, row + 0.05, 9)
        rate = refuse(control, row + 1.5, 9, named=True)
        accept(control, row + 3.7, 8)
    assert not rate
