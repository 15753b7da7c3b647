"""Since when nobody was let in, and whether that is too long."""

from __future__ import annotations

from forebay.limit import FixedLimit
from forebay.typing import Outcome
from forebay.upstream.outage import Outage


def silent(now: float) -> FixedLimit:
    """A limit that has been refused everything just now."""
    limit = FixedLimit(1)
    for _ in range(10):
        limit.observe(now, limit.grant(now, 1), Outcome.OVERLOAD)
    return limit


def test_it_lasts_too_long_when_nobody_was_let_in_for_as_long_as_anybody_waits() -> None:
    outage = Outage(silent(29.5), 30.0)
    outage.refused(0.0)
    outage.refused(20.0)
    assert outage.lasts(29.9) is None
    assert outage.lasts(30.0) == 30.0


def test_of_a_time_in_which_nobody_asked_nothing_is_known() -> None:
    outage = Outage(silent(3_600.0), 30.0)
    outage.refused(0.0)
    outage.refused(3_600.0)
    assert outage.lasts(3_600.5) is None


def test_while_a_knock_is_due_whoever_comes_may_knock() -> None:
    outage = Outage(silent(40.0), 30.0)
    outage.refused(0.0)
    assert outage.lasts(40.9) is not None
    assert outage.lasts(41.0) is None


def test_an_outage_is_over_with_the_first_that_is_let_in() -> None:
    outage = Outage(silent(44.5), 30.0)
    outage.refused(0.0)
    outage.over()
    outage.refused(20.0)
    outage.refused(40.0)
    assert outage.lasts(45.0) is None


def test_who_was_sent_away_comes_again_after_the_next_knock_and_not_with_all_the_others() -> None:
    outage = Outage(silent(100.0), 30.0)
    assert outage.again(100.25, 0.0) == 0.75
    assert outage.again(100.25, 0.5) == 5.75
