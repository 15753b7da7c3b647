"""A fixed limit stays as it is, except in an outage: it sends trial calls, and the first success restores it."""

from __future__ import annotations

import pytest
from tests.unit.limit.answers import run_answers

from forebay.interfaces import Outcome
from forebay.limit import FixedLimit, Grant


def refuse(limit: FixedLimit, now: float, times: int = 1) -> None:
    """Send `times` calls that are refused, one after another."""
    for _ in range(times):
        assert limit.limit(now) >= 1
        limit.observe(now, limit.grant(now, 1), Outcome.OVERLOAD)


def limit_in_outage(n: int = 3, now: float = 0.0) -> FixedLimit:
    """Return a limit after an outage has begun."""
    limit = FixedLimit(n)
    refuse(limit, now, max(10, n))
    return limit


@pytest.mark.parametrize(("n", "refusals"), [(3, 10), (25, 25)])
def test_enough_refusals_in_a_row_are_an_outage(n: int, refusals: int) -> None:
    limit = FixedLimit(n)
    refuse(limit, 0.0, refusals - 1)
    assert limit.limit(0.0) == n
    refuse(limit, 0.0)
    assert limit.limit(0.0) == 0
    assert limit.reopens_at(0.0) == 1.0


def test_a_success_among_refusals_prevents_an_outage() -> None:
    limit = FixedLimit(3)
    for _ in range(5):
        refuse(limit, 0.0, 9)
        limit.observe(0.0, limit.grant(0.0, 1), Outcome.SUCCESS)
    assert limit.limit(0.0) == 3


def test_the_silence_between_trial_calls_doubles_to_five_seconds() -> None:
    limit, now, silences = limit_in_outage(), 0.0, []
    for _ in range(5):
        when = limit.reopens_at(now)
        assert when is not None
        silences.append(when - now)
        now = when
        refuse(limit, now)
    assert silences == [1.0, 2.0, 4.0, 5.0, 5.0]


def test_one_trial_call_goes_at_a_time_and_its_success_restores_the_limit() -> None:
    limit = limit_in_outage()
    trial = limit.grant(1.0, 1)
    assert limit.limit(1.0) == 1  # the trial call
    limit.observe(3.0, trial, Outcome.SUCCESS)
    assert limit.limit(3.0) == 3
    refuse(limit, 3.0, 9)
    assert limit.limit(3.0) == 3  # the count starts again, and so does the silence
    refuse(limit, 3.0)
    assert limit.reopens_at(3.0) == 4.0


def test_an_accepted_trial_call_is_followed_by_another() -> None:
    limit = limit_in_outage()
    trial = limit.grant(1.0, 1)
    limit.accepted(2.0, trial)
    assert limit.limit(2.0) == 2
    limit.accepted(2.0, limit.grant(2.0, 2))
    assert limit.limit(2.0) == 3
    limit.accepted(2.0, limit.grant(2.0, 3))
    assert limit.limit(2.0) == 3  # n


def test_a_late_refusal_of_an_accepted_trial_call_prolongs_the_outage() -> None:
    limit = limit_in_outage()
    trial = limit.grant(1.0, 1)
    limit.accepted(2.0, trial)  # no refusal within a second
    limit.observe(4.0, trial, Outcome.OVERLOAD)
    assert limit.reopens_at(4.0) == 6.0


def test_a_long_call_from_before_the_outage_does_not_block_trial_calls() -> None:
    limit = FixedLimit(3)
    limit.grant(0.0, 1)
    refuse(limit, 0.0, 10)
    assert limit.limit(1.0) == 2


@pytest.mark.parametrize("outcome", [Outcome.FAULT, Outcome.IGNORED])
def test_a_trial_call_without_a_signal_is_followed_by_another(outcome: Outcome) -> None:
    limit = limit_in_outage()
    trial: Grant = limit.grant(1.0, 1)
    limit.observe(1.5, trial, outcome)
    assert limit.limit(1.5) == 1
    assert limit.reopens_at(1.5) is None


def test_latency_and_a_lone_refusal_do_not_change_the_limit() -> None:
    limit = FixedLimit(7)
    assert run_answers(limit, lambda _: 1000.0, 10) == 7
    limit.observe(0.0, limit.grant(0.0, 7), Outcome.OVERLOAD)
    assert limit.limit(0.0) == 7
    assert limit.reopens_at(0.0) is None
