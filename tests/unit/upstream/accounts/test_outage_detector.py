"""The outage detector: for how long the provider has throttled every call."""

from __future__ import annotations

from forebay.interfaces import Outcome
from forebay.limit import FixedLimit
from forebay.upstream.accounts.outage_detector import OutageDetector


def limit_in_outage(now: float) -> FixedLimit:
    """Return a limit whose last ten calls were throttled at `now`."""
    limit = FixedLimit(1)
    for _ in range(10):
        limit.observe(now, limit.grant(now, 1), Outcome.OVERLOAD)
    return limit


def test_an_outage_counts_once_it_lasts_as_long_as_a_call_may_wait() -> None:
    outage = OutageDetector(limit_in_outage(29.5), 30.0)
    outage.record_throttled(0.0)
    outage.record_throttled(20.0)
    assert outage.duration(29.9) is None
    assert outage.duration(30.0) == 30.0


def test_time_without_calls_does_not_count_as_an_outage() -> None:
    outage = OutageDetector(limit_in_outage(3_600.0), 30.0)
    outage.record_throttled(0.0)
    outage.record_throttled(3_600.0)
    assert outage.duration(3_600.5) is None


def test_no_outage_is_reported_while_a_trial_call_is_due() -> None:
    outage = OutageDetector(limit_in_outage(40.0), 30.0)
    outage.record_throttled(0.0)
    assert outage.duration(40.9) is not None
    assert outage.duration(41.0) is None


def test_an_outage_ends_with_the_first_accepted_call() -> None:
    outage = OutageDetector(limit_in_outage(44.5), 30.0)
    outage.record_throttled(0.0)
    outage.record_accepted()
    outage.record_throttled(20.0)
    outage.record_throttled(40.0)
    assert outage.duration(45.0) is None


def test_rejected_calls_come_back_after_the_next_trial_call_at_different_times() -> None:
    outage = OutageDetector(limit_in_outage(100.0), 30.0)
    assert outage.retry_after(100.25, 0.0) == 0.75
    assert outage.retry_after(100.25, 0.5) == 5.75
