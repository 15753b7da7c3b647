"""The limits that go by latency, for tools whose calls all cost the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from forebay.interfaces import Outcome
from forebay.limit import AimdLimit, FixedLimit, GradientLimit, Limit, TimeoutAimdLimit, VegasLimit


def run_answers(limit: Limit, seconds_for: Callable[[int], float], count: int) -> int:
    """Return the limit after `count` answers, each as late as `seconds_for` says for the calls in flight."""
    now = 1000.0
    for _ in range(count):
        n = limit.limit(now)
        now += seconds_for(n) / n
        limit.observe(now, limit.grant(now - seconds_for(n), n), Outcome.SUCCESS)
    return limit.limit(now)


def queueing(slots: int) -> Callable[[int], float]:
    return lambda n: max(1.0, n / slots)


@pytest.mark.parametrize("make", [GradientLimit, VegasLimit], ids=["gradient", "vegas"])
def test_a_queue_at_the_server_bounds_the_limit(make: Callable[[], Limit]) -> None:
    assert 25 <= run_answers(make(), queueing(30), 3000) <= 120


@pytest.mark.parametrize("make", [GradientLimit, VegasLimit, TimeoutAimdLimit], ids=["gradient", "vegas", "timeout"])
def test_the_limit_grows_while_calls_get_no_slower(make: Callable[[], Limit]) -> None:
    assert run_answers(make(), lambda _: 1.0, 20_000) > 100


def test_the_timeout_bounds_the_timeout_aimd_limit() -> None:
    assert 100 <= run_answers(TimeoutAimdLimit(timeout=5.0), queueing(30), 20_000) <= 160


def test_a_late_answer_of_any_outcome_lowers_the_timeout_aimd_limit() -> None:
    limit = TimeoutAimdLimit(timeout=5.0, initial_limit=20)
    limit.observe(6.0, limit.grant(0.0, 20), Outcome.IGNORED)
    assert limit.limit(6.0) == 18


def test_the_aimd_limit_doubles_until_its_first_refusal_and_grows_slowly_after_it() -> None:
    limit = AimdLimit(initial_limit=10)
    assert run_answers(limit, lambda _: 1.0, 30) >= 13
    limit.observe(9.0, limit.grant(9.0, limit.limit(9.0)), Outcome.OVERLOAD)
    cut = limit.limit(9.0)
    assert cut <= run_answers(limit, lambda _: 1.0, 30) <= cut + 1


def test_a_refusal_lowers_the_vegas_limit() -> None:
    limit = VegasLimit(initial_limit=20)
    for _ in range(5):
        limit.observe(0.1, limit.grant(0.0, 20), Outcome.OVERLOAD)
    assert limit.limit(0.1) == 13


def test_a_fixed_limit_does_not_change() -> None:
    limit = FixedLimit(7)
    assert run_answers(limit, lambda _: 1000.0, 10) == 7
    limit.observe(0.0, limit.grant(0.0, 7), Outcome.OVERLOAD)
    assert limit.limit(0.0) == 7
    assert limit.reopens_at(0.0) is None
