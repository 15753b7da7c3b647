"""The Vegas limit keeps the queue at the server short."""

from __future__ import annotations

from tests.unit.limit.answers import queueing, run_answers, steady

from forebay.interfaces import Outcome
from forebay.limit import VegasLimit


def test_a_queue_at_the_server_bounds_the_limit() -> None:
    assert 25 <= run_answers(VegasLimit(), queueing(30), 3000) <= 120


def test_the_limit_grows_while_calls_get_no_slower() -> None:
    assert run_answers(VegasLimit(), steady, 20_000) > 100


def test_a_refusal_lowers_the_limit() -> None:
    limit = VegasLimit(initial_limit=20)
    for _ in range(5):
        limit.observe(0.1, limit.grant(0.0, 20), Outcome.OVERLOAD)
    assert limit.limit(0.1) == 13
