"""The gradient limit falls as latency rises above its long average."""

from __future__ import annotations

from tests.unit.limit.answers import queueing, run_answers, steady

from forebay.limit import GradientLimit


def test_a_queue_at_the_server_bounds_the_limit() -> None:
    assert 25 <= run_answers(GradientLimit(), queueing(30), 3000) <= 120


def test_the_limit_grows_while_calls_get_no_slower() -> None:
    assert run_answers(GradientLimit(), steady, 20_000) > 100
