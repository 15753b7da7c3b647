"""Timeouts of callers: when they speak against the provider, and when a retry may help."""

from __future__ import annotations

import pytest

from forebay.upstream.accounts.timeout_evidence import TimeoutEvidence


def evidence(*seconds: float) -> TimeoutEvidence:
    found = TimeoutEvidence()
    for each in seconds:
        found.record_success(each)
    return found


def test_a_caller_that_waits_less_than_calls_take_proves_nothing() -> None:
    known = evidence(*[5.0] * 60)
    for _ in range(1000):
        assert known.judge(2.0) == (False, False)


def test_a_silence_far_longer_than_any_call_takes_is_a_fault() -> None:
    assert evidence(*[5.0] * 60).judge(60.0).fault


def test_timeouts_that_chance_explains_one_by_one_are_a_fault_together() -> None:
    known = evidence(*[float(each) for each in range(1, 61)])
    verdicts = [known.judge(45.0).fault for _ in range(4)]
    assert verdicts == [False, False, False, True]


def test_an_answer_in_between_ends_the_silence() -> None:
    known = evidence(*[float(each) for each in range(1, 61)])
    for _ in range(20):
        assert not known.judge(45.0).fault
        known.record_answer()


def test_hasty_callers_do_not_hide_a_silence() -> None:
    known = evidence(*[5.0] * 60)
    for _ in range(60):
        known.judge(2.0)
    assert known.judge(60.0).fault


def test_a_provider_that_has_gone_silent_stays_at_fault() -> None:
    known = evidence(*[5.0] * 60)
    assert all(known.judge(20.0).fault for _ in range(500))


def test_a_retry_may_help_where_most_calls_end_in_time() -> None:
    known = evidence(*[float(each) for each in range(1, 61)])
    assert known.judge(40.0).retry_may_help
    assert not known.judge(10.0).retry_may_help


@pytest.mark.parametrize(("seconds", "fault"), [(10.0, False), (60.0, True)])
def test_of_an_unknown_provider_only_a_long_silence_is_a_fault(seconds: float, fault: bool) -> None:  # noqa: FBT001
    assert evidence(5.0).judge(seconds) == (fault, True)
