"""A fixed limit before a provider that refuses everything: it knocks, and is back with the first success."""

from __future__ import annotations

import pytest

from forebay.interfaces import Grant, Outcome
from forebay.limit import FixedLimit


def refuse(limit: FixedLimit, now: float, times: int = 1) -> None:
    """So many calls that are refused, one after another."""
    for _ in range(times):
        assert limit.limit(now) >= 1
        limit.observe(now, limit.grant(now, 1), Outcome.OVERLOAD)


def shut(n: int = 3, now: float = 0.0) -> FixedLimit:
    """One that has been refused everything."""
    limit = FixedLimit(n)
    refuse(limit, now, max(10, n))
    return limit


@pytest.mark.parametrize(("n", "row"), [(3, 10), (25, 25)])
def test_refusals_in_a_row_are_an_outage_and_no_fewer(n: int, row: int) -> None:
    limit = FixedLimit(n)
    refuse(limit, 0.0, row - 1)
    assert limit.limit(0.0) == n
    refuse(limit, 0.0)
    assert limit.limit(0.0) == 0
    assert limit.reopens_at(0.0) == 1.0


def test_a_success_among_refusals_shows_that_it_is_none() -> None:
    limit = FixedLimit(3)
    for _ in range(5):
        refuse(limit, 0.0, 9)
        limit.observe(0.0, limit.grant(0.0, 1), Outcome.SUCCESS)
    assert limit.limit(0.0) == 3


def test_it_knocks_after_silences_that_double_to_five_seconds() -> None:
    limit, now, silences = shut(), 0.0, []
    for _ in range(5):
        when = limit.reopens_at(now)
        assert when is not None
        silences.append(when - now)
        now = when
        refuse(limit, now)
    assert silences == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_one_knocks_at_a_time_and_brings_all_back() -> None:
    limit = shut()
    knock = limit.grant(1.0, 1)
    assert limit.limit(1.0) == 1  # which is out
    limit.observe(3.0, knock, Outcome.SUCCESS)
    assert limit.limit(3.0) == 3
    refuse(limit, 3.0, 9)
    assert limit.limit(3.0) == 3  # the row has begun anew, and so has the silence
    refuse(limit, 3.0)
    assert limit.reopens_at(3.0) == 4.0


def test_one_that_is_let_in_is_followed_by_another() -> None:
    limit = shut()
    knock = limit.grant(1.0, 1)
    limit.accepted(2.0, knock)
    assert limit.limit(2.0) == 2
    limit.accepted(2.0, limit.grant(2.0, 2))
    assert limit.limit(2.0) == 3
    limit.accepted(2.0, limit.grant(2.0, 3))
    assert limit.limit(2.0) == 3  # n


def test_who_was_let_in_and_is_refused_all_the_same_has_ended_no_outage() -> None:
    limit = shut()
    knock = limit.grant(1.0, 1)
    limit.accepted(2.0, knock)  # nothing came for a second
    limit.observe(4.0, knock, Outcome.OVERLOAD)
    assert limit.reopens_at(4.0) == 6.0


def test_a_long_call_from_before_does_not_keep_others_from_knocking() -> None:
    limit = FixedLimit(3)
    limit.grant(0.0, 1)
    refuse(limit, 0.0, 10)
    assert limit.limit(1.0) == 2


@pytest.mark.parametrize("outcome", [Outcome.FAULT, Outcome.IGNORED])
def test_a_knock_that_says_nothing_is_followed_by_another(outcome: Outcome) -> None:
    limit = shut()
    knock: Grant = limit.grant(1.0, 1)
    limit.observe(1.5, knock, outcome)
    assert limit.limit(1.5) == 1
    assert limit.reopens_at(1.5) is None
