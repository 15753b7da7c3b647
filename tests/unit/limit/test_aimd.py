"""The two AIMD limits: one falls at a refusal, the other at a late answer."""

from __future__ import annotations

from tests.unit.limit.answers import queueing, run_answers, steady

from forebay.interfaces import Outcome
from forebay.limit import AimdLimit, TimeoutAimdLimit


def test_the_aimd_limit_doubles_until_its_first_refusal_and_grows_slowly_after_it() -> None:
    limit = AimdLimit(initial_limit=10)
    assert run_answers(limit, steady, 30) >= 13
    limit.observe(9.0, limit.grant(9.0, limit.limit(9.0)), Outcome.OVERLOAD)
    cut = limit.limit(9.0)
    assert cut <= run_answers(limit, steady, 30) <= cut + 1


def test_the_timeout_aimd_limit_grows_while_calls_get_no_slower() -> None:
    assert run_answers(TimeoutAimdLimit(), steady, 20_000) > 100


def test_the_timeout_bounds_the_timeout_aimd_limit() -> None:
    assert 100 <= run_answers(TimeoutAimdLimit(timeout=5.0), queueing(30), 20_000) <= 160


def test_a_late_answer_of_any_outcome_lowers_the_timeout_aimd_limit() -> None:
    limit = TimeoutAimdLimit(timeout=5.0, initial_limit=20)
    limit.observe(6.0, limit.grant(0.0, 20), Outcome.IGNORED)
    assert limit.limit(6.0) == 18
