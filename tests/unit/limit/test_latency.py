"""The limits that go by latency, for tools whose calls all cost the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from forebay.interfaces import Limit, Outcome
from forebay.limit import AimdLimit, FixedLimit, GradientLimit, TimeoutAimdLimit, VegasLimit


def rounds(limit: Limit, took: Callable[[int], float], count: int) -> int:
    """Answers one after the other, each as late as `took` says of the number in flight; the limit in the end."""
    now = 1000.0
    for _ in range(count):
        n = limit.limit(now)
        now += took(n) / n
        limit.observe(now, limit.grant(now - took(n), n), Outcome.SUCCESS)
    return limit.limit(now)


def queueing(slots: int) -> Callable[[int], float]:
    return lambda n: max(1.0, n / slots)


@pytest.mark.parametrize("make", [GradientLimit, VegasLimit], ids=["gradient", "vegas"])
def test_a_queue_at_the_other_side_holds_it(make: Callable[[], Limit]) -> None:
    assert 25 <= rounds(make(), queueing(30), 3000) <= 120


@pytest.mark.parametrize("make", [GradientLimit, VegasLimit, TimeoutAimdLimit], ids=["gradient", "vegas", "timeout"])
def test_calls_that_get_no_slower_let_it_grow(make: Callable[[], Limit]) -> None:
    assert rounds(make(), lambda _: 1.0, 20_000) > 100


def test_the_timeout_is_what_holds_aimd() -> None:
    assert 100 <= rounds(TimeoutAimdLimit(timeout=5.0), queueing(30), 20_000) <= 160


def test_a_late_answer_lowers_aimd_whatever_it_was() -> None:
    limit = TimeoutAimdLimit(timeout=5.0, initial_limit=20)
    limit.observe(6.0, limit.grant(0.0, 20), Outcome.IGNORED)
    assert limit.limit(6.0) == 18


def test_epoch_aimd_doubles_until_its_first_refusal_and_creeps_after_it() -> None:
    limit = AimdLimit(initial_limit=10)
    assert rounds(limit, lambda _: 1.0, 30) >= 13
    limit.observe(9.0, limit.grant(9.0, limit.limit(9.0)), Outcome.OVERLOAD)
    cut = limit.limit(9.0)
    assert cut <= rounds(limit, lambda _: 1.0, 30) <= cut + 1


def test_a_refusal_lowers_vegas() -> None:
    limit = VegasLimit(initial_limit=20)
    for _ in range(5):
        limit.observe(0.1, limit.grant(0.0, 20), Outcome.OVERLOAD)
    assert limit.limit(0.1) == 13


def test_a_fixed_limit_is_fixed() -> None:
    limit = FixedLimit(7)
    assert rounds(limit, lambda _: 1000.0, 10) == 7
    limit.observe(0.0, limit.grant(0.0, 7), Outcome.OVERLOAD)
    assert limit.limit(0.0) == 7
    assert limit.reopens_at(0.0) is None
