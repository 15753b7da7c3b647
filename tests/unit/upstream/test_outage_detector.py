"""The outage detector: since when no call was accepted, and whether that is too long to wait."""

from __future__ import annotations

from forebay.interfaces import Outcome
from forebay.limit import FixedLimit
from forebay.upstream.outage_detector import OutageDetector


def silent(now: float) -> FixedLimit:
    """Return a limit that backs off from an outage."""
    limit = FixedLimit(1)
    for _ in range(10):
        limit.observe(now, limit.grant(now, 1), Outcome.OVERLOAD)
    return limit


def test_an_outage_is_too_long_when_no_call_was_accepted_for_the_longest_wait() -> None:
    outage = OutageDetector(silent(29.5), 30.0)
    outage.record_throttled(0.0)
    outage.record_throttled(20.0)
    assert outage.duration(29.9) is None
    assert outage.duration(30.0) == 30.0


def test_a_time_without_calls_is_no_outage() -> None:
    outage = OutageDetector(silent(3_600.0), 30.0)
    outage.record_throttled(0.0)
    outage.record_throttled(3_600.0)
    assert outage.duration(3_600.5) is None


def test_a_call_is_sent_when_the_limit_reopens() -> None:
    outage = OutageDetector(silent(40.0), 30.0)
    outage.record_throttled(0.0)
    assert outage.duration(40.9) is not None
    assert outage.duration(41.0) is None


def test_an_outage_ends_with_the_first_accepted_call() -> None:
    outage = OutageDetector(silent(44.5), 30.0)
    outage.record_throttled(0.0)
    outage.record_accepted()
    outage.record_throttled(20.0)
    outage.record_throttled(40.0)
    assert outage.duration(45.0) is None


def test_rejected_calls_retry_after_the_limit_reopens_and_spread_out() -> None:
    outage = OutageDetector(silent(100.0), 30.0)
    assert outage.retry_after(100.25, 0.0) == 0.75
    assert outage.retry_after(100.25, 0.5) == 5.75
