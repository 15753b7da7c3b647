"""The record of a call: how long it has waited."""

from __future__ import annotations

from forebay.gateway.call_record import CallRecord


def test_a_call_waits_for_its_permits_and_not_while_an_attempt_is_under_way() -> None:
    record = CallRecord("openai", 0.0)
    record.begin_wait(1.0)
    record.end_wait(4.0)  # it got a permit
    record.begin_wait(10.0)  # its attempt has ended
    record.end_wait(12.0)  # it got another one
    assert record.waited == 5.0


def test_a_call_that_asked_for_no_permit_has_not_waited() -> None:
    record = CallRecord("openai", 0.0)
    record.end_wait(3.0)
    assert record.waited is None


def test_the_end_of_an_attempt_is_no_wait() -> None:
    record = CallRecord("openai", 0.0)
    record.begin_wait(1.0)
    record.end_wait(1.0)
    record.end_wait(9.0)
    assert record.waited == 0.0


def test_a_permit_that_was_granted_before_a_clock_went_back_was_not_waited_for() -> None:
    record = CallRecord("openai", 0.0)
    record.begin_wait(5.0)
    record.end_wait(4.0)
    assert record.waited == 0.0
